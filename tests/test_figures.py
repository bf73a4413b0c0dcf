"""
The figures: completions to a target, the bootstrap, tables, and pictures of true runs.

    python -m pytest tests/test_figures.py
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import launch

import buffer
import hints
import train_rl
from experiments import curves, figures, runs, tasks, variants
from rl import metrics

# ---- numbers by hand


def test_completions_to_a_target():
    curve = [[0, 0.2], [100, 0.4], [200, 0.3], [300, 0.7]]
    assert curves.completions_to(curve, 0.3) == pytest.approx(50)  # halfway in the first 100
    assert curves.completions_to(curve, 0.4) == 100
    assert curves.completions_to(curve, 0.5) == pytest.approx(250)  # the dip at 200 is not it
    assert curves.completions_to(curve, 0.1) == 0
    assert math.isinf(curves.completions_to(curve, 0.8))


def test_mean_curve_interpolates_and_stops_where_the_shortest_ends():
    mean = curves.mean_curve([[[0, 0.2], [50, 0.4], [100, 0.6]], [[0, 0.4], [80, 0.8]]])
    np.testing.assert_allclose(mean, [[0, 0.3], [50, (0.4 + 0.65) / 2], [80, (0.52 + 0.8) / 2]])


def test_targets_are_on_the_way_from_the_start_to_the_better_method():
    slow, fast = [[[0, 0.2], [64, 0.4]]], [[[0, 0.2], [32, 0.6]]]
    start, best, targets = curves.targets_of(slow, fast)
    assert (start, best) == (0.2, 0.6)
    np.testing.assert_allclose(targets, [0.3, 0.4, 0.5])


def test_area_is_the_mean_height():
    curve = [[0, 0.0], [100, 1.0], [200, 1.0]]
    assert curves.area(curve, 200) == pytest.approx(0.75)
    assert curves.area(curve, 50) == pytest.approx(0.25)


def test_ratio_and_its_interval():
    line = lambda end: [[0, 0.0], [end, 1.0], [400, 1.0]]
    # each method's two seeds agree: whatever is drawn, 400 x .5 against 100 x .5
    slow, fast = [line(400), line(400)], [line(100), line(100)]
    assert curves.ratio_at(slow, fast, 0.5) == (4, 4, 4)
    # seeds that differ: the first twice gives 200 / 100, the second twice 200 / 25, and both
    # 200 / 40, as their mean is .5 at 40 = (40 / 200 + 40 / 50) / 2
    slow, fast = [line(400), line(400)], [line(200), line(50)]
    np.testing.assert_allclose(curves.ratio_at(slow, fast, 0.5), (5, 2, 8))
    # one seed has no interval; a target only one method reaches
    ratio, low, high = curves.ratio_at([line(400)], [line(100)], 0.5)
    assert ratio == 4 and math.isnan(low) and math.isnan(high)
    flat = [[0, 0.0], [400, 0.1]]
    assert math.isinf(curves.ratio_at([flat], [line(100)], 0.5)[0])
    # of two seeds of slow one never gets there: alone it makes the ratio infinite
    ratio, low, high = curves.ratio_at([line(400), flat], [line(100), line(100)], 0.5)
    assert ratio == pytest.approx(400 / 1.1 / 50) and low == 4 and math.isinf(high)
    assert curves.ratio_at([line(100)], [flat], 0.5)[0] == 0


def test_percentiles_by_hand():
    values = [*range(39), math.inf]  # 40 values: places .975 and 38.025 of 0 .. 39
    assert curves.percentile_interval(values) == (0, math.inf)
    assert curves.percentile_interval(range(101)) == (2, 98)  # 2.5 and 97.5, outwards


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    """Of 200 samples of 20 normal numbers, the interval of the mean holds 0 in 95 % less a few."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        x = rng.normal(size=20)
        low, high = curves.bootstrap(20, lambda pick: x[pick].mean())
        hits += low <= 0 <= high
    assert 0.86 <= hits / 200 <= 0.99


def test_gain_by_length_is_binned_by_the_run_without_tas():
    items = lambda *pairs: [list(pair) for pair in pairs]
    runs = [
        dict(label="uniform", seed=0, items=items((10, 0), (20, 1), (30, 0))),
        dict(label="parabolic", seed=0, items=items((90, 1), (20, 1), (10, 0))),
    ]
    result = dict(commands=dict(uniform="", parabolic=""), runs=runs)
    rows = curves.length_gains(result, [0, 20])
    assert [row[:3] for row in rows] == [("1–20", 2, 0.5), ("over 20", 1, 0.0)]


