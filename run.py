"""
A run: its processes, its folder, how it begins, and how it ends.

    OUT/run.json          arguments, versions, commit
    OUT/metrics.jsonl     one object a step
    OUT/samples.jsonl     a few completions, now and then (RL)
    OUT/checkpoints/      checkpoint.py
    OUT/final/            a standard Hugging Face folder
    OUT/lock              held while the run goes on
"""

import argparse
import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

# With the default, waiting threads spin: on a busy laptop that makes small models 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake of the user's: shown as one line."""


class Stopped(Exception):
    """The run ends here, and its state is saved. args: the line to print, the exit code."""


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}
PEER_GONE = "Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited"


def main_guard(main):
    """Runs `main`; what a user can do something about ends it with one line and no traceback."""
    from data import BadRow

    line, code = None, 1
    _signals.clear()
    try:
        main()
    except (UserError, BadRow, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        line = str(error)
    except Stopped as stop:
        line, code = stop.args
    except KeyboardInterrupt:
        line, code = "stopped", 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in DISK:
            raise
        denied = error.errno in (errno.EACCES, errno.EROFS)
        remedy = "give another path, or the right to use it" if denied else "make room"
        line = f"{error.filename or 'disk'}: {error.strerror}: {remedy}, then go on with --resume"
    except SafetensorError as error:
        line = f"a weights file ({error}): is the disk full, or the file cut off?"
    except RuntimeError as error:  # gloo and NCCL have no class of their own for it
        if world_size() == 1 or not re.search(PEER_GONE, str(error)):
            raise
        line = f"rank {rank()}: another process of the run has ended: see above; then --resume"
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        while _locks:
            _locks.pop().close()
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


# ---- asked to stop -----------------------------------------------------------------------------

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
    local = os.environ.get("LOCAL_WORLD_SIZE", world_size())
    launcher = f"torchrun --nproc-per-node {local}" if world_size() > 1 else "python"
    return f"{launcher} {shlex.join(words)}"


def after_bad_step():
    """What to do when a run has stopped at a step that would have spoiled the weights."""
    skip = how_to_go_on("--on-bad-step", "skip")
    told = "the state before it is saved: start a new --out with a lower --lr, or leave such steps"
    return f"{told} out: {skip}"


# ---- processes ---------------------------------------------------------------------------------


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def init_processes(device):
    """-> torch.device. One process without torchrun, several with it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here: leave it out to run on the CPU")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world_size() > 1:
        # one rank may work for long while the others wait; a dead one ends torchrun anyway
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    elif device == "cuda":  # FSDP keeps float32 master weights on one GPU too
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return torch.device(device)


def compute_dtype(device, dtype):
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, dtype)


def place(policy, device, dtype):
    """Moves the policy to its device; sharded when there is a GPU or more than one process."""
    if not dist.is_initialized() and dtype == "bfloat16":
        raise UserError("--dtype bfloat16 needs a GPU or several processes: FSDP computes in it")
    if not dist.is_initialized():
        return policy.to(device)
    from model import cast, shard

    param_dtype = compute_dtype(device, dtype)  # FSDP's of all; float32 is for what trains
    cast((p for p in policy.parameters() if not p.requires_grad), param_dtype)
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    return shard(policy.to(device), mesh, param_dtype)


def gather(item):
    """-> list of every rank's item, in the order of the ranks."""
    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item)
    return items


def rounds(items, filler):
    """
    As many rounds on every rank, as a forward under FSDP needs: a rank that has fewer items than
    another goes on with fillers. -> pairs of (item, whether it is one of the items)
    """
    for k in range(max(gather(len(items)))):
        yield (items[k], True) if k < len(items) else (filler, False)


def share(count):
    """The slice of `count` things that is this rank's."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())


def seed(*numbers):
    """A 63-bit seed that depends on every number."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def check_multiple(flag, value):
    if value % world_size():
        raise UserError(f"{flag} {value} must be a multiple of the {world_size()} processes")


