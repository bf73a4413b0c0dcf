"""
The folder of a run.

    OUT/run.json          arguments, versions, commit
    OUT/metrics.jsonl     one object per step
    OUT/samples.jsonl     a few completions, now and then (RL)
    OUT/clips.jsonl       the clips of these completions, small
    OUT/index.html        a page that shows all of this
    OUT/checkpoints/      checkpoint.py
    OUT/final/            a standard Hugging Face or PEFT folder
    OUT/lock              held while a process uses the folder
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

from run.arguments import as_flag, read_run_json
from run.errors import Stopped, UserError
from run.io import REPOSITORY, write_text
from run.processes import all_gather_object, print0, rank, world_size

LOGS = ("metrics.jsonl", "samples.jsonl", "clips.jsonl")  # each line has its `step`

# ---- what may change when a run is resumed -----------------------------------------------------

# where and how fast the run computes, and what it tolerates
FREE = """
    out resume log save_every keep keep_checkpoints eval_every eval_samples cache_gb device
    micro_tokens rollout_prompts allow_outside on_bad_step max_ratio max_seq_ratio attn concurrency
""".split()
# what messages name as a remedy, and where the same rows may lie by now: the run says that it changes
FROM_HERE_ON = """
    data eval_data max_frames max_pixels max_audio_seconds max_prompt_tokens max_new_tokens
    prompts_per_step batch_size lr hints