def test_what_becomes_of_a_prompt_whose_hint_left():
    """a: enters at visit 2, leaves at visit 4, is back at visit 7; b keeps its hint; without hints all are .25."""
    visits = [[k, "a", k == 2, right] for k, right in enumerate([0, 0, 0.5, 0.25, 1, 1, 0, 1])]
    events = [[2, "entered", "a"], [4, "withdrawn", "a"], [7, "entered", "a"], [1, "entered", "b"]]
    one = dict(visits=[*visits, [1, "b", True, 1.0]], hint_events=events)
    told = [(phase, right) for phase, _, _, right in curves.hint_phases(one)]
    assert told == [(0, 0), (0, 0), (1, 0.5), (2, 0.25), (3, 1), (4, 1), (5, 0)]
    plain = dict(visits=[[k, q, False, 0.25] for q in "ab" for k in range(8)], hint_events=[])
    labels = {"no hints": plain, "hints by need": one}
    runs = [dict(v, label=k, seed=seed) for k, v in labels.items() for seed in (0, 1)]
    lines = list(figures.withdrawn_table(dict(commands=dict.fromkeys(labels, ""), runs=runs)))
    assert "| with it | 2 | 0.500 | 0.250 | +0.250 | +0.250 – +0.250 |" in lines
    assert "| plain, before it enters | 4 | 0.000 | 0.250 | -0.250 | -0.250 – -0.250 |" in lines


def test_histogram_of_advantages():
    bins = metrics.histogram(torch.tensor([0.0, 0.0, -9.0, 0.05, 0.05, 2.99, 9.0]))
    assert len(bins) == 60 and sum(bins) == 5
    assert bins[0] == 1 and bins[30] == 2 and bins[59] == 2  # zeros are in no bin


# ---- pictures


def a_run(label, seed, end, accuracy):
    series = dict.fromkeys(runs.SERIES, [0.5, 0.5])
    curve = [[0, 0.2], [end / 2, (0.2 + accuracy) / 2], [end, accuracy]]
    clock = [[n / 8, acc] for n, acc in curve]
    return dict(
        label=label,
        seed=seed,
        accuracy=curve,
        clock=clock,
        series=series | dict(completions_generated=[end / 2, end]),
        advantage_hist=[1] * 60,
    )


