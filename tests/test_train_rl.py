"""
The loop: arguments, rewards of a completion, and whole runs on real clips.

    python -m pytest tests/test_train_rl.py
"""

import json
import math

import numpy as np
import pytest
import torch
from conftest import launch

import tas
import toy
import train_rl
from data import toy_clips, toy_rows
from models.rollout import Completion
from models.toy_model import write_model
from run.errors import UserError

# ---- arguments


def test_stage_defaults_and_precedence():
    args, source, weights = train_rl.parse_args(["--stage", "2"])
    assert (
        weights == {"format": 0.2, "acc": 0.4, "self": 0.4}
        and source["reward_weights"] == "stage 2"
    )
    assert args.num_on == 4 and args.num_off == 4 and args.off_policy_coef == 0.6
    args, _, _ = train_rl.parse_args(["--stage", "2", "--algo", "grpo", "--model", "some/7B"])
    assert (args.num_on, args.num_off, args.tas_shape, args.hints) == (8, 0, "uniform", False)
    assert args.buffer_size == 10000 and args.lora_rank == 16  # the paper's, not the toy's
    assert args.lr == 1e-5
    args, _, _ = train_rl.parse_args(["--model", "some/7B", "--lora-rank", "0"])
    assert args.lr == 5e-7  # the authors', for full weights
    args, source, _ = train_rl.parse_args(["--algo", "avatar-gspo"])
    assert (args.clip_eps, source["clip_eps"], args.num_off) == (0.005, "avatar-gspo", 4)
    args, _, _ = train_rl.parse_args(
        ["--algo", "grpo", "--num-on", "6", "--lr", "0.1", "--buffer-size", "7"]
    )
    assert (args.num_on, args.lr, args.buffer_size) == (6, 0.1, 7)  # a typed flag wins


def test_the_shapes_of_the_flag_are_those_of_tas():
    assert train_rl.TAS_SHAPES == tas.SHAPES  # written twice: the flags are parsed before torch


def test_renamed_flags_keep_their_old_spelling():
    args, _, _ = train_rl.parse_args(["--max-ratio", "3", "--hint-kl", "0.5"])
    assert (args.max_seq_ratio, args.hint_kl_threshold) == (3.0, 0.5)
    args, _, _ = train_rl.parse_args([])
    assert (args.max_seq_ratio, args.hint_kl_threshold) == (10.0, 0.02)


def test_unknown_flag_is_an_error(capsys):
    with pytest.raises(SystemExit):
        train_rl.parse_args(["--stag", "2"])
    with pytest.raises(SystemExit):
        train_rl.parse_args(["--lrr", "2"])


# ---- whole runs

METRICS = (
    "step completions_generated reward rewards/acc frac_reward_zero_std advantage_std kl clip_frac off/ratio_max "
    "off/ess_frac logprob_gap grad_norm buffer/size hints/frac tokens_per_s time/rollout_s time/update_s time/data_s"
).split()


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def rl_flags(toy_dir, stage, out, *more):
    rows = toy_dir / f"stage{stage}"
    return (
        "train_rl.py",
        "--stage",
        stage,
        "--model",
        toy_dir / "model",
        "--data",
        rows / "train.jsonl",
        "--judge",
        "toy",
        "--eval-data",
        rows / "test.jsonl",
        "--eval-samples",
        8,
        "--out",
        out,
        "--steps",
        3,
        "--max-new-tokens",
        24,
        "--prompts-per-step",
        4,
        *more,
    )


