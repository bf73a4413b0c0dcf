"""
Evaluation: how an answer becomes a score, intervals, resuming, several processes, tables, the page.

    python -m pytest tests/test_eval.py
"""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import RECIPE, ROOT, in_browser, launch, needs_browser
from transformers import AutoTokenizer

import answers
import eval as evaluation
import rewards
import train_sft
from data.rows import SYSTEM_PROMPT
from data.thumbnails import encode_sound
from evaluation import items, items_page, protocol, scores, tables
from evaluation.items_page import write_items_page
from evaluation.protocol import Protocol
from models.inputs import InputBuilder
from models.rollout import Completion, rollout
from run.run_dir import git_commit

OURS = Protocol()


def eval_flags(toy_dir, out, *more):
    return (
        "eval.py",
        "--model",
        toy_dir / "model",
        "--data",
        toy_dir / "stage2" / "test.jsonl",
        toy_dir / "stage1" / "test.jsonl",
        "--out",
        out,
        "--max-new-tokens",
        24,
        *more,
    )


def by_id(records):
    return sorted(records, key=lambda r: (r["file"], r["prompt_id"]))


# ---- one item, by hand


@pytest.mark.parametrize(
    "answer, truth, scoring, expected",
    [
        ("B", "B", "exact", dict(score=1)),
        (None, "B", "exact", dict(score=0)),
        (frozenset("AB"), frozenset("AC"), "f1", dict(score=0.5, exact=0, f1=0.5)),
        (frozenset("AC"), frozenset("AC"), "f1", dict(score=1, exact=1, f1=1)),
        (frozenset("ABCD"), frozenset("A"), "f1", dict(score=0.4, exact=0, f1=0.4)),
        (None, frozenset("A"), "f1", dict(score=0, exact=0, f1=0)),
        (10.0, 10.0, "mra", dict(score=1)),
        (5.0, 10.0, "mra", dict(score=0.1)),  # off by .5: only the first threshold
        (4.9, 10.0, "mra", dict(score=0)),
        (6.7, 10.0, "mra", dict(score=0.4)),  # off by .33: .50 .55 .60 .65
        (11.2, 10.0, "mra", dict(score=0.8)),  # off by .12: up to .85
        (None, 10.0, "mra", dict(score=0)),
        (4.0, 5.0, "count", dict(score=0, off_by_one=1, error=1)),
        (5.0, 5.0, "count", dict(score=1, off_by_one=1, error=0)),
        (None, 1.0, "count", dict(score=0, off_by_one=0, error=1)),  # wrong, though 0 is near
        (90.0, 5.0, "count", dict(score=0, off_by_one=0, error=85)),
        (500.0, 5.0, "count", dict(score=0, off_by_one=0, error=10)),  # capped at twice the truth
        (500.0, 400.0, "count", dict(score=0, off_by_one=0, error=100)),
        (12.499, 12.5, "rounded", dict(score=1)),
        (12.48, 12.5, "rounded", dict(score=0)),
        ("a dolly zoom", "dolly zoom", "open", dict(score=None)),
    ],
)
def test_measures(answer, truth, scoring, expected):
    assert scores.measure(answer, truth, scoring) == pytest.approx(expected)


def test_unknown_scoring():
    with pytest.raises(ValueError, match="unknown scoring 'nice'"):
        scores.measure("A", "A", "nice")


OPTIONS = ["a dog", "a cat", "a bell", "I am here"]


@pytest.mark.parametrize(
    "text, expected",
    [  # what evaluators take that look for the first or last capital letter is beside it
        ("<think>A or B?</think><answer>C</answer>", "C"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),  # the first: A
        ("<think>The answer is <answer>A</answer>?</think><answer>B</answer>", "B"),
        ("<think>I see a bell. A bell rings.</think><answer>a bell</answer>", "C"),  # none, or A
        ("<think>so D</think><answer>I think it is B</answer>", None),  # I, or B
        ("<answer>(b)</answer>", "B"),
        ("<answer>The correct answer is: **B**</answer>", "B"),
        ("<answer>A and B</answer>", None),
        ("<answer>A dog</answer>", "A"),
        ("<answer>A cat</answer>", "B"),  # A
        ("<answer>B. a dog</answer>", None),  # says two things
        ("<answer></answer>", None),
        ("B", "B"),
        ("The answer is (C).", "C"),
        ("<think>It rings.</think>\nC. a bell", "C"),
        ("Let us see.\nThe sound is metallic.\nAnswer: C", "C"),
        ("I cannot say. A cat or a dog may be there.", None),  # A
        ("I am here", "D"),  # I
        ("<think>never closed, B", None),  # B
        ("</answer>B", None),
    ],
)
def test_replies_that_others_misread(text, expected):
    row = dict(answer="C", answer_type="choice", options=OPTIONS)
    record = dict(failure=None)
    items.score_record(record, row, text, False, name="x", protocol=OURS)
    read = answers.normalize_answer(record["parsed"], "choice", OPTIONS)
    assert read == expected and record["score"] == (expected == "C")
    assert (record["failure"] is None) == (expected is not None)


