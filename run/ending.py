"""
How a run ends: with one line where a user can do something about it, or because it was asked to.
"""

import errno
import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

from run import Stopped, UserError, files
from run.processes import gather, rank, world_size

import torch
import torch.distributed as dist
from safetensors import SafetensorError


class Screen:
    """
    What is printed, on a stream that may go away (`| head`): the run goes on without it. A letter that
    the terminal's encoding lacks is written as its number.
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


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}
PEER_GONE = "Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited"
TURN = {  # the call in which a GPU's memory ran out -> where that is, and what to turn
    "rollout": "the rollout: fewer --prompts-per-step (eval.py: --batch-size), or --max-new-tokens",
    "gradient": "the update: lower --micro-tokens, also when going on with --resume",
    "encoded": "the towers: lower --max-frames or --max-pixels",
    "stored_kls": "reading stored completions again: lower --max-frames or --max-pixels, or --no-hints",
}


def told(error, mendable):
    """The line for what a user can do something about; None for all else."""
    paths = FileNotFoundError, FileExistsError, NotADirectoryError
    if isinstance(error, (UserError, *mendable, *paths)):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "av":
        return f"{error}: pip install -r requirements.txt"
    if isinstance(error, OSError) and error.errno in DISK:
        denied = error.errno in (errno.EACCES, errno.EROFS)
        remedy = "give another path, or the right to use it" if denied else "make room"
        return f"{error.filename or 'disk'}: {error.strerror}: {remedy}, then go on with --resume"
    if isinstance(error, SafetensorError):
        return f"a weights file ({error}): is the disk full, or the file cut off?"
    if isinstance(error, torch.OutOfMemoryError):
        calls = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        always = "what every step needs: more GPUs, or --lora-rank 16"
        return f"out of GPU memory in {next((TURN[c] for c in calls if c in TURN), always)}"
    # gloo and NCCL have no class of their own for it
    if isinstance(error, RuntimeError) and world_size() > 1 and re.search(PEER_GONE, str(error)):
        others = "another process of the run has ended, see above"
        return f"rank {rank()}: {others}; go on with: {how_to_go_on()}"
    return None


def main_guard(main, *mendable):
    """
    Runs `main`; what a user can do something about ends it with one line and no traceback. Of
    several processes, one that ends by any error ends the others: nobody waits for it for ever.

    mendable   more exceptions of that kind, such as clips.BadRow
    """
    line, code, streams = None, 1, (sys.stdout, sys.stderr)
    _signals.clear()
    sys.stdout, sys.stderr = map(Screen, streams)
    try:
        files.check_versions()
        main()
    except Stopped as stop:
        line, code = stop.args
    except KeyboardInterrupt:
        line, code = "stopped", 128 + signal.SIGINT
    except Exception as error:
        line = told(error, mendable)
        if not line and world_size() == 1:
            raise
        if not line:
            traceback.print_exc()
            line = f"rank {rank()} has ended by the error above; go on with: {how_to_go_on()}"
    finally:
        files.at_end.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout, sys.stderr = streams
    if line:
        line = f"{Path(sys.argv[0]).name}: {line}"
        if world_size() == 1 and code == 1:
            sys.exit(line)
        if rank() == 0 or code == 1:
            print(line, file=sys.stderr if code else sys.stdout, flush=True)
        if world_size() > 1 and code == 1:
            os._exit(code)  # the others may be waiting for this rank: torchrun ends them
    if dist.is_initialized():
        dist.destroy_process_group()
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        # not by way of Python's own end: gloo's threads may be left, and abort in it (pytorch#179291)
        os._exit(code if line else 0)
    if line:
        sys.exit(code)


_signals = []  # (signal that asked this process to stop, when)
SAME = 3.0  # seconds in which a signal is the same one: launchers send theirs after the terminal's


def watch_signals():
    """From here on SIGTERM and Ctrl-C let the step finish; the next one ends at once."""

    def note(number, frame):
        now = time.monotonic()
        if _signals and now - _signals[0][1] > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not _signals and rank() == 0:  # print could be interrupted in the middle of itself
            os.write(2, b"stopping after this step; once more, in 3 seconds, stops at once\n")
        _signals.append((number, now))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def stop_asked():
    """The signal that asked any rank to stop, or None; the same on every rank."""
    return next((number for part in gather(_signals) for number, _ in part), None)


def how_to_go_on(*more):
    """The command that continues this run, with more flags."""
    words = [*sys.argv, *["--resume"][: "--resume" not in sys.argv], *more]
    return shlex.join([*launcher(), *words])


def launcher():
    """-> what stood before the script: torchrun with all that it was given, or python."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return ["python"]
    try:  # the parent is torchrun's agent: Linux tells its command line
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
        begin = 1 + next(i for i, w in enumerate(words) if re.search(r"torchrun$|distributed.run$", w))
        return ["torchrun", *words[begin : words.index(sys.argv[0], begin)]]
    except (OSError, ValueError, StopIteration):
        return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]


def end_of_step(step, steps, save_every, save):
    """
    Saves when it is time to, at the last step (the run may be lengthened), or when the run was asked to
    stop: then it ends here.
    """
    signal = stop_asked()
    if signal or (save_every and (step % save_every == 0 or step == steps)):
        save()
    if signal and step < steps:
        raise Stopped(f"step {step} is saved; go on with: {how_to_go_on()}", 128 + signal)
