"""
The paper's benchmarks: from each one's published form to a score worked out by hand.

    python -m pytest tests/test_benchmarks.py

The folders are small, in the true schema, with real media (benchmark_fixtures.py). In one run the
replies are given, and everything else is real: conversion, decoding, prompts, reading, scoring. In
another run the toy model replies.
"""

import json
import shutil
import wave

import numpy as np
import pytest
import torch
from benchmark_fixtures import EXPECTED, REPLIES, benchmark_root, media  # noqa: F401
from conftest import RECIPE, assert_same_values, launch

from data.clips import BadRow, decode_clip
from data.questions import cut_options
from data.rows import SYSTEM_PROMPT, normalize_row
from evaluation import benchmarks, items, protocol, tables
from evaluation.protocol import Protocol
from models.inputs import InputBuilder
from models.loading import load_policy
from models.rollout import Completion, rollout

FLAGS = ("--max-frames", 4, "--max-pixels", 56 * 56, "--max-audio-seconds", 8)


def evaluate(toy_dir, root, out, *more, code=0):
    """The command, on the toy model -> what it printed."""
    model_and_root = ("--model", toy_dir / "model", "--root", root)
    return launch("eval.py", *model_and_root, "--out", out, *FLAGS, *more, code=code)


class Parrot:
    """Stands for the sampler: says to each prompt what REPLIES holds for the question in it."""

    def __init__(self, folder, replies):
        self.build = InputBuilder(folder, None, ".", False)
        self.replies, self.prompts = replies, []

    def __call__(self, policy, prompts, num_completions, *, temperature, seeds, **limits):
        assert temperature == 0 and num_completions == [1] * len(prompts) == [1] * len(seeds)
        made = []
        for prompt in prompts:
            asked = self.build.tokenizer.decode(prompt.input_ids, skip_special_tokens=True)
            self.prompts.append((asked, prompt))
            (reply,) = {r for q, r in self.replies.items() if q.split("[")[0] in asked}
            ids = self.build.tokenizer(reply + self.build.tokenizer.eos_token)["input_ids"]
            made.append([Completion(torch.tensor(ids), torch.zeros(len(ids)), False)])
        return made


