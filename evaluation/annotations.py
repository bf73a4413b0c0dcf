"""
Published annotation files -> their records, and what they tell of media and choices in our terms.
"""

import json
import os
from pathlib import Path

from data.clips import BadRow
from data.rows import LETTERS, cut_options  # noqa: F401


def annotations(root, *patterns):
    """The files of the first pattern that has any -> their records, [(file, record), ...]."""
    for pattern in patterns:
        files = sorted(Path(root).glob(pattern))
        if files:
            return [(file, item) for file in files for item in read_table(file)]
    raise BadRow(f"no {' or '.join(patterns)} in {root}")


def read_table(path):
    """The records of a .json, .jsonl or .parquet file; a JSON object is a list of its pairs."""
    try:
        if path.suffix == ".parquet":
            return read_parquet(path)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{path} cannot be read ({error}): fetch it again") from None
    return list(table.items()) if isinstance(table, dict) else table


def read_parquet(path):
    try:
        from pyarrow.parquet import read_table as read
    except ImportError:
        raise BadRow(f"{path} is parquet: pip install pyarrow, or convert it to JSON") from None
    return read(path).to_pylist()


def place(root, *candidates):
    """The first of these paths that is there, relative to root, else the first: it is missing."""
    there = (path for path in candidates if os.path.exists(Path(root) / path))
    return next(there, candidates[0])


def video_file(root, name, *folders):
    """A video of which the annotations tell the name without its ending."""
    endings = (".mp4", ".MP4", ".mkv", ".webm")
    return place(root, *(f"{d}/{name}{end}" for d in folders for end in endings))


def certain(options, truth):
    """A choice's keys of a row; an index is told so that it is not taken for another option."""
    options = [str(option).strip() for option in options]
    letters = any(len(x) == 1 and x.upper() in LETTERS for x in options)
    if letters and isinstance(truth, int) and truth < len(options):
        truth = options[truth]
    return dict(options=options, answer=truth, answer_type="choice")


def by_letter(options, answer):
    """A choice whose truth is told as a letter."""
    letter = str(answer).strip("(). ").upper()
    return certain(options, LETTERS.index(letter) if letter in set(LETTERS) else answer)


def by_key(choices, answer):
    """A choice whose options have letters of their own; an empty one is none of them."""
    options = {key: str(text).strip() for key, text in choices.items() if text not in (None, "")}
    truth = str(answer).strip("(). ").upper()
    if any(len(x) == 1 and x.upper() in LETTERS for x in options.values()):
        truth = options.get(truth, truth)  # as in `certain`
    return dict(options=options, answer=truth, answer_type="choice")


def by_text(options, answer):
    """A choice whose truth is told as the text of an option."""
    texts, answer = [str(x).strip() for x in options], str(answer).strip()
    return certain(options, texts.index(answer) if answer in texts else answer)