def print0(*words):
    if rank() == 0:
        print(*words, flush=True)


def progress(start, steps, title):
    """A bar on rank 0; without a terminal only what is written through it appears."""
    if rank():
        bar = tqdm(disable=True)
        bar.write = lambda line: None  # tqdm's own would print
        return bar
    bar = tqdm(total=steps, initial=start, desc=title, disable=None, dynamic_ncols=True)
    bar.write = print0 if bar.disable else bar.write
    return bar


# ---- arguments and folder ----------------------------------------------------------------------


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is written, and every default."""


PARSER = dict(formatter_class=Formatter, allow_abbrev=False)
# what may change when a run is resumed: where and how fast it computes, and what it tolerates
FREE = """
    out resume save_every keep eval_every eval_samples eval_data workers cache_gb device feature_dir
    micro_tokens gradient_checkpointing allow_outside max_bad_frac on_bad_step max_ratio min_entropy
    judge_concurrency judge_timeout judge_retries max_unjudged_frac
""".split()


def add_flags(parser):
    parser.epilog = """
Defaults are those for the --model, --data, --stage and --algo on the line; without --model they are
the toy's. Tags in [] are explained in README.md.
"""
    flag = parser.add_argument
    flag("--model", help="folder or hub id (default: the toy, written to toy/model)")
    flag("--data", help="JSONL of rows (default: the toy's for this stage)")
    flag("--out", help="folder of the run; must be new, or --resume")
    flag("--steps", type=int, help="optimizer steps; 0 = one epoch over the data")
    flag("--seed", type=int, default=0, help="of the data order and every draw")
    flag("--resume", action="store_true", help="continue --out where it stopped")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    dtypes = ["auto", "float32", "bfloat16"]
    flag("--dtype", default="auto", choices=dtypes, help="to compute in; auto: bfloat16 on a GPU")
    flag("--max-bad-frac", type=float, default=0.1, help="share of bad rows that ends the run")
    choices = ["stop", "skip"]
    flag("--on-bad-step", choices=choices, default="stop", help="a gradient that must not be used")
    flag("--save-every", type=int, default=50, help="steps between checkpoints; 0 = never")
    flag("--keep", type=int, default=2, help="checkpoints kept")


def parse(parser, argv, overrides):
    """
    Parses twice, so that defaults which depend on other flags still lose to a typed one. With
    --resume, what the run began with stands for what is not typed again.

    overrides   callable(args of the first pass) -> pairs of (name, {flag: value}), later ones win
    returns     args, {flag: name of the override its value comes from}
    """
    source = {}
    words = sys.argv[1:] if argv is None else argv
    first = [word for word in words if word not in ("-h", "--help")]  # help: the final defaults
    first = parser.parse_known_args(first)[0]
    for name, values in [*overrides(first), ("run.json", begun_with(first))]:
        parser.set_defaults(**values)
        source |= {key: name for key in values}
    args = parser.parse_args(argv)
    if not (args.out or "").strip():
        raise UserError("--out is empty: give a folder")
    source = {k: name for k, name in source.items() if getattr(args, k) == parser.get_default(k)}
    return args, source


def begun_with(args):
    """-> {flag: value} of the run in --out that is to be resumed, if one is."""
    path = Path(args.out or "") / "run.json"
    about = json.loads(path.read_text()) if args.resume and path.is_file() else {}
    kept = about["arguments"] if about.get("script") == Path(sys.argv[0]).name else {}
    return {k: v for k, v in kept.items() if k in vars(args).keys() - {"out", "resume", "device"}}


# of the numbers that both trainers take: the least; or the least and the most
BOUNDS = dict(
    seed=0, steps=0, keep=1, save_every=0, max_bad_frac=(0, 1), cache_gb=0, workers=0, lr=0,
    warmup_frac=(0, 1), weight_decay=0, max_grad_norm=1e-9, micro_tokens=1, lora_rank=0,
)  # fmt: skip


def check_bounds(args, **bounds):
    for name, bound in bounds.items():
        least, most = bound if isinstance(bound, tuple) else (bound, math.inf)
        value = getattr(args, name)
        if value is not None and not (least <= value <= most and value < math.inf):
            told = f"at least {least}" if most == math.inf else f"a number from {least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} {value}: {told} is needed")


def open_folder(args, source):
    """Locks the run's folder, checks it, and prints what will run; `begin` writes to it."""
    out = Path(args.out)
    lock(out)
    started = (out / "run.json").exists()
    gather(None)  # every rank has looked before one writes
    if started and not args.resume:
        raise UserError(
            f"{out} already holds a run: continue it with --resume or choose another --out"
        )
    if args.resume and not started:
        raise UserError(f"--resume: {out} holds no run: start one without --resume")
    if args.resume:
        before, now = json.loads((out / "run.json").read_text())["arguments"], vars(args)
        # a flag that the run did not have yet when it began is none of its arguments
        known = [k for k in now if k in before and k not in FREE]
        if all(str(words.get("judge")).startswith("http") for words in (before, now)):
            known.remove("judge")  # it may come back at another address: its model is what counts
        changed = [k for k in known if str(before[k]) != str(now[k])]
        if changed:
            told = [f"--{k.replace('_', '-')} was {before[k]}, is {now[k]}" for k in changed]
            told = "--resume: these would make it another run: " + ", ".join(told)
            raise UserError(f"{told}: leave them as they were, or start a new --out")
        if (out / "final").exists():
            raise Stopped(f"{out} is finished: its model is {out / 'final'}", 0)
    print0(f"{Path(sys.argv[0]).name}  commit {commit()}  torch {version('torch')}")
    for key, value in sorted(vars(args).items()):
        print0(f"  {key:22} {value}" + (f"   ({source[key]})" if key in source else ""))
    return out