@pytest.fixture(scope="module")
def scripted(toy_dir, benchmark_root, tmp_path_factory):  # noqa: F811
    """All of them in one command, with the replies given -> scores.json, records, the parrot."""
    out, parrot = tmp_path_factory.mktemp("scores") / "all", Parrot(toy_dir / "model", REPLIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.asking.rollout", parrot)
        names = ("--benchmark", "all", "av-counting-ref")
        printed = evaluate(toy_dir, benchmark_root, out, *names, "--html", 100)
    scores = json.loads((out / "scores.json").read_text())
    return scores, tables.read_records(out), parrot, printed, out


@pytest.mark.parametrize("name", EXPECTED)
def test_score_by_hand(name, scripted):
    found = scripted[0]["scores"][name]
    count, not_scored, score, groups = EXPECTED[name]
    assert (found["n"], found["not_scored"]) == (count, not_scored)
    assert found["score"] == pytest.approx(score)
    one_clip = name in (
        "av-counting",
        "av-counting-ref",
        "lvbench",
        "video-holmes",
        "mmvu",
        "tomato",
        "vsi-bench",
        "video-tt",
    )
    if one_clip:
        assert found["low"] is found["high"] is None  # one clip says nothing about another
    else:
        assert found["low"] <= found["score"] <= found["high"]
    for group, values in groups.items():
        for value, expected in values.items():
            assert found["groups"][group][value]["score"] == pytest.approx(expected), (group, value)


def test_all_fifteen_are_there(scripted):
    assert len(set(EXPECTED) - {"av-counting-ref"}) == 15 and set(EXPECTED) == set(
        benchmarks.BENCHMARKS
    )
    assert set(scripted[0]["scores"]) == set(EXPECTED)


def test_other_measures_by_hand(scripted):
    scores = scripted[0]["scores"]
    count = scores["av-counting"]  # truths 3, 5, 2, 2; answers 3, 6, none, 300
    assert count["off_by_one"]["score"] == 2 / 4
    assert count["mae"] == (0 + 1 + 2 + 4) / 4  # no answer counts as 0, 300 is capped at 2 * 2
    assert count["rmse"] == pytest.approx(((0 + 1 + 4 + 16) / 4) ** 0.5)
    intent = scores["intentbench"]
    assert intent["exact"]["score"] == 0 and intent["f1"]["score"] == 0.5  # {A, B} for {A, C}
    assert scores["mvbench"]["item_mean"]["score"] == 3 / 5  # beside the mean of the tasks
    unreadable = {"daily-omni": 1, "av-counting": 1, "video-mme": 1}
    assert {k: s["failures"] for k, s in scores.items() if s["failures"]} == unreadable | {
        "av-counting-ref": 1
    }


def test_what_is_asked(scripted):
    """The question, its options and a demand to reason stand in the prompt, after the clip."""
    _, records, parrot, printed, _ = scripted
    asked = {r["question"]: r for r in records}
    assert len(parrot.prompts) == len([r for r in records if r["score"] is not None])
    for text, prompt in parrot.prompts:
        assert SYSTEM_PROMPT in text and prompt.media
    record = asked["tt: which color?"]
    assert record["options"] == ["A. Red", "B. Blue", "C. Green"] and "B. Blue" in record["prompt"]
    assert asked["mmvu: which shot is it?"]["score"] is None  # and nobody was asked
    assert asked["mmvu: which shot is it?"]["completion"] is None
    assert asked["tomato: how many?"]["truth"] == "C"
    assert "not scored" in printed and "protocol ours" in printed


def test_sound_is_decided_clip_by_clip(scripted):
    scores, records, _, printed, _ = scripted
    heard = {r["question"]: r["use_audio"] for r in records}
    assert heard["world: one?"] is True and heard["world: three?"] is False  # one film is silent
    assert not heard["vsi: easy?"] and not heard["omnibench: what barks?"]  # silent; its own file
    told = scores["heard"]
    assert 0 < told["with_sound"] < told["videos"] and f"{told['with_sound']} of" in printed


def test_a_clip_is_decoded_once(toy_dir, benchmark_root, tmp_path, monkeypatch):  # noqa: F811
    decoded, decode = [], decode_clip
    monkeypatch.setattr(
        "evaluation.asking.decode_clip",
        lambda row, *x: decoded.append(row["video"]) or decode(row, *x),
    )
    monkeypatch.setattr("evaluation.asking.rollout", Parrot(toy_dir / "model", REPLIES))
    for name, clips in (
        ("vsi-bench", 1),
        ("daily-omni", 2),
        ("mvbench", 5),
    ):  # mvbench: spans differ
        decoded.clear()
        evaluate(toy_dir, benchmark_root, tmp_path / name, "--benchmark", name)
        assert len(decoded) == clips


def test_the_toy_model_on_all(toy_dir, benchmark_root, tmp_path):  # noqa: F811
    """One command, nothing replaced; and again with the questions of a clip read one by one."""
    flags = ("--benchmark", "all", "--max-new-tokens", 12)
    fifteen = [known for name, known in EXPECTED.items() if name != "av-counting-ref"]
    evaluate(toy_dir, benchmark_root, tmp_path / "a", *flags)
    records = tables.read_records(tmp_path / "a")
    assert len(records) == sum(n for n, _, _, _ in fifteen)
    done = [r for r in records if r["completion"] is not None]
    assert len(done) == len(records) - sum(open_ for _, open_, _, _ in fifteen)
    with pytest.MonkeyPatch.context() as patch:
        alone = lambda prompts: [[b] for b in range(len(prompts))]  # noqa: E731
        patch.setattr("models.rollout.shared_clip_groups", alone)
        evaluate(toy_dir, benchmark_root, tmp_path / "b", *flags)
    by_id = lambda rs: sorted(rs, key=lambda r: (r["file"], r["prompt_id"]))  # noqa: E731
    assert by_id(tables.read_records(tmp_path / "b")) == by_id(records)


# ---- what is not there, or not as published


def test_missing_annotations_say_where_they_belong(tmp_path):
    with pytest.raises(BadRow, match="no qa.json in .*liarliar/Daily-Omni.*archives unpacked"):
        benchmarks.load("daily-omni", tmp_path)
    (tmp_path / "qa.json").write_text('[{"Question": "Who?"}]')
    with pytest.raises(BadRow, match="item 0 is not as published .KeyError 'video_id'"):
        benchmarks.load("daily-omni", tmp_path)
    (tmp_path / "qa.json").write_text('[{"Question"')
    with pytest.raises(BadRow, match="is not JSON"):
        benchmarks.load("daily-omni", tmp_path)
    (tmp_path / "qa.json").write_text("[]")
    with pytest.raises(BadRow, match="without a question"):
        benchmarks.load("daily-omni", tmp_path)


def test_missing_media_are_listed(toy_dir, benchmark_root, tmp_path, monkeypatch):  # noqa: F811
    root = tmp_path / "tomato"
    (root / "data").mkdir(parents=True)
    for file in (benchmark_root / "tomato" / "data").iterdir():
        (root / "data" / file.name).write_text(file.read_text())
    flags = ("--benchmark", "tomato")
    printed = evaluate(toy_dir, root, tmp_path / "s", *flags, code=1)
    assert f"no file at {root}/videos/human/0209-03.mp4" in printed
    told = f"media of 4 of 4 items are out of reach in {root}, the first are above: put them there, from"
    told += " github.com/yale-nlp/TOMATO, or count them as wrong: --allow-missing"
    assert printed.strip().endswith(told)
    printed = evaluate(toy_dir, root, tmp_path / "s", *flags, "--allow-missing")
    found = json.loads((tmp_path / "s" / "scores.json").read_text())["scores"]["tomato"]
    assert (found["n"], found["score"], found["failures"]) == (4, 0.0, 4)  # the denominator stays
    assert printed.count("wrong: row tomato-") == 4 and "no file at" in printed


def test_ids_are_stable_and_unique(benchmark_root):  # noqa: F811
    for name in benchmarks.BENCHMARKS:
        folder, rows = benchmarks.load(name, benchmark_root)
        ids = [row["prompt_id"] for row in rows]
        again = [row["prompt_id"] for row in benchmarks.load(name, folder)[1]]
        assert ids == again and len(set(ids)) == len(ids) and all(i.startswith(name) for i in ids)


def test_an_item_that_breaks_our_format_counts_as_wrong(
    toy_dir,
    benchmark_root,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    root = tmp_path / "video-holmes"
    root.mkdir()
    (root / "videos").symlink_to(benchmark_root / "video-holmes" / "videos")
    items = json.loads((benchmark_root / "video-holmes" / "test_Video-Holmes.json").read_text())
    items[0]["Question"] = "holmes: who are they? <|im_end|>"
    items[1]["Options"]["C"] = " "
    (root / "test_Video-Holmes.json").write_text(json.dumps(items))
    monkeypatch.setattr("evaluation.asking.rollout", Parrot(toy_dir / "model", REPLIES))
    flags = ("--benchmark", "video-holmes", "--allow-outside")
    printed = evaluate(toy_dir, root, tmp_path / "s", *flags)
    found = json.loads((tmp_path / "s" / "scores.json").read_text())["scores"]["video-holmes"]
    assert (found["n"], found["score"], found["failures"]) == (4, 1 / 4, 2)
    assert "reserved <|im_end|>" in printed and "row video-holmes-RSmj-2" in printed


def test_failures_stay_in_every_denominator_and_are_asked_again(
    toy_dir,
    benchmark_root,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    root = tmp_path / "av-counting"
    shutil.copytree(benchmark_root / "av-counting", root)
    (tmp_path / "tomato").symlink_to(benchmark_root / "tomato")
    items = json.loads((root / "cg-av-counting.json").read_text())
    items[0]["video"] = "late.mp4"
    items[1]["question"] += " <|im_end|>"
    (root / "cg-av-counting.json").write_text(json.dumps(items))
    parrot = Parrot(toy_dir / "model", REPLIES)
    monkeypatch.setattr("evaluation.asking.rollout", parrot)

    def asked(name, *more):
        """-> how many questions the model got, the scores."""
        parrot.prompts.clear()
        evaluate(toy_dir, tmp_path, tmp_path / "s", "--benchmark", name, "--allow-missing", *more)
        found = json.loads((tmp_path / "s" / "scores.json").read_text())["scores"]
        return len(parrot.prompts), found["av-counting"]

    count, found = asked("av-counting")
    # truths 3, 5, 2, 2: no file, a reserved word, no answer, 300
    assert count == 2 and found["n"] == found["off_by_one"]["n"] == 4
    assert found["off_by_one"]["score"] == 0 and found["mae"] == (3 + 5 + 2 + 4) / 4
    shutil.copy(root / "cg_videos_720p/c.mp4", root / "cg_videos_720p/late.mp4")
    count, found = asked("av-counting", "--resume")
    assert count == 1 and found["off_by_one"]["score"] == 1 / 4
    # another benchmark in the same folder
    count, found = asked("tomato", "--resume", "--html", 9)
    assert count == 4 and found["n"] == 4
    shown = (tmp_path / "s" / "items.html").read_text()
    assert shown.count("media not shown") == 4 and shown.count("<img") > 4


@pytest.mark.parametrize("item_id", ["../../x", "a/b", "/x/y", "..", "x\0", "x" * 400])
def test_pictures_inside_the_annotations_stay_in_the_root(item_id, tmp_path):
    """They are written under their hash, whatever the id says."""
    root = tmp_path / "a" / "root"
    root.mkdir(parents=True)
    path = benchmarks.picture_path(root, dict(id=item_id, image=dict(bytes=b"PNG")))
    assert (root / path).read_bytes() == b"PNG"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [root / path]


@pytest.mark.parametrize(
    "name, file, edit, told",
    [
        ("av-odyssey", "av_odyssey.json", dict(image_path=[5]), "give paths as text"),
        ("av-odyssey", "av_odyssey.json", dict(audio_path=[["x"], "y"]), "give paths as text"),
        (
            "av-odyssey",
            "av_odyssey.json",
            dict(video_path=["a", "b"]),
            "paths as text, and one video",
        ),
        ("daily-omni", "qa.json", dict(video_id="v" * 400), None),
        ("daily-omni", "qa.json", dict(Type="half: \ud83d"), "half a character"),
        ("mvbench", "json/episodic_reasoning.json", dict(start=99.0, end=100.0), "no media"),
        ("mvbench", "json/episodic_reasoning.json", dict(video="../../.."), None),
    ],
)
def test_one_bad_item_is_wrong_and_the_others_are_asked(
    name,
    file,
    edit,
    told,
    benchmark_root,  # noqa: F811
    tmp_path,
):
    entries = json.loads((benchmark_root / name / file).read_text())
    shutil.copytree(benchmark_root / name, tmp_path / name)
    (tmp_path / name / file).write_text(json.dumps([entries[0] | edit, *entries[1:]]))
    folder, rows = benchmarks.load(name, tmp_path)
    lost = items.missing_media(folder, rows, RECIPE)
    assert all("no file" in why or "v" * 90 in why or "is not in" in why for why in lost)
    assert bool(lost) == any(key in edit for key in ("video_id", "audio_path", "video"))
    asked, settled = items.split_items(name, rows, {}, Protocol())
    assert len(asked) + len(settled) == len(rows) and len(settled) == bool(told)
    for record in settled:
        assert told in record["failure"] and record["score"] == 0
    assert not any(row["images"] and "../" in row["images"][0] for row, _ in asked)


def test_ids_that_look_like_ours(monkeypatch):
    rows = lambda root: (dict(prompt_id=i, groups={}) for i in ("x", "x", "x-2", "x"))  # noqa: E731
    monkeypatch.setitem(benchmarks.BENCHMARKS, "b", benchmarks.Benchmark("B", "b", rows))
    ids = [row["prompt_id"] for row in benchmarks.load("b", ".")[1]]
    assert ids == ["b-x", "b-x-2", "b-x-2-2", "b-x-3"]


def test_sound_is_looked_for_inside_the_folder(media, tmp_path):  # noqa: F811
    import av

    media(tmp_path / "rows" / "film.mp4", "film")
    media(tmp_path / "outside.mp4", "film")
    row = dict(prompt_id="x", video="film.mp4")
    assert items.has_usable_sound(tmp_path / "rows", row, RECIPE)
    assert not items.has_usable_sound(
        tmp_path / "rows", row, RECIPE._replace(max_audio_seconds=1.0)
    )
    assert items.has_usable_sound(
        tmp_path / "rows", row | dict(end=0.9), RECIPE._replace(max_audio_seconds=1.0)
    )
    with pytest.raises(BadRow, match="is not in the JSONL's folder"):
        items.has_usable_sound(tmp_path / "rows", row | dict(video="../outside.mp4"), RECIPE)
    with av.open(str(tmp_path / "outside.mp4")) as old:  # a stream tells no length
        to = str(tmp_path / "rows" / "live.mkv")
        with av.open(to, "w", format="matroska", options=dict(live="1")) as new:
            streams = {s.index: new.add_stream_from_template(s) for s in old.streams}
            for packet in old.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream.index]
                    new.mux(packet)
    assert not items.has_usable_sound(tmp_path / "rows", row | dict(video="live.mkv"), RECIPE)


# ---- the authors' recipe


def test_protocol_paper(toy_dir, benchmark_root, tmp_path, monkeypatch):  # noqa: F811
    """Letters only, their limits, the last capital letter that stands by itself."""
    replies = REPLIES | {
        "mme: one?": "It is D, no, C",
        "mme: two?": "I do",  # the script takes I for the answer
        "mme: three?": "A cat",
        "intent: which feelings?": "c and A",
        "intent: is he lying?": "Certainly not. No.",
    }
    parrot, tokens = Parrot(toy_dir / "model", replies), []

    def roll(*args, max_new_tokens, **kwargs):
        tokens.append(max_new_tokens)
        return parrot(*args, **kwargs)

    monkeypatch.setattr("evaluation.asking.rollout", roll)
    flags = ("--protocol", "paper", "--benchmark")
    evaluate(toy_dir, benchmark_root, tmp_path / "s", *flags, "video-mme", "intentbench")
    scores = json.loads((tmp_path / "s" / "scores.json").read_text())
    assert scores["scores"]["video-mme"]["score"] == pytest.approx(2 / 3)
    # the whole set counts; of "<think>a look</think><answer>B</answer>" the B stands alone
    assert scores["scores"]["intentbench"]["score"] == (1 + 0 + 1 + 1) / 4
    assert set(tokens) == {64, 20} and scores["max_new_tokens"]["omnibench"] == 1024
    assert all(
        protocol.ASSISTANT in asked and "<think>" not in asked for asked, _ in parrot.prompts
    )
    printed = evaluate(toy_dir, benchmark_root, tmp_path / "t", *flags, "vsi-bench", code=1)
    assert "the authors published no script for vsi-bench" in printed


def test_template(toy_dir, benchmark_root, tmp_path, monkeypatch):  # noqa: F811
    parrot = Parrot(toy_dir / "model", REPLIES)
    monkeypatch.setattr("evaluation.asking.rollout", parrot)
    (tmp_path / "words.txt").write_text("Watch. {question}\nSay one letter.")
    flags = ("--benchmark", "video-mme", "--template", tmp_path / "words.txt")
    evaluate(toy_dir, benchmark_root, tmp_path / "s", *flags)
    text = "Watch. mme: one?\nA. a dog\nB. a cat\nC. a bell\nD. rain\nSay one letter."
    assert any(text in asked for asked, _ in parrot.prompts)
    assert text in [r["prompt"] for r in tables.read_records(tmp_path / "s")]  # what was asked
    flags = (*flags, "--protocol", "paper", "--max-new-tokens", 9)
    parrot.prompts.clear()
    evaluate(toy_dir, benchmark_root, tmp_path / "t", *flags)
    assert all(protocol.ASSISTANT in asked for asked, _ in parrot.prompts) and parrot.prompts
    assert json.loads((tmp_path / "t" / "scores.json").read_text())["max_new_tokens"] == 9
    assert "one letter" in json.loads((tmp_path / "s" / "scores.json").read_text())["template"]


# ---- readers


def test_parquet_needs_pyarrow_or_says_so(tmp_path):
    rows = [dict(a=1, b=["x", "y"], c=None), dict(a=2, b=[], c="z")]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        (tmp_path / "x.parquet").write_bytes(b"PAR1")
        with pytest.raises(BadRow, match="pip install pyarrow"):
            list(benchmarks.annotations(tmp_path, "*.parquet"))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
        found = list(benchmarks.annotations(tmp_path, "*.parquet"))
        assert [record for _, record in found] == rows


def test_a_file_of_one_line_is_one_record(tmp_path):
    """Even where the record holds a list of objects, as LVBench's do."""
    record = dict(key="v", qa=[dict(uid=1), dict(uid=2)])
    (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
    ((_, found),) = benchmarks.annotations(tmp_path, "*.jsonl")
    assert found == record


def test_options_in_the_question():
    assert cut_options("Who?\n(A) he\n(B) she") == ("Who?", ["(A) he", "(B) she"])
    assert cut_options("Who?\nA. he\nB. she") == ("Who?", ["A. he", "B. she"])
    assert cut_options("Who is it (A) or (B)?") == ("Who is it (A) or (B)?", [])
    assert cut_options("Who?\n(B) she\n(A) he")[1] == []  # not in the order of their letters


@pytest.mark.parametrize("truth", range(4))
def test_options_that_are_letters(truth):
    """The right option is right and the others are wrong, whichever letters they consist of."""
    row = benchmarks.choice_by_index(["C", "A", "dog", "B"], truth) | dict(
        prompt_id="x", question="?", video="v"
    )
    row = normalize_row(row)
    texts = ["C", "A", "dog", "B"]
    record = {}
    for i, text in enumerate(texts):
        items.score_record(
            record, row, f"<answer>{text}</answer>", False, name="tomato", protocol=Protocol()
        )
        assert record["score"] == (i == truth)


@pytest.mark.parametrize("texts", [["", "dog", "cat"], ["B", "", "dog"], ["dog", "cat", ""]])
def test_an_empty_option_shifts_no_letter(texts):
    choices = dict(zip("ABC", texts))
    for truth in (letter for letter, text in choices.items() if text):
        row = benchmarks.choice_by_key(choices, truth) | dict(
            prompt_id="x", question="?", video="v"
        )
        row, record = normalize_row(row), {}
        for letter, text in choices.items():
            if text:
                items.score_record(
                    record, row, f"<answer>{text}</answer>", False, name="mmvu", protocol=Protocol()
                )
                assert record["score"] == (letter == truth)


# ---- media where a text names them


def test_media_stand_where_the_text_names_them():
    row = dict(prompt_id="x", images=["i"], video=None, audio=["a", "b", "c"])
    pieces = protocol.interleave_media("Is [audio3] louder than [audio1]?\nA. [img1]", row)
    told = [piece.get("text") or (piece["type"], piece["index"]) for piece in pieces]
    named = ["Is ", ("audio", 2), " louder than ", ("audio", 0), "?\nA. ", ("image", 0)]
    assert told == [("audio", 1), *named]  # what is not named comes first; no text, no piece
    with pytest.raises(BadRow, match=r"row x: the text names .img2., and the row has 1"):
        protocol.interleave_media("Look at [img2]", row)
    muted = protocol.interleave_media("Is [audio3] [img1]?", row, without=("sound",))
    assert [piece.get("text") or piece["type"] for piece in muted] == [
        "Is [audio3]",
        " ",
        "image",
        "?",
    ]
    film = dict(prompt_id="x", images=[], video="v", audio=None)
    pieces = protocol.interleave_media(f"Is [video1] as [video1] is? [audio{'9' * 5000}]", film)
    assert [piece["type"] for piece in pieces] == ["text", "video", "text", "text"]  # one video
    assert pieces[2]["text"] == " as [video1]"


def test_several_sounds_as_transformers_reads_them(toy_dir, media, tmp_path):  # noqa: F811
    """Their order in the prompt is that of the text; the forward pass is transformers' own."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

    lengths = (8000, 16000)
    for i, length in enumerate(lengths):
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            tone = 8000 * np.sin(np.arange(length) / (8 + 30 * i))
            file.writeframes(tone.astype(np.int16).tobytes())
    media(tmp_path / "p.png", "picture")
    row = dict(prompt_id="x", question="?", answer="1", answer_type="number", images=["p.png"])
    row = normalize_row(row | dict(audio=["0.wav", "1.wav"]))
    build = InputBuilder(toy_dir / "model", RECIPE, tmp_path, False)
    clip = decode_clip(row, tmp_path, RECIPE)
    plain = Thinker.from_pretrained(toy_dir / "model")
    policy = load_policy(toy_dir / "model", 0, False)
    seen = []
    for order in ((2, 1), (1, 2)):
        text = "Is [audio{}] or [audio{}] louder in [img1]?".format(*order)
        prompt = build.from_clip(row, clip, turns=("Listen.", protocol.interleave_media(text, row)))
        mels = prompt.media["audio"]["mel"].split(prompt.media["audio"]["lengths"].tolist(), dim=1)
        assert [m.shape[1] for m in mels] == [lengths[i - 1] // 160 for i in order]
        features = torch.zeros(2, 128, 100)
        mask = torch.zeros(2, 100, dtype=torch.long)
        for i, mel in enumerate(mels):
            features[i, :, : mel.shape[1]], mask[i, : mel.shape[1]] = mel, 1
        ids = prompt.input_ids[None]
        theirs = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=build.eos_ids,
            pad_token_id=0,
            input_features=features,
            feature_attention_mask=mask,
            pixel_values=prompt.media["image"]["pixels"],
            image_grid_thw=prompt.media["image"]["grid"],
            output_logits=True,
            return_dict_in_generate=True,
        )
        ((ours,),) = rollout(
            policy,
            [prompt],
            [1],
            temperature=0.0,
            max_new_tokens=8,
            eos_ids=build.eos_ids,
            seeds=[0],
        )
        assert ours.ids.tolist() == theirs.sequences[0, ids.shape[1] :].tolist()
        logprobs = torch.cat(theirs.logits).log_softmax(-1).gather(1, ours.ids[:, None])[:, 0]
        assert_same_values(ours.logprobs, logprobs)
        seen.append(ours.logprobs[0].item())
    assert seen[0] != seen[1]
