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

FLAGS = "--stage 2 --steps 5 --save-every 3 --eval-every 0 --prompts-per-step 4 --max-new-tokens 40"


def train(toy_dir, out, threads, *more):
    """A run in a process of its own, as a user starts it, with `threads` threads (None: default)."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= dict(OMP_NUM_THREADS=str(threads)) if threads else {}
    paths = ("--model", toy_dir / "model", "--data", toy_dir / "stage2" / "train.jsonl")
    words = [sys.executable, "train_rl.py", *FLAGS.split(), *paths, "--out", out, *more]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (out / "final" / "model.safetensors").read_bytes(), without_times(out)


def without_times(out):
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = lambda key: key.startswith("time/") or key == "tokens_per_s"  # noqa: E731
    return [{k: v for k, v in step.items() if not timed(k)} for step in steps]


def test_the_default_twice_and_killed_and_resumed(toy_dir, tmp_path):
    whole = train(toy_dir, tmp_path / "whole", None)
    assert train(toy_dir, tmp_path / "again", None) == whole
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut, ignore=shutil.ignore_patterns("final"))
    for checkpoint in (cut / "checkpoints").iterdir():
        if checkpoint.name > "step-000003":
            shutil.rmtree(checkpoint)
    assert train(toy_dir, cut, None, "--resume") == whole
    assert whole[1][-1]["buffer/size"] > 0


def test_more_threads_than_cores(toy_dir, tmp_path):
    one, two = (train(toy_dir, tmp_path / name, 5) for name in ("one", "two"))
    assert one == two
