"""
Public data sets and the file formats of other trainers -> rows of ours.

One function a format: it takes a record and a Context, and yields the rows that the record makes. The
format is detected from the record's keys (FORMATS). To add a data set, write such a function and add
one line to FORMATS.

The wording of questions about labels is ours; their answers are the labels, and nothing is asked that
the labels do not say.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from answers import LETTERS
from data.questions import PLACEHOLDER, PlaceholderError, name_placeholders, split_question
from data.rows import FIELDS, PROBLEM_TYPES, from_video_r1, without_tags

INSTRUMENTS = (  # MUSIC-AVQA's
    "accordion acoustic_guitar bagpipe banjo bassoon cello clarinet congas drum electric_bass erhu flute "
    "guzheng piano pipa saxophone suona trumpet tuba ukulele violin xylophone"
).split()
PLACES = ["left", "middle", "right"]
SCENES = ["indoor", "outdoor"]
COUNTS = "zero one two three four five six seven eight nine ten".split()
AVE_EVENTS = (
    "Accordion|Acoustic guitar|Baby cry, infant cry|Banjo|Bark|Bus|Cat|Chainsaw|Church bell|Clock|Female "
    "speech, woman speaking|Fixed-wing aircraft, airplane|Flute|Frying (food)|Goat|Helicopter|Horse|Male "
    "speech, man speaking|Mandolin|Motorcycle|Race car, auto racing|Rodents, rats, mice|Shofar|Toilet "
    "flush|Train horn|Truck|Ukulele|Violin, fiddle"
).split("|")
WHAT = [  # about one event that is both seen and heard
    "Which of these is both seen and heard?",
    "What makes the sound that goes with the picture?",
    "Which event do picture and sound show together?",
]
WHEN = [
    "After how many seconds does it begin: {}?",
    "At which second of the clip does this begin to be seen and heard: {}?",
]
WHERE = ["Where is what sounds, and what is it?", "What sounds, and at which place of the picture?"]

MANY_WORDS = 5  # an answer of as many words is a sentence: equality would be nearly always 0
MEDIA_KINDS = ("video", "audio", "image")


class Dropped(ValueError):
    """A record that makes no row. args: the reason, which is counted; what is special about this one."""


class Context:
    """
    What a conversion may need beside the record.

    media        Path    the folder of the media
    use_audio    True, False or "auto"   whether a video's own sound is heard, where the record does not
                 decide it
    seed         int     of wording and wrong options: the same for the same row
    open_type    "auto", "text" or "free-form"   the answer_type of answers in words; auto: free-form
                 from MANY_WORDS words on
    columns      {field: column}   where the fields of a form of one's own stand (--map)
    all_turns    whether each question of a conversation makes a row, not only the first

    notes        reason -> how often a record was changed; note_examples: reason -> the first example
    """

    def __init__(
        self, media, use_audio="auto", seed=0, open_type="auto", columns=None, all_turns=False
    ):
        self.media = Path(media)
        self.use_audio = use_audio
        self.seed = seed
        self.open_type = open_type
        self.columns = columns or {}
        self.all_turns = all_turns
        self.labels_of_clip = {}  # AVE's: a clip may have two
        self.all_labels = set()  # VGGSound's: wrong options come from them
        self.notes = Counter()
        self.note_examples = {}

    def note(self, reason, example):
        """Something of a record was left out or changed: the report says so."""
        self.notes[reason] += 1
        self.note_examples.setdefault(reason, str(example)[:200])

    def rng(self, name):
        return np.random.default_rng([self.seed, *name.encode()])

    def options(self, rng, right, others, count=4):
        """The right option among wrong ones, in random order."""
        wrong = [other for other in others if other != right]
        picked = [right]
        for i in rng.permutation(len(wrong))[: count - 1]:
            picked.append(wrong[i])
        return [picked[i] for i in rng.permutation(len(picked))]


# ---- data sets ---------------------------------------------------------------------------------


def video_r1(record, context):
    """Video-R1, its COT, AVQA-R1-6K, HumanOmniV2. Ids repeat across files: the source is put before."""
    problem_type = str(record.get("problem_type"))
    if problem_type not in PROBLEM_TYPES:
        raise Dropped("unknown problem type", problem_type)
    row = from_video_r1(record)
    row["options"] = record.get("options") or None
    if record.get("problem_id") is not None:
        row["prompt_id"] = f"{record.get('data_source') or 'r1'}-{record['problem_id']}"
    think = re.search(r"<think>(.*?)</think>", str(record.get("solution")), re.DOTALL)
    if think and think[1].strip() and "reasoning" not in row:
        row["reasoning"] = think[1].strip()
    if row.get("video") and not row.get("audio"):
        row["use_audio"] = context.use_audio
    yield row


def avqa(record, context):
    choices, right = record["multi_choice"], record["answer"]
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise Dropped("the answer is none of the options", f"{right!r} of {len(choices)}")
    yield dict(
        prompt_id=f"avqa-{record['id']}",
        question=record["question_text"],
        options=choices,
        answer=choices[right],
        answer_type="choice",
        use_audio=True,
        video=f"{record['video_name']}.mp4",
    )


def music_avqa(record, context):
    """MUSIC-AVQA, and v2.0, whose added records have no question_id."""
    if record.get("question_deleted"):
        raise Dropped("deleted by its authors", record["question_content"])
    if record.get("unmatch_audio"):  # v2.0 asks about a video with the sound of another
        raise Dropped("its sound is another clip's", record["unmatch_audio"])
    question = _filled_template(record)
    answer = record["anser"] if "anser" in record else record["answer"]
    row = dict(question=question, answer=answer, use_audio=True, video=f"{record['video_id']}.mp4")
    name = f"music-{record['video_id']}"
    if record.get("question_id") is not None:
        name += f"-{record['question_id']}"
    row["prompt_id"] = name

    closed_sets = [PLACES, SCENES]
    if question.startswith("Which"):  # "which sounds first?" may be answered so
        closed_sets.insert(0, [*PLACES, "simultaneously"])
    options = next((options for options in closed_sets if answer in options), None)
    if answer in ("yes", "no"):
        row["answer_type"] = "yesno"
    elif answer in COUNTS:
        row |= dict(answer_type="number", answer=str(COUNTS.index(answer)))
    elif options:
        row |= dict(answer_type="choice", options=options)
    elif answer in INSTRUMENTS:
        names = context.options(context.rng(name + question), answer, INSTRUMENTS)
        names = [name.replace("_", " ") for name in names]
        row |= dict(answer_type="choice", options=names, answer=answer.replace("_", " "))
    else:
        raise Dropped("an answer that is no number and no option", answer)
    yield row


def _filled_template(record):
    """ "Is the <Object> louder?", ["flute"] -> "Is the flute louder?"."""
    question = record["question_content"].strip()
    values = record["templ_values"]
    if isinstance(values, str):  # in v2.0 it may be the list itself
        values = json.loads(values)
    slots = re.findall(r"<\w+>", question)
    if len(slots) != len(values):
        raise Dropped("a template with other values than slots", f"{question} {values}")
    for slot, value in zip(slots, values):
        question = question.replace(slot, str(value).replace("_", " "), 1)
    return question


def ave(record, context):
    """10 s with one event, seen and heard from a second on; a clip may stand twice, with two events."""
    if record["Quality"] != "good":
        raise Dropped("not of good quality", record["Quality"])
    clip, label, begin = record["VideoID"], record["Category"], int(record["StartTime"])
    row = dict(prompt_id=f"ave-{clip}-{label}-{begin}", video=f"{clip}.mp4", use_audio=True)
    rng = context.rng(row["prompt_id"])
    # with two events, "what is seen and heard?" would have two right answers
    has_two_events = len(context.labels_of_clip.get(clip, {label})) > 1
    if rng.integers(2) or has_two_events:
        question = WHEN[rng.integers(len(WHEN))].format(label.lower())
        yield row | dict(question=question, answer=str(begin), answer_type="number")
    else:
        options = context.options(rng, label, AVE_EVENTS)
        question = WHAT[rng.integers(len(WHAT))]
        yield row | dict(question=question, answer=label, answer_type="choice", options=options)


def vggsound(record, context):
    """Only what sounds is known of a clip, not where it is. Two forms: with ids, and with file names."""
    if "video_file" in record:
        name = record["video_file"].removesuffix(".mp4")
    else:
        name = f"{record['youtube_id']}_{int(record['start']):06d}"
    rng, label = context.rng(name), record["label"]
    question = WHAT[rng.integers(len(WHAT))]
    options = context.options(rng, label, sorted(context.all_labels | {label}))
    yield dict(
        prompt_id=f"vgg-{name}",
        question=question,
        answer_type="choice",
        answer=label,
        options=options,
        video=f"{name}.mp4",
        use_audio=True,
    )


def avsbench(record, context):
    """The object part's single sources: five seconds, a mask of what sounds; its class is in the list."""
    name, label = record["name"], record["category"]
    inside = Path(record["split"]) / label / name
    masks = sorted((context.media / "gt_masks" / inside).glob("*.png"))
    frames = sorted((context.media / "visual_frames" / inside).glob("*.png"))
    if not masks or not frames:
        raise Dropped("masks or frames that are not there", str(inside))
    masks_of_frames = [{label: read_mask(path, "GRAY")[0] > 0} for path in masks]
    audio = f"audio_wav/{record['split']}/{label}/{name}.wav"
    yield where_row(f"avs-{name}", masks_of_frames, frames, audio, context)


