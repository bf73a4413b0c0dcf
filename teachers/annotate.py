"""
A frozen model (teachers/client.py) writes one field of every row of a file: the caption of its sound, or
a hint. One row in, one row out, in order. The commands are `prepare.py captions` and `prepare.py hints`.
"""

import json
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.clips import BadRow, has_sound_track
from data.rows import RESERVED, TAGS, answer_spec, normalize_row, parse_line
from run.errors import UserError
from teachers.backends import ChatError
from teachers.leaks import hint_leak

# ---- captions ------------------------------------------------------------------------------------

CAPTION_PROMPT = (
    "Describe what is heard in this recording in one or two short sentences: voices and what they "
    "say, music, other sounds, in the order in which they come, and how often. Say only what is "
    "heard. Reply with the description alone."
)
MAX_CAPTION_WORDS = 120


def write_caption(model, row):
    """The caption of a row's sound; None for a row without sound. Raises as FrozenModel.query."""
    if not (row.get("audio") or row.get("use_audio")):
        return None
    if row.get("use_audio") == "auto":  # heard only if the file has a sound track
        name = f"row {row['prompt_id']}"
        if not has_sound_track(name, model.media_folder, row["video"], model.media_config):
            return None

    def parse(reply):
        words = one_line(reply).strip("\"' ").split()
        if not has_words(words):
            raise ValueError("no words")
        return " ".join(words[:MAX_CAPTION_WORDS]).removesuffix(".")

    return model.query(
        row,
        CAPTION_PROMPT,
        modalities=("audio",),
        max_tokens=2 * MAX_CAPTION_WORDS,
        parse=parse,
    )


# ---- hints ---------------------------------------------------------------------------------------

HINT_PROMPT = """\
Above is a clip, if there is one. Below is a question about it, with its answer.

{request}

A student fails at this question. Write one short strategic hint: what to look at or listen to, \
and in which order, such as "first locate the object making the sound, then count". One sentence, \
at most {max_words} words. It must not give the answer away: no option or its letter, no part of \
the answer in other words, no count, nothing that rules options out. Reply with the hint alone."""
MAX_HINT_WORDS = 40
HINT_LABEL = re.compile(r"(?i)^(?:strategic )?hint\s*[:\-]\s*")


def write_hint(model, row, num_attempts):
    """
    A hint for a row. The teacher gets the question, options, answer, caption and frames.

    num_attempts  int     replies asked for, until one does not leak the answer [U9]
    returns       str     at most MAX_HINT_WORDS words on one line
    raises        ChatError    also if every attempt was rejected; otherwise as FrozenModel.query
    """
    keys = ("question", "options", "answer", "audio_caption")
    request = json.dumps({key: row[key] for key in keys if row.get(key)}, indent=1)
    prompt = HINT_PROMPT.format(request=request, max_words=MAX_HINT_WORDS)
    rejection = ""
    for attempt in range(num_attempts):
        reply = model.query(
            row,
            prompt + rejection,
            modalities=("frames",),
            max_tokens=3 * MAX_HINT_WORDS,
            parse=one_line,
            temperature=0.8 if attempt else 0.0,
            seed=attempt,
        )
        hint = HINT_LABEL.sub("", reply.strip("\"' ")).strip("\"' ")
        reason = hint_problem(hint, row)
        if not reason:
            return hint
        rejection = f"\n\nThis hint was refused, since {reason}: {hint[:300]}\nWrite another."
    # the rejected replies are cached: the same command would get the same ones
    message = f"row {row['prompt_id']}: no hint in {num_attempts} attempts; the last: {reason}"
    raise ChatError(f"{message}: raise --attempts")


def hint_problem(hint, row):
    """Why a hint cannot be used, or None."""
    if not has_words(hint):
        return "it has no words"
    if len(hint.split()) > MAX_HINT_WORDS:
        return f"it has over {MAX_HINT_WORDS} words"
    return hint_leak(hint, *answer_spec(row))


def has_words(texts):
    return any(c.isalnum() for c in "".join(texts))


def one_line(text):
    """A reply on one line, without what a row's text may not hold."""
    text = RESERVED.sub(" ", text)
    text = TAGS.sub(" ", text)
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())


# ---- every row of a file -------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a row."""

    number: int  # of its line, from 1
    line: bytes  # to be written
    kind: str  # "kept": it had the field; "new"; "needless": it needs none; "without"
    error: Exception | None = None  # why it is without
    note: str | None = None  # to be printed


