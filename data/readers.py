"""
Files of records as people have them: JSON arrays and lines, CSV, parquet, AVE's own; told by content,
never by the name. Streamed: a million records take no more memory than one.
"""

import csv
import json
import re

from data.clips import BadRow

CHUNK, LONGEST = 1 << 20, 1 << 26  # characters read at one time; of one record, at most
LARGEST = 4 << 30  # bytes of a row group of a parquet file, unpacked, at most
NO_HEADER = {  # columns of what is published without their names
    "&": ("Category", "VideoID", "Quality", "StartTime", "EndTime"),  # AVE
    ",": ("youtube_id", "start", "label", "split"),  # VGGSound
}


def records(path, unwrap=True):
    """
    Yields the records of a file, dicts; in the place of one that cannot be read, a BadRow.

    unwrap   a file that is one object with a list of records in it gives these; False: the object
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    if head[:4] == b"PAR1":
        yield from _parquet(path)
        return
    try:
        with open(path, encoding=_encoding(head), newline=None) as file:
            start = (re.search(r"\S", text) or [" "])[0] if (text := file.read(4096)) else " "
            file.seek(0)
            if start == "{":
                yield from _lines(file, path.name, unwrap)
            else:
                read = _array if start == "[" else _table
                yield from read(file, path.name)
    except UnicodeDecodeError as error:
        yield BadRow(f"{path.name} is neither UTF-8 nor UTF-16 ({error.reason}): convert it")


def _encoding(head):
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if b"\0" in head[:64]:  # ASCII letters have a zero byte each
        return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    return "utf-8-sig"


def _array(file, name):
    """A JSON array, item by item. What follows a broken item cannot be found: it is lost."""
    decode, gap, text = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), file.read(CHUNK)
    at, count = text.index("[") + 1, 0
    while True:
        at = gap.match(text, at).end()
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decode(text, at)
        except ValueError as error:  # cut off by the end of what was read, or broken
            more = file.read(CHUNK) if len(text) - at < LONGEST else ""
            if not more:
                why = f"{name}: item {count} is not JSON ({error.msg}): it and all that follows is lost"
                yield BadRow(f"{why}: mend it, or fetch the file again")
                return
            text, at = text[at:] + more, 0
            continue
        yield item if isinstance(item, dict) else BadRow(f"{name}: item {count} is no object")
        count += 1
        if at > CHUNK:
            text, at = text[at:], 0


def _lines(file, name, unwrap):
    """JSON lines; a file that is one object is one record, or the list of records that it holds."""
    first, second = file.readline(), file.readline()
    file.seek(0)
    try:
        if not second.strip() or not _is_json(first):
            whole = json.load(file)
            yield from _held(whole) if unwrap else [whole]
            return
    except ValueError:
        file.seek(0)  # broken lines, each to be named
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                item = json.loads(line)
                yield item if isinstance(item, dict) else BadRow(f"{name}:{number} is no object")
            except (ValueError, RecursionError) as error:
                yield BadRow(f"{name}:{number} is not JSON ({error})")


def _is_json(text):
    try:
        return json.loads(text) is not None
    except ValueError:
        return False


def _held(whole):
    """{"data": [{...}, ...]} -> its records; an object that is itself a record -> [it]."""
    lists = [k for k, v in whole.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    is_record = len(lists) != 1 or lists[0] in ("messages", "conversations", "prompt")
    return [whole] if is_record else whole[lists[0]]


def _table(file, name):
    line = file.readline()
    file.seek(0)
    mark = "&" if line.count("&") == 4 else "\t" if "\t" in line else ","
    cells = [cell.strip() for cell in line.split(mark)]
    plain = NO_HEADER.get(mark, ())
    nameless = mark == "&" and cells[0] != plain[0] or len(cells) == 4 and cells[1].isdigit()
    names = plain if nameless else cells
    quoting = csv.QUOTE_NONE if mark == "&" else csv.QUOTE_MINIMAL
    for number, row in enumerate(csv.reader(file, delimiter=mark, quoting=quoting), 1):
        if not row or number == 1 and not nameless:
            continue
        if len(row) == len(names):
            yield dict(zip(names, (cell.strip() for cell in row)))
        else:
            yield BadRow(f"{name}:{number} has {len(row)} columns of {len(names)}")


def _parquet(path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadRow(f"{path} is parquet: pip install pyarrow, or convert it to JSON") from None
    try:
        file = ParquetFile(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        if any(group.total_byte_size > LARGEST for group in groups):
            yield BadRow(
                f"{path.name}: a row group of over {LARGEST >> 30} GB unpacked: split the file"
            )
            return
        for batch in file.iter_batches(256):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
        yield BadRow(f"{path.name} cannot be read as parquet ({error}): fetch it again")