@pytest.mark.parametrize(
    "text, kind, expected",
    [
        ("<answer>between 3 and 5</answer>", "number", None),  # 3, or 35
        ("<answer>twenty-one</answer>", "number", 21.0),
        ("<answer>1,200 m</answer>", "number", 1200.0),  # 1
        ("<answer>No, there is none</answer>", "yesno", "no"),
        ("<answer>yes and no</answer>", "yesno", None),
        ("<answer>A and C</answer>", "multi", frozenset("AC")),
        ("<answer>ACID</answer>", "multi", None),  # A, C, D
    ],
)
def test_other_kinds_of_replies(text, kind, expected):
    options = OPTIONS if kind == "multi" else None
    assert answers.normalize_answer(answers.parse_answer(text), kind, options) == expected


def test_a_cut_off_reply_has_no_answer():
    """What stands last in half a text is no answer, whatever it looks like."""
    row = dict(answer="C", answer_type="choice", options=OPTIONS)
    for truncated in (True, False):
        record = dict(failure=None)
        items.score_record(record, row, "Perhaps\nC", truncated, name="x", protocol=OURS)
        assert record["score"] == (not truncated)
    items.score_record(record, row, "Perhaps\nC", True, name="x", protocol=OURS)
    assert record["failure"] == "cut off by --max-new-tokens"


# ---- intervals


def test_intervals_equal_scipys():
    """scipy 1.17.1 on the same data with the same generator: recorded by record_scipy.py."""
    rng = np.random.default_rng(7)
    clips = rng.integers(0, 24, 60)
    ours, theirs = rng.random(60).round(3), rng.random(60).round(3)
    recorded = dict(
        items=[0.4192329166666667, 0.55615375],
        clips=[0.41637629237288143, 0.5520886718750002],
        difference=[-0.1408847318699639, 0.06384023109243703],
    )
    found = scores.bootstrap(ours, range(60), 0), scores.bootstrap(ours, clips, 1)
    assert found[0][0] == pytest.approx(ours.mean())
    for (_, *interval), name in zip(found, ("items", "clips")):
        np.testing.assert_allclose(interval, recorded[name], atol=1e-12)

    def records(values):
        rows = enumerate(zip(values, clips))
        return [dict(prompt_id=i, score=v, clip=f"{c:02d}", groups=None) for i, (v, c) in rows]

    # the names of the clips have another order here, so it is the same bootstrap with other draws
    paired = scores.compare(records(ours), records(theirs)[::-1], 2)
    assert paired["n"] == 60 and paired["score"] == pytest.approx((ours - theirs).mean())
    np.testing.assert_allclose([paired["low"], paired["high"]], recorded["difference"], atol=0.02)
    found = scores.bootstrap(ours - theirs, clips, 2)
    np.testing.assert_allclose(found[1:], recorded["difference"], atol=1e-12)


def test_clusters_widen_the_interval():
    values = np.random.default_rng(0).random(400)
    mean, low, high = scores.bootstrap(values, range(400), seed=0)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(mean - half, abs=0.004)
    assert high == pytest.approx(mean + half, abs=0.004)
    # ten questions a clip that stand or fall together are worth one
    alike, clips = np.repeat(values[:40], 10), np.repeat(np.arange(40), 10)
    tenfold = scores.bootstrap(alike, clips, seed=0)
    assert tenfold[2] - tenfold[1] > 2.5 * (high - low)


def test_one_clip_has_no_interval():
    assert scores.bootstrap([1, 0, 0, 1], ["v"] * 4, 0) == (0.5, None, None)
    part = dict(score=0.5, low=None, high=None)
    assert scores.interval(part) == "one clip" and scores.dagger(part) == "†"


