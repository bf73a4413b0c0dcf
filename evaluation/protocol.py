"""
How an item is asked and how the reply is read: in our words or the authors' (`--protocol`).

Ours asks every model alike for reasoning and an answer in tags, and reads only what is certain. The
authors' scripts (github.com/yogkul2000/AVATAR, eval/) ask for a capital letter and no other text,
allow as many new tokens as AUTHORS_MAX_NEW_TOKENS says, and take the last capital letter that stands alone.
We repeat their order, limits and reading. The wording of their questions is ours, as the scripts
have no licence: `--template FILE` asks in any other words. We do not repeat two faults: here an item
that fails counts as wrong, and a clip without sound changes no other clip.
"""

import re
from pathlib import Path
from typing import NamedTuple

import answers
from data.clips import BadRow
from data.rows import SYSTEM_PROMPT, option_table, question_text
from run.errors import UserError

SENSES = ("sound", "video")  # what --without can take away


class Protocol(NamedTuple):
    """How every item of an evaluation is asked."""

    is_authors: bool = False  # ask and read as the authors' scripts do
    template: str | None = None  # the user's turn with {question} in it; None: the protocol's own
    system: str | None = None  # system prompt; None: the protocol's own; "": the model's default
    audio_captions: bool = False  # audio_caption goes into the prompt
    without: tuple = ()  # of SENSES: what the model does not get


# ---- the authors' scripts ----------------------------------------------------------------------

AUTHORS_MAX_NEW_TOKENS = {  # of the authors' scripts; they have none for the other benchmarks
    "omnibench": 1024,
    "daily-omni": 4096,
    "av-counting": 1024,
    "av-counting-ref": 1024,
    "av-odyssey": 512,
    "worldsense": 512,
    "intentbench": 20,
    "mvbench": 4096,
    "video-mme": 64,
    "lvbench": 512,
    "video-holmes": 512,
    "mmvu": 512,
    "tomato": 512,
}
ASSISTANT = "You are a helpful assistant."  # the chat template's own
QWEN = (  # the model's own, which two of the scripts use
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of "
    "perceiving auditory and visual inputs, as well as generating text and speech."
)
AUTHORS_SYSTEM = {
    name: QWEN if name in ("omnibench", "daily-omni") else ASSISTANT
    for name in AUTHORS_MAX_NEW_TOKENS
}
AUTHORS_QUESTIONS = {
    "choice": "Choose the one best answer.\nQuestion: {question}\nReply with the capital letter of "
    "your choice and no other text.",
    "multi": "Choose every answer that applies.\nQuestion: {question}\nReply with the letters of "
    "your choices, with commas between them, and no other text.",
    "yesno": "{question}\nReply with Yes or No and no other text.",
    "number": "Question: {question}\nReply with the number and no other text.",
}


def read_system(value):
    """The value of --system -> the system prompt of a Protocol."""
    if value is None:
        return None
    return "" if value == "none" else read_text("--system", value).strip()


