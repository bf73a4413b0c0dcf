"""
Commands as real processes, with real signals and exit codes, forked from a process that has loaded all
modules: 0.1 s of CPU instead of 5 s each. A torchrun of several ranks is imitated: each rank is a
process with torchrun's variables, and if one fails, the others are ended.

What a test needs of a Popen is here too: pid, poll, wait, kill, send_signal, communicate, returncode.
"""

import functools
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = [
    "train_rl",
    "train_sft",
    "eval",
    "prepare",
    "toy",
    "data.toy_rows",
    "models.toy_model",
    "peft",
    "spawned",
]
GRACE_S = 30.0  # between SIGTERM and SIGKILL for the other ranks, when one has failed

_context = multiprocessing.get_context("forkserver")
_count = itertools.count()


@functools.cache
def _logs():
    """A folder that goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="spawned-")


def start(script, *flags, processes=1, env=None, patches=None, max_file_bytes=None):
    """
    Starts `python script flags`, or as many ranks of it -> Running.

    env               {name: value}, beside this process's
    patches           {"module.NAME": value}, set before the script begins
    max_file_bytes    a write beyond it fails, as on a full disk
    """
    argv = [str(word) for word in (script, *flags)]
    log = Path(_logs().name) / f"{next(_count)}.log"
    log.touch()
    _start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(processes):
        variables = dict(os.environ) | (env or {})
        if processes > 1:
            variables |= dict(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        process = _context.Process(
            target=_run, args=(argv, variables, str(log), patches or {}, max_file_bytes)
        )
        process.start()
        ranks.append(process)
    return Running(ranks, log)


def _start_server():
    """The server that forks the commands: it takes its search path from the environment."""
    paths = [str(ROOT), str(ROOT / "tests")]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [before])])
    try:
        _context.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _run(argv, variables, log, patches, max_file_bytes):
    """In the new process: the command, as Python would run it."""
    import importlib
    import resource
    import threading

    import torch
    from tqdm import tqdm

    tqdm.set_lock(
        threading.RLock()
    )  # its own lock between processes would be left behind by a kill

    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", 1)))
    os.chdir(ROOT)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    for place, value in patches.items():
        module, _, name = place.rpartition(".")
        setattr(importlib.import_module(module), name, value)
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    runpy.run_path(argv[0], run_name="__main__")


class Running:
    """A started command: one process, or one for each rank."""

    def __init__(self, ranks, log):
        self.ranks = ranks
        self.log = log
        self.pids = [process.pid for process in ranks]
        self.pid = self.pids[0]
        self.returncode = None

    def poll(self):
        """The exit code once all ranks have ended: the first that is not 0. None before."""
        codes = [process.exitcode for process in self.ranks]
        if any(codes) and None in codes:  # one has failed: torchrun ends the others
            self.send_signal(signal.SIGTERM)
            end = time.monotonic() + GRACE_S
            for process in self.ranks:
                process.join(max(0.0, end - time.monotonic()))
            self.kill()
        codes = [process.exitcode for process in self.ranks]
        if None in codes:
            return None
        self.returncode = next(filter(None, codes), 0)
        return self.returncode

    def wait(self, timeout=300):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.printed())
            multiprocessing.connection.wait(
                [process.sentinel for process in self.ranks if process.exitcode is None], 0.2
            )
        return self.returncode

    def send_signal(self, number):
        for process in self.ranks:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        for process in self.ranks:
            process.join(GRACE_S)

    def printed(self):
        return self.log.read_text()

    def communicate(self, timeout=300):
        """Waits -> what all ranks printed."""
        self.wait(timeout)
        return self.printed()
