"""
Accuracy on held-out rows while training goes on: sampled as in training, on all ranks.
"""

import rewards
from data.clip_cache import ClipCache
from data.clips import BadRow
from data.rows import Rows, answer_spec
from models.rollout import rollout
from run import optim, processes

BATCH, TOKENS = 32, 131072  # held-out prompts, and their tokens, decoded together on each rank


def evaluator(file, policy, build, room, encoder, args):
    """
    -> callable that gives the accuracy on the rows of a file; on None it gives None.

    room, encoder   of the ClipCache that keeps their clips
    """
    if not file:
        return lambda: None
    rows = Rows(file)
    clip_cache = ClipCache(build.at(rows.path.parent), room, encoder)
    return lambda: accuracy(policy, clip_cache, rows, build, args)


def accuracy(policy, clip_cache, rows, build, args):
    """
    Share of right answers among about --eval-samples completions (as many of each row), sampled as
    in training.

    clip_cache   ClipCache; a row that it cannot read is named, and its share is wrong
    """
    count = min(len(rows), args.eval_samples)
    per_row, right, bad = max(1, round(args.eval_samples / count)), 0, {}
    for first in range(0, count, BATCH * processes.world_size()):  # as many rounds on every rank
        places = range(count)[first + processes.rank() :: processes.world_size()][:BATCH]
        found, failed = {}, {}
        for i in places:
            try:
                row = rows[i]
                found[i] = (row, clip_cache.get(row))
            except BadRow as problem:
                failed[i] = str(problem)
        bad |= processes.all_gather_dict(failed)
        batch = [(*both, per_row, processes.seed(args.seed, 0, i)) for i, both in found.items()]
        packs = optim.micro_batches([len(prompt.input_ids) for _, prompt, _, _ in batch], TOKENS)
        packs = [[batch[i] for i in pack] for pack in packs]
        for part, _ in processes.even_rounds(packs, [(None, build.filler, 1, 0)]):
            taken, prompts, counts, seeds = zip(*part)
            rolled = rollout(
                policy,
                prompts,
                counts,
                temperature=args.temperature,
                max_new_tokens=args.max_new_tokens,
                eos_ids=build.eos_ids,
                seeds=seeds,
            )
            for row, group in zip(taken, rolled):
                for text in build.texts(group) if row else ():
                    answer = rewards.parse_answer(text)
                    right += rewards.accuracy_reward(answer, *answer_spec(row)) == 1
    for problem in bad.values():
        processes.print0(f"held-out, counted as wrong: {problem}")
    return sum(processes.all_gather_object(right)) / (count * per_row)