def test_everything_is_redrawn_from_the_json(tmp_path):
    runs = [a_run("GRPO", s, 800, 0.6 - s / 50) for s in (0, 1)]
    runs += [a_run("AVATAR", s, 400, 0.6 - s / 50) for s in (0, 1)]
    result = dict(commands=dict(GRPO="g", AVATAR="a"), commit="abc", runs=runs)
    for name in ("dense", "tune-dense"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    result["commands"] = {"uniform": "", "parabolic": ""}
    names = {"GRPO": "uniform", "AVATAR": "parabolic"}
    items = [[100, 0], [140, 1]]
    result["runs"] = [a | dict(label=names[a["label"]], items=items) for a in runs]
    (tmp_path / "plan.json").write_text(json.dumps(result))
    printed = launch("experiments/figures.py", "--results", tmp_path)
    for name in ("tas.png", "dense.png", "dense-advantages.png", "plan.png", "plan-lengths.png"):
        assert (tmp_path / name).stat().st_size > 5000
    assert (
        not (tmp_path / "middle.png").exists()
        and "not run: ratio-dense, long, tune-long" in printed
    )
    text = (tmp_path / "tables.md").read_text()
    # every target takes GRPO twice as many completions, and seconds
    assert (
        len(re.findall(r"\| GRPO \| \d+ \| 2.0 \| 2.0 – 2.0 \| \d+ \| 2.0 \| 2.0 – 2.0 \|", text))
        == 3
    )
    assert (
        "Not run: `python -m experiments.runs middle`" in text and "commit abc, seeds 0, 1" in text
    )
    assert "| 1–130 | 2 | +0.000 |" in text
    assert (
        "| AVATAR | 0.395 | 0.590 |" in text
    )  # what was tried: the area from .2 to .6 and to .58, the end


def test_what_an_experiment_keeps_of_a_true_run(toy_dir, tmp_path, monkeypatch):
    rows = toy_dir / "stage2"
    flags = f"--stage 2 --model {toy_dir}/model --data {rows}/train.jsonl --judge toy"
    flags += f" --eval-data {rows}/test.jsonl --eval-samples 8 --eval-every 1 --save-every 0"
    flags += " --max-new-tokens 16 --prompts-per-step 2 --steps 2"
    flags = f"visits {flags}"
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    calls = []

    def python(*words, log):
        calls.append(words[0])
        tasks.python(*words, log=log)

    monkeypatch.setattr(runs, "python", python)
    monkeypatch.setitem(runs.EXPERIMENTS, "dense", {"one": flags, "same": flags})
    result = json.loads(json.dumps(runs.experiment("dense", [0], is_quick=False, jobs=2)))
    assert calls == ["-m"]  # one command is run once, and a finished run is not run again
    one = result["runs"][0]
    assert [n for n, _ in one["accuracy"]] == [0, 16, 24]
    assert len(one["series"]["reward"]) == 2
    assert [step for step, *_ in one["visits"]] == [1, 1, 2, 2] and one["hint_events"] == []
    assert [acc for _, acc in one["clock"]] == [acc for _, acc in one["accuracy"]]
    assert one["clock"][0][0] == 0 < one["clock"][1][0] < one["clock"][2][0]
    zeros = sum(z * n for z, n in zip(one["series"]["advantage_zero_frac"], (16, 16)))
    assert sum(one["advantage_hist"]) == pytest.approx(32 - zeros)


def test_a_quick_run_is_short_and_otherwise_the_same():
    assert runs.quick("--lr 1 --steps 60 --eval-every 4") == "--lr 1 --steps 12 --eval-every 4"


def test_every_experiment_parses():
    for commands in runs.EXPERIMENTS.values():
        for flags in commands.values():
            words = flags.split()
            if not words[0].startswith("--"):
                assert words.pop(0) in variants.VARIANTS
            train_rl.parse_args(words)


# ---- what no flag offers


def test_visits_are_noted_and_change_nothing(tmp_path, monkeypatch):
    entry = lambda q, acc, hinted: buffer.Entry(  # noqa: E731
        q, torch.tensor([1]), torch.zeros(1), acc, {"acc": acc}, 3, hinted
    )
    made = [[entry("a", 1.0, True), entry("a", 0.5, True)], [], [entry("b", 0.0, False)]]
    monkeypatch.setattr("sys.argv", ["train_rl.py", "--out", str(tmp_path)])
    assert variants.write_visits(3, [], "given", score=lambda *given: made) is made
    lines = [json.loads(line) for line in (tmp_path / "visits.jsonl").read_text().splitlines()]
    assert [[*line.values()] for line in lines] == [[3, "a", True, 0.5], [3, "b", False, 0.0]]


def test_variants_of_the_schedule_by_their_stories():
    """Visits: Hard and unsolved twice, then solved while still Hard, then out of Hard."""
    story = [("hard", False), ("hard", False), ("hard", True), ("medium", True)]

    def told(kind):
        schedule = kind(patience=2, kl_threshold=1.0)
        return [schedule.observe("q", tier, solved, 0.0) for tier, solved in story]

    assert told(hints.HintSchedule) == [None, "entered", "withdrawn", None]
    assert told(variants.NeverWithdrawn) == [None, "entered", None, None]
    assert told(variants.ByRank) == [None, "entered", None, "withdrawn"]
    solved = [("hard", True), ("hard", True)]
    schedule = variants.ByRank(patience=2, kl_threshold=1.0)
    assert [schedule.observe("q", *visit, 0.0) for visit in solved] == [None, "entered"]


def test_a_judge_that_is_wrong_in_a_fifth_of_the_steps():
    row = dict(prompt_id="q", events=["red"] * 500)
    steps = [f"{i + 1}: red" for i in range(500)]
    scores = variants.wrong_judge(row, steps)
    assert scores == variants.wrong_judge(row, steps)  # always the same ones
    assert set(scores) == {0.0, 1.0} and 0.75 < sum(scores) / 500 < 0.85
    assert sum(variants.wrong_judge(row, ["nonsense"] * 500)) == pytest.approx(100, abs=25)


def test_what_is_replayed_in_other_ways():
    entry = lambda reward, step: buffer.Entry(  # noqa: E731
        "q", torch.tensor([1]), torch.zeros(1), reward, {"acc": float(reward == 1)}, step, False
    )
    items = [buffer.Item(i, i, entry(reward, i)) for i, reward in enumerate([1, 0.2, 1, 0, 0])]
    rewards_of = lambda entries: [e.reward for e in entries]  # noqa: E731
    assert rewards_of(variants.newest(items, 0.5, 3)) == [0, 0, 1]
    found = variants.best(items, 0.5, 3)
    assert rewards_of(found) == [1, 1, pytest.approx(0.2)] and found[0].born_step == 2
    assert variants.learnability(items, 0.5) == pytest.approx(0.4 * 0.6)
    assert variants.learnability(items[3:], 0.5) == 0


@pytest.mark.parametrize("kind, share", [("plan", 0.5), ("middle", 0.3), ("busy", 0.5)])
def test_a_long_reasoning_is_decided_where_it_says(kind, share):
    """Of 200 rows: the lines follow from the clip, and the answer from the line that decides."""
    rng, lengths, right = np.random.default_rng(0), set(), 0
    for i in range(200):
        row, seconds = tasks.long_row(rng, kind, str(i), share)
        truth, _ = tasks.long_row(np.random.default_rng(i), kind, str(i), 0)
        assert "reasoning" not in truth
        lengths.add(len(seconds))
        first, *lines, last = row["reasoning"].split("\n")
        begin = len(seconds) // 2 if kind == "middle" else 0
        counted = (lines.pop(begin) if begin else first).split()[-1]
        count, others = 0, 0
        assert len(lines) == len(seconds)
        for k, ((shapes, _), line) in enumerate(zip(seconds, lines)):
            for _, color, _ in shapes:
                count += k >= begin and color == counted
                others += color != counted
            told = f"{counted} {count}" + f", others {others}" * (kind == "busy")
            assert line.endswith(told if k >= begin else "count later")
        assert last == f"so {row['answer']}"
        assert kind != "middle" or row["answer"] == str(count)  # the end follows
        right += counted in row["question"].split()
    assert lengths == {12, 13, 14, 15, 16}
    assert abs(right / 200 - share) < 0.1


def test_nothing_to_draw_is_said(tmp_path):
    printed = launch("experiments/figures.py", "--results", tmp_path / "none", code=1)
    assert "no folder" in printed and "Traceback" not in printed
