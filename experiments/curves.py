"""
Numbers of learning curves: means, completions to a target, ratios, and their intervals.

A curve is a list of (completions generated, held-out accuracy), the first at 0. Intervals: 95 %
percentile bootstrap over seeds; two labels that share seeds are resampled together.
"""

import numpy as np

FRACTIONS = (0.25, 0.5, 0.75)  # of the way from the start to the best that any method reaches
RESAMPLES = 2000


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
    """2.5 % and 97.5 %, without arithmetic on inf."""
    values = np.sort(np.asarray(values, dtype=float))
    return values[int(0.025 * (len(values) - 1))], values[int(np.ceil(0.975 * (len(values) - 1)))]


def bootstrap(num_seeds, statistic, seed=0):
    """95 % interval of statistic(indices of the seeds drawn); one seed has none: (nan, nan)."""
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


def late(curve, end):
    """Accuracy around the end: the mean over the last quarter of the completions up to it."""
    return 4 * area(curve, end) - 3 * area(curve, 0.75 * end)
