"""
Public data and the formats of other trainers -> rows of ours: one function a format, each from a record
to the rows that it makes. What a record is, is told by its keys. The wording of questions about labels is
ours; their answers are the labels, and nothing that the labels do not tell is asked for.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np

from data.rows import LETTERS, PROBLEM_TYPES, TAGS, cut_options

INSTRUMENTS = (  # MUSIC-AVQA's
    "accordion acoustic_guitar bagpipe banjo bassoon cello clarinet congas drum electric_bass erhu flute "
    "guzheng piano pipa saxophone suona trumpet tuba ukulele violin xylophone"
).split()
PLACES, SCENES = ["left", "middle", "right"], ["indoor", "outdoor"]
COUNTS = "zero one two three four five six seven eight nine ten".split()
AVE = (
    "Accordion|Acoustic guitar|Baby cry, infant cry|Banjo|Bark|Bus|Cat|Chainsaw|Church bell|Clock|Female "
    "speech, woman speaking|Fixed-wing aircraft, airplane|Flute|Frying (food)|Goat|Helicopter|Horse|Male "
    "speech, man speaking|Mandolin|Motorcycle|Race car, auto racing|Rodents, rats, mice|Shofar|Toilet "
    "flush|Train horn|Truck|Ukulele|Violin, fiddle"
).split("|")
WHAT = [  # for one event that is both seen and heard
    "Which of these is both seen and heard?",
    "What makes the sound that goes with the picture?",
    "Which event do picture and sound show together?",
]
WHEN = [
    "After how many seconds does it begin: {}?",
    "At which second of the clip does this begin to be seen and heard: {}?",
]
WHERE = ["Where is what sounds, and what is it?", "What sounds, and at which place of the picture?"]


class Dropped(ValueError):
    """A record that makes no row: args are the reason, counted, and what is special about this one."""


class Context:
    """
    What a conversion may need beside the record.

    media    Path    the folder of the media
    stage    1, 2, 3 or None   stages 2 and 3 hear a video's sound, stage 3 asks for places
    seed     int     of wording and wrong options: the same for the same row
    """

    def __init__(self, media, stage, seed):
        self.media, self.stage, self.seed = Path(media), stage, seed
        self.labels = {}  # clip -> its labels so far, where a clip may have several; of VGGSound all

    def rng(self, name):
        return np.random.default_rng([self.seed, *name.encode()])

    def options(self, rng, right, others, count=4):
        """The right option among wrong ones, in an order of chance."""
        wrong = [other for other in others if other != right]
        picked = [right, *(wrong[i] for i in rng.permutation(len(wrong))[: count - 1])]
        return [picked[i] for i in rng.permutation(len(picked))]


# ---- data sets ---------------------------------------------------------------------------------


def video_r1(record, context):
    """Video-R1, its COT, AVQA-R1-6K. Ids repeat across its files, and are told apart by the source."""
    kind = str(record.get("problem_type"))
    if kind not in PROBLEM_TYPES:
        raise Dropped("unknown problem type", kind)
    source = record.get("data_source") or "r1"
    answer = record.get("solution", record.get("answer"))
    path, kinds = record.get("path") or {}, {}
    for medium, file in (
        path if isinstance(path, dict) else {record.get("data_type"): path}
    ).items():
        kinds["images" if medium == "image" else str(medium)] = file
    row = dict(question=record["problem"], answer_type=PROBLEM_TYPES[kind], **kinds)
    row |= dict(
        prompt_id=f"{source}-{record.get('problem_id')}", options=record.get("options") or None
    )
    row["answer"] = TAGS.sub("", answer).strip() if isinstance(answer, str) else answer
    if isinstance(record.get("process"), str):
        row["reasoning"] = TAGS.sub("", record["process"]).strip()
    if row.get("video"):
        row["use_audio"] = (context.stage or 1) > 1
    yield row


def avqa(record, context):
    choices, right = record["multi_choice"], record["answer"]
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise Dropped("the answer is none of the options", f"{right!r} of {len(choices)}")
    row = dict(prompt_id=f"avqa-{record['id']}", question=record["question_text"], options=choices)
    row |= dict(answer=choices[right], answer_type="choice", use_audio=True)
    yield row | dict(video=f"{record['video_name']}.mp4")


def music_avqa(record, context):
    if record.get("question_deleted"):
        raise Dropped("deleted by its authors", record["question_content"])
    values, question = json.loads(record["templ_values"]), record["question_content"].strip()
    slots = re.findall(r"<\w+>", question)
    if len(slots) != len(values):
        raise Dropped("a template with other values than slots", f"{question} {values}")
    for slot, value in zip(slots, values):
        question = question.replace(slot, str(value).replace("_", " "), 1)
    answer = record["anser"] if "anser" in record else record["answer"]
    row = dict(question=question, answer=answer, use_audio=True, video=f"{record['video_id']}.mp4")
    row["prompt_id"] = f"music-{record['video_id']}-{record['question_id']}"
    closed = [
        PLACES + ["simultaneously"],
        PLACES,
        SCENES,
    ]  # "which sounds first?" may be answered so
    closed = closed if question.startswith("Which") else closed[1:]
    if answer in ("yes", "no"):
        row["answer_type"] = "yesno"
    elif answer in COUNTS:
        row |= dict(answer_type="number", answer=str(COUNTS.index(answer)))
    elif sets := [options for options in closed if answer in options]:
        row |= dict(answer_type="choice", options=sets[0])
    elif answer in INSTRUMENTS:
        options = context.options(context.rng(row["prompt_id"] + question), answer, INSTRUMENTS)
        options = [option.replace("_", " ") for option in options]
        row |= dict(answer_type="choice", options=options, answer=answer.replace("_", " "))
    else:
        raise Dropped("an answer that is no number and no option", answer)
    yield row


def ave(record, context):
    """10 s with one event, seen and heard from a second on; a clip may stand twice, with two."""
    if record["Quality"] != "good":
        raise Dropped("not of good quality", record["Quality"])
    clip, label, begin = record["VideoID"], record["Category"], int(record["StartTime"])
    row = dict(prompt_id=f"ave-{clip}-{label}-{begin}", video=f"{clip}.mp4", use_audio=True)
    rng, others = context.rng(row["prompt_id"]), context.labels.get(clip, {label})
    if rng.integers(2) or len(others) > 1:
        question = WHEN[rng.integers(len(WHEN))].format(label.lower())
        yield row | dict(question=question, answer=str(begin), answer_type="number")
    else:
        options = context.options(rng, label, AVE)
        question = WHAT[rng.integers(len(WHAT))]
        yield row | dict(question=question, answer=label, answer_type="choice", options=options)


def vggsound(record, context):
    """Only what sounds is known of a clip, not where it is."""
    name = f"{record['youtube_id']}_{int(record['start']):06d}"
    rng, label = context.rng(name), record["label"]
    row = dict(
        prompt_id=f"vgg-{name}", question=WHAT[rng.integers(len(WHAT))], answer_type="choice"
    )
    options = context.options(rng, label, sorted(context.labels.get("", {label})))
    yield row | dict(answer=label, options=options, video=f"{name}.mp4", use_audio=True)


def avsbench(record, context):
    """The object part's single sources: five seconds, a mask of what sounds; its class is in the list."""
    name, label = record["name"], record["category"]
    inside = Path(record["split"]) / label / name
    masks = sorted((context.media / "gt_masks" / inside).glob("*.png"))
    frames = sorted((context.media / "visual_frames" / inside).glob("*.png"))
    if not masks or not frames:
        raise Dropped("masks or frames that are not there", str(inside))
    seen = [{label: read_mask(path, "GRAY")[0] > 0} for path in masks]
    audio = f"audio_wav/{record['split']}/{label}/{name}.wav"
    yield where_row(f"avs-{name}", seen, frames, audio, context)


