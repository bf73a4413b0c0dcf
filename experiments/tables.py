"""
The tables of docs/results.md from the committed results, and their numbers as JSON.

    python -m experiments.tables                   # results/tables.md and results/tables.json

Each table has accuracy at fixed completions and the area, differences paired by seed with 95 % t
intervals, the spread between seeds of one and the same command (the floor), the number of seeds that
80 % power would need, and the shares of advantages near zero. What has no results is listed as not run.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from experiments.commands import EXPERIMENTS
from experiments.curves import (
    accuracy_at,
    area,
    by_label,
    hint_visits,
    last_common,
    length_gains,
    mean_series,
    paired,
    same_command_spread,
    seeds_needed,
    small_advantages,
    t_interval,
)
from run import arguments
from run.errors import UserError
from run.io import REPOSITORY, write_text
from run.launch import run_main

# accuracy, of the power calculation: the differences that are claimed are about so large
EFFECT = 0.02
MIN_SEEDS_FOR_POWER = 5
BUSY_MACHINE = [
    "control",
    "hands",
    "tune-hands",
]  # run beside other work: their seconds say nothing

TITLES = {
    "control": "The default run's first 40 steps, at equal completions and optimizer steps",
    "dense": "Short reasonings",
    "long": "Long reasonings",
    "longer": "Longer reasonings",
    "sparse": "Rare rewards",
    "ratio-long": "One ratio a completion, long reasonings",
    "ratio-longer": "One ratio a completion, longer reasonings",
    "replay": "What is replayed, and how it is weighted",
    "plan": "Shapes, decided at both ends",
    "busy": "Shapes, decided at both ends, longer",
    "middle": "Shapes, decided in the middle",
    "hints": "Hints for prompts that are never solved",
    "withdrawn": "Visits of prompts that got a hint",
    "stage3": "Reward of stage 3",
    "tune-dense": "What was tried, short reasonings",
    "tune-long": "What was tried, long reasonings",
    "tune-longer": "What was tried, longer reasonings",
    "tune-sparse": "What was tried, rare rewards",
    "tune-ratio": "Clips that were tried with one ratio a completion",
    "hands": "Hands and voices: clips of real recordings",
    "tune-hands": "What was tried, hands and voices",
}

# which differences are reported: (label, minus this one); other labels: minus REFERENCE's
METHODS = [
    ("AVATAR", "GRPO"),
    ("AVATAR", "no replay"),
    ("AVATAR, 4 updates", "GRPO"),
    ("AVATAR, 4 updates", "GRPO, 4 updates"),
    ("AVATAR, 4 updates", "no replay, 4 updates"),
    ("AVATAR, 4 updates", "AVATAR"),
    ("GRPO, 4 updates", "GRPO"),
    ("replay only, 4 updates", "AVATAR, 4 updates"),
    ("replay only, 4 updates", "no replay, 4 updates"),
    ("no replay", "GRPO"),
    ("no replay, 4 updates", "GRPO, 4 updates"),
]
ONE_RATIO = [
    ("AVATAR, 4 updates, one ratio", "AVATAR, 4 updates"),
    ("AVATAR, 4 updates, one ratio", "AVATAR, 4 updates, one ratio, clip .2"),
    ("AVATAR, 4 updates, one ratio", "GRPO, 4 updates, one ratio"),
    ("AVATAR, 4 updates, one ratio", "GRPO"),
    ("AVATAR, 4 updates, one ratio", "no replay, 4 updates, one ratio"),
    ("GRPO, 4 updates, one ratio", "GRPO, 4 updates"),
]
PAIRS = {
    "control": METHODS,
    "dense": METHODS,
    "long": METHODS,
    "longer": METHODS,
    "sparse": METHODS,
    "ratio-long": ONE_RATIO,
    "ratio-longer": ONE_RATIO,
    "hands": [
        *METHODS,
        ("AVATAR", "AVATAR, uniform weights"),
        ("AVATAR", "AVATAR, no hints"),
    ],
}
# also reported here: each label's end minus its start, the accuracy before training
FROM_START = ["hands"]
REFERENCE = {
    "replay": "AVATAR",
    "plan": "uniform",
    "busy": "uniform",
    "middle": "uniform",
    "hints": "no hints",
    "stage3": "format, judge",
}

# tokens of a reasoning; the paper's edges are 1, 201, 401, 601
LENGTH_EDGES = {
    "plan": [0, 130, 150, 170],
    "middle": [0, 130, 150, 170],
    "busy": [0, 230, 260, 290],
}


# ---- numbers -----------------------------------------------------------------------------------


def read_results(folder):
    """-> {name: what runs.py has written}, for the names of commands.py"""
    results = {}
    for name in EXPERIMENTS:
        path = Path(folder) / f"{name}.json"
        if path.exists():
            results[name] = json.loads(path.read_text())
    return results


def or_none(value):
    """JSON has no nan, which stands for an interval of one seed."""
    return None if np.isnan(value) else value


def flag_value(command, flag):
    words = command.split()
    return words[words.index(flag) + 1] if flag in words else None


def optimizer_steps(command):
    updates = int(flag_value(command, "--updates-per-rollout") or 1)
    return int(flag_value(command, "--steps")) * updates


def seconds_are_comparable(name, result):
    """Whether all runs are of one commit, on a machine that did little else."""
    return name not in BUSY_MACHINE and len({one["commit"] for one in result["runs"]}) == 1


def mean_accuracy_at(curves, completions, stop):
    """Mean over runs; None where no evaluation is near, as with one evaluation at the end."""
    nearest = min(abs(x - completions) for x, _ in curves[0])
    if nearest > 0.1 * stop:
        return None
    return float(np.mean([accuracy_at(curve, completions) for curve in curves]))


def label_numbers(name, result, label, label_runs):
    """A label's row of the first table."""
    stop = last_common(result)
    curves = [one["accuracy"] for one in label_runs]
    numbers = {
        "seeds": [one["seed"] for one in label_runs],
        "optimizer_steps": optimizer_steps(result["commands"][label]),
        "completions": stop,
        "start": float(np.mean([curve[0][1] for curve in curves])),
        "quarter": mean_accuracy_at(curves, stop / 4, stop),
        "half": mean_accuracy_at(curves, stop / 2, stop),
        "end": mean_accuracy_at(curves, stop, stop),
        "area": float(np.mean([area(curve, stop) for curve in curves])),
        "zero": small_advantages(label_runs, 0),
        "below_.1": small_advantages(label_runs, 0.1),
        "below_.3": small_advantages(label_runs, 0.3),
        "advantage_std": mean_series(label_runs, "advantage_std"),
        "seconds": None,
    }
    if seconds_are_comparable(name, result):
        numbers["seconds"] = float(np.mean([one["seconds"] for one in label_runs]))
    return numbers


