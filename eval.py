"""
Scores of a model on rows or on the paper's benchmarks, with a record of every item and an interval
around every number.

    python eval.py                                                   # the toy's held-out rows
    python eval.py --model runs/stage2/final --data test.jsonl --out scores/stage2
    python eval.py --model M --benchmark daily-omni --root DIR --out scores/M --html 200
    torchrun --nproc-per-node 8 eval.py --model M --benchmark all --root DIR --out scores/M
    python eval.py --model M --data test.jsonl --without sound --baseline scores/M --out scores/muted
    python eval.py --table scores/base scores/grpo scores/avatar     # the paper's tables

The score is a mean over all items; one that cannot be read counts as wrong. Intervals: 95 % bootstrap
over clips, because answers about one clip are correlated. A clip is decoded, encoded and read once for
all questions about it.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import sys
from pathlib import Path

import toy
from data.media_flags import add_media_flags, check_media_flags, media_config_from
from evaluation import benchmarks, tables
from evaluation.protocol import (
    AUTHORS_MAX_NEW_TOKENS,
    AUTHORS_QUESTIONS,
    AUTHORS_SYSTEM,
    SENSES,
    Protocol,
    read_system,
    read_text,
)
from run import arguments
from run.errors import UserError


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.usage = "%(prog)s [--flag value ...]"
    flag = parser.add_argument_group("what is evaluated").add_argument
    flag("--model", help="folder of a run or model, or hub id; without it the toy")
    flag("--data", nargs="+", help="JSONL files; without it the toy's held-out rows of all stages")
    flag(
        "--benchmark",
        nargs="+",
        choices=["all", *benchmarks.BENCHMARKS],
        metavar="NAME",
        help=f"benchmarks of the paper: all (fifteen), {', '.join(benchmarks.BENCHMARKS)}",
    )
    flag(
        "--root",
        help="folder that holds each benchmark in a folder of its name, or a single benchmark",
    )
    flag(
        "--allow-missing",
        action="store_true",
        help="score items with missing media as wrong instead of stopping",
    )

    flag = parser.add_argument_group("how it is asked").add_argument
    flag(
        "--protocol",
        default="ours",
        choices=["ours", "paper"],
        help="'paper' follows the authors' evaluation scripts",
    )
    flag("--template", metavar="FILE", help="text of the user's turn, with {question} in it")
    flag(
        "--system",
        metavar="FILE",
        help="system prompt instead of the protocol's; 'none': the model's own default",
    )
    flag(
        "--without",
        nargs="+",
        choices=SENSES,
        default=[],
        help="hide the sound, the video and images, or both (text alone) from the model",
    )
    flag(
        "--audio-captions",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="put a row's audio_caption into the prompt",
    )
    flag("--temperature", type=float, default=0.0, help="sampling temperature; 0 = greedy")
    flag("--max-new-tokens", type=int, default=2048, help="limit of reasoning and answer together")
    flag("--seed", type=int, default=0, help="random seed of sampling and of the bootstrap")

    flag = parser.add_argument_group("what is written").add_argument
    flag("--out", default="scores/toy", help="folder for records.jsonl and scores.json")
    flag("--resume", action="store_true", help="keep the items that --out already holds")
    flag("--baseline", metavar="DIR", help="an earlier --out: also report the paired difference")
    flag("--against", dest="baseline", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    flag("--html", type=int, default=0, metavar="N", help="also write a page of N items")
    flag(
        "--table",
        nargs="+",
        metavar="DIR",
        help="only print Markdown tables of these --outs, with differences to the first",
    )

    flag = parser.add_argument_group("where it computes").add_argument
    arguments.add_device_flags(flag)
    flag("--batch-size", type=int, default=16, help="prompts decoded together")
    add_media_flags(parser, keeps_clips=False)

    args, source = arguments.parse(parser, argv, overrides)
    check_media_flags(args)
    arguments.check_bounds(args, seed=0, temperature=0, batch_size=1, html=0, max_new_tokens=1)
    if args.benchmark and not args.root:
        parser.error("--benchmark needs --root, the folder that holds the benchmarks")
    if args.protocol == "paper" and (args.data or not args.benchmark):
        parser.error("--protocol paper is for --benchmark alone: the authors have other scripts")
    return args, source


def parse_or_print_tables():
    """What is answered before torch is loaded: --help, a mistake in the flags, --table."""
    args, source = parse_args()
    if args.table:
        print_tables(args.table, args.seed)
        sys.exit()
    return args, source


def print_tables(folders, seed):
    for folder in folders:
        if not tables.read_records(folder):
            raise UserError(f"--table: no records in {folder}")
    tables.print_tables(folders, seed)


def overrides(args):
    """Yields (where they come from, {flag: default}) that depend on other flags; later ones win."""
    if args.protocol == "paper":
        # 32 frames: the paper; pixels: the default of Qwen's loader; None: the limit of each script
        media = dict(fps=2.0, max_frames=32, max_pixels=768 * 28 * 28)
        yield "paper", media | dict(max_new_tokens=None)
    if not args.table and toy.is_toy(args.model):
        yield "toy", toy.OVERRIDES["media"] | dict(batch_size=64)
        if args.protocol == "ours":
            yield "toy", dict(max_new_tokens=toy.OVERRIDES["rl"]["max_new_tokens"])


if __name__ == "__main__":
    arguments.answer_early(parse_or_print_tables)

import json
import os
import time

import numpy as np
from tqdm import tqdm

from data.clips import BadRow
from data.rows import INSTRUCTIONS, SYSTEM_PROMPT, Rows
from evaluation import items
from evaluation.asking import ClipItems, answer_items
from evaluation.items_page import write_items_page
from models.inputs import InputBuilder
from models.loading import load_to_answer
from models.paths import base_model, resolve_run_dir
from run import devices, processes
from run.io import write_text
from run.launch import run_main
from run.run_dir import git_commit, lock_run_dir

# Missing media of more items than this fraction of a file (and more than 2) stop the evaluation: the
# folder is set up wrongly. Fewer are bad items, but of a benchmark's own media none may be missing.
MAX_MISSING_FRAC = 0.1


# ---- how it is asked ---------------------------------------------------------------------------


def open_protocol(args):
    """The Protocol that the flags describe; reads the files of --template and --system."""
    template = read_text("--template", args.template) if args.template else None
    if template and "{question}" not in template:
        where = "put it where the question goes"
        raise UserError(f"--template: no {{question}} in {args.template}: {where}")
    return Protocol(
        is_authors=args.protocol == "paper",
        template=template,
        system=read_system(args.system),
        audio_captions=args.audio_captions,
        without=tuple(sense for sense in SENSES if sense in args.without),
    )


def recipe_of(args, folder, protocol, dtype):
    """
    What a score depends on beside the items. It is kept with the scores, and a resumed evaluation
    must have the same.

    protocol   Protocol
    """
    folders = {str(folder), base_model(folder)}  # a hub id holds no files
    files = [path for f in folders for path in Path(f).rglob("*") if path.is_file()]
    media_limits = media_config_from(args)._asdict()
    del media_limits["side"]  # the model's, not the user's

    recipe = dict(
        model=str(folder),
        weights=max((path.stat().st_mtime for path in files), default=None),  # time of the newest
        protocol=args.protocol,
        template=protocol.template,
        without=list(protocol.without),
        recipe=media_limits,
        audio="a video's own, where it has some",
        audio_captions=protocol.audio_captions,
        temperature=args.temperature,
        seed=args.seed if args.temperature else None,  # greedy decoding draws nothing
        dtype=str(dtype),
        commit=git_commit(),
        arguments=vars(args),
        max_new_tokens=args.max_new_tokens,
        system=SYSTEM_PROMPT,
        instructions=INSTRUCTIONS,
    )
    if protocol.is_authors:
        recipe["max_new_tokens"] = args.max_new_tokens or AUTHORS_MAX_NEW_TOKENS
        recipe |= dict(system=AUTHORS_SYSTEM, instructions=AUTHORS_QUESTIONS)
    if protocol.system is not None:
        recipe["system"] = protocol.system
    return recipe


# ---- sets of items -----------------------------------------------------------------------------


def name_of(file):
    """One name for a file, however it was typed: relative if it lies below here, else absolute."""
    path = os.path.relpath(file)
    return os.path.abspath(file) if path.startswith(os.pardir) else path


def load_sets(args, toy_tests):
    """-> {name: (folder of its media, rows)} of the files, and of the benchmarks as published."""
    files = args.data or []
    if not args.data and not args.benchmark:
        files = toy_tests
    sets = {}
    for file in files:
        rows = Rows(file)
        sets[name_of(file)] = (rows.path.parent, [rows[i] for i in range(len(rows))])
    for name in chosen_benchmarks(args.benchmark or [], args.root):
        if args.protocol == "paper" and name not in AUTHORS_MAX_NEW_TOKENS:
            raise UserError(f"--protocol paper: the authors published no script for {name}")
        sets[name] = benchmarks.load(name, args.root)
    return sets


def chosen_benchmarks(names, root):
    """The names in the order of the table; of "all", those that lie in root."""
    chosen = set(names)
    if "all" in chosen:
        fifteen = [name for name in benchmarks.BENCHMARKS if not name.endswith("-ref")]
        present = [name for name in fifteen if (Path(root) / name).is_dir()]
        absent = [name for name in fifteen if name not in present]
        if not present:
            why = f"none of the fifteen is in {root}: give each a folder of its name"
            raise UserError(f"--benchmark all: {why}: {', '.join(fifteen)}")
        if absent:
            processes.print0(f"not in {root}, left out: {', '.join(absent)}")
        chosen |= set(present)
    return [name for name in benchmarks.BENCHMARKS if name in chosen]


def check_media(sets, media_config, allow_missing):
    """Stops where so many media are missing that the set-up is at fault, not single items."""
    problems = []
    for name, (folder, rows) in sets.items():
        missing = items.missing_media(folder, rows, media_config)
        is_benchmark = name in benchmarks.BENCHMARKS
        num_tolerated = 0 if is_benchmark else max(2, MAX_MISSING_FRAC * len(rows))
        if len(missing) <= num_tolerated:
            continue
        for problem in missing[:10]:
            processes.print0(f"out of reach: {problem}")
        problem = (
            f"{name}: media of {len(missing)} of {len(rows)} items are out of reach in {folder}"
        )
        problem += ", the first are above: put them there"
        if is_benchmark:
            problem += f", from {benchmarks.BENCHMARKS[name].source}"
        problems.append(problem)
    if problems and not allow_missing:
        raise UserError("; ".join(problems) + ", or count them as wrong: --allow-missing")


# ---- the run -----------------------------------------------------------------------------------


def main():
    args, _ = parse_args()
    if args.table:
        print_tables(args.table, args.seed)
        return
    device = processes.init(args.device)
    devices.check_fallback(args.device, device, processes.world_size(), toy.is_toy(args.model))
    out = Path(args.out)
    lock_run_dir(out)  # two evaluations would mix their records
    previous = tables.read_records(out)
    processes.all_gather_object(None)  # every rank has read them before one writes
    if previous and not args.resume:
        raise UserError(f"{out} already holds records: add --resume, or choose another --out")
    baseline = tables.read_records(args.baseline) if args.baseline else None
    if baseline == []:
        raise UserError(f"--baseline: no records in {args.baseline}")

    toy_model = toy.default_model(args.model)
    toy_tests = []
    if not args.benchmark:
        for stage in (1, 2, 3):
            _, _, toy_test = toy.write_defaults(stage, args.model, args.data)
            toy_tests.append(toy_test)
    folder = resolve_run_dir(args.model or toy_model)
    protocol = open_protocol(args)
    media_config = media_config_from(args)
    sets = load_sets(args, toy_tests)
    check_media(sets, media_config, args.allow_missing)

    # ---- the recipe: every score carries it, and a resumed evaluation has the same
    dtype = processes.compute_dtype(device, args.dtype)
    recipe = recipe_of(args, folder, protocol, dtype)
    if previous:
        changes = tables.recipe_changes(recipe, out, "model", "weights", "seed", "without")
        if changes:
            raise UserError(f"--resume: other {', '.join(changes)} than in {out}: another --out")

    # ---- items: an earlier record is kept if its item is the same today and was read
    by_id = {(r["file"], r["prompt_id"]): r for r in previous}
    settled = [r for r in previous if r["file"] not in sets]
    if settled:
        other_sets = dict.fromkeys(r["file"] for r in settled)
        processes.print0(f"{out} also holds {', '.join(other_sets)}")
    to_ask = {}
    for name, (_, rows) in sets.items():
        to_ask[name], settled_here = items.split_items(name, rows, by_id, protocol)
        settled += settled_here
    num_again = sum((n, r["prompt_id"]) in by_id for n, pairs in to_ask.items() for _, r in pairs)
    if num_again:
        processes.print0(f"{num_again} items are asked again: changed since, or not read then")
    processes.all_gather_object(None)
    if processes.rank() == 0:
        write_text(out / "recipe.json", json.dumps(recipe, indent=1))
        write_records(out, settled)
    processes.all_gather_object(None)

    # ---- the model
    policy = load_to_answer(folder, device, dtype)
    builder = InputBuilder(folder, media_config, ".", args.audio_captions)

    # ---- the answers to this rank's share of the clips
    clips, max_new_tokens = [], {}
    for name, pairs in to_ask.items():
        groups = sorted(items.group_by_clip(pairs), key=len)
        for group in groups[processes.rank() :: processes.world_size()]:
            clips.append(ClipItems(name, group, builder.at(sets[name][0])))
        max_new_tokens[name] = args.max_new_tokens or AUTHORS_MAX_NEW_TOKENS[name]
    start = time.perf_counter()
    answered = answer_items(
        policy,
        clips,
        protocol=protocol,
        num_samples=1,
        temperature=args.temperature,
        max_new_tokens=max_new_tokens,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    records = scored_records(
        answered, sum(len(clip.items) for clip in clips), builder, protocol, out
    )
    seconds = time.perf_counter() - start

    # ---- the scores of all ranks together
    records = settled + [r for part in processes.all_gather_object(records) for r in part]
    if processes.rank() == 0:
        result = recipe | dict(seconds=seconds)
        report(args, result, records, baseline, out)
        if args.html:
            roots = {name: root for name, (root, _) in sets.items()}
            page = out / "items.html"
            write_items_page(page, str(folder), records, roots, args.html, builder.media_config)
            print(f"wrote {page}")


def scored_records(answered, num_items, builder, protocol, out):
    """
    Scores the answers as they come and appends their records to this rank's file; -> the records.

    answered   iterator of lists of asking.Answered
    protocol   Protocol
    """
    bar = tqdm(
        total=num_items, desc="eval", dynamic_ncols=True, disable=bool(processes.rank()) or None
    )
    records = []
    with open(out / f"records-{processes.rank()}.jsonl", "a") as file:
        for batch in answered:
            for row, record, completions, problem in batch:
                if problem:
                    record["failure"] = str(problem)
                else:
                    (completion,) = completions
                    items.score_record(
                        record,
                        row,
                        builder.texts([completion])[0],
                        completion.truncated,
                        name=record["file"],
                        protocol=protocol,
                    )
                file.write(json.dumps(record) + "\n")
                records.append(record)
            file.flush()
            bar.update(len(batch))
            bar.set_postfix(score=f"{np.mean([r['score'] for r in records]):.3f}")
    bar.close()
    return records


def write_records(out, records):
    """Writes all records to one file, and removes those of single ranks."""
    write_text(out / "records.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    for path in out.glob("records-*.jsonl"):
        path.unlink()


def report(args, result, records, baseline, out):
    """Writes the records and scores.json, and prints the table."""
    hears = "sound" not in result["without"]
    videos = [r for r in records if r["video"] and r["completion"] is not None]
    num_heard = sum(bool(r["use_audio"]) for r in videos) if hears else 0
    result["scores"] = tables.summarize_all(records, args.seed)
    result["heard"] = dict(videos=len(videos), with_sound=num_heard)
    if baseline:
        result["baseline"] = tables.compare_all(records, baseline, args.seed)
    write_records(out, records)
    write_text(out / "scores.json", json.dumps(result, indent=1))

    for record in records:
        if record["failure"] and record["completion"] is None:
            print(f"wrong: {record['failure']}")
    print(f"{result['model']}  protocol {args.protocol}  commit {result['commit']}")
    limits = "  ".join(f"{name} {value:g}" for name, value in result["recipe"].items())
    decoding = f"temperature {args.temperature:g}  max_new_tokens {result['max_new_tokens']}"
    print(f"{limits}  {decoding}")
    if result["without"]:
        print(f"hidden from the model: {' and '.join(result['without'])}")
    heard_line = f"sound heard in {num_heard} of {len(videos)} videos asked about"
    if hears and num_heard < len(videos):
        heard_line += "; the others have none, or more than --max-audio-seconds"
    print(heard_line)
    tables.print_scores(result)
    if len(result["without"]) == len(SENSES):
        print(tables.solved_blind(records))
    if baseline:
        report_baseline(result, args.baseline, out)


def report_baseline(result, baseline, out):
    if not result["baseline"]:
        raise UserError(f"--baseline: {baseline} shares no item with {out}")
    changes = tables.recipe_changes(result, baseline)
    if changes:
        print(f"not like with like: other {', '.join(changes)} than in {baseline}")
    theirs = tables.senses_removed(baseline)
    if theirs != result["without"]:
        ours = tables.senses_label(result["without"])
        print(f"the difference is {ours} minus {tables.senses_label(theirs)}")


if __name__ == "__main__":
    run_main(main, BadRow)
