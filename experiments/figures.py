"""
The paper's figures and tables from our own runs.

    python -m experiments.figures                  # every PNG and tables.md, in seconds

The runs themselves are made by runs.py, which leaves their numbers in results/NAME.json. What has no
such file is not drawn, and is said to be not run.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import json
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

import tas
from experiments.curves import (
    FRACTIONS,
    PHASES,
    area,
    bootstrap,
    by_label,
    completions_to,
    gains,
    hint_phases,
    length_gains,
    mean_curve,
    ratio_at,
    targets_of,
)
from run import arguments
from run.errors import UserError
from run.io import REPOSITORY
from run.launch import run_main

matplotlib.use("Agg")

HIST = np.linspace(-3, 3, 61)  # edges of advantage_hist in metrics.jsonl
BLUE, ORANGE, GREY = "#1f5fa8", "#d9772b", "#888888"
COLOR = {
    "AVATAR": BLUE,
    "AVATAR, 4 updates": "#0b2f5a",
    "GRPO": ORANGE,
    "GRPO, 4 updates": "#3b8f4a",
}

# tokens; the paper's 1, 201, 401, 601
LENGTH_EDGES = dict.fromkeys(("plan", "middle"), [0, 130, 150, 170]) | {"busy": [0, 230, 260, 290]}

# in which methods are compared, each at the best of tune-NAME
TASKS = dict(
    dense="short reasonings",
    long="long reasonings",
    longer="longer reasonings",
    sparse="rare rewards",
)
# name -> title, what the paper finds, the label that the others are compared with
TABLES = {
    "hints": (
        "Hints for prompts that are never solved",
        "they unlock the hardest 20 %",
        "no hints",
    ),
    "plan": ("Shapes, decided at both ends", "parabolic is best, inverse worst", "uniform"),
    "busy": ("Shapes, decided at both ends, longer", "parabolic is best, inverse worst", "uniform"),
    "middle": ("Shapes, decided in the middle", "silent", "uniform"),
    "replay": ("What is replayed, and how it is weighted", "silent", "AVATAR"),
    "stage3": ("Reward of stage 3", "format and judge", "format, judge"),
}


# ---- reading -----------------------------------------------------------------------------------


def read_results(folder):
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}


def curves_of(runs):
    return [one["accuracy"] for one in runs]


def share(runs, name):
    """Mean of a metric over all steps and runs."""
    return float(np.mean([np.mean(one["series"][name]) for one in runs]))


def number(value, digits, never):
    text = never if np.isinf(value) else f"{value:.{digits}f}"
    return "?" if np.isnan(value) else text  # one seed has no interval


# ---- the paper's figures -----------------------------------------------------------------------


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path.name


def plot_tas(folder):
    """Fig. 2: the weight of a token by its place, and the ablation's other shapes."""
    figure, axes = pyplot.subplots(figsize=(5, 3))
    mask = torch.ones(1, 101)
    for shape in tas.SHAPES:
        weights = tas.tas_weights(mask, shape, 0.3)[0]
        wide = 3 if shape == "parabolic" else 1
        axes.plot(np.linspace(0, 1, 101), weights, linewidth=wide, label=shape)
    axes.set(xlabel="place in the completion", ylabel="weight, lambda = 0.3")
    axes.legend(fontsize=8)
    return save(figure, folder / "tas.png")


def plot_advantages(result, path):
    """Fig. 4: advantages of all completions trained on; exact zeros are a bar of their own."""
    runs = by_label(result)
    figure, row = pyplot.subplots(1, len(runs), figsize=(5 * len(runs), 3), sharey=True)
    for axes, (label, found) in zip(np.atleast_1d(row), runs.items()):
        zero, std = share(found, "advantage_zero_frac"), share(found, "advantage_std")
        counts = np.sum([one["advantage_hist"] for one in found], axis=0)
        rest = (1 - zero) * counts / max(counts.sum(), 1)
        axes.bar(HIST[:-1] + 0.05, rest, width=0.1, color=COLOR.get(label, GREY))
        axes.bar(0, zero, width=0.1, color="black", label=f"exactly 0: {zero:.0%}")
        axes.set(title=f"{label}: std {std:.2f}", xlabel="advantage (ends: and beyond)")
        axes.legend(fontsize=8)
    row[0].set_ylabel("share of completions")
    return save(figure, path)