def measures(result):
    """-> what is compared: name -> function of a run"""
    stop = last_common(result)
    return {
        "end": lambda one: accuracy_at(one["accuracy"], stop),
        "area": lambda one: area(one["accuracy"], stop),
    }


def pairs_of(name, runs):
    """-> (label, reference) of every difference whose two sides have runs"""
    if name in REFERENCE:
        pairs = [(label, REFERENCE[name]) for label in runs if label != REFERENCE[name]]
    else:
        pairs = PAIRS.get(name, [])
    return [(label, reference) for label, reference in pairs if {label, reference} <= runs.keys()]


def difference_row(label, reference, measure, values):
    """values: a difference for each seed"""
    mean, low, high = t_interval(values)
    needed = None  # from fewer seeds the spread itself is hardly known
    if len(values) >= MIN_SEEDS_FOR_POWER:
        needed = seeds_needed(values, EFFECT)
    return {
        "label": label,
        "minus": reference,
        "measure": measure,
        "seeds": len(values),
        "difference": mean,
        "low": or_none(low),
        "high": or_none(high),
        "seeds_needed": needed,
    }


def difference_numbers(name, result):
    """-> list of dicts: label, minus, measure, seeds, difference, low, high, seeds_needed"""
    runs = by_label(result)
    differences = []
    if name in FROM_START:
        for label, label_runs in runs.items():
            curves = [one["accuracy"] for one in label_runs]
            gains = [curve[-1][1] - curve[0][1] for curve in curves]
            differences.append(difference_row(label, "its start", "end", gains))
    # paired by seed: a seed gives both sides the same rows in the same order, and the same start
    for label, reference in pairs_of(name, runs):
        for measure, value in measures(result).items():
            values = paired(runs, label, reference, value)
            if values:
                differences.append(difference_row(label, reference, measure, values))
    return differences


