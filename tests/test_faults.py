"""
What happens to a run when it is killed, told to stop, or given a bad disk, clip or number.

    python -m pytest tests/test_faults.py -q        # real processes and real signals, on a CPU
"""

import json
import os
import shlex
import shutil
import signal
import time

import pytest
import torch
from conftest import RECIPE, launch
from safetensors.torch import load_file
from spawned import start
from test_run import mistake, same_weights, sft_flags, without_times
from test_train_rl import read_metrics, rl_flags

from data import row_check, row_stream
from models.loading import load_policy
from run import checkpoint

STEPS = 4
KEEP = ("--steps", STEPS, "--save-every", 1, "--keep-checkpoints", 9, "--eval-every", 0)
KEEP += ("--hint-patience", 1, "--hint-kl", 10, "--prompts-per-step", 8)  # the old name of the flag


def wait_for(process, happened, seconds=120):
    """Until happened() is true; the process must still be there by then."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def same_end(a, b, steps=STEPS):
    """Weights, metrics and all that the last checkpoints hold."""
    folders = [out / "checkpoints" / f"step-{steps:06d}" for out in (a, b)]
    assert equal(*map(checkpoint.read, folders))
    assert equal(*map(saved_tensors, folders)) and same_weights(a, b)
    assert without_times(read_metrics(a)) == without_times(read_metrics(b))
    return True


def saved_tensors(folder):
    """-> {file: {name: tensor}} of a checkpoint; a dict compares as equal without its order"""
    return {path.name: load_file(path) for path in folder.glob("rank-*.safetensors")}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or a != a and b != b


@pytest.fixture(scope="module")
def straight(toy_dir, tmp_path_factory):
    """An uninterrupted run, with hints and a bad clip in it."""
    out = tmp_path_factory.mktemp("straight") / "run"
    rows = out.parent / "rows"
    shutil.copytree(toy_dir / "stage2", rows)
    clip = rows / "clips" / "train-00003.mp4"
    clip.write_bytes(clip.read_bytes()[:1500])
    flags = list(rl_flags(toy_dir, 2, out, *KEEP))
    flags[flags.index("--data") + 1] = rows / "train.jsonl"
    launch(*flags)
    last = read_metrics(out)[-1]
    assert last["hints/entered"] > 0 and last["data/bad_rows"] == 1
    return out, flags


def other_out(flags, out):
    flags = list(flags)
    flags[flags.index("--out") + 1] = out
    return flags


# ---- killed


@pytest.mark.parametrize("moment", ["saving", "in a step"])
def test_a_killed_run_ends_as_if_nothing_had_happened(straight, tmp_path, moment):
    whole, flags = straight
    out = tmp_path / "run"
    process = start(*other_out(flags, out))
    if moment == "saving":
        wait_for(process, lambda: any((out / "checkpoints").glob("*.part")))
    else:
        wait_for(process, lambda: (out / "checkpoints" / "step-000002").exists())
        time.sleep(0.3)  # about half a step
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (out / "final").exists()
    launch(*other_out(flags, out), "--resume")
    assert same_end(whole, out)


def test_a_killed_stage_0_of_two_ranks_ends_as_if_nothing_had_happened(toy_dir, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = lambda out: sft_flags(toy_dir, out, "--save-every", 1, "--steps", 3)  # noqa: E731
    launch(*flags(whole), processes=2)
    process = start(*flags(out), processes=2)
    wait_for(process, lambda: (out / "checkpoints" / "step-000001").exists())
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (out / "final").exists()
    launch(*flags(out), "--resume", processes=2)
    assert same_end(whole, out, steps=3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_says_how_to_go_on(straight, tmp_path, number):
    whole, flags = straight
    out = tmp_path / "run"
    process = start(*other_out(flags, out), "--save-every", 0)
    wait_for(process, lambda: len(lines(out / "metrics.jsonl")) == 2)
    process.send_signal(number)
    process.send_signal(number)  # a launcher sends the same once more
    printed = process.communicate()
    assert process.returncode == 128 + number and "Traceback" not in printed
    saved = [path.name for path in (out / "checkpoints").iterdir()]
    assert saved == [f"step-{len(lines(out / 'metrics.jsonl')):06d}"]
    line = printed.strip().splitlines()[-1]
    command = shlex.split(line.split("continue with: python ")[1])
    assert "--resume" in command
    launch(*command, "--save-every", 1)  # the word of the command line that comes last wins
    assert same_end(whole, out)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_the_newest_whole_checkpoint_is_found(straight, tmp_path):
    whole, flags = straight
    for i, (name, size) in enumerate(
        [("state.pt", 0.5), ("rank-000.safetensors", 0.9), ("state.pt", None)]
    ):
        out = tmp_path / str(i)
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns("final"))
        torn = out / "checkpoints" / f"step-{STEPS:06d}" / name
        if size is None:
            torn.unlink()
        else:
            torn.write_bytes(torn.read_bytes()[: int(torn.stat().st_size * size)])
        printed = launch(*other_out(flags, out), "--resume")
        assert f"step-{STEPS:06d} is not whole" in printed and f"from step {STEPS - 1}" in printed
        assert same_end(whole, out)
        assert not list((out / "checkpoints").glob("*.stale"))


def test_if_no_checkpoint_is_whole_nothing_is_begun_anew(straight, tmp_path):
    whole, flags = straight
    out = tmp_path / "run"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("final"))
    for state in out.glob("checkpoints/*/state.pt"):
        state.write_bytes(state.read_bytes()[:100])
    assert "no checkpoint in" in mistake(*other_out(flags, out), "--resume")
    assert len(lines(out / "metrics.jsonl")) == STEPS


def test_a_checkpoint_before_the_first_step_is_the_start(toy_dir, tmp_path):
    """torch would make a first step of AdamW with zero gradients for its state."""
    policy = load_policy(toy_dir / "model", 0, False)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    parts = dict(policy=policy, optimizer=optimizer, keep_checkpoints=1)
    checkpoint.save(tmp_path, 0, state=dict(number=7), **parts)
    assert not optimizer.state
    assert checkpoint.load(tmp_path, policy, optimizer)["number"] == 7 and not optimizer.state
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    checkpoint.save(tmp_path, 1, state={}, **parts)
    again = torch.optim.AdamW(trained, lr=0.1)
    assert checkpoint.load(tmp_path, policy, again)["step"] == 1
    assert equal(list(again.state.values()), list(optimizer.state.values()))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_checkpoint_executes_nothing(straight, tmp_path):
    """state.pt is read with weights_only: a pickle that would run code is not a checkpoint."""
    folder = tmp_path / "step-000001"
    shutil.copytree(straight[0] / "checkpoints" / "step-000001", folder)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(dict(step=1, optimizer=Evil()), folder / "state.pt")
    assert checkpoint.read(folder) is None and not (tmp_path / "executed").exists()


# ---- several ranks


def test_two_ranks_stopped_resumed_and_one_of_them_killed(straight, tmp_path):
    whole, flags = straight
    two, out = tmp_path / "two", tmp_path / "run"
    launch(*other_out(flags, two), processes=2)
    # one rank is killed: the other does not wait for it
    process = start(*other_out(flags, out), processes=2)
    wait_for(process, lambda: (out / "checkpoints" / "step-000002").exists())
    os.kill(process.pids[1], signal.SIGKILL)
    began = time.monotonic()
    printed = process.communicate(timeout=60)
    assert process.returncode and time.monotonic() - began < 60
    assert "another process of the run has ended" in printed or "SIGKILL" in printed
    one = tmp_path / "one"
    shutil.copytree(out, one)
    launch(*other_out(flags, out), "--resume", processes=2)
    assert same_end(two, out)
    # and one process takes up what two began
    launch(*other_out(flags, one), "--resume")
    for a, b in zip(read_metrics(whole), read_metrics(one), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=0.2) and a["step"] == b["step"]
    assert (
        read_metrics(one)[-1]["completions_generated"]
        == read_metrics(whole)[-1]["completions_generated"]
    )


# ---- folder and disk


def test_two_runs_on_one_folder(straight, toy_dir, tmp_path):
    _, flags = straight
    out = tmp_path / "run"
    process = start(*other_out(flags, out))
    wait_for(process, lambda: len(lines(out / "metrics.jsonl")) == 1)
    for more in ((), ("--resume",)):
        line = mistake(*other_out(flags, out), *more)
        assert f"in use by another run (process {process.pid} on" in line
    process.kill()
    process.wait()
    assert "already holds a run" in mistake(*other_out(flags, out))  # the lock died with it


def test_a_full_disk_is_one_line_and_corrupts_nothing(straight, tmp_path):
    whole, flags = straight
    out = tmp_path / "run"
    shutil.copytree(
        whole, out, ignore=shutil.ignore_patterns("final", "step-000003", "step-000004")
    )
    begin_at = checkpoint.read(out / "checkpoints" / "step-000002")["step"]

    process = start(*other_out(flags, out), "--resume", max_file_bytes=2**20)
    printed = process.communicate()
    assert process.returncode == 1 and "Traceback" not in printed, printed
    line = printed.strip().splitlines()[-1]
    assert f"checkpoint of step {begin_at + 1}" in line and "the previous one is whole" in line
    assert "continue with: python train_rl.py" in line
    assert not list((out / "checkpoints").glob("*.part"))
    launch(*other_out(flags, out), "--resume")
    assert same_end(whole, out)


def test_a_folder_that_cannot_be_written(straight, tmp_path):
    (tmp_path / "file").write_text("")
    line = mistake(*other_out(straight[1], tmp_path / "file" / "run"))
    assert "cannot write to" in line and "choose another --out" in line


# ---- bad clips


def test_check_and_training_agree_on_bad_rows(toy_dir, tmp_path, monkeypatch):
    rows = tmp_path / "rows"
    shutil.copytree(toy_dir / "stage0", rows)
    clips = sorted((rows / "clips").glob("train-*.mp4"))
    clips[0].unlink()
    clips[5].write_bytes(b"")
    clips[6].write_bytes(clips[6].read_bytes()[:2000])
    items = [json.loads(line) for line in lines(rows / "train.jsonl")]
    items[7]["question"] = "look <|VIDEO|> there"
    items[8]["video"] = "../outside.mp4"
    items[9]["end"] = 999
    (rows / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    checks = row_check.check_rows(rows / "train.jsonl", RECIPE, None, 1)
    problems = [check.problem for check in checks if check.problem]
    bad = {0, 5, 6, 7, 8, 9}
    assert len(problems) == len(bad)
    command = list(sft_flags(toy_dir, tmp_path / "run", "--steps", 3))
    command[command.index("--data") + 1] = rows / "train.jsonl"
    monkeypatch.setattr(row_stream, "MAX_BAD_FRAC", 0.5)
    printed = launch(*command)
    told = [line.split("replaced: ")[1] for line in printed.splitlines() if "replaced: " in line]
    assert sorted(told) == sorted(problem.split(": ", 1)[1] for problem in problems)
    assert read_metrics(tmp_path / "run")[-1]["data/bad_rows"] == len(bad)
    # the default does not put up with as many
    command[command.index("--out") + 1] = tmp_path / "strict"
    monkeypatch.undo()
    assert "rows read cannot be used, over 10% (prepare.py check" in mistake(*command)


def test_a_clip_that_vanishes_leaves_the_replay(straight, tmp_path):
    whole, flags = straight
    flags = other_out(flags, out := tmp_path / "run")
    rows = tmp_path / "rows"
    shutil.copytree(flags[flags.index("--data") + 1].parent, rows)
    flags[flags.index("--data") + 1] = rows / "train.jsonl"
    lenient = {"data.row_stream.MAX_BAD_FRAC": 1}
    more = ("--cache-gb", 0, "--steps", 8, "--no-hints")
    process = start(*flags, *more, patches=lenient)
    wait_for(process, lambda: len(lines(out / "metrics.jsonl")) == 1)
    for clip in sorted((rows / "clips").glob("train-*.mp4"))[4:10]:
        clip.unlink()
    printed = process.communicate()
    assert process.returncode == 0, printed
    assert "replaced: row toy-2-train-0000" in printed
    assert "no longer replayed: row toy-2-train-0000" in printed or "replay" not in printed
    assert read_metrics(out)[-1]["data/bad_rows"] == 7


# ---- numbers


def bad_run(toy_dir, out, *more):
    return rl_flags(toy_dir, 2, out, "--eval-every", 0, "--max-ratio", 1.0001, "--lr", 1e-3, *more)


def test_a_bad_step_stops_with_the_state_before_it_or_is_skipped(toy_dir, tmp_path):
    """--max-ratio 1.0001 stands for a ratio that explodes: the first replay passes it."""
    out = tmp_path / "run"
    line = mistake(*bad_run(toy_dir, out))
    step = len(lines(out / "metrics.jsonl")) + 1
    assert f"step {step}: " in line and "--max-seq-ratio 1.0001" in line
    assert "toy-2-train-" in line and "--lr" in line
    assert line.endswith("--resume --on-bad-step skip")
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{step - 1:06d}"]
    printed = launch(*bad_run(toy_dir, out, "--resume", "--on-bad-step", "skip"))
    assert f"step {step:4d}/3  skipped: a mean ratio" in printed
    launch(*bad_run(toy_dir, tmp_path / "skipped", "--on-bad-step", "skip"))
    assert same_weights(out, tmp_path / "skipped")
    a, b = (without_times(read_metrics(o)) for o in (out, tmp_path / "skipped"))
    assert a == b and a[-1]["steps_skipped"] >= 1
