"""
Numbers of learning curves: means, completions to a target, ratios, differences, and their intervals.

A curve is a list of (completions generated, held-out accuracy), the first at 0. Intervals: 95 %
percentile bootstrap over seeds; two labels that share seeds are resampled together.
"""

import numpy as np

FRACTIONS = (0.25, 0.5, 0.75)  # of the way from the start to the best that any method reaches
RESAMPLES = 2000
# visits of a prompt whose hint left; plain: without its hint
PHASES = (
    "plain, before it enters",
    "with it",
    "plain, in between",
    "1st after",
    "2nd",
    "3rd and later",
)


def mean_curve(curves):
    """
    The mean of several curves at the points of all, each interpolated between its own.

    curves   list of (k, 2) array-likes: completions, accuracy
    returns  (K, 2) array, as far as the shortest curve goes
    """
    curves = [np.asarray(curve, dtype=float) for curve in curves]
    end = min(curve[-1, 0] for curve in curves)
    x = np.unique([x for curve in curves for x in curve[:, 0] if x <= end])
    return np.stack([x, np.mean([np.interp(x, *curve.T) for curve in curves], axis=0)], axis=1)


def completions_to(curve, target):
    """Completions at which the curve first reaches target, linear in between; inf if never."""
    curve = np.asarray(curve, dtype=float)
    above = np.flatnonzero(curve[:, 1] >= target)
    if not len(above):
        return np.inf
    if not above[0]:
        return curve[0, 0]
    (x0, y0), (x1, y1) = curve[above[0] - 1 : above[0] + 1]
    return x0 + (target - y0) / (y1 - y0) * (x1 - x0)


def targets_of(*methods):
    """-> (start, best, accuracies at FRACTIONS of the way); each method a list of curves."""
    means = [mean_curve(curves) for curves in methods]
    start = float(np.mean([mean[0, 1] for mean in means]))
    best = float(max(mean[:, 1].max() for mean in means))
    return start, best, [start + fraction * (best - start) for fraction in FRACTIONS]


def percentile_interval(values):
    """2.5 % and 97.5 % of the first axis, without arithmetic on inf."""
    values = np.sort(np.asarray(values, dtype=float), axis=0)
    return values[int(0.025 * (len(values) - 1))], values[int(np.ceil(0.975 * (len(values) - 1)))]


def bootstrap(num_seeds, statistic, seed=0):
    """95 % interval of statistic(indices of the seeds drawn), a number or an array; one seed has none: (nan, nan)."""
    if num_seeds < 2:
        return (np.nan, np.nan)
    rng = np.random.default_rng(seed)
    picks = rng.integers(num_seeds, size=(RESAMPLES, num_seeds))
    return percentile_interval([statistic(pick) for pick in picks])


def ratio_at(slow, fast, target):
    """
    Completions that `slow` needs for target / those that `fast` needs, from their mean curves, with
    its interval over seeds; slow[i] and fast[i] share a seed.

    returns  (ratio, low, high): inf if only fast gets there, 0 if only slow does, nan if neither
    """

    def ratio(pick):
        a = completions_to(mean_curve([slow[i] for i in pick]), target)
        b = completions_to(mean_curve([fast[i] for i in pick]), target)
        return np.nan if np.isinf(a) and np.isinf(b) else a / max(b, 1)

    everyone = range(len(slow))
    even = lambda x: 1.0 if np.isnan(x) else x  # a draw in which neither gets there says nothing
    return (ratio(everyone), *bootstrap(len(slow), lambda pick: even(ratio(pick))))


def area(curve, end):
    """Mean accuracy over the completions from 0 to end: the area under the curve."""
    curve = np.asarray(curve, dtype=float)
    x = np.unique([*curve[curve[:, 0] < end, 0], end])
    return float(np.trapezoid(np.interp(x, *curve.T), x) / end)


# ---- of the JSON that runs.py leaves -----------------------------------------------------------


def by_label(result):
    """-> {label: its runs, by seed}, labels as in the commands."""
    runs = {label: [] for label in result["commands"]}
    for one in sorted(result["runs"], key=lambda one: one["seed"]):
        runs[one["label"]].append(one)
    return {label: found for label, found in runs.items() if found}


def gains(result, reference):
    """-> completions, {label: (mean, minus the reference's, low, high) of the last evaluation and of the area}"""
    runs = by_label(result)
    stop = min(one["accuracy"][-1][0] for found in runs.values() for one in found)
    values = {
        label: {one["seed"]: (one["accuracy"][-1][1], area(one["accuracy"], stop)) for one in found}
        for label, found in runs.items()
    }
    base, told = values.get(reference, {}), {}
    for label, of_seed in values.items():
        told[label] = []
        for i in (0, 1):
            gain = np.array([of_seed[seed][i] - base[seed][i] for seed in of_seed if seed in base])
            interval = bootstrap(len(gain), lambda pick: gain[pick].mean())  # noqa: B023
            mean = np.mean([v[i] for v in of_seed.values()])
            told[label].append((mean, gain.mean() if len(gain) else np.nan, *interval))
    return stop, told


def hint_phases(one):
    """Visits of the prompts whose hint left, up to where one comes back -> list of (phase, step, prompt_id, right)."""
    entered, left = {}, {}
    for step, event, q in one["hint_events"]:
        (entered if event == "entered" else left).setdefault(q, []).append(step)
    found, num_after = [], dict.fromkeys(left, 0)
    for step, q, hinted, right in one["visits"]:
        if q not in left or any(step >= again for again in entered[q][1:]):
            continue
        if step >= left[q][0]:
            phase = min(3 + num_after[q], 5)
            num_after[q] += 1
        else:
            phase = 1 if hinted else 2 * (step >= entered[q][0])
        found.append((phase, step, q, right))
    return found


def length_gains(result, edges):
    """
    Fig. 6: accuracy with TAS minus without, by the length of the reasoning without.

    edges    tokens; the last bin is open
    returns  list of (name, items, gain, low, high): the interval over seeds
    """
    runs = by_label(result)
    pairs = list(zip(runs["uniform"], runs["parabolic"]))
    rows = []
    for low, high in zip(edges, [*edges[1:], np.inf]):
        gains = []
        for plain, shaped in pairs:
            lengths, scores = map(np.array, zip(*plain["items"]))
            picked = (lengths > low) & (lengths <= high)
            gains.append(
                (np.array([s for _, s in shaped["items"]])[picked] - scores[picked]).tolist()
            )
        total = lambda pick: np.mean([g for i in pick for g in gains[i]] or [0])  # noqa: B023
        name = f"{low + 1}–{high}" if np.isfinite(high) else f"over {low}"
        items = sum(map(len, gains))
        if items:
            rows.append((name, items, total(range(len(pairs))), *bootstrap(len(pairs), total)))
    return rows