def test_macro_means_by_hand():
    """A group counts as one, whatever its size; a share weighs it."""
    values, groups = [1, 1, 1, 0, 0, 1], ["x", "x", "x", "x", "y", "z"]
    mean = lambda **shares: scores.bootstrap(values, range(6), 0, groups, shares)[0]  # noqa: E731
    assert mean() == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert mean(x=2.0) == pytest.approx((2 * 3 / 4 + 0 + 1) / 4)
    one = scores.bootstrap([0.25] * 6, range(6), 0, groups, dict(y=0.5))
    assert one == pytest.approx((0.25, 0.25, 0.25))  # also where a resample lacks a group


def test_not_scored_is_neither_wrong_nor_right():
    items = [
        dict(prompt_id=i, score=s, failure=None, groups={"g": ["a", "b"]}, clip=i)
        for i, s in enumerate((1.0, 0.0, None))
    ]
    found = scores.summarize(items, 0)
    assert (found["n"], found["not_scored"], found["score"]) == (3, 1, 0.5)
    assert found["groups"]["g"]["b"]["n"] == 2
    nothing = scores.summarize(items[2:], 0)
    assert nothing["score"] is None and nothing["groups"] == {}
    assert scores.compare(items, items[2:], 0) is None


# ---- runs


def test_evaluation(toy_dir, tmp_path):
    launch(*eval_flags(toy_dir, tmp_path / "a"))
    records = tables.read_records(tmp_path / "a")
    result = json.loads((tmp_path / "a" / "scores.json").read_text())
    assert len(records) == 16 and result["scores"]["all"]["n"] == 16
    assert result["scores"]["all"]["score"] == np.mean([r["score"] for r in records])
    assert {"prompt", "completion", "parsed", "truth", "score", "failure"} <= set(records[0])
    for key in ("recipe", "protocol", "temperature", "max_new_tokens", "system", "commit"):
        assert key in result
    # the items of an interrupted evaluation are kept; batching changes nothing
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    lines = (tmp_path / "a" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "records.jsonl").write_text("".join(lines[:3]))
    (tmp_path / "b" / "records-0.jsonl").write_text("".join(lines[3:5]) + lines[5][:40])
    more = ("--resume", "--batch-size", 3, "--baseline", tmp_path / "a")
    printed = launch(*eval_flags(toy_dir, tmp_path / "b", *more))
    assert by_id(tables.read_records(tmp_path / "b")) == by_id(records)
    assert "+0.000" in printed and "†" in printed and "not like with like" not in printed
    launch(*eval_flags(toy_dir, tmp_path / "c"), processes=2)
    assert by_id(tables.read_records(tmp_path / "c")) == by_id(records)


