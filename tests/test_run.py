"""
Runs as people start them: stage 0, resuming, two processes, and mistakes.

    python -m pytest tests/test_run.py
"""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, launch
from peft import PeftModel
from safetensors.torch import load_file
from test_train_rl import read_metrics, rl_flags

from models.loading import load_policy
from models.paths import hub_is_online
from run import optim
from run.resume import resume_command
from run.run_dir import begin_run_dir


def sft_flags(toy_dir, out, *more):
    return (
        "train_sft.py",
        "--model",
        toy_dir / "model",
        "--data",
        toy_dir / "stage0" / "train.jsonl",
        "--out",
        out,
        "--batch-size",
        4,
        "--steps",
        4,
        "--save-every",
        2,
        *more,
    )


@pytest.fixture(scope="module")
def finished(toy_dir, tmp_path_factory):
    """A finished run of one step without a checkpoint, for tests that only read it -> its flags."""
    out = tmp_path_factory.mktemp("finished") / "x"
    flags = sft_flags(toy_dir, out, "--save-every", 0, "--steps", 1)
    launch(*flags)
    return flags, out


def same_weights(a, b):
    a, b = (
        load_file(a / "final" / "model.safetensors"),
        load_file(b / "final" / "model.safetensors"),
    )
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def without_times(metrics):
    return [
        {k: v for k, v in m.items() if not k.startswith("time/") and k != "tokens_per_s"}
        for m in metrics
    ]


