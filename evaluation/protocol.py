"""
How an item is asked and how the reply is read: by our recipe or by the authors' (`--protocol`).

Ours asks every model alike for reasoning and an answer in tags, and reads only what is certain. The
authors' scripts (github.com/yogkul2000/AVATAR, eval/) ask for a capital letter and no other text,
with as many new tokens as TOKENS says, and take the last capital letter that stands by itself. What
is repeated of them are the order, the limits and the reading. The wording of their questions is
ours, as the scripts bear no licence: `--template FILE` asks in any other words. What is not
repeated: items that fail still count as wrong, and a clip without sound changes no other clip.
"""

import re

import rewards
from data.clips import BadRow
from data.rows import option_table

TOKENS = {  # max_new_tokens of the authors' scripts; there are none for the other benchmarks
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
QWEN = (  # the model's own, which two of the scripts give
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of "
    "perceiving auditory and visual inputs, as well as generating text and speech."
)
SYSTEM = {name: QWEN if name in ("omnibench", "daily-omni") else ASSISTANT for name in TOKENS}
ASKED = {
    "choice": "Choose the one best answer.\nQuestion: {question}\nReply with the capital letter of "
    "your choice and no other text.",
    "multi": "Choose every answer that applies.\nQuestion: {question}\nReply with the letters of "
    "your choices, with commas between them, and no other text.",
    "yesno": "{question}\nReply with Yes or No and no other text.",
    "number": "Question: {question}\nReply with the number and no other text.",
}


def question_and_options(row):
    options = option_table(row.get("options"))
    return "\n".join([row["question"], *(f"{k}. {text}" for k, text in options.items())])


MARK = re.compile(r"\[(audio|img|video)([0-9]{1,3})\]")


def in_place(text, row):
    """
    A text that names its media, as AV-Odyssey's do ("[audio2]") -> the pieces of the user's turn
    with the media in these places; what is not named comes first, and a video comes once: where
    it is named again, its name stands as it is.
    """
    sounds = row["audio"] if isinstance(row.get("audio"), list) else [row.get("audio")]
    held = dict(img=row["images"], video=[row.get("video")], audio=sounds)
    held = {kind: sum(bool(path) for path in paths) for kind, paths in held.items()}
    pieces, named = [], set()
    *parts, rest = MARK.split(text)  # text, kind, number, text, kind, number, ..., text
    for before, kind, number in zip(parts[::3], parts[1::3], parts[2::3]):
        if not 1 <= int(number) <= held[kind]:
            told = f"[{kind}{number}], and it has {held[kind]}"
            raise BadRow(f"row {row['prompt_id']}: the text names {told}: mend it")
        if kind == "video" and (kind, int(number)) in named:
            pieces.append(dict(type="text", text=f"{before}[{kind}{number}]"))
            continue
        named.add((kind, int(number)))
        medium = dict(type="image" if kind == "img" else kind, index=int(number) - 1)
        pieces += [dict(type="text", text=before)] * bool(before) + [medium]
    first = [
        dict(type="image" if kind == "img" else kind, index=i)
        for kind, count in held.items()
        for i in range(count)
        if (kind, i + 1) not in named
    ]
    return [*first, *pieces, *([dict(type="text", text=rest)] if rest else [])]


def authors_text(row):
    """The user's turn."""
    return ASKED[row["answer_type"]].replace("{question}", question_and_options(row))


def authors_reading(name, row, text):
    """-> what the authors' scripts take for the answer (text or None), and its canonical form."""
    kind = row["answer_type"]
    if kind == "number":
        found = re.search(r"-?\d+", text)
        return (found and found[0]), float(found[0]) if found else 0.0
    if kind == "multi":
        letters = sorted(set(re.findall("[A-F]", text.upper())))
        return ", ".join(letters) or None, frozenset(letters) or None
    if kind == "yesno":
        found = re.search(r"(?i)\b(yes|no)\b", text)
        return (found and found[0]), found and found[0].lower()
    tagged = re.search(r"(?s)<answer>\s*(.*?)\s*</answer>", text)
    if tagged and name not in ("worldsense", "mmvu", "intentbench"):
        return tagged[1], tagged[1].strip().upper()
    letters = "A-D" if name in ("worldsense", "intentbench") else "A-Z"
    found = re.findall(rf"\b([{letters}])\b", text) or re.findall(f"[{letters}]", text)[:1]
    return (found[-1], found[-1]) if found else (None, None)


def our_reading(row, text, truncated):
    """-> the answer in its tags, or what stands bare where there are none, and its form."""
    answer = rewards.parse_answer(text)
    kind = row["answer_type"], row.get("options")
    if answer is None and not truncated:  # half a text has no end that could be the answer
        answer = bare_answer(text, *kind)
    return answer, rewards.normalize_answer(answer, *kind)


def bare_answer(text, answer_type, options=None):
    """
    The answer of a completion without any answer tag, for evaluating models that never learned
    them; no reward is given for it.

    returns      str      what stands after the reasoning, or its last line: the first of the two
                          that rewards.normalize_answer can read; None if neither, or if there is a tag
    """
    tail = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    if re.search("</?answer>|<think>", tail):
        return None
    tail = tail.strip()
    for part in (tail, tail.split("\n")[-1]):
        if rewards.normalize_answer(part, answer_type, options) is not None:
            return part.strip()
    return None
