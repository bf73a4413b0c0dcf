"""
What a run is, whatever it trains: its processes, arguments, folder, end, checkpoints, metrics. No
module in here knows a model or a row.

Import it before torch: it sets how torch's threads wait, and how memory is taken.
"""

import ctypes
import os
import platform
from pathlib import Path

# With the default, waiting threads spin: on a busy laptop that makes small models 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded
# Every step has other lengths: without it, a GPU's memory ends up in pieces that are too small.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its name in older versions: the user has chosen
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# Large tensors on the CPU: else each is taken from the system, a page fault every 4 kB, and given back.
if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
    _mallopt = ctypes.CDLL(None).mallopt
    _mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes; the most that it takes
    _mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

HERE = Path(__file__).resolve().parent.parent  # of this code


class UserError(Exception):
    """A mistake of the user's: shown as one line."""


class Stopped(Exception):
    """The run ends here, and its state is saved. args: the line to print, the exit code."""
