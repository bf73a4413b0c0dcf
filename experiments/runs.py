"""
The experiments behind figures.py: each name is a list of runs; what they measured is kept as JSON.

    python -m experiments.runs                       # the names and their commands
    python -m experiments.runs efficiency            # all its seeds, then results/efficiency.json
    python -m experiments.runs efficiency --quick    # one seed, short, into results/quick/

A run is a command of train_rl.py with a seed, in runs/experiments/; experiments that hold the same
command share it. A finished run is skipped and an interrupted one begins anew, so the same command
goes on where it stopped. The protocol, and what was found: docs/results.md.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import run  # before torch: it sets how torch's threads wait
from run import arguments, ending, files

import tas

RUNS = run.HERE / "runs" / "experiments"
HASTY, FEW_ROWS = "runs/experiments/hasty/final", "toy/stage3/few.jsonl"
SERIES = (  # kept of every step; rounded to 4 digits
    "completions_generated reward rewards/acc advantage_std advantage_zero_frac "
    "frac_reward_zero_std kl entropy off/ess_frac hints/frac"
).split()
LENGTH_EDGES = [0, 20, 40, 60]  # tokens; the paper's 1, 201, 401, 601 for chains ten times as long

# ---- what is run: label -> flags of train_rl.py
OURS = "--prompts-per-step 4"
LOG = "--eval-samples 128 --save-every 0 --eval-every"
DENSE = "--stage 2"  # the paper's reward of stage 2: format, accuracy, self-consistency
# a completion that the policy has given up has a tiny ratio: --max-ratio 0
SPARSE = "--stage 3 --reward-weights format=.5,acc=.5 --max-ratio 0 --model " + HASTY
FEW = f"{SPARSE} --data {FEW_ROWS} --eval-data toy/stage3/test.jsonl"  # they come back: hints enter
GRPO = {  # the best of those tuned, a task each
    "dense": f"{LOG} 2 --algo grpo --lr 2e-4 --steps",
    "sparse": f"{LOG} 4 --algo grpo --lr 2e-4 --prompts-per-step 4 --steps",
}
AVATAR = {
    "dense": f"{LOG} 4 {OURS} --lr 7e-5 --updates-per-rollout 4 --steps",
    "sparse": f"{LOG} 4 {OURS} --lr 1e-4 --updates-per-rollout 4 --steps",
}
FULL = f"{DENSE} {AVATAR['dense']} 24"


def sweep(flag, default, *values):
    """The full method at other values of one flag."""
    return {v: FULL if v == default else f"{FULL} {flag} {v}" for v in values}


EXPERIMENTS = {
    "efficiency": {
        "GRPO": f"{DENSE} {GRPO['dense']} 28",
        "GRPO, 4 updates": f"{DENSE} {GRPO['dense']} 12 --lr 7e-5 --updates-per-rollout 4",
        "AVATAR": f"{DENSE} {AVATAR['dense']} 48",
    },
    "sparse": {
        "GRPO": f"{SPARSE} {GRPO['sparse']} 48",
        "GRPO, 4 updates": f"{SPARSE} {GRPO['sparse']} 24 --lr 1e-4 --updates-per-rollout 4",
        "AVATAR": f"{SPARSE} {AVATAR['sparse']} 36",
    },
    "components": {  # where every part takes part
        "GRPO": f"{FEW} {GRPO['sparse']} 20",
        "GRPO, 4 updates": f"{FEW} {GRPO['sparse']} 20 --lr 1e-4 --updates-per-rollout 4",
        "TAS only": f"{FEW} {GRPO['sparse']} 20 --tas-shape parabolic",
        "replay only": f"{FEW} {AVATAR['sparse']} 36 --tas-shape uniform --no-hints",
        "without hints": f"{FEW} {AVATAR['sparse']} 36 --no-hints",
        "full": f"{FEW} {AVATAR['sparse']} 36",
    },
    "method": {  # the full method, and less one of our choices each
        "full": FULL,
        "1 update": f"{FULL} --updates-per-rollout 1",
        "1 update, lr 2e-4": f"{FULL} --updates-per-rollout 1 --lr 2e-4",
        "2 updates, lr 1e-4": f"{FULL} --updates-per-rollout 2 --lr 1e-4",
        "GRPO, 4 updates": f"{DENSE} {GRPO['dense']} 12 --lr 7e-5 --updates-per-rollout 4",
        "8 prompts": f"{FULL} --prompts-per-step 8 --eval-every 2 --steps 12",
        "no KL": f"{FULL} --kl-coef 0",
    },
    "shaping": sweep("--tas-shape", "parabolic", *tas.SHAPES)
    | {  # the weights also make a step larger; these do not
        "parabolic, mean 1": f"{FULL} --tas-shape parabolic-mean1",
        "inverse, mean 1": f"{FULL} --tas-shape inverse-mean1",
    },
    "splits": {  # where prompts come back: six stored completions of one prompt take visits
        f"{on}/{8 - on}": f"{FEW} {AVATAR['sparse']} {steps}"
        + f" --num-on {on} --num-off {8 - on}" * (on != 4)
        + " --no-hints"
        for on, steps in ((8, 18), (6, 24), (4, 36), (2, 64))
    },
    "alpha": sweep("--off-policy-coef", "0.6", "0.3", "0.6", "1.0"),
    "lambda": sweep("--tas-lambda", "0.3", "0.1", "0.3", "1.0"),
    "lengths": sweep("--tas-shape", "parabolic", "uniform", "parabolic"),
    "curriculum": {  # each starts from the one before
        "SFT": "",
        **{f"+{k}": f"--stage {k} {AVATAR['dense']} 32 --eval-every 0" for k in (1, 2, 3)},
    },
}
CHAINED, EVALUATED = ("curriculum",), ("curriculum", "lengths")  # by eval.py, item by item
SEEDS = (
    dict.fromkeys(EXPERIMENTS, 5)
    | {k: 3 for k in ("method", "shaping", "splits", "lengths")}
    | {k: 2 for k in ("alpha", "lambda", "curriculum")}
)


def command(flags):
    """What to type for a run."""
    return f"python train_rl.py {flags} --seed S" if flags else "the shipped weights"


def python(script, *words, log):
    """Runs a script of ours; its output goes to a file, whose tail explains a failure."""
    command = [sys.executable, str(run.HERE / script), *map(str, words)]
    with open(log, "a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=run.HERE)
    if done.returncode:
        tail = log.read_text()[-600:]
        raise run.UserError(f"{script} ended with {done.returncode}, see {log}:\n{tail}")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def hasty_model():
    """
    The start of "sparse": a model that answers without looking. Stage-0 rows whose reasoning is
    hasty, and every twentieth of the others, for 40 steps of SFT from the shipped weights.
    """
    final = run.HERE / HASTY
    if (final / "config.json").exists():
        return
    shutil.rmtree(final.parent, ignore_errors=True)
    log = RUNS / "hasty.log"
    python("toy.py", "--stages", 0, log=log)
    rows = read_lines(run.HERE / "toy/stage0/train.jsonl")
    is_hasty = lambda row: row["reasoning"].startswith("it seems")
    kinds = [
        [row for row in rows if is_hasty(row)],
        [row for row in rows if row["reasoning"].startswith("1:") and "hint" not in row][::20],
        [row for row in rows if "hint" in row][::20],
    ]
    data = run.HERE / "toy/stage0/hasty.jsonl"  # beside the clips that its rows name
    files.write_text(data, "".join(json.dumps(row) + "\n" for kind in kinds for row in kind))
    flags = "--steps 40 --lr 2e-4 --save-every 0".split()
    python("train_sft.py", "--data", data, "--out", final.parent, *flags, log=log)


def few_rows():
    """The 32 rows of "components": a prompt is visited four or five times in 36 steps."""
    path = run.HERE / FEW_ROWS
    if not path.exists():
        python("toy.py", "--stages", 3, log=RUNS / "few.log")
        lines = (path.parent / "train.jsonl").read_text().splitlines(keepends=True)
        files.write_text(path, "".join(lines[:32]))


def quick(flags):
    """The same flags, 12 steps."""
    return re.sub(r"--steps \d+", "--steps 12", flags)


def train(flags, seed, start=None):
    """-> the folder of the finished run; `start`: the run that it starts from, or None."""
    words = [*flags.split(), "--seed", str(seed)]
    name = " ".join(words) + (f" from {start.name}" if start else "")
    out = RUNS / hashlib.sha1(name.encode()).hexdigest()[:12]
    with files.alone(RUNS / "locks" / out.name):  # another experiment may hold the same command
        if (out / "done.json").exists():
            return out
        shutil.rmtree(out, ignore_errors=True)
        log = out.with_suffix(".log")
        log.unlink(missing_ok=True)
        with files.alone(RUNS / "locks" / "start"):
            for path, make in ((HASTY, hasty_model), (FEW_ROWS, few_rows)):
                if path in words:
                    make()
        words += ["--model", str(start / "final")] if start else []
        python("train_rl.py", *words, "--out", out, log=log)
        before = re.search(r"accuracy before training: ([\d.]+)", log.read_text())
        about = dict(command=f"python train_rl.py {name}", before=before and float(before[1]))
        files.write_text(out / "done.json", json.dumps(about))
    return out


def read_run(folder):
    """-> what figures.py needs of a run."""
    steps = read_lines(folder / "metrics.jsonl")
    about = json.loads((folder / "done.json").read_text())
    curve = [[m["completions_generated"], m["eval/acc"]] for m in steps if "eval/acc" in m]
    if about["before"] is not None:
        curve = [[0, about["before"]], *curve]
    return dict(
        accuracy=curve,
        series={name: [float(f"{m[name]:.4g}") for m in steps] for name in SERIES},
        advantage_hist=[sum(bins) for bins in zip(*(m["advantage_hist"] for m in steps))],
        seconds=sum(m[f"time/{part}_s"] for m in steps for part in ("data", "rollout", "update")),
        commit=json.loads((folder / "run.json").read_text())["commit"],
    )


def evaluate(folder, model, seed):
    """eval.py on every stage's held-out rows, at temperature 1 -> accuracy by stage, all items."""
    from transformers import AutoTokenizer

    out = folder / "eval"
    if not (out / "scores.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        flags = ["--temperature", 1, "--seed", seed] + (["--model", model] if model else [])
        python("eval.py", *flags, "--out", out, log=folder.with_suffix(".log"))
    records = read_lines(out / "records.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model or run.HERE / "toy/model")
    items = [
        [Path(r["file"]).parent.name, len(tokenizer(r["completion"] or "").input_ids), r["score"]]
        for r in sorted(records, key=lambda r: (r["file"], r["prompt_id"]))
    ]
    stages = sorted({stage for stage, _, _ in items})
    scores = {name: fmean(score for stage, _, score in items if stage == name) for name in stages}
    return dict(scores=scores, items=items)


def experiment(name, seeds, is_quick):
    """Makes every run of an experiment that is not there yet -> its JSON."""
    runs, commands = [], EXPERIMENTS[name]
    commands = {k: quick(flags) if is_quick else flags for k, flags in commands.items()}
    for seed in seeds:
        folder = None
        for label, flags in commands.items():
            start = folder if name in CHAINED else None
            if flags:
                folder = train(flags, seed, start)
                one = read_run(folder)
            else:  # the shipped weights: only evaluated
                folder, one = None, dict(series={}, accuracy=[], advantage_hist=[], seconds=0)
            if name in EVALUATED:
                where = folder or RUNS / f"start-{seed}"
                where.mkdir(parents=True, exist_ok=True)
                one |= evaluate(where, folder and folder / "final", seed)
            runs.append(dict(label=label, seed=seed, **one))
            print(f"{name}  {label}  seed {seed}  {one['seconds']:.0f} s", flush=True)
    commits = sorted({one["commit"] for one in runs if one.get("commit")})
    told = {label: command(flags) for label, flags in commands.items()}
    about = dict(name=name, commit=" ".join(commits), quick=is_quick, commands=told)
    return about | dict(edges=LENGTH_EDGES, runs=runs)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.add_argument("name", nargs="?", choices=[*EXPERIMENTS], help="none: list them")
    parser.add_argument("--seeds", type=int, default=0, help="how many, from 0 on; 0: as listed")
    parser.add_argument("--quick", action="store_true", help="short runs, one seed")
    parser.add_argument("--out", default=run.HERE / "experiments/results", help="folder for NAME.json")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    arguments.check_bounds(args, seeds=0)
    if not args.name:
        for name, commands in EXPERIMENTS.items():
            print(f"{name}: {SEEDS[name]} seeds")
            for label, flags in commands.items():
                print(f"  {label:14} {command(flags)}")
        print(f"{HASTY} and {FEW_ROWS} are made by the first experiment that begins with them")
        return
    seeds = range(args.seeds or (1 if args.quick else SEEDS[args.name]))
    result = experiment(args.name, seeds, args.quick)
    out = Path(args.out) / ("quick" if args.quick else "")
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / f"{args.name}.json", json.dumps(result))
    print(f"{out / args.name}.json: draw it with python -m experiments.figures --results {out}")


if __name__ == "__main__":
    ending.main_guard(main)
