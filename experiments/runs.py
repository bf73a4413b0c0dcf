"""
Runs an experiment: each of its commands with each seed. Results are added to results/NAME.json after every run.

    python -m experiments.runs                       # the names and their commands
    python -m experiments.runs hints                 # all its seeds
    python -m experiments.runs hints --quick         # one seed, 12 steps, into results/quick/

A run whose result stands in the JSON is not repeated, so the same command continues where it
stopped and adds what is new in commands.py. The folders of the runs are in runs/experiments/;
experiments that contain the same command share its run. Tables and figures: figures.py.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse

from experiments.commands import EXPERIMENTS, SEEDS, STARTS, shell_command
from run import arguments
from run.io import REPOSITORY


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    flag = parser.add_argument
    flag(
        "name",
        nargs="?",
        choices=[*EXPERIMENTS],
        help="name of an experiment; without it, all are listed",
    )
    flag("--seeds", type=int, default=0, help="number of seeds, the first of those listed; 0 = all")
    flag("--jobs", type=int, default=1, help="runs at the same time, one core each")
    flag("--quick", action="store_true", help="one seed of 12 steps each")
    flag(
        "--out",
        default=REPOSITORY / "experiments/results",
        help="folder for NAME.json (default: experiments/results)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments.answer_early(parse_args)

import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import AutoTokenizer  # here: two threads would import it at once

from experiments.tasks import LONG, RUNS, TASKS, make, python, read_lines
from run.errors import UserError
from run.io import file_lock, write_text
from run.launch import run_main

# metrics of every step that are kept, with 4 digits
SERIES = [
    "completions_generated",
    "reward",
    "rewards/acc",
    "advantage_std",
    "advantage_zero_frac",
    "frac_reward_zero_std",
    "kl",
    "off/ess_frac",
    "grad_norm",
    "hints/frac",
    "hints/entered",
    "hints/withdrawn",
]
STEP_SECONDS = ["time/data_s", "time/rollout_s", "time/update_s"]


# ---- one run -----------------------------------------------------------------------------------


def train(flags, seed):
    """Runs a command with a seed unless it has been run -> its folder."""
    words = shell_command(flags).replace(" S", f" {seed}").split()[1:]
    name = " ".join(words)
    out = RUNS / hashlib.sha1(name.encode()).hexdigest()[:12]
    log = out.with_suffix(".log")
    with file_lock(RUNS / "locks" / out.name):  # another experiment may contain the same command
        if (out / "done.json").exists():
            return out
        shutil.rmtree(out, ignore_errors=True)
        log.unlink(missing_ok=True)
        for task in TASKS:
            if re.search(rf"/{task}(\.jsonl|/final|/sft/final)", name):
                make(task)
        python(*words, "--out", out, log=log)
        match = re.search(r"accuracy before training: ([\d.]+)", log.read_text())
        accuracy_before = float(match[1]) if match else None
        done = {"command": f"python {name}", "before": accuracy_before}
        write_text(out / "done.json", json.dumps(done))
    return out


def read_run(folder):
    """A finished run -> what tables and figures need of it."""
    steps = read_lines(folder / "metrics.jsonl")
    done = json.loads((folder / "done.json").read_text())
    log = folder.with_suffix(".log").read_text()

    seconds = 0.0
    accuracy, clock = (
        [],
        [],
    )  # held-out accuracy after so many completions, and after so many seconds
    if done["before"] is not None:
        accuracy.append([0, done["before"]])
        clock.append([0.0, done["before"]])
    for metrics in steps:
        seconds += sum(metrics[name] for name in STEP_SECONDS)
        if "eval/acc" in metrics:
            accuracy.append([metrics["completions_generated"], metrics["eval/acc"]])
            clock.append([round(seconds, 2), metrics["eval/acc"]])

    hint_events = re.findall(r"step +(\d+)/\d+ +hint (entered|withdrawn): (\S+)", log)
    entered = [prompt_id for _, event, prompt_id in hint_events if event == "entered"]
    result = {
        "accuracy": accuracy,
        "clock": clock,
        "series": {name: [float(f"{m[name]:.4g}") for m in steps] for name in SERIES},
        "advantage_hist": [sum(bins) for bins in zip(*(m["advantage_hist"] for m in steps))],
        "hints_back": len(entered) - len(set(entered)),  # entered again after they were withdrawn
        "seconds": seconds,
        "commit": json.loads((folder / "run.json").read_text())["commit"],
    }
    if (folder / "visits.jsonl").exists():  # written by the variant "visits"
        visits = read_lines(folder / "visits.jsonl")
        result["visits"] = [list(visit.values()) for visit in visits]
        result["hint_events"] = [
            [int(step), event, prompt_id] for step, event, prompt_id in hint_events
        ]
    return result


def completion_lengths(folder, task, seed):
    """eval.py on a long task's held-out rows at temperature 1 -> [tokens, score] of every row."""
    out, model = folder / "eval", folder / "final"
    if not (out / "scores.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        python(
            "eval.py",
            *("--model", model, "--data", LONG / f"{task}-test.jsonl", "--out", out),
            *("--temperature", 1, "--seed", seed, "--max-frames", 32, "--max-new-tokens", 400),
            log=folder.with_suffix(".log"),
        )
    tokenizer = AutoTokenizer.from_pretrained(model)
    records = sorted(read_lines(out / "records.jsonl"), key=lambda r: r["prompt_id"])
    return [[len(tokenizer(r["completion"] or "").input_ids), r["score"]] for r in records]