def avsbench_semantic(record, context):
    """All of AVSBench with named masks (v1s, v1m: the object part's single and multiple sources; v2)."""
    inside = Path(record["label"]) / record["uid"]
    masks = sorted((context.media / inside / "labels_rgb").glob("*.png"))
    frames = sorted((context.media / inside / "frames").glob("*.jpg"))
    if not masks or not frames:
        raise Dropped("masks or frames that are not there", str(inside))
    colours = class_colours(context.media / "label2idx.json")
    masks_of_frames = []
    for path in masks:
        r, g, b = read_mask(path, "RGB").astype(np.int32)
        pixel_colours = (r << 16) + (g << 8) + b
        present = set(np.unique(pixel_colours).tolist())
        masks_of_frame = {}
        for name, colour in colours.items():
            if colour in present:
                masks_of_frame[name] = pixel_colours == colour
        masks_of_frames.append(masks_of_frame)
    audio = str(inside / "audio.wav")
    yield where_row(f"avss-{record['uid']}", masks_of_frames, frames, audio, context)


def read_mask(path, mode):
    """-> (C, H, W) uint8 of a PNG."""
    from torchvision.io import decode_image  # slow to load, and not every format needs it

    return decode_image(str(path), mode).numpy()


@functools.cache
def class_colours(path):
    """-> {name: colour} of the classes but the background, once for all clips."""
    colours = {}
    for name, index in json.loads(path.read_text()).items():
        if index:
            colours[name.replace("_", " ")] = class_colour(index)
    return colours


