"""
The paper's figures from our own runs, and the tables: every PNG, tables.md and tables.json in results/.

    python -m experiments.figures

runs.py makes the runs and writes their numbers to results/NAME.json. What has no such file is not
drawn and is listed as not run.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse

from run import arguments
from run.io import REPOSITORY


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


if __name__ == "__main__":
    arguments.answer_early(parse_args)

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

import tas
from experiments.curves import by_label, length_gains, mean_curve, small_advantages, t_interval
from experiments.tables import LENGTH_EDGES, difference_numbers, read_results, write_tables
from run.errors import UserError
from run.launch import run_main

matplotlib.use("Agg")

HIST_EDGES = np.linspace(-3, 3, 61)  # of advantage_hist in metrics.jsonl
BLUE, ORANGE, GREY = "#1f5fa8", "#d9772b", "#888888"
COLOR = {
    "AVATAR": BLUE,
    "AVATAR, 4 updates": "#0b2f5a",
    "GRPO": ORANGE,
    "GRPO, 4 updates": "#3b8f4a",
    "no replay": "#9a4fb0",
    "no replay, 4 updates": "#5b1f70",
}
MAX_BANDS = 6  # more bands cannot be told apart


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_tas(path):
    """Fig. 2: the weight of a token by its place, and the ablation's other shapes."""
    figure, axes = pyplot.subplots(figsize=(5, 3))
    mask = torch.ones(1, 101)
    for shape in tas.SHAPES:
        weights = tas.tas_weights(mask, shape, 0.3)[0]
        width = 3 if shape == "parabolic" else 1
        axes.plot(np.linspace(0, 1, 101), weights, linewidth=width, label=shape)
    axes.set(xlabel="place in the completion", ylabel="weight, lambda = 0.3")
    axes.legend(fontsize=8)
    save(figure, path)


def plot_advantages(result, path):
    """Fig. 4: advantages of all completions trained on; exact zeros are a bar of their own."""
    runs = by_label(result)
    figure, panels = pyplot.subplots(1, len(runs), figsize=(5 * len(runs), 3), sharey=True)
    panels = np.atleast_1d(panels)
    for axes, (label, label_runs) in zip(panels, runs.items()):
        zero, near = (small_advantages(label_runs, below) for below in (0, 0.3))
        counts = np.sum([one["advantage_hist"] for one in label_runs], axis=0)
        shares = (1 - zero) * counts / max(counts.sum(), 1)
        axes.bar(HIST_EDGES[:-1] + 0.05, shares, width=0.1, color=COLOR.get(label, GREY))
        axes.bar(0, zero, width=0.1, color="black", label=f"exactly 0: {zero:.0%}")
        axes.set(title=f"{label}: |A| < .3: {near:.0%}", xlabel="advantage (ends: and beyond)")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("share of completions")
    save(figure, path)


def t_band(curves, x):
    """95 % t interval of the accuracy at each of x -> low, high"""
    points = [np.interp(x, *np.asarray(curve, dtype=float).T) for curve in curves]  # seeds, x
    intervals = [t_interval(column) for column in np.transpose(points)]
    return [low for _, low, _ in intervals], [high for _, _, high in intervals]


def plot_curves(axes, runs):
    """Held-out accuracy over completions, mean and 95 % band -> {label: color}"""
    # other colors than those of COLOR first
    axes.set_prop_cycle(color=np.roll(pyplot.get_cmap("tab10").colors, -3, axis=0))
    colors = {}
    for label, label_runs in runs.items():
        curves = [one["accuracy"] for one in label_runs]
        mean = mean_curve(curves)
        text = f"{label} ({len(curves)} seeds)"
        (line,) = axes.plot(*mean.T, color=COLOR.get(label), label=text)
        colors[label] = line.get_color()
        if len(runs) <= MAX_BANDS and len(curves) > 1:
            low, high = t_band(curves, mean[:, 0])
            axes.fill_between(mean[:, 0], low, high, color=colors[label], alpha=0.15, linewidth=0)
    axes.set(xlabel="completions generated", ylabel="held-out accuracy")
    axes.legend(fontsize=8 if len(runs) < 6 else 6, framealpha=0.5)
    return colors


def plot_experiment(name, result, path):
    """Left: accuracy over completions. Right: differences of the end and of the area, with intervals."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    colors = plot_curves(left, by_label(result))
    differences = difference_numbers(name, result)
    names = []
    for y, row in enumerate(differences):
        error = None
        if row["low"] is not None:
            error = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
        color = colors[row["label"]]
        filled = color if row["measure"] == "end" else "white"
        right.errorbar(
            row["difference"], -y, xerr=error, fmt="o", color=color, mfc=filled, capsize=3
        )
        names.append(f"{row['label']} - {row['minus']}" if row["measure"] == "end" else "")
    right.axvline(0, color=GREY)
    right.set_yticks([-y for y in range(len(names))], names, fontsize=6)
    right.set_xlabel("difference of accuracy: filled: end, hollow: area")
    save(figure, path)


def plot_lengths(rows, path):
    """Fig. 6."""
    figure, axes = pyplot.subplots(figsize=(5, 3))
    names = [name for name, *_ in rows]
    gains = np.array([gain for _, _, gain, _, _ in rows])
    low = np.array([low for *_, low, _ in rows])
    high = np.array([high for *_, high in rows])
    error = np.nan_to_num([gains - low, high - gains])
    axes.bar(names, gains, yerr=error, color=BLUE, capsize=3)
    axes.axhline(0, color="black", linewidth=0.7)
    axes.set(xlabel="tokens of the completion without TAS", ylabel="gain in accuracy from TAS")
    save(figure, path)


def draw_all(folder):
    """Draws what there are results for."""
    plot_tas(folder / "tas.png")
    for name, result in read_results(folder).items():
        if name.startswith("tune") or name == "withdrawn":
            continue
        plot_experiment(name, result, folder / f"{name}.png")
        if any(label.startswith("GRPO") for label in result["commands"]):
            plot_advantages(result, folder / f"{name}-advantages.png")
        if name in LENGTH_EDGES and "items" in result["runs"][0]:
            rows = length_gains(result, LENGTH_EDGES[name])
            plot_lengths(rows, folder / f"{name}-lengths.png")


def main():
    folder = Path(parse_args().results)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    missing = write_tables(folder)
    draw_all(folder)
    print(f"{folder}: figures, tables.md, tables.json")
    if missing:
        print(f"not run: {', '.join(missing)}")


if __name__ == "__main__":
    run_main(main)
