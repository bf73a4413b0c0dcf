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

    answer, truth   canonical forms (answers.normalize_answer); answer None: none could be read
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
        answer = answer or frozenset()
        f1 = 2 * len(answer & truth) / (len(answer) + len(truth))
        return dict(score=f1, exact=exact, f1=f1)
    if scoring == "mra":
        error = np.inf if answer is None else abs(answer - truth)
        if truth:
            relative = error / abs(truth)
        else:
            relative = 0.0 if error == 0 else np.inf
        return dict(score=float((relative <= 1 - THRESHOLDS).mean()))
    if scoring == "count":
        error = abs((0 if answer is None else answer) - truth)
        near = float(answer is not None and error <= 1)
        if error > max(2 * truth, 100):
            error = 2 * truth
        return dict(score=exact, off_by_one=near, error=error)
    if scoring == "rounded":
        return dict(score=float(answer is not None and round(answer, 2) == round(truth, 2)))
    if scoring == "open":
        return dict(score=None)
    raise ValueError(f"unknown scoring {scoring!r}")


# ---- intervals -----------------------------------------------------------------------------------


def bootstrap(values, clusters, seed, groups=None, shares=None):
    """
    95 % interval of a mean, by resampling clusters with replacement: questions about one clip are
    right or wrong together.

    values    (n,) float
    clusters  (n,) anything printable: items of one cluster are drawn together
    groups    (n,) or None    if given: the mean of the groups' means, each weighted by its share
    shares    {group: weight} or None; 1 where a group has none
    returns   (mean, low, high); low and high are None where there is one cluster, which says
              nothing about another one
    """
    _, cluster = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    groups = np.asarray(["all"] * len(values) if groups is None else groups, dtype=str)
    names, group = np.unique(groups, return_inverse=True)
    weights = np.array([(shares or {}).get(str(name), 1.0) for name in names])  # (K,)

    num_clusters = cluster.max() + 1
    sums = np.zeros((num_clusters, len(names)))  # (C, K)
    sizes = np.zeros((num_clusters, len(names)))  # (C, K)
    np.add.at(sums, (cluster, group), np.asarray(values, dtype=float))
    np.add.at(sizes, (cluster, group), 1.0)

    mean = weighted_mean(sums.sum(0), sizes.sum(0), weights).item()
    if num_clusters == 1:
        return mean, None, None

    draws = np.random.default_rng(seed).integers(0, num_clusters, (RESAMPLES, num_clusters))
    # how often each cluster is in each resample: one bincount with an offset for each resample
    draws += np.arange(RESAMPLES)[:, None] * num_clusters
    counts = np.bincount(draws.ravel(), minlength=RESAMPLES * num_clusters)
    counts = counts.reshape(RESAMPLES, num_clusters)
    means = weighted_mean(counts @ sums, counts @ sizes, weights)  # (R,)
    low, high = np.percentile(means, [2.5, 97.5])
    return mean, low.item(), high.item()


def weighted_mean(sums, sizes, weights):
    """sums, sizes (..., K), weights (K,) -> (...). A group that a resample lacks does not count."""
    weights = weights * (sizes > 0)
    return (weights * sums / np.maximum(sizes, 1)).sum(-1) / weights.sum(-1)


# ---- summaries -----------------------------------------------------------------------------------


def mean_of(records, seed, key="score", macro=None, shares=None):
    """-> dict(n, score, low, high) of the records that have the measure; None if none has."""
    records = [r for r in records if r.get(key) is not None]
    if not records:
        return None
    values = [r[key] for r in records]
    clips = [r["clip"] for r in records]
    groups = [r["groups"][macro] for r in records] if macro else None
    score, low, high = bootstrap(values, clips, seed, groups, shares)
    return dict(n=len(records), score=score, low=low, high=high)


def group_values(record, name):
    """The values of a group that an item belongs to: usually one."""
    value = (record["groups"] or {}).get(name)
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def summarize(records, seed, macro=None, shares=None):
    """
    Everything about one benchmark.

    macro    the score is the mean over this group's values, weighted by `shares`; None: over items
    returns  dict: n, not_scored, failures; score, low, high (None where nothing is scored);
             chance: the score of a uniform guess; item_mean where macro is given; exact, f1,
             off_by_one, mae, rmse where defined; groups: {name: {value: dict(n, score, low, high)}}
    """
    scored = [r for r in records if r["score"] is not None]
    main = mean_of(scored, seed, "score", macro, shares) or dict(score=None, low=None, high=None)
    summary = dict(
        n=len(records),
        not_scored=len(records) - len(scored),
        failures=sum(r["failure"] is not None for r in records),
        score=main["score"],
        low=main["low"],
        high=main["high"],
        chance=float(np.mean([chance(r) for r in scored])) if scored else None,
    )
    if macro and scored:
        summary["item_mean"] = mean_of(scored, seed)
    for measure_name in MEANS:
        mean = mean_of(scored, seed, measure_name)
        if mean:
            summary[measure_name] = mean
    errors = np.array([r["error"] for r in scored if r.get("error") is not None])
    if len(errors):
        summary["mae"] = errors.mean().item()
        summary["rmse"] = np.sqrt((errors**2).mean()).item()
    summary["groups"] = summarize_groups(scored, seed)
    return summary


def summarize_groups(records, seed):
    """-> {name: {value: dict(n, score, low, high)}}"""
    groups = {}
    names = [name for r in records for name in r["groups"] or {}]
    for name in dict.fromkeys(names):
        groups[name] = {}
        for value in sorted({value for r in records for value in group_values(r, name)}):
            members = [r for r in records if value in group_values(r, name)]
            groups[name][value] = mean_of(members, seed)
    return groups


def chance(record):
    """The chance that a guess is right: 1 / options, 1/2 for yes or no, 0 for a free answer."""
    options = record.get("options")
    if record.get("answer_type") == "choice" and isinstance(options, (list, dict)) and options:
        return 1 / len(options)
    return 0.5 if record.get("answer_type") == "yesno" else 0.0


def compare(records, baseline, seed, macro=None, shares=None):
    """
    The paired difference on the items that both have scored.

    returns   dict(n, score, low, high): score is the mean of records minus baseline; None: no such
              item
    """
    baseline_scores = {r["prompt_id"]: r["score"] for r in baseline if r["score"] is not None}
    differences = []
    for r in records:
        if r["score"] is not None and r["prompt_id"] in baseline_scores:
            differences.append(r | dict(score=r["score"] - baseline_scores[r["prompt_id"]]))
    return mean_of(differences, seed, "score", macro, shares)


# ---- tables --------------------------------------------------------------------------------------


def dagger(difference):
    """The paper's mark of a difference whose interval includes zero, or is not known."""
    low, high = difference["low"], difference["high"]
    return "" if low is not None and (low > 0 or high < 0) else "†"


def interval(summary, form=".3f"):
    """An interval as text."""
    if summary["score"] is None:
        return ""
    if summary["low"] is None:
        return "one clip"
    return f"{summary['low']:{form}} .. {summary['high']:{form}}"


def markdown(title, columns, rows):
    """rows: lists of text, the first column is the row's name -> a Markdown table."""
    lines = [[title, *columns], ["---", *["---:"] * len(columns)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
