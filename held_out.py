"""
Accuracy on held-out rows while training goes on: sampled as in training, on all ranks.
"""

import run  # before torch: it sets how torch's threads wait

import data
import model
import optim
import rewards
import stream

BATCH, TOKENS = 32, 131072  # held-out prompts, and their tokens, decoded together on each rank


def accuracy(policy, load, rows, build, args):
    """
    Share of right answers among about --eval-samples completions (as many of each row), sampled as
    in training.

    load      callable(row) -> Prompt, raises BadRow: such a row is named, and its share is wrong
    """
    count = min(len(rows), args.eval_samples)
    per_row, right, bad = max(1, round(args.eval_samples / count)), 0, {}
    for first in range(0, count, BATCH * run.world_size()):  # as many rounds on every rank
        places = range(count)[first + run.rank() :: run.world_size()][:BATCH]
        look = lambda i: ((row := rows[i]), load(row))  # noqa: E731
        found, failed = stream.read_all(look, {i: (i,) for i in places})
        bad |= failed
        batch = [(*both, per_row, run.seed(args.seed, 0, i)) for i, both in found.items()]
        packs = optim.micro_batches([len(prompt.input_ids) for _, prompt, _, _ in batch], TOKENS)
        packs = [[batch[i] for i in pack] for pack in packs]
        for part, _ in run.rounds(packs, [(None, build.filler, 1, 0)]):
            taken, prompts, counts, seeds = zip(*part)
            rolled = model.rollout(
                policy, prompts, counts, args.temperature, args.max_new_tokens, build.eos_ids, seeds
            )
            for row, group in zip(taken, rolled):
                for text in build.texts(group) if row else ():
                    answer = rewards.parse_answer(text)
                    right += rewards.accuracy_reward(answer, *data.truth(row)) == 1
    for problem in bad.values():
        run.print0(f"held-out, counted as wrong: {problem}")
    return sum(run.gather(right)) / (count * per_row)
