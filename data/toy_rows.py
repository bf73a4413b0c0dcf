"""
The toy's rows: questions about clips with known content (toy_clips.py), each with one answer that
follows from the clip; more seconds are harder.

The reasonings of stage 0 are imperfect on purpose, as scraped ones are: some look at every second,
some at one, and some jump to an answer. Reinforcement has to find out which kind pays.
"""

import json

import numpy as np
from tqdm import tqdm

from data.toy_clips import COLORS, PLACES, SHAPES, TONES, describe, random_seconds, write_clip
from run.io import temp_dir

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def ask(rng, kind, seconds):
    """-> (fields of the row, the seconds to look at), or None if the clip has no clear answer."""
    num_seconds = len(seconds)
    shown = [shapes[0][1] if shapes else None for shapes, _ in seconds]  # color of the first shape
    if kind == "color at":
        k = int(rng.integers(num_seconds))
        question = f"Which color is shown in the {ORDINALS[k]} second?"
        hint = f"watch only the {ORDINALS[k]} second"
        return shown[k] and choice(rng, question, shown[k], hint, [k])
    if kind == "color after":
        k = int(rng.integers(num_seconds - 1))
        clear = (
            shown[k] and shown[k + 1] and shown.count(shown[k]) == 1 and shown[k] != shown[k + 1]
        )
        question = f"Which color comes right after {shown[k]}?"
        hint = f"find the {shown[k]} shape, then look one second later"
        return clear and choice(rng, question, shown[k + 1], hint, [k, k + 1])
    if kind.startswith("count"):
        toned = kind == "count at tone"
        count = sum(bool(c and (tone or not toned)) for c, (_, tone) in zip(shown, seconds))
        hint = "write a line for each second, then count the lines with a shape"
        hint += " and a tone" * toned
        question = f"How many shapes {'come with a tone' if toned else 'are shown'}?"
        return dict(question=question, answer=str(count), answer_type="number", hint=hint), []
    tone = str(rng.choice(list(TONES)))
    k = [i for i, (_, t) in enumerate(seconds) if t == tone]
    if len(k) != 1 or not shown[k[0]]:
        return None
    hint = f"the {tone} tone sounds in the {ORDINALS[k[0]]} second, look there"
    if kind == "color at tone":
        question = f"Which color is shown while the {tone} tone sounds?"
        return choice(rng, question, shown[k[0]], hint, k)
    question = f"What is where while the {tone} tone sounds?"
    answer = " | ".join(f"{place}: {color} {shape}" for place, color, shape in seconds[k[0]][0])
    return dict(question=question, answer=answer, answer_type="location", hint=hint), k


def choice(rng, question, color, hint, look):
    options = [str(c) for c in rng.permutation(list(COLORS))]
    row = dict(question=question, options=options, answer=color, answer_type="choice", hint=hint)
    return row, look


KINDS = {
    1: ("color at", "color after", "count shapes"),
    2: ("color at tone", "count at tone"),
    3: ("where at tone",),
}
WORDS = {1: ("color",), 2: ("color", "tone"), 3: ("place", "color", "shape", "tone")}
STYLES = {"full": 0.35, "short": 0.1, "hasty": 0.55}  # of the cold-start reasonings
SECONDS = {0: (2, 3, 4, 5), 1: (2, 3, 4, 5, 6), 2: (2, 3, 4, 5, 6), 3: (2, 3, 4)}  # clip lengths


def reasoning_text(rng, stage, seconds, fields, look, style):
    """-> (think, answer) in one of three styles; only "hasty" may be wrong."""
    steps = [f"{i + 1}: {describe(*second, WORDS[stage])}" for i, second in enumerate(seconds)]
    answer = fields["answer"]
    if style == "short" and look:
        steps = [steps[k] for k in look]
    if style != "hasty":
        return "\n".join([*steps, f"so {answer}"]), answer
    if fields["answer_type"] == "choice":  # a plausible answer, found without looking
        answer = str(rng.choice(fields["options"]))
    elif fields["answer_type"] == "number":
        answer = str(rng.integers(0, len(seconds) + 1))
    else:
        answer = f"{rng.choice(list(PLACES))}: {rng.choice(list(COLORS))} {rng.choice(SHAPES)}"
    return f"it seems {answer}", answer


def make_row(rng, stage, name, split):
    """One row of the JSONL and the clip behind it. Stage 0 rows are of any stage's kinds."""
    family = stage or int(rng.integers(1, 4))
    num_seconds = int(rng.choice([n for n in SECONDS[stage] if n in SECONDS[family]]))
    kind, asked = str(rng.choice(KINDS[family])), None
    while not asked:  # clips until one has a clear answer
        seconds = random_seconds(rng, num_seconds, max_shapes=2 if family == 3 else 1)
        asked = ask(rng, kind, seconds)
    fields, look = asked
    row = dict(prompt_id=f"toy-{stage}-{split}-{name}", **fields)
    row |= dict(video=f"clips/{split}-{name}.mp4", use_audio=family > 1)
    tones = [f"{t or 'no'} tone in the {ORDINALS[i]} second" for i, (_, t) in enumerate(seconds)]
    if stage != 2:  # there it would stand in the prompt, and tell everything             [U16]
        row["audio_caption"] = ", ".join(tones)
    row["events"] = [describe(*second, WORDS[3]) for second in seconds]  # what the toy judge knows
    if stage == 0:
        hinted = rng.random() < 0.2  # so that the cold-started policy knows what a hint is for
        style = str(rng.choice(list(STYLES), p=list(STYLES.values()))) if not hinted else "full"
        row["reasoning"], row["answer"] = reasoning_text(rng, family, seconds, fields, look, style)
        if not hinted:
            del row["hint"]
    return row, seconds


def write_rows(folder, stage, num_train, num_test, seed):
    """Writes folder/{train,test}.jsonl and folder/clips; the folder appears only when complete."""
    part = temp_dir(folder)
    (part / "clips").mkdir()
    for split, count in (("train", num_train), ("test", num_test)):
        rng = np.random.default_rng([seed, stage, split == "test"])
        with open(part / f"{split}.jsonl", "w") as file:
            for i in tqdm(
                range(count), desc=f"toy stage {stage} {split} clips", disable=None, leave=False
            ):
                row, seconds = make_row(rng, stage, f"{i:05d}", split)
                write_clip(part / row["video"], seconds, rng)
                file.write(json.dumps(row) + "\n")
    part.rename(folder)
