"""The command that continues the present run, as messages print it."""

import os
import re
import shlex
import sys
from pathlib import Path


def resume_command(*more_flags):
    """The present command line with --resume, and with more flags if any."""
    words = list(sys.argv)
    if "--resume" not in words:
        words.append("--resume")
    return shlex.join([*launcher(), *words, *more_flags])


def launcher():
    """The words before the script: ["python"], or torchrun with all its own flags."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return ["python"]
    try:  # the parent process is torchrun's agent, and Linux shows its command line
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
        is_torchrun = [bool(re.search(r"torchrun$|distributed.run$", word)) for word in words]
        begin = is_torchrun.index(True) + 1
        end = words.index(sys.argv[0], begin)
        return ["torchrun", *words[begin:end]]
    except (OSError, ValueError):
        return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