def class_colour(index):
    """The colour of a class in the masks: its bits in turn to red, green and blue, highest first."""
    rgb = [0, 0, 0]
    for bit in range(24):
        if index >> bit & 1:
            rgb[bit % 3] |= 128 >> bit // 3
    return (rgb[0] << 16) + (rgb[1] << 8) + rgb[2]


def where_row(name, masks_of_frames, frames, audio, context):
    """
    A row that asks what sounds at which third of the picture.

    masks_of_frames   for each frame {thing: (H, W) bool}
    """
    # a thing may reach over several thirds: each with at least a third of its pixels is an answer
    pixels = {}  # thing -> (3,) its pixels in the left, middle and right third, over all frames
    for masks in masks_of_frames:
        for thing, mask in masks.items():
            thirds = np.array([part.sum() for part in np.array_split(mask, 3, axis=1)])
            pixels[thing] = pixels.get(thing, 0) + thirds
    pairs = []
    for i, place in enumerate(("left", "center", "right")):
        for thing, thirds in pixels.items():
            if thirds.any() and thirds[i] >= thirds.sum() / 3:
                pairs.append(f"{place}: {thing}")
    if not pairs:
        raise Dropped("a mask without a pixel", name)
    rng = context.rng(name)
    return dict(
        prompt_id=name,
        question=WHERE[rng.integers(len(WHERE))],
        images=[str(path.relative_to(context.media)) for path in frames],
        audio=audio,
        answer=" | ".join(pairs),
        answer_type="location",
    )


