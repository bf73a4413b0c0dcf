"""
Asking frozen models: over HTTP with every fault a server can have, in process, and by the commands
that write captions and hints.

    python -m pytest tests/test_teachers.py
"""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from conftest import RECIPE, ROOT, launch
from servers import ChatServer, text_of, transformers_serve, write_internvl, write_qwen_vl

from data.clips import BadRow, decode_clip
from data.rows import normalize_row
from run.errors import UserError
from teachers import annotate, chat, client, judge

KEY = "sk-not-to-be-told"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def rows(toy_dir, tmp_path):
    """A folder with its own copy of four rows of the toy's stage 2 and their clips."""
    (tmp_path / "clips").mkdir()
    lines = (toy_dir / "stage2/train.jsonl").read_text().splitlines()[:4]
    for i, line in enumerate(lines):
        row = json.loads(line)
        shutil.copy(toy_dir / "stage2" / row["video"], tmp_path / row["video"])
        del row["hint"]
        lines[i] = json.dumps(row)
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def teacher_of(folder, where, name="m", **changes):
    settings = dict(concurrency=4, timeout=5.0, retries=2) | changes
    return client.Teacher(str(where), name, folder, RECIPE, folder / "answers", **settings)


def row_of(folder, i=0):
    return normalize_row(read(folder / "in.jsonl")[i])


# ---- a server and its faults


def ask_once(url, **changes):
    return chat.Server(url, **dict(key="", timeout=5.0, retries=2) | changes).chat(dict(model="m"))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_what_may_pass_is_asked_again(status):
    with ChatServer(lambda r, n: "yes" if n == 3 else (status, {}, b"busy")) as server:
        assert ask_once(server.url) == "yes" and len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 301])
def test_a_refusal_is_not_asked_again(status):
    location = {"Location": "http://127.0.0.1:9/v1/chat/completions"}
    with ChatServer(lambda r, n: (status, location, b"no such thing")) as server:
        with pytest.raises(chat.NoAnswer, match=f"status {status}: no such thing"):
            ask_once(server.url)
        assert len(server.requests) == 1


def test_the_server_says_how_long_to_wait(monkeypatch):
    with ChatServer(lambda r, n: "yes" if n == 2 else (429, {"Retry-After": "0.4"}, b"")) as server:
        began = time.monotonic()
        assert ask_once(server.url) == "yes" and time.monotonic() - began > 0.4
    assert chat.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert chat.retry_after("1e9") == chat.MAX_WAIT and chat.retry_after("nan") == 0
    assert chat.retry_after(None) == chat.retry_after("soon") == 0


def test_back_off_grows():
    times = []
    with ChatServer(lambda r, n: times.append(time.monotonic()) or (500, {}, b"")) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat, "FIRST_WAIT", 0.1)
            patch.setattr(chat.random, "random", lambda: 0.5)
            with pytest.raises(chat.NoAnswer):
                ask_once(server.url, retries=3)
    gaps = np.diff(times)
    assert len(gaps) == 3 and gaps[1] > 1.5 * gaps[0] and gaps[2] > 1.5 * gaps[1]