_locks = []  # open files


def lock(out):
    """This run's folder is its own until the process ends, however it ends."""
    if rank():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{out} belongs to a run that is going on ({file.read()}): wait for it, or choose "
            "another --out"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            print0(f"  {out}: no locks on this file system: see that one run at a time uses it")
            return
        raise UserError(f"cannot write to {out}: {error.strerror}: choose another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    _locks.append(file)  # closing it would end the lock


@contextlib.contextmanager
def alone(folder):
    """Others that would make something in the folder wait until this one has made it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:  # closing it ends the lock
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def begin(out, args, step):
    """Writes run.json, or on resuming drops what was logged after `step`: those steps run again."""
    if rank():
        return
    (out / "checkpoints").mkdir(exist_ok=True)
    if not args.resume:
        about = dict(script=Path(sys.argv[0]).name, arguments=vars(args), commit=commit())
        packages = ("torch", "transformers", "av", "torchaudio", "numpy")
        about |= dict(versions={p: version(p) for p in packages}, python=platform.python_version())
        about |= dict(world_size=world_size())
        write_text(out / "run.json", json.dumps(about, indent=1, default=str))
    for path in (out / "metrics.jsonl", out / "samples.jsonl"):
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if step_of(line) <= step))


def step_of(line):
    """The step of a line of a log; infinity for one that a kill or a power cut has damaged."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def commit():
    """The short git commit of this code, or None outside git."""
    try:
        git = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def write_text(path, text):
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def empty_part(folder):
    """FOLDER.part: becomes FOLDER when all of it is there."""
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def log(path, item):
    """A line of JSON, which has no NaN and no infinity: these become null."""
    if rank() == 0:
        infinite = {k for k, v in item.items() if isinstance(v, float) and not math.isfinite(v)}
        with open(path, "a") as file:
            file.write(json.dumps(item | dict.fromkeys(infinite)) + "\n")