def floors(result):
    """-> {measure: what two means of one and the same command differ by, in 95 % of cases at most}"""
    runs = by_label(result)
    numbers = {}
    for measure, value in measures(result).items():
        groups = [[value(one) for one in group] for group in runs.values()]
        numbers[measure] = or_none(same_command_spread(groups))
    return numbers


def repeated_runs(results):
    """
    A/A pairs: the same command and seed, run at two commits that gave different bits.

    returns  list of (experiment, other experiment, label, seed, difference of the last evaluation)
    """
    # On one machine and commit they are equal to the bit; what differs is the order of float operations.
    first = {}  # (command, seed) -> experiment, run
    pairs = []
    for name, result in results.items():
        for one in result["runs"]:
            # the variant "visits" notes something and changes nothing
            command = result["commands"][one["label"]].replace(
                "-m experiments.variants visits", "train_rl.py"
            )
            key = command, one["seed"]
            if key not in first:
                first[key] = name, one
                continue
            other_name, other = first[key]
            if other["accuracy"] != one["accuracy"]:
                gap = one["accuracy"][-1][1] - other["accuracy"][-1][1]
                pairs.append((other_name, name, one["label"], one["seed"], gap))
    return pairs


def visit_numbers(result):
    """What happens to a prompt that gets a hint: solved share by phase, beside the run without hints."""
    runs = by_label(result)
    phases = {}  # phase -> of each seed: list of (right with hints, right in the run without)
    num_seeds = len(runs["hints by need"])
    for i, (hinted, plain) in enumerate(zip(runs["hints by need"], runs["no hints"])):
        same_visit = {(step, prompt_id): right for step, prompt_id, _, right in plain["visits"]}
        for phase, step, prompt_id, right in hint_visits(hinted):
            pairs = phases.setdefault(phase, [[] for _ in range(num_seeds)])
            pairs[i].append((right, same_visit[step, prompt_id]))
    rows = []
    for phase in ("before it enters", "with it", "plain, after it entered"):
        seeds = [np.array(pairs) for pairs in phases.get(phase, []) if pairs]
        if not seeds:
            continue
        solved, without = np.concatenate(seeds).mean(0)
        mean, low, high = t_interval([(pairs[:, 0] - pairs[:, 1]).mean() for pairs in seeds])
        rows.append(
            {
                "phase": phase,
                "visits": sum(map(len, seeds)),
                "solved": float(solved),
                "without_hints": float(without),
                "difference": mean,  # the mean of the seeds' means
                "low": or_none(low),
                "high": or_none(high),
            }
        )
    return rows


def all_numbers(results):
    """-> everything that tables.md prints, as JSON"""
    numbers = {}
    for name, result in results.items():
        runs = by_label(result)
        numbers[name] = {
            "commit": result["commit"],
            "labels": {label: label_numbers(name, result, label, runs[label]) for label in runs},
            "differences": difference_numbers(name, result),
            "floor": floors(result),
            "not_run": [label for label in EXPERIMENTS[name] if label not in runs],
        }
        if name == "withdrawn":
            numbers[name]["visits"] = visit_numbers(result)
    numbers["repeated"] = [
        {"experiment": name, "again_in": other, "label": label, "seed": seed, "difference": gap}
        for name, other, label, seed, gap in repeated_runs(results)
    ]
    return numbers


