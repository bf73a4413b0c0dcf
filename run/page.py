"""
A run to look at: RUN/index.html, one file that needs no network, also of a run that is going on or was cut off.

    python -m run.page runs/stage2
    python -m run.page runs/stage2 --against runs/grpo          # its curves beside them

Written anew whenever a run is evaluated, and at its end. It holds what metrics.jsonl, samples.jsonl and clips.jsonl
say, thinned to LIMIT bytes, as data: page.js makes elements of it, and every text stays a text.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import base64
import contextlib
import hashlib
import html
import json
import re
from pathlib import Path

import numpy as np

from run import arguments
from run.arguments import read_run_json
from run.errors import UserError
from run.io import write_text
from run.launch import run_main
from run.run_dir import LOGS

LIMIT = 5_000_000  # bytes of a page
POINTS = 1500  # of a curve: the least and the greatest value of each of half as many stretches
SMOOTH = 50  # a noisy curve has its mean over a stretch of 1 / SMOOTH of it drawn over it
DECADES = 50  # largest / small value, from which on a panel begins on a log scale
RL = [  # title, {metric: its name in the legend}, x axis if it is always the same, what to say if all is 0
    ("held-out accuracy, by completions", {"eval/acc": "held-out"}, "completions", ""),
    ("held-out accuracy, by seconds", {"eval/acc": "held-out"}, "seconds", ""),
    (
        "reward",
        {
            "reward": "whole",
            "rewards/format": "format",
            "rewards/acc": "accuracy",
            "rewards/self": "self-consistency",
            "rewards/judge": "judge",
        },
        "",
        "",
    ),
    ("KL to the reference, nats", {"kl": "KL"}, "", ""),
    ("gradient norm", {"grad_norm": "before clipping"}, "", ""),
    (
        "share without a signal",
        {
            "frac_reward_zero_std": "fresh groups of equal rewards",
            "advantage_zero_frac": "advantages of 0",
        },
        "",
        "",
    ),
    (
        "stored completions, by tier",
        {"buffer/frac_hard": "hard", "buffer/frac_medium": "medium", "buffer/frac_easy": "easy"},
        "",
        "nothing is stored",
    ),
    (
        "staleness, steps",
        {"buffer/staleness_mean": "stored", "off/age_mean": "replayed"},
        "",
        "nothing is replayed",
    ),
    ("effective sample size", {"off/ess_frac": "replayed tokens"}, "", ""),
    ("largest ratio of a replayed token", {"off/ratio_max": "pi / b"}, "", ""),
    (
        "hints so far",
        {"hints/entered": "entered", "hints/withdrawn": "withdrawn"},
        "",
        "no hint has entered: a prompt must stay Hard and unsolved",
    ),
    ("prompts with a hint", {"hints/frac": "share of the step"}, "", "no prompt carried a hint"),
    ("standard deviation", {"advantage_std": "advantages", "reward_std": "rewards"}, "", ""),
    (
        "clipped tokens",
        {"clip_frac": "all", "off/clip_frac": "replayed"},
        "",
        "no token was clipped",
    ),
    ("entropy, nats", {"entropy": "entropy"}, "", ""),
    ("tokens of a completion", {"completions/mean_length": "mean"}, "", ""),
    (
        "seconds of a step",
        {
            "time/data_s": "data",
            "time/rollout_s": "rollout",
            "time/update_s": "update",
            "time/judge_wait_s": "waiting for the judge",
        },
        "",
        "",
    ),
]
SFT = [
    ("loss, nats a token", {"loss": "loss"}, "", ""),
    ("gradient norm", {"grad_norm": "before clipping"}, "", ""),
    ("learning rate", {"lr": "rate"}, "", ""),
    ("seconds of a step", {"time/data_s": "data", "time/step_s": "all"}, "", ""),
]


def write(folder, against=None):
    """Writes FOLDER/index.html, with the curves of another run beside its own -> its path."""
    folder, told = Path(folder), []
    runs = [read_run(Path(f), told) for f in (folder, against) if f]
    steps = runs[0]["steps"]
    panels = SFT if steps and "reward" not in steps[-1] else RL
    curves = [thinned(run, {name for _, names, _, _ in panels for name in names}) for run in runs]
    data = dict(
        runs=curves,
        told=told,
        panels=[
            dict(title=title, names=names, axis=axis, why=why, log=spans_decades(curves, names))
            for title, names, axis, why in panels
        ],
    )
    own = Path(__file__)
    template, script = (own.with_suffix(s).read_text(encoding="utf-8") for s in (".html", ".js"))
    data |= samples_of(folder, LIMIT - len(encoded(data)) - len(template) - len(script), told)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = dict(
        title=html.escape(curves[0]["name"]), data=encoded(data), script=script, digest=digest
    )
    text = re.sub(r"{(title|data|script|digest)}", lambda match: parts[match[1]], template)
    write_text(folder / "index.html", text.encode("ascii", "xmlcharrefreplace").decode())
    return folder / "index.html"


def encoded(data):
    """JSON that may stand in a script element: no text in it can end that."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


