"""
ask.py: one clip and its questions, rows without answers; a clip that is read once.

    python -m pytest tests/test_ask.py
"""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from benchmark_fixtures import media  # noqa: F401
from conftest import RECIPE, assert_same_values, launch

import ask
import toy
from data.clips import decode_clip
from data.rows import Rows
from evaluation import tables
from models.clip_prefix import read_prefix
from models.inputs import InputBuilder
from models.loading import load_policy
from models.policy import Policy
from models.rollout import rollout

FEW = ("--max-new-tokens", 24)
COUNT = "How many shapes come with a tone?"


def ask_json(toy_dir, *words, code=0):
    """-> what ask.py prints with --json, a dict for each question"""
    printed = launch("ask.py", *words, "--model", toy_dir / "model", "--json", *FEW, code=code)
    return [json.loads(line) for line in printed.splitlines()]


def clip_file(toy_dir, i=0):
    return toy_dir / "stage2" / "clips" / f"test-0000{i}.mp4"


# ---- one clip


def test_answers_equal_those_of_eval(toy_dir, tmp_path):
    data = toy_dir / "stage2" / "test.jsonl"
    launch("eval.py", "--model", toy_dir / "model", "--data", data, "--out", tmp_path, *FEW)
    records = {r["prompt_id"]: r for r in tables.read_records(tmp_path)}
    for line in data.read_text().splitlines()[:4]:
        row = json.loads(line)
        how = ("--answer-type", row["answer_type"])
        how += ("--options", *row["options"]) if row.get("options") else ()
        (found,) = ask_json(toy_dir, toy_dir / "stage2" / row["video"], row["question"], *how)
        record = records[row["prompt_id"]]
        assert found["completion"] == record["completion"]
        assert found["answer"] == record["parsed"]


def test_the_answer_is_shown_as_it_is_written(toy_dir):
    words = (clip_file(toy_dir), COUNT, "--answer-type", "number", *FEW)
    printed = launch("ask.py", *words, "--model", toy_dir / "model")
    (found,) = ask_json(toy_dir, *words)
    assert found["completion"] in printed
    assert f"{found['given']['prompt_tokens']} prompt tokens" in printed
    assert "56 x 56" in printed and "s of sound" in printed and "decode" in printed


def test_samples_and_their_shares(toy_dir):
    words = (clip_file(toy_dir), "Which color comes first?", "--options", "red", "green", "blue")
    (found,) = ask_json(toy_dir, *words, "--samples", 8)
    assert sum(part["count"] for part in found["answers"]) == 8
    assert sum(part["share"] for part in found["answers"]) == pytest.approx(1)
    readable = [part for part in found["answers"] if part["answer"] is not None]
    if readable:  # the most frequent answer that could be read
        assert found["answer"] == readable[0]["answer"]
    printed = launch("ask.py", *words, "--samples", 8, "--model", toy_dir / "model", *FEW)
    assert printed.count("%") == len(found["answers"])


@pytest.mark.parametrize(
    "kinds, given",
    [
        (["film.mp4"], {"frames", "sound_seconds"}),
        (["silent.mp4"], {"frames"}),
        (["sound.wav"], {"sound_seconds"}),
        (["picture.png", "photo.jpg"], {"images"}),
        (["silent.mp4", "sound.wav"], {"frames", "sound_seconds"}),
        (["picture.png", "sound.wav"], {"images", "sound_seconds"}),
    ],
)
def test_media_of_every_kind(kinds, given, toy_dir, media, tmp_path):  # noqa: F811
    files = [tmp_path / name for name in kinds]
    for path in files:
        media(path, path.stem)
    (found,) = ask_json(toy_dir, *files, "What is it?")
    assert set(found["given"]) - {"frame_size", "frames_per_second", "prompt_tokens"} == given
    if "images" in given:
        assert len(found["given"]["images"]) == sum(path.suffix != ".wav" for path in files)


def test_parts_of_a_clip(toy_dir, media, tmp_path):  # noqa: F811
    media(tmp_path / "film.mp4", "film")
    (whole,) = ask_json(toy_dir, tmp_path / "film.mp4", "What is it?")
    (muted,) = ask_json(toy_dir, tmp_path / "film.mp4", "What is it?", "--no-audio")
    (part,) = ask_json(toy_dir, tmp_path / "film.mp4", "What is it?", "--start", 0, "--end", 1)
    assert "sound_seconds" not in muted["given"] and whole["given"]["sound_seconds"] == [2.0]
    assert part["given"]["sound_seconds"] == [1.0]
    assert part["given"]["frames"] == whole["given"]["frames"] / 2


