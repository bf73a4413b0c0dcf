"""
Kills a training run at random, again and again, and checks that its end is that of a run in peace.

    python tests/soak.py                                        # 100 kills, about half an hour
    python tests/soak.py --kills 20 --processes 2

Not a part of the test suite. A quarter of the kills come while the process starts, the others at
any moment of the steps after: in a rollout, an update, a checkpoint. Every process of the run gets
SIGKILL at the same time. Compared are weights, metrics without the seconds, samples, and all that
the last checkpoint holds: optimizer, buffer, hints, place in the data.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401  puts the repository on the path
from test_faults import same_end
from test_nodes import children
from tqdm import tqdm

import toy
from data.toy_rows import write_rows
from models.toy_model import write_model
from run import arguments
from run.io import REPOSITORY


def main():
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs")
    parser.add_argument("--steps", type=int, default=200, help="of the run; 2 a kill are enough")
    parser.add_argument("--processes", type=int, default=1, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    write_model(work / "model", toy.WEIGHTS)
    write_rows(work / "rows", 2, num_train=64, num_test=8, seed=0)
    clip = work / "rows" / "clips" / "train-00003.mp4"
    clip.write_bytes(clip.read_bytes()[:1500])  # a bad clip must not matter either

    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(args.processes),
    ]

    def start(out, *more):
        words = [sys.executable, *(torchrun if args.processes > 1 else []), "train_rl.py"]
        flags = f"--stage 2 --steps {args.steps} --save-every 1 --eval-every 0 --prompts-per-step 4"
        flags += f" --hint-patience 2 --hint-kl 10 --max-new-tokens 40 --model {work}/model"
        flags += f" --data {work}/rows/train.jsonl --judge toy --out {out}"
        log = open(work / f"{out.name}.log", "a")
        command, quiet = [*words, *flags.split(), *more], dict(stdout=log, stderr=log)
        return subprocess.Popen(command, cwd=REPOSITORY, **quiet)

    def steps_done(out):
        log = out / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    whole, killed = work / "whole", work / "killed"
    assert start(whole).wait() == 0, f"see {work}/whole.log"
    rng, kills = random.Random(args.seed), 0
    bar = tqdm(total=args.kills, desc="kills", disable=None)
    while kills < args.kills:
        more = ["--resume"] if (killed / "run.json").exists() else []
        process, before = start(killed, *more), steps_done(killed)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, 8))
        else:
            while steps_done(killed) <= before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.5))
        assert process.poll() is None, (
            f"it ended by itself: raise --steps, or see {work}/killed.log"
        )
        for pid in (process.pid, *children(process)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        kills += 1
        bar.update()
        bar.set_postfix(steps=steps_done(killed))
    bar.close()
    assert start(killed, "--resume").wait() == 0, f"see {work}/killed.log"
    same = same_end(whole, killed, args.steps)
    samples = [(out / "samples.jsonl").read_text() for out in (whole, killed)]
    assert same and samples[0] == samples[1]
    print(f"{kills} kills, {args.steps} steps, {args.processes} process(es): the end is the same")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
