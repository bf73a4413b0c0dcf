"""
A field of every row of a file, from a model that is asked about each: one row in, one row out.
"""

import json
import os
from collections import deque
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from data.clips import BadRow
from data.media_flags import add_media_flags, media_config_from
from data.rows import check_file, normalize_row, parse_line
from run import processes
from run.errors import UserError
from teachers.chat import NoAnswer


def add_flags(parser, who):
    """The flags of a command that asks a model about the rows of a file."""
    flag = parser.add_argument
    flag("--data", required=True, help="JSONL of rows")
    flag("--out", required=True, help="JSONL to write, in the folder of --data; one row a row")
    flag(f"--{who}", required=True, help="URL of a chat server (http://host:8000/v1) or a folder")
    flag(f"--{who}-model", help="the model's name on the server")
    flag("--answers", help="folder of the answers kept (default: OUT.answers)")
    flag("--concurrency", type=int, default=16, help="requests at one time")
    flag("--timeout", type=float, default=300.0, help="seconds for one attempt")
    flag("--retries", type=int, default=4, help="attempts after the first")
    flag("--frames-as", choices=["images", "video"], default="images", help="video: vLLM only")
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="for a folder's model")
    add_media_flags(parser, keeps_clips=False)


def from_args(args, where, name):
    """-> the Teacher of such a command."""
    from teachers.client import Teacher  # slow to load: flags are parsed before it

    check_file(args.data)
    if Path(args.out).resolve().parent != Path(args.data).resolve().parent:
        raise UserError("--out must lie beside --data: the rows' media paths are relative to it")
    if args.concurrency < 1 or args.retries < 0 or args.timeout <= 0:
        raise UserError("--concurrency and --timeout must be over 0, --retries at least 0")
    device = processes.choose_device(args.device)
    recipe, answers = media_config_from(args), args.answers or f"{args.out}.answers"
    return Teacher(
        where,
        name,
        Path(args.data).parent,
        recipe,
        answers,
        args.concurrency,
        args.timeout,
        args.retries,
        args.frames_as,
        device,
    )


def fill(teacher, source, out, field, find, keep, concurrency):
    """
    Copies a JSONL row by row and gives each row a field that it lacks.

    find     callable(row) -> text or None (the row needs none); raises NoAnswer, BadRow
    keep     callable(row, text) -> None, or why the text that a row has is not to be kept
    returns  dict of counts: rows, kept (had it), new, needless, without
    raises   UserError    after writing OUT: the model cannot be reached or refuses us

    One row in, one row out, in order. A row without an answer is named and stays as it is, but for
    a text that is not to be kept. An OUT of before is not read: its rows, their clips or the model
    may have changed since; the answers kept know, and give again what is still true.
    """
    lines, name = Path(source).read_bytes().splitlines(), Path(source).name
    counts, waiting, dead = dict(rows=0, kept=0, new=0, needless=0, without=0), deque(), 0
    part, late = Path(f"{out}.part"), []  # late: lines without an answer since the model's end

    def look(line, where):
        """-> the line to write, what became of the row, why it has no answer."""
        try:
            raw = parse_line(line, where)
            row = normalize_row(raw)
            text = raw.pop(field, None)
            why = keep(row, text) if text else None
            if text and not why:
                return line, "kept", None
            if why:
                bar.write(f"row {row['prompt_id']}: its {field} is not kept: {why}")
                line = json.dumps(raw).encode()
            if text := find(row):
                return json.dumps(raw | {field: text}).encode(), "new", None
            return line, "needless", None
        except (NoAnswer, BadRow, UserError) as problem:
            if isinstance(problem, UserError):
                teacher.end(str(problem))
            return line, "without", problem

    def settle(number, asked):
        nonlocal dead
        line, kind, problem = asked.result()
        dead = 0 if kind == "new" else dead + getattr(problem, "dead", False)
        if teacher.ended and isinstance(problem, (NoAnswer, UserError)):
            if not late:
                bar.write(f"{teacher.ended}: for the rest only the answers kept are looked up")
            late.append(number)
        elif problem:
            bar.write(f"{name}:{number}: {problem}")
        if dead > 2 * concurrency and not teacher.ended:
            teacher.end(f"{teacher.where} does not answer")
        counts["rows"] += 1
        counts[kind] += 1
        file.write(line + b"\n")
        bar.update()

    with open(part, "wb") as file, tqdm(total=len(lines), desc=field, disable=None) as bar:
        for number, line in enumerate(lines, 1):
            if line.strip():
                waiting.append((number, teacher.submit(look, line, f"{name}:{number}")))
            if len(waiting) > 4 * concurrency:
                settle(*waiting.popleft())
        while waiting:
            settle(*waiting.popleft())
    os.replace(part, out)
    if late:
        print(f"{name}: no answer since then: lines {spans(late)}")
    told = (
        f"{out}: {counts['rows']} rows: {counts['new']} got their {field}, {counts['kept']} had it"
    )
    told += f", {counts['needless']} need none, {counts['without']} without"
    print(told + (": named above; mend the cause and run again" if counts["without"] else ""))
    if teacher.ended:
        raise UserError(f"{teacher.ended}; the answers so far are kept: run again to go on")
    return counts


def spans(numbers):
    """[1, 3, 4, 5] -> "1, 3-5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda x: x[1] - x[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