# ---- formats of other trainers -----------------------------------------------------------------

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def turns_of(record):
    """-> [(role, text)] without the system's, {kind: media that stand in the turns}."""
    turns, media = [], {kind: [] for kind in MEDIA_KINDS}
    for turn in record.get("messages") or record.get("conversations") or record["prompt"]:
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        if role is None:
            raise Dropped("a turn of an unknown role", str(turn)[:60])
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = _text_of_parts(content, media)
        if role != "system":
            turns.append((role, str(content).strip()))
    return turns, media


def _text_of_parts(parts, media):
    """Parts of a turn -> its text with a placeholder for each medium; the media are added to `media`."""
    pieces = []
    for part in parts:
        key = str(part.get("type"))
        kind = key.removesuffix("_url")  # {"type": "image_url", "image_url": {"url": "x.png"}}
        if kind in MEDIA_KINDS:
            value = part.get(key)
            media[kind].append(value.get("url") if isinstance(value, dict) else value)
            pieces.append(f"<{kind}>")
        elif kind == "text":
            pieces.append(part.get("text", ""))
    return "\n".join(pieces)


def media_of(record, media_in_turns):
    """A record's media -> {kind: list of paths}."""
    media = {}
    for kind in MEDIA_KINDS:
        paths = record.get(f"{kind}s", record.get(kind, media_in_turns.get(kind))) or []
        paths = paths if isinstance(paths, list) else [paths]
        # verl has {"video": path} in its lists
        media[kind] = [path.get(kind, path) if isinstance(path, dict) else path for path in paths]
    if len(media["video"]) > 1:
        raise Dropped("several videos", str(media["video"])[:60])
    return media


def media_fields(media, texts, context):
    """{kind: list of paths} -> a row's media fields. texts: the user's turns, as they are written."""
    row = {}
    if media["image"]:
        row["images"] = media["image"]
    if media["video"]:
        row["video"] = media["video"][0]
    if media["audio"]:
        row["audio"] = media["audio"] if len(media["audio"]) > 1 else media["audio"][0]
    elif media["video"]:
        row["use_audio"] = context.use_audio
        if context.use_audio is False and any("<audio>" in text for text in texts):
            context.note("a turn names the video's sound, and it is not used", texts[0])
    return row


def without_placeholders(texts, media, context):
    """The user's turns without media placeholders; see data/questions.py."""
    num_media = {kind: len(paths) for kind, paths in media.items()}
    try:
        named = name_placeholders(texts, num_media)
    except PlaceholderError as problem:
        raise Dropped(
            "placeholders are not as many as the media", f"{problem}: {texts[0]}"
        ) from None
    for text in named:
        if re.search(r"<(?:image|video|audio)>", text):
            context.note("a placeholder is left as a word of the question", text)
    return named


def text_fields(question, answer, context, options=None):
    """
    A question and its answer as another project writes them -> a row's text fields.

    The answer may hold a <think> block, which becomes the reasoning, and <answer> tags. Its type follows
    from the options and its form.
    """
    row = {}
    think = re.search(r"<think>(.*?)</think>", str(answer), re.DOTALL)
    if think and think[1].strip():
        row["reasoning"] = think[1].strip()
    answer = final_answer(str(answer))
    if not answer:
        raise Dropped("no answer", question[:60])

    split = split_question(question)
    for instruction in split.removed:
        context.note("an answer instruction is taken out of the question", instruction)
    row["question"] = split.text
    row["options"] = options or split.options or None
    if split.is_numbered and not options and re.fullmatch(r"\(?\d{1,2}[).]?", answer):
        number = int(re.search(r"\d+", answer)[0])
        if not 1 <= number <= len(split.options):
            raise Dropped("the answer is none of the options", f"{answer} of {len(split.options)}")
        answer = LETTERS[number - 1]
    row["answer"] = answer
    row["answer_type"] = answer_type_of(answer, row["options"], context.open_type)
    return row


