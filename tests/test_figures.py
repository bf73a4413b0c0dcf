"""
Experiments: t intervals, tables and figures from results, what is kept of a true run, variants.

    python -m pytest tests/test_figures.py
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, launch

import buffer
import hints
import train_rl
import train_sft
from experiments import bfloat16_chain, commands, curves, rounding, runs, tables, tasks, variants
from run.errors import UserError
from training import metrics

# ---- numbers by hand


def test_accuracy_is_that_of_the_nearest_evaluation():
    curve = [[0, 0.2], [144, 0.5], [272, 0.6]]
    assert curves.accuracy_at(curve, 128) == 0.5
    assert curves.accuracy_at(curve, 60) == 0.2
    assert curves.accuracy_at(curve, 1000) == 0.6


def test_mean_curve_interpolates_and_stops_where_the_shortest_ends():
    mean = curves.mean_curve([[[0, 0.2], [50, 0.4], [100, 0.6]], [[0, 0.4], [80, 0.8]]])
    np.testing.assert_allclose(mean, [[0, 0.3], [50, (0.4 + 0.65) / 2], [80, (0.52 + 0.8) / 2]])


def test_area_is_the_mean_height():
    curve = [[0, 0.0], [100, 1.0], [200, 1.0]]
    assert curves.area(curve, 200) == pytest.approx(0.75)
    assert curves.area(curve, 50) == pytest.approx(0.25)


def test_t_quantiles_of_the_textbook():
    for df, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert curves.t_quantile(0.975, df) == pytest.approx(quantile, abs=1e-3)
    assert curves.t_quantile(0.8, 9) == pytest.approx(0.8834, abs=1e-4)
    assert curves.t_quantile(0.025, 4) == pytest.approx(-2.776, abs=1e-3)


def test_t_interval_by_hand():
    """1, 2, 3: mean 2, sd 1, half-width 4.303 / sqrt(3)"""
    mean, low, high = curves.t_interval([1, 2, 3])
    assert mean == 2
    assert high - mean == pytest.approx(4.303 / math.sqrt(3), abs=1e-3) == mean - low
    _, low, high = curves.t_interval([1.0])
    assert math.isnan(low) and math.isnan(high)


def test_t_interval_of_five_seeds_covers_95_percent():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        _, low, high = curves.t_interval(rng.normal(size=5))
        hits += low <= 0 <= high
    assert 0.935 <= hits / 2000 <= 0.965


def test_spread_of_one_command_by_hand():
    """Two groups with sd sqrt(2) and 0: pooled variance 1, df 2, two seeds each."""
    spread = curves.same_command_spread([[0, 2], [5, 5]])
    assert spread == pytest.approx(4.303, abs=1e-3)
    assert math.isnan(curves.same_command_spread([[1], [2]]))


def test_seeds_needed_grow_with_the_square_of_the_spread():
    differences = np.array([-1.0, 0.0, 1.0])  # sd 1
    assert curves.seeds_needed(differences, effect=1) == 10  # Cohen's d = 1: 10 pairs
    assert curves.seeds_needed(differences, effect=0.5) == 34  # d = .5: 34 pairs
    assert curves.seeds_needed(differences / 1000, effect=1) == 3


def test_differences_are_paired_by_seed():
    runs = {
        "a": [{"seed": 0, "x": 3}, {"seed": 1, "x": 5}, {"seed": 7, "x": 0}],
        "b": [{"seed": 1, "x": 1}, {"seed": 0, "x": 2}],
    }
    assert curves.paired(runs, "a", "b", lambda one: one["x"]) == [1, 4]


def test_small_advantages_count_the_zeros():
    """A fifth is exactly 0; of the rest a tenth lies in +-.1 and three tenths in +-.3."""
    bins = [0] * 60
    bins[29], bins[30] = 1, 0
    bins[27], bins[32] = 1, 1
    bins[0], bins[59] = 3, 4
    runs = [{"series": {"advantage_zero_frac": [0.1, 0.3]}, "advantage_hist": bins}]
    assert curves.small_advantages(runs, 0) == pytest.approx(0.2)
    assert curves.small_advantages(runs, 0.1) == pytest.approx(0.2 + 0.8 * 0.1)
    assert curves.small_advantages(runs, 0.3) == pytest.approx(0.2 + 0.8 * 0.3)


def test_gain_by_length_is_binned_by_the_run_without_tas():
    runs = [
        dict(label="uniform", seed=0, items=[[10, 0], [20, 1], [30, 0]]),
        dict(label="parabolic", seed=0, items=[[90, 1], [20, 1], [10, 0]]),
    ]
    result = dict(commands=dict(uniform="", parabolic=""), runs=runs)
    rows = curves.length_gains(result, [0, 20])
    assert [row[:3] for row in rows] == [("1–20", 2, 0.5), ("over 20", 1, 0.0)]


def test_visits_of_every_prompt_that_got_a_hint():
    """a: enters at visit 2 and leaves, b keeps its hint, c gets none; without hints all are .25."""
    right = [0, 0, 0.5, 0.25, 1, 1, 0, 1]
    visits = [[k, "a", k == 2, right[k]] for k in range(8)]
    visits += [[1, "b", True, 1.0], [0, "c", False, 1.0]]
    events = [[2, "entered", "a"], [4, "withdrawn", "a"], [1, "entered", "b"]]
    hinted = dict(visits=visits, hint_events=events)
    phases = [(phase, right) for phase, _, _, right in curves.hint_visits(hinted)]
    assert phases[:3] == [("before it enters", 0), ("before it enters", 0), ("with it", 0.5)]
    assert [phase for phase, _ in phases[3:8]] == ["plain, after it entered"] * 5
    assert phases[8:] == [("with it", 1.0)]  # b's hint stayed, and c is not counted

    plain = dict(visits=[[k, q, False, 0.25] for q in "abc" for k in range(8)], hint_events=[])
    labels = {"no hints": plain, "hints by need": hinted}
    runs = [dict(v, label=k, seed=seed) for k, v in labels.items() for seed in (0, 1)]
    rows = tables.visit_numbers(dict(commands=dict.fromkeys(labels, ""), runs=runs))
    with_it = rows[1]
    assert (with_it["visits"], with_it["solved"], with_it["without_hints"]) == (4, 0.75, 0.25)
    assert with_it["difference"] == with_it["low"] == with_it["high"] == 0.5  # both seeds agree


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
        seconds=60.0,
        commit="abc",
    )


def test_everything_is_redrawn_from_the_json(tmp_path):
    runs = []
    for seed in (0, 1):
        runs.append(a_run("GRPO", seed, 800, 0.6 - seed / 50))
        runs.append(a_run("AVATAR", seed, 800, 0.7 - seed / 50))
    commands = dict(GRPO="train_rl.py --steps 8", AVATAR="train_rl.py --steps 4")
    result = dict(commands=commands, commit="abc", runs=runs)
    for name in ("dense", "tune-dense"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    names = {"GRPO": "uniform", "AVATAR": "parabolic"}
    items = [[100, 0], [140, 1]]
    result["commands"] = {names[label]: command for label, command in commands.items()}
    result["runs"] = [one | dict(label=names[one["label"]], items=items) for one in runs]
    (tmp_path / "plan.json").write_text(json.dumps(result))

    printed = launch("experiments/figures.py", "--results", tmp_path)
    for name in ("tas.png", "dense.png", "dense-advantages.png", "plan.png", "plan-lengths.png"):
        assert (tmp_path / name).stat().st_size > 5000
    assert not (tmp_path / "middle.png").exists()
    assert re.search("not run: .*middle", printed)

    numbers = json.loads((tmp_path / "tables.json").read_text())
    dense = numbers["dense"]
    avatar = dense["labels"]["AVATAR"]
    assert avatar["optimizer_steps"] == 4 and avatar["seeds"] == [0, 1]
    assert avatar["end"] == pytest.approx(0.69) and avatar["half"] == pytest.approx(0.445)
    end = dense["differences"][0]
    assert (end["label"], end["minus"], end["measure"]) == ("AVATAR", "GRPO", "end")
    assert end["difference"] == pytest.approx(0.1) == end["low"]  # in both seeds
    assert "no replay" in dense["not_run"]

    text = (tmp_path / "tables.md").read_text()
    assert "commit abc, seeds 0, 1" in text and "| no replay | not run |" in text
    assert "Not run: `python -m experiments.runs middle`" in text
    assert "| 1–130 | 2 | +0.000 |" in text  # by length
    assert "| AVATAR | 0.445 | 0.690 |" in text  # what was tried: the area and the end


def test_the_same_command_at_two_commits_is_an_aa_pair():
    one = dict(label="x", seed=0, accuracy=[[0, 0.2], [8, 0.5]])
    other = dict(label="y", seed=0, accuracy=[[0, 0.2], [8, 0.6]])
    results = {
        "hints": dict(commands={"x": "python train_rl.py --lr 1"}, runs=[one]),
        "withdrawn": dict(
            commands={"y": "python -m experiments.variants visits --lr 1"}, runs=[other]
        ),
    }
    ((first, second, _, seed, gap),) = tables.repeated_runs(results)
    assert (first, second, seed) == ("hints", "withdrawn", 0)
    assert gap == pytest.approx(0.1)


def test_committed_tables_by_other_code():
    """Means, differences and intervals of tables.json from the results, in plain loops, with the textbook's t."""
    t_of = {
        5: 2.776,
        4: 3.182,
        3: 4.303,
        2: 12.706,
        6: 2.571,
        7: 2.447,
        8: 2.365,
        9: 2.306,
        10: 2.262,
    }
    folder = ROOT / "experiments/results"
    numbers = json.loads((folder / "tables.json").read_text())
    num_checked = 0
    for name in commands.EXPERIMENTS:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        runs_of_name = json.loads(path.read_text())["runs"]
        ends = {(one["label"], one["seed"]): one["accuracy"][-1][1] for one in runs_of_name}
        ends |= {("its start", one["seed"]): one["accuracy"][0][1] for one in runs_of_name}
        for row in numbers[name]["differences"]:
            if row["measure"] != "end":
                continue
            gaps = []
            for (label, seed), end in ends.items():
                if label == row["label"] and (row["minus"], seed) in ends:
                    gaps.append(end - ends[row["minus"], seed])
            mean = sum(gaps) / len(gaps)
            assert row["seeds"] == len(gaps) and row["difference"] == pytest.approx(mean), row
            if len(gaps) == 1:
                assert row["low"] is None
                continue
            variance = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
            half = t_of[len(gaps)] * math.sqrt(variance / len(gaps))
            assert row["high"] - mean == pytest.approx(half, rel=1e-3), row
            assert mean - row["low"] == pytest.approx(half, rel=1e-3), row
            num_checked += 1
    assert num_checked >= 60


