"""
Accuracy of a model on rows, with a record of every item and an interval around every number.

    python eval.py                                                   # the toy's held-out rows
    python eval.py --model runs/stage2/final --data test.jsonl --out scores/stage2
    torchrun --nproc-per-node 8 eval.py --model M --data test.jsonl --out DIR --against scores/base

An item that cannot be read counts as wrong and is named; the denominator is the number of items.
Intervals: 95 % bootstrap over clips, since questions about one clip stand or fall together.
"""

import argparse
import json
import time
from pathlib import Path

import run  # before torch: it sets how torch's threads wait

import numpy as np
import torch
from tqdm import tqdm

import data
import model
import rewards
import toy

RESAMPLES = 2000


def parse_args(argv=None):
    formatter = type("F", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--model", help="folder or hub id (default: the toy)")
    parser.add_argument("--data", nargs="+", help="JSONL files (default: the toy's held-out rows of stages 1 to 3)")
    parser.add_argument("--out", default="scores/toy", help="folder for records.jsonl and scores.json")
    parser.add_argument("--against", metavar="DIR", help="an earlier --out: also report the paired difference")
    parser.add_argument("--resume", action="store_true", help="keep the items that --out already holds")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="enough to reason and still answer")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts decoded together")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of the bootstrap")
    parser.add_argument("--audio-captions", action=argparse.BooleanOptionalAction, default=False, help="put a row's audio_caption into its prompt")
    data.add_flags(parser)

    def overrides(first):
        if first.model is None or toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | dict(max_new_tokens=toy.OVERRIDES["rl"]["max_new_tokens"], batch_size=64)

    return run.parse(parser, argv, overrides)


def bootstrap(scores, clusters, seed):
    """
    95 % interval of a mean by resampling clusters with replacement.

    scores    (n,) float
    clusters  (n,) anything hashable: items of one cluster are drawn together
    returns   (low, high)
    """
    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums, sizes = np.bincount(index, weights=scores), np.bincount(index)
    picks = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def clip_of(record):
    return record["video"] or record["audio"] or record["prompt_id"]


def summary(records, seed):
    """-> {name: dict(n, accuracy, low, high, failures)}: all items, then by file and answer type."""
    groups = {"all": records}
    for key in ("file", "answer_type"):
        for name in sorted({r[key] for r in records}):
            groups[name] = [r for r in records if r[key] == name]
    table = {}
    for name, items in groups.items():
        scores = np.array([r["score"] for r in items], dtype=float)
        low, high = bootstrap(scores, [clip_of(r) for r in items], seed)
        failures = sum(r["failure"] is not None for r in items)
        table[name] = dict(n=len(items), accuracy=scores.mean().item(), low=low, high=high, failures=failures)
    return table


def compare(records, others, seed):
    """The paired difference on the items both hold -> dict(n, difference, low, high)."""
    other = {(r["file"], r["prompt_id"]): r["score"] for r in others}
    both = [r for r in records if (r["file"], r["prompt_id"]) in other]
    if not both:
        raise run.UserError("--against: the two folders share no item")
    delta = np.array([r["score"] - other[r["file"], r["prompt_id"]] for r in both])
    low, high = bootstrap(delta, [clip_of(r) for r in both], seed)
    return dict(n=len(both), difference=delta.mean().item(), low=low, high=high)