def read_text(flag, path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: {path} is not UTF-8 ({error.reason}): convert it") from None


# ---- asking ------------------------------------------------------------------------------------


def user_text(row, protocol):
    """The user's turn as text."""
    if protocol.template:
        return protocol.template.replace("{question}", question_and_options(row))
    if protocol.is_authors:
        return AUTHORS_QUESTIONS[row["answer_type"]].replace(
            "{question}", question_and_options(row)
        )
    return question_text(row, protocol.audio_captions)


def question_and_options(row):
    options = option_table(row.get("options"))
    return "\n".join([row["question"], *(f"{k}. {text}" for k, text in options.items())])


def system_prompt(name, protocol):
    """The system prompt for the items of the file or benchmark `name`; "": the model's default."""
    if protocol.system is not None:
        return protocol.system
    return AUTHORS_SYSTEM[name] if protocol.is_authors else SYSTEM_PROMPT


def prompt_turns(name, row, protocol):
    """-> system prompt, and the user's turn: text, or pieces with the media among them."""
    text = user_text(row, protocol)
    # the authors' scripts put all media first
    if row.get("inline") and (protocol.template or not protocol.is_authors):
        text = interleave_media(text, row, protocol.without)
    return system_prompt(name, protocol), text


MEDIA_NAME = re.compile(r"\[(audio|img|video)([0-9]{1,3})\]")
SENSE_OF = {"img": "video", "video": "video", "audio": "sound"}


def interleave_media(text, row, without=()):
    """
    A text that names its media, as AV-Odyssey's do ("[audio2]") -> the pieces of the user's turn,
    with the media in these places. Media that the text does not name come first. A video comes
    once: where the text names it again, its name stays. So do the names of media that `without`
    takes away.
    """
    counts = {"img": len(row["images"]), "video": bool(row.get("video"))}
    counts["audio"] = len(row["audio"]) if isinstance(row.get("audio"), list) else 1
    if not row.get("audio"):
        counts["audio"] = 0

    pieces, named = [], set()
    *parts, last_text = MEDIA_NAME.split(text)  # text, kind, number, text, kind, number, ..., text
    for before, kind, number in zip(parts[::3], parts[1::3], parts[2::3]):
        if not 1 <= int(number) <= counts[kind]:
            why = f"the text names [{kind}{number}], and the row has {int(counts[kind])}"
            raise BadRow(f"row {row['prompt_id']}: {why}: correct the text")
        is_again = kind == "video" and (kind, int(number)) in named
        if is_again or SENSE_OF[kind] in without:
            pieces.append(dict(type="text", text=f"{before}[{kind}{number}]"))
            continue
        named.add((kind, int(number)))
        if before:
            pieces.append(dict(type="text", text=before))
        pieces.append(media_piece(kind, int(number)))
    if last_text:
        pieces.append(dict(type="text", text=last_text))

    unnamed = []
    for kind, count in counts.items():
        for number in range(1, count + 1):
            if (kind, number) not in named and SENSE_OF[kind] not in without:
                unnamed.append(media_piece(kind, number))
    if "video" in without and row.get("use_audio"):  # what is left of the video is its sound
        unnamed.append(media_piece("audio", 1))
    return unnamed + pieces


def media_piece(kind, number):
    return dict(type="image" if kind == "img" else kind, index=number - 1)


# ---- reading -----------------------------------------------------------------------------------


def parse_reply(name, row, text, truncated, protocol):
    """
    -> the answer as text, and its canonical form (answers.normalize_answer); None where there is none.

    truncated   the reply ends at the limit of new tokens
    """
    if protocol.is_authors:
        return authors_answer(name, row, text)
    answer = answers.parse_answer(text)
    if answer is None and not truncated:  # what ends half a text cannot be the answer
        answer = untagged_answer(text, row["answer_type"], row.get("options"))
    return answer, answers.normalize_answer(answer, row["answer_type"], row.get("options"))


def authors_answer(name, row, text):
    """What the authors' scripts take for the answer, and its canonical form."""
    kind = row["answer_type"]
    if kind == "number":
        match = re.search(r"-?\d+", text)
        return (match[0], float(match[0])) if match else (None, 0.0)
    if kind == "multi":
        letters = sorted(set(re.findall("[A-F]", text.upper())))
        return (", ".join(letters), frozenset(letters)) if letters else (None, None)
    if kind == "yesno":
        match = re.search(r"(?i)\b(yes|no)\b", text)
        return (match[0], match[0].lower()) if match else (None, None)

    tagged = re.search(r"(?s)<answer>\s*(.*?)\s*</answer>", text)
    if tagged and name not in ("worldsense", "mmvu", "intentbench"):
        return tagged[1], tagged[1].strip().upper()
    letters = "A-D" if name in ("worldsense", "intentbench") else "A-Z"
    alone = re.findall(rf"\b([{letters}])\b", text)
    if alone:
        return alone[-1], alone[-1]
    first = re.search(f"[{letters}]", text)
    return (first[0], first[0]) if first else (None, None)


def untagged_answer(text, answer_type, options=None):
    """
    The answer of a completion without any answer tag, for evaluating models that never learned
    them; no reward is given for it.

    returns   str   what stands after the reasoning, or its last line: the first of the two that
                    answers.normalize_answer can read; None if neither, or if there is a tag
    """
    tail = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    if re.search("</?answer>|<think>", tail):
        return None
    tail = tail.strip()
    for part in (tail, tail.split("\n")[-1]):
        if answers.normalize_answer(part, answer_type, options) is not None:
            return part.strip()
    return None
