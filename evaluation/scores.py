"""
Scores of a benchmark's items: how an answer becomes a number, means, intervals, paired differences,
tables. Numpy only: copy this file freely.

A record is one item: dict(score, clip, groups, failure, ...); score None is "not scored", which is
neither wrong nor right. n items, C clips, R resamples, K groups.
"""

import numpy as np

RESAMPLES = 2000
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of mean relative accuracy, VSI-Bench
MEANS = ("exact", "f1", "off_by_one")  # measures that are averaged beside the score


def measure(answer, truth, scoring):
    """
    One item's measures, as its benchmark defines them.

    answer, truth   canonical forms (rewards.normalize_answer); answer None: none could be read
    scoring         "exact"    1 if they are equal
                    "f1"       of two sets of letters; `exact` beside it
                    "mra"      mean over theta = .5, .55, ... .95 of 1[|a - y| / y <= 1 - theta]
                    "count"    exact; `off_by_one`: |a - y| <= 1; `error` = |a - y|, or 2 y where
                               |a - y| > max(2 y, 100). Without an answer the error is that of 0
                    "rounded"  1 if they are equal to two decimals
                    "open"     needs a judge: not scored
    returns         dict with `score` in 0..1 or None, and what else was named
    raises          ValueError      unknown scoring
    """
    exact = float(answer is not None and answer == truth)
    if scoring == "exact":
        return dict(score=exact)
    if scoring == "f1":
        both = 0 if answer is None else len(answer & truth)
        f1 = 2 * both / (len(answer or ()) + len(truth))
        return dict(score=f1, exact=exact, f1=f1)
    if scoring == "mra":
        gap = np.inf if answer is None else abs(answer - truth)
        relative = gap / abs(truth) if truth else (0.0 if gap == 0 else np.inf)
        return dict(score=float((relative <= 1 - THRESHOLDS).mean()))
    if scoring == "count":
        gap = abs((0 if answer is None else answer) - truth)
        near = float(answer is not None and gap <= 1)
        return dict(
            score=exact, off_by_one=near, error=gap if gap <= max(2 * truth, 100) else 2 * truth
        )
    if scoring == "rounded":
        return dict(score=float(answer is not None and round(answer, 2) == round(truth, 2)))
    if scoring == "open":
        return dict(score=None)
    raise ValueError(f"unknown scoring {scoring!r}")


# ---- intervals -----------------------------------------------------------------------------------


def bootstrap(values, clusters, seed, groups=None, shares=None):
    """
    95 % interval of a mean, by resampling clusters with replacement: questions about one clip stand
    or fall together.

    values    (n,) float
    clusters  (n,) anything printable: items of one cluster are drawn together
    groups    (n,) or None    given: of the mean of the groups' means, each weighed by its share
    shares    {group: weight} or None; 1 where not given
    returns   (mean, low, high); low and high are None where there is one cluster: it says nothing
              about what another one would give
    """
    _, cluster = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    groups = np.asarray(["all"] * len(values) if groups is None else groups, dtype=str)
    names, group = np.unique(groups, return_inverse=True)
    weights = np.array([(shares or {}).get(str(name), 1.0) for name in names])  # (K,)
    sums, sizes = np.zeros((2, cluster.max() + 1, len(names)))  # (C, K) each
    np.add.at(sums, (cluster, group), np.asarray(values, dtype=float))
    np.add.at(sizes, (cluster, group), 1.0)

    def mean(sums, sizes):  # (..., K) -> (...): a group that a resample lacks has no say in it
        there = weights * (sizes > 0)
        return (there * sums / np.maximum(sizes, 1)).sum(-1) / there.sum(-1)

    whole = mean(sums.sum(0), sizes.sum(0)).item()
    if (count := len(sums)) == 1:
        return whole, None, None
    picks = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    picks += np.arange(RESAMPLES)[:, None] * count
    times = np.bincount(picks.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count)
    low, high = np.percentile(mean(times @ sums, times @ sizes), [2.5, 97.5])  # (R, K) each
    return whole, low.item(), high.item()


# ---- summaries -----------------------------------------------------------------------------------


def mean_of(records, seed, key="score", macro=None, shares=None):
    """-> dict(n, score, low, high) of the records that have the measure; None if none has."""
    records = [r for r in records if r.get(key) is not None]
    if not records:
        return None
    groups = [r["groups"][macro] for r in records] if macro else None
    values, clips = [r[key] for r in records], [r["clip"] for r in records]
    score, low, high = bootstrap(values, clips, seed, groups, shares)
    return dict(n=len(records), score=score, low=low, high=high)


def group_values(record, name):
    """The values of a group that an item belongs to: usually one."""
    value = (record["groups"] or {}).get(name)
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def summarize(records, seed, macro=None, shares=None):
    """
    Everything about one benchmark.

    macro    the score is the mean over this group's values, weighed by `shares`; None: over items
    returns  dict: n, not_scored, failures; score, low, high (None where nothing is scored);
             item_mean where macro is given; exact, f1, off_by_one, mae, rmse where defined;
             groups: {name: {value: dict(n, score, low, high)}}
    """
    scored = [r for r in records if r["score"] is not None]
    out = dict(n=len(records), not_scored=len(records) - len(scored))
    out["failures"] = sum(r["failure"] is not None for r in records)
    main = mean_of(scored, seed, "score", macro, shares) or dict(score=None, low=None, high=None)
    out |= {name: main[name] for name in ("score", "low", "high")}
    if macro and scored:
        out["item_mean"] = mean_of(scored, seed)
    for name in MEANS:
        if found := mean_of(scored, seed, name):
            out[name] = found
    errors = np.array([r["error"] for r in scored if r.get("error") is not None])
    if len(errors):
        out |= dict(mae=errors.mean().item(), rmse=np.sqrt((errors**2).mean()).item())
    out["groups"] = {}
    for name in dict.fromkeys(name for r in scored for name in r["groups"] or {}):
        values = sorted({value for r in scored for value in group_values(r, name)})
        out["groups"][name] = {
            value: mean_of([r for r in scored if value in group_values(r, name)], seed)
            for value in values
        }
    return out


def compare(records, others, seed, macro=None, shares=None):
    """
    The paired difference on the items that both have scored.

    returns   dict(n, score, low, high): score is the mean of ours minus theirs; None: no such item
    """
    other = {r["prompt_id"]: r["score"] for r in others if r["score"] is not None}
    both = [r for r in records if r["score"] is not None and r["prompt_id"] in other]
    deltas = [r | dict(score=r["score"] - other[r["prompt_id"]]) for r in both]
    return mean_of(deltas, seed, "score", macro, shares)


def dagger(difference):
    """The paper's mark of a difference whose interval includes zero, or is not known."""
    low, high = difference["low"], difference["high"]
    return "" if low is not None and (low > 0 or high < 0) else "†"


def interval(part, form=".3f"):
    """An interval as text."""
    if part["score"] is None:
        return ""
    if part["low"] is None:
        return "one clip"
    return f"{part['low']:{form}} .. {part['high']:{form}}"


def markdown(title, columns, rows):
    """rows: lists of text, the first column is the row's name -> a Markdown table."""
    lines = [[title, *columns], ["---", *["---:"] * len(columns)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
