"""Small writes to disk that are whole or not there at all."""

import contextlib
import fcntl
import json
import math
import os
import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def write_text(path, text):
    """Writes the whole text or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def temp_dir(folder):
    """An empty folder FOLDER.part; the caller renames it to FOLDER when all of it is written."""
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def append_json(path, item):
    """Appends one line of JSON. JSON has no NaN and no infinity: these are written as null."""
    is_finite = lambda value: not isinstance(value, float) or math.isfinite(value)  # noqa: E731
    finite = {key: value if is_finite(value) else None for key, value in item.items()}
    with open(path, "a") as file:
        file.write(json.dumps(finite) + "\n")


@contextlib.contextmanager
def file_lock(folder):
    """Only one process at a time is in here with the same folder; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:  # closing the file releases the lock
        with contextlib.suppress(OSError):  # this file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