def avsbench_semantic(record, context):
    """All of AVSBench with named masks (v1s, v1m: the object part's single and multiple sources; v2)."""
    inside = Path(record["label"]) / record["uid"]
    masks = sorted((context.media / inside / "labels_rgb").glob("*.png"))
    frames = sorted((context.media / inside / "frames").glob("*.jpg"))
    if not masks or not frames:
        raise Dropped("masks or frames that are not there", str(inside))
    colours, seen = class_colours(context.media / "label2idx.json"), []
    for path in masks:
        r, g, b = read_mask(path, "RGB").astype(np.int32)
        mask = (r << 16) + (g << 8) + b
        shown = set(np.unique(mask).tolist())
        seen.append({name: mask == of for name, of in colours.items() if of in shown})
    yield where_row(f"avss-{record['uid']}", seen, frames, str(inside / "audio.wav"), context)


def read_mask(path, mode):
    """-> (C, H, W) uint8 of a PNG."""
    from torchvision.io import decode_image  # slow to load, and not every format needs it

    return decode_image(str(path), mode).numpy()


@functools.cache
def class_colours(path):
    """-> {name: colour} of the classes but the background, once for all clips."""
    return {
        name.replace("_", " "): colour(i) for name, i in json.loads(path.read_text()).items() if i
    }