def final_answer(text):
    """What stands in <answer> tags, else what is left without <think> and <context> blocks."""
    tagged = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return tagged[1].strip()
    text = re.sub(r"<(think|context)>.*?</\1>", "", text, flags=re.DOTALL)
    return without_tags(text)


def answer_type_of(answer, options, open_type="auto"):
    """The answer_type that an answer's form suggests."""
    if options:
        return "multi" if _names_several_options(answer, options) else "choice"
    if re.fullmatch(r"[-+]?[\d,]*\.?\d+", answer):
        return "number"
    if answer.strip(".").lower() in ("yes", "no", "true", "false"):
        return "yesno"
    if open_type != "auto":
        return open_type
    if answer[0] in "[({" and answer[-1] in "])}" and len(re.findall(r"\d+", answer)) >= 4:
        raise Dropped("a box is the answer", answer)
    return "free-form" if len(answer.split()) >= MANY_WORDS else "text"


def _names_several_options(answer, options):
    """Whether an answer is "A, C", "ABD" or "(A) and (B)"; not if it is an option's own text."""
    texts = options.values() if isinstance(options, dict) else options
    if not isinstance(options, str) and answer in [str(text) for text in texts]:
        return False
    letters = re.sub(r"\band\b|[\s()\[\].,、;|&+/]", "", answer)
    is_once_each = len(set(letters)) == len(letters) > 1
    return is_once_each and set(letters) <= set(LETTERS[: len(options)])


def chat(record, context):
    """
    ms-swift, LLaMA-Factory, TRL, verl: the answer stands in a column or in the assistant's turn.

    A row has no turns before its question, and later questions may lean on earlier ones. So only the
    first question makes a row, or with --all-turns each.
    """
    turns, media_in_turns = turns_of(record)
    questions = [text for role, text in turns if role == "user"]
    if not questions:
        raise Dropped("no question", str(turns)[:60])
    reward_model = record.get("reward_model")  # verl's
    if not isinstance(reward_model, dict):
        reward_model = {}
    # a column of answers goes before the assistant's turn, which may be a worked solution
    answer = None
    for value in (record.get("solution"), record.get("answer"), reward_model.get("ground_truth")):
        if value is not None:
            answer = str(value)
            break
    if len(questions) > 1 and answer is not None:
        raise Dropped(
            "several turns", f"{len(questions)} questions, its answer is that of the last"
        )
    if len(questions) == 1:
        if answer is None:
            answer = "".join(text for role, text in turns if role == "assistant")
        pairs = [(0, questions[0], answer)]
    else:
        # what is said before the media come is not about them
        with_media = [i for i, text in enumerate(questions) if PLACEHOLDER.search(text)]
        first = min(with_media, default=0)
        pairs = [pair for pair in answered_questions(turns) if pair[0] >= first]
    if not pairs:
        raise Dropped("no pair of turns", str(turns)[:60])
    if len(pairs) > 1 and not context.all_turns:
        context.note("later questions of a conversation are left out", pairs[1][1])
        pairs = pairs[:1]

    media = media_of(record, media_in_turns)
    media_row = media_fields(media, questions, context)
    prompt_id = record.get("id") or record.get("prompt_id")
    for i, question, reply in pairs:
        (question,) = without_placeholders([question], media, context)
        row = media_row | dict(prompt_id=prompt_id)
        if prompt_id is not None and len(pairs) > 1:
            row["prompt_id"] = f"{prompt_id}-{i}"
        yield row | text_fields(question, reply, context)


def answered_questions(turns):
    """[(role, text)] -> [(number of the question, question, the reply right after it)]"""
    pairs, number = [], -1
    for (role, text), (next_role, reply) in zip(turns, [*turns[1:], (None, "")]):
        if role == "user":
            number += 1
            if next_role == "assistant":
                pairs.append((number, text, reply))
    return pairs


def problem(record, context):
    """EasyR1, open-r1: a problem with its answer or solution, and media in columns of their own."""
    turns = [dict(role="user", content=record["problem"])]
    record = {**record, "messages": turns}
    # beside an answer, a solution without tags is a worked one
    if record.get("answer") is not None and "<answer>" not in str(record.get("solution")):
        record["solution"] = None
    record.setdefault("id", record.get("problem_id"))
    yield from chat(record, context)


