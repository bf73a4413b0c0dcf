"""
Frozen models: over HTTP with every fault a server can have, in this process, and as the commands that
write captions and hints.

    python -m pytest tests/test_teachers.py
"""

import base64
import functools
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
from teachers import annotate, backends, client, judge
from teachers.backends import ChatError

KEY = "sk-not-to-be-told"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
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


def model_of(folder, where, model_name="m", **changes):
    settings = dict(timeout=5.0, max_retries=2) | changes
    return client.FrozenModel(
        str(where),
        model_name=model_name,
        media_folder=folder,
        media_config=RECIPE,
        cache_dir=folder / "answers",
        **settings,
    )


def query(model, row, text, modalities=(), parse=str, max_tokens=9, **more):
    return model.query(row, text, modalities=modalities, max_tokens=max_tokens, parse=parse, **more)


def row_of(folder, i=0):
    return normalize_row(read(folder / "in.jsonl")[i])


# ---- a server and its faults


def chat_once(url, *, timeout=5.0, max_retries=2):
    server = backends.ChatServer(
        url, model_name="m", timeout=timeout, max_retries=max_retries, frames_as="images"
    )
    return server.chat([], "Well?", max_tokens=9, temperature=0.0, seed=0)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_passing_error_is_retried(status):
    with ChatServer(lambda r, n: "yes" if n == 3 else (status, {}, b"busy")) as server:
        assert chat_once(server.url) == "yes" and len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 301])
def test_a_refusal_is_not_retried(status):
    location = {"Location": "http://127.0.0.1:9/v1/chat/completions"}
    with ChatServer(lambda r, n: (status, location, b"no such thing")) as server:
        with pytest.raises(ChatError, match=f"status {status}: no such thing"):
            chat_once(server.url)
        assert len(server.requests) == 1


def test_the_server_says_how_long_to_wait(monkeypatch):
    with ChatServer(lambda r, n: "yes" if n == 2 else (429, {"Retry-After": "0.4"}, b"")) as server:
        began = time.monotonic()
        assert chat_once(server.url) == "yes" and time.monotonic() - began > 0.4


def test_back_off_grows():
    times = []
    with ChatServer(lambda r, n: times.append(time.monotonic()) or (500, {}, b"")) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.1)
            patch.setattr("openai._base_client.random", lambda: 0.0)  # no jitter
            with pytest.raises(ChatError):
                chat_once(server.url, max_retries=3)
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
        with pytest.raises(ChatError, match="sent no text"):
            chat_once(server.url)


def test_half_characters_are_replaced():
    content = b'{"choices": [{"message": {"content": "a\\ud800b"}}]}'
    with ChatServer(lambda r, n: (200, {}, content)) as server:
        assert chat_once(server.url) == "a?b"


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
    monkeypatch.setattr(backends, "MAX_REPLY_BYTES", 10_000)
    answer = {"silent": "x", "drip": drip, "cut": cut, "huge": (200, {}, b"x" * 20_000)}
    answer["not http"] = lambda handler: handler.wfile.write(b"\0\0garbage\n\n")
    server = ChatServer(lambda r, n: answer.get(fault, ""), delay=2.0 * (fault == "silent"))
    if fault == "nobody":
        server.stop()
    began = time.monotonic()
    with pytest.raises(ChatError, match="does not answer") as error:
        chat_once(server.url, timeout=0.4, max_retries=1)
    assert error.value.unreachable and time.monotonic() - began < 1.5
    if fault != "nobody":
        server.stop()


def test_stopping_ends_questions_under_way(rows):
    with ChatServer(lambda r, n: "late", delay=5.0) as server:
        model = model_of(rows, server.url, timeout=30.0)
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(query, model, row_of(rows), "text")
            while not server.requests:
                time.sleep(0.01)
            began = time.monotonic()
            model.stop("enough")
            with pytest.raises(ChatError):
                reply.result()
            assert time.monotonic() - began < 1
        with pytest.raises(ChatError, match="enough"):
            query(model, row_of(rows), "another")
        assert len(server.requests) == 1


