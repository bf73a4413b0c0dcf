"""
What an evaluation reports: scores of each benchmark, paired differences, what each sense is worth,
the printed table and the paper's tables in Markdown. A folder is an `--out` of eval.py.
"""

import json
from pathlib import Path

from evaluation import benchmarks, scores
from run.errors import UserError

# what two evaluations must share to be compared like with like
RECIPE_KEYS = (
    "protocol",
    "template",
    "system",
    "instructions",
    "recipe",
    "temperature",
    "max_new_tokens",
    "audio_captions",
    "dtype",
)


# ---- folders -----------------------------------------------------------------------------------


def read_records(folder):
    """The records in a folder; those of an interrupted evaluation also from each rank's file."""
    records = {}
    for path in sorted(Path(folder).glob("records*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):  # a killed process cuts the last line
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                why = f"a line of its records is not JSON ({error})"
                raise UserError(f"{folder}: {why}: remove the line") from None
            # a process killed between two writes leaves a record in both files
            records[record["file"], record["prompt_id"]] = record
    return list(records.values())


def read_recipe(folder):
    path = Path(folder) / "recipe.json"
    return json.loads(path.read_text()) if path.exists() else {}


def recipe_changes(recipe, folder, *more_keys):
    """Keys of the recipe (and more) whose values differ from those of the folder's recipe."""
    before = read_recipe(folder)
    recipe = json.loads(json.dumps(recipe))  # tuples become lists, as in the file
    changes = []
    for key in (*more_keys, *RECIPE_KEYS):
        if key in before and key in recipe and before[key] != recipe[key]:
            changes.append(key)
    return changes


# ---- scores ------------------------------------------------------------------------------------


def mean_settings(name):
    """The keyword arguments that say how the score of a file or benchmark is a mean."""
    if name not in benchmarks.BENCHMARKS:
        return {}
    benchmark = benchmarks.BENCHMARKS[name]
    return dict(macro=benchmark.macro, shares=benchmark.shares)


def summarize_all(records, seed):
    """-> {name: scores.summarize(...)}: "all" files together, each file, each benchmark."""
    by_name = {}
    for record in records:
        by_name.setdefault(record["file"], []).append(record)
    files = [name for name in by_name if name not in benchmarks.BENCHMARKS]
    summaries = {}
    if files:
        summaries["all"] = scores.summarize(with_unique_clips(by_name, files), seed)
    for name in [*files, *benchmarks.BENCHMARKS]:
        if name in by_name:
            summaries[name] = scores.summarize(by_name[name], seed, **mean_settings(name))
    return summaries


def with_unique_clips(by_name, files):
    """The records of all files; clips of one name in two folders are two clips."""
    records = []
    for name in files:
        folder = Path(name).parent
        records += [r | dict(clip=str(folder / str(r["clip"]))) for r in by_name[name]]
    return records


def compare_all(records, baseline, seed):
    """-> {name: paired difference} on the items that both hold."""
    differences = {}
    for name in dict.fromkeys(r["file"] for r in records):
        ours = [r for r in records if r["file"] == name]
        theirs = [r for r in baseline if r["file"] == name]
        difference = scores.compare(ours, theirs, seed, **mean_settings(name))
        if difference:
            differences[name] = difference
    return differences


# ---- the printed table of one evaluation -------------------------------------------------------


def print_scores(result):
    columns = f"{'n':>5} {'score':>7} {'95 % interval':>16} {'failures':>9} {'not scored':>10}"
    print(f"{'':42} {columns}")
    names = list(result["scores"])
    if len(names) == 2 and names[0] == "all":  # one file: its lines would be those of "all" again
        names = names[:1]
    for name in names:
        summary = result["scores"][name]
        print_line(name, summary, f" {summary['failures']:9d} {summary['not_scored']:10d}")
        for key in ("item_mean", *scores.MEANS):
            if key in summary:
                print_line(f"  {key.replace('_', ' ')}", summary[key])
        if "mae" in summary:
            errors = f"{summary['mae']:.3f}, root mean square {summary['rmse']:.3f}"
            print(f"  mean absolute error {errors}")
        for group, values in summary["groups"].items():
            for value, part in values.items():
                print_line(f"  {group}: {value}", part)
    for name, difference in result.get("baseline", {}).items():
        label = f"{name} minus {result['arguments']['baseline']}"
        interval = scores.interval(difference, "+.3f")
        n, score = difference["n"], difference["score"]
        print(f"{label[-42:]:42} {n:5d} {score:+7.3f} {interval:>16} {scores.dagger(difference)}")


def print_line(name, summary, more=""):
    score = "-" if summary["score"] is None else f"{summary['score']:.3f}"
    print(f"{name[-42:]:42} {summary['n']:5d} {score:>7} {scores.interval(summary):>16}{more}")


# ---- tables of several evaluations -------------------------------------------------------------


def print_tables(folders, seed):
    """
    Prints the paper's tables in Markdown: points of 100, and the paired difference to the first
    folder; then, if one of the evaluations took a sense away, what each sense is worth.
    """
    records = {folder: read_records(folder) for folder in folders}
    summaries = {folder: summarize_all(records[folder], seed) for folder in folders}
    first = folders[0]
    differences = {f: compare_all(records[f], records[first], seed) for f in folders[1:]}

    for title, names in table_columns(summaries).items():
        titles = [getattr(benchmarks.BENCHMARKS.get(name), "title", name) for name in names]
        rows = []
        for folder in folders:
            row = [str(folder)]
            for name in names:
                difference = differences.get(folder, {}).get(name)
                row.append(cell(name, summaries[folder], summaries[first], difference))
            rows.append(row)
        print(scores.markdown(title, titles, rows))

    if any(senses_removed(folder) for folder in folders):
        print_senses(folders, records, summaries, differences)
    for folder in folders:
        if any(Path(folder).glob("records-*.jsonl")):
            print(f"not finished: {folder}")
        changes = recipe_changes(read_recipe(first), folder)
        if changes:
            print(f"not like with like: other {', '.join(changes)} in {folder} than in {first}")


def table_columns(summaries):
    """-> {title: names of the benchmarks and files that one of the folders holds}."""
    names = {name for summary in summaries.values() for name in summary}
    tables, in_paper = {}, set()
    for title, columns in benchmarks.PAPER_TABLES.items():
        tables[title] = [name for name in columns if name in names]
        in_paper |= set(tables[title])
    tables["Other"] = sorted(names - in_paper - {"all"})
    return {title: columns for title, columns in tables.items() if columns}


def cell(name, summaries, first_summaries, difference):
    """A score as points of 100, its n where that is another, the paired difference."""
    if name not in summaries:
        return "not run"
    summary = summaries[name]
    if summary["score"] is None:
        return "not scored"
    text = f"{100 * summary['score']:.1f}"
    if name in first_summaries and first_summaries[name]["n"] != summary["n"]:
        text += f" n={summary['n']}"
    if difference:
        text += f" ({100 * difference['score']:+.1f}){scores.dagger(difference)}"
        if difference["n"] != summary["n"] - summary["not_scored"]:
            text += f" on n={difference['n']}"
    return text


# ---- what each sense is worth ------------------------------------------------------------------


def senses_removed(folder):
    """What the evaluation in a folder took away: some of "sound", "video"."""
    return read_recipe(folder).get("without", [])


def senses_label(without):
    if not without:
        return "full"
    return "blind (text alone)" if len(without) == 2 else f"without {without[0]}"


def print_senses(folders, records, summaries, differences):
    """Full, without one sense and blind side by side, with intervals; chance beside them."""
    rows = []
    names = list(summaries[folders[0]])
    if len(names) == 2 and names[0] == "all":  # one file: "all" says the same
        del names[0]
    for name in names:
        for folder in folders:
            summary = summaries[folder].get(name)
            if not summary or summary["score"] is None:
                continue
            difference = differences.get(folder, {}).get(name)
            change = ""
            if difference:
                interval = scores.interval(difference, "+.3f")
                change = f"{difference['score']:+.3f} ({interval}){scores.dagger(difference)}"
            rows.append(
                [
                    f"{name}: {senses_label(senses_removed(folder))}",
                    str(summary["n"]),
                    f"{summary['score']:.3f}",
                    scores.interval(summary),
                    change,
                    f"{summary['chance']:.3f}",
                ]
            )
    columns = ["n", "score", "95 % interval", f"minus {folders[0]}", "chance"]
    print(scores.markdown("Senses", columns, rows))
    for folder in folders:
        if len(senses_removed(folder)) == 2:
            print(f"{folder}: {solved_blind(records[folder])}")


def solved_blind(records):
    """One line about an evaluation without sound and without video."""
    scored = [r for r in records if r["score"] is not None]
    if not scored:
        return "no item is scored"
    num_solved = sum(r["score"] == 1 for r in scored)
    guess = sum(scores.chance(r) for r in scored) / len(scored)
    return (
        f"solved without looking or listening: {num_solved} of {len(scored)} items "
        f"({100 * num_solved / len(scored):.1f} %; a uniform guess among the options: "
        f"{100 * guess:.1f} %)"
    )