# ---- Markdown ----------------------------------------------------------------------------------


def table(columns, rows):
    """-> lines of a Markdown table"""
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def interval_text(row):
    if row["low"] is None:
        return "one seed"
    return f"{row['low']:+.3f} – {row['high']:+.3f}"


def accuracy_lines(numbers):
    """The first table: accuracy on the way, area, advantages near zero."""
    labels = numbers["labels"]
    stop = next(iter(labels.values()))["completions"]
    at = [f"at {stop / 4:,.0f}", f"{stop / 2:,.0f}", f"{stop:,.0f}"]
    columns = [
        "",
        "seeds",
        "optimizer steps",
        *at,
        "area",
        "exact zeros",
        "abs A < .1",
        "< .3",
        "s",
    ]
    keys = ("quarter", "half", "end", "area")
    rows = []
    for label, of in labels.items():
        accuracy = ["–" if of[key] is None else f"{of[key]:.3f}" for key in keys]
        shares = [f"{of[key]:.1%}" for key in ("zero", "below_.1", "below_.3")]
        seconds = "–" if of["seconds"] is None else f"{of['seconds']:.0f}"
        seeds = str(len(of["seeds"]))
        rows.append([label, seeds, str(of["optimizer_steps"]), *accuracy, *shares, seconds])
    for label in numbers["not_run"]:
        rows.append([label, "not run", *["–"] * (len(columns) - 2)])
    return table(columns, rows)


def difference_lines(numbers):
    """The second table: differences with t intervals; bold where the interval excludes 0."""
    columns = ["", "minus", "of", "seeds", "difference", "95 % t interval", "seeds for ±.02"]
    rows = []
    for row in numbers["differences"]:
        text = f"{row['difference']:+.3f}"
        if row["low"] is not None and (row["low"] > 0 or row["high"] < 0):
            text = f"**{text}**"
        needed = "–" if row["seeds_needed"] is None else str(row["seeds_needed"])
        rows.append(
            [
                row["label"],
                row["minus"],
                row["measure"],
                str(row["seeds"]),
                text,
                interval_text(row),
                needed,
            ]
        )
    yield from table(columns, rows)
    yield ""
    floor = numbers["floor"]
    if floor["end"] is not None:
        yield (
            f"Floor: two means of one and the same command, of other seeds, differ by up to "
            f"{floor['end']:.3f} (end) and {floor['area']:.3f} (area) in 95 % of cases."
        )
    yield f"{len(rows)} intervals: about {0.05 * len(rows):.1f} would exclude 0 by chance."


def tuning_lines(result):
    """Every setting that was tried, one seed each: a direction, not a measurement."""
    stop = last_common(result)
    rows = []
    for label, label_runs in by_label(result).items():
        areas = [area(one["accuracy"], stop) for one in label_runs]
        ends = [one["accuracy"][-1][1] for one in label_runs]
        rows.append([label, f"{np.mean(areas):.3f}", f"{np.mean(ends):.3f}"])
    return table(["", "area", "end"], rows)


def hint_lines(result):
    """How many hints came and went; the held-out rows are those never solved without a hint."""
    columns = [
        "",
        "solved at the end",
        "95 % t interval",
        "entered",
        "withdrawn",
        "again",
        "visits with one",
    ]
    rows = []
    for label, label_runs in by_label(result).items():
        mean, low, high = t_interval([one["accuracy"][-1][1] for one in label_runs])
        entered = np.mean([one["series"]["hints/entered"][-1] for one in label_runs])
        withdrawn = np.mean([one["series"]["hints/withdrawn"][-1] for one in label_runs])
        again = np.mean([one["hints_back"] for one in label_runs])
        share = mean_series(label_runs, "hints/frac")
        counts = [f"{entered:.1f}", f"{withdrawn:.1f}", f"{again:.1f}", f"{share:.0%}"]
        rows.append([label, f"{mean:.3f}", f"{low:.3f} – {high:.3f}", *counts])
    return table(columns, rows)


