"""
Rows: their format, and what is wrong with them.

A row is one JSON object on a line (docs/data.md); Video-R1 rows load as they are. Media paths are
relative to the JSONL. `prompt_id` identifies a prompt everywhere; its text never does. What is wrong
with a row is an error that names the row and the remedy; nothing is guessed.
"""

import ast
import difflib
import hashlib
import json
import math
import re
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rewards
from answers import LETTERS, normalize_answer, option_table
from data.clips import BadRow
from run.io import file_problem

SYSTEM_PROMPT = (
    "Look and listen. Reason inside <think> </think>, then answer inside <answer> </answer>."
)
INSTRUCTIONS = {  # answer_type -> the last line of the user's turn
    "choice": "Answer with one option.",
    "multi": "Answer with all the letters that apply.",
    "yesno": "Answer yes or no.",
    "number": "Answer with a number.",
    "text": "Answer in a few words.",
    "location": "Answer as place: object | place: object.",
    "ocr": "Answer with the text exactly as it is written.",
    "free-form": "Answer in a sentence.",
}
PROBLEM_TYPES = {  # of Video-R1 and of data sets in its form -> our answer_type
    "multiple choice": "choice",
    "emer_ov_mc": "multi",
    "judge": "yesno",
    "numerical": "number",
    "regression": "number",
    "free-form": "free-form",
    "OCR": "ocr",
}
FIELDS = {
    "prompt_id",
    "question",
    "answer",
    "answer_type",
    "options",
    "video",
    "audio",
    "images",
    "use_audio",
    "start",
    "end",
    "audio_caption",
    "hint",
    "reasoning",
}
# A literal media token in a text would shift or swallow the media's features.
RESERVED = re.compile(r"<\|\w+\|>")
TAGS = re.compile(r"</?(?:think|answer)>")
CONVERT = "prepare.py rows makes such a file of JSON, CSV and parquet"


# ---- the rows of a file ------------------------------------------------------------------------


