"""
Does LoRA keep in bfloat16 what it learns in float32? All stages of the toy in a chain, on a CPU: 0, 1,
2 and 3, each from the adapter of the one before, then the greedy accuracy on the held-out rows of all.

    python -m experiments.bfloat16_chain                        # in float32 and in bfloat16
    python -m experiments.bfloat16_chain --code ../older        # and in bfloat16 by another checkout
    python -m experiments.bfloat16_chain --table                # what results/bfloat16_chain.json has

In bfloat16 a CPU rounds where a GPU does: the frozen weights once, every layer's output, no sum within
a product. Adapters and optimizer stay float32. Another checkout runs in two processes, because before
LoRA cast its own weights one process on a CPU was refused.

Each command runs once: its folder is in runs/experiments/bfloat16_chain, and the script continues where
it stopped.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from experiments.tasks import RUNS, python
from run import arguments
from run.io import REPOSITORY, write_text
from run.launch import run_main

STAGES = (0, 1, 2, 3)
RESULT = REPOSITORY / "experiments/results/bfloat16_chain.json"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    flag = parser.add_argument
    flag("--seeds", type=int, default=2, help="number of seeds, from 0")
    flag("--rank", type=int, default=16, help="rank of the adapter")
    flag("--lr", default="1e-3", help="learning rate of stages 1 to 3")
    flag("--sft-lr", default="1e-3", help="learning rate of stage 0")
    flag("--steps", type=int, default=12, help="steps of each stage")
    flag("--prompts", type=int, default=8, help="prompts per step")
    flag(
        "--code", type=Path, metavar="DIR", help="another checkout, run in bfloat16 beside this one"
    )
    flag("--jobs", type=int, default=1, help="chains at the same time")
    flag("--table", action="store_true", help="only print the table of the results so far")
    flag("--out", type=Path, default=RESULT, help="file of the results")
    args = parser.parse_args(argv)
    arguments.check_bounds(args, jobs=1, seeds=1, rank=1, steps=1, prompts=1)
    return args


# ---- the commands --------------------------------------------------------------------------------


def train_words(args, stage):
    """Words of a stage's command, without --seed, --dtype, --model and --out."""
    if stage == 0:
        words = ["train_sft.py", "--lr", args.sft_lr]
    else:
        words = ["train_rl.py", "--stage", stage, "--lr", args.lr, "--eval-every", 0]
        words += ["--prompts-per-step", args.prompts]
    words += ["--lora-rank", args.rank, "--steps", args.steps, "--save-every", 0]
    return [str(word) for word in words]


def run_chain(args, dtype, seed, folder, code, processes):
    """Runs the stages and the evaluation that `folder` does not have yet -> {"all": ..., "stage1": ...}"""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    log = folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    model = None
    for stage in STAGES:
        out = folder / f"stage{stage}"
        if not (out / "final").exists():
            shutil.rmtree(out, ignore_errors=True)
            words = [*launcher, *train_words(args, stage), "--seed", seed, "--dtype", dtype]
            if model:
                words += ["--model", model]
            python(*words, "--out", out, log=log, code=code)
        model = out / "final"
    return evaluate(model, dtype, folder / "scores", code, log)


def evaluate(model, dtype, out, code, log):
    """-> greedy accuracy on all held-out rows and on those of each stage; model: None is the toy's"""
    if not (out / "scores.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        words = ["--model", model] if model else []
        python("eval.py", *words, "--dtype", dtype, "--out", out, log=log, code=code)
    scores = json.loads((out / "scores.json").read_text())["scores"]
    return {name.split("/")[-2] if "/" in name else name: s["score"] for name, s in scores.items()}


def commit_of(code):
    command = ["git", "-C", str(code), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# ---- results -------------------------------------------------------------------------------------


def read_result(path):
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def kept(result, label):
    """The share of the float32 chain's gain that another chain has, over the seeds that both have."""
    by_seed = {}
    for one in result["runs"]:
        gain = one["accuracy"]["all"] - one["before"]["all"]
        by_seed.setdefault(one["seed"], {})[one["label"]] = gain
    both = [one for one in by_seed.values() if label in one and "float32" in one]
    return sum(one[label] for one in both) / sum(one["float32"] for one in both)


def print_table(result):
    print("| chain | seeds | before | after | gain | of float32's |")
    print("|---|---|---|---|---|---|")
    for label in dict.fromkeys(one["label"] for one in result["runs"]):
        runs = [one for one in result["runs"] if one["label"] == label]
        before = np.mean([one["before"]["all"] for one in runs])
        after = np.mean([one["accuracy"]["all"] for one in runs])
        share = kept(result, label)
        print(
            f"| {label} | {len(runs)} | {before:.3f} | {after:.3f} | {after - before:.3f} "
            f"| {share:.0%} |"
        )


# ---- the experiment ------------------------------------------------------------------------------


def main():
    args = parse_args()
    result = read_result(args.out)
    if args.table:
        print_table(result)
        return
    settings = f"rank{args.rank}-lr{args.lr}-sft{args.sft_lr}-{args.steps}x{args.prompts}"
    folders = RUNS / "bfloat16_chain"
    chains = [("float32", "float32", REPOSITORY, 1), ("bfloat16", "bfloat16", REPOSITORY, 1)]
    if args.code:
        chains.append((f"bfloat16, {commit_of(args.code)}", "bfloat16", args.code.resolve(), 2))
    result["settings"] = settings
    result["commands"] = ["python " + " ".join(train_words(args, stage)) for stage in STAGES]
    done = {(one["label"], one["seed"]) for one in result["runs"]}
    todo = []
    before = {}  # label -> accuracy of the start
    for label, dtype, code, processes in chains:
        folder = folders / f"start-{label.replace(', ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        before[label] = evaluate(None, dtype, folder / "scores", code, folder / "log.txt")
        seeds = [seed for seed in range(args.seeds) if (label, seed) not in done]
        todo += [(label, dtype, code, processes, seed) for seed in seeds]

    def one_chain(chain):
        label, dtype, code, processes, seed = chain
        folder = folders / settings / f"{label.replace(', ', '-')}-{seed}"
        return run_chain(args, dtype, seed, folder, code, processes)

    todo.sort(key=lambda chain: chain[-1])  # by seed
    with ThreadPoolExecutor(args.jobs) as pool:
        for chain, accuracy in zip(todo, pool.map(one_chain, todo)):
            label, _, code, _, seed = chain
            one = dict(label=label, seed=seed, commit=commit_of(code), before=before[label])
            result["runs"].append(one | dict(accuracy=accuracy))
            write_text(args.out, json.dumps(result, indent=1))
            print_table(result)
            sys.stdout.flush()


if __name__ == "__main__":
    arguments.answer_early(parse_args)
    run_main(main)