# ---- an experiment -----------------------------------------------------------------------------


def quick_flags(flags):
    """The same flags with 12 steps."""
    return re.sub(r"--steps \d+", "--steps 12", flags)


def read_results(path, commands):
    """Results so far; raises UserError if a command has changed since."""
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    for label, command in result["commands"].items():
        if commands.get(label, command) != command:
            raise UserError(
                f"{path}: {label!r} was run with other flags than commands.py has now: "
                "give the label another name, or remove the file to run all of it again"
            )
    return result["runs"]


def experiment(name, seeds, path, is_quick=False, jobs=1):
    """Makes the runs that `path` does not have yet, `jobs` at once, and writes it after each."""
    flags = EXPERIMENTS[name]
    if is_quick:
        flags = {label: quick_flags(words) for label, words in flags.items()}
    commands = {label: shell_command(words) for label, words in flags.items()}
    runs = read_results(path, commands)
    finished = {(one["label"], one["seed"]) for one in runs}
    todo = [(label, seed) for seed in seeds for label in flags if (label, seed) not in finished]

    def one_run(pair):
        label, seed = pair
        folder = train(flags[label], seed)
        one = {"label": label, "seed": seed, **read_run(folder)}
        if name in STARTS:
            one["items"] = completion_lengths(folder, name, seed)
        return one

    with ThreadPoolExecutor(jobs) as pool:
        for one in pool.map(one_run, todo):
            print(f"{name}  {one['label']}  seed {one['seed']}  {one['seconds']:.0f} s", flush=True)
            runs.append(one)
            commits = sorted({one["commit"] for one in runs if one.get("commit")})
            result = {
                "name": name,
                "commit": " ".join(commits),
                "quick": is_quick,
                "commands": commands,
                "runs": runs,
            }
            write_text(path, json.dumps(result))


def main():
    args = parse_args()
    arguments.check_bounds(args, seeds=0, jobs=1)
    if not args.name:
        for name, flags in EXPERIMENTS.items():
            print(f"{name}: seeds {SEEDS[name][0]} to {SEEDS[name][-1]}")
            for label, words in flags.items():
                print(f"  {label:14} {shell_command(words)}")
        print("Rows and starts in runs/experiments/ are made by the first run that needs them.")
        return

    num_seeds = args.seeds or len(SEEDS[args.name])
    out = Path(args.out)
    if args.quick:
        num_seeds = args.seeds or 1
        out = out / "quick"
    out.mkdir(parents=True, exist_ok=True)
    seeds = SEEDS[args.name][:num_seeds]
    experiment(args.name, seeds, out / f"{args.name}.json", args.quick, args.jobs)
    print(
        f"{out / args.name}.json: tables and figures: python -m experiments.figures --results {out}"
    )


if __name__ == "__main__":
    run_main(main)