class Rows:
    """
    The rows of a JSONL. Each is parsed when it is needed: only byte offsets and 64-bit hashes stay in
    memory, 32 bytes a row. (The chance that two of 10^6 ids share a hash is 3e-8.)

    rows[i] -> dict; rows.index(prompt_id) -> i; len(rows)

    id_hashes        (len,) int64, of the prompt_ids, in the order of the file
    content_hashes   (len,) int64, of the lines
    raises   BadRow    unreadable JSON, a duplicate id, or (on access) a row that breaks the format
    """

    def __init__(self, path, needs_answer=True):
        self.path = Path(path)
        self.needs_answer = needs_answer
        check_file(path)
        offsets = array("q")
        id_hashes = array("q")
        content_hashes = array("q")
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(tqdm(file, desc="rows", disable=None, leave=False), 1):
                if line.strip():
                    where = f"{self.path}:{number}"
                    id_hashes.append(stable_hash(row_id(parse_line(line, where), where)))
                    content_hashes.append(stable_hash(line.strip()))
                    offsets.append(offset)
                offset += len(line)
        if not offsets:
            raise BadRow(f"{path} has no rows: give a JSONL file with one object a line")
        self.offsets = np.array(offsets)
        self.id_hashes = np.array(id_hashes)
        self.content_hashes = np.array(content_hashes)
        self.by_hash = np.argsort(self.id_hashes, kind="stable")

        sorted_hashes = self.id_hashes[self.by_hash]
        duplicates = np.flatnonzero(sorted_hashes[1:] == sorted_hashes[:-1])
        if len(duplicates):
            prompt_id = self.prompt_id(self.by_hash[duplicates[0]])
            raise BadRow(f"{path}: prompt_id {prompt_id!r} occurs twice: make ids unique")

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        return normalize_row(self._parse(i), self.needs_answer)

    def _parse(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return parse_line(file.readline(), f"{self.path} row {i}")

    def prompt_id(self, i):
        """The id of a row, whether or not the row is good."""
        return row_id(self._parse(i), f"{self.path} row {i}")

    def index(self, prompt_id):
        (index,) = self.indices(np.array([stable_hash(str(prompt_id))]))
        if index < 0:
            raise BadRow(f"{self.path} has no row {prompt_id!r}: give the file that it came from")
        return int(index)

    def indices(self, id_hashes):
        """(n,) int64, hashes of ids -> (n,) int64, the rows that have them; -1 where none has."""
        places = np.searchsorted(self.id_hashes, id_hashes, sorter=self.by_hash)
        # beyond the last: any row will do, it is another one
        indices = self.by_hash[np.minimum(places, len(self) - 1)]
        return np.where(self.id_hashes[indices] == id_hashes, indices, -1)


def stable_hash(content):
    """A text or bytes -> a 64-bit number, the same in every process."""
    if isinstance(content, str):
        content = content.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def check_file(path, remedy="give a JSONL file"):
    problem = file_problem(path)
    if problem:
        raise BadRow(f"{problem}: {remedy}")


def parse_line(line, where):
    """A line of a JSONL, bytes -> dict."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise BadRow(
            f"{where}: not JSON in UTF-8: write one object a line in UTF-8; {CONVERT}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: not JSON ({error}): write one object a line; {CONVERT}") from None
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise BadRow(f"{where}: a {kind}, not an object: write one object a line; {CONVERT}")
    return row


def row_id(row, where):
    prompt_id = row.get("prompt_id", row.get("problem_id"))
    if prompt_id is None or len(str(prompt_id).splitlines()) != 1:
        raise BadRow(f"{where}: prompt_id is {prompt_id!r:.40}: give every row a unique one")
    return str(prompt_id)


# ---- one row -----------------------------------------------------------------------------------


def normalize_row(row, needs_answer=True):
    """
    A row of ours or of Video-R1's schema -> a row of ours, checked without opening its media.

    `answer` becomes text, `options` a list or dict of text or None, `images` a list.

    needs_answer   False: the row is only asked; it may lack its answer, and its answer_type, which is
                   then a choice if it has options, else free-form
    """
    row = dict(row, prompt_id=row_id(row, "row"))
    name = f"row {row['prompt_id']}"
    _check_characters(row, name)
    if "problem" in row and "question" not in row:
        try:
            row |= from_video_r1(row)
        except ValueError as problem:
            raise BadRow(f"{name}: {problem}") from None
    if not needs_answer and row.get("answer_type") is None:
        row["answer_type"] = "choice" if row.get("options") else "free-form"
    answer_type = str(row.get("answer_type"))
    if answer_type not in INSTRUCTIONS:
        raise BadRow(f"{name}: answer_type {answer_type:.40}: one of {', '.join(INSTRUCTIONS)}")
    # the answer is read with the options: it may be one of them, or its number
    row["options"] = _read_options(row.get("options"), name)
    if needs_answer or row.get("answer") is not None:
        row["answer"] = _read_answer(row.get("answer"), answer_type, row["options"], name)
    _check_texts(row, name)
    _check_media(row, name)
    _check_keys(row, name)
    return row


def from_video_r1(record):
    """
    problem, problem_type, data_type, solution, path, process -> the same in our fields.

    The answer is what stands in <answer> tags of `solution`, else the record's own `answer`, else the
    solution. raises ValueError
    """
    problem_type = str(record.get("problem_type"))
    if problem_type not in PROBLEM_TYPES:
        types = ", ".join(PROBLEM_TYPES)
        raise ValueError(f"problem_type {problem_type:.40}: one of {types}")
    row = dict(question=record["problem"], answer_type=PROBLEM_TYPES[problem_type])

    solution = record.get("solution")
    tagged = None
    if isinstance(solution, str):
        tagged = re.search(r".*<answer>(.*?)(?:</answer>|$)", solution, re.DOTALL)
    if tagged:
        row["answer"] = tagged[1].strip()
    elif record.get("answer") is not None:
        row["answer"] = without_tags(record["answer"])
    else:
        row["answer"] = without_tags(solution)

    path = record.get("path") or {}
    if not isinstance(path, dict):  # AVQA-R1 has {"image": ..., "audio": ...}
        path = {str(record.get("data_type")): path}
    for kind, file in path.items():
        if kind not in ("video", "audio", "image"):
            raise ValueError(f"data_type {kind:.40}: one of video, audio, image")
        row["images" if kind == "image" else kind] = file

    if isinstance(record.get("process"), str):
        row["reasoning"] = without_tags(record["process"])
    return row


def without_tags(text):
    return TAGS.sub("", text).strip() if isinstance(text, str) else text


def _check_characters(row, name):
    # an emoji cut in half is JSON, but no UTF-8: tokenizers fail on it
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise BadRow(f"{name!a}: a text has half a character, {half}: mend it") from None


def _read_options(options, name):
    """-> list of str, dict of letter -> str, or None. IntentBench writes a list as its repr."""
    problem = BadRow(f"{name}: options {options!r:.60}: give a list or dict A..J of 1 to 10 texts")
    try:
        read = ast.literal_eval(options) if isinstance(options, str) and options else options
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise problem from None
    if not read:
        return None
    if not isinstance(read, (list, dict)):
        raise problem
    # tables fill up options that a row does not have
    if isinstance(read, dict):
        read = {letter: text for letter, text in read.items() if not _is_missing(text)}
    else:
        read = list(read)
        while read and _is_missing(read[-1]):
            read.pop()
    texts = list(read.values()) if isinstance(read, dict) else read
    if not all(isinstance(text, (str, int, float)) for text in texts):
        raise problem
    texts = [str(text) for text in texts]
    if isinstance(read, dict):
        read = dict(zip((str(letter) for letter in read), texts))
    else:
        read = texts
    try:
        table = option_table(read)
    except ValueError:  # no letters A..J
        raise problem from None
    if not all(text.strip() for text in table.values()):
        raise problem
    return read


def _is_missing(value):
    return value in (None, "") or (isinstance(value, float) and math.isnan(value))


def _read_answer(answer, answer_type, options, name):
    """-> str, as the row writes it; the number of an option becomes its letter."""
    if answer is None or answer == [] or str(answer).strip() == "":
        raise BadRow(f"{name}: empty answer: give one")
    allowed = (str, int, float, list) if answer_type == "multi" else (str, int, float)
    try:
        if not isinstance(answer, allowed):
            raise ValueError(f"a {type(answer).__name__} is not a valid {answer_type} answer")
        rewards.accuracy_reward(None, answer, answer_type, options)  # raises on a bad truth
    except (ValueError, TypeError) as error:
        raise BadRow(f"{name}: {error}: mend answer, answer_type or options") from None
    if isinstance(answer, str) or answer_type not in ("choice", "multi"):
        return str(answer).strip()

    # an index, or a list of letters, texts and indices
    letters = []
    for letter in LETTERS:
        if rewards.accuracy_reward(letter, answer, answer_type, options) > 0:
            letters.append(letter)
    text = ", ".join(letters)
    if rewards.accuracy_reward(text, answer, answer_type, options) != 1:  # options are letters
        raise BadRow(f"{name}: answer {answer!r} has no letter of its own: give the option's text")
    return text


def _check_texts(row, name):
    """Texts are texts, and hold nothing that the model's chat format reserves."""
    texts = {}
    for key in ("question", "hint", "audio_caption", "reasoning", "answer"):
        texts[key] = row.get(key) or ""
    for letter, text in option_table(row["options"]).items():
        texts[f"option {letter}"] = text
    for key, text in texts.items():
        if not isinstance(text, str):
            raise BadRow(f"{name}: {key} is {text!r:.40}: give it as text")
        reserved = RESERVED.search(text)
        if not reserved and key in ("reasoning", "answer"):
            reserved = TAGS.search(text)
        if reserved:
            raise BadRow(f"{name}: {key} holds the reserved {reserved[0]}: remove it")
    if not texts["question"].strip():
        raise BadRow(f"{name}: empty question: give it as text")


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

    use_audio = row.get("use_audio")
    if use_audio not in (None, False, True, "auto"):
        raise BadRow(f'{name}: use_audio {use_audio!r:.20}: give true, false or "auto"')
    if use_audio == "auto" and (row.get("audio") or not row.get("video")):
        row["use_audio"] = False
    elif use_audio and (row.get("audio") or not row.get("video")):
        raise BadRow(f"{name}: use_audio is for sound in `video`: set it to false for `audio`")

    start, end = row.get("start"), row.get("end")
    are_numbers = all(isinstance(time, (int, float, type(None))) for time in (start, end))
    if not (are_numbers and 0 <= (start or 0) < (1e9 if end is None else end)):
        times = f"start {start!r:.20}, end {end!r:.20}"
        raise BadRow(f"{name}: {times}: give seconds, start before end")


def _check_keys(row, name):
    for key in row.keys() - FIELDS:
        near = difflib.get_close_matches(key.lower(), FIELDS, n=1, cutoff=0.8)
        # a misspelt key would silently change what the model sees
        if near and row.get(near[0]) in (None, []):
            raise BadRow(f"{name}: unknown key {key!r}: did you mean {near[0]}? else rename it")


# ---- parts of a row ----------------------------------------------------------------------------


def answer_spec(row):
    """-> (answer, answer_type, options), as the scorer and the leak test take them."""
    return row["answer"], row["answer_type"], row.get("options")


def media_paths(row):
    """All files that a row names: its video, its sound or sounds, its images."""
    paths = [row.get("video")]
    for key in ("audio", "images"):
        value = row.get(key)
        paths += value if isinstance(value, list) else [value]
    return [path for path in paths if path]


def clip_of(row):
    """All that decides what is decoded for a row: its files, and what of them is taken."""
    files = (row.get("video"), *media_paths(row))
    return (*files, row.get("use_audio") or False, row.get("start"), row.get("end"))


def correct_letter(row):
    """The letter of a choice row's answer, as the scorer reads it."""
    return normalize_answer(row["answer"], "choice", row["options"])


def question_text(row, audio_captions):
    """The user's turn: audio caption if wanted, question, options, and how to answer."""
    lines = []
    if audio_captions and row.get("audio_caption"):
        lines.append(f"Sound: {row['audio_caption']}.")
    lines.append(row["question"])
    options = option_table(row.get("options"))
    if options:
        lines.append(" ".join(f"{letter}. {text}" for letter, text in options.items()))
    lines.append(INSTRUCTIONS[row["answer_type"]])
    return "\n".join(lines)


def completion_text(row):
    """What stage 0 teaches the model to write."""
    return f"<think>{row['reasoning']}</think><answer>{row['answer']}</answer>"
