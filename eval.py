"""
Scores of a model on rows or on the paper's benchmarks, with a record of every item and an interval
around every number.

    python eval.py                                                   # the toy's held-out rows
    python eval.py --model runs/stage2/final --data test.jsonl --out scores/stage2
    python eval.py --model M --benchmark daily-omni --root DIR --out scores/M --html 200
    torchrun --nproc-per-node 8 eval.py --model M --benchmark all --root DIR --out scores/M
    python eval.py --table scores/base scores/grpo scores/avatar     # the paper's tables

An item that cannot be read counts as wrong and is named; the denominator is the number of items.
Intervals: 95 % bootstrap over clips, since questions about one clip stand or fall together. A clip
is decoded, encoded and read once for all questions about it.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
from pathlib import Path

import toy
from data.media_flags import add_media_flags, media_config_from
from evaluation import benchmarks
from run import arguments


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    flag, boolean = parser.add_argument, argparse.BooleanOptionalAction
    flag("--model", help="folder or hub id (default: the toy, written to toy/model)")
    flag("--data", nargs="+", help="JSONL files (default: the toy's held-out rows, all stages)")
    names = list(benchmarks.BENCHMARKS)
    flag(
        "--benchmark",
        nargs="+",
        choices=["all", *names],
        metavar="NAME",
        help=f"of the paper: all (fifteen), {', '.join(names)}",
    )
    flag(
        "--root", help="folder that holds the benchmarks, each in a folder of its name, or the one"
    )
    flag(
        "--allow-missing", action="store_true", help="go on without media that are not there: wrong"
    )
    flag(
        "--protocol", default="ours", choices=["ours", "paper"], help="paper: the authors' scripts'"
    )
    flag("--template", metavar="FILE", help="the user's turn in other words, with {question} in it")
    flag("--out", default="scores/toy", help="folder for records.jsonl and scores.json")
    flag("--against", metavar="DIR", help="an earlier --out: report the paired difference too")
    flag("--resume", action="store_true", help="keep the items that --out already holds")
    flag("--html", type=int, default=0, metavar="N", help="N items to look at, wrong ones first")
    flag(
        "--table",
        nargs="+",
        metavar="DIR",
        help="only print Markdown tables of these --outs, differences to the first",
    )
    flag("--seed", type=int, default=0, help="of sampling and of the bootstrap")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"])
    flag("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="to compute in")
    flag("--temperature", type=float, default=0.0, help="0 = greedy")
    flag("--max-new-tokens", type=int, default=2048, help="enough to reason and still to answer")
    flag("--batch-size", type=int, default=16, help="prompts decoded together")
    flag("--audio-captions", action=boolean, default=False, help="put audio_caption in the prompt")
    add_media_flags(parser, keeps_clips=False)

    def overrides(first):
        if first.protocol == "paper":  # 32 frames: the paper; pixels: the default of Qwen's loader
            limits = dict(fps=2.0, max_frames=32, max_pixels=768 * 28 * 28)
            yield "paper", limits | dict(max_new_tokens=None)  # None: the script's
        if not first.table and toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | dict(batch_size=64)
            if first.protocol == "ours":
                yield "toy", dict(max_new_tokens=toy.OVERRIDES["rl"]["max_new_tokens"])

    args = arguments.parse(parser, argv, overrides)
    arguments.check_bounds(args[0], seed=0, temperature=0, batch_size=1, html=0, max_new_tokens=1)
    if args[0].benchmark and not args[0].root:
        parser.error("--benchmark needs --root, the folder that holds the benchmarks")
    if args[0].protocol == "paper" and (args[0].data or not args[0].benchmark):
        parser.error("--protocol paper is for --benchmark alone: the authors have other scripts")
    return args


if __name__ == "__main__":
    arguments.answer_early(parse_args)

import json
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data.clip_cache import num_decoders
from data.clips import BadRow
from data.rows import INSTRUCTIONS, SYSTEM_PROMPT, Rows
from evaluation import items, items_page, protocol, tables
from models import attention
from models.inputs import InputBuilder
from models.loading import load_policy
from models.paths import base_model, resolve_run_dir
from models.rollout import rollout
from models.sharding import cast_params
from run import optim, processes
from run.errors import UserError
from run.io import write_text
from run.launch import run_main
from run.run_dir import git_commit, lock_run_dir

MANY = 0.1  # of a file's items: if the media of more (and of more than 2) are out of reach, it is no bad item


def read_template(path):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--template: {path} is not UTF-8 ({error.reason}): convert it") from None
    if "{question}" not in text:
        raise UserError(f"--template: no {{question}} in {path}: put it where the question goes")
    return text


def recipe_of(args, folder, template, dtype):
    """What a score depends on beside the items: kept with it, and the same where it is resumed."""
    folders = {str(folder), base_model(folder)}  # of a hub id no file
    inside = [path for f in folders for path in Path(f).rglob("*") if path.is_file()]
    recipe = dict(model=str(folder), protocol=args.protocol, template=template)
    recipe["weights"] = max((path.stat().st_mtime for path in inside), default=None)  # of when
    recipe["seed"] = args.seed if args.temperature else None  # greedy: only of the bootstrap
    limited = media_config_from(args)._asdict()
    del limited["side"]  # the model's
    recipe |= dict(recipe=limited, temperature=args.temperature)
    recipe |= dict(audio="a video's own, where it has some", audio_captions=args.audio_captions)
    recipe |= dict(dtype=str(dtype), commit=git_commit(), arguments=vars(args))
    if args.protocol == "paper":
        words = dict(system=protocol.SYSTEM, instructions=protocol.ASKED)
        return recipe | words | dict(max_new_tokens=args.max_new_tokens or protocol.TOKENS)
    words = dict(system=SYSTEM_PROMPT, instructions=INSTRUCTIONS)
    return recipe | words | dict(max_new_tokens=args.max_new_tokens)


# ---- sets of items -------------------------------------------------------------------------------------


def name_of(file):
    """One name of a file, however it was typed: from here if it lies below, else from the root."""
    path = os.path.relpath(file)
    return os.path.abspath(file) if path.startswith(os.pardir) else path


def load_sets(args, toy_tests):
    """-> {name: (folder of its media, rows)}: of files as they are, of benchmarks raw."""
    sets, absent = {}, []
    for file in args.data or ([] if args.benchmark else toy_tests):
        rows = Rows(file)
        sets[name_of(file)] = (rows.path.parent, [rows[i] for i in range(len(rows))])
    for name in chosen_benchmarks(args):
        if args.protocol == "paper" and name not in protocol.TOKENS:
            raise UserError(f"--protocol paper: the authors published no script for {name}")
        sets[name] = benchmarks.load(name, args.root)
    recipe = media_config_from(args)
    for name, (folder, rows) in sets.items():
        lost = items.out_of_reach(folder, rows, recipe)
        # a few of a file of one's own are bad items; many are a fault of the set-up
        if lost and (name in benchmarks.BENCHMARKS or len(lost) > max(2, MANY * len(rows))):
            for problem in lost[:10]:
                processes.print0(f"out of reach: {problem}")
            source = getattr(benchmarks.BENCHMARKS.get(name), "source", None)
            told = f"{name}: media of {len(lost)} of {len(rows)} items are out of reach in {folder}"
            told += ", the first are above: put them there" + f", from {source}" * bool(source)
            absent.append(told)
    if absent and not args.allow_missing:
        raise UserError("; ".join(absent) + ", or count them as wrong: --allow-missing")
    return sets


def chosen_benchmarks(args):
    """Names in the order of the table; of "all" those that lie in --root, the others are told."""
    chosen, known = set(args.benchmark or []), benchmarks.BENCHMARKS
    if "all" in chosen:
        fifteen = [name for name in known if not name.endswith("-ref")]
        there = [name for name in fifteen if (Path(args.root) / name).is_dir()]
        if not there:
            told = f"none of the fifteen is in {args.root}: give each a folder of its name"
            raise UserError(f"--benchmark all: {told}: {', '.join(fifteen)}")
        if absent := [name for name in fifteen if name not in there]:
            processes.print0(f"not in {args.root}, left out: {', '.join(absent)}")
        chosen |= set(there)
    return [name for name in known if name in chosen]


def answer(policy, build, name, pairs, prompts, args):
    """Asks the model about the pairs (row, record) that have a Prompt; fills in their records."""
    asked = []
    for (row, record), prompt in zip(pairs, prompts):
        if isinstance(prompt, BadRow):  # wrong, and named at the end
            record["failure"] = str(prompt)
        else:
            asked.append((row, record, prompt))
    if not asked:
        return
    authors = args.protocol == "paper"
    tokens = args.max_new_tokens or protocol.TOKENS[name]
    ids = [f"{name} {row['prompt_id']}".encode() for row, _, _ in asked]
    groups = rollout(
        policy,
        [prompt for _, _, prompt in asked],
        [1] * len(asked),
        temperature=args.temperature,
        max_new_tokens=tokens,
        eos_ids=build.eos_ids,
        seeds=[processes.seed(args.seed, zlib.crc32(i)) for i in ids],
    )
    for (row, record, _), (made,) in zip(asked, groups):
        items.judge(record, row, build.texts([made])[0], made.truncated, name, authors)


def keep(out, records):
    """Writes whole records in one file, and removes what single ranks had written."""
    write_text(out / "records.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    for path in out.glob("records-*.jsonl"):
        path.unlink()


# ---- the run -----------------------------------------------------------------------------------


def main():
    args, _ = parse_args()
    if args.table:
        for folder in args.table:
            if not tables.read_records(folder):
                raise UserError(f"--table: no records in {folder}")
        return tables.print_tables(args.table, args.seed)
    device = processes.init(args.device)
    out = Path(args.out)
    lock_run_dir(out)  # two evaluations would mix their records
    done = tables.read_records(out)
    processes.all_gather_object(None)  # every rank has looked before one writes
    if done and not args.resume:
        raise UserError(f"{out} already holds records: add --resume, or choose another --out")
    others = tables.read_records(args.against) if args.against else None
    if others == []:
        raise UserError(f"--against: no records in {args.against}")
    toy_paths = (
        []
        if args.benchmark
        else [toy.write_defaults(stage, args.model, args.data) for stage in (1, 2, 3)]
    )
    folder = resolve_run_dir(
        args.model or (toy_paths or [toy.write_defaults(1, args.model, args.data)])[0][0]
    )
    sets = load_sets(args, [test for _, _, test in toy_paths])

    # ---- the recipe: every score carries it, and what is resumed has the same
    template = args.template and read_template(args.template)
    dtype = processes.compute_dtype(device, args.dtype)
    result = recipe_of(args, folder, template, dtype)
    changed = tables.recipe_changes(result, out, "model", "weights", "seed") if done else []
    if changed:
        raise UserError(f"--resume: other {', '.join(changed)} than in {out}: another --out")

    # ---- items: what an earlier command asked is kept if it is the same today and was read
    have = {(r["file"], r["prompt_id"]): r for r in done}
    done, to_ask = [r for r in done if r["file"] not in sets], {}
    if done:
        processes.print0(f"{out} also holds {', '.join(dict.fromkeys(r['file'] for r in done))}")
    for name, (_, rows) in sets.items():
        to_ask[name], settled = items.new_items(name, rows, have, args, template)
        done += settled
    if again := sum((n, r["prompt_id"]) in have for n, asked in to_ask.items() for _, r in asked):
        processes.print0(f"{again} items are asked again: changed since, or not read then")
    processes.all_gather_object(None)
    if processes.rank() == 0:
        write_text(out / "recipe.json", json.dumps(result, indent=1))
        keep(out, done)
    processes.all_gather_object(None)

    policy = load_policy(folder, lora_rank=0, train_towers=False)
    cast_params(policy.parameters(), dtype)  # before it moves: in float32 it is twice as large
    policy.to(device)
    attention.set_attention_kernel("auto", device, dtype)
    build = InputBuilder(folder, media_config_from(args), ".", args.audio_captions)

    # ---- this rank's clips; those with as many questions are decoded together
    packs, records = [], []
    for name, asked in to_ask.items():
        groups = sorted(items.by_clip(asked), key=lambda group: len(group["items"]))
        groups = groups[processes.rank() :: processes.world_size()]
        for group in groups:
            words = lambda row, name=name: items.words_of(name, row, args, template)  # noqa: E731
            group |= dict(build=build.at(sets[name][0]), words=words)
        sizes = [len(group["items"]) for group in groups]
        for pack in optim.micro_batches(sizes, args.batch_size):
            packs.append((name, [groups[i] for i in pack]))

    total = sum(len(g["items"]) for _, pack in packs for g in pack)
    bar = tqdm(total=total, desc="eval", dynamic_ncols=True, disable=bool(processes.rank()) or None)
    began, right = time.perf_counter(), []
    path, reading = out / f"records-{processes.rank()}.jsonl", {}
    with open(path, "a") as file, ThreadPoolExecutor(num_decoders()) as pool:
        for k, (name, pack) in enumerate(packs):
            for j in range(k, min(k + 2, len(packs))):  # the next clips are read meanwhile
                if j not in reading:
                    reading[j] = [pool.submit(items.read_clip, group) for group in packs[j][1]]
            prompts = [prompt for clip in reading.pop(k) for prompt in clip.result()]
            asked = [item for group in pack for item in group["items"]]
            answer(policy, build, name, asked, prompts, args)
            new = [record for _, record in asked]
            records += new
            file.writelines(json.dumps(record) + "\n" for record in new)
            file.flush()
            right += [record["score"] for record in new]
            bar.update(len(new))
            bar.set_postfix(score=f"{np.mean(right):.3f}")
    bar.close()

    # ---- what all ranks found
    records = done + [r for part in processes.all_gather_object(records) for r in part]
    if processes.rank():
        return
    result |= dict(seconds=time.perf_counter() - began, scores=tables.summary(records, args.seed))
    videos = [r for r in records if r["video"] and r["completion"] is not None]
    result["heard"] = dict(videos=len(videos), with_sound=sum(bool(r["use_audio"]) for r in videos))
    if others:
        result["against"] = tables.compare(records, others, args.seed)
    keep(out, records)
    write_text(out / "scores.json", json.dumps(result, indent=1))
    for record in records:
        if record["failure"] and record["completion"] is None:
            print(f"wrong: {record['failure']}")
    told = "  ".join(f"{name} {value:g}" for name, value in result["recipe"].items())
    told += f"  temperature {args.temperature:g}  max_new_tokens {result['max_new_tokens']}"
    print(f"{folder}  protocol {args.protocol}  commit {result['commit']}\n{told}")
    heard = result["heard"]["with_sound"]
    why = "; the others have none, or more than --max-audio-seconds" * (heard < len(videos))
    print(f"sound heard in {heard} of {len(videos)} videos asked about{why}")
    tables.print_scores(result)
    if others and not result["against"]:
        raise UserError(f"--against: {args.against} shares no item with {out}")
    if others and (changed := tables.recipe_changes(result, args.against)):
        print(f"not like with like: other {', '.join(changed)} than in {args.against}")
    if args.html:
        roots = {name: root for name, (root, _) in sets.items()}
        items_page.write_items_page(
            out / "items.html", str(folder), records, roots, args.html, build.recipe
        )
        print(f"wrote {out / 'items.html'}")


if __name__ == "__main__":
    run_main(main, BadRow)