def test_committed_results_are_those_of_the_commands():
    """Each command that a table lists is the one that runs.py would run for that label today."""
    folder = ROOT / "experiments/results"
    results = tables.read_results(folder)
    assert len(results) >= 18
    for name, result in results.items():
        today = {k: commands.shell_command(f) for k, f in commands.EXPERIMENTS[name].items()}
        for label, command in result["commands"].items():
            assert today[label] == command, (name, label)


def test_the_control_has_the_settings_of_avatar():
    """4 fresh completions and nothing else of the method; prompts, updates, rate and steps are AVATAR's."""
    same = ["prompts_per_step", "lr", "updates_per_rollout", "steps", "num_on", "eval_every"]
    for name in ("control", "dense", "sparse", "long", "longer"):
        flags = commands.EXPERIMENTS[name]
        for suffix in ("", ", 4 updates"):
            if "no replay" + suffix not in flags:
                continue
            control, _, _ = train_rl.parse_args(flags["no replay" + suffix].split())
            avatar, _, _ = train_rl.parse_args(flags["AVATAR" + suffix].split())
            assert (control.num_off, control.tas_shape, control.hints) == (0, "uniform", False)
            for flag in same:
                assert getattr(control, flag) == getattr(avatar, flag), (name, flag)


def test_what_is_kept_of_a_true_run(toy_dir, tmp_path, monkeypatch):
    rows = toy_dir / "stage2"
    flags = f"visits --stage 2 --model {toy_dir}/model --data {rows}/train.jsonl --judge toy"
    flags += f" --eval-data {rows}/test.jsonl --eval-samples 8 --eval-every 1 --save-every 0"
    flags += " --max-new-tokens 16 --prompts-per-step 2 --steps 2"
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    scripts = []

    def python(*words, log):
        scripts.append(words[0])
        tasks.python(*words, log=log)

    monkeypatch.setattr(runs, "python", python)
    monkeypatch.setitem(runs.EXPERIMENTS, "dense", {"one": flags, "same": flags})
    path = tmp_path / "dense.json"
    runs.experiment("dense", [0], path, jobs=2)
    result = json.loads(path.read_text())
    assert scripts == ["-m"]  # one command is run once

    one, same = result["runs"]
    assert one["accuracy"] == same["accuracy"]
    assert [n for n, _ in one["accuracy"]] == [0, 16, 24]
    assert len(one["series"]["reward"]) == 2
    assert [step for step, *_ in one["visits"]] == [1, 1, 2, 2] and one["hint_events"] == []
    assert [acc for _, acc in one["clock"]] == [acc for _, acc in one["accuracy"]]
    assert one["clock"][0][0] == 0 < one["clock"][1][0] < one["clock"][2][0]
    zeros = sum(z * n for z, n in zip(one["series"]["advantage_zero_frac"], (16, 16)))
    assert sum(one["advantage_hist"]) == pytest.approx(32 - zeros)

    # the results are read back: nothing is run again, even without the folders of the runs
    monkeypatch.setattr(runs, "RUNS", tmp_path / "elsewhere")
    runs.experiment("dense", [0], path)
    assert json.loads(path.read_text()) == result and len(scripts) == 1
    # a label whose flags have changed is an error, as its results are of other flags
    monkeypatch.setitem(runs.EXPERIMENTS, "dense", {"one": f"{flags} --lr 1e-3"})
    with pytest.raises(UserError, match="one"):
        runs.experiment("dense", [0], path)


