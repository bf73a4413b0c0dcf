"""
What the experiments compare and no flag offers: train_rl.py with one function exchanged.

    python -m experiments.variants never-withdrawn --stage 3 ...
"""

import sys
import zlib

import train_rl
from run import UserError, ending

import hints
import toy
from rows.clips import BadRow


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


VARIANTS = {
    "never-withdrawn": (hints, "HintSchedule", NeverWithdrawn),
    "by-rank": (hints, "HintSchedule", ByRank),
    "wrong-judge": (toy, "judge", wrong_judge),
}


def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 else None
    if name not in VARIANTS:
        raise UserError(f"give one of {', '.join(VARIANTS)}, then the flags of train_rl.py")
    module, attribute, other = VARIANTS[name]
    setattr(module, attribute, other)
    train_rl.main()


if __name__ == "__main__":
    ending.main_guard(main, BadRow)