GARBAGE = [
    b"",
    b"<html>",
    b"{}",
    b'{"choices": []}',
    b'{"choices": [{"message": {"content": null}}]}',
    b'{"choices": [{"message": {"content": "  "}}]}',
    b"[" * 100_000,
    b"\xff\xfe",
    b'"text"',
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_no_answer(content):
    with ChatServer(lambda r, n: (200, {}, content)) as server:
        with pytest.raises(chat.NoAnswer, match="sent no text"):
            ask_once(server.url)


def test_half_characters_are_replaced():
    content = b'{"choices": [{"message": {"content": "a\\ud800b"}}]}'
    with ChatServer(lambda r, n: (200, {}, content)) as server:
        assert ask_once(server.url) == "a?b"


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')


@pytest.mark.parametrize("fault", ["silent", "drip", "cut", "nobody", "not http", "huge"])
def test_dead_and_slow_servers_end_in_time(fault, monkeypatch):
    monkeypatch.setattr(chat, "MAX_REPLY", 10_000)
    answer = {"silent": "x", "drip": drip, "cut": cut, "huge": (200, {}, b"x" * 20_000)}
    answer["not http"] = lambda handler: handler.wfile.write(b"\0\0garbage\n\n")
    server = ChatServer(lambda r, n: answer.get(fault, ""), delay=2.0 * (fault == "silent"))
    if fault == "nobody":
        server.stop()
    began = time.monotonic()
    with pytest.raises(chat.NoAnswer, match="does not answer") as told:
        ask_once(server.url, timeout=0.4, retries=1)
    assert told.value.dead and time.monotonic() - began < 1.5
    if fault != "nobody":
        server.stop()


def test_closing_ends_what_is_under_way(rows):
    with ChatServer(lambda r, n: "late", delay=5.0) as server:
        teacher = teacher_of(rows, server.url, timeout=30.0)
        asked = teacher.submit(teacher.ask, row_of(rows), (), "text", 9, str)
        while not server.requests:
            time.sleep(0.01)
        began = time.monotonic()
        teacher.__exit__()
        with pytest.raises(chat.NoAnswer):
            asked.result()
        assert time.monotonic() - began < 1


def test_the_key_goes_to_the_server_and_nowhere_else(rows, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    reply = lambda r, n: f"you sent {KEY}" if n == 1 else (401, {}, f"wrong key {KEY}".encode())
    with ChatServer(reply) as server:
        teacher = teacher_of(rows, server.url)
        said = teacher.ask(row_of(rows), (), "one", 9, str)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert KEY not in said and said == "you sent ***"
        with pytest.raises(UserError, match="OPENAI_API_KEY") as told:
            teacher.ask(row_of(rows), (), "two", 9, str)
        assert KEY not in str(told.value)
    kept = list((rows / "answers").rglob("*.json"))
    assert len(kept) == 1 and KEY not in kept[0].read_text()
    assert KEY not in json.dumps(server.requests)


def test_no_error_tells_the_key(monkeypatch):
    """A server that echoes it where no status line is, or half of it where a message is cut."""
    for reply in (
        lambda handler: handler.wfile.write(f"{KEY} nonsense\n\n".encode()),
        (400, {}, b"x" * 190 + KEY.encode()),
        (400, {}, b" " * 290 + KEY.encode()),
    ):
        with ChatServer(lambda r, n: reply) as server, pytest.raises(chat.NoAnswer) as told:
            ask_once(server.url, key=KEY, retries=0)
        assert KEY[:6] not in str(told.value) and "***" in str(told.value)


@pytest.mark.parametrize(
    "where", ["http://host:80x/v1", "http:///v1", "http://[x/v1", "http://host:0/v1"]
)
def test_an_address_that_is_none_is_one_line(rows, where):
    with pytest.raises(UserError, match="is no address .* give one like") as told:
        teacher_of(rows, where)
    assert "\n" not in str(told.value)
    assert f"prepare.py: {where} is no address" in caption(rows, where, code=1)


def test_no_more_requests_at_once_than_allowed(rows):
    with ChatServer(lambda r, n: "x", delay=0.05) as server:
        teacher = teacher_of(rows, server.url, concurrency=3)
        asked = [teacher.submit(teacher.ask, row_of(rows), (), str(i), 9, str) for i in range(12)]
        assert [a.result() for a in asked] == ["x"] * 12 and server.most_at_once == 3


# ---- what is asked, and what is kept


def test_frames_and_sound_arrive_as_decoded(rows):
    clip = decode_clip(row_of(rows), rows, RECIPE)
    with ChatServer(lambda r, n: "ok") as server:
        teacher_of(rows, server.url).ask(row_of(rows), ("frames", "audio"), "What?", 9, str)
        teacher_of(rows, server.url, frames_as="video").ask(
            row_of(rows), ("frames",), "What?", 9, str
        )
        teacher_of(rows, server.url).ask(row_of(rows), ("audio",), "What?", 9, str)
    images, video, sound = (r["messages"][0]["content"] for r in server.requests)
    assert [part["type"] for part in images] == ["image_url"] * len(clip.frames) + [
        "input_audio",
        "text",
        "text",
    ]

    def picture(data_url):
        encoded = np.frombuffer(base64.b64decode(data_url.split(",")[1]), np.uint8).copy()
        return torchvision.io.decode_image(torch.from_numpy(encoded)).float()

    for part, frame in zip(images, clip.frames):
        assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert (picture(part["image_url"]["url"]) - frame.float()).abs().mean() < 6
    assert "0.25, 0.75" in text_of(server.requests[0])  # two a second, each in its middle
    with wave.open(io.BytesIO(base64.b64decode(images[-3]["input_audio"]["data"]))) as file:
        heard = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
        assert file.getframerate() == 16000 and images[-3]["input_audio"]["format"] == "wav"
    np.testing.assert_allclose(heard, clip.audio, atol=1e-4)
    header, *jpegs = video[0]["video_url"]["url"].split(",")
    assert header == "data:video/jpeg;base64" and len(jpegs) == len(clip.frames)
    assert [part["type"] for part in sound] == ["input_audio", "text"]


def test_nothing_is_asked_twice(rows):
    with ChatServer(lambda r, n: f"answer {n}") as server:
        first = teacher_of(rows, server.url).ask(row_of(rows), ("frames",), "What?", 9, str)
        again = teacher_of(rows, server.url).ask(row_of(rows), ("frames",), "What?", 9, str)
        assert first == again == "answer 1" and len(server.requests) == 1
        # another question, model, draw, clip or span is another question
        teacher_of(rows, server.url).ask(row_of(rows), ("frames",), "Why?", 9, str)
        teacher_of(rows, server.url, "other").ask(row_of(rows), ("frames",), "What?", 9, str)
        teacher_of(rows, server.url).ask(row_of(rows), ("frames",), "What?", 9, str, 1.0, seed=1)
        teacher_of(rows, server.url).ask(row_of(rows) | dict(end=1.0), ("frames",), "What?", 9, str)
        shutil.copy(rows / row_of(rows, 1)["video"], rows / row_of(rows)["video"])
        teacher_of(rows, server.url).ask(row_of(rows), ("frames",), "What?", 9, str)
        assert len(server.requests) == 6


def test_a_damaged_answer_is_asked_for_again(rows):
    with ChatServer(lambda r, n: "answer") as server:
        teacher = teacher_of(rows, server.url)
        teacher.ask(row_of(rows), (), "What?", 9, str)
        (kept,) = (rows / "answers").rglob("*.json")
        for damage in ("", kept.read_text()[:20], "[]", '{"reply"'):
            kept.write_text(damage)
            assert teacher.ask(row_of(rows), (), "What?", 9, str.strip) == "answer"
        assert len(server.requests) == 5


def test_a_reply_of_no_use_is_not_kept(rows):
    with ChatServer(lambda r, n: "0.5" if n > 1 else "half") as server:
        teacher = teacher_of(rows, server.url)
        with pytest.raises(chat.NoAnswer, match="'half'"):
            teacher.ask(row_of(rows), (), "How many?", 9, float)
        assert teacher.ask(row_of(rows), (), "How many?", 9, float) == 0.5


def test_a_clip_is_decoded_once_for_many_questions(rows, monkeypatch):
    decoded = []
    decode = client.decode_clip
    monkeypatch.setattr("teachers.client.decode_clip", lambda *a: decoded.append(1) or decode(*a))
    with ChatServer(lambda r, n: "x") as server:
        teacher = teacher_of(rows, server.url, concurrency=8)
        asked = [
            teacher.submit(teacher.ask, row_of(rows), ("frames",), str(i), 9, str) for i in range(8)
        ]
        assert [a.result() for a in asked] == ["x"] * 8 and len(decoded) == 1


def test_a_users_mistakes_are_one_line(rows):
    with pytest.raises(UserError, match="which model"):
        teacher_of(rows, "http://127.0.0.1:9/v1", None)
    with pytest.raises(UserError, match="no model folder"):
        teacher_of(rows, rows / "nothing")
    row = row_of(rows) | dict(video="../../etc/passwd")
    with pytest.raises(BadRow, match="not in the JSONL's folder"):
        teacher_of(rows, "http://127.0.0.1:9/v1").ask(row, ("frames",), "What?", 9, str)


# ---- captions


def caption(rows, where, *more, code=0, out="out.jsonl"):
    flags = (
        "--data",
        rows / "in.jsonl",
        "--out",
        rows / out,
        "--captioner",
        where,
        "--captioner-model",
        "m",
        "--retries",
        1,
        "--timeout",
        5,
        "--concurrency",
        2,
    )
    return launch("prepare.py", "captions", *flags, *more, code=code)


def test_captions_of_every_row_in_order(rows):
    extra = dict(read(rows / "in.jsonl")[0], prompt_id="silent", use_audio=False)
    kept = dict(extra, prompt_id="kept", use_audio=True, audio_caption="a bell")
    video_r1 = dict(
        problem_id=77,
        problem="What?",
        problem_type="free-form",
        solution="<answer>x</answer>",
        data_type="video",
        path=extra["video"],
    )
    with open(rows / "in.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in (extra, kept, video_r1)))
    with ChatServer(lambda r, n: ' "A high <|AUDIO|> tone,\nthen silence." ') as server:
        printed = caption(rows, server.url)
        assert len(server.requests) == 4
        assert all(
            p["type"] != "image_url" for r in server.requests for p in r["messages"][0]["content"]
        )
    before, after = read(rows / "in.jsonl"), read(rows / "out.jsonl")
    for old, new in zip(before[:4], after[:4], strict=True):
        assert new == old | dict(audio_caption="A high tone, then silence")
        normalize_row(new)
    assert after[4:] == before[4:]  # silent, kept, and Video-R1's row without sound
    assert "7 rows: 4 got their audio_caption, 1 had it, 2 need none, 0 without" in printed


def test_nothing_is_lost_and_a_second_run_goes_on(rows):
    lines = (rows / "in.jsonl").read_text().splitlines()
    broken = dict(json.loads(lines[1]), prompt_id="gone", video="clips/gone.mp4")
    lines[1:1] = ["{not json \u00e9", json.dumps(broken)]
    (rows / "in.jsonl").write_bytes("\n".join(lines).encode("latin-1") + b"\n")
    third = row_of_text(lines[-1])
    down = lambda r, n: (503, {}, b"") if same_clip(r, rows, third) else "a tone"
    with ChatServer(down) as server:
        printed = caption(rows, server.url, code=1)
        assert "in.jsonl:2: " in printed and "row gone" in printed and "status 503" in printed
        assert "6 rows: 3 got their audio_caption, 0 had it, 0 need none, 3 without" in printed
        out = (rows / "out.jsonl").read_text(encoding="latin-1").splitlines()
        assert out[1] == lines[1] and json.loads(out[2]) == broken and out[5] == lines[5]
        asked = len(server.requests)
        server.reply = lambda r, n: "a tone"
        caption(rows, server.url, code=1)
        assert len(server.requests) == asked + 1  # only the one that had failed
    after = (rows / "out.jsonl").read_bytes().splitlines()[3:]
    assert [json.loads(line)["audio_caption"] for line in after] == ["a tone"] * 3


def row_of_text(line):
    return normalize_row(json.loads(line))


def same_clip(request, folder, row):
    sound = next(p for p in request["messages"][0]["content"] if p["type"] == "input_audio")
    clip = decode_clip(row, folder, RECIPE)
    return base64.b64decode(sound["input_audio"]["data"]) == client.wav_bytes(clip.audio)


def test_a_killed_run_pays_for_nothing_twice(rows):
    flags = ["--data", rows / "in.jsonl", "--out", rows / "out.jsonl", "--captioner-model", "m"]
    with ChatServer(lambda r, n: "a tone", delay=0.3) as server:
        words = ["prepare.py", "captions", "--captioner", server.url, "--concurrency", "1", *flags]
        run = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        while len(server.requests) < 3:
            time.sleep(0.01)
            assert run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (rows / "out.jsonl").exists()
        answered = len(list((rows / "out.jsonl.answers").rglob("*.json")))
        assert answered == 2
        time.sleep(0.4)
        server.requests.clear()
        caption(rows, server.url)
        assert len(server.requests) == 4 - answered
    assert [row["audio_caption"] for row in read(rows / "out.jsonl")] == ["a tone"] * 4


def test_a_dead_server_ends_the_command_with_one_line(rows):
    row = read(rows / "in.jsonl")[0]
    many = [dict(row, prompt_id=str(i), start=0.01 * i) for i in range(60)]
    (rows / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    server = ChatServer(lambda r, n: "x")
    server.stop()
    printed = caption(rows, server.url, code=1)
    assert printed.count("does not answer (Conn") < 20  # it stops long before the last row
    assert printed.splitlines()[-1].startswith(f"prepare.py: {server.url} does not answer; ")
    assert read(rows / "out.jsonl") == many


def test_a_wrong_key_ends_the_command_with_one_line(rows):
    with ChatServer(lambda r, n: (401, {}, b"who are you?")) as server:
        printed = caption(rows, server.url, code=1)
        assert len(server.requests) <= 3
    assert "who are you?" in printed.splitlines()[-1] and "Traceback" not in printed
    assert read(rows / "out.jsonl") == read(rows / "in.jsonl")


def test_a_command_that_ends_early_loses_no_answer(rows):
    """A wrong key at the second run: what the first one got is still in OUT, but not for row 2."""
    with ChatServer(lambda r, n: "a tone") as server:
        caption(rows, server.url)
        before = read(rows / "out.jsonl")
        rows_in = read(rows / "in.jsonl")
        changed = [rows_in[0], rows_in[1] | dict(end=1.0), *rows_in[2:]]
        (rows / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        server.reply = lambda r, n: (401, {}, b"who are you?")
        printed = caption(rows, server.url, code=1)
    assert "in.jsonl: no answer since then: lines 2\n" in printed
    assert "3 got their audio_caption, 0 had it, 0 need none, 1 without" in printed
    assert read(rows / "out.jsonl") == [before[0], changed[1], *before[2:]]
    assert annotate.spans([1, 3, 4, 5, 9]) == "1, 3-5, 9"


def test_an_answer_to_another_clip_is_not_taken_from_out(rows):
    """Same prompt_id, other bytes, or another model: the OUT of before is out of date."""
    with ChatServer(lambda r, n: f"tone {n}") as server:
        caption(rows, server.url, "--concurrency", 1)
        shutil.copy(rows / row_of(rows, 1)["video"], rows / row_of(rows)["video"])
        told = [row["audio_caption"] for row in read(rows / "out.jsonl")]
        caption(rows, server.url)
        again = [row["audio_caption"] for row in read(rows / "out.jsonl")]
        assert told[0] == "tone 1" and again == [told[1], *told[1:]]  # now the clip of row 1
        caption(rows, server.url, "--captioner-model", "other", "--concurrency", 1)
        assert [row["audio_caption"] for row in read(rows / "out.jsonl")][2:] == [
            "tone 6",
            "tone 7",
        ]


def test_a_row_with_several_sounds_is_asked_about(rows):
    for name, rate in (("one.wav", 400), ("two.wav", 800)):
        tone = np.sin(np.arange(16000) * rate / 16000 * 2 * np.pi).astype(np.float32)
        (rows / name).write_bytes(client.wav_bytes(tone))
    row = dict(
        prompt_id="both",
        question="Which?",
        answer="A",
        answer_type="choice",
        options=["first", "second"],
        audio=["one.wav", "two.wav"],
    )
    (rows / "in.jsonl").write_text(json.dumps(row) + "\n")
    with ChatServer(lambda r, n: "two tones") as server:
        assert "1 got their audio_caption" in caption(rows, server.url)
        row["audio"].reverse()  # another order is another question
        (rows / "in.jsonl").write_text(json.dumps(row) + "\n")
        caption(rows, server.url)
    heard = [
        [
            p["input_audio"]["data"]
            for p in r["messages"][0]["content"]
            if p["type"] == "input_audio"
        ]
        for r in server.requests
    ]
    assert len(heard) == 2 and len(heard[0]) == 2 and heard[0] == heard[1][::-1]


def test_out_must_lie_beside_the_rows(rows, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "out.jsonl"
    assert "must lie beside" in caption(rows, "http://127.0.0.1:9", code=1, out=elsewhere)


# ---- hints


def write_hints(rows, where, *more, code=0):
    flags = (
        "--data",
        rows / "in.jsonl",
        "--out",
        rows / "out.jsonl",
        "--teacher",
        where,
        "--teacher-model",
        "m",
        "--retries",
        1,
        "--timeout",
        5,
        "--attempts",
        3,
    )
    return launch("prepare.py", "hints", *flags, *more, code=code)


def answer_in(text):
    """The answer that a teacher is told: it sees the full context."""
    return json.loads(re.search(r'"answer": (".*?")', text)[1])


def test_hints_that_leak_are_refused_and_asked_for_again(rows):
    """A teacher that tells the answer at first, in words of its own, then learns better."""
    rows_in = read(rows / "in.jsonl")

    def reply(request, _):
        text = text_of(request)
        if "was refused" not in text:
            return f"Hint: the answer is {answer_in(text)}."
        return 'Hint: "Find the tone first, then look at that second."'

    with ChatServer(reply) as server:
        printed = write_hints(rows, server.url)
        asked = {answer_in(text_of(request)) for request in server.requests}
        assert len(server.requests) == 8 and asked == {row["answer"] for row in rows_in}
    assert "4 rows: 4 got their hint" in printed
    for old, new in zip(rows_in, read(rows / "out.jsonl"), strict=True):
        assert new == old | dict(hint="Find the tone first, then look at that second.")
        normalize_row(new)


def test_a_teacher_that_always_leaks_writes_no_hint(rows):
    leak = lambda r, n: f"it is {answer_in(text_of(r))}"
    with ChatServer(leak) as server:
        (rows / "in.jsonl").write_text((rows / "in.jsonl").read_text().splitlines()[0] + "\n")
        printed = write_hints(rows, server.url, code=1)
        assert len(server.requests) == 3 and "no hint in 3 attempts" in printed
        assert "raise --attempts" in printed and "run again to ask" not in printed
        assert read(rows / "out.jsonl") == read(rows / "in.jsonl")
        write_hints(rows, server.url, code=1)
        assert len(server.requests) == 3  # what was refused is not paid for again
        write_hints(rows, server.url, "--attempts", 4, code=1)
        assert len(server.requests) == 4


def test_rows_that_have_a_hint_keep_it_unless_it_leaks(rows):
    rows_in = read(rows / "in.jsonl")
    rows_in[0]["hint"] = "listen for the tone"
    rows_in[1]["hint"] = f"the answer is {rows_in[1]['answer']}"
    (rows / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_in))
    with ChatServer(lambda r, n: "look closely") as server:
        printed = write_hints(rows, server.url)
    assert "its hint is not kept" in printed
    told = [row["hint"] for row in read(rows / "out.jsonl")]
    assert told == ["listen for the tone"] + ["look closely"] * 3


@pytest.mark.parametrize("status", [400, 401])
def test_a_hint_that_leaks_is_not_written_even_without_a_new_one(rows, status):
    """Neither for a row whose question fails, nor for those after the command's end."""
    rows_in = read(rows / "in.jsonl")
    leaking = [row | dict(hint=f"the answer is {row['answer']}") for row in rows_in]
    leaking[3]["hint"] = "listen for the tone"
    (rows / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in leaking))
    with ChatServer(lambda r, n: (status, {}, b"no")) as server:
        printed = write_hints(rows, server.url, code=1)
    assert "1 had it, 0 need none, 3 without" in printed
    assert read(rows / "out.jsonl") == [*rows_in[:3], leaking[3]]


# ---- models in this process, and a real server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, toy_dir):
    folder = tmp_path_factory.mktemp("tiny")
    write_internvl(folder / "internvl")
    write_qwen_vl(folder / "qwen")
    (folder / "omni").symlink_to(toy_dir / "model")
    return folder


STEPS = ["1: left red circle; high tone", "so red"]


@pytest.mark.parametrize("name", ["internvl", "qwen", "omni"])
def test_a_folder_is_asked_in_process(rows, tiny, name, monkeypatch):
    monkeypatch.setattr(judge, "DECOY_MAX", 1.0)  # random weights cannot tell true from false
    teacher = teacher_of(rows, tiny / name, None)
    random_state = torch.get_rng_state()
    greedy = teacher.ask(row_of(rows), ("frames",), "What is seen?", 12, str)
    one, two, same = (
        teacher.ask(row_of(rows), ("frames",), "What is seen?", 12 + i // 2, str, 1.0, seed=i % 2)
        for i in range(3)
    )
    assert greedy and one != two and same.startswith(one[:3])
    assert torch.equal(random_state, torch.get_rng_state())  # training's draws are not disturbed
    scores = judge.score_steps(teacher, row_of(rows), STEPS)  # random weights, and yet a verdict
    assert len(scores) == 2 and all(f"{s:.1f}" in judge.TENTHS for s in scores)


def test_the_frames_reach_a_local_model(rows, tiny):
    """Other frames, another reply: what is shown is really read."""
    teacher = teacher_of(rows, tiny / "qwen", None)
    replies = {teacher.ask(row_of(rows, i), ("frames",), "Describe.", 24, str) for i in range(4)}
    assert len(replies) > 1


def test_captions_by_a_local_model(rows, tiny):
    printed = caption(rows, tiny / "omni")
    assert "4 rows: 4 got their audio_caption" in printed


SERVES = all(
    importlib.util.find_spec(m) for m in ("fastapi", "uvicorn", "openai", "soundfile", "soxr")
)


@pytest.mark.skipif(not SERVES, reason="transformers serve needs requirements.txt")
def test_every_command_against_a_real_server(rows, tiny):
    """transformers serve, over HTTP: captions by Omni, hints by Qwen2.5-VL, a judge by InternVL."""
    lines = (rows / "in.jsonl").read_text().splitlines()[:2]
    (rows / "in.jsonl").write_text("\n".join(lines) + "\n")
    with transformers_serve() as url:
        where = (url, "--captioner-model", tiny / "omni", "--timeout", 60)
        printed = caption(rows, *where, out="heard.jsonl")
        assert "2 rows: 2 got their audio_caption" in printed
        teacher = teacher_of(rows, url, str(tiny / "omni"), timeout=60.0)
        local = teacher_of(rows, tiny / "omni", None)
        asked = [
            t.ask(row_of(rows), ("frames", "audio"), "What?", 16, str) for t in (teacher, local)
        ]
        assert asked[0] == asked[1]  # the same clip arrives, over HTTP and in process
        # random weights: whatever they write is a hint, if it is short and no leak
        where = (url, "--teacher-model", tiny / "qwen", "--timeout", 60)
        write_hints(rows, *where, code=os.EX_OK if hints_come(rows, url, tiny) else 1)
        with pytest.raises(chat.NoAnswer, match="of no use"):  # a random model writes no verdict
            judge.score_steps(
                teacher_of(rows, url, str(tiny / "internvl"), timeout=60.0), row_of(rows), STEPS
            )


def hints_come(rows, url, tiny):
    """Whether this random teacher has a hint for every row: asked as the command asks."""
    from teachers.hint_writer import ask_hint

    teacher = teacher_of(rows, url, str(tiny / "qwen"), timeout=60.0)
    teacher.answers = rows / "out.jsonl.answers"
    with ThreadPoolExecutor(1):
        try:
            return all(ask_hint(teacher, row_of(rows, i), 3) for i in range(2))
        except chat.NoAnswer:
            return False