def test_a_file_has_one_name_however_it_was_typed(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    for typed in (
        "rows.jsonl",
        "./rows.jsonl",
        "../sub/rows.jsonl",
        tmp_path / "sub" / "rows.jsonl",
    ):
        assert evaluation.name_of(typed) == "rows.jsonl"
    assert evaluation.name_of("../rows.jsonl") == str(tmp_path / "rows.jsonl")


def test_sampling_does_not_depend_on_the_batch(toy_dir, tmp_path):
    made = []
    for i, size in enumerate((16, 3)):
        more = ("--temperature", 1, "--batch-size", size)
        launch(*eval_flags(toy_dir, tmp_path / str(i), *more))
        made.append([r["completion"] for r in by_id(tables.read_records(tmp_path / str(i)))])
    assert made[0] == made[1]


def test_another_recipe_is_not_resumed_and_is_told_in_a_comparison(toy_dir, tmp_path):
    launch(*eval_flags(toy_dir, tmp_path / "a"))
    other = ("--max-frames", 4)
    line = launch(*eval_flags(toy_dir, tmp_path / "a", "--resume", *other), code=1)
    assert "--resume: other recipe than in" in line
    flags = list(eval_flags(toy_dir, tmp_path / "a", "--resume"))
    shutil.copytree(toy_dir / "model", tmp_path / "other")
    flags[flags.index("--model") + 1] = tmp_path / "other"
    assert "--resume: other model than in" in launch(*flags, code=1)
    more = ("--baseline", tmp_path / "a", *other)
    printed = launch(*eval_flags(toy_dir, tmp_path / "b", *more))
    assert "not like with like: other recipe than in" in printed


def test_failures_count_as_wrong_and_are_named(toy_dir, tmp_path):
    """Defect 12 of the authors' trainer: failed clips left the denominator, or became text."""
    folder = tmp_path / "rows"
    shutil.copytree(toy_dir / "stage2", folder)
    clips = sorted((folder / "clips").glob("test-*.mp4"))
    clips[0].unlink()
    clips[1].write_bytes(clips[1].read_bytes()[:900])
    printed = launch(
        "eval.py",
        "--model",
        toy_dir / "model",
        "--data",
        folder / "test.jsonl",
        "--out",
        tmp_path / "s",
        "--max-new-tokens",
        24,
        "--html",
        8,
    )
    found = json.loads((tmp_path / "s" / "scores.json").read_text())["scores"]["all"]
    assert found["n"] == 8 and found["failures"] >= 2
    assert "row toy-2-test-00000: no file at" in printed and "row toy-2-test-00001" in printed
    read = [r for r in tables.read_records(tmp_path / "s") if r["completion"] is not None]
    assert len(read) == 6  # one bad clip does not change how the others are read
    assert "no file at" in (tmp_path / "s" / "items.html").read_text()


def test_mistakes_are_one_line(toy_dir, tmp_path):
    flags, words = eval_flags(toy_dir, tmp_path / "x"), tmp_path / "words.txt"
    words.write_text("Which one?")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "records.jsonl").write_text('{"file": \n')
    (tmp_path / "torn" / "config.json").write_text("{")
    for more, said in (
        (("--baseline", tmp_path / "nowhere"), "--baseline"),
        (("--table", tmp_path / "nowhere"), "--table"),
        (("--baseline", tmp_path / "torn"), "torn"),
        (("--model", tmp_path / "torn"), "torn/config.json"),
        (("--out", ""), "--out"),
        (("--benchmark", "tomato", "--root", tmp_path), "data/*.json"),
        (("--template", tmp_path / "no.txt"), "no.txt"),
        (("--template", words), "{question}"),
        (("--template", toy_dir / "model" / "model.safetensors"), "UTF-8"),
    ):
        printed = launch(*flags, *more, code=1)
        assert "Traceback" not in printed and said in printed.strip().splitlines()[-1]


@pytest.mark.parametrize("more", [[], ["--data", "x.jsonl"]])
def test_the_authors_protocol_is_for_benchmarks(more, capsys):
    with pytest.raises(SystemExit):
        evaluation.parse_args(["--model", "m", "--protocol", "paper", *more])
    assert "--protocol paper is for --benchmark alone" in capsys.readouterr().err


def test_an_edited_row_is_asked_again(toy_dir, tmp_path):
    """And a weights file of another time is another model, under the same path too."""
    for name in ("model", "stage2"):
        shutil.copytree(toy_dir / name, tmp_path / name)
    file = tmp_path / "stage2" / "test.jsonl"
    flags = (
        "eval.py",
        "--model",
        tmp_path / "model",
        "--data",
        file,
        "--out",
        tmp_path / "s",
        "--max-new-tokens",
        4,
    )
    launch(*flags)
    before = {r["prompt_id"]: r for r in tables.read_records(tmp_path / "s")}
    first, *rest = file.read_text().splitlines()
    edited = json.dumps(json.loads(first) | dict(question="Which color is last?"))
    file.write_text("\n".join([edited, *rest[:-1]]))  # and a row is gone
    printed = launch(*flags, "--resume")
    assert "1 items are asked again" in printed
    after = {r["prompt_id"]: r for r in tables.read_records(tmp_path / "s")}
    changed = [i for i in before if after.get(i) != before[i]]
    assert changed == [json.loads(line)["prompt_id"] for line in (first, rest[-1])]
    (tmp_path / "model" / "model.safetensors").touch()
    assert "--resume: other weights than in" in launch(*flags, "--resume", code=1)


