"""
A page about a run: RUN/index.html, one file that opens without a network, also during the run.

    python -m training.page runs/stage2
    python -m training.page runs/stage2 --compare runs/grpo          # its curves beside them, dashed

The curves are drawn by matplotlib and stand in the page as SVG pictures. The samples stand in it as
data: page.js makes elements of them, so that every text of a model or a data set stays a text.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import base64
import contextlib
import hashlib
import html
import io
import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from run import arguments, processes
from run.arguments import read_run_json
from run.errors import UserError
from run.io import write_text
from run.launch import run_main
from run.run_dir import LOGS, exit_stack

LIMIT = 5_000_000  # bytes of a page
PAGE_FRAC = 0.01  # of a run's time that writing its page may take
NUM_STRETCHES = 300  # of a long curve: the least and the greatest value of each are drawn
SMOOTH = 50  # a running mean averages over 2 / SMOOTH of a curve
LOG_ABOVE = 50  # largest / small value of a panel that gets a logarithmic axis


class Panel(NamedTuple):
    """One chart."""

    title: str
    lines: dict  # metric -> its name in the legend
    help: str  # what it shows, in a sentence
    x: str = "step"  # or "completions", "seconds"


RL_PANELS = [
    Panel(
        "held-out accuracy",
        {"eval/acc": "held-out"},
        "Share of right answers on held-out rows (--eval-data).",
        "completions",
    ),
    Panel(
        "held-out accuracy by time",
        {"eval/acc": "held-out"},
        "The same, by the seconds that the steps took.",
        "seconds",
    ),
    Panel("reward", {"reward": "sum"}, "R: the weighted sum, and its parts before weighting."),
    Panel("KL, nats per token", {"kl": "KL"}, "Distance to the reference policy."),
    Panel("gradient norm", {"grad_norm": "before clipping"}, "Clipped to 1 before the step."),
    Panel(
        "nothing to learn from",
        {
            "frac_reward_zero_std": "groups of equal rewards",
            "advantage_zero_frac": "advantages of 0",
        },
        "A group of equal rewards has advantages of 0 and gives no gradient.",
    ),
    Panel(
        "stored completions by tier",
        {"buffer/frac_hard": "hard", "buffer/frac_medium": "medium", "buffer/frac_easy": "easy"},
        "Prompts are ranked by their mean reward R̄(q).",
    ),
    Panel(
        "staleness, steps",
        {"buffer/staleness_mean": "stored", "off/age_mean": "replayed"},
        "Steps since a completion was sampled.",
    ),
    Panel(
        "effective sample size", {"off/ess_frac": "replayed"}, "As a share of the replayed tokens."
    ),
    Panel(
        "largest ratio of a token",
        {"off/ratio_max": "replayed"},
        "Present policy / policy that sampled it.",
    ),
    Panel(
        "hints so far",
        {"hints/entered": "entered", "hints/withdrawn": "withdrawn"},
        "A prompt gets its hint while it stays hard and unsolved.",
    ),
    Panel(
        "prompts with a hint", {"hints/frac": "share of the step"}, "Share of the step's prompts."
    ),
    Panel(
        "standard deviation",
        {"advantage_std": "advantages", "reward_std": "rewards"},
        "Of advantages over the step; of rewards over all fresh completions.",
    ),
    Panel(
        "clipped tokens",
        {"clip_frac": "all", "off/clip_frac": "replayed"},
        "Share whose ratio was clipped: they give no gradient.",
    ),
    Panel("entropy, nats per token", {"entropy": "entropy"}, "Near 0 the policy repeats itself."),
    Panel(
        "completion length, tokens", {"completions/mean_length": "mean"}, "Of fresh completions."
    ),
    Panel(
        "completions cut off",
        {"completions/clipped_ratio": "share"},
        "They reached --max-new-tokens without an end.",
    ),
    Panel(
        "seconds of a step",
        {
            "time/data_s": "data",
            "time/rollout_s": "rollout",
            "time/update_s": "update",
            "time/judge_wait_s": "waiting for the judge",
        },
        "Evaluation and checkpoints do not count.",
    ),
]
SFT_PANELS = [
    Panel("loss, nats per token", {"loss": "loss"}, "Of the step's completion tokens."),
    Panel("gradient norm", {"grad_norm": "before clipping"}, "Clipped to 1 before the step."),
    Panel("learning rate", {"lr": "rate"}, "Warm-up, then a cosine."),
    Panel("seconds of a step", {"time/data_s": "data", "time/step_s": "all"}, "Checkpoints apart."),
]


class RunPage:
    """The page of a run in progress: written by `update`, and when the run ends for any reason."""

    def __init__(self, out):
        self.out = out
        self.due = 0.0
        if processes.rank() == 0:
            exit_stack.callback(self.write_last)

    def update(self):
        """Writes the page, but so seldom that it takes at most PAGE_FRAC of the time."""
        start_time = time.monotonic()
        if processes.rank() or start_time < self.due:
            return
        write(self.out)
        self.due = time.monotonic() + (time.monotonic() - start_time) / PAGE_FRAC

    def write_last(self):
        # what ended the run has been reported; an error of the page would add nothing
        with contextlib.suppress(OSError):
            write(self.out)


def write(folder, compare=None):
    """Writes FOLDER/index.html, with the curves of another run beside its own -> its path."""
    folder = Path(folder)
    notes = []  # what is missing or damaged
    runs = [read_run(folder, notes)]
    if compare:
        runs.append(read_run(Path(compare), notes))
    is_sft = "loss" in runs[0].metrics and "reward" not in runs[0].metrics
    panels = SFT_PANELS if is_sft else with_reward_parts(RL_PANELS, runs)
    charts = "\n".join(chart(panel, runs) for panel in panels)

    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    samples = dict(samples=[], clips={})
    if not is_sft:
        samples = read_samples(folder, LIMIT - len(charts) - len(template) - len(script), notes)
    parts = dict(
        title=html.escape(runs[0].name),
        about="".join(f"<p class='soft'>{html.escape(one.about)}</p>" for one in runs),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in notes),
        charts=charts,
        data=as_script_json(samples),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    text = re.sub(r"{(\w+)}", lambda match: parts.get(match[1], match[0]), template)
    write_text(folder / "index.html", text.encode("ascii", "xmlcharrefreplace").decode())
    return folder / "index.html"


def as_script_json(data):
    """JSON that may stand in a script element: no text in it can end the element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