def test_a_quick_run_is_short_and_otherwise_the_same():
    flags = runs.quick_flags("--lr 1 --steps 60 --eval-every 4")
    assert flags == "--lr 1 --steps 12 --eval-every 4"


def test_every_experiment_parses():
    for experiment in commands.EXPERIMENTS.values():
        for flags in experiment.values():
            words = flags.split()
            if not words[0].startswith("--"):
                assert words.pop(0) in variants.VARIANTS
            train_rl.parse_args(words)


def test_every_experiment_has_a_title_and_differences():
    for name, flags in commands.EXPERIMENTS.items():
        assert name in tables.TITLES
        if not name.startswith("tune") and name != "withdrawn":
            assert tables.pairs_of(name, flags), name


# ---- what no flag offers


def an_entry(prompt_id, reward, step, hinted=False):
    parts = {"acc": float(reward == 1)}
    ids, logprobs = torch.tensor([1]), torch.zeros(1)
    return buffer.Entry(prompt_id, ids, logprobs, reward, parts, step, hinted)


def test_visits_are_noted_and_the_buffer_is_the_same(tmp_path, monkeypatch):
    entries = [an_entry("a", 1.0, 3, True), an_entry("a", 0.5, 3, True), an_entry("b", 0.0, 3)]
    monkeypatch.setattr("sys.argv", ["train_rl.py", "--out", str(tmp_path)])
    noting, plain = variants.NotingBuffer(100, 20), buffer.ReplayBuffer(100, 20)
    for each in (noting, plain):
        each.add(entries)
    assert noting.stats(4) == plain.stats(4)
    lines = tasks.read_lines(tmp_path / "visits.jsonl")
    assert [[*line.values()] for line in lines] == [[3, "a", True, 0.5], [3, "b", False, 0.0]]