# ---- what a run's folder says, whatever is missing of it ----------------------------------------


def read_lines(path, told):
    """-> objects with a `step`, and the most bytes of each in a page; lines that a kill has cut are told, left out."""
    if not path.is_file():
        told.append(f"{path.name} is missing")
        return []
    lines, found = path.read_bytes().splitlines(), []
    for line in lines:
        with contextlib.suppress(ValueError):
            item = json.loads(line, parse_constant=lambda name: None)
            if isinstance(item, dict) and isinstance(item.get("step"), int):
                found.append((item, len(line) + 5 * line.count(b"<")))
    if len(found) < len(lines):
        told.append(f"{path.name}: {len(lines) - len(found)} damaged lines are left out")
    return found


def read_run(folder, told):
    """-> name, what run.json says, metrics of every step"""
    name, told_here, about = folder.resolve().name, [], {}
    with contextlib.suppress(ValueError):
        about = read_run_json(folder)
    given = about.get("arguments") or {}
    if not given:
        told_here.append("run.json is missing or damaged")
    words = [
        f"{key} {given[key]}"
        for key in ("stage", "algo", "seed", "steps")
        if given.get(key) is not None
    ]
    words += [f"commit {about['commit']}"] if about.get("commit") else []
    steps = [item for item, _ in read_lines(folder / "metrics.jsonl", told_here)]
    if not steps and "metrics.jsonl is missing" not in told_here:
        told_here.append("no step is logged yet")
    before = [m["eval/before"] for m in steps if "eval/before" in m]
    steps = [{"step": 0, "completions_generated": 0, "eval/acc": acc} for acc in before[:1]] + steps
    told += [f"{name}: {what}" for what in told_here]
    return dict(name=name, about=", ".join(words), steps=steps)


def samples_of(folder, room, told):
    """
    Samples by step, and their clips: of every n-th sampled step, counted from the last, so many that they
    fit into `room` bytes.

    returns   samples: list of (step, list of groups, a prompt each); clips: {prompt_id: frames and sounds}
    """
    told_here, by_step, size = [], {}, {}
    for item, length in read_lines(folder / "samples.jsonl", told_here):
        groups = by_step.setdefault(item["step"], {})
        key = (item.get("kind", "fresh"), str(item.get("prompt_id")))
        groups.setdefault(key, []).append(item)
        size[item["step"]] = size.get(item["step"], 0) + length
    clips, length_of = {}, {}
    if by_step:
        for item, length in read_lines(folder / "clips.jsonl", told_here):
            clips[str(item.get("prompt_id"))] = {k: item.get(k) or [] for k in ("frames", "sounds")}
            length_of[str(item.get("prompt_id"))] = length
    every, steps = 1, sorted(by_step)
    while True:
        chosen = steps[::-1][::every][::-1]
        prompts = {q for step in chosen for _, q in by_step[step]} & clips.keys()
        if sum(size[s] for s in chosen) + sum(length_of[q] for q in prompts) < room or every > len(
            steps
        ):
            break
        every *= 2
    if every > 1:
        told_here.append(
            f"of {len(steps)} sampled steps one in {every} is shown: the page has its bound"
        )
    if any("tokens" not in item for step in chosen for g in by_step[step].values() for item in g):
        told_here.append("samples of an older version: without tokens, their weights and ratios")
    told += told_here
    return dict(
        samples=[[step, list(by_step[step].values())] for step in chosen],
        clips={q: clips[q] for q in prompts},
    )


