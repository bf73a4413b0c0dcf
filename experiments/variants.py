"""
What the experiments compare or note, and no flag offers: train_rl.py with one function exchanged.

    python -m experiments.variants never-withdrawn --stage 3 ...
"""

import run.before_torch  # noqa: F401  must come before torch

import json
import sys
import zlib
from pathlib import Path

import buffer
import hints
import toy
import train_rl
from data.clips import BadRow
from run.errors import UserError
from run.launch import run_main


class NeverWithdrawn(hints.HintSchedule):
    """A hint that has entered stays (every second visit is plain, as ever)."""

    def observe(self, prompt_id, tier, solved, behavior_kl):
        if prompt_id in self._active:
            tier, solved = "hard", False
        return super().observe(prompt_id, tier, solved, behavior_kl)


class ByRank(hints.HintSchedule):
    """Hard alone decides, whether the prompt is solved or not."""

    def needs_kl(self, prompt_id, tier, solved):
        return super().needs_kl(prompt_id, tier, False)

    def observe(self, prompt_id, tier, solved, behavior_kl):
        return super().observe(prompt_id, tier, False, behavior_kl)


def wrong_judge(row, steps, share=0.2, judge=toy.judge):
    """The toy's judge, whose score of a step is turned about in a fixed fifth of all steps."""
    scores = judge(row, steps)
    keys = [zlib.crc32(f"{row['prompt_id']} {i} {step}".encode()) for i, step in enumerate(steps)]
    return [1 - s if key % 1000 < 1000 * share else s for s, key in zip(scores, keys)]


def newest(items, mean_reward, num_off):
    """Of a stored prompt its latest completions, whatever they earned (RePO's recency)."""
    return [item.entry for item in sorted(items, reverse=True)[:num_off]]


def best(items, mean_reward, num_off):
    """Of a stored prompt its best completions, the newest of equals (as ExGRPO's are right ones)."""
    ranked = sorted(items, key=lambda item: (item.entry.reward, item), reverse=True)
    return [item.entry for item in ranked[:num_off]]


def learnability(items, mean_reward):
    """A prompt's weight in the draw: p (1 - p), p the share of its stored completions that are right."""
    p = sum(item.entry.reward_parts["acc"] == 1 for item in items) / len(items)
    return p * (1 - p)


def write_visits(step, step_rows, *given, score=train_rl.score):
    """train_rl.score, which also notes every visit: OUT/visits.jsonl has the share of right fresh completions."""
    made = score(step, step_rows, *given)
    path = Path(train_rl.parse_args()[0].out) / "visits.jsonl"
    with open(path, "a") as file:
        for group in filter(None, made):
            right = sum(entry.reward_parts["acc"] == 1 for entry in group) / len(group)
            visit = dict(
                step=step, prompt_id=group[0].prompt_id, hinted=group[0].hinted, right=right
            )
            file.write(json.dumps(visit) + "\n")
    return made


VARIANTS = {
    "never-withdrawn": (hints, "HintSchedule", NeverWithdrawn),
    "by-rank": (hints, "HintSchedule", ByRank),
    "wrong-judge": (toy, "judge", wrong_judge),
    "newest": (buffer, "_farthest", newest),
    "best": (buffer, "_farthest", best),
    "learnability": (buffer, "_usefulness", learnability),
    "visits": (train_rl, "score", write_visits),
}


def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 else None
    if name not in VARIANTS:
        raise UserError(f"give one of {', '.join(VARIANTS)}, then the flags of train_rl.py")
    module, attribute, other = VARIANTS[name]
    setattr(module, attribute, other)
    train_rl.main()


if __name__ == "__main__":
    run_main(main, BadRow)