@pytest.mark.parametrize("stage, algo", [(1, "avatar"), (2, "avatar"), (3, "avatar"), (2, "grpo")])
def test_a_run_of_every_stage(toy_dir, tmp_path, stage, algo):
    out = tmp_path / "run"
    launch(*rl_flags(toy_dir, stage, out, "--algo", algo, "--eval-every", 2))
    metrics = read_metrics(out)
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert all(name in m and math.isfinite(m[name]) for name in METRICS)
        assert m["logprob_gap"] < 1e-4
        assert 0 < m["off/ess_frac"] <= 1.0001 and 0 <= m["frac_reward_zero_std"] <= 1
    # nothing to replay at step 1: eight fresh; then what is stored decides
    assert metrics[0]["completions_generated"] == 32
    if algo == "grpo":
        assert [m["completions_generated"] for m in metrics] == [32, 64, 96] and metrics[-1][
            "buffer/size"
        ] == 0
    else:
        assert metrics[1]["completions_generated"] == 48 and metrics[1]["buffer/size"] == 48
    assert "eval/acc" in metrics[1] and "eval/acc" in metrics[2]
    about = json.loads((out / "run.json").read_text())
    assert about["arguments"]["stage"] == stage and "torch" in about["versions"]
    assert (out / "samples.jsonl").exists() and (out / "final" / "model.safetensors").exists()


def test_fewer_rows_than_prompts_and_held_out_rows_that_are_trained_on(toy_dir, tmp_path):
    """Both are said before the first step. A prompt that stands twice in a step is two groups."""
    lines = (toy_dir / "stage2" / "train.jsonl").read_text().splitlines(keepends=True)
    few = toy_dir / "stage2" / "few.jsonl"
    few.write_text("".join(lines[:2]))
    flags = ("--data", few, "--eval-data", few, "--steps", 1)
    printed = launch(*rl_flags(toy_dir, 2, tmp_path / "run", *flags))
    assert "only 2 rows for 4 prompts per step" in printed
    assert "2 of 2 held-out rows are also trained on" in printed
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and len({s["prompt_id"] for s in samples}) == 1
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["ratios"])
        np.testing.assert_allclose(sample["ratios"], 1, atol=1e-3)
    printed = launch(*rl_flags(toy_dir, 2, tmp_path / "more", "--steps", 1))
    assert "only" not in printed and "trained on" not in printed


def test_a_reward_that_is_no_number_is_one_line(toy_dir):
    """A part of one's own may give NaN for what it cannot read."""
    row = dict(prompt_id="q", answer="yes", answer_type="yesno")
    completion = Completion(torch.tensor([1, 2]), torch.zeros(2), False)
    how = dict(step=3, hinted=set(), reward_weights=dict(format=math.nan), judge=None)
    with pytest.raises(UserError, match="step 3, row q: reward nan of .*: every part must be"):
        train_rl.reward_and_gather([row], [[completion]], [["yes"]], **how)


def test_a_hint_that_tells_the_answer_is_refused(toy_dir, tmp_path):
    rows = [
        json.loads(line) for line in (toy_dir / "stage2" / "train.jsonl").read_text().splitlines()
    ]
    rows[0]["hint"] = f"the answer is {rows[0]['answer']}"
    leaky = toy_dir / "stage2" / "leaky.jsonl"
    leaky.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--data",
        leaky,
        "--steps",
        4,
        "--hint-patience",
        1,
        "--hint-kl",
        10,
        "--eval-every",
        0,
    )
    printed = launch(*rl_flags(toy_dir, 2, tmp_path / "run", "--prompts-per-step", 16, *flags))
    assert printed.count(f"hint refused: {rows[0]['prompt_id']}") == 1
    assert "hint refused" not in printed.replace(f"hint refused: {rows[0]['prompt_id']}", "")


def test_micro_batches_and_waves_do_not_change_a_step(toy_dir, tmp_path):
    """A group is even read in parts when it is larger than --micro-tokens."""
    less_memory = ("--micro-tokens", 300, "--rollout-prompts", 1)
    for name, flags in (("whole", ()), ("parts", less_memory)):
        launch(*rl_flags(toy_dir, 2, tmp_path / name, "--eval-every", 0, *flags))
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for name in ("loss", "grad_norm", "kl", "off/ess_frac", "off/ratio_max", "clip_frac"):
        a, b = ([m[name] for m in metrics] for metrics in (whole, parts))
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-5)