def plot_curves(axes, runs):
    """Held-out accuracy over completions: mean and, where they can be told apart, 95 % band -> colors of the labels."""
    axes.set_prop_cycle(
        color=np.roll(pyplot.get_cmap("tab10").colors, -3, axis=0)
    )  # last those that are like COLOR's
    colors = {}
    for label, found in runs.items():
        curves = curves_of(found)
        mean = mean_curve(curves)
        (line,) = axes.plot(*mean.T, color=COLOR.get(label), label=f"{label} ({len(found)} seeds)")
        colors[label] = line.get_color()
        if len(runs) <= 6:
            at = np.array(
                [[np.interp(x, *np.asarray(c, float).T) for x in mean[:, 0]] for c in curves]
            )
            band = bootstrap(len(at), lambda pick: at[pick].mean(0))  # noqa: B023
            axes.fill_between(mean[:, 0], *band, color=colors[label], alpha=0.2, linewidth=0)
    axes.set(xlabel="completions generated", ylabel="held-out accuracy")
    return colors


def plot_efficiency(result, path):
    """Fig. 5: held-out accuracy and reward over completions generated."""
    runs = by_label(result)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for label, color in plot_curves(left, runs).items():
        series = [one["series"] for one in runs[label]]
        x = np.asarray(series[0]["completions_generated"], float)
        y = np.mean([np.interp(x, s["completions_generated"], s["reward"]) for s in series], axis=0)
        width = min(9, len(y) // 2 or 1)
        right.plot(x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid"), color=color)
    for target in targets_of(*map(curves_of, runs.values()))[2]:
        left.axhline(target, color=GREY, linewidth=0.7, linestyle=":")
    right.set(xlabel="completions generated", ylabel="training reward (mean of up to 9 steps)")
    left.legend(fontsize=8 if len(runs) < 6 else 6, framealpha=0.5)
    return save(figure, path)


def plot_ablation(result, reference, path):
    """Held-out accuracy over completions, and each label's at the end minus the reference's."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    colors, (_, found) = plot_curves(left, by_label(result)), gains(result, reference)
    others = [label for label in found if label != reference]
    for y, label in enumerate(others):
        _, gain, low, high = found[label][0]
        error = np.nan_to_num([[gain - low], [high - gain]])
        right.errorbar(gain, -y, xerr=error, fmt="o", color=colors[label], capsize=3)
    right.axvline(0, color=colors.get(reference, GREY))
    right.set_yticks([-y for y in range(len(others))], others, fontsize=8)
    right.set(xlabel=f"accuracy at the end, minus that of: {reference}")
    return save(figure, path)


def efficiency_table(result):
    """The ratios to AVATAR at each target, in completions and in seconds, as Markdown lines."""
    runs = by_label(result)
    start, best, targets = targets_of(*map(curves_of, runs.values()))
    base = [label for label in runs if label.startswith("AVATAR")][-1]
    yield f"Start {start:.3f}, best {best:.3f}, {len(runs[base])} seeds; ratio: to {base}."
    yield ""
    yield "| target | | completions | ratio | 95 % interval | seconds | ratio | 95 % interval |"
    yield "|---" * 8 + "|"
    for fraction, target in zip(FRACTIONS, targets):
        for label, found in runs.items():
            cells = [f"{fraction:.0%}: {target:.3f}", label]
            for kind in ("accuracy", "clock"):
                slow, fast = ([one[kind] for one in r] for r in (found, runs[base]))
                cells.append(number(completions_to(mean_curve(slow), target), 0, "never"))
                ratio, low, high = (number(v, 1, "∞") for v in ratio_at(slow, fast, target))
                cells += ["–", "–"] if label == base else [ratio, f"{low} – {high}"]
            yield f"| {' | '.join(cells)} |"
    yield ""
    yield "| | seeds | end | std of advantages | exact zeros |"
    yield "|---|---|---|---|---|"
    for label, found in runs.items():
        zero, std = share(found, "advantage_zero_frac"), share(found, "advantage_std")
        last = np.mean([one["accuracy"][-1][1] for one in found])
        yield f"| {label} | {len(found)} | {last:.3f} | {std:.3f} | {zero:.1%} |"


def ablation_table(result, reference):
    """Of each label the last evaluation and the area at equal completions, and paired differences."""
    runs, (stop, told) = by_label(result), gains(result, reference)
    yield f"To {stop:.0f} completions; end: the last evaluation, area: mean accuracy on the way there."
    yield ""
    heads = [f"{name} | minus {reference} | 95 % interval" for name in ("end", "area")]
    yield f"| | seeds | {' | '.join(heads)} | exact zeros |"
    yield "|---" * 9 + "|"
    for label, pair in told.items():
        cells = [label, str(len(runs[label]))]
        for mean, gain, low, high in pair:
            minus = [f"{gain:+.3f}", f"{low:+.3f} – {high:+.3f}".replace("+nan", "?")]
            cells += [
                f"{mean:.3f}",
                *(minus if label != reference and not np.isnan(gain) else ["–", "–"]),
            ]
        yield f"| {' | '.join(cells)} | {share(runs[label], 'advantage_zero_frac'):.1%} |"


def tuning_table(result):
    """Every setting that was tried, one seed each: a direction, no measurement."""
    runs = by_label(result)
    end = min(one["accuracy"][-1][0] for found in runs.values() for one in found)
    yield "| | area | end |"
    yield "|---|---|---|"
    for label, found in runs.items():
        areas, ends = zip(*((area(one["accuracy"], end), one["accuracy"][-1][1]) for one in found))
        yield f"| {label} | {np.mean(areas):.3f} | {np.mean(ends):.3f} |"


def hints_table(result):
    """The held-out rows of this experiment are those that are never solved without a hint."""
    yield "| | solved at the end | 95 % interval | hints entered | withdrawn | again | with a hint |"
    yield "|---|---|---|---|---|---|---|"
    for label, found in by_label(result).items():
        ends = np.array([one["accuracy"][-1][1] for one in found])
        low, high = bootstrap(len(ends), lambda pick: ends[pick].mean())  # noqa: B023
        last = [
            np.mean([one["series"][f"hints/{k}"][-1] for one in found])
            for k in ("entered", "withdrawn")
        ]
        last.append(np.mean([one["hints_back"] for one in found]))
        told = " | ".join(f"{n:.1f}" for n in last) + f" | {share(found, 'hints/frac'):.0%}"
        yield f"| {label} | {ends.mean():.3f} | {low:.3f} – {high:.3f} | {told} |"


def withdrawn_table(result):
    """Of prompts whose hint left: solved share of each phase, and of the same visits without hints."""
    runs = by_label(result)
    cells = []  # of each seed: [phase, right with the schedule, right without]
    for hinted, plain in zip(runs["hints by need"], runs["no hints"]):
        same = {(step, q): right for step, q, _, right in plain["visits"]}
        cells.append(
            [(phase, right, same[step, q]) for phase, step, q, right in hint_phases(hinted)]
        )
    yield "| visits of prompts whose hint left | visits | solved | same visits, no hints | minus | 95 % interval |"
    yield "|---" * 6 + "|"
    for phase, name in enumerate(PHASES):
        pairs = [np.array([c[1:] for c in seed if c[0] == phase]).reshape(-1, 2) for seed in cells]
        mean = lambda pick: np.concatenate([pairs[i] for i in pick]).mean(0)  # noqa: B023
        solved, without = mean(range(len(pairs)))
        low, high = bootstrap(len(pairs), lambda pick: np.subtract(*mean(pick)))  # noqa: B023
        told = f"{solved - without:+.3f} | {low:+.3f} – {high:+.3f}"
        yield f"| {name} | {sum(map(len, pairs))} | {solved:.3f} | {without:.3f} | {told} |"


def plot_lengths(rows, path):
    figure, axes = pyplot.subplots(figsize=(5, 3))
    names, _, gains, low, high = zip(*rows)
    error = np.nan_to_num([np.subtract(gains, low), np.subtract(high, gains)])
    axes.bar(names, gains, yerr=error, color=BLUE, capsize=3)
    axes.axhline(0, color="black", linewidth=0.7)
    axes.set(xlabel="tokens of the completion without TAS", ylabel="gain in accuracy from TAS")
    return save(figure, path)


# ---- all of them -------------------------------------------------------------------------------


def write_all(folder):
    """Draws what there are results for, writes tables.md beside it -> the names not run."""
    folder = Path(folder)
    results, lines, missing = read_results(folder), ["# Figures and tables", ""], []
    lines += ["## Fig. 2: temporal advantage shaping", "", f"![tas]({plot_tas(folder)})", ""]

    def section(name, title, write):
        lines.extend([f"## {title}", ""])
        if name not in results:
            missing.append(name)
            lines.extend([f"Not run: `python -m experiments.runs {name}`.", ""])
            return
        result = results[name]
        seeds = ", ".join(str(s) for s in sorted({one["seed"] for one in result["runs"]}))
        quick = ", quick" if result.get("quick") else ""
        lines.append(
            f"`python -m experiments.runs {name}`{quick}, commit {result['commit']}, seeds {seeds}."
        )
        lines.extend(["", *(f"- {k}: `{v}`" for k, v in result["commands"].items())])
        lines.extend(["", *write(result), ""])

    def efficiency(name, result):
        yield f"![{name}]({plot_efficiency(result, folder / f'{name}.png')})"
        yield ""
        yield f"![advantages]({plot_advantages(result, folder / f'{name}-advantages.png')})"
        yield ""
        yield from efficiency_table(result)
        if name.startswith("ratio"):
            yield from ["", *ablation_table(result, "AVATAR, 4 updates")]

    def ablation(name, paper, reference, result):
        yield f"Paper: {paper}."
        yield ""
        yield f"![{name}]({plot_ablation(result, reference, folder / f'{name}.png')})"
        yield ""
        yield from ablation_table(result, reference)
        if name == "hints":
            yield ""
            yield from hints_table(result)
        if "items" not in result["runs"][0]:
            return
        rows = length_gains(result, LENGTH_EDGES[name])
        yield ""
        yield f"![by length]({plot_lengths(rows, folder / f'{name}-lengths.png')})"
        yield ""
        yield "| tokens without TAS | items | gain of parabolic | 95 % interval |"
        yield "|---|---|---|---|"
        for bin_name, items, gain, low, high in rows:
            yield f"| {bin_name} | {items} | {gain:+.3f} | {low:+.3f} – {high:+.3f} |"

    for name, task in TASKS.items():
        section(name, f"Completions and seconds, {task}", partial(efficiency, name))
        section(f"tune-{name}", f"What was tried, {task}", tuning_table)
        if name != "sparse":
            section(
                f"ratio-{name}",
                f"One ratio a completion, {task}",
                partial(efficiency, f"ratio-{name}"),
            )
    for name, (title, paper, reference) in TABLES.items():
        section(name, title, partial(ablation, name, paper, reference))
    section("tune-ratio", "Clips that were tried with one ratio a completion", tuning_table)
    section("withdrawn", "What happens to a prompt after its hint has left", withdrawn_table)
    (folder / "tables.md").write_text("\n".join(lines).rstrip() + "\n")
    return missing


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    told = "folder of the JSON that runs.py leaves"
    parser.add_argument(
        "--results", default=REPOSITORY / "experiments/results", metavar="DIR", help=told
    )
    return parser.parse_args(argv)


def main():
    folder = Path(parse_args().results)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    missing = write_all(folder)
    print(f"{folder}: figures, tables.md" + f"; not run: {', '.join(missing)}" * bool(missing))


if __name__ == "__main__":
    run_main(main)
