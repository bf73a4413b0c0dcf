"""
Files of records as people publish them: JSON arrays and lines, CSV, parquet, Arrow, AVE's own table,
each also as .gz. The form is detected from the content, never from the name. Streamed: a million records
take no more memory than one.
"""

import csv
import gzip
import json
import re
from pathlib import Path

from data.clips import BadRow

CHUNK = 1 << 20  # characters read at a time
LONGEST_RECORD = 1 << 26  # characters
LARGEST_ROW_GROUP = 4 << 30  # bytes of a row group of a parquet file, unpacked

GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"
ARROW_MAGICS = (b"ARROW1", b"\xff\xff\xff\xff")  # a file; a stream, as datasets.save_to_disk writes

# tables that are published without a line of column names: separator -> names
AVE_COLUMNS = ("Category", "VideoID", "Quality", "StartTime", "EndTime")  # separated by &
VGGSOUND_COLUMNS = ("youtube_id", "start", "label", "split")
VGGSOUND_TEST_COLUMNS = ("video_file", "label")  # its authors' data/test.csv
VGGSOUND_FILE = re.compile(r"[\w-]{11}_\d{6}(\.mp4)?")


def read_records(path, unwrap=True):
    """
    Yields the records of a file, dicts; in place of a record that cannot be read, a BadRow.

    unwrap   a file that is one object with a list of records in it gives these; False: the object
    """
    path = Path(path)
    try:
        with open_binary(path) as file:
            head = file.read(4096)
        if head.startswith(PARQUET_MAGIC):
            yield from _parquet_records(path)
        elif head.startswith(ARROW_MAGICS):
            yield from _arrow_records(path, is_file=head.startswith(ARROW_MAGICS[0]))
        else:
            yield from _text_records(path, text_encoding(head), unwrap)
    except UnicodeDecodeError as error:
        yield BadRow(
            f"{path.name} is neither UTF-8 nor UTF-16 ({error.reason}): save it as one of them, or "
            "give JSON, JSONL, CSV or parquet"
        )
    except (EOFError, gzip.BadGzipFile) as error:
        yield BadRow(f"{path.name} cannot be unpacked ({error}): fetch it again")


# ---- bytes and text ----------------------------------------------------------------------------


def open_binary(path):
    with open(path, "rb") as file:
        is_gzip = file.read(2) == GZIP_MAGIC
    return gzip.open(path) if is_gzip else open(path, "rb")


def open_text(path, encoding):
    with open(path, "rb") as file:
        is_gzip = file.read(2) == GZIP_MAGIC
    if is_gzip:
        return gzip.open(path, "rt", encoding=encoding)
    return open(path, encoding=encoding, newline=None)


def text_encoding(head):
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if b"\0" in head[:64]:  # in UTF-16, ASCII letters have a zero byte each
        return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    return "utf-8-sig"


def _text_records(path, encoding, unwrap):
    with open_text(path, encoding) as file:
        start = file.read(4096).lstrip()[:1]
        file.seek(0)
        if start == "[":
            yield from _array_records(file, path.name)
        elif start == "{":
            yield from _object_records(file, path.name, unwrap)
        else:
            yield from _table_records(file, path.name)


# ---- JSON --------------------------------------------------------------------------------------


def _array_records(file, name):
    """A JSON array, item by item. What follows a broken item cannot be found: it is lost."""
    raw_decode = json.JSONDecoder().raw_decode
    separator = re.compile(r"[\s,]*")
    text = file.read(CHUNK)
    position = text.index("[") + 1
    count = 0
    while True:
        position = separator.match(text, position).end()
        if text[position : position + 1] == "]":
            return
        try:
            item, position = raw_decode(text, position)
        except ValueError as error:
            # cut off by the end of what was read so far, or broken
            more = file.read(CHUNK) if len(text) - position < LONGEST_RECORD else ""
            if not more:
                yield BadRow(
                    f"{name}: item {count} is not JSON ({error.msg}): it and all that follows is "
                    "lost: mend it, or fetch the file again"
                )
                return
            text = text[position:] + more
            position = 0
            continue
        yield item if isinstance(item, dict) else BadRow(f"{name}: item {count} is not an object")
        count += 1
        if position > CHUNK:
            text = text[position:]
            position = 0