def test_the_key_goes_to_the_server_and_nowhere_else(rows, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def reply(request, number):
        return f"you sent {KEY}" if number == 1 else (401, {}, f"wrong key {KEY}".encode())

    with ChatServer(reply) as server:
        model = model_of(rows, server.url)
        assert query(model, row_of(rows), "one") == "you sent ***"
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
            query(model, row_of(rows), "two")
        assert KEY not in str(error.value)
    cached = list((rows / "answers").rglob("*.json"))
    assert len(cached) == 1 and KEY not in cached[0].read_text()
    assert KEY not in json.dumps(server.requests)


@pytest.mark.parametrize(
    "reply",
    [
        lambda handler: handler.wfile.write(f"{KEY} nonsense\n\n".encode()),
        (400, {}, b"x" * 190 + KEY.encode()),
        (400, {}, b" " * 290 + KEY.encode()),
        (400, {"Content-Type": "application/json"}, json.dumps({"error": KEY}).encode()),
        (302, {"Location": f"http://127.0.0.1:9/{KEY}"}, KEY.encode()),
    ],
    ids=["status line", "cut at 200", "after spaces", "json", "redirect"],
)
def test_no_error_shows_the_key(reply, monkeypatch, caplog):
    """A server that sends it back where no status line is, or where a message is cut."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(lambda r, n: reply) as server, pytest.raises(ChatError) as error:
        chat_once(server.url, max_retries=0)
    assert KEY[:6] not in f"{error.value!r} {error.value.__cause__!r}" + caplog.text
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "where", ["http://host:80x/v1", "http:///v1", "http://[x/v1", "http://host:0/v1"]
)
def test_an_address_that_is_none_is_one_line(rows, where):
    with pytest.raises(UserError, match="give one like") as error:
        model_of(rows, where)
    assert "\n" not in str(error.value)
    assert f"prepare.py: {where} is not a valid URL" in caption(rows, where, code=1)


def test_no_more_requests_at_once_than_allowed(rows):
    def reply(request, number):
        deadline = time.monotonic() + 20
        while server.most_at_once < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # in which a fourth would come
        return "a tone"

    with ChatServer(reply) as server:
        caption(rows, server.url, "--concurrency", 3, "--timeout", 30)
        assert server.most_at_once == 3


# ---- what is asked, and what is kept


def test_frames_and_sound_arrive_as_decoded(rows):
    clip = decode_clip(row_of(rows), rows, RECIPE)
    with ChatServer(lambda r, n: "ok") as server:
        query(model_of(rows, server.url), row_of(rows), "What?", ("frames", "audio"))
        query(model_of(rows, server.url, frames_as="video"), row_of(rows), "What?", ("frames",))
        query(model_of(rows, server.url), row_of(rows), "What?", ("audio",))
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
        first = query(model_of(rows, server.url), row_of(rows), "What?", ("frames",))
        again = query(model_of(rows, server.url), row_of(rows), "What?", ("frames",))
        assert first == again == "answer 1" and len(server.requests) == 1
        # another question, model, draw, clip or span is another question
        query(model_of(rows, server.url), row_of(rows), "Why?", ("frames",))
        query(model_of(rows, server.url, "other"), row_of(rows), "What?", ("frames",))
        query(
            model_of(rows, server.url), row_of(rows), "What?", ("frames",), temperature=1.0, seed=1
        )
        query(model_of(rows, server.url), row_of(rows) | dict(end=1.0), "What?", ("frames",))
        shutil.copy(rows / row_of(rows, 1)["video"], rows / row_of(rows)["video"])
        query(model_of(rows, server.url), row_of(rows), "What?", ("frames",))
        assert len(server.requests) == 6


def test_a_damaged_answer_is_asked_for_again(rows):
    with ChatServer(lambda r, n: "answer") as server:
        model = model_of(rows, server.url)
        query(model, row_of(rows), "What?")
        (kept,) = (rows / "answers").rglob("*.json")
        for damage in ("", kept.read_text()[:20], "[]", '{"reply"'):
            kept.write_text(damage)
            assert query(model, row_of(rows), "What?", parse=str.strip) == "answer"
        assert len(server.requests) == 5


def test_a_reply_of_no_use_is_not_kept(rows):
    with ChatServer(lambda r, n: "0.5" if n > 1 else "half") as server:
        model = model_of(rows, server.url)
        with pytest.raises(ChatError, match="'half'"):
            query(model, row_of(rows), "How many?", parse=float)
        assert query(model, row_of(rows), "How many?", parse=float) == 0.5


def test_a_clip_is_decoded_once_for_many_questions(rows, monkeypatch):
    decoded = []
    decode = client.decode_clip
    monkeypatch.setattr("teachers.client.decode_clip", lambda *a: decoded.append(1) or decode(*a))
    with ChatServer(lambda r, n: "x") as server:
        model = model_of(rows, server.url)
        ask = lambda i: query(model, row_of(rows), str(i), ("frames",))  # noqa: E731
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8))) == ["x"] * 8
    assert len(decoded) == 1


def test_a_users_mistakes_are_one_line(rows):
    with pytest.raises(UserError, match="which model"):
        model_of(rows, "http://127.0.0.1:9/v1", None)
    with pytest.raises(UserError, match="model folder"):
        model_of(rows, rows / "nothing")
    row = row_of(rows) | dict(video="../../etc/passwd")
    with pytest.raises(BadRow, match="not in the JSONL's folder"):
        query(model_of(rows, "http://127.0.0.1:9/v1"), row, "What?", ("frames",))


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

    def down_for_the_third(request, _):
        return (503, {}, b"") if same_clip(request, rows, third) else "a tone"

    with ChatServer(down_for_the_third) as server:
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
    return base64.b64decode(sound["input_audio"]["data"]) == backends.wav_bytes(clip.audio)


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
    assert "in.jsonl: no reply since then: lines 2\n" in printed
    assert "3 got their audio_caption, 0 had it, 0 need none, 1 without" in printed
    assert read(rows / "out.jsonl") == [before[0], changed[1], *before[2:]]
    assert annotate.line_ranges([1, 3, 4, 5, 9]) == "1, 3-5, 9"


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
        (rows / name).write_bytes(backends.wav_bytes(tone))
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


def test_out_may_lie_elsewhere(rows, tmp_path_factory):
    """Rows with and without a caption; their media paths lead back to the clips."""
    first, *others = read(rows / "in.jsonl")
    rows_in = [first, others[0] | dict(use_audio=False), others[1] | dict(audio_caption="a bell")]
    (rows / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_in))
    folder = tmp_path_factory.mktemp("elsewhere")
    with ChatServer(lambda r, n: "a tone") as server:
        printed = caption(rows, server.url, out=folder / "new" / "out.jsonl")
    assert "--allow-outside" in printed
    rows_out = read(folder / "new" / "out.jsonl")
    assert [row.get("audio_caption") for row in rows_out] == ["a tone", None, "a bell"]
    for before, after in zip(rows_in, rows_out, strict=True):
        clip = folder / "new" / after["video"]
        assert clip.resolve() == (rows / before["video"]).resolve()


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
    """The answer in a request for a hint: the teacher gets the full context."""
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
    with ChatServer(lambda r, n: f"it is {answer_in(text_of(r))}") as server:
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
    model = model_of(rows, tiny / name, None)
    random_state = torch.get_rng_state()
    ask = functools.partial(query, model, row_of(rows), "What is seen?", ("frames",))
    greedy = ask(max_tokens=12)
    one = ask(max_tokens=12, temperature=1.0, seed=0)
    two = ask(max_tokens=12, temperature=1.0, seed=1)
    same = ask(max_tokens=13, temperature=1.0, seed=0)
    assert greedy and one != two and same.startswith(one[:3])
    assert torch.equal(random_state, torch.get_rng_state())  # training's draws are not disturbed
    scores = judge.score_steps(model, row_of(rows), STEPS)  # random weights, and yet a verdict
    assert len(scores) == 2 and all(f"{s:.1f}" in judge.TENTHS for s in scores)


def test_the_frames_reach_a_local_model(rows, tiny):
    """Other frames, another reply: what is shown is really read."""
    model = model_of(rows, tiny / "qwen", None)
    replies = {
        query(model, row_of(rows, i), "Describe.", ("frames",), max_tokens=24) for i in range(4)
    }
    assert len(replies) > 1


def test_captions_by_a_local_model(rows, tiny):
    printed = caption(rows, tiny / "omni")
    assert "4 rows: 4 got their audio_caption" in printed


SERVES = all(
    importlib.util.find_spec(m) for m in ("fastapi", "uvicorn", "openai", "soundfile", "soxr")
)


@pytest.mark.skipif(not SERVES, reason="transformers serve needs requirements-test.txt")
def test_every_command_against_a_real_server(rows, tiny):
    """transformers serve, over HTTP: captions by Omni, hints by Qwen2.5-VL, a judge by InternVL."""
    lines = (rows / "in.jsonl").read_text().splitlines()[:2]
    (rows / "in.jsonl").write_text("\n".join(lines) + "\n")
    with transformers_serve() as url:
        where = (url, "--captioner-model", tiny / "omni", "--timeout", 60)
        printed = caption(rows, *where, out="heard.jsonl")
        assert "2 rows: 2 got their audio_caption" in printed
        model = model_of(rows, url, str(tiny / "omni"), timeout=60.0)
        local = model_of(rows, tiny / "omni", None)
        over_http, in_process = (
            query(m, row_of(rows), "What?", ("frames", "audio"), max_tokens=16)
            for m in (model, local)
        )
        assert over_http == in_process  # the same clip arrives, over HTTP and in process
        # random weights: whatever they write is a hint, if it is short and no leak
        where = (url, "--teacher-model", tiny / "qwen", "--timeout", 60)
        write_hints(rows, *where, code=os.EX_OK if hints_come(rows, url, tiny) else 1)
        with pytest.raises(ChatError, match="unusable"):  # a random model writes no verdict
            judge.score_steps(
                model_of(rows, url, str(tiny / "internvl"), timeout=60.0), row_of(rows), STEPS
            )


def hints_come(rows, url, tiny):
    """Whether this random teacher has a hint for every row: asked as the command asks."""
    model = model_of(rows, url, str(tiny / "qwen"), timeout=60.0)
    model.cache_dir = rows / "out.jsonl.answers"
    try:
        return all(annotate.write_hint(model, row_of(rows, i), 3) for i in range(2))
    except ChatError:
        return False