""".split()


def check_resume(out, about, arguments):
    """
    Whether --resume may continue the run with these arguments. Prints what changes from here on.

    about      what run.json holds
    raises     UserError    no run, or the arguments are those of another run
               Stopped      the run is finished
    """
    if not about:
        raise UserError(f"--resume: {out} holds no run: start one without --resume")
    is_finished = (out / "final").exists()
    if not has_checkpoint(out) and not is_finished:
        return  # nothing to continue: it starts at step 1, with whatever flags
    script = Path(sys.argv[0]).name
    if about.get("script", script) != script:
        raise UserError(f"--resume: {out} is a run of {about['script']}: continue it with that")
    before = about["arguments"]
    num_steps = about.get("num_steps") or before.get("steps", 0)  # --steps 0 is one epoch
    is_longer = arguments["steps"] > num_steps
    if is_longer:
        line = f"  continues to step {arguments['steps']} instead of {num_steps}"
        if script == "train_sft.py":  # its learning rate falls until the last step
            line += ": from here on at the learning rate of a run that long"
        print0(line)
        if not has_checkpoint(out):
            raise UserError(
                f"{out} has no checkpoint to continue from (--save-every 0): start a new --out with "
                f"--model {out / 'final'}"
            )

    refused = []
    for name in changed_arguments(before, arguments):
        if name == "steps" and (is_longer or arguments["steps"] == num_steps):
            continue
        change = f"{as_flag(name)} was {before[name]}, is {arguments[name]}"
        if name == "steps":
            change += " (it may only grow)"
        if name in FROM_HERE_ON:
            print0(f"  from here on: {change}")
        else:
            refused.append(change)
    if refused:
        raise UserError(
            f"--resume: these flags may not change: {', '.join(refused)}: leave them as they were, "
            "or start a new --out"
        )
    if is_finished and not is_longer:
        raise Stopped(f"{out} is finished: its model is {out / 'final'}", 0)


def changed_arguments(before, now):
    """-> names of flags with another value, those that are free to change left out."""
    names = []
    for name, value in now.items():
        # a flag that did not exist when the run began is none of its arguments
        if name not in before or name in FREE:
            continue
        if name == "judge" and is_url(value) and is_url(before[name]):
            continue  # the same judge at another address: --judge-model says which one it is
        if name == "model" and is_same_path(value, before[name]):
            continue
        if str(value) != str(before[name]):
            names.append(name)
    return names


def is_url(text):
    return str(text).startswith("http")


def is_same_path(a, b):
    return None not in (a, b) and Path(a).resolve() == Path(b).resolve()


def has_checkpoint(out):
    return any((out / "checkpoints").glob("step-??????"))


# ---- the beginning of a run --------------------------------------------------------------------


def open_run_dir(out, *, arguments, source, resume, trackers):
    """
    Locks the run's folder, checks whether the run may start in it or continue, and prints what will
    run. Nothing but the lock is written yet: that is begin_run_dir's.

    arguments   {flag: value}, vars(args)
    source      {flag: where its value comes from}, from arguments.parse
    resume      bool
    trackers    packages that --log names
    returns     Path of the folder
    raises      UserError, Stopped (the run is finished)
    """
    for name in trackers:
        if not getattr(find_spec(name), "origin", None):  # a mere folder of that name has none
            raise UserError(f"--log {name}: it is not installed: pip install {name}")
    out = Path(out)
    lock_run_dir(out)
    about = read_run_json(out)
    holds_a_run = about and any((out / name).exists() for name in (*LOGS, "final"))
    all_gather_object(None)  # every rank has looked before one writes
    if resume:
        check_resume(out, about, arguments)
    elif holds_a_run or has_checkpoint(out):
        raise UserError(
            f"{out} already holds a run: continue it with --resume or choose another --out"
        )
    print_settings(out, arguments, source)
    return out


def print_settings(out, arguments, source):
    """Prints what was typed and what differs from the 7B model's defaults."""
    script = Path(sys.argv[0]).name
    print0(f"{script}  commit {git_commit()}  torch {version('torch')}  {arguments['device']}")
    origins = sorted(set(source.values()) - {"typed", "run.json", None})
    for origin in ("typed", *origins):
        settings = [f"{name} {arguments[name]}" for name in source if source[name] == origin]
        line = f"{origin}: " + (", ".join(settings) or "nothing")
        print0(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    "))
    print0(f"  {out / 'run.json'} holds all arguments")


exit_stack = contextlib.ExitStack()  # closed when the run ends, however it ends


def lock_run_dir(out):
    """Nobody else can use the folder until this process ends, however it ends."""
    if rank():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            owner = file.read()
        raise UserError(
            f"{out} is in use by another run ({owner}): wait for it to finish, or choose another "
            "--out"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            print0(f"  {out}: this file system has no locks: do not start two runs in one folder")
            return
        raise UserError(f"cannot write to {out}: {error.strerror}: choose another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    exit_stack.push(file)  # closing it releases the lock


def begin_run_dir(out, *, arguments, step, num_steps):
    """
    Writes run.json. Of a run that continues after `step` > 0, drops what was logged after that step:
    those steps run again.
    """
    if rank():
        return
    (out / "checkpoints").mkdir(exist_ok=True)
    about = read_run_json(out)
    if step > 0:
        changes = [name for name in FROM_HERE_ON if name in arguments]
        about["arguments"] |= {name: arguments[name] for name in ("steps", *changes)}
        about.setdefault("resumed", []).append(dict(after_step=step, commit=git_commit()))
    else:
        packages = ("torch", "transformers", "av", "torchaudio", "numpy")
        about = dict(
            script=Path(sys.argv[0]).name,
            arguments=arguments,
            commit=git_commit(),
            modified=modified_files(),
            versions={package: installed_version(package) for package in packages},
            python=platform.python_version(),
            world_size=world_size(),
        )
    about["num_steps"] = num_steps
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


# ---- provenance --------------------------------------------------------------------------------


def git_commit():
    """
    The short git commit of this code, and tracked files that differ from it, as text:
    "903fa83, modified: rewards.py". None outside git.
    """
    commit = git("rev-parse", "--short", "HEAD").strip()
    if not commit:
        return None
    files = modified_files()
    shown = " ".join(files[:5])
    if len(files) > 5:
        shown += f" and {len(files) - 5} more"
    return f"{commit}, modified: {shown}" if files else commit


def modified_files():
    """-> tracked files that differ from the commit, but for results: a run adds its own to them."""
    others = (".", ":!experiments/results")
    lines = git("status", "--porcelain", "--untracked-files=no", "--", *others).splitlines()
    return [line[3:] for line in lines]  # after two letters of status and a space


def git(*words):
    """What git prints about this repository; "" if it fails or is not installed."""
    try:
        done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout


def check_versions():
    """transformers moves the Omni classes between minor releases: better a line than an ImportError."""
    requirements = (REPOSITORY / "requirements.txt").read_text()
    wanted = re.search(r"^transformers==(\S+)", requirements, re.M)[1]
    installed = version("transformers")
    if installed.split(".")[:2] != wanted.split(".")[:2]:
        raise UserError(
            f"transformers {installed} is installed, and this code needs {wanted}: "
            f"pip install transformers=={wanted}"
        )


def installed_version(package):
    """None if it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
