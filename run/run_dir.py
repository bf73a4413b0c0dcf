"""
The folder of a run.

    OUT/run.json          arguments, versions, commit
    OUT/metrics.jsonl     one object a step
    OUT/samples.jsonl     a few completions, now and then (RL)
    OUT/clips.jsonl       the clips that these are about, small
    OUT/index.html        a page of all that
    OUT/checkpoints/      checkpoint.py
    OUT/final/            a standard Hugging Face folder
    OUT/lock              held while the run goes on
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from run.arguments import MAY_CHANGE, read_run_json
from run.errors import Stopped, UserError
from run.io import REPOSITORY, write_text
from run.processes import all_gather_object, print0, rank, world_size

LOGS = ("metrics.jsonl", "samples.jsonl", "clips.jsonl")  # with the `step` of every line


def open_run_dir(args, source):
    """Locks the run's folder, checks it, and prints what will run; `begin` writes to it."""
    for name in args.log:
        if not getattr(find_spec(name), "origin", None):  # a mere folder of that name has none
            raise UserError(f"--log {name}: it is not installed: pip install {name}")
    out = Path(args.out)
    lock_run_dir(out)
    about = read_run_json(out)
    all_gather_object(None)  # every rank has looked before one writes
    if about and not args.resume:
        raise UserError(
            f"{out} already holds a run: continue it with --resume or choose another --out"
        )
    if args.resume and not about:
        raise UserError(f"--resume: {out} holds no run: start one without --resume")
    if args.resume:
        before, now = about["arguments"], vars(args)
        # a flag that the run did not have yet when it began is none of its arguments
        known = [k for k in now if k in before and k not in MAY_CHANGE]
        if all(str(words.get("judge")).startswith("http") for words in (before, now)):
            known.remove("judge")  # it may come back at another address: its model is what counts
        longer = now["steps"] > before.get("steps", 0) > 0
        if longer:  # what it was told at its beginning counts no more
            known.remove("steps")
            told = f"goes on to step {now['steps']}, not {before['steps']}"
            print0(f"  {told}: from here on at the learning rate of a run that long")
            if not any((out / "checkpoints").glob("step-*")):
                told = f"{out} has no checkpoint to go on from (--save-every 0)"
                raise UserError(f"{told}: start a new --out with --model {out / 'final'}")
        changed = [k for k in known if str(before[k]) != str(now[k])]
        if changed:
            told = [f"--{k.replace('_', '-')} was {before[k]}, is {now[k]}" for k in changed]
            told = "--resume: these would make it another run: " + ", ".join(told)
            raise UserError(f"{told}: leave them as they were, or start a new --out")
        if (out / "final").exists() and not longer:
            raise Stopped(f"{out} is finished: its model is {out / 'final'}", 0)
    print_settings(out, args, source)
    return out


def print_settings(out, args, source):
    """What was typed, and what differs from the 7B's defaults; all else stands in run.json."""
    print0(
        f"{Path(sys.argv[0]).name}  commit {git_commit()}  torch {version('torch')}  {args.device}"
    )
    for name in ("typed", *sorted({*source.values()} - {"typed", "run.json", None})):
        told = [f"{k} {getattr(args, k)}" for k, origin in source.items() if origin == name]
        line = f"{name}: " + ", ".join(told or ["nothing"])
        print0(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    "))
    print0(f"  {out}: run.json holds every argument, index.html shows how it goes")


exit_stack = contextlib.ExitStack()  # what is to be closed when the run ends, however it ends


def lock_run_dir(out):
    """This run's folder is its own until the process ends, however it ends."""
    if rank():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            who = file.read()
        told = (
            f"{out} belongs to a run that is going on ({who}): wait for it, or choose another --out"
        )
        raise UserError(told) from None
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            print0(f"  {out}: no locks on this file system: see that one run at a time uses it")
            return
        raise UserError(f"cannot write to {out}: {error.strerror}: choose another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    exit_stack.push(file)  # closing it ends the lock


def begin_run_dir(out, args, step):
    """Writes run.json, or on resuming drops what was logged after `step`: those steps run again."""
    if rank():
        return
    (out / "checkpoints").mkdir(exist_ok=True)
    if args.resume:
        about = read_run_json(out)
        about["arguments"]["steps"] = args.steps  # more of them, maybe
    else:
        about = dict(script=Path(sys.argv[0]).name, arguments=vars(args), commit=git_commit())
        packages = ("torch", "transformers", "av", "torchaudio", "numpy")
        about |= dict(
            versions={p: installed_version(p) for p in packages}, python=platform.python_version()
        )
        about |= dict(world_size=world_size())
    write_text(out / "run.json", json.dumps(about, indent=1, default=str))
    for path in (out / name for name in LOGS):
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if step_of_line(line) <= step))


def step_of_line(line):
    """The step of a line of a log; infinity for one that a kill or a power cut has damaged."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def git_commit():
    """The short git commit of this code, or None outside git."""
    try:
        git = ["git", "rev-parse", "--short", "HEAD"]
        return (
            subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
            or None
        )
    except FileNotFoundError:
        return None


def check_versions():
    """transformers moves the Omni classes between minor releases: told before they are missed."""
    wanted = re.search(
        r"^transformers==(\S+)", (REPOSITORY / "requirements.txt").read_text(), re.M
    )[1]
    have = version("transformers")
    if have.split(".")[:2] != wanted.split(".")[:2]:
        told = f"transformers {have} is installed, and this code needs {wanted}"
        raise UserError(f"{told}: pip install transformers=={wanted}")


def installed_version(package):
    """Its version, None without it."""
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
