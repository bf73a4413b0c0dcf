"""
Every row of a JSONL, decoded: which would not train, and why; which have sound.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from data.clips import BadRow, decode_clip
from data.rows import normalize_row, parse_line, row_id, stable_hash


class RowCheck(NamedTuple):
    problem: str | None  # one line that says why the row would not train
    has_sound: bool  # whether a video's own sound is heard; False for a bad row


def check_rows(path, config, builder, num_threads):
    """
    Yields a RowCheck for each row of a JSONL, in order.

    config    MediaConfig
    builder   models.inputs.InputBuilder that also counts the prompt's tokens, with the row's hint; or
              None
    """
    path = Path(path)
    ids = set()
    waiting = deque()  # (where, future of whether the clip has sound)

    def decode(row):
        row = normalize_row(row)
        clip = decode_clip(row, path.parent, config)
        if builder:
            builder.from_clip(row, clip, row.get("hint"))
        return clip.use_audio

    def parse(line, where):
        row = parse_line(line, where)
        prompt_id = row_id(row, where)
        key = stable_hash(prompt_id)
        if key in ids:
            raise BadRow(f"row {prompt_id}: the id occurs twice: make ids unique")
        ids.add(key)
        return row

    with open(path, "rb") as file, ThreadPoolExecutor(num_threads) as pool:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                waiting.append((where, pool.submit(decode, parse(line, where))))
            except BadRow as problem:
                waiting.append((where, problem))
            if len(waiting) > 4 * num_threads:
                yield _result(*waiting.popleft())
        for where, outcome in waiting:
            yield _result(where, outcome)


def _result(where, outcome):
    """outcome: a BadRow, or a future of whether the clip has sound. Waits for it."""
    problem = outcome
    if not isinstance(outcome, BadRow):
        problem = outcome.exception()
    if problem is None:
        return RowCheck(None, outcome.result())
    if not isinstance(problem, BadRow):
        raise problem
    return RowCheck(f"{where}: {str(problem).removeprefix(f'{where}: ')}", False)