# ---- what a run's folder holds, whatever is missing of it --------------------------------------


class Run(NamedTuple):
    name: str
    about: str  # its settings, in a line
    metrics: dict  # name -> (S,) float64, NaN where a step has none
    x: dict  # "step", "completions", "seconds" -> (S,) float64


def read_run(folder, notes):
    """-> Run.  notes: list of str, to which it adds what is missing"""
    name = folder.resolve().name
    about = {}
    with contextlib.suppress(ValueError):
        about = read_run_json(folder)
    settings = about.get("arguments") or {}
    if not settings:
        notes.append(f"{name}: run.json is missing or damaged")
    words = []
    for key in ("stage", "algo", "seed", "steps", "reward_weights"):
        if settings.get(key) is not None:
            words.append(f"{key} {settings[key]}")
    if about.get("commit"):
        words.append(f"commit {about['commit']}")

    steps = [item for item, _ in read_lines(folder / "metrics.jsonl", notes)]
    if not steps:
        notes.append(f"{name}: no step is logged yet")
    before = [report["eval/before"] for report in steps if "eval/before" in report]
    if before:  # the accuracy before training is the curve's first point
        steps = [{"step": 0, "completions_generated": 0, "eval/acc": before[0]}, *steps]
    metrics = {}
    for key in dict.fromkeys(key for report in steps for key in report):
        metrics[key] = np.array([as_number(report.get(key)) for report in steps])
    nothing = np.zeros(0)
    x = dict(
        step=metrics.get("step", nothing),
        completions=metrics.get("completions_generated", np.full(len(steps), np.nan)),
        seconds=np.cumsum([step_seconds(report) for report in steps]),
    )
    last = int(x["step"][-1]) if steps else 0
    return Run(name, f"{name}, at step {last}: {', '.join(words) or 'no settings'}", metrics, x)


