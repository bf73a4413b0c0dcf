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

# of each stage: kinds of questions, what its reasonings mention, lengths of its clips in seconds
KINDS = {
    1: ("color at", "color after", "count shapes"),
    2: ("color at tone", "count at tone"),
    3: ("where at tone",),
}
WORDS = {1: ("color",), 2: ("color", "tone"), 3: ("place", "color", "shape", "tone")}
SECONDS = {0: (2, 3, 4, 5), 1: (2, 3, 4, 5, 6), 2: (2, 3, 4, 5, 6), 3: (2, 3, 4)}

STYLES = {"full": 0.35, "short": 0.1, "hasty": 0.55}  # shares among the reasonings of stage 0
HINTED_FRAC = 0.2  # of stage 0's rows, so that the policy learns what a hint is for


# ---- questions ---------------------------------------------------------------------------------


def ask(rng, kind, seconds):
    """
    A question about a clip.

    kind      one of KINDS
    seconds   list of (shapes, tone), as from toy_clips.random_seconds
    returns   (fields of the row, the seconds to look at), or None if the clip has no clear answer
    """
    colors = [shapes[0][1] if shapes else None for shapes, _ in seconds]  # of each first shape
    if kind == "color at":
        return color_at(rng, colors)
    if kind == "color after":
        return color_after(rng, colors)
    if kind in ("count shapes", "count at tone"):
        return count_shapes(colors, seconds, at_tone=kind == "count at tone")
    return question_at_tone(rng, kind, colors, seconds)


def color_at(rng, colors):
    k = int(rng.integers(len(colors)))
    if colors[k] is None:
        return None
    question = f"Which color is shown in the {ORDINALS[k]} second?"
    hint = f"watch only the {ORDINALS[k]} second"
    return choice(rng, question, colors[k], hint), [k]


def color_after(rng, colors):
    k = int(rng.integers(len(colors) - 1))
    first, second = colors[k], colors[k + 1]
    if None in (first, second) or first == second or colors.count(first) > 1:
        return None
    question = f"Which color comes right after {first}?"
    hint = f"find the {first} shape, then look one second later"
    return choice(rng, question, second, hint), [k, k + 1]


def count_shapes(colors, seconds, at_tone):
    count = 0
    for color, (_, tone) in zip(colors, seconds):
        if color and (tone or not at_tone):
            count += 1
    question = "How many shapes come with a tone?" if at_tone else "How many shapes are shown?"
    hint = "write a line for each second, then count the lines with a shape"
    if at_tone:
        hint += " and a tone"
    return dict(question=question, answer=str(count), answer_type="number", hint=hint), []


def question_at_tone(rng, kind, colors, seconds):
    """The color, or what is where, while a tone sounds."""
    tone = str(rng.choice(list(TONES)))
    places = [k for k, (_, other) in enumerate(seconds) if other == tone]
    if len(places) != 1 or colors[places[0]] is None:
        return None
    k = places[0]
    hint = f"the {tone} tone sounds in the {ORDINALS[k]} second, look there"
    if kind == "color at tone":
        question = f"Which color is shown while the {tone} tone sounds?"
        return choice(rng, question, colors[k], hint), [k]
    shapes, _ = seconds[k]
    answer = " | ".join(f"{place}: {color} {shape}" for place, color, shape in shapes)
    question = f"What is where while the {tone} tone sounds?"
    return dict(question=question, answer=answer, answer_type="location", hint=hint), [k]


def choice(rng, question, color, hint):
    options = [str(option) for option in rng.permutation(list(COLORS))]
    return dict(question=question, options=options, answer=color, answer_type="choice", hint=hint)


# ---- reasonings --------------------------------------------------------------------------------


def reasoning_text(rng, stage, seconds, fields, look, style):
    """
    A reasoning in one of three styles; only "hasty" may be wrong.

    fields, look   as from ask
    returns        (think, answer)
    """
    answer = fields["answer"]
    if style == "hasty":  # a plausible answer, without a look at the clip
        if fields["answer_type"] == "choice":
            answer = str(rng.choice(fields["options"]))
        elif fields["answer_type"] == "number":
            answer = str(rng.integers(0, len(seconds) + 1))
        else:
            place, color = rng.choice(list(PLACES)), rng.choice(list(COLORS))
            answer = f"{place}: {color} {rng.choice(SHAPES)}"
        return f"it seems {answer}", answer

    steps = [f"{i + 1}: {describe(*second, WORDS[stage])}" for i, second in enumerate(seconds)]
    if style == "short" and look:
        steps = [steps[k] for k in look]
    return "\n".join([*steps, f"so {answer}"]), answer


# ---- rows --------------------------------------------------------------------------------------


def make_row(rng, stage, name, split):
    """
    A row of the JSONL and the clip behind it.

    stage     0 to 3; a row of stage 0 is like one of any other stage, with a reasoning
    returns   row, list of (shapes, tone), one for each second
    """
    like_stage = stage or int(rng.integers(1, 4))
    lengths = [n for n in SECONDS[stage] if n in SECONDS[like_stage]]
    num_seconds = int(rng.choice(lengths))
    kind = str(rng.choice(KINDS[like_stage]))
    max_shapes = 2 if like_stage == 3 else 1
    question = None
    while question is None:  # clips until one has a clear answer
        seconds = random_seconds(rng, num_seconds, max_shapes)
        question = ask(rng, kind, seconds)
    fields, look = question

    row = dict(
        prompt_id=f"toy-{stage}-{split}-{name}",
        **fields,
        video=f"clips/{split}-{name}.mp4",
        use_audio=like_stage > 1,
    )
    if stage != 2:  # there the caption stands in the prompt, and would give the answer away   [U16]
        tones = [f"{tone or 'no'} tone" for _, tone in seconds]
        captions = [f"{tone} in the {ORDINALS[i]} second" for i, tone in enumerate(tones)]
        row["audio_caption"] = ", ".join(captions)
    row["events"] = [describe(*second, WORDS[3]) for second in seconds]  # for the toy's judge
    if stage == 0:
        is_hinted = rng.random() < HINTED_FRAC
        style = "full"
        if not is_hinted:
            style = str(rng.choice(list(STYLES), p=list(STYLES.values())))
            del row["hint"]
        row["reasoning"], row["answer"] = reasoning_text(
            rng, like_stage, seconds, fields, look, style
        )
    return row, seconds


def write_rows(folder, stage, num_train, num_test, seed):
    """Writes folder/{train,test}.jsonl and folder/clips; the folder appears only when complete."""
    part = temp_dir(folder)
    (part / "clips").mkdir()
    for split, count in (("train", num_train), ("test", num_test)):
        rng = np.random.default_rng([seed, stage, split == "test"])
        bar = tqdm(range(count), desc=f"toy stage {stage} {split} clips", disable=None, leave=False)
        with open(part / f"{split}.jsonl", "w") as file:
            for i in bar:
                row, seconds = make_row(rng, stage, f"{i:05d}", split)
                write_clip(part / row["video"], seconds, rng)
                file.write(json.dumps(row) + "\n")
    part.rename(folder)
