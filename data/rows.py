"""
Rows: their format, and what is wrong with them.

A row is one JSON object on a line (docs/data.md); Video-R1 rows load as they are. Media
paths are relative to the JSONL. `prompt_id` is the identity of a prompt everywhere, never its text.
What is wrong with a row is said, never papered over.
"""

import ast
import difflib
import json
import re
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rewards
from data.clips import BadRow

SYSTEM_PROMPT = (
    "Look and listen. Reason inside <think> </think>, then answer inside <answer> </answer>."
)
INSTRUCTIONS = {
    "choice": "Answer with one option.",
    "multi": "Answer with all the letters that apply.",
    "yesno": "Answer yes or no.",
    "number": "Answer with a number.",
    "text": "Answer in a few words.",
    "location": "Answer as place: object | place: object.",
    "ocr": "Answer with the text exactly as it is written.",
    "free-form": "Answer in a sentence.",
}
PROBLEM_TYPES = {  # of Video-R1 and its kin -> ours
    "multiple choice": "choice",
    "emer_ov_mc": "multi",
    "judge": "yesno",
    "numerical": "number",
    "regression": "number",
    "free-form": "free-form",
    "OCR": "ocr",
}
LETTERS = "ABCDEFGHIJ"
FIELDS = set(
    "prompt_id question answer answer_type options video audio images use_audio start end "
    "audio_caption hint reasoning".split()
)
# A literal media token in a text would shift or swallow the media's features.
RESERVED = re.compile(r"<\|\w+\|>")
TAGS = re.compile(r"</?(?:think|answer)>")


# ---- rows --------------------------------------------------------------------------------------