def visit_lines(rows):
    columns = ["visit", "visits", "solved", "the same visits, no hints", "minus", "95 % t interval"]
    cells = []
    for row in rows:
        means = [f"{row[key]:.3f}" for key in ("solved", "without_hints")]
        difference = f"{row['difference']:+.3f}"
        cells.append([row["phase"], str(row["visits"]), *means, difference, interval_text(row)])
    return table(columns, cells)


def length_lines(rows):
    columns = ["tokens without TAS", "items", "gain of parabolic", "95 % t interval"]
    cells = []
    for name, num_items, gain, low, high in rows:
        cells.append([name, str(num_items), f"{gain:+.3f}", f"{low:+.3f} – {high:+.3f}"])
    return table(columns, cells)


def repeated_lines(pairs):
    """The measured A/A pairs."""
    columns = ["experiments", "pairs", "mean difference of the end", "largest"]
    groups = {}
    for pair in pairs:
        groups.setdefault(f"{pair['experiment']}, {pair['again_in']}", []).append(
            pair["difference"]
        )
    rows = []
    for name, gaps in groups.items():
        gaps = np.abs(gaps)
        rows.append([name, str(len(gaps)), f"{gaps.mean():.3f}", f"{gaps.max():.3f}"])
    return table(columns, rows)


def section_lines(name, result, numbers):
    """An experiment: where its runs come from, its commands, its tables."""
    seeds = sorted({one["seed"] for one in result["runs"]})
    quick = ", quick" if result.get("quick") else ""
    yield (
        f"`python -m experiments.runs {name}`{quick}, commit {result['commit']}, "
        f"seeds {', '.join(map(str, seeds))}."
    )
    yield ""
    for label, command in result["commands"].items():
        yield f"- {label}: `{command}`"
    yield ""
    if name.startswith("tune"):
        yield from tuning_lines(result)
        return
    if name == "withdrawn":
        yield from visit_lines(numbers["visits"])
        return
    yield from accuracy_lines(numbers)
    yield ""
    yield from difference_lines(numbers)
    if name == "hints":
        yield ""
        yield from hint_lines(result)
    if name in LENGTH_EDGES and "items" in result["runs"][0]:
        yield ""
        yield from length_lines(length_gains(result, LENGTH_EDGES[name]))


def write_tables(folder):
    """Writes tables.md and tables.json into the folder -> names of the experiments not run."""
    folder = Path(folder)
    results = read_results(folder)
    numbers = all_numbers(results)
    lines = ["# Tables", ""]
    lines += [
        "Bold: the 95 % t interval over seeds, paired, excludes 0. `experiments/tables.py`.",
        "",
    ]
    missing = []
    for name, title in TITLES.items():
        lines += [f"## {title}", ""]
        if name in results:
            lines += [*section_lines(name, results[name], numbers[name]), ""]
        else:
            missing.append(name)
            lines += [f"Not run: `python -m experiments.runs {name}`.", ""]
    if numbers["repeated"]:
        lines += ["## The same command and seed at two commits", ""]
        lines += [*repeated_lines(numbers["repeated"]), ""]
    write_text(folder / "tables.md", "\n".join(lines).rstrip() + "\n")
    parts = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in numbers.items()]
    write_text(folder / "tables.json", "{" + ",\n".join(parts) + "}\n")  # an experiment a line
    return missing


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    folder = REPOSITORY / "experiments/results"
    parser.add_argument(
        "--results",
        default=folder,
        metavar="DIR",
        help="folder of runs.py's JSON (default: experiments/results)",
    )
    return parser.parse_args(argv)


def main():
    folder = Path(parse_args().results)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    missing = write_tables(folder)
    print(f"{folder}: tables.md, tables.json")
    if missing:
        print(f"not run: {', '.join(missing)}")


if __name__ == "__main__":
    run_main(main)
