"""
Rows made ready to train on: checked, and given what the frozen models know of them.

    python prepare.py check rows.jsonl            # decode every row, report each that would not train
    python prepare.py captions --data rows.jsonl --out heard.jsonl --captioner http://localhost:8001/v1 \\
        --captioner-model moonshotai/Kimi-Audio-7B-Instruct
    python prepare.py hints --data heard.jsonl --out hinted.jsonl --teacher http://localhost:8002/v1 \\
        --teacher-model Qwen/Qwen2.5-VL-72B-Instruct

In the place of a URL a Hugging Face folder may stand: then the model is asked in this process.
"""

import argparse
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from run.arguments import PARSER  # before torch
from run.ending import main_guard

from tqdm import tqdm

from omni.model import InputBuilder
from rows import data, limits
from rows.clips import BadRow, decode_clip
from rows.reader import num_decoders
from teachers.captions import find_caption
from teachers.fill import add_flags, fill, from_args
from teachers.hint_writer import ask_hint
from teachers.leaks import hint_leak


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, told):
        return commands.add_parser(name, help=told, description=told, **PARSER)

    check = command("check", "decode every row of a JSONL, report each that would not train")
    check.add_argument("file", help="JSONL of rows")
    check.add_argument("--model", help="also count prompt tokens with this model's processor")
    limits.add_flags(check, keeps_clips=False)
    captions = command("captions", "write audio_caption into every row that has sound (stage 2)")
    add_flags(captions, "captioner")
    hints = command("hints", "write a hint into every row, one that does not give the answer away")
    add_flags(hints, "teacher")
    told = "replies a row, until one is no leak"
    hints.add_argument("--attempts", type=int, default=5, help=told)
    return parser.parse_args(argv)


# ---- check -------------------------------------------------------------------------------------


def examine(path, recipe, count_tokens, workers):
    """For each row of a JSONL, in order: None, or one line that says why it would not train."""
    path, seen, waiting = Path(path), set(), deque()

    def look(row):
        if isinstance(row, BadRow):
            raise row
        row = data.normalize_row(row)
        clip = decode_clip(row, path.parent, recipe)
        if count_tokens:
            count_tokens(row, clip)

    def told(where, looked):
        if problem := looked.exception():
            if not isinstance(problem, BadRow):
                raise problem
            return f"{where}: {str(problem).removeprefix(f'{where}: ')}"

    with open(path, "rb") as file, ThreadPoolExecutor(workers) as pool:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name}:{number}"
                try:
                    row = data.parse_line(line, where)
                    if (key := hash(prompt_id := data.row_id(row, where))) in seen:
                        raise BadRow(f"row {prompt_id}: the id occurs twice: make ids unique")
                    seen.add(key)
                except BadRow as problem:
                    row = problem
                waiting.append((where, pool.submit(look, row)))
            while len(waiting) > 4 * workers:
                yield told(*waiting.popleft())
        yield from (told(*item) for item in waiting)


def check(args):
    recipe, count_tokens, num_rows, num_bad = limits.recipe_from(args), None, 0, 0
    data.check_file(args.file)
    if args.model:
        build = InputBuilder(args.model, recipe, Path(args.file).parent, audio_captions=True)
        count_tokens = lambda row, clip: build.from_clip(row, clip, row.get("hint"))  # noqa: E731
    with open(args.file, "rb") as file:
        total = sum(1 for line in file if line.strip())
    told = examine(args.file, recipe, count_tokens, num_decoders())
    for problem in (bar := tqdm(told, "rows", total, disable=None)):
        num_rows, num_bad = num_rows + 1, num_bad + bool(problem)
        if problem:
            bar.write(problem)
    print(f"{num_rows} rows, {num_bad} would not train")
    sys.exit(1 if num_bad or not num_rows else 0)


# ---- captions and hints ------------------------------------------------------------------------


def captions(args):
    with from_args(args, args.captioner, args.captioner_model) as teacher:
        find, keep = lambda row: find_caption(teacher, row), lambda row, text: None
        return fill(teacher, args.data, args.out, "audio_caption", find, keep, args.concurrency)


def hints(args):
    with from_args(args, args.teacher, args.teacher_model) as teacher:
        find = lambda row: ask_hint(teacher, row, max(args.attempts, 1))  # noqa: E731
        keep = lambda row, hint: hint_leak(hint, *data.truth(row))  # noqa: E731
        return fill(teacher, args.data, args.out, "hint", find, keep, args.concurrency)


def main(argv=None):
    args = parse_args(argv)
    if args.command == "check":
        check(args)
    counts = captions(args) if args.command == "captions" else hints(args)
    sys.exit(1 if counts["without"] else 0)


if __name__ == "__main__":
    main_guard(main, BadRow)
