"""
One run at a glance: RUN/dashboard.png from RUN/metrics.jsonl, also while it is going on.

    python -m experiments.dashboard runs/stage2
"""

import argparse
import json
from pathlib import Path

from run import UserError, arguments, ending

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.ticker import LogFormatter

matplotlib.use("Agg")

DECADES = 50  # largest / small value, from which on a panel is drawn on a log scale
EVENTS = {"hints/entered": "entered", "hints/withdrawn": "withdrawn"}
RL = {  # title -> {metric: its name in the legend}
    "reward": {"reward": "whole", "rewards/format": "format", "rewards/acc": "accuracy",
               "rewards/self": "self-consistency", "rewards/judge": "judge"},
    "accuracy": {"rewards/acc": "fresh completions", "eval/acc": "held-out"},
    "share without a signal": {"frac_reward_zero_std": "fresh groups of equal rewards",
                               "advantage_zero_frac": "advantages of 0"},
    "standard deviation": {"advantage_std": "advantages", "reward_std": "rewards"},
    "KL to the reference, nats": {"kl": "kl"},
    "entropy, nats": {"entropy": "entropy"},
    "clipped tokens": {"clip_frac": "all", "off/clip_frac": "replayed"},
    "effective sample size": {"off/ess_frac": "replayed tokens"},
    "stored completions, by tier": {"buffer/frac_hard": "hard", "buffer/frac_medium": "medium",
                                    "buffer/frac_easy": "easy"},
    "age, steps": {"buffer/staleness_mean": "stored", "off/age_mean": "replayed"},
    "hints so far": EVENTS,
    "prompts with a hint": {"hints/frac": "share of the step"},
    "tokens of a completion": {"completions/mean_length": "mean"},
    "gradient norm": {"grad_norm": "before clipping"},
    "seconds": {"time/data_s": "data", "time/rollout_s": "rollout", "time/update_s": "update",
                "time/judge_wait_s": "waiting for the judge"},
}  # fmt: skip
SFT = {
    "loss": {"loss": "nats a token"},
    "gradient norm": {"grad_norm": "before clipping"},
    "learning rate": {"lr": "lr"},
    "seconds": {"time/data_s": "data", "time/step_s": "step"},
}
EMPTY = {  # why a panel has nothing to show
    "hints so far": "no hint has entered:\na prompt must stay Hard and unsolved\nfor three visits",
    "prompts with a hint": "no prompt carried a hint",
    "clipped tokens": "no token was clipped",
}


def read_steps(folder):
    """-> the logged steps; a line that a kill has cut is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: no metrics.jsonl there; --out of a run is wanted")
    lines = path.read_text().splitlines(keepends=True)
    steps = [json.loads(line) for line in lines if line.endswith("\n")]
    if not steps:
        raise UserError(f"{folder}: no step is logged yet")
    return steps


def draw_panel(axes, title, names, steps):
    axes.set_title(title, fontsize=9)
    lines = {label: [(m["step"], m[name]) for m in steps if m.get(name) is not None]
             for name, label in names.items()}  # fmt: skip
    values = [y for points in lines.values() for _, y in points]
    if not any(values):
        missing = f"not in metrics.jsonl: {', '.join(names)}"
        why = EMPTY.get(title, "always 0") if values else missing
        axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=8, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    for label, points in lines.items():
        few = len(points) < len(steps) / 2 or len(points) == 1
        if points:
            style = dict(drawstyle="steps-post") if names is EVENTS else dict(marker="o" * few)
            axes.plot(*zip(*points), label=label, linewidth=1, markersize=3, **style)
    low = np.percentile(values, 5)  # a first step of almost nothing would stretch the axis
    if low > 0 and max(values) > DECADES * low:
        axes.set_yscale("log")
        axes.set_ylim(bottom=low / 2)
        axes.yaxis.set_major_formatter(LogFormatter())
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)


def draw(folder):
    """-> the picture's path."""
    folder, steps = Path(folder), read_steps(folder)
    panels = RL if "reward" in steps[0] else SFT
    rows = -(-len(panels) // 4)
    figure, grid = pyplot.subplots(rows, 4, figsize=(16, 2.8 * rows))
    for axes, (title, names) in zip(grid.flat, panels.items()):
        draw_panel(axes, title, names, steps)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.suptitle(f"{folder.name}: {steps[-1]['step']} steps")
    figure.tight_layout()
    figure.savefig(folder / "dashboard.png", dpi=110)
    pyplot.close(figure)
    return folder / "dashboard.png"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.add_argument("run", help="folder of a run, with its metrics.jsonl")
    return parser.parse_args(argv)


def main():
    print(draw(parse_args().run))


if __name__ == "__main__":
    ending.main_guard(main)