def colour(index):
    """The colour of a class in the masks: its bits in turn to red, green and blue, highest first."""
    rgb = [sum(((index >> 3 * i + channel) & 1) << 7 - i for i in range(8)) for channel in range(3)]
    return (rgb[0] << 16) + (rgb[1] << 8) + rgb[2]


def where_row(name, seen, frames, audio, context):
    """seen: a mask (H, W) bool of each thing, a dict a frame -> a row; thirds of the picture are its places."""
    pixels = {}
    for thing, mask in ((thing, mask) for masks in seen for thing, mask in masks.items()):
        parts = [part.sum() for part in np.array_split(mask, 3, axis=1)]
        pixels[thing] = pixels.get(thing, 0) + np.array(parts)
    pairs = [
        f"{place}: {thing}"
        for i, place in enumerate(("left", "center", "right"))
        for thing, found in pixels.items()
        if found.any() and found[i] >= found.sum() / 3
    ]
    if not pairs:
        raise Dropped("a mask without a pixel", name)
    rng, images = context.rng(name), [str(path.relative_to(context.media)) for path in frames]
    row = dict(prompt_id=name, question=WHERE[rng.integers(len(WHERE))], images=images, audio=audio)
    return row | dict(answer=" | ".join(pairs), answer_type="location")


# ---- formats of other trainers -----------------------------------------------------------------

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
MEDIA_TAG = re.compile(r"\s*<(?:video|audio|image|speech|sound)>\s*|<\|\w+\|>")


def turns_of(record):
    """-> [(role, text)], media that stand in the turns."""
    turns, media = [], {}
    for turn in record.get("messages") or record.get("conversations") or record["prompt"]:
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        said = turn.get("content", turn.get("value"))
        if role is None:
            raise Dropped("a turn of nobody known", str(turn)[:60])
        for part in said if isinstance(said, list) else ():
            if part.get("type") in ("video", "audio", "image"):
                media.setdefault(part["type"], []).append(part.get(part["type"]))
        if isinstance(said, list):
            said = "\n".join(part.get("text", "") for part in said if part.get("type") == "text")
        turns.append((role, MEDIA_TAG.sub("\n", str(said)).strip()))
    return [(role, text) for role, text in turns if role != "system"], media


def media_of(record, found, context):
    """A record's media as a row names them."""
    held = {}
    for kind in ("video", "audio", "image"):
        paths = record.get(f"{kind}s", record.get(kind, found.get(kind))) or []
        held[kind] = paths if isinstance(paths, list) else [paths]
    if len(held["video"]) > 1:
        raise Dropped("several videos", str(held["video"])[:60])
    row = dict(images=held["image"], video=held["video"][0] if held["video"] else None)
    row["audio"] = held["audio"] if len(held["audio"]) > 1 else (held["audio"] or [None])[0]
    row["use_audio"] = bool(row["video"] and not row["audio"] and (context.stage or 1) > 1)
    return {key: value for key, value in row.items() if value}