class Rows:
    """
    The rows of a JSONL, parsed when asked for: only their byte offsets and the 64-bit hashes of
    their ids stay in memory. (That any two of 10^6 ids share a hash has a chance of 3e-8.)

    rows[i] -> dict; rows.index(prompt_id) -> i; len(rows)
    raises   BadRow    unreadable JSON, a duplicate id, or (on access) a row that breaks the format
    """

    def __init__(self, path, needs_answer=True):
        self.path, self.needs_answer = Path(path), needs_answer
        check_file(path)
        offsets, hashes, offset = array("q"), array("q"), 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(tqdm(file, desc="rows", disable=None, leave=False), 1):
                if line.strip():
                    where = f"{self.path}:{number}"
                    hashes.append(hash(row_id(parse_line(line, where), where)))
                    offsets.append(offset)
                offset += len(line)
        if not offsets:
            raise BadRow(f"{path} has no rows: give a JSONL file with one object a line")
        self.offsets, hashes = np.array(offsets), np.array(hashes)
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]
        twice = np.flatnonzero(self.hashes[1:] == self.hashes[:-1])
        if len(twice):
            prompt_id = row_id(self._parse(self.order[twice[0]]), "row")
            raise BadRow(f"{path}: prompt_id {prompt_id!r} occurs twice: make ids unique")

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        return normalize_row(self._parse(i), self.needs_answer)

    def _parse(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return parse_line(file.readline(), f"{self.path} row {i}")

    def index(self, prompt_id):
        at = np.searchsorted(self.hashes, wanted := hash(str(prompt_id)))
        if at == len(self) or self.hashes[at] != wanted:
            raise BadRow(f"{self.path} has no row {prompt_id!r}: give the file that it came from")
        return int(self.order[at])


def check_file(path):
    if not Path(path).is_file():
        what = "a folder, no data file" if Path(path).is_dir() else "no data file"
        raise BadRow(f"{what} at {path}: give a JSONL file")


def parse_line(line, where):
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise BadRow(f"{where}: not JSON in UTF-8: save the file so, one object a line") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: not JSON ({error}): write one object a line") from None
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise BadRow(f"{where}: a {kind}, no object: write one a line, as jq -c '.[]' does")
    return row


def row_id(row, where):
    prompt_id = row.get("prompt_id", row.get("problem_id"))
    if prompt_id is None or len(str(prompt_id).splitlines()) != 1:
        raise BadRow(f"{where}: prompt_id is {prompt_id!r:.40}: give every row a unique one")
    return str(prompt_id)


def normalize_row(row, needs_answer=True):
    """
    A row of ours or of Video-R1's schema -> a row of ours, checked without opening its media.

    `answer` becomes text, `options` a list or dict of text or None, `images` a list.

    needs_answer   False: the row is only asked, so that its answer may be missing
    """
    row = dict(row, prompt_id=row_id(row, "row"))
    name = f"row {row['prompt_id']}"
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise BadRow(f"{name!a}: a text has half a character, {half}: mend it") from None
    if "problem" in row and "question" not in row:
        _from_video_r1(row, name)
    if (kind := str(row.get("answer_type"))) not in INSTRUCTIONS:
        raise BadRow(f"{name}: answer_type {kind:.40}: one of {', '.join(INSTRUCTIONS)}")
    row["options"] = _read_options(row.get("options"), name)
    if needs_answer or row.get("answer") is not None:
        row["answer"] = _read_answer(row.get("answer"), kind, row["options"], name)
    keys = ("question", "hint", "audio_caption", "reasoning", "answer")
    texts = {key: row.get(key) or "" for key in keys}
    texts |= {f"option {letter}": text for letter, text in option_table(row["options"]).items()}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise BadRow(f"{name}: {key} is {text!r:.40}: give it as text")
        if found := RESERVED.search(text) or (key in ("reasoning", "answer") and TAGS.search(text)):
            raise BadRow(f"{name}: {key} holds the reserved {found[0]}: remove it")
    if not texts["question"].strip():
        raise BadRow(f"{name}: empty question: give it as text")
    _check_media(row, name)
    for key in row.keys() - FIELDS:
        near = difflib.get_close_matches(key.lower(), FIELDS, n=1, cutoff=0.8)
        if near and row.get(near[0]) in (None, []):  # a clip would be another, without a word
            raise BadRow(f"{name}: unknown key {key!r}: did you mean {near[0]}? else rename it")
    return row


def _from_video_r1(row, name):
    """In place: problem, problem_type, data_type, solution, path, process -> our fields."""
    if (kind := str(row.get("problem_type"))) not in PROBLEM_TYPES:
        raise BadRow(f"{name}: problem_type {kind:.40}: one of {', '.join(PROBLEM_TYPES)}")
    answer, path = row.get("solution", row.get("answer")), row.get("path") or {}
    row["question"], row["answer_type"] = row["problem"], PROBLEM_TYPES[kind]
    row["answer"] = re.sub(r"</?answer>", "", answer) if isinstance(answer, str) else answer
    if not isinstance(path, dict):  # AVQA-R1 has {"image": ..., "audio": ...}
        path = {str(row.get("data_type")): path}
    for kind, file in path.items():
        if kind not in ("video", "audio", "image"):
            raise BadRow(f"{name}: data_type {kind:.40}: one of video, audio, image")
        row["images" if kind == "image" else kind] = file
    if isinstance(row.get("process"), str):
        row["reasoning"] = re.sub(r"</?think>", "", row["process"]).strip()


def _read_options(options, name):
    """-> list of str, dict of letter -> str, or None. IntentBench writes a list as its repr."""
    try:
        read = ast.literal_eval(options) if isinstance(options, str) and options else options
        if not read:
            return None
        if not isinstance(read, (list, dict)):
            raise TypeError
        texts = list(read.values() if isinstance(read, dict) else read)
        if not all(isinstance(text, (str, int, float)) for text in texts):
            raise TypeError
        texts = list(map(str, texts))
        read = dict(zip(map(str, read), texts)) if isinstance(read, dict) else texts
        rewards.normalize_answer("A", "choice", read)  # raises if they have no letters A..J
        if not all(text.strip() for text in option_table(read).values()):
            raise ValueError
        return read
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        given = f"options {options!r:.60}"
        raise BadRow(f"{name}: {given}: give a list or dict A..J of 1 to 10 texts") from None


def _read_answer(answer, kind, options, name):
    """-> str, as the row writes it; a number of an option becomes its letter. The scorer checks."""
    if answer is None or answer == [] or str(answer).strip() == "":
        raise BadRow(f"{name}: empty answer: give one")
    try:
        allowed = (str, int, float, list) if kind == "multi" else (str, int, float)
        if not isinstance(answer, allowed):
            raise ValueError(f"a {type(answer).__name__} is no {kind} answer")
        rewards.accuracy_reward(None, answer, kind, options)
    except (ValueError, TypeError) as error:
        raise BadRow(f"{name}: {error}: mend answer, answer_type or options") from None
    if isinstance(answer, str) or kind not in ("choice", "multi"):
        return str(answer).strip()
    right = [x for x in LETTERS if rewards.accuracy_reward(x, answer, kind, options) > 0]
    if rewards.accuracy_reward(", ".join(right), answer, kind, options) != 1:  # options are letters
        raise BadRow(f"{name}: answer {answer!r} has no letter of its own: give the option's text")
    return ", ".join(right)


def _check_media(row, name):
    images = row.get("images") or []
    row["images"] = images if isinstance(images, list) else [images]
    paths = media_paths(row)
    if isinstance(row.get("video"), list):
        raise BadRow(f"{name}: media {row['video']!r:.60}: give paths as text, and one video")
    if not paths:
        raise BadRow(f"{name}: no media: give video, audio or images")
    if not all(isinstance(path, str) and path and "\0" not in path for path in paths):
        raise BadRow(f"{name}: media {paths!r:.60}: give paths as text")
    if row.get("use_audio") not in (None, False, True):
        raise BadRow(f"{name}: use_audio {row['use_audio']!r:.20}: give true or false")
    if row.get("use_audio") and (row.get("audio") or not row.get("video")):
        raise BadRow(f"{name}: use_audio is for sound in `video`: set it to false for `audio`")
    start, end = row.get("start"), row.get("end")
    numbers = all(isinstance(time, (int, float, type(None))) for time in (start, end))
    if not (numbers and 0 <= (start or 0) < (1e9 if end is None else end)):
        times = f"start {start!r:.20}, end {end!r:.20}"
        raise BadRow(f"{name}: {times}: give seconds, start before end")


def answer_spec(row):
    """-> (answer, answer_type, options), as the scorer and the leak test take them."""
    return row["answer"], row["answer_type"], row.get("options")


def media_paths(row):
    """All files that a row names: its video, its sound or sounds, its images."""
    sounds, images = (
        paths if isinstance(paths, list) else [paths] for paths in map(row.get, ("audio", "images"))
    )
    return [path for path in (row.get("video"), *sounds, *images) if path]


def clip_of(row):
    """All that decides what is decoded for a row: its files, and what of them is taken."""
    files = (row.get("video"), *media_paths(row))
    return (*files, bool(row.get("use_audio")), row.get("start"), row.get("end"))


def option_table(options):
    """{letter: text}; a prefix ("A. red") goes if every option has its own, as in rewards.py."""
    table = options if isinstance(options, dict) else dict(zip(LETTERS, options or []))
    table = {letter.strip().upper(): text for letter, text in table.items()}
    prefixes = {letter: rewards.OPTION_PREFIX.match(text) for letter, text in table.items()}
    if all(prefix and prefix[1].upper() == letter for letter, prefix in prefixes.items()):
        return {letter: text[prefixes[letter].end() :] for letter, text in table.items()}
    return table


def cut_options(question):
    """A question that holds its options in lines of their own -> the question, the options."""
    text, *options = re.split(r"\n\s*(?=\(?[A-J][).:]\s)", question)
    starts = "".join(option.strip("(")[0] for option in options)
    return (text.strip(), options) if starts and LETTERS.startswith(starts) else (question, [])


def question_text(row, audio_captions):
    """The user's turn: audio caption if asked for, question, options, and how to answer."""
    lines = []
    if audio_captions and row.get("audio_caption"):
        lines.append(f"Sound: {row['audio_caption']}.")
    lines.append(row["question"])
    if options := option_table(row.get("options")):
        lines.append(" ".join(f"{letter}. {text}" for letter, text in options.items()))
    return "\n".join([*lines, INSTRUCTIONS[row["answer_type"]]])


def completion_text(row):
    """What stage 0 teaches the model to write."""
    return f"<think>{row['reasoning']}</think><answer>{row['answer']}</answer>"