def test_variants_of_the_schedule_by_their_stories():
    """Visits: Hard and unsolved twice, then solved while still Hard, then out of Hard."""
    story = [("hard", False), ("hard", False), ("hard", True), ("medium", True)]

    def events(kind):
        schedule = kind(patience=2, kl_threshold=1.0)
        return [schedule.observe("q", tier, solved, 0.0) for tier, solved in story]

    assert events(hints.HintSchedule) == [None, "entered", "withdrawn", None]
    assert events(variants.NeverWithdrawn) == [None, "entered", None, None]
    assert events(variants.ByRank) == [None, "entered", None, "withdrawn"]
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


def test_a_judge_of_form_likes_false_steps():
    row = dict(prompt_id="q", events=["red"])
    assert variants.form_judge(row, ["1: red", "1: blue", "so red", "it seems: red", "9"]) == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
    ]


def test_what_is_replayed_in_other_ways():
    items = [
        buffer.StoredEntry(i, i, an_entry("q", reward, i))
        for i, reward in enumerate([1, 0.2, 1, 0, 0])
    ]
    newest = variants.newest(items, 0.5, 3)
    assert [entry.reward for entry in newest] == [0, 0, 1]
    best = variants.best(items, 0.5, 3)
    assert [entry.reward for entry in best] == [1, 1, 0.2]
    assert best[0].born_step == 2  # the newer of equals
    assert variants.learnability(items, 0.5) == pytest.approx(0.4 * 0.6)
    assert variants.learnability(items[3:], 0.5) == 0