# ---- what the model gets


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the model is asked, as they come."""
    collected = []

    def spy(policy, prompts, *args, **kwargs):
        collected.extend(prompts)
        return rollout(policy, prompts, *args, **kwargs)

    monkeypatch.setattr("evaluation.asking.rollout", spy)
    return collected


def test_without_a_sense(toy_dir, tmp_path, prompts):
    media = {}
    for name, without in (
        ("full", ()),
        ("muted", ("sound",)),
        ("heard", ("video",)),
        ("blind", ("sound", "video")),
    ):
        prompts.clear()
        flags = ("--without", *without) if without else ()
        flags += ("--baseline", tmp_path / "full") if without else ()
        printed = launch(*eval_flags(toy_dir, tmp_path / name, *flags))
        media[name] = [set(prompt.media) for prompt in prompts]
        is_blind = "solved without looking or listening" in printed
        assert is_blind == (name == "blind")
        assert ("the difference is" in printed) == (name != "full")
        assert "not like with like" not in printed
    with_sound = [kinds == {"video", "audio"} for kinds in media["full"]]
    assert sum(with_sound) == 8  # those of stage 2
    assert media["muted"] == [{"video"}] * 16 and media["blind"] == [set()] * 16
    assert media["heard"] == [{"audio"} if sound else set() for sound in with_sound]

    recipe = json.loads((tmp_path / "muted" / "recipe.json").read_text())
    assert recipe["without"] == ["sound"]
    printed = launch(*eval_flags(toy_dir, tmp_path / "muted", "--resume"), code=1)
    assert "--resume: other without than in" in printed
    printed = launch("eval.py", "--table", *(tmp_path / name for name in media))
    lines = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    rows = {line[1]: line for line in lines if len(line) > 6}
    assert {"all: full", "all: without sound", "all: without video"} <= set(rows)
    blind = tables.read_records(tmp_path / "blind")
    row = rows["all: blind (text alone)"]
    assert row[2:4] == ["16", f"{np.mean([r['score'] for r in blind]):.3f}"]
    assert row[6] == f"{np.mean([scores.chance(r) for r in blind]):.3f}"


def test_chance():
    assert scores.chance(dict(answer_type="choice", options=["a", "b", "c", "d"])) == 0.25
    assert scores.chance(dict(answer_type="yesno")) == 0.5
    assert scores.chance(dict(answer_type="number")) == 0


def test_the_system_prompt_can_be_replaced_or_left_out(toy_dir, tmp_path, prompts):
    tokenizer = AutoTokenizer.from_pretrained(toy_dir / "model")
    (tmp_path / "words.txt").write_text("Listen well.\n")
    for system, begin in (
        (None, f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>"),
        ("none", "<|im_start|>user\n"),
        (tmp_path / "words.txt", "<|im_start|>system\nListen well.<|im_end|>"),
    ):
        prompts.clear()
        flags = ("--system", system) if system else ()
        out = tmp_path / f"s{len(list(tmp_path.iterdir()))}"
        launch(*eval_flags(toy_dir, out, *flags))
        assert all(tokenizer.decode(p.input_ids).startswith(begin) for p in prompts)
    printed = launch(*eval_flags(toy_dir, out, "--resume"), code=1)
    assert "--resume: other system than in" in printed


def test_a_template_that_opens_the_reasoning(toy_dir, tmp_path):
    """As those of Thinking models do: the completion is read with the tag that the prompt opened."""
    shutil.copytree(toy_dir / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    text = template.read_text()
    assert "<|im_start|>assistant\n{% endif %}" in text
    template.write_text(text.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    says = "red</think><answer>B</answer>"
    for folder, expected in ((toy_dir / "model", -1), (tmp_path / "model", 1)):
        build = InputBuilder(folder, RECIPE, ".", False)
        ids = torch.tensor(build.tokenizer(says).input_ids)
        (text,) = build.texts([Completion(ids, torch.zeros(len(ids)), False)])
        assert rewards.format_reward(text) == expected
        # and SFT does not teach the model to open it twice
        row = dict(reasoning="red", answer="B")
        ids = train_sft.encode_completion(build, row)
        assert build.opened_tag + build.tokenizer.decode(ids[:-1]) == (
            "<think>red</think><answer>B</answer>"
        )


# ---- flags


def test_the_old_spelling_of_baseline_works_and_is_hidden(capsys):
    assert evaluation.parse_args(["--against", "x"])[0].baseline == "x"
    with pytest.raises(SystemExit):
        evaluation.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "--baseline" in printed and "--against" not in printed


def test_tables_are_printed_without_torch(tmp_path):
    record(tmp_path / "a", "omnibench", [0, 1])
    words = ["-X", "importtime", "eval.py", "--table", str(tmp_path / "a")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert "| OmniBench |" in done.stdout and not done.returncode
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in loaded and not loaded & {"torch", "transformers"}


# ---- tables


def record(folder, name, values, clip="c"):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "records.jsonl", "a") as file:
        for i, value in enumerate(values):
            groups = {"task": f"t{i % 2}"}
            item = dict(file=name, prompt_id=f"{name}-{i}", score=value, clip=f"{clip}{i}")
            file.write(json.dumps(item | dict(groups=groups, failure=None)) + "\n")


def test_tables(tmp_path):
    base, ours = tmp_path / "base", tmp_path / "ours"
    record(base, "omnibench", [0, 0, 0, 1] * 5)
    record(ours, "omnibench", [1, 1, 0, 1] * 5)
    record(base, "mvbench", [1, 0] * 6)
    record(ours, "mvbench", [1, 0] * 5 + [0, 1])
    record(ours, "video-tt", [None, None])
    printed = launch("eval.py", "--table", base, ours)
    lines = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    assert ["", "Audio-visual", "OmniBench", ""] in lines
    assert ["", str(base), "25.0", ""] in lines
    assert ["", str(ours), "75.0 (+50.0)", ""] in lines
    assert ["", str(ours), "50.0 (+0.0)†", ""] in lines  # MVBench: the mean of its tasks
    assert ["", str(base), "25.0", "not run", ""] in lines  # the ablation's benchmarks
    assert ["", str(ours), "75.0 (+50.0)", "not scored", ""] in lines
    rule = ["", "---", "---:", ""]
    assert lines.count(rule) == 2  # audio-visual, video; the third has two columns


def test_tables_tell_what_is_not_alike(tmp_path):
    base, ours = tmp_path / "base", tmp_path / "ours"
    record(base, "omnibench", [0, 0, 0, 1] * 5)
    record(ours, "omnibench", [1, 1])
    (ours / "records.jsonl").rename(ours / "records-0.jsonl")  # as a kill leaves it
    for folder, frames in ((base, 32), (ours, 16)):
        (folder / "recipe.json").write_text(json.dumps(dict(recipe=dict(max_frames=frames))))
    printed = launch("eval.py", "--table", base, ours)
    assert "| 100.0 n=2 (+100.0) |" in printed and f"not finished: {ours}" in printed
    assert f"not like with like: other recipe in {ours} than in {base}" in printed


def test_an_item_told_twice_counts_once(tmp_path):
    """A kill between the whole file and the removal of the ranks' leaves both."""
    record(tmp_path, "omnibench", [0, 1])
    shutil.copy(tmp_path / "records.jsonl", tmp_path / "records-1.jsonl")
    assert [r["score"] for r in tables.read_records(tmp_path)] == [0, 1]


