"""
Records what scipy's bootstrap gives on the data of test_eval.py, for its comparison with ours:

    pip install scipy && python tests/record_scipy.py

scipy draws its resamples from numpy's generator as scores.bootstrap does, so the intervals agree to
rounding, not only within the noise of resampling.
"""

import json

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000


def data():
    """Scores of two models on 60 items about 24 clips, as test_eval.py makes them."""
    rng = np.random.default_rng(7)
    clips = rng.integers(0, 24, 60)
    return rng.random(60).round(3), rng.random(60).round(3), clips


def interval(values, clips, seed):
    names, at = np.unique(np.asarray(clips, dtype=str), return_inverse=True)
    sums, sizes = np.bincount(at, weights=values), np.bincount(at).astype(float)
    ratio = lambda s, n, axis: s.sum(axis) / n.sum(axis)  # noqa: E731
    found = bootstrap(
        (sums, sizes),
        ratio,
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return [float(x) for x in found.confidence_interval]


if __name__ == "__main__":
    ours, theirs, clips = data()
    print(
        json.dumps(
            dict(
                items=interval(ours, range(60), 0),
                clips=interval(ours, clips, 1),
                difference=interval(ours - theirs, clips, 2),
            ),
            indent=1,
        )
    )