def read_records(folder):
    path = Path(folder) / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main():
    args, source = parse_args()
    rank, world_size, device = run.init_processes(args.device)
    out, is_main = Path(args.out), rank == 0
    done = read_records(out)
    if done and not args.resume:
        raise run.UserError(f"{out} already holds records: add --resume, or choose another --out")
    if args.against and not read_records(args.against):
        raise run.UserError(f"--against: no records in {args.against}")
    files = args.data
    if is_main and not (args.model and files):
        for stage in (1, 2, 3):
            toy.ensure(stage)
    if world_size > 1:
        torch.distributed.barrier()
    files = files or [toy.HERE / "toy" / f"stage{s}" / "test.jsonl" for s in (1, 2, 3)]
    sets = {str(f): data.Rows(f) for f in files}
    folder = str(args.model or toy.HERE / "toy" / "model")
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    policy = model.load(folder, lora_rank=0, train_towers=False, gradient_checkpointing=False).to(device, getattr(torch, dtype))
    build = model.InputBuilder(folder, data.recipe_from(args), ".", args.audio_captions)
    out.mkdir(parents=True, exist_ok=True)

    # ---- the items of this rank, read ahead, decoded together
    have = {(r["file"], r["prompt_id"]) for r in done}
    todo = [(name, rows[i]) for name, rows in sets.items() for i in range(len(rows))]
    todo = [(name, row) for name, row in todo if (name, row["prompt_id"]) not in have][rank::world_size]
    readers = {name: data.Reader(build.at(rows.path.parent), args.workers, int(args.cache_gb * 1e9)) for name, rows in sets.items()}
    batches = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    records, began = [], time.perf_counter()
    bar = tqdm(total=len(todo), desc="eval", disable=None if is_main else True)
    for k, batch in enumerate(batches):
        for name, row in batch + (batches[k + 1] if k + 1 < len(batches) else []):
            readers[name].prefetch(row)
        prompts, readable = [], []
        for name, row in batch:
            record = dict(file=name, prompt_id=row["prompt_id"], video=row.get("video"), audio=row.get("audio"),
                          prompt=data.question_text(row, None, args.audio_captions), completion=None, parsed=None,
                          truth=row["answer"], answer_type=row["answer_type"], score=0.0, failure=None)  # fmt: skip
            records.append(record)
            try:
                prompts.append(readers[name].get(row))
                readable.append((row, record))
            except data.BadRow as problem:
                record["failure"] = str(problem)
        seeds = [args.seed + i for i in range(len(prompts))]
        groups = model.rollout(policy, prompts, [1] * len(prompts), args.temperature, args.max_new_tokens, build.eos_ids, seeds) if prompts else []  # fmt: skip
        for (row, record), (completion,) in zip(readable, groups):
            text = build.tokenizer.decode(completion.ids, skip_special_tokens=True)
            answer = rewards.parse_answer(text)
            record.update(completion=text, parsed=answer)
            reward = rewards.accuracy_reward(answer, row["answer"], row["answer_type"], row.get("options"))
            record["score"] = float(reward == 1)  # right or wrong: partial credit is for training
            if answer is None:
                record["failure"] = "cut off by --max-new-tokens" if completion.truncated else "no answer found"
        bar.update(len(batch))
        bar.set_postfix(accuracy=f"{np.mean([r['score'] for r in records]):.3f}")
    bar.close()

    # ---- what every rank found
    records = done + [r for part in run.gather(records) for r in part]
    if not is_main:
        return
    run.write_text(out / "records.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    scores = dict(model=folder, recipe=data.recipe_from(args)._asdict(), temperature=args.temperature,
                  max_new_tokens=args.max_new_tokens, audio_captions=args.audio_captions, dtype=dtype,
                  commit=run.commit(), seconds=time.perf_counter() - began, scores=summary(records, args.seed))  # fmt: skip
    if args.against:
        scores["against"] = dict(folder=args.against, **compare(records, read_records(args.against), args.seed))
    run.write_text(out / "scores.json", json.dumps(scores, indent=1))
    for record in records:
        if record["failure"] and record["completion"] is None:
            print(f"wrong: {record['failure']}")
    print(f"{folder}  " + "  ".join(f"{k} {v:g}" for k, v in scores["recipe"].items()) + f"  temperature {args.temperature:g}")
    print(f"{'':42} {'n':>5} {'accuracy':>9} {'95 % interval':>16} {'failures':>9}")
    for name, s in scores["scores"].items():
        print(f"{name[-42:]:42} {s['n']:5d} {s['accuracy']:9.3f}   {s['low']:6.3f} .. {s['high']:.3f} {s['failures']:9d}")
    if args.against:
        d = scores["against"]
        mark = "" if d["low"] > 0 or d["high"] < 0 else "  †"  # the paper's mark: not significant
        print(f"{'difference to ' + args.against:42} {d['n']:5d} {d['difference']:+9.3f}   {d['low']:+6.3f} .. {d['high']:+.3f}{mark}")


if __name__ == "__main__":
    run.main_guard(main)