def _object_records(file, name, unwrap):
    """JSON lines; a file that is one object is one record, or the list of records that it holds."""
    # one object over many lines, or one object a line? the first line alone decides
    first_line = file.readline()
    second_line = file.readline()
    file.seek(0)
    if second_line.strip() and _is_json(first_line):
        yield from _json_lines(file, name)
        return
    try:
        whole = json.load(file)
    except ValueError:  # broken lines: each is named
        file.seek(0)
        yield from _json_lines(file, name)
        return
    yield from _records_of_object(whole) if unwrap else [whole]


def _json_lines(file, name):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadRow(f"{name}:{number} is not JSON ({error})")
            continue
        yield item if isinstance(item, dict) else BadRow(f"{name}:{number} is not an object")


def _is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _records_of_object(whole):
    """{"data": [{...}, ...]} -> its records; an object that is itself a record -> [it]."""
    lists = []
    for key, value in whole.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lists.append(key)
    turns = ("messages", "conversations", "prompt")
    if len(lists) != 1 or lists[0] in turns:
        return [whole]
    return whole[lists[0]]


# ---- tables ------------------------------------------------------------------------------------


def _table_records(file, name):
    """A table of text: comma, semicolon, tab or & between the columns."""
    line = file.readline()
    file.seek(0)
    if not line.strip():
        yield BadRow(f"{name} is empty, or begins with an empty line")
        return
    separator = _separator_of(line)
    # AVE's labels hold quotes and commas as they are
    quoting = csv.QUOTE_NONE if separator == "&" else csv.QUOTE_MINIMAL
    first = next(csv.reader([line], delimiter=separator, quoting=quoting), [])
    first = [cell.strip() for cell in first]
    columns = _columns_without_header(first, separator)
    has_header = columns is None
    if has_header:
        columns = first
    if len(columns) < 2:
        yield BadRow(
            f"{name} is none of JSON, JSONL, parquet, Arrow and a table with , ; tab or & between its "
            "columns: convert it to JSONL or CSV"
        )
        return

    for number, row in enumerate(csv.reader(file, delimiter=separator, quoting=quoting), 1):
        if not row or (number == 1 and has_header):
            continue
        if len(row) != len(columns):
            yield BadRow(f"{name}:{number} has {len(row)} columns of {len(columns)}")
            continue
        yield dict(zip(columns, (cell.strip() for cell in row)))


def _separator_of(line):
    if line.count("&") == 4:
        return "&"
    # quoted cells may hold the other separators
    bare = re.sub(r'"[^"]*"', "", line)
    counts = {separator: bare.count(separator) for separator in ",;\t"}
    return max(counts, key=counts.get)  # the first of them if there is none


def _columns_without_header(first, separator):
    """The columns of a table that begins with its first record; None if it begins with their names."""
    if separator == "&":
        return None if first[0] == AVE_COLUMNS[0] else AVE_COLUMNS
    if len(first) == 4 and first[1].isdigit():
        return VGGSOUND_COLUMNS
    if len(first) == 2 and VGGSOUND_FILE.fullmatch(first[0]):
        return VGGSOUND_TEST_COLUMNS
    return None


# ---- parquet and Arrow -------------------------------------------------------------------------


def _parquet_records(path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadRow(f"{path} is parquet: pip install pyarrow, or convert it to JSON") from None
    try:
        file = ParquetFile(path)
        metadata = file.metadata
        for i in range(metadata.num_row_groups):
            if metadata.row_group(i).total_byte_size > LARGEST_ROW_GROUP:
                limit = LARGEST_ROW_GROUP >> 30
                yield BadRow(f"{path.name}: a row group over {limit} GB unpacked: split the file")
                return
        for batch in file.iter_batches(256):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        yield BadRow(f"{path.name} cannot be read as parquet ({error}): fetch it again")


def _arrow_records(path, is_file):
    """What datasets.save_to_disk writes."""
    try:
        from pyarrow import ipc, memory_map
    except ImportError:
        raise BadRow(f"{path} is Arrow: pip install pyarrow, or convert it to JSON") from None
    try:
        with memory_map(str(path)) as source:
            if is_file:
                reader = ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = ipc.open_stream(source)
            for batch in batches:
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        yield BadRow(
            f"{path.name} cannot be read as Arrow ({error}): write it with Dataset.to_parquet()"
        )