def test_a_clip_without_sound_is_asked_about_all_the_same(toy_dir, media, tmp_path):  # noqa: F811
    media(tmp_path / "silent.mp4", "silent")
    media(tmp_path / "film.mp4", "film")
    flags = ("What is it?", "--model", toy_dir / "model", *FEW)
    assert "no sound is used" in launch("ask.py", tmp_path / "silent.mp4", *flags)
    printed = launch("ask.py", tmp_path / "film.mp4", *flags, "--max-audio-seconds", 1)
    assert "no sound is used" in printed and "--max-audio-seconds" in printed


# ---- questions one after another


def test_a_clip_is_decoded_encoded_and_read_once(toy_dir, monkeypatch):
    questions = [f"{COUNT}\n", "Which color is first? | red | green | blue\n", "What else?\n", "\n"]
    alone = []
    for line in questions[:3]:
        question, *options = [part.strip() for part in line.split("|")]
        how = ("--options", *options) if options else ()
        alone += ask_json(toy_dir, clip_file(toy_dir), question, *how)

    calls = []
    for owner, name in ((ask.clips, "decode_clip"), (Policy, "encode"), (Policy, "packed_forward")):
        method = getattr(owner, name)

        def count(*args, method=method, name=name, **kwargs):
            calls.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(questions)))
    together = ask_json(toy_dir, clip_file(toy_dir))
    assert sorted(calls) == ["decode_clip", "encode", "packed_forward"]  # of three questions
    for found, expected in zip(together, alone):
        for key in ("question", "answer", "completion"):
            assert found[key] == expected[key]
    assert [set(found["seconds"]) for found in together] == [
        {"decode", "read", "answer"},
        {"answer"},
        {"answer"},
    ]


@pytest.fixture(scope="module", params=["qwen", "qwen3", "ola"])
def tiny_model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    toy.make_model(folder, toy.WEIGHTS if request.param == "qwen" else None, request.param)
    return folder


def test_a_prefix_read_before_changes_no_log_prob(tiny_model, toy_dir):
    rows = Rows(toy_dir / "stage2" / "test.jsonl")
    media_config = RECIPE._replace(max_pixels=64 * 64)  # Ola's frames are multiples of 32
    build = InputBuilder(tiny_model, media_config, rows.path.parent, False)
    policy = load_policy(tiny_model, 0, False)
    first = build.from_clip(rows[0], decode_clip(rows[0], build.root, build.media_config))
    other = build.with_text(first, dict(rows[0], question="Which color is shown at the end?"))
    prefix = read_prefix(policy, first, build.media_length(first))
    settings = dict(temperature=1.0, max_new_tokens=12, eos_ids=build.eos_ids, seeds=[3])
    for prompt in (first, other, first):
        (expected,) = rollout(policy, [prompt], [3], **settings)
        tokens = []
        (found,) = rollout(policy, [prompt], [3], **settings, prefix=prefix, on_token=tokens.append)
        for ours, theirs in zip(found, expected):
            assert torch.equal(ours.ids, theirs.ids)
            assert_same_values(ours.logprobs, theirs.logprobs)
        assert len(tokens) == max(len(completion.ids) for completion in found)
    with pytest.raises(AssertionError, match="another clip"):
        stranger = build.from_clip(rows[1], decode_clip(rows[1], build.root, build.media_config))
        rollout(policy, [stranger], [1], **settings, prefix=prefix)


def test_every_backbone_answers_with_and_without_its_senses(tiny_model, toy_dir, tmp_path):
    clip = toy_dir / "stage2" / "clips" / "test-00000.mp4"
    flags = ("--model", tiny_model, "--max-new-tokens", 4)
    assert "answer:" in launch("ask.py", clip, COUNT, *flags)
    for without in (("sound",), ("video",), ("sound", "video")):
        out = tmp_path / "-".join(without)
        data = ("--data", toy_dir / "stage2" / "test.jsonl", "--out", out)
        launch("eval.py", *flags, *data, "--without", *without)
        records = tables.read_records(out)
        assert len(records) == 8 and all(r["completion"] is not None for r in records)


def test_a_bad_question_on_a_terminal_ends_nothing(toy_dir, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"What is <|im_end|>?\n{COUNT}\n\n"))
    printed = launch("ask.py", clip_file(toy_dir), "--model", toy_dir / "model", *FEW)
    assert "reserved <|im_end|>" in printed and printed.count("answer:") == 1


