"""
The same bits twice, in the setting a user has: the default number of threads, a run of its own each.

    python -m pytest tests/test_reproducible.py
"""

import json
import os
import shutil
import subprocess
import sys

from conftest import ROOT
from spawned import start

FLAGS = "--stage 2 --steps 3 --save-every 2 --eval-every 0 --prompts-per-step 4 --max-new-tokens 40"


def command(toy_dir, out, *more):
    paths = ("--model", toy_dir / "model", "--data", toy_dir / "stage2" / "train.jsonl")
    return [str(word) for word in ("train_rl.py", *FLAGS.split(), *paths, "--out", out, *more)]


def train(toy_dir, out, *more):
    """A run in a Python of its own, as a user starts it, with torch's own number of threads."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    words = [sys.executable, *command(toy_dir, out, *more)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return result_of(out)


def result_of(out):
    return (out / "final" / "model.safetensors").read_bytes(), without_times(out)


def without_times(out):
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = lambda key: key.startswith("time/") or key == "tokens_per_s"  # noqa: E731
    return [{k: v for k, v in step.items() if not timed(k)} for step in steps]


def test_the_default_twice_and_killed_and_resumed(toy_dir, tmp_path):
    whole = train(toy_dir, tmp_path / "whole")
    assert train(toy_dir, tmp_path / "again") == whole
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut, ignore=shutil.ignore_patterns("final"))
    for checkpoint in (cut / "checkpoints").iterdir():
        if checkpoint.name > "step-000002":
            shutil.rmtree(checkpoint)
    assert train(toy_dir, cut, "--resume") == whole
    assert whole[1][-1]["buffer/size"] > 0


def test_more_threads_than_cores(toy_dir, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        running = start(*command(toy_dir, out), env=dict(OMP_NUM_THREADS="5"))
        assert running.wait() == 0, running.printed()
    assert result_of(outs[0]) == result_of(outs[1])