def asked(question, said, row):
    """A question and its answer -> the row's text fields; the type is told by options and form."""
    think = re.search(r"<think>(.*?)</think>", said, re.DOTALL)
    answer = re.search(r"<answer>(.*?)</answer>", said, re.DOTALL)
    answer = (
        answer[1] if answer else re.sub(r"<think>.*?</think>", "", said, flags=re.DOTALL)
    ).strip()
    if not answer:
        raise Dropped("no answer", question[:60])
    if think and think[1].strip():
        row["reasoning"] = think[1].strip()
    question, options = cut_options(question)
    kind = "text"
    if options:
        letters = [
            letter for letter in LETTERS[: len(options)] if re.search(rf"\b{letter}\b", answer)
        ]
        many = re.fullmatch(r"[A-J](?:\s*[,;]\s*[A-J])+", answer)
        kind = "multi" if many and len(letters) > 1 else "choice"
    elif re.fullmatch(r"[-+]?[\d,]*\.?\d+", answer):
        kind = "number"
    elif answer.strip(".").lower() in ("yes", "no"):
        kind = "yesno"
    return row | dict(question=question, options=options or None, answer=answer, answer_type=kind)


def chat(record, context):
    """ms-swift, LLaMA-Factory, TRL: one question a record, its answer in a column or the last turn."""
    turns, found = turns_of(record)
    questions = [text for role, text in turns if role == "user"]
    if len(questions) != 1:
        raise Dropped("several turns", f"{len(questions)} questions")
    replies = [text for role, text in turns if role == "assistant"]
    told = next((record[k] for k in ("solution", "answer") if record.get(k) is not None), None)
    said = str(told) if told is not None else "".join(replies)
    row = dict(prompt_id=record.get("id") or record.get("prompt_id"))
    yield asked(questions[0], said, row | media_of(record, found, context))


def llava(record, context):
    """A row for each pair of turns, ids numbered."""
    turns, found = turns_of(record)
    pairs = [
        (a[1], b[1]) for a, b in zip(turns, turns[1:]) if (a[0], b[0]) == ("user", "assistant")
    ]
    if not pairs:
        raise Dropped("no pair of turns", str(turns)[:60])
    for i, (question, said) in enumerate(pairs):
        row = dict(prompt_id=f"{record['id']}-{i}") | media_of(record, found, context)
        yield asked(question, said, row)


def ours(record, context):
    yield dict(record)


FORMATS = {  # name -> (keys that tell it, conversion), in the order in which they are tried
    "ours": ({"prompt_id", "question", "answer"}, ours),
    "video-r1": ({"problem", "problem_type"}, video_r1),
    "avqa": ({"question_text", "multi_choice", "answer"}, avqa),
    "music-avqa": ({"question_content", "templ_values"}, music_avqa),
    "ave": ({"Category", "VideoID", "StartTime"}, ave),
    "vggsound": ({"youtube_id", "start", "label"}, vggsound),
    "avsbench": ({"name", "category", "split"}, avsbench),
    "avsbench-semantic": ({"uid", "label", "split"}, avsbench_semantic),
    "llava": ({"id", "conversations"}, llava),
    "messages": ({"messages"}, chat),  # ms-swift, LLaMA-Factory
    "llama-factory": ({"conversations"}, chat),
    "trl": ({"prompt"}, chat),
}


def format_of(record):
    """The name of the record's format; Dropped if nothing tells it."""
    keys = record.keys()
    for name, (needed, _) in FORMATS.items():
        if needed <= keys and (
            name != "llava" or isinstance(record.get("video", record.get("image")), str)
        ):
            return name
    raise Dropped("a form that is not known", f"keys {', '.join(list(keys)[:8])}")


INDEXED = ("ave", "vggsound")  # a first pass over the file has to learn all labels


def index(name, record, context):
    """The labels of AVE's clips, which may have two; all of VGGSound's."""
    if name == "ave":
        context.labels.setdefault(record["VideoID"], set()).add(record["Category"])
    elif name == "vggsound":
        context.labels.setdefault("", set()).add(record["label"])
