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

import data
import model
import rewards
import stream
import toy

RESAMPLES = 2000


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **run.PARSER)
    flag, boolean = parser.add_argument, argparse.BooleanOptionalAction
    flag("--model", help="folder or hub id (default: the toy, written to toy/model)")
    flag("--data", nargs="+", help="JSONL files (default: the toy's held-out rows, all stages)")
    flag("--out", default="scores/toy", help="folder for records.jsonl and scores.json")
    flag("--against", metavar="DIR", help="an earlier --out: report the paired difference too")
    flag("--resume", action="store_true", help="keep the items that --out already holds")
    flag("--seed", type=int, default=0, help="of sampling and of the bootstrap")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"])
    flag("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="to compute in")
    flag("--temperature", type=float, default=0.0, help="0 = greedy")
    flag("--max-new-tokens", type=int, default=2048, help="enough to reason and still to answer")
    flag("--batch-size", type=int, default=16, help="prompts decoded together")
    flag("--audio-captions", action=boolean, default=False, help="put audio_caption in the prompt")
    data.add_flags(parser)

    def overrides(first):
        if toy.is_toy(first.model):
            tokens = toy.OVERRIDES["rl"]["max_new_tokens"]
            yield "toy", toy.OVERRIDES["media"] | dict(max_new_tokens=tokens, batch_size=64)

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
    """-> {name: dict(n, accuracy, low, high, failures)}: all, then by file and answer type."""
    groups = {"all": records}
    for key in ("file", "answer_type"):
        for name in sorted({r[key] for r in records}):
            groups[name] = [r for r in records if r[key] == name]
    table = {}
    for name, items in groups.items():
        scores = np.array([r["score"] for r in items], dtype=float)
        low, high = bootstrap(scores, [clip_of(r) for r in items], seed)
        failures = sum(r["failure"] is not None for r in items)
        table[name] = dict(
            n=len(items), accuracy=scores.mean().item(), low=low, high=high, failures=failures
        )
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
    """What a folder holds; of an interrupted evaluation also what each rank had done."""
    texts = [path.read_text() for path in sorted(Path(folder).glob("records*.jsonl"))]
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last


def score(record, row, text, truncated):
    """Fills in what the completion says: right or wrong, no partial credit here."""
    answer = rewards.parse_answer(text)
    truth = (row["answer"], row["answer_type"], row.get("options"))
    record |= dict(completion=text, parsed=answer)
    record["score"] = float(rewards.accuracy_reward(answer, *truth) == 1)
    if answer is None:
        record["failure"] = "cut off by --max-new-tokens" if truncated else "no answer found"


def main():
    args, _ = parse_args()
    device = run.init_processes(args.device)
    out = Path(args.out)
    done = read_records(out)
    run.gather(None)  # every rank has looked before one writes
    if done and not args.resume:
        raise run.UserError(f"{out} already holds records: add --resume, or choose another --out")
    if args.against and not read_records(args.against):
        raise run.UserError(f"--against: no records in {args.against}")
    toy_paths = [toy.defaults(args, stage) for stage in (1, 2, 3)]
    sets = {str(f): data.Rows(f) for f in args.data or [test for _, _, test in toy_paths]}
    folder = args.model or toy_paths[0][0]
    policy = model.load(folder, lora_rank=0, train_towers=False, gradient_checkpointing=False)
    model.cast(policy.to(device), run.compute_dtype(device, args.dtype))
    build = model.InputBuilder(folder, data.recipe_from(args), ".", args.audio_captions)
    cache = int(args.cache_gb * 1e9)
    readers = {
        name: stream.Reader(build.at(rows.path.parent), args.workers, cache)
        for name, rows in sets.items()
    }
    out.mkdir(parents=True, exist_ok=True)

    # ---- this rank's items, decoded together, the next ones read meanwhile
    have = {(r["file"], r["prompt_id"]) for r in done}
    todo = [(name, rows[i]) for name, rows in sets.items() for i in range(len(rows))]
    todo = [item for item in todo if (item[0], item[1]["prompt_id"]) not in have]
    todo = todo[run.rank() :: run.world_size()]
    records, began = [], time.perf_counter()
    bar = run.progress(0, len(todo), "eval")
    for first in range(0, len(todo), args.batch_size):
        for name, row in todo[first : first + 2 * args.batch_size]:
            readers[name].prefetch(row)
        prompts, readable = [], []
        for name, row in todo[first : first + args.batch_size]:
            record = dict(file=name, prompt_id=row["prompt_id"], video=row.get("video"))
            record |= dict(
                audio=row.get("audio"), answer_type=row["answer_type"], truth=row["answer"]
            )
            record |= dict(prompt=data.question_text(row, None, args.audio_captions))
            record |= dict(completion=None, parsed=None, score=0.0, failure=None)
            records.append(record)
            try:
                prompts.append(readers[name].get(row))
                readable.append((record, row))
            except data.BadRow as problem:  # wrong, and named below
                record["failure"] = str(problem)
            bar.update()
        seeds = [run.seed(args.seed, first, i) for i in range(len(prompts))]
        groups = model.rollout(
            policy, prompts, [1] * len(prompts), args.temperature, args.max_new_tokens,
            build.eos_ids, seeds,
        ) if prompts else []  # fmt: skip
        for (record, row), group in zip(readable, groups):
            score(record, row, build.texts(group)[0], group[0].truncated)
        with open(out / f"records-{run.rank()}.jsonl", "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records[first:])
        bar.set_postfix(accuracy=f"{np.mean([r['score'] for r in records]):.3f}")
    bar.close()

    # ---- what all ranks found
    records = done + [r for part in run.gather(records) for r in part]
    if run.rank():
        return
    result = dict(model=str(folder), commit=run.commit(), recipe=data.recipe_from(args)._asdict())
    result |= dict(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    result |= dict(audio_captions=args.audio_captions, seconds=time.perf_counter() - began)
    result["scores"] = summary(records, args.seed)
    if args.against:
        result["against"] = compare(records, read_records(args.against), args.seed)
    lines = [json.dumps(record) + "\n" for record in records]
    run.write_text(out / "records.jsonl", "".join(lines))
    for path in out.glob("records-*.jsonl"):
        path.unlink()
    run.write_text(out / "scores.json", json.dumps(result, indent=1))
    for record in records:
        if record["failure"] and record["completion"] is None:
            print(f"wrong: {record['failure']}")
    recipe = "  ".join(f"{name} {value:g}" for name, value in result["recipe"].items())
    print(f"{folder}  {recipe}  temperature {args.temperature:g}")
    print(f"{'':42} {'n':>5} {'accuracy':>9} {'95 % interval':>16} {'failures':>9}")
    for name, s in result["scores"].items():
        interval = f"{s['low']:.3f} .. {s['high']:.3f}"
        print(f"{name[-42:]:42} {s['n']:5d} {s['accuracy']:9.3f} {interval:>16} {s['failures']:9d}")
    if args.against:
        d = result["against"]
        mark = "" if d["low"] > 0 or d["high"] < 0 else " †"  # the paper's mark: not significant
        interval = f"{d['low']:+.3f} .. {d['high']:+.3f}"
        print(
            f"{'minus ' + args.against:42} {d['n']:5d} {d['difference']:+9.3f} {interval:>16}{mark}"
        )


if __name__ == "__main__":
    run.main_guard(main)
