"""
Statistics of learning curves: accuracy at a number of completions, area, t intervals, power.

A curve is a list of (completions generated, held-out accuracy), the first at 0. Intervals are 95 % t
intervals over seeds: with five seeds a percentile bootstrap covers 84 %, this one 95 %. Differences
are paired by seed. Numpy only.
"""

from functools import cache

import numpy as np

ZERO_BINS = {0.1: slice(29, 31), 0.3: slice(27, 33)}  # bins of advantage_hist with |A| below


# ---- one curve ---------------------------------------------------------------------------------


def accuracy_at(curve, completions):
    """Accuracy of the evaluation nearest to that number of completions; nothing is interpolated."""
    return min(curve, key=lambda point: abs(point[0] - completions))[1]


def area(curve, end):
    """Mean accuracy over the completions from 0 to end: the area under the curve / end."""
    curve = np.asarray(curve, dtype=float)
    x = np.unique([*curve[curve[:, 0] < end, 0], end])
    return float(np.trapezoid(np.interp(x, *curve.T), x) / end)


def mean_curve(curves):
    """
    The mean of several curves at the points of all, each interpolated between its own; for figures.

    curves   list of (k, 2) array-likes: completions, accuracy
    returns  (K, 2) array, as far as the shortest curve goes
    """
    curves = [np.asarray(curve, dtype=float) for curve in curves]
    end = min(curve[-1, 0] for curve in curves)
    x = np.unique([x for curve in curves for x in curve[:, 0] if x <= end])
    mean = np.mean([np.interp(x, *curve.T) for curve in curves], axis=0)
    return np.stack([x, mean], axis=1)


# ---- intervals ---------------------------------------------------------------------------------


@cache
def t_quantile(p, df):
    """
    Quantile of Student's t distribution: P(T <= t) = p.

    With T = sqrt(df) tan(angle) the density of the angle is proportional to cos(angle) ** (df - 1).
    """
    angle = np.linspace(-np.pi / 2, np.pi / 2, 50_001)
    density = np.cos(angle) ** (df - 1)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(df) * np.tan(np.interp(p, cumulative / cumulative[-1], angle)))


def t_interval(values):
    """-> mean, low, high: 95 % t interval; one value has none: nan"""
    values = np.asarray(values, dtype=float)
    mean = values.mean()
    if len(values) < 2:
        return mean, np.nan, np.nan
    half = t_quantile(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return mean, mean - half, mean + half


def same_command_spread(groups):
    """
    The floor of a table: two means of equally many seeds of one and the same command differ by less
    than this in 95 % of cases, from the standard deviation between seeds.

    groups   list of lists of values, each of one command's seeds
    returns  the half-width for the smallest group; nan if no group has two seeds
    """
    groups = [np.asarray(group, dtype=float) for group in groups if len(group) > 1]
    if not groups:
        return np.nan
    df = sum(len(group) - 1 for group in groups)
    variance = sum(group.var(ddof=1) * (len(group) - 1) for group in groups) / df
    num_seeds = min(len(group) for group in groups)
    return t_quantile(0.975, df) * np.sqrt(variance * 2 / num_seeds)


def seeds_needed(differences, effect, power=0.8):
    """Seeds for a paired t test at 5 % to see `effect` with this power, from the measured spread."""
    sd = np.std(differences, ddof=1)
    for num_seeds in range(3, 1000):
        df = num_seeds - 1
        quantiles = t_quantile(0.975, df) + t_quantile(power, df)
        if quantiles * sd / np.sqrt(num_seeds) <= effect:
            return num_seeds
    return 1000


# ---- results as runs.py leaves them ------------------------------------------------------------


def by_label(result):
    """-> {label: its runs, by seed}, labels in the order of the commands; without runs: not there."""
    runs = {label: [] for label in result["commands"]}
    for one in sorted(result["runs"], key=lambda one: one["seed"]):
        runs[one["label"]].append(one)
    return {label: label_runs for label, label_runs in runs.items() if label_runs}


def last_common(result):
    """Completions that every run has made."""
    return min(one["accuracy"][-1][0] for one in result["runs"])


def paired(runs, label, reference, value):
    """-> differences value(run of label) - value(run of reference) for the seeds that both have."""
    base = {one["seed"]: value(one) for one in runs[reference]}
    return [value(one) - base[one["seed"]] for one in runs[label] if one["seed"] in base]


def mean_series(runs, name):
    """Mean of a metric over all steps and runs."""
    return float(np.mean([np.mean(one["series"][name]) for one in runs]))


def small_advantages(runs, below):
    """Share of the completions trained on with |A| < below; zeros, which have no bin, are added."""
    zero = mean_series(runs, "advantage_zero_frac")
    if below == 0:
        return zero
    counts = np.sum([one["advantage_hist"] for one in runs], axis=0)
    return float(zero + (1 - zero) * counts[ZERO_BINS[below]].sum() / max(counts.sum(), 1))


def hint_visits(hinted_run):
    """
    Visits of all prompts that ever got a hint in a run, also of those whose hint stayed.

    returns  list of (phase, step, prompt_id, right); phase: "before it enters", "with it",
             "plain, after it entered"
    """
    entered = {}  # prompt_id -> the step at which its hint first entered
    for step, event, prompt_id in hinted_run["hint_events"]:
        if event == "entered":
            entered.setdefault(prompt_id, step)
    visits = []
    for step, prompt_id, hinted, right in hinted_run["visits"]:
        if prompt_id not in entered:
            continue
        if hinted:
            phase = "with it"
        elif step < entered[prompt_id]:
            phase = "before it enters"
        else:
            phase = "plain, after it entered"
        visits.append((phase, step, prompt_id, right))
    return visits


def length_gains(result, edges):
    """
    Fig. 6: accuracy with TAS minus without, by the length of the reasoning without.

    edges    tokens; the last bin is open
    returns  list of (name, number of items, mean gain, low, high); intervals over seeds
    """
    runs = by_label(result)
    pairs = list(zip(runs["uniform"], runs["parabolic"]))
    rows = []
    for low, high in zip(edges, [*edges[1:], np.inf]):
        gains = []  # of each seed: the mean gain of the bin's items
        num_items = 0
        for plain, shaped in pairs:
            lengths = np.array([length for length, _ in plain["items"]])
            plain_scores = np.array([score for _, score in plain["items"]])
            shaped_scores = np.array([score for _, score in shaped["items"]])
            in_bin = (lengths > low) & (lengths <= high)
            num_items += int(in_bin.sum())
            if in_bin.any():
                gains.append((shaped_scores - plain_scores)[in_bin].mean())
        if gains:
            name = f"{low + 1}–{high}" if np.isfinite(high) else f"over {low}"
            rows.append((name, num_items, *t_interval(gains)))
    return rows
