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


def train_as_a_user(toy_dir, out):
    """A run in a Python of its own, with torch's own number of threads."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    words = [sys.executable, *command(toy_dir, out)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return result_of(out)


def train_with_five_threads(toy_dir, out, *more):
    """More threads than cores, forked from a process that has loaded all modules."""
    running = start(*command(toy_dir, out, *more), env=dict(OMP_NUM_THREADS="5"))
    assert running.wait() == 0, running.printed()
    return result_of(out)


def result_of(out):
    return (out / "final" / "model.safetensors").read_bytes(), without_times(out)


def without_times(out):
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = lambda key: key.startswith("time/") or key == "tokens_per_s"  # noqa: E731
    return [{k: v for k, v in step.items() if not timed(k)} for step in steps]


def test_the_default_twice(toy_dir, tmp_path):
    whole = train_as_a_user(toy_dir, tmp_path / "whole")
    assert train_as_a_user(toy_dir, tmp_path / "again") == whole
    assert whole[1][-1]["buffer/size"] > 0


def test_killed_and_resumed_with_more_threads_than_cores(toy_dir, tmp_path):
    whole = train_with_five_threads(toy_dir, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut, ignore=shutil.ignore_patterns("final"))
    for checkpoint in (cut / "checkpoints").iterdir():
        if checkpoint.name > "step-000002":
            shutil.rmtree(checkpoint)
    assert train_with_five_threads(toy_dir, cut, "--resume") == whole