def read_lines(path, notes):
    """-> [(object with a step, its size in a page)]; notes the lines that a kill has cut off"""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return []
    lines = path.read_bytes().splitlines()
    items = []
    for line in lines:
        with contextlib.suppress(ValueError):
            item = json.loads(line, parse_constant=lambda name: None)
            if isinstance(item, dict) and isinstance(item.get("step"), int):
                items.append((item, len(line) + 5 * line.count(b"<")))
    if len(items) < len(lines):
        notes.append(f"{path.name}: {len(lines) - len(items)} damaged lines are left out")
    return items


def read_samples(folder, limit, notes):
    """
    Samples by step, and their clips. If they need more than `limit` bytes: only every n-th sampled
    step, counted from the last.

    returns   dict   samples: list of (step, groups), a group is a list of completions of a prompt;
                     clips: {prompt_id: {"frames", "sounds"}}, data URIs
    """
    groups_of, size_of = {}, {}  # step -> {(kind, prompt_id): completions}, bytes
    for item, size in read_lines(folder / "samples.jsonl", notes):
        key = (item.get("kind", "fresh"), str(item.get("prompt_id")))
        groups_of.setdefault(item["step"], {}).setdefault(key, []).append(item)
        size_of[item["step"]] = size_of.get(item["step"], 0) + size
    clips, clip_size = {}, {}
    if groups_of:
        for item, size in read_lines(folder / "clips.jsonl", notes):
            prompt_id = str(item.get("prompt_id"))
            clips[prompt_id] = {key: item.get(key) or [] for key in ("frames", "sounds")}
            clip_size[prompt_id] = size

    stride = 1
    while True:
        steps = sorted(sorted(groups_of, reverse=True)[::stride])
        prompt_ids = {prompt_id for step in steps for _, prompt_id in groups_of[step]}
        prompt_ids &= clips.keys()
        size = sum(size_of[step] for step in steps) + sum(clip_size[q] for q in prompt_ids)
        if size < limit or len(steps) <= 1:
            break
        stride *= 2
    if stride > 1:
        notes.append(
            f"{len(steps)} of {len(groups_of)} sampled steps are shown: the page is at its limit of "
            f"{LIMIT / 1e6:g} MB"
        )
    return dict(
        samples=[[step, list(groups_of[step].values())] for step in steps],
        clips={prompt_id: clips[prompt_id] for prompt_id in prompt_ids},
    )


def as_number(value):
    return float(value) if isinstance(value, (int, float)) else np.nan


def step_seconds(report):
    """What a step took, evaluation and checkpoints apart; 0 if it is not logged."""
    tokens_per_s = as_number(report.get("tokens_per_s"))
    if "time/step_s" in report:
        return as_number(report["time/step_s"])
    if tokens_per_s > 0 and "num_valid_tokens" in report:
        return report["num_valid_tokens"] / tokens_per_s
    return 0.0


# ---- charts ------------------------------------------------------------------------------------


def with_reward_parts(panels, runs):
    """The reward panel gets a line for each part of the reward in the logs, also one of your own."""
    lines = {"reward": "sum"}
    logged = dict.fromkeys(name for one in runs for name in one.metrics)
    for name in logged:
        if name.startswith("rewards/") and not name.endswith("_frac"):
            lines[name] = name.removeprefix("rewards/")
    return [panel._replace(lines=lines) if panel.title == "reward" else panel for panel in panels]


