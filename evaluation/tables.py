"""
What an evaluation reports: scores of each benchmark, paired differences, the printed table and the
paper's tables in Markdown. A folder is an `--out` of eval.py.
"""

import json
from pathlib import Path

from data.clips import BadRow
from evaluation import benchmarks, scores

# what two runs must share, or they are not compared like with like
RECIPE = "protocol template system instructions recipe temperature max_new_tokens".split()
RECIPE += "audio_captions dtype".split()


def read_records(folder):
    """What a folder holds; of an interrupted evaluation also what each rank had done."""
    texts = [path.read_text() for path in sorted(Path(folder).glob("records*.jsonl"))]
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    try:
        records = [
            json.loads(line) for line in lines if line.endswith("\n")
        ]  # a kill cuts the last
    except ValueError as error:
        raise BadRow(f"{folder}: a line of its records is not JSON ({error}): remove it") from None
    return list({(r["file"], r["prompt_id"]): r for r in records}.values())  # or comes between two


def about(name):
    """-> the keywords that say how a set's score is a mean."""
    known = benchmarks.BENCHMARKS.get(name)
    return dict(macro=known.macro, shares=known.shares) if known else {}


def summary(records, seed):
    """-> {name: scores.summarize(...)}: each set, and all files together."""
    table, names = {}, dict.fromkeys(r["file"] for r in records)
    order = [*(n for n in names if n not in benchmarks.BENCHMARKS), *benchmarks.BENCHMARKS]
    for name in [name for name in order if name in names]:
        table[name] = scores.summarize(
            [r for r in records if r["file"] == name], seed, **about(name)
        )
    files = [r for r in records if r["file"] not in benchmarks.BENCHMARKS]
    # clips of one name in two folders are two
    files = [r | dict(clip=str(Path(r["file"]).parent / str(r["clip"]))) for r in files]
    return {"all": scores.summarize(files, seed), **table} if files else table


def recipe_changes(now, folder, *more):
    """Keys of the recipe (and more) that differ from the one that a folder was made with."""
    before, now = recipe_of(folder), json.loads(json.dumps(now))
    known = [key for key in [*more, *RECIPE] if key in before and key in now]
    return [key for key in known if before[key] != now[key]]


def recipe_of(folder):
    path = Path(folder) / "recipe.json"
    return json.loads(path.read_text()) if path.exists() else {}


def compare(records, others, seed):
    """-> {name: paired difference} on the items that both hold."""
    found = {}
    for name in dict.fromkeys(r["file"] for r in records):
        mine, theirs = ([r for r in rs if r["file"] == name] for rs in (records, others))
        if difference := scores.compare(mine, theirs, seed, **about(name)):
            found[name] = difference
    return found


def print_scores(result):
    print(f"{'':42} {'n':>5} {'score':>7} {'95 % interval':>16} {'failures':>9} {'not scored':>10}")

    def line(name, s, more=""):
        told = "-" if s["score"] is None else f"{s['score']:.3f}"
        print(f"{name[-42:]:42} {s['n']:5d} {told:>7} {scores.interval(s):>16}{more}")

    for name, s in result["scores"].items():
        line(name, s, f" {s['failures']:9d} {s['not_scored']:10d}")
        for key in ("item_mean", *scores.MEANS):
            if key in s:
                line(f"  {key.replace('_', ' ')}", s[key])
        if "mae" in s:
            print(f"  mean absolute error {s['mae']:.3f}, root mean square {s['rmse']:.3f}")
        for group, values in s["groups"].items():
            for value, part in values.items():
                line(f"  {group}: {value}", part)
    for name, d in result.get("against", {}).items():
        interval = scores.interval(d, "+.3f")
        name = f"{name} minus {result['arguments']['against']}"[-42:]
        print(f"{name:42} {d['n']:5d} {d['score']:+7.3f} {interval:>16} {scores.dagger(d)}")


def print_tables(folders, seed):
    """The paper's tables in Markdown: points of 100, and the paired difference to the first."""
    held = {folder: read_records(folder) for folder in folders}
    sets = {f: summary(records, seed) for f, records in held.items()}
    differences = {f: compare(held[f], held[folders[0]], seed) for f in folders[1:]}
    names = {name for table in sets.values() for name in table}
    tables = {t: [n for n in ns if n in names] for t, ns in benchmarks.PAPER_TABLES.items()}
    known = {n for ns in tables.values() for n in ns}
    tables["Other"] = sorted(names - known - {"all"})

    def cell(folder, name):
        score = sets[folder].get(name, {}).get("score")
        if score is None:
            return "not run" if name not in sets[folder] else "not scored"
        d, n = differences.get(folder, {}).get(name), sets[folder][name]["n"]
        told = "" if n == sets[folders[0]].get(name, {}).get("n", n) else f" n={n}"
        shared = "" if d is None or d["n"] == n - sets[folder][name]["not_scored"] else d["n"]
        more = f" ({100 * d['score']:+.1f}){scores.dagger(d)}" if d else ""
        return f"{100 * score:.1f}{told}{more}" + (f" on n={shared}" if shared else "")

    for title, columns in tables.items():
        if columns:
            titles = [getattr(benchmarks.BENCHMARKS.get(n), "title", n) for n in columns]
            rows = [[str(f), *(cell(f, name) for name in columns)] for f in folders]
            print(scores.markdown(title, titles, rows))
    for folder in folders:
        if any(Path(folder).glob("records-*.jsonl")):
            print(f"not finished: {folder}")
        if changed := recipe_changes(recipe_of(folders[0]), folder):
            print(
                f"not like with like: other {', '.join(changed)} in {folder} than in {folders[0]}"
            )
