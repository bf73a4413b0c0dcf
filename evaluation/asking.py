"""
Asks a model about many items. A clip is decoded, encoded and read once for all questions about it,
and the next clips are decoded while the model answers.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from data.clip_cache import num_decoders
from data.clips import BadRow, decode_clip
from evaluation.items import has_usable_sound, without_senses
from evaluation.protocol import prompt_turns
from models.rollout import rollout
from run import processes
from run.packing import pack_sizes


class ClipItems(NamedTuple):
    """The items about one clip."""

    name: str  # of their file or benchmark
    items: list  # of (row, record)
    builder: object  # InputBuilder for the folder of their media


class Answered(NamedTuple):
    row: dict
    record: dict
    completions: list  # of Completion; empty if the item could not be asked
    problem: BadRow | None  # why it could not


def answer_items(
    policy, clips, *, protocol, num_samples, temperature, max_new_tokens, seed, batch_size
):
    """
    Asks about all items; yields a list of Answered for each batch.

    clips            list of ClipItems
    num_samples      completions of each item
    max_new_tokens   {name of a file or benchmark: its limit}
    batch_size       items that are decoded together; the items of one clip stay together
    """
    batches = make_batches(clips, batch_size)
    reading = {}
    with ThreadPoolExecutor(num_decoders()) as pool:
        for i, batch in enumerate(batches):
            for j in range(i, min(i + 2, len(batches))):
                if j not in reading:
                    reading[j] = [pool.submit(read_clip, clip, protocol) for clip in batches[j]]
            prompts = [prompt for future in reading.pop(i) for prompt in future.result()]
            yield answer_batch(
                policy,
                batch,
                prompts,
                num_samples=num_samples,
                temperature=temperature,
                max_new_tokens=max_new_tokens[batch[0].name],
                seed=seed,
            )


def make_batches(clips, batch_size):
    """Clips of one name that have about as many questions are decoded together."""
    batches = []
    for name in dict.fromkeys(clip.name for clip in clips):
        same = [clip for clip in clips if clip.name == name]
        same.sort(key=lambda clip: len(clip.items))
        sizes = [len(clip.items) for clip in same]
        for indices in pack_sizes(sizes, batch_size):
            batches.append([same[i] for i in indices])
    return batches


def answer_batch(policy, batch, prompts, *, num_samples, temperature, max_new_tokens, seed):
    """-> list of Answered. `prompts`: for each item of the batch its Prompt or a BadRow."""
    name, eos_ids = batch[0].name, batch[0].builder.eos_ids
    items = [item for clip in batch for item in clip.items]
    readable = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, BadRow)]
    groups = []
    if readable:
        ids = [f"{name} {items[i][0]['prompt_id']}".encode() for i in readable]
        groups = rollout(
            policy,
            [prompts[i] for i in readable],
            [num_samples] * len(readable),
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            seeds=[processes.seed(seed, zlib.crc32(i)) for i in ids],
        )
    completions = dict(zip(readable, groups))
    answered = []
    for i, (row, record) in enumerate(items):
        problem = None if i in completions else prompts[i]
        answered.append(Answered(row, record, completions.get(i, []), problem))
    return answered


def read_clip(clip, protocol):
    """
    -> for each item about a clip its Prompt, or the BadRow that says why there is none. The clip is
    decoded once, and the prompts hold the very same media, so that a rollout reads these once.
    """
    builder, decoded, first, prompts = clip.builder, None, None, []
    for row, record in clip.items:
        try:
            if decoded is None:
                use_audio = record["use_audio"]  # None: the clip decides
                if use_audio is None and row.get("video") and not row.get("audio"):
                    use_audio = has_usable_sound(builder.root, row, builder.media_config)
                reduced_row = without_senses(row | dict(use_audio=use_audio), protocol.without)
                decoded = decode_clip(reduced_row, builder.root, builder.media_config)
            record["use_audio"] = bool(use_audio)
            turns = prompt_turns(clip.name, row | dict(use_audio=use_audio), protocol)
            if first is not None:
                prompts.append(builder.with_text(first, row, turns=turns))
                continue
            prompts.append(builder.from_clip(row, decoded, turns=turns))
            # inline media stand in other places in each text, and without media nothing is shared
            if not row.get("inline") and prompts[-1].media:
                first = prompts[-1]
        except BadRow as problem:
            prompts.append(problem)
    return prompts
