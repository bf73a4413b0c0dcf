"""Small writes to disk that are whole or absent, and streams that may go away."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

# ---- files -------------------------------------------------------------------------------------


def file_problem(path):
    """Why there is no file at a path (str), or None if there is one."""
    path = Path(path)
    if path.is_file():
        return None
    return f"{path} is a folder" if path.is_dir() else f"there is no file {path}"


def write_text(path, text):
    """Writes the whole text or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def append_json(path, item):
    """Appends one line of JSON. JSON has no NaN and no infinity: these are written as null."""
    finite = {}
    for key, value in item.items():
        is_broken = isinstance(value, float) and not math.isfinite(value)
        finite[key] = None if is_broken else value
    with open(path, "a") as file:
        file.write(json.dumps(finite) + "\n")


# ---- folders -----------------------------------------------------------------------------------


def temp_dir(folder):
    """An empty folder FOLDER.part; the caller renames it to FOLDER when all of it is written."""
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def default_file_modes(folder):
    """
    Gives the files of a new folder the mode that the user's umask asks for. safetensors writes files
    that only their owner can read, so that nobody else could load the weights.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextlib.contextmanager
def file_lock(folder):
    """Only one process at a time is in here with the same folder; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:  # closing the file releases the lock
        with contextlib.suppress(OSError):  # this file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- the screen --------------------------------------------------------------------------------


class SafeStream:
    """
    stdout or stderr that may go away (`| head`): the run continues without it. A letter that the
    terminal's encoding lacks is written as its code.
    """

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def safe_streams():
    """In here sys.stdout and sys.stderr are SafeStreams."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