def stopped_copy(source, target, step):
    """The folder as it was when the run had just saved `step` and gone on a little."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("final"))
    for checkpoint in (target / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:06d}":
            shutil.rmtree(checkpoint)
    (target / "checkpoints" / "step-000009.part").mkdir()  # cut off while saving


def stage_0_killed_and_resumed(tiny, tmp_path):
    """
    Five steps of SFT in one go, in tmp_path/straight, and the same stopped at step 3 and resumed.

    tiny   folder with a model of random weights and rows of stage 0
    """
    words = "--steps 5 --batch-size 4 --save-every 3 --keep 9".split()
    where = "--model", tiny / "random", "--data", tiny / "stage0" / "train.jsonl", "--out"
    launch("train_sft.py", *where, tmp_path / "straight", *words)
    losses = [m["loss"] for m in read_metrics(tmp_path / "straight")]
    assert losses[-1] < losses[0]
    stopped_copy(tmp_path / "straight", tmp_path / "resumed", 3)
    launch("train_sft.py", *where, tmp_path / "resumed", *words, "--resume")
    assert same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_sft_resumes_bit_for_bit_and_starts_the_next_stage(toy_dir, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    launch(*sft_flags(toy_dir, straight))
    losses = [m["loss"] for m in read_metrics(straight)]
    assert len(losses) == 4 and all(np.isfinite(losses))
    stopped_copy(straight, resumed, 2)
    launch(*sft_flags(toy_dir, resumed, "--resume"))
    assert same_weights(straight, resumed)
    assert without_times(read_metrics(straight)) == without_times(read_metrics(resumed))
    flags = list(rl_flags(toy_dir, 1, tmp_path / "rl"))
    flags[flags.index("--model") + 1] = straight / "final"
    launch(*flags)


def test_micro_batches_and_processes_do_not_change_sft(toy_dir, tmp_path):
    losses = []
    for i, (more, processes) in enumerate([((), 1), (("--micro-tokens", 100), 1), ((), 2)]):
        flags = sft_flags(toy_dir, tmp_path / str(i), "--steps", 2, *more)
        launch(*flags, processes=processes)
        losses.append([(m["loss"], m["grad_norm"]) for m in read_metrics(tmp_path / str(i))])
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
    np.testing.assert_allclose(losses[2], losses[0], rtol=2e-3)


def test_rl_resumes_bit_for_bit(toy_dir, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = (
        "--steps",
        4,
        "--save-every",
        2,
        "--prompts-per-step",
        8,
        "--hint-patience",
        1,
        "--hint-kl",
        10,
    )
    launch(*rl_flags(toy_dir, 2, straight, *flags))
    stopped_copy(straight, resumed, 2)
    launch("train_rl.py", "--out", resumed, "--resume", "--steps", 4)  # the rest is known
    assert same_weights(straight, resumed)
    a, b = (without_times(read_metrics(out)) for out in (straight, resumed))
    assert a == b and a[-1]["hints/entered"] > 0
    samples = [(out / "samples.jsonl").read_text() for out in (straight, resumed)]
    assert samples[0] == samples[1]


def test_two_processes_are_one(toy_dir, tmp_path):
    """
    The same prompts, completions, replay, hints and gradients, whatever the number of ranks.
    Defect 1 of the authors' trainer: ranks above 0 learned from rank 0's rewards.
    Rows without sound, and one whose clip cannot be read, are among them: no rank waits for ever.
    """
    rows = tmp_path / "rows"
    shutil.copytree(toy_dir / "stage2", rows)
    items = [json.loads(line) for line in (rows / "train.jsonl").read_text().splitlines()]
    for item in items[::2]:
        item["use_audio"] = False
    (rows / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (rows / "clips" / "train-00005.mp4").write_bytes(b"no clip")
    # every prompt comes twice, hints enter, and 7 held-out rows do not divide by 2
    flags = ("--steps", 4, "--prompts-per-step", 8, "--hint-patience", 1, "--hint-kl", 10)
    flags += ("--eval-samples", 7, "--eval-every", 2)
    flags += ("--data", rows / "train.jsonl")
    launch(*rl_flags(toy_dir, 2, tmp_path / "one", *flags))
    printed = launch(*rl_flags(toy_dir, 2, tmp_path / "two", *flags), processes=2)
    assert printed.count("step    1/4  reward") == 1
    one, two = (read_metrics(tmp_path / n) for n in ("one", "two"))
    exact = ("step", "completions_generated", "buffer/size", "hints/entered", "hints/frac")
    exact += ("data/bad_rows",)
    close = ("reward", "reward_std", "advantage_std", "kl", "grad_norm", "off/ratio_max", "loss")
    close += ("off/ess_frac", "num_valid_tokens", "completions/mean_length")
    assert one[-1]["hints/entered"] > 0 and one[-1]["data/bad_rows"] == 1
    for a, b in zip(one[:3], two[:3], strict=True):  # later, rounding may change a sampled token
        assert [a[k] for k in exact] == [b[k] for k in exact]
        np.testing.assert_allclose(
            [a[k] for k in close], [b[k] for k in close], rtol=5e-3, atol=1e-5
        )
    assert one[1]["eval/acc"] == two[1]["eval/acc"]
    lines = [(tmp_path / n / "samples.jsonl").read_text().splitlines() for n in ("one", "two")]
    first = [[s for s in map(json.loads, part) if s["step"] == 1] for part in lines]
    assert len(first[0]) == 8 and [s["tokens"] for s in first[0]] == [s["tokens"] for s in first[1]]
    np.testing.assert_allclose([s["ratios"] for s in first[1]][0], 1, atol=1e-3)


def test_lora_stages_build_on_each_other(toy_dir, tmp_path):
    """Each stage trains the adapter of the one before it on, beside the same base."""
    lora = ("--lora-rank", 2, "--lr", 1e-2)
    launch(*rl_flags(toy_dir, 1, tmp_path / "a", *lora))
    assert read_metrics(tmp_path / "a")[-1]["kl"] > 0  # the reference: without its adapter
    launch(*rl_flags(toy_dir, 2, tmp_path / "b", *lora, "--model", tmp_path / "a" / "final"))
    config = json.loads((tmp_path / "b" / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(toy_dir / "model")
    # the KL of b is to the policy that a ended with, and there is none before the first update
    kls = [metrics["kl"] for metrics in read_metrics(tmp_path / "b")]
    assert abs(kls[0]) < 1e-6 < kls[-1]
    folders = ("a/final", "b/final")
    a, b = (load_policy(str(tmp_path / folder), 2, train_towers=False) for folder in folders)
    weights = [
        {name: p for name, p in policy.named_parameters() if "lora_B.default" in name}
        for policy in (a, b)
    ]
    assert all((weights[0][name] != 0).any() for name in weights[0])
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])
    # it is one adapter of both stages, wherever the run has been moved
    (tmp_path / "b" / "final").rename(tmp_path / "moved")
    base = load_policy(str(toy_dir / "model"), 0, train_towers=False).thinker
    plain = PeftModel.from_pretrained(base, tmp_path / "moved")
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            assert torch.equal(parameter, weights[1][f"model.{name}"])


def test_an_adapter_names_its_base_from_the_root(toy_dir, tmp_path, monkeypatch):
    """PEFT loads it from any working directory."""
    monkeypatch.chdir(toy_dir)
    launch(*rl_flags(toy_dir, 1, tmp_path / "a", "--lora-rank", 2, "--model", "model"))
    config = json.loads((tmp_path / "a" / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((toy_dir / "model").resolve())
    assert (tmp_path / "a" / "checkpoints").is_dir()


def test_resuming_as_another_run_is_refused(toy_dir, tmp_path):
    launch(*sft_flags(toy_dir, tmp_path / "x", "--steps", 1, "--save-every", 1))
    line = mistake(*sft_flags(toy_dir, tmp_path / "x", "--resume", "--lora-rank", 4, "--keep", 3))
    assert "--lora-rank was 0, is 4" in line and "--keep" not in line


def test_a_gradient_that_is_not_finite_stops_the_run(toy_dir, tmp_path):
    flags = ("--lr", 1e30, "--save-every", 0)
    line = mistake(*sft_flags(toy_dir, tmp_path / "x", *flags))
    assert "step 2: loss nan, gradient norm nan; its prompts: toy-0-train-" in line
    assert "--lr" in line and "--resume --on-bad-step skip" in line
    skip = (*flags, "--resume", "--on-bad-step", "skip", "--steps", 4)
    printed = launch(*sft_flags(toy_dir, tmp_path / "x", *skip))
    assert printed.count("  skipped: loss nan") == 3
    assert read_metrics(tmp_path / "x")[-1]["steps_skipped"] == 3


# ---- mistakes: one line, non-zero exit, no traceback


def mistake(*command):
    printed = launch(*command, code=1)
    assert "Traceback" not in printed, printed
    return printed.strip().splitlines()[-1]


def test_mistakes_are_one_line(toy_dir, tmp_path):
    rows = toy_dir / "stage2" / "train.jsonl"
    out = ("--out", tmp_path / "x", "--steps", 1)
    model = ("--model", toy_dir / "model")
    assert "no model at no/such/model" in mistake(
        "train_rl.py", "--model", "no/such/model", "--data", rows, "--judge", "toy", *out
    )
    assert "no.jsonl" in mistake("train_rl.py", *model, "--data", "no.jsonl", *out)
    assert "the judge part of the reward needs --judge" in mistake(
        "train_rl.py", "--stage", 3, "--model", "some/7B", "--data", rows, *out
    )
    assert "no reasoning" in mistake("train_sft.py", *model, "--data", rows, *out)
    nothing = ("--out", tmp_path / "nothing")
    assert "--resume: " in mistake("train_rl.py", *model, "--data", rows, "--resume", *nothing)
    told = mistake("train_rl.py", *model, "--data", rows, "--device", "cuda", *out)
    assert "torch finds no GPU here" in told
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "run.json").write_text('{"arguments": {}}')
    (tmp_path / "held" / "metrics.jsonl").write_text("")
    assert "already holds a run" in mistake(
        "train_rl.py", *model, "--data", rows, "--out", tmp_path / "held"
    )


@pytest.mark.parametrize(
    "command",
    [
        "train_rl.py --seed -1",
        "train_rl.py --cache-gb -1",
        "train_rl.py --fps inf",
        "train_rl.py --lr nan",
        "train_rl.py --tas-lambda inf",
        "train_rl.py --clip-eps nan",
        "train_rl.py --reward-weights format=nan",
        "train_rl.py --reward-weights format",
        "train_rl.py --reward-weights speed=1",
        "train_sft.py --lr nan",
        "train_sft.py --seed -1",
        "train_rl.py --save-every -1",
        "train_rl.py --keep 0",
        "train_rl.py --num-on 1 --num-off 0",
        "train_rl.py --buffer-size 9",
        "train_rl.py --max-frames 3",
        "train_rl.py --max-audio-seconds -1",
        "toy.py --num-train -3",
        "eval.py --max-new-tokens 0",
        "eval.py --temperature -1",
        "eval.py --batch-size 0",
        "experiments/runs.py hints --seeds -1",
        "experiments/figures.py --results README.md",
    ],
)
def test_a_number_out_of_range_is_one_line(command, tmp_path):
    script, *flags = command.split()
    out = [] if script.startswith("experiments/") else ["--out", tmp_path / "x"]
    assert mistake(script, *flags, *out).startswith(f"{script.split('/')[-1]}: ")
    assert not (tmp_path / "x" / "run.json").exists()


def test_the_run_goes_on_when_its_screen_is_gone(toy_dir, tmp_path):
    """`python train_sft.py ... | head -1`: nobody reads what is printed any more."""
    flags = sft_flags(toy_dir, tmp_path / "x", "--save-every", 0, "--steps", 2)
    words = [sys.executable, *map(str, flags)]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(words, cwd=ROOT, **pipe) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0
    assert len((tmp_path / "x" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "x" / "final").is_dir()


def test_letters_that_the_terminal_lacks_are_one_line(toy_dir, tmp_path):
    words = [sys.executable, *map(str, sft_flags(toy_dir, tmp_path / "läuft"))]
    ascii_only = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run(words, cwd=ROOT, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "--out has letters that this terminal's encoding lacks: set LC_ALL=C.UTF-8" in done.stderr
    )


def test_a_run_is_lengthened(toy_dir, tmp_path):
    """A finished one too; the checkpoint of its last step is there."""
    flags = sft_flags(toy_dir, tmp_path / "x", "--save-every", 3)
    launch(*flags)
    assert sorted(p.name for p in (tmp_path / "x" / "checkpoints").iterdir())[-1] == "step-000004"
    longer = [*flags, "--steps", 6, "--resume"]
    printed = launch(*longer)
    assert "to step 6" in printed and "from step 4" in printed
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    # from here on it is a run of six steps
    assert "is finished" in launch("train_sft.py", "--resume", "--out", tmp_path / "x")
    assert "--steps was 6, is 5" in mistake(*flags, "--steps", 5, "--resume")


def test_a_run_without_checkpoints_is_not_lengthened(finished):
    flags, out = finished
    line = mistake(*flags, "--steps", 6, "--resume")
    assert f"--model {out / 'final'}" in line


def test_the_folder_of_a_run_stands_for_its_model(finished, toy_dir, tmp_path):
    _, out = finished
    more = ("--save-every", 0, "--steps", 1, "--model", out)
    printed = launch(*sft_flags(toy_dir, tmp_path / "y", *more))
    assert str(out / "final") in printed
    shutil.copytree(out, tmp_path / "x", ignore=shutil.ignore_patterns("final"))
    line = mistake(*sft_flags(toy_dir, tmp_path / "z", "--model", tmp_path / "x"))
    assert "has not ended" in line


def test_a_hub_that_does_not_answer_is_asked_once(toy_dir, tmp_path, monkeypatch):
    asked = []

    def head(*_, **__):
        asked.append(1)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    hub_is_online.cache_clear()
    told = mistake(*sft_flags(toy_dir, tmp_path / "x", "--model", "nobody/no-such-model"))
    hub_is_online.cache_clear()
    assert "nobody/no-such-model" in told and "hub does not answer" in told
    assert len(asked) == 1


def test_a_finished_run_says_so(finished):
    flags, out = finished
    before = (out / "metrics.jsonl").stat().st_mtime_ns
    printed = launch(*flags, "--resume")
    assert "is finished" in printed and str(out / "final") in printed
    assert (out / "metrics.jsonl").stat().st_mtime_ns == before


def test_final_can_be_read_by_others(toy_dir, tmp_path):
    """safetensors writes files that only their owner can read."""
    launch(*sft_flags(toy_dir, tmp_path / "x", "--steps", 1, "--lora-rank", 2))
    before = os.umask(0o022)
    os.umask(before)
    files = [p for p in (tmp_path / "x").rglob("*") if p.is_file() and p.name != "lock"]
    assert len(files) > 8
    assert {p.name: oct(p.stat().st_mode & 0o666) for p in files} == {
        p.name: oct(0o666 & ~before) for p in files
    }
    assert not (tmp_path / "x" / "final" / "README.md").exists()  # PEFT's, with a path of here


def test_bfloat16_on_one_cpu_is_refused_before_the_model_is_read(toy_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("models.inputs.InputBuilder.__init__", None)
    assert "--dtype bfloat16" in mistake(*sft_flags(toy_dir, tmp_path / "x", "--dtype", "bfloat16"))


def test_a_mistyped_path_is_not_asked_of_the_hub(toy_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("nomodel", "runs/stge2", "runs/sft/fnal"):
        line = mistake(*sft_flags(toy_dir, tmp_path / "x", "--model", path))
        assert f"there is no folder {path}" in line
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
    assert mistake("train_sft.py", "--out", "").endswith("--out is empty: give a folder")


def test_the_command_that_goes_on_parses(monkeypatch):
    import train_rl

    said = ["train_rl.py", "--stage", "2", "--on-bad-step", "stop", "--resume"]
    for words in (said, said[:-1], said[:3]):
        monkeypatch.setattr(sys, "argv", words)
        command = resume_command("--on-bad-step", "skip").split()
        args, _, _ = train_rl.parse_args(command[2:])
        assert command[:2] == ["python", "train_rl.py"]
        assert args.resume and args.on_bad_step == "skip"


def test_a_bad_clip_ends_training_with_its_name(toy_dir, tmp_path):
    folder = tmp_path / "rows"
    shutil.copytree(toy_dir / "stage2", folder)
    for clip in (folder / "clips").glob("train-*.mp4"):
        clip.write_bytes(clip.read_bytes()[:2000])
    line = mistake(
        "train_rl.py",
        "--stage",
        2,
        "--model",
        toy_dir / "model",
        "--data",
        folder / "train.jsonl",
        "--out",
        tmp_path / "x",
        "--eval-every",
        0,
    )
    assert "row toy-2-train-" in line and "fetch" in line


# ---- small things


def test_lr_scale():
    assert [optim.lr_scale(s, 10, 4, cosine=False) for s in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert optim.lr_scale(4, 10, 4, cosine=True) == 1.0 and optim.lr_scale(
        10, 10, 4, cosine=True
    ) == pytest.approx(0.1)


def test_resuming_cuts_the_logs(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    (tmp_path / "run.json").write_text('{"arguments": {"steps": 4}}')
    begin_run_dir(tmp_path, arguments=dict(steps=4), step=2, num_steps=4)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
