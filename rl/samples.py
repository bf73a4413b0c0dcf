"""
What a run keeps of its completions, to be looked at: at one step in ten a few prompts with all they earned.

    OUT/samples.jsonl   a line a completion: its tokens, rewards, advantage, ratio to the policy that sampled it
    OUT/clips.jsonl     a line a prompt of these: frames and sound, small

Of a sampled step: its first prompt whose rewards differ; and of what is replayed a prompt that was sampled before,
so that completions are met fresh and again later. Where there is none, the first. Beside that, of any step, a prompt
that carries its hint for the first time. Chosen to be looked at: no fair sample. Every number is the step's own:
nothing is computed again.

G completions of a prompt.
"""

import json
import math

from data.clips import BadRow, decode_clip
from data.rows import answer_spec, question_text
from data.thumbnails import THUMBNAIL_LIMITS, clip_as_data_uris
from run import processes
from run.io import append_json

EVERY, MOST = (
    10,
    100,
)  # steps between sampled ones, at least; of a run, at most: sampled steps, prompts with hints
SOUND_BYTES = 48000  # of a clip's sound: a page holds dozens


class Samples:
    """
    out     folder of the run
    rows    Rows
    build   InputBuilder of the run
    count   steps of the run
    """

    def __init__(self, out, rows, build, count):
        self.out, self.rows, self.build = out, rows, build
        self.every = max(EVERY, -(-count // MOST))
        clips, samples = (read(out / name) for name in ("clips.jsonl", "samples.jsonl"))
        self.kept = {clip["prompt_id"] for clip in clips}  # prompts whose clip is in the file
        self.hinted = {
            s["prompt_id"] for s in samples if s["hinted"] and s.get("age") == 0
        }  # shown with it

    def write(self, step, replay, info, made, advantages, drawn, off_advantages):
        """
        Writes the samples of a step, if it is one for it; to be called before R̄(q) goes on.

        info                   as of update.joined
        made, drawn            list of lists of Entry, a prompt each: fresh, replayed
        advantages             of these: lists of (G,) tensors
        """
        if processes.rank():
            return
        fresh = [i for i, group in enumerate(made) if group]
        differ = [i for i in fresh if advantages[i].any()]
        hinted = [i for i in fresh if made[i][0].hinted and made[i][0].prompt_id not in self.hinted]
        old = [i for i, group in enumerate(drawn) if group]
        known = [i for i in old if drawn[i][0].prompt_id in self.kept]
        is_sampled = step % self.every == 1
        chosen = (differ or fresh)[:is_sampled] + hinted[: len(self.hinted) < MOST]
        for i in dict.fromkeys(chosen):
            self.write_group(step, replay, info, "fresh", made[i], advantages[i])
        for i in (known or old)[:is_sampled]:
            self.write_group(step, replay, info, "replayed", drawn[i], off_advantages[i])

    def write_group(self, step, replay, info, kind, group, advantages):
        q = group[0].prompt_id
        row = self.rows[self.rows.index(q)]
        self.hinted |= {q} if group[0].hinted and kind == "fresh" else set()
        if q not in self.kept:
            self.kept.add(q)
            append_json(self.out / "clips.jsonl", dict(step=step, prompt_id=q) | self.clip(row))
        # a group is on one rank, and info keeps its order
        is_fresh = info["fresh"].tolist()
        places = [
            i
            for i, p in enumerate(info["prompt_id"])
            if p == q and is_fresh[i] == (kind == "fresh")
        ]
        for e, advantage, i in zip(group, advantages.tolist(), places):
            sample = dict(
                step=step,
                kind=kind,
                prompt_id=q,
                prompt=question_text(row, self.build.audio_captions),
                truth=answer_spec(row)[0],
                hint=row.get("hint") if e.hinted else None,
                tier=replay.tier(q),
                mean_reward=replay.mean_reward(q),  # R̄(q), before this step
                completion=self.build.tokenizer.decode(e.completion_ids),
                tokens=pieces(self.build.tokenizer, e.completion_ids.tolist()),
                tas_weights=rounded(info["tas_weights"][i]),
                ratios=rounded(math.exp(min(x, 20)) for x in info["log_ratios"][i]),
                reward=e.reward,
                reward_parts=e.reward_parts,
                advantage=advantage,
                age=step - e.born_step,
                hinted=e.hinted,
            )
            append_json(self.out / "samples.jsonl", sample)

    def clip(self, row):
        """Frames and sounds of a row, as data URIs; none of a clip that is gone by now."""
        recipe = self.build.recipe._replace(**THUMBNAIL_LIMITS)
        try:
            frames, sounds = clip_as_data_uris(
                decode_clip(row, self.build.root, recipe), SOUND_BYTES
            )
        except BadRow:
            frames, sounds = [], []
        return dict(frames=frames[:8], sounds=sounds)


def read(path):
    """What a run that goes on has written so far; only rank 0 writes."""
    is_there = path.exists() and not processes.rank()
    return [json.loads(line) for line in path.read_text().splitlines()] if is_there else []


def rounded(values):
    return [float(f"{value:.4g}") for value in values]


def pieces(tokenizer, ids):
    """The text of every token; a letter of several tokens stands whole in the first, "" in the others."""
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    for i, text in enumerate(texts):
        for end in range(i + 2, min(i + 5, len(ids) + 1)) if text.endswith("\ufffd") else ():
            whole = tokenizer.decode(ids[i:end], clean_up_tokenization_spaces=False)
            if not whole.endswith("\ufffd"):
                texts[i:end] = [whole] + [""] * (end - i - 1)
                break
    return texts
