"""
What the experiments compare and no flag offers: train_rl.py with one function or class exchanged.

    python -m experiments.variants never-withdrawn --stage 3 ...
"""

import run.before_torch  # noqa: F401  must come before torch

import hashlib
import json
import os
import sys
import zlib
from pathlib import Path

import torch

import buffer
import hints
import toy
import train_rl
from data.clip_cache import CachedClip, ClipCache
from data.clips import BadRow
from data.rows import clip_of
from models.inputs import Prompt
from run.errors import UserError
from run.io import REPOSITORY
from run.launch import run_main
from training import held_out

# ---- hints -------------------------------------------------------------------------------------


class NeverWithdrawn(hints.HintSchedule):
    """A hint that has entered stays (every second visit is plain, as always)."""

    def observe(self, prompt_id, tier, solved, behavior_kl):
        if prompt_id in self._active:
            tier, solved = "hard", False
        return super().observe(prompt_id, tier, solved, behavior_kl)


class ByRank(hints.HintSchedule):
    """Being Hard alone decides, whether the prompt is solved or not."""

    def needs_kl(self, prompt_id, tier, solved):
        return super().needs_kl(prompt_id, tier, False)

    def observe(self, prompt_id, tier, solved, behavior_kl):
        return super().observe(prompt_id, tier, False, behavior_kl)


class NotingBuffer(buffer.ReplayBuffer):
    """Notes every visit of a prompt in OUT/visits.jsonl: the share of right fresh completions."""

    def add(self, entries):
        super().add(entries)
        groups = {}  # prompt_id -> its fresh completions
        for entry in entries:
            groups.setdefault(entry.prompt_id, []).append(entry)
        path = Path(train_rl.parse_args()[0].out) / "visits.jsonl"
        with open(path, "a") as file:
            for prompt_id, group in groups.items():
                num_right = sum(entry.reward_parts["acc"] == 1 for entry in group)
                visit = {
                    "step": group[0].born_step,
                    "prompt_id": prompt_id,
                    "hinted": group[0].hinted,
                    "right": num_right / len(group),
                }
                file.write(json.dumps(visit) + "\n")


# ---- judges ------------------------------------------------------------------------------------

true_judge = toy.judge  # before it is exchanged


def wrong_judge(row, steps):
    """The toy's judge, with the score of a fixed fifth of all steps reversed."""
    scores = true_judge(row, steps)
    for i, step in enumerate(steps):
        key = zlib.crc32(f"{row['prompt_id']} {i} {step}".encode())
        if key % 1000 < 200:
            scores[i] = 1 - scores[i]
    return scores


def form_judge(row, steps):
    """Likes every step that names a second, true or not: the control for a judge of true steps."""
    scores = []
    for step in steps:
        number, colon, _ = step.partition(":")
        scores.append(float(bool(colon) and number.strip().isdecimal()))
    return scores


# ---- what is replayed --------------------------------------------------------------------------


def newest(items, mean_reward, num_off):
    """A stored prompt's latest completions, whatever they earned (RePO's recency)."""
    latest_first = sorted(items, reverse=True)
    return [item.entry for item in latest_first[:num_off]]


def best(items, mean_reward, num_off):
    """A stored prompt's best completions, the newest of equals (as ExGRPO's are right ones)."""
    best_first = sorted(items, key=lambda item: (item.entry.reward, item), reverse=True)
    return [item.entry for item in best_first[:num_off]]


def learnability(items, mean_reward):
    """A prompt's weight in the draw: p (1 - p), p the share of its stored completions that are right."""
    p = sum(item.entry.reward_parts["acc"] == 1 for item in items) / len(items)
    return p * (1 - p)


# ---- time --------------------------------------------------------------------------------------


class KeptClips(ClipCache):
    """
    Keeps what frozen towers make of a clip in runs/experiments/features, for all runs: the same numbers,
    but a Whisper takes longer to hear 250 clips than a run takes to train.
    """

    def __init__(self, *args):
        super().__init__(*args)
        digest = hashlib.sha1(f"{self.builder.root.resolve()} {self.builder.media_config}".encode())
        for tower in self.encoder.towers:
            for tensor in tower.state_dict().values():
                digest.update(tensor.numpy().tobytes())
        self.folder = REPOSITORY / "runs/experiments/features" / digest.hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, clip):
        return self.folder / f"{hashlib.sha1(repr(clip).encode()).hexdigest()}.pt"

    def prefetch(self, row):
        if not self.path(clip_of(row)).exists():
            super().prefetch(row)

    def _read(self, clip, row):
        path = self.path(clip)
        if not path.exists():
            return super()._read(clip, row)
        prompt_id, prompt = torch.load(path, weights_only=True)
        cached = CachedClip(prompt_id, Prompt(**prompt))
        self._keep(clip, cached)
        return cached

    def _keep(self, clip, cached):
        super()._keep(clip, cached)
        path = self.path(clip)
        if cached.prompt.is_encoded and not path.exists():
            part = path.with_suffix(f".{os.getpid()}")  # another run may write the same
            torch.save((cached.prompt_id, cached.prompt._asdict()), part)
            part.rename(path)


VARIANTS = {  # name -> module, what is exchanged in it, by what
    "never-withdrawn": (hints, "HintSchedule", NeverWithdrawn),
    "by-rank": (hints, "HintSchedule", ByRank),
    "visits": (train_rl, "ReplayBuffer", NotingBuffer),
    "wrong-judge": (toy, "judge", wrong_judge),
    "form-judge": (toy, "judge", form_judge),
    "newest": (buffer, "_most_informative", newest),
    "best": (buffer, "_most_informative", best),
    "learnability": (buffer, "_draw_weight", learnability),
    "kept-features": (train_rl, "ClipCache", KeptClips),
}


def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 else None
    if name not in VARIANTS:
        raise UserError(f"give one of {', '.join(VARIANTS)}, then the flags of train_rl.py")
    module, attribute, replacement = VARIANTS[name]
    setattr(module, attribute, replacement)
    if name == "kept-features":
        held_out.ClipCache = KeptClips
    train_rl.main()


if __name__ == "__main__":
    run_main(main, BadRow)