def annotate_rows(model, source, out, *, field, write, check, concurrency):
    """
    Copies a JSONL and gives each row a field that it lacks.

    write    callable(row) -> text, or None: the row needs none; raises ChatError, BadRow
    check    callable(row, text) -> None, or why the text that a row already has cannot stay
    returns  dict of counts: rows, kept (had it), new, needless, without
    raises   UserError    after OUT is written: the model is unreachable or refuses us

    A row without a reply is named and stays as it is, except for a text that cannot stay. An OUT
    from before is not read: its rows, their clips or the model may have changed since. The cached
    replies give again what still holds.
    """
    source = Path(source)
    folder = Path(out).parent
    folder.mkdir(parents=True, exist_ok=True)
    prefix = None  # the way from OUT's folder to the media
    if folder.resolve() != source.parent.resolve():
        prefix = os.path.relpath(source.parent.resolve(), folder.resolve())
    lines = [(i, line) for i, line in enumerate(source.read_bytes().splitlines(), 1)]
    counts = dict(rows=0, kept=0, new=0, needless=0, without=0)
    unasked = []  # numbers of the lines left without, after the model was given up
    num_unreachable = 0  # failures in a row in which nobody answered

    def annotate(item):
        number, line = item
        if not line.strip():
            return None
        where = f"{source.name}:{number}"
        outcome = annotate_line(
            number, line, where, field=field, write=write, check=check, prefix=prefix
        )
        if isinstance(outcome.error, UserError):
            model.stop(str(outcome.error))
        return outcome

    part = Path(f"{out}.part")
    pool = ThreadPoolExecutor(concurrency)
    try:
        with open(part, "wb") as file, tqdm(total=len(lines), desc=field, disable=None) as bar:
            for outcome in map_in_order(pool, annotate, lines, max_ahead=4 * concurrency):
                bar.update()
                if outcome is None:  # an empty line
                    continue
                file.write(outcome.line + b"\n")
                counts["rows"] += 1
                counts[outcome.kind] += 1
                if outcome.note:
                    bar.write(outcome.note)

                if model.stop_reason and isinstance(outcome.error, (ChatError, UserError)):
                    if not unasked:
                        message = "for the rest only cached replies are looked up"
                        bar.write(f"{model.stop_reason}: {message}")
                    unasked.append(outcome.number)
                elif outcome.error:
                    bar.write(f"{source.name}:{outcome.number}: {outcome.error}")
                if outcome.kind == "new":
                    num_unreachable = 0
                elif getattr(outcome.error, "unreachable", False):
                    num_unreachable += 1
                if num_unreachable > 2 * concurrency:
                    model.stop(f"{model.where} does not answer")
        os.replace(part, out)
    finally:  # also after Ctrl-C: the program does not wait for requests
        pool.shutdown(wait=False, cancel_futures=True)
        why_stopped = model.stop_reason
        model.stop("closed")

    if unasked:
        print(f"{source.name}: no reply since then: lines {line_ranges(unasked)}")
    print(summary(out, field, counts))
    if prefix:
        print(f"its media lie in {source.parent}: train with --allow-outside, or link them")
    if why_stopped:
        raise UserError(f"{why_stopped}; the replies so far are cached: run again to continue")
    return counts


def annotate_line(number, line, where, *, field, write, check, prefix):
    """
    -> the Outcome of one line of the file.

    prefix   None, or what goes in front of the media paths
    """
    note = None
    try:
        raw = parse_line(line, where)
        row = normalize_row(raw)
        if prefix:
            raw = with_prefix(raw, prefix)
            line = json.dumps(raw).encode()
        text = raw.pop(field, None)
        if text:
            problem = check(row, text)
            if not problem:
                return Outcome(number, line, "kept")
            note = f"row {row['prompt_id']}: its {field} is not kept: {problem}"
            line = json.dumps(raw).encode()
        text = write(row)
        if not text:
            return Outcome(number, line, "needless", note=note)
        return Outcome(number, json.dumps(raw | {field: text}).encode(), "new", note=note)
    except (ChatError, BadRow, UserError) as error:
        return Outcome(number, line, "without", error=error, note=note)


def with_prefix(raw, prefix):
    """A row as it is in a file, its relative media paths with the prefix in front."""

    def moved(path):
        if "://" in path:  # a URL, which is refused where it is read
            return path
        return Path(os.path.normpath(os.path.join(prefix, path))).as_posix()

    raw = dict(raw)
    for key in ("video", "audio", "images", "path"):  # path: Video-R1
        value = raw.get(key)
        if isinstance(value, list):
            raw[key] = [moved(path) for path in value]
        elif isinstance(value, dict):  # AVQA-R1's path: {"image": ..., "audio": ...}
            raw[key] = {kind: moved(path) for kind, path in value.items()}
        elif value:
            raw[key] = moved(value)
    return raw


def map_in_order(pool, function, items, max_ahead):
    """-> function(item) of every item, in order; at most `max_ahead` are begun before their turn."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > max_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def summary(out, field, counts):
    line = f"{out}: {counts['rows']} rows: {counts['new']} got their {field}"
    line += f", {counts['kept']} had it, {counts['needless']} need none"
    line += f", {counts['without']} without"
    if counts["without"]:
        line += ": named above; fix the cause and run again"
    return line


def line_ranges(numbers):
    """[1, 3, 4, 5] -> "1, 3-5"."""
    ranges = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