def test_a_second_update_learns_more_from_the_same_completions(toy_dir, tmp_path):
    """[U19] The first update is what it was; no completion more is made; the policy moves further."""
    runs = {"one": ("--updates-per-rollout", 1), "two": ("--updates-per-rollout", 2)}
    for name, flags in runs.items():
        launch(*rl_flags(toy_dir, 2, tmp_path / name, "--eval-every", 0, *flags))
    one, two = (read_metrics(tmp_path / name) for name in runs)
    # the first step stores nothing yet, so that all that ours change is the second update
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-5)
    made = [[m["completions_generated"] for m in metrics] for metrics in (one, two)]
    assert made[0] == made[1]
    assert one[1]["logprob_gap"] < 1e-4 and two[1]["logprob_gap"] < 1e-4  # r = 1 on fresh ones
    assert two[1]["kl"] > one[1]["kl"] > 0  # one gradient step from the reference, and two


def test_one_ratio_a_completion(toy_dir, tmp_path):
    """[U22] Fresh completions of a first update have ratio 1 either way; replayed ones tell the two apart."""
    for algo in ("avatar", "avatar-gspo"):
        launch(
            *rl_flags(toy_dir, 2, tmp_path / algo, "--eval-every", 0, "--lr", 1e-3, "--algo", algo)
        )
    token, sequence = (read_metrics(tmp_path / algo) for algo in ("avatar", "avatar-gspo"))
    same = ("loss", "grad_norm", "kl")
    first = [[run[0][name] for name in same] for run in (token, sequence)]
    assert first[0] == pytest.approx(first[1], rel=1e-4, abs=1e-6)
    token, sequence = token[1], sequence[1]  # of the same policy, by the same completions
    for name in ("kl", "off/ratio_mean", "reward"):
        assert token[name] == pytest.approx(sequence[name], rel=1e-3), name
    assert (
        token["off/ratio_max"] > sequence["off/ratio_max"]
        and token["off/ess_frac"] < sequence["off/ess_frac"]
    )
    assert token["grad_norm"] != pytest.approx(sequence["grad_norm"], rel=1e-3)


def test_a_hint_unlocks_a_prompt_that_was_never_solved(tmp_path):
    """On the shipped model: all plain completions wrong, then one with the hint is right [HINT]."""
    folder = tmp_path / "rows"
    (folder / "clips").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    while (
        len(rows) < 32
    ):  # long clips, one question: nearly hopeless without looking at every second
        row, seconds = toy_rows.make_row(rng, 2, f"{len(rows):05d}", "hard")
        if len(seconds) == 6 and row["answer_type"] == "choice":
            toy_clips.write_clip(folder / row["video"], seconds, rng)
            rows.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))
    write_model(tmp_path / "model", toy.WEIGHTS)
    flags = (
        "--stage 2 --steps 6 --prompts-per-step 16 --hint-patience 1 --hint-kl 10 --save-every 6"
    )
    flags += " --eval-every 0 --judge toy --buffer-size 10000"
    paths = (
        "--model",
        tmp_path / "model",
        "--data",
        folder / "rows.jsonl",
        "--out",
        tmp_path / "x",
    )
    launch("train_rl.py", *flags.split(), *paths)
    state = torch.load(tmp_path / "x/checkpoints/step-000006/state.pt", weights_only=True)
    entries = state["buffer"]["entries"]
    columns = (entries[k] for k in ("prompt_id", "born_step", "hinted", "reward_parts"))
    first, plain, with_hint = {}, {}, {}
    for q, step, hinted, parts in zip(*columns):
        if hinted:
            first.setdefault(q, step)
            with_hint.setdefault(q, []).append(parts["acc"])
        elif q not in first:
            plain.setdefault(q, []).append(parts["acc"])
    hopeless = [q for q in first if max(plain[q]) == 0]
    assert hopeless and any(max(with_hint[q]) == 1 for q in hopeless)