@pytest.mark.parametrize("kind, share", [("plan", 0.5), ("middle", 0.3), ("busy", 0.5)])
def test_a_long_reasoning_is_decided_where_it_says(kind, share):
    """Of 200 rows: the lines follow from the clip, and the answer from the line that decides."""
    rng = np.random.default_rng(0)
    lengths, num_right = set(), 0
    for i in range(200):
        row, seconds = tasks.long_row(rng, kind, str(i), share)
        without, _ = tasks.long_row(np.random.default_rng(i), kind, str(i), 0)
        assert "reasoning" not in without
        lengths.add(len(seconds))
        first, *lines, last = row["reasoning"].split("\n")
        begin = len(seconds) // 2 if kind == "middle" else 0
        decides = lines.pop(begin) if kind == "middle" else first
        counted = decides.split()[-1]
        count, others = 0, 0
        assert len(lines) == len(seconds)
        for k, ((shapes, _), line) in enumerate(zip(seconds, lines)):
            for _, color, _ in shapes:
                count += k >= begin and color == counted
                others += color != counted
            end = f"{counted} {count}" if k >= begin else "count later"
            if kind == "busy":
                end += f", others {others}"
            assert line.endswith(end)
        assert last == f"so {row['answer']}"
        assert kind != "middle" or row["answer"] == str(count)  # the end follows
        num_right += counted in row["question"].split()
    assert lengths == {12, 13, 14, 15, 16}
    assert abs(num_right / 200 - share) < 0.1


def test_a_missing_folder_is_an_error(tmp_path):
    printed = launch("experiments/figures.py", "--results", tmp_path / "none", code=1)
    assert str(tmp_path / "none") in printed and "Traceback" not in printed


# ---- the chain in bfloat16 -----------------------------------------------------------------------


def one_chain(label, seed, before, after):
    return dict(label=label, seed=seed, before={"all": before}, accuracy={"all": after})


def test_what_a_chain_keeps_is_taken_over_the_seeds_that_both_have():
    chains = [
        one_chain("float32", 0, 0.2, 0.6),
        one_chain("bfloat16", 0, 0.2, 0.5),
        one_chain("float32", 1, 0.2, 0.4),
        one_chain("bfloat16", 1, 0.2, 0.4),
        one_chain("float32", 2, 0.2, 0.9),
    ]
    assert bfloat16_chain.kept({"runs": chains}, "bfloat16") == pytest.approx(0.5 / 0.6)
    assert bfloat16_chain.kept({"runs": chains}, "float32") == pytest.approx(1)


def test_commands_of_the_chain_are_those_of_the_trainers():
    args = bfloat16_chain.parse_args([])
    for stage, script in enumerate([train_sft, train_rl, train_rl, train_rl]):
        name, *words = bfloat16_chain.train_words(args, stage)
        assert name == f"{script.__name__}.py"
        parsed = script.parse_args([*words, "--dtype", "bfloat16"])[0]
        assert parsed.lora_rank == args.rank and parsed.lr == float(args.lr)
        assert stage == 0 or parsed.stage == stage


def test_a_finished_chain_is_not_run_again(tmp_path):
    for stage in bfloat16_chain.STAGES:
        (tmp_path / f"stage{stage}" / "final").mkdir(parents=True)
    scores = {"all": {"score": 0.5}, "toy/stage1/test.jsonl": {"score": 0.7}}
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "scores.json").write_text(json.dumps({"scores": scores}))
    args = bfloat16_chain.parse_args([])
    accuracy = bfloat16_chain.run_chain(args, "float32", 0, tmp_path, tmp_path, processes=1)
    assert accuracy == {"all": 0.5, "stage1": 0.7}
    assert not (tmp_path / "log.txt").exists()


# ---- rounding ------------------------------------------------------------------------------------


def test_what_rounding_loses():
    torch.manual_seed(0)
    near_one = torch.ones(1000)
    assert rounding.share_after_cast(near_one, lr=1e-6, steps=100) == 0  # a step of bfloat16: .004
    assert rounding.share_after_cast(near_one, lr=1e-3, steps=100) == pytest.approx(1, abs=0.05)
    value, grad = rounding.kl_error(1e-2)
    assert 0 < value < 0.01 and 0 < grad < 1e-4
    assert rounding.kl_error(1e-4)[0] > 10 * value
    assert rounding.merge_error(torch.float32) == pytest.approx(1, abs=0.01)
    assert rounding.merge_error(torch.bfloat16) > 1.1
