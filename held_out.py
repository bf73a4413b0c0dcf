"""
Accuracy on held-out rows while training goes on: sampled as in training, on all ranks.
"""

import run  # before torch: it sets how torch's threads wait

import data
import model
import rewards

BATCH = 32  # held-out prompts decoded together, on each rank


def accuracy(policy, load, rows, build, args):
    """
    Share of right answers among --eval-samples completions, sampled as in training.

    load      callable(row) -> Prompt, raises BadRow: such a row is named, and its share is wrong
    """
    count = min(len(rows), args.eval_samples)
    per_row, right, told = max(1, round(args.eval_samples / count)), 0, []
    for first in range(0, count, BATCH * run.world_size()):  # as many rounds on every rank
        places, batch = range(count)[first + run.rank() :: run.world_size()][:BATCH], []
        for i in places:
            try:
                row = rows[i]
                batch.append((row, load(row), per_row, run.seed(args.seed, 0, i)))
            except data.BadRow as problem:
                told.append(str(problem))
        batch = batch or [(None, build.filler, 1, 0)]  # FSDP: no rank may stay away
        taken, prompts, counts, seeds = zip(*batch)
        rolled = model.rollout(
            policy, prompts, counts, args.temperature, args.max_new_tokens, build.eos_ids, seeds
        )
        for row, group in zip(taken, rolled):
            for text in build.texts(group) if row else ():
                truth = (row["answer"], row["answer_type"], row.get("options"))
                right += rewards.accuracy_reward(rewards.parse_answer(text), *truth) == 1
    for problem in [line for part in run.gather(told) for line in part]:
        run.print0(f"held-out, counted as wrong: {problem}")
    return sum(run.gather(right)) / (count * per_row)