# ---- many rows


def unanswered_rows(toy_dir, folder):
    """The rows of stage 2 without their answers, in a folder of its own."""
    shutil.copytree(toy_dir / "stage2", folder)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for row in rows:
        del row["answer"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl", rows


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_without_answers(toy_dir, tmp_path):
    data, rows = unanswered_rows(toy_dir, tmp_path / "rows")
    (tmp_path / "rows" / rows[2]["video"]).unlink()
    out = tmp_path / "answers.jsonl"
    flags = ("--data", data, "--out", out, "--model", toy_dir / "model", *FEW)
    printed = launch("ask.py", *flags)
    assert "7 rows answered, 1 failed" in printed
    found = {line["prompt_id"]: line for line in read_lines(out)}
    assert set(found) == {row["prompt_id"] for row in rows}
    assert "no file at" in found[rows[2]["prompt_id"]]["failure"]

    launch("eval.py", "--model", toy_dir / "model", "--data", toy_dir / "stage2" / "test.jsonl",
           "--out", tmp_path / "eval", *FEW)  # fmt: skip
    records = {r["prompt_id"]: r for r in tables.read_records(tmp_path / "eval")}
    for name, line in found.items():
        if "failure" not in line:
            assert line["completion"] == records[name]["completion"]

    # stopped in the middle of a line: what is whole stays, the failed row is asked again
    lines = out.read_text().splitlines(keepends=True)
    failed = [line for line in lines if "failure" in json.loads(line)]
    whole = [line for line in lines if line not in failed]
    out.write_text("".join([*whole[:3], *failed, whole[4][:30]]))
    shutil.copy(toy_dir / "stage2" / rows[2]["video"], tmp_path / "rows" / rows[2]["video"])
    assert "already exists" in launch("ask.py", *flags, code=1)
    assert "5 rows answered, 0 failed" in launch("ask.py", *flags, "--resume")
    again = {line["prompt_id"]: line for line in read_lines(out)}
    assert len(read_lines(out)) == 8
    assert {**found, **again} == again
    for name, line in found.items():
        assert "failure" in line or again[name] == line
    printed = launch("ask.py", *flags, "--resume", "--seed", 1, code=1)
    assert "--resume" in printed and "other seed" in printed


# ---- mistakes


def test_mistakes_are_one_line(toy_dir, media, tmp_path, capsys):  # noqa: F811
    media(tmp_path / "film.mp4", "film")
    media(tmp_path / "silent.mp4", "silent")
    (tmp_path / "words.txt").write_text("no medium")
    film = tmp_path / "film.mp4"
    for words, problem in (
        ((tmp_path / "flim.mp4", "What?"), "no file at"),
        ((film, "flim.wav"), "no file at"),
        ((tmp_path, "What?"), "a folder at"),
        ((tmp_path / "words.txt", "What?"), "words.txt"),
        ((film, tmp_path / "silent.mp4", "What?"), "one video"),
        ((film, "What is <|im_end|>?"), "reserved <|im_end|>"),
        ((film, "What?", "--options", "red", " "), "options"),
        ((film, "What?", "--answer-type", "choice"), "option"),
        ((film, "What?", "--end", 99), "lasts"),
        ((film, "What?", "--start", 5, "--end", 1), "start"),
        ((film, "What?", "--samples", 3, "--temperature", 0), "--temperature"),
        ((film, "What?", "--max-prompt-tokens", 9), "--max-prompt-tokens"),
        ((film, "What?", "--model", tmp_path / "nowhere"), "no model at"),
    ):
        flags = () if "--model" in words else ("--model", toy_dir / "model")
        printed = launch("ask.py", *words, *flags, code=1)
        assert "Traceback" not in printed and problem in printed.strip().splitlines()[-1]
    for words in ((), ("x.mp4", "--data", "rows.jsonl")):
        with pytest.raises(SystemExit):
            ask.parse_args([str(word) for word in words])
        assert "--data" in capsys.readouterr().err


def test_the_last_word_is_the_question_unless_it_is_a_file(tmp_path):
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for file in files:
        np.zeros(1).tofile(file)
    assert ask.split_words([*files, "What?"]) == (files, "What?")
    assert ask.split_words(files) == (files, None)
    assert ask.split_words([*files, "Is it 3.5 or 4.5?"]) == (files, "Is it 3.5 or 4.5?")