def llava(record, context):
    """A row for each pair of turns, ids numbered."""
    turns, media_in_turns = turns_of(record)
    media = media_of(record, media_in_turns)
    questions = [text for role, text in turns if role == "user"]
    media_row = media_fields(media, questions, context)
    named = iter(without_placeholders(questions, media, context))
    turns = [(role, next(named) if role == "user" else text) for role, text in turns]

    pairs = answered_questions(turns)
    if not pairs:
        raise Dropped("no pair of turns", str(turns)[:60])
    for i, (_, question, reply) in enumerate(pairs):
        row = dict(prompt_id=f"{record['id']}-{i}") | media_row
        yield row | text_fields(question, reply, context)


def ours(record, context):
    """
    Rows of ours; and question, answer and a medium without prompt_id or answer_type, with other
    columns of that kind in their place. A table's cells are text: true, false and seconds are read.
    """
    row = {}
    for key, value in record.items():
        if value not in (None, "") or key in ("question", "answer"):
            row[key] = value
    if "image" in row and "images" not in row:
        row["images"] = row.pop("image")
    for key in ("id", "problem_id", "question_id"):
        if "prompt_id" not in row and key in row:
            row["prompt_id"] = row[key]
    for key in ("start", "end"):
        if isinstance(row.get(key), str):
            row[key] = _number_in_cell(row[key])
    if isinstance(row.get("use_audio"), str):
        row["use_audio"] = _boolean_in_cell(row["use_audio"])

    # a row with an answer_type is taken as it is: it has been prepared before
    if "answer_type" not in row:
        options = row.get("options")
        is_list = isinstance(row["answer"], list)
        if is_list and len(row["answer"]) == 1:
            (row["answer"],) = row["answer"]
            is_list = False
        if _is_index(row["answer"], options):  # a table's cells are text
            row["answer"] = int(row["answer"])
            context.note("an answer is the number of an option, counted from 0", record["answer"])
        if is_list and not all(isinstance(part, (int, float)) for part in row["answer"]):
            row["answer_type"] = "multi"
        elif type(row["answer"]) is int and options:  # an index from 0
            row["answer_type"] = "choice"
        else:
            row |= text_fields(str(row["question"]), row["answer"], context, options)
        if row.get("video") and not row.get("audio"):
            row.setdefault("use_audio", context.use_audio)
    yield row


def _is_index(answer, options):
    """Whether an answer is the number of an option as text, and none of the options themselves."""
    if not isinstance(answer, str) or not isinstance(options, (list, dict)):
        return False
    texts = options.values() if isinstance(options, dict) else options
    is_option = answer in [str(text) for text in texts]
    return bool(re.fullmatch(r"\d", answer)) and not is_option


def _number_in_cell(cell):
    """Seconds: "90", "90.5", "1:30", "0:01:30"; what is none of these is left to the row's check."""
    parts = cell.strip().split(":")
    try:
        seconds = 0.0
        for part in parts[:3]:
            seconds = 60 * seconds + float(part)
    except ValueError:
        return cell
    return seconds if len(parts) <= 3 else cell


def _boolean_in_cell(cell):
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words.get(cell.strip().lower(), cell.strip().lower())


# ---- a form of one's own: --map ------------------------------------------------------------------


def parse_columns(text):
    """
    "question=Q,answer=A,video=clip" -> {field: column}. A column may lie inside others
    ("reward_model.ground_truth", "videos.0.video"); options may stand in several ("options=A+B+C+D").
    raises ValueError
    """
    columns = {}
    for part in text.split(","):
        field, separator, column = (piece.strip() for piece in part.partition("="))
        if not separator or not column or field not in FIELDS:
            fields = ", ".join(sorted(FIELDS))
            raise ValueError(f"{part!r} is not FIELD=COLUMN; fields: {fields}")
        columns[field] = column
    missing = [field for field in ("question", "answer") if field not in columns]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)}: write question=COLUMN,answer=COLUMN")
    return columns