def test_clips_of_one_name_in_two_folders_are_two(tmp_path):
    for stage in "ab":
        record(tmp_path, f"{stage}/test.jsonl", [0, 1] * 10)
    found = tables.summarize_all(tables.read_records(tmp_path), 0)["all"]
    clips = [f"{stage}/c{i}" for stage in "ab" for i in range(20)]
    expected = scores.bootstrap([0, 1] * 20, clips, 0)
    assert tuple(found[k] for k in ("score", "low", "high")) == expected


# ---- the page


class Reader(HTMLParser):
    """Checks that every element is closed in order; keeps tags, attributes and text."""

    VOID = {"meta", "input", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"{tag} closes what is not open"

    def handle_data(self, data):
        self.text += data


HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="alert(2)"> & \'"<answer>'


def write_page(toy_dir, tmp_path):
    rows = [
        json.loads(line) for line in (toy_dir / "stage2" / "test.jsonl").read_text().splitlines()
    ]
    records = []
    for row, score in zip(rows, (1.0, 0.0, None)):
        item = items.new_record("<set>", dict(row, question=HOSTILE))
        said = f"<think>{HOSTILE}</think><answer>{HOSTILE}</answer>"
        records.append(item | dict(completion=said, parsed=HOSTILE, score=score))
    records[1]["failure"] = HOSTILE
    roots = {"<set>": toy_dir / "stage2"}
    write_items_page(tmp_path / "items.html", HOSTILE, records, roots, 10, RECIPE)
    return tmp_path / "items.html"


def test_page_is_well_formed_and_nothing_in_it_runs(toy_dir, tmp_path):
    text = write_page(toy_dir, tmp_path).read_text()
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    assert reader.tags.count("article") == 3 and reader.tags.count("audio") == 3
    assert reader.tags.count("img") >= 6
    assert "script" not in reader.tags and HOSTILE in reader.text
    assert not [a for a in reader.attributes if a[1].startswith("on")]
    links = {value.split(",")[0] for _, key, value in reader.attributes if key in ("src", "href")}
    assert links == {"data:image/jpeg;base64", "data:audio/ogg;base64"}  # nothing outside the file
    (policy,) = [v for tag, key, v in reader.attributes if tag == "meta" and key == "content"]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    shown = re.findall(r'<article class="(\w+)">', text)
    assert shown == ["failed", "right", "open"]  # the wrong ones first


def test_page_shows_what_the_evaluation_may_read(toy_dir, tmp_path):
    (row, *_) = [
        json.loads(line) for line in (toy_dir / "stage2" / "test.jsonl").read_text().splitlines()
    ]
    item = items.new_record("x", dict(row, use_audio=True, question="half: \ud83d"))
    shown = lambda root, recipe, **edit: items_page.media(item | edit, root, recipe)  # noqa: E731
    assert "<img" in shown(toy_dir / "stage2", RECIPE)
    outside = dict(video=str(toy_dir / "stage2" / row["video"]))
    assert "<img" not in shown(tmp_path, RECIPE, **outside)
    assert "<img" in shown(tmp_path, RECIPE._replace(allow_outside=True), **outside)
    assert "--max-audio-seconds" in shown(toy_dir / "stage2", RECIPE._replace(max_audio_seconds=1))
    assert "<img" not in shown(toy_dir / "stage2", RECIPE, images=[5])
    assert "not shown" in shown(None, RECIPE)
    write_items_page(tmp_path / "items.html", "x", [item], {}, 1, RECIPE)
    assert "half: ?" in (tmp_path / "items.html").read_text()


SHOWN = "[...document.querySelectorAll('article')].map(a => getComputedStyle(a).display)"


@needs_browser
def test_page_in_a_browser(toy_dir, tmp_path):
    path = write_page(toy_dir, tmp_path)
    seen = in_browser(
        path,
        "{scripts: document.scripts.length, title: document.title,"
        " pictures: [...document.images].map(i => i.complete && i.naturalWidth),"
        " seconds: [...document.querySelectorAll('audio')].map(a => a.duration),"
        f" shown: {SHOWN}}}",
    )
    assert seen["scripts"] == 0 and seen["title"] == HOSTILE  # a text like any other
    assert len(seen["pictures"]) >= 6 and all(width == 56 for width in seen["pictures"])
    assert len(seen["seconds"]) == 3 and all(2 <= s <= 6.1 for s in seen["seconds"])  # they play
    assert seen["shown"] == ["block"] * 3
    # the choice of items works without a script: failed, right, open
    for choice, shown in (("only-wrong", ["block", "none", "none"]), ("everything", ["block"] * 3)):
        click = f"(document.getElementById('{choice}').click(), {SHOWN})"
        assert in_browser(path, click) == shown


def test_sound_on_the_page_is_the_clips(tmp_path):
    """What the player plays: one second of the same tone, within what Opus loses."""
    import av

    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    (tmp_path / "x.ogg").write_bytes(encode_sound(tone, 24000))
    with av.open(str(tmp_path / "x.ogg")) as container:
        heard = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert abs(len(heard) / 48000 - 1) < 0.05
    assert np.abs(np.fft.rfft(heard)).argmax() * 48000 / len(heard) == pytest.approx(440, abs=3)


def test_recipe_is_kept(toy_dir):
    flags = ["--model", str(toy_dir / "model"), "--protocol", "paper", "--benchmark", "tomato"]
    args, _ = evaluation.parse_args([*flags, "--root", "x"])
    recipe = evaluation.recipe_of(
        args, toy_dir / "model", evaluation.open_protocol(args), "float32"
    )
    newest = max(path.stat().st_mtime for path in (toy_dir / "model").iterdir())
    assert recipe["weights"] == newest and recipe["seed"] is None  # greedy
    assert recipe["system"]["tomato"] == protocol.ASSISTANT
    typed, _ = evaluation.parse_args([*flags, "--root", "x", "--max-new-tokens", "7"])
    assert (
        evaluation.recipe_of(typed, "m", evaluation.open_protocol(typed), "float32")[
            "max_new_tokens"
        ]
        == 7
    )
    assert recipe["max_new_tokens"]["intentbench"] == 20 and recipe["commit"] == git_commit()
    assert (
        recipe["recipe"]["max_frames"] == 16
    )  # the toy's wins over the paper's, as it comes later