# ---- curves ------------------------------------------------------------------------------------


def thinned(run, names):
    """
    -> axes: step, completions, seconds of every row that is kept; series: {metric: rows, values, and of a
    noisy one rows and values of its running mean}. A row is a step at which one of the curves has a point.
    """
    steps, series = run["steps"], {}
    for name in sorted(names):
        values = np.array([number(m.get(name)) for m in steps])
        if len(at := np.flatnonzero(np.isfinite(values))):
            series[name] = [extremes(at, values[at]), *smooth(at, values[at])], values
    rows = np.unique(
        np.concatenate(
            [np.zeros(0, int), *(at for parts, _ in series.values() for at in parts[:2])]
        )
    )
    axes = dict(
        step=np.array([m["step"] for m in steps]),
        completions=np.array([number(m.get("completions_generated")) for m in steps]),
        seconds=np.cumsum([seconds(m) for m in steps]),
    )
    return dict(
        name=run["name"],
        about=run["about"],
        last=steps[-1]["step"] if steps else 0,
        axes={name: listed(x[rows], 7) for name, x in axes.items() if steps},
        series={
            name: [
                np.searchsorted(rows, at).tolist(),
                listed(values[at]),
                np.searchsorted(rows, mid).tolist(),
                listed(means),
            ]
            for name, ((at, mid, means), values) in series.items()
        },
    )


def number(value):
    return float(value) if isinstance(value, (int, float)) else np.nan


def seconds(m):
    """What a step took, evaluation and checkpoints apart."""
    if number(m.get("tokens_per_s")) > 0 and "num_valid_tokens" in m:
        return m["num_valid_tokens"] / m["tokens_per_s"]
    names = (
        ["time/step_s"]
        if "time/step_s" in m
        else [f"time/{part}_s" for part in ("data", "rollout", "update")]
    )
    return float(np.nansum([number(m.get(name)) for name in names]))


def extremes(at, values):
    """Of POINTS / 2 stretches of a curve the places of the least and the greatest value: no spike is lost."""
    if len(at) <= POINTS:
        return at
    parts = np.array_split(np.arange(len(at)), POINTS // 2)
    kept = [part[pick(values[part])] for part in parts for pick in (np.argmin, np.argmax)]
    return at[np.unique([0, *kept, len(at) - 1])]


def smooth(at, values):
    """The mean over a stretch around each of some places -> places, means; none of a short or steady curve."""
    width = len(at) // SMOOTH
    if width < 2 or (np.diff(values) >= 0).all():
        return at[:0], values[:0]
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.unique(np.linspace(0, len(at) - 1, min(len(at), 6 * SMOOTH)).astype(int))
    low, high = np.maximum(middle - width, 0), np.minimum(middle + width + 1, len(at))
    return at[middle], (sums[high] - sums[low]) / (high - low)


def spans_decades(curves, names):
    values = [
        y for curve in curves for name in names for y in curve["series"].get(name, [0, []])[1]
    ]
    low = (
        np.percentile(values, 5) if values else 0
    )  # a first step of almost nothing would stretch the axis
    return bool(low > 0 and max(values) > DECADES * low)


def listed(values, digits=4):
    """Numbers for JSON; what is none of them is null."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in values.tolist()]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.add_argument("run", help="folder of a run, finished or not")
    parser.add_argument(
        "--against", metavar="RUN", help="another run, whose curves are drawn beside"
    )
    return parser.parse_args(argv)


def main():
    args = parse_args()
    for folder in filter(None, (args.run, args.against)):
        if not any((Path(folder) / name).is_file() for name in ("run.json", *LOGS)):
            raise UserError(
                f"{folder} is no folder of a run: neither run.json nor metrics.jsonl is there"
            )
    print(write(args.run, args.against))


if __name__ == "__main__":
    run_main(main)