def chart(panel, runs):
    """-> HTML of a panel: a picture, or why there is none."""
    curves = []  # (which run, place of the line in the panel, its name, x, y)
    for which, one in enumerate(runs):
        for place, (metric, name) in enumerate(panel.lines.items()):
            y = one.metrics.get(metric, np.zeros(0))
            x = one.x[panel.x][: len(y)]
            is_there = np.isfinite(y) & np.isfinite(x)
            if is_there.any():
                curves.append((which, place, name, x[is_there], y[is_there]))
    caption = (
        f"<figcaption><b>{html.escape(panel.title)}</b> {html.escape(panel.help)}</figcaption>"
    )
    if not curves:
        names = html.escape(", ".join(panel.lines))
        return f"<figure>{caption}<p class='empty'>not logged: {names}</p></figure>"
    if not any(y.any() for *_, y in curves):
        return f"<figure>{caption}<p class='empty'>0 in every step</p></figure>"
    picture = base64.b64encode(draw(panel, curves).encode()).decode()
    source = f"data:image/svg+xml;base64,{picture}"
    return f"<figure>{caption}<img alt='{html.escape(panel.title)}' src='{source}'></figure>"


def draw(panel, curves):
    """-> SVG text.  curves: of (which run, place, name, x, y)"""
    import matplotlib  # slow to load, and not every command draws
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "avatar", "font.size": 8}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.1))
        # fixed margins: to fit them to the labels would double the time
        figure.subplots_adjust(left=0.13, right=0.98, bottom=0.18, top=0.97)
        axes = figure.subplots()
        for which, place, name, x, y in curves:
            look = dict(color=f"C{place}", linestyle="--" if which else "-")
            mean = running_mean(y)
            points = thinned(y)
            marker = "o" if len(y) <= 20 else None
            if mean is None:
                axes.plot(
                    x[points], y[points], **look, linewidth=1.3, marker=marker, markersize=2.5
                )
            else:
                axes.plot(x[points], y[points], **look, linewidth=0.7, alpha=0.35)
                axes.plot(x[points], mean[points], **look, linewidth=1.6)
            if not which:
                axes.plot([], [], color=f"C{place}", label=name)
        if spans_decades([y for *_, y in curves]):
            axes.set_yscale("log")
        axes.set_xlabel(panel.x)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def thinned(y):
    """
    Indices of the points to draw: all of a short curve; of a long one the least and the greatest value
    of each of NUM_STRETCHES stretches, so that no spike is lost.
    """
    if len(y) <= 2 * NUM_STRETCHES:
        return np.arange(len(y))
    points = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), NUM_STRETCHES):
        points.add(stretch[y[stretch].argmin()])
        points.add(stretch[y[stretch].argmax()])
    return np.array(sorted(points))


def running_mean(y):
    """(S,) mean over a window around each point; None for a short or a monotonic curve."""
    half = len(y) // SMOOTH
    if half < 2 or (np.diff(y) >= 0).all():
        return None
    sums = np.concatenate([[0.0], np.cumsum(y)])
    place = np.arange(len(y))
    low = np.maximum(place - half, 0)
    high = np.minimum(place + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def spans_decades(curves):
    values = np.concatenate(curves)
    low = np.percentile(values, 5)  # a first step of almost nothing would stretch the axis
    return low > 0 and values.max() > LOG_ABOVE * low


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    hidden = argparse.SUPPRESS
    parser.add_argument("run", help="folder of a run, finished or not")
    parser.add_argument("--compare", metavar="RUN", help="another run; its curves are dashed")
    parser.add_argument("--against", dest="compare", default=hidden, help=hidden)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    for folder in (args.run, args.compare):
        if folder and not any((Path(folder) / name).is_file() for name in ("run.json", *LOGS)):
            raise UserError(
                f"{folder} is not the folder of a run: it has no run.json and no metrics.jsonl"
            )
    print(write(args.run, args.compare))


if __name__ == "__main__":
    run_main(main)