def mapped(record, context):
    """A record of any form -> a row, by the columns that --map names."""
    row = {}
    for field, column in context.columns.items():
        if "+" in column:
            values = [cell_of(record, name.strip()) for name in column.split("+")]
            row[field] = [value for value in values if value not in (None, "")]
        else:
            row[field] = cell_of(record, column)
    yield from ours(row, context)


def cell_of(record, column):
    """The value of a column: its own name, or a path with dots into what it holds."""
    if column in record:
        return record[column]
    value = record
    for name in column.split("."):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (KeyError, ValueError, IndexError, TypeError):
            keys = ", ".join(record)
            raise Dropped("a column of --map is missing", f"{column}; keys: {keys}") from None
    return value


# ---- which format a record has -----------------------------------------------------------------


class Format(NamedTuple):
    keys: set  # a record of this format has all of them
    convert: Callable  # (record, Context) -> yields rows


FORMATS = {  # in the order in which they are tried
    "ours": Format({"question", "answer"}, ours),
    "video-r1": Format({"problem", "problem_type"}, video_r1),
    "avqa": Format({"question_text", "multi_choice", "answer"}, avqa),
    "music-avqa": Format({"question_content", "templ_values"}, music_avqa),
    "ave": Format({"Category", "VideoID", "StartTime"}, ave),
    "vggsound": Format({"youtube_id", "start", "label"}, vggsound),
    "vggsound-files": Format({"video_file", "label"}, vggsound),
    "avsbench": Format({"name", "category", "split"}, avsbench),
    "avsbench-semantic": Format({"uid", "label", "split"}, avsbench_semantic),
    "llava": Format({"id", "conversations"}, llava),
    "messages": Format({"messages"}, chat),  # ms-swift, LLaMA-Factory
    "llama-factory": Format({"conversations"}, chat),
    "trl": Format({"prompt"}, chat),  # and verl
    "easy-r1": Format({"problem"}, problem),  # and open-r1
}
MEDIA_COLUMNS = {"video", "audio", "image", "images"}

# benchmarks whose files have forms of their own: eval.py reads them. name -> keys of a record
BENCHMARK_KEYS = {
    "omnibench": {"question", "options", "answer", "image_path", "audio_path"},
    "daily-omni": {"Question", "Choice", "Answer", "video_id"},
    "av-counting": {"question", "answer", "query_interval"},
    "av-odyssey": {"question_id", "question", "image_path", "video_path", "audio_path"},
    "mvbench": {"video", "question", "candidates", "answer"},
    "video-mme": {"question_id", "question", "options", "videoID"},
    "lvbench": {"key", "qa"},
    "video-holmes": {"video ID", "Question ID", "Question"},
    "mmvu": {"question_type", "choices", "answer", "video"},
    "vsi-bench": {"question", "ground_truth", "scene_name"},
    "video-tt": {"question_id", "question", "video_id", "capability"},
}


def format_of(record):
    """The name of the record's format; Dropped if its keys are of none."""
    keys = record.keys()
    for name, needed in BENCHMARK_KEYS.items():
        if needed <= keys:
            raise Dropped("a benchmark's own file", f"{name}: python eval.py --benchmark {name}")
    for name, form in FORMATS.items():
        if not form.keys <= keys:
            continue
        if name == "ours" and not (keys & MEDIA_COLUMNS or "prompt_id" in keys):
            continue
        if name == "llava" and not isinstance(record.get("video", record.get("image")), str):
            continue
        if name == "easy-r1" and not keys & {"answer", "solution"}:
            continue
        return name
    raise Dropped("a form that is not known", f"keys: {', '.join(str(key) for key in keys)}")


INDEXED_FORMATS = ("ave", "vggsound", "vggsound-files")  # a first pass has to learn all labels


def index_labels(name, record, context):
    """The labels of AVE's clips, which may have two; all of VGGSound's."""
    if name == "ave":
        labels = context.labels_of_clip.setdefault(record["VideoID"], set())
        labels.add(record["Category"])
    elif name in ("vggsound", "vggsound-files"):
        context.all_labels.add(record["label"])
