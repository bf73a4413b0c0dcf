"""
The experiments behind figures.py: each name is a list of runs; what they measured is kept as JSON.

    python -m experiments.runs                       # the names and their commands
    python -m experiments.runs hints                 # all its seeds, then results/hints.json
    python -m experiments.runs hints --quick         # one seed, short, into results/quick/

A run is a command of train_rl.py with a seed, in runs/experiments/; experiments that hold the same
command share it. A finished run is skipped and an interrupted one begins anew, so the same command
goes on where it stopped. The protocol, and what was found: docs/results.md.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import AutoTokenizer  # here: two threads would import it at once

from experiments.tasks import LONG, MAKE, RUNS, make, python, read_lines
from run import arguments
from run.io import REPOSITORY, file_lock, write_text
from run.launch import run_main

SERIES = (  # kept of every step; rounded to 4 digits
    "completions_generated reward rewards/acc advantage_std advantage_zero_frac "
    "frac_reward_zero_std kl off/ess_frac grad_norm hints/frac hints/entered hints/withdrawn"
).split()

# ---- what is run: label -> flags of train_rl.py, the first word a variant of variants.py, if any
KEPT = "--save-every 0"
DENSE = f"--stage 2 {KEPT} --eval-samples 128"  # the paper's reward of stage 2
# a completion that the policy has given up has a tiny ratio: --max-ratio 0
HASTY = "--max-ratio 0 --model runs/experiments/hasty/final"
HARD = (
    f"--stage 3 {KEPT} {HASTY} --reward-weights format=.5,acc=.5 --eval-samples 208 "
    "--data toy/stage3/hard.jsonl --eval-data toy/stage3/never.jsonl"
)

# tasks of long reasonings -> the folder of their start; tasks.py makes both
STARTS = dict(plan="sft", middle="middle-sft", busy="busy-sft")


def long_task(kind, samples):
    long = "runs/experiments/long"
    return (
        f"--stage 1 {KEPT} --model {long}/{STARTS[kind]}/final --data {long}/{kind}.jsonl "
        f"--eval-data {long}/{kind}-test.jsonl --max-frames 32 "
        f"--max-new-tokens {400 if kind == 'busy' else 320} --eval-samples {samples}"
    )


def budget(completions, num_on, prompts, evaluations):
    """Steps, and steps between evaluations, for about so many completions."""
    first = prompts * (8 - num_on)  # the first step has nothing to replay
    every = max(1, round((completions - first) / (num_on * prompts) / evaluations))
    return f"--steps {every * evaluations} --eval-every {every}"


def methods(task, completions, settings, evaluations=8):
    """label -> flags; settings: label -> (algorithm, updates a rollout, prompts a step, learning rate, other flags)."""
    made = {}
    for label, (algo, updates, prompts, lr, other) in settings.items():
        words = f"{task} {budget(completions, 8 if algo == 'grpo' else 4, prompts, evaluations)}"
        words += " --algo grpo" * (algo == "grpo") + f" --prompts-per-step {prompts}"
        made[label] = f"{words} --lr {lr} --updates-per-rollout {updates} {other}".strip()
    return made


def tuning(task, completions, tried, evaluations=8):
    """tried: prompts a step -> algorithm, updates a rollout and learning rates of each method."""
    settings = {
        f"{algo}, {updates} updates, {prompts} prompts, lr {lr}": (
            algo,
            updates,
            prompts,
            lr,
            "--no-hints" * (algo == "avatar"),
        )
        for prompts, told in tried.items()
        for algo, updates, *rates in map(str.split, told.split(","))
        for lr in rates
    }
    return methods(task, completions, settings, evaluations)


REPLAY = "--tas-shape uniform --no-hints"  # nothing of the method but its replay
EXPERIMENTS = {  # tuned on seed 100
    "tune-dense": tuning(
        DENSE,
        1536,
        {
            2: "grpo 1 1e-4 2e-4, avatar 1 1e-4 2e-4",
            4: "grpo 1 1e-4 2e-4 4e-4, grpo 2 1e-4 2e-4, grpo 4 2e-5 5e-5 1e-4,"
            "avatar 1 5e-5 1e-4 2e-4, avatar 2 5e-5 1e-4, avatar 4 2e-5 5e-5",
            8: "grpo 1 5e-5 1e-4 2e-4, grpo 4 5e-5 1e-4 2e-4, avatar 1 5e-5 1e-4 2e-4, avatar 4 5e-5 1e-4 2e-4",
            16: "grpo 1 2e-4, grpo 4 1e-4, avatar 1 2e-4, avatar 4 5e-5",
        },
    ),
    "tune-long": tuning(
        long_task("plan", 128),
        512,
        {
            2: "grpo 1 5e-5, grpo 4 2e-5, avatar 1 5e-5, avatar 4 2e-5",
            4: "grpo 1 2e-5 5e-5 1e-4, grpo 2 5e-5, grpo 4 1e-5 2e-5 5e-5 1e-4,"
            "avatar 1 2e-5 5e-5 1e-4, avatar 2 5e-5, avatar 4 1e-5 2e-5 5e-5 1e-4",
            8: "grpo 1 1e-4, grpo 4 5e-5, avatar 1 1e-4, avatar 4 5e-5",
        },
    ),
    "tune-longer": tuning(
        long_task("busy", 128),
        512,
        {
            4: "grpo 1 5e-5 1e-4, grpo 4 1e-5 2e-5 5e-5, avatar 1 5e-5 1e-4, avatar 4 1e-5 2e-5 5e-5",
        },
        evaluations=4,
    ),
    "tune-sparse": tuning(
        HARD,
        2048,
        {
            4: "grpo 1 2e-4 4e-4, grpo 2 2e-4, grpo 4 1e-4 2e-4, avatar 1 1e-4 2e-4, avatar 2 1e-4, avatar 4 5e-5 1e-4",
            8: "grpo 1 1e-4 2e-4 4e-4 8e-4, grpo 2 2e-4 4e-4, grpo 4 5e-5 1e-4 2e-4 4e-4,"
            "avatar 1 1e-4 2e-4 4e-4, avatar 2 1e-4 2e-4, avatar 4 5e-5 1e-4 2e-4",
            16: "grpo 1 4e-4, grpo 4 2e-4, avatar 1 2e-4, avatar 4 1e-4",
        },
    ),
    "dense": methods(
        DENSE,
        1024,
        {  # each at its best of tune-dense
            "GRPO": ("grpo", 1, 4, "2e-4", ""),
            "GRPO, 4 updates": ("grpo", 4, 4, "5e-5", ""),
            "AVATAR": ("avatar", 1, 4, "1e-4", ""),
            "AVATAR, 4 updates": ("avatar", 4, 4, "5e-5", ""),
            "replay only, 4 updates": ("avatar", 4, 4, "5e-5", REPLAY),
        },
    ),
    "sparse": methods(
        HARD,
        2048,
        {  # each at its best rate of tune-sparse, with 8 prompts
            "GRPO": ("grpo", 1, 8, "4e-4", ""),
            "GRPO, 4 updates": ("grpo", 4, 8, "2e-4", ""),
            "AVATAR": ("avatar", 1, 8, "2e-4", "--no-hints"),
            "AVATAR, 4 updates": ("avatar", 4, 8, "1e-4", "--no-hints"),
        },
    ),
    "hints": {  # every row comes back every eighth step; evaluated: those never solved without one
        label: f"{words} {HARD} --steps 64 --prompts-per-step 8 --eval-every 16 --lr 1e-4 {other}".strip()
        for label, words, other in (
            ("no hints", "", "--no-hints"),
            ("hints by need", "", ""),
            ("never withdrawn", "never-withdrawn", ""),
            ("entry by rank", "by-rank", ""),
            ("after 3 visits, any KL", "", "--hint-patience 3 --hint-kl 1e9"),
        )
    },
    "stage3": {
        label: f"{words} --stage 3 {KEPT} --steps 48 --prompts-per-step 8 --eval-every 48 --lr 5e-5 {other}".strip()
        for label, words, other in (
            ("format, judge", "", ""),
            ("format, judge, .2 accuracy", "", "--reward-weights format=.4,judge=.4,acc=.2"),
            ("judge wrong in 20 %", "wrong-judge", ""),
        )
    },
}
EXPERIMENTS["withdrawn"] = {
    k: f"visits {EXPERIMENTS['hints'][k]}" for k in ("no hints", "hints by need")
}
SHAPES = ["uniform", "parabolic", "parabolic-mean1", "inverse-mean1"]
LINEAR = ["inverse", *(f"linear-{way}{mean}" for way in ("up", "down") for mean in ("", "-mean1"))]
for kind in STARTS:  # TAS on long reasonings
    shapes = SHAPES if kind == "busy" else SHAPES + LINEAR
    settings = {
        shape: ("avatar", 1, 4, "5e-5", f"--no-hints --tas-shape {shape}") for shape in shapes
    }
    EXPERIMENTS[kind] = methods(long_task(kind, 256), 512, settings, evaluations=4)
PARABOLIC = "--no-hints --tas-shape parabolic"
EXPERIMENTS["long"] = methods(
    long_task("plan", 256),
    512,
    {  # each at its best of tune-long
        "GRPO": ("grpo", 1, 4, "5e-5", ""),
        "GRPO, 4 updates": ("grpo", 4, 8, "5e-5", ""),
        "AVATAR": ("avatar", 1, 2, "5e-5", PARABOLIC),
        "AVATAR, 4 updates": ("avatar", 4, 4, "2e-5", PARABOLIC),
    },
    evaluations=4,
)
EXPERIMENTS["longer"] = methods(
    long_task("busy", 256),
    512,
    {  # each at its best rate of tune-longer
        "GRPO": ("grpo", 1, 4, "5e-5", ""),
        "GRPO, 4 updates": ("grpo", 4, 4, "2e-5", ""),
        "AVATAR": ("avatar", 1, 4, "5e-5", PARABOLIC),
        "AVATAR, 4 updates": ("avatar", 4, 4, "2e-5", PARABOLIC),
    },
    evaluations=4,
)
AVATAR = EXPERIMENTS["dense"]["AVATAR"]
EXPERIMENTS["replay"] = {  # which completions, which prompts, which weights
    "AVATAR": AVATAR,
    "newest completions": f"newest {AVATAR}",
    "best completions": f"best {AVATAR}",
    "prompts by p (1 - p)": f"learnability {AVATAR}",
    "one ratio a completion": f"{AVATAR} --algo avatar-gspo --clip-eps 0.2",
    "one ratio a completion, clip .05": f"{AVATAR} --algo avatar-gspo --clip-eps 0.05",
    "ratio clipped at 3": f"{AVATAR} --clip-eps 2",
}
# which ratio, where even the fresh ones are soon off-policy: of a completion with the clip that is best in tune-ratio
ONE, FRESH = (
    "--algo avatar-gspo --clip-eps",
    "--num-on 8 --num-off 0 --tas-shape uniform --no-hints",
)
EXPERIMENTS["tune-ratio"] = {}
for kind, eps, tried in (
    ("dense", 0.05, "0.2 0.05 0.02 0.005 0.001"),
    ("long", 0.005, "0.005 0.001"),
    ("longer", 0.001, "0.2 0.05 0.02 0.005 0.001 0.0004"),
):
    grpo, avatar = (EXPERIMENTS[kind][f"{name}, 4 updates"] for name in ("GRPO", "AVATAR"))
    EXPERIMENTS["tune-ratio"] |= {f"{kind}, clip {e}": f"{avatar} {ONE} {e}" for e in tried.split()}
    EXPERIMENTS[f"ratio-{kind}"] = {
        "GRPO": EXPERIMENTS[kind]["GRPO"],
        "GRPO, 4 updates": grpo,
        "GRPO, 4 updates, one ratio": grpo.replace("--algo grpo", f"{ONE} {eps} {FRESH}"),
        "AVATAR, 4 updates": avatar,
        "AVATAR, 4 updates, one ratio, clip .2": f"{avatar} {ONE} 0.2",
        "AVATAR, 4 updates, one ratio": f"{avatar} {ONE} {eps}",
    }
long = EXPERIMENTS["long"]["AVATAR, 4 updates"]
EXPERIMENTS["tune-ratio"] |= {
    f"long, a token, clip {eps}": f"{long} --clip-eps {eps}" for eps in (0.2, 0.05, 0.01)
}
SEEDS = {name: range(100, 101) if name.startswith("tune") else range(5) for name in EXPERIMENTS}


def command(flags):
    """What to type for a run."""
    script = "train_rl.py" if flags.startswith("--") else "-m experiments.variants"
    return f"python {script} {flags} --seed S"


def quick(flags):
    """The same flags, 12 steps."""
    return re.sub(r"--steps \d+", "--steps 12", flags)


def train(flags, seed):
    """-> the folder of the finished run."""
    words = command(flags).replace(" S", f" {seed}").split()[1:]
    name = " ".join(words)
    out = RUNS / hashlib.sha1(name.encode()).hexdigest()[:12]
    with file_lock(RUNS / "locks" / out.name):  # another experiment may hold the same command
        if (out / "done.json").exists():
            return out
        shutil.rmtree(out, ignore_errors=True)
        log = out.with_suffix(".log")
        log.unlink(missing_ok=True)
        for task in MAKE:
            if re.search(rf"/{task}(\.jsonl|/final|/sft/final)", name):
                make(task)
        python(*words, "--out", out, log=log)
        before = re.search(r"accuracy before training: ([\d.]+)", log.read_text())
        about = dict(command=f"python {name}", before=before and float(before[1]))
        write_text(out / "done.json", json.dumps(about))
    return out


def read_run(folder):
    """-> what figures.py needs of a run."""
    steps = read_lines(folder / "metrics.jsonl")
    about = json.loads((folder / "done.json").read_text())
    step_s = lambda m: sum(m[f"time/{part}_s"] for part in ("data", "rollout", "update"))
    log = folder.with_suffix(".log").read_text()
    events = re.findall(r"step +(\d+)/\d+ +hint (entered|withdrawn): (\S+)", log)
    entered = [q for _, event, q in events if event == "entered"]
    curve, seconds = [], 0.0
    if about["before"] is not None:
        curve = [[0, about["before"], 0.0]]
    for m in steps:
        seconds += step_s(m)
        if "eval/acc" in m:
            curve.append([m["completions_generated"], m["eval/acc"], round(seconds, 2)])
    one = dict(
        accuracy=[point[:2] for point in curve],
        clock=[[s, acc] for _, acc, s in curve],  # the same over the seconds of the steps
        series={name: [float(f"{m[name]:.4g}") for m in steps] for name in SERIES},
        advantage_hist=[sum(bins) for bins in zip(*(m["advantage_hist"] for m in steps))],
        hints_back=len(entered) - len(set(entered)),  # entered again after they were withdrawn
        seconds=seconds,
        commit=json.loads((folder / "run.json").read_text())["commit"],
    )
    if (folder / "visits.jsonl").exists():  # of the variant that notes them
        one["visits"] = [[*visit.values()] for visit in read_lines(folder / "visits.jsonl")]
        one["hint_events"] = [[int(step), event, q] for step, event, q in events]
    return one


def lengths(folder, kind, seed):
    """eval.py on a long task's held-out rows, at temperature 1 -> [tokens, score] of every item."""
    out, model = folder / "eval", folder / "final"
    if not (out / "scores.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        flags = f"--temperature 1 --seed {seed} --max-frames 32 --max-new-tokens 400".split()
        rows = LONG / f"{kind}-test.jsonl"
        words = ("--model", model, "--data", rows, *flags, "--out", out)
        python("eval.py", *words, log=folder.with_suffix(".log"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    records = sorted(read_lines(out / "records.jsonl"), key=lambda r: r["prompt_id"])
    return [[len(tokenizer(r["completion"] or "").input_ids), r["score"]] for r in records]


def experiment(name, seeds, is_quick, jobs=1):
    """Makes every run of an experiment that is not there yet, `jobs` at once -> its JSON."""
    commands = EXPERIMENTS[name]
    commands = {k: quick(flags) if is_quick else flags for k, flags in commands.items()}

    def one_run(label, seed):
        folder = train(commands[label], seed)
        one = dict(label=label, seed=seed, **read_run(folder))
        if name in STARTS:
            one["items"] = lengths(folder, name, seed)
        print(f"{name}  {label}  seed {seed}  {one['seconds']:.0f} s", flush=True)
        return one

    pairs = [(label, seed) for seed in seeds for label in commands]
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(one_run, *zip(*pairs)))
    commits = sorted({one["commit"] for one in runs if one.get("commit")})
    told = {label: command(flags) for label, flags in commands.items()}
    return dict(name=name, commit=" ".join(commits), quick=is_quick, commands=told, runs=runs)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.add_argument("name", nargs="?", choices=[*EXPERIMENTS], help="none: list them")
    parser.add_argument("--seeds", type=int, default=0, help="how many of those listed; 0: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one core")
    parser.add_argument("--quick", action="store_true", help="short runs, one seed")
    parser.add_argument(
        "--out", default=REPOSITORY / "experiments/results", help="folder for NAME.json"
    )
    return parser.parse_args(argv)


def main():
    args = parse_args()
    arguments.check_bounds(args, seeds=0, jobs=1)
    if not args.name:
        for name, commands in EXPERIMENTS.items():
            print(f"{name}: seeds {SEEDS[name][0]} to {SEEDS[name][-1]}")
            for label, flags in commands.items():
                print(f"  {label:14} {command(flags)}")
        print(
            "runs/experiments/{hasty,long} and their rows are made by the first run that needs them"
        )
        return
    seeds = SEEDS[args.name][: args.seeds or (1 if args.quick else None)]
    result = experiment(args.name, seeds, args.quick, args.jobs)
    out = Path(args.out) / ("quick" if args.quick else "")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{args.name}.json", json.dumps(result))
    print(f"{out / args.name}.json: draw it with python -m experiments.figures --results {out}")


if __name__ == "__main__":
    run_main(main)
