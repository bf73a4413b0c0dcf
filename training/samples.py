"""
What a run keeps of its completions, for people to look at: in one step of ten a few prompts with
everything that their completions earned.

    OUT/samples.jsonl   a line per completion: tokens, rewards, advantage, ratio to the policy that
                        sampled it
    OUT/clips.jsonl     a line per prompt of these: frames and sound, small

Of a sampled step: the first prompt whose rewards differ, and a replayed prompt that was sampled before,
so that completions are met fresh and again later; where there is none, the first. Besides, in any
step, a prompt that carries its hint for the first time. These are chosen, not a fair sample. Every
number is the step's own; nothing is computed again.

G completions of a prompt.
"""

import json
import math

from data.clips import BadRow, decode_clip
from data.rows import answer_spec, question_text
from data.thumbnails import THUMBNAIL_LIMITS, clip_as_data_uris
from run import processes
from run.io import append_json
from training.metrics import ids_hash

MIN_INTERVAL = 10  # steps between sampled ones
MAX_STEPS = 100  # sampled steps of a run
MAX_HINTED = 100  # prompts of a run that are shown with their hint
SOUND_BYTES = 48000  # of a clip's sound: a page holds dozens


class SampleLog:
    """
    out        folder of the run
    rows       Rows
    builder    InputBuilder of the run
    num_steps  of the run
    """

    def __init__(self, out, rows, builder, num_steps):
        self.out = out
        self.rows = rows
        self.builder = builder
        self.interval = max(MIN_INTERVAL, -(-num_steps // MAX_STEPS))
        clips = read(out / "clips.jsonl")
        samples = read(out / "samples.jsonl")
        self.with_clip = {clip["prompt_id"] for clip in clips}
        self.shown_hinted = {s["prompt_id"] for s in samples if s["hinted"] and s.get("age") == 0}

    def write(self, step, buffer, update):
        """
        Writes the samples of a step, if it is a sampled one. To be called before R̄(q) is updated.

        update   UpdateRecord (training/metrics.py) of the step's first update
        """
        if processes.rank():
            return
        fresh = [i for i, group in enumerate(update.fresh) if group]
        replayed = [i for i, group in enumerate(update.replayed) if group]
        differ = [i for i in fresh if update.fresh_advantages[i].any()]
        known = [i for i in replayed if update.replayed[i][0].prompt_id in self.with_clip]
        is_sampled = step % self.interval == 1
        chosen_fresh, chosen_replayed = [], []
        if is_sampled:
            chosen_fresh = (differ or fresh)[:1]
            chosen_replayed = (known or replayed)[:1]
        if len(self.shown_hinted) < MAX_HINTED:
            for i in fresh:
                entry = update.fresh[i][0]
                if entry.hinted and entry.prompt_id not in self.shown_hinted:
                    chosen_fresh.append(i)
                    break

        shared = dict(step=step, buffer=buffer, info=update.info)
        for i in dict.fromkeys(chosen_fresh):
            self._write_group("fresh", update.fresh[i], update.fresh_advantages[i], **shared)
        for i in chosen_replayed:
            self._write_group(
                "replayed", update.replayed[i], update.replayed_advantages[i], **shared
            )

    def _write_group(self, kind, group, advantages, *, step, buffer, info):
        """kind: "fresh" or "replayed"; group: list of G Entry; advantages (G,)"""
        prompt_id = group[0].prompt_id
        row = self.rows[self.rows.index(prompt_id)]
        if group[0].hinted and kind == "fresh":
            self.shown_hinted.add(prompt_id)
        if prompt_id not in self.with_clip:
            self.with_clip.add(prompt_id)
            clip = dict(step=step, prompt_id=prompt_id) | self.clip(row)
            append_json(self.out / "clips.jsonl", clip)
        is_kind = (info["fresh"] == (kind == "fresh")).tolist()
        place_of = {}  # by its tokens: the prompt may stand twice in this step
        for i, (q, tokens) in enumerate(zip(info["prompt_id"], info["ids_hash"])):
            if q == prompt_id and is_kind[i]:
                place_of[tokens] = i
        for entry, advantage in zip(group, advantages.tolist()):
            i = place_of[ids_hash(entry)]
            ratios = [math.exp(min(x, 20)) for x in info["token_log_ratios"][i]]
            sample = dict(
                step=step,
                kind=kind,
                prompt_id=prompt_id,
                prompt=question_text(row, self.builder.audio_captions),
                truth=answer_spec(row)[0],
                hint=row.get("hint") if entry.hinted else None,
                tier=buffer.tier(prompt_id),
                mean_reward=buffer.mean_reward(prompt_id),  # R̄(q), before this step
                completion=self.builder.tokenizer.decode(entry.completion_ids),
                tokens=pieces(self.builder.tokenizer, entry.completion_ids.tolist()),
                tas_weights=rounded(info["tas_weights"][i]),
                ratios=rounded(ratios),
                reward=entry.reward,
                reward_parts=entry.reward_parts,
                advantage=advantage,
                age=step - entry.born_step,
                hinted=entry.hinted,
            )
            append_json(self.out / "samples.jsonl", sample)

    def clip(self, row):
        """Frames and sounds of a row as data URIs; none if its clip is gone by now."""
        media_config = self.builder.media_config._replace(**THUMBNAIL_LIMITS)
        try:
            frames, sounds = clip_as_data_uris(
                decode_clip(row, self.builder.root, media_config), SOUND_BYTES
            )
        except BadRow:
            frames, sounds = [], []
        return dict(frames=frames[:8], sounds=sounds)


def read(path):
    """What a resumed run has written so far. Only rank 0 writes."""
    if processes.rank() or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def rounded(values):
    return [float(f"{value:.4g}") for value in values]


def pieces(tokenizer, ids):
    """The text of every token; a letter of several tokens stands whole in the first, "" in the others."""
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    for i, text in enumerate(texts):
        if not text.endswith("\ufffd"):  # the token ends in the middle of a letter
            continue
        for end in range(i + 2, min(i + 5, len(ids) + 1)):
            whole = tokenizer.decode(ids[i:end], clean_up_tokenization_spaces=False)
            if not whole.endswith("\ufffd"):
                texts[i:end] = [whole] + [""] * (end - i - 1)
                break
    return texts
