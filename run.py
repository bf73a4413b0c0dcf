"""
A run: its processes, its folder, its checkpoints.

    OUT/run.json          arguments, versions, commit
    OUT/metrics.jsonl     one object a step
    OUT/samples.jsonl     a few completions, now and then
    OUT/checkpoints/step-000050/   model.safetensors (what trains), state.pt (all the rest)
    OUT/final/            a standard Hugging Face folder

No generator needs saving: every draw is seeded by (seed, step, ...), so a step is the same whether
the run was interrupted before it or not, and whatever the number of processes.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

# With the default, waiting threads spin: on a busy laptop that makes small models 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake of the user's: shown as one line."""


def main_guard(main):
    """Runs `main`; a user's mistake ends it with one line and no traceback."""
    from data import BadRow

    try:
        main()
    except (UserError, BadRow, FileNotFoundError) as error:
        line = f"{Path(sys.argv[0]).name}: {error}"
        if world_size() == 1:
            sys.exit(line)
        print(line, file=sys.stderr, flush=True)
        os._exit(1)  # the others may be waiting for this rank: torchrun ends them
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- processes ---------------------------------------------------------------------------------


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def init_processes(device):
    """-> torch.device. One process without torchrun, several with it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
    policy.to(device)
    if not dist.is_initialized() and dtype == "bfloat16":
        raise UserError("--dtype bfloat16 needs a GPU or several processes: FSDP computes in it")
    if dist.is_initialized():
        from model import shard

        mesh = dist.init_device_mesh(device.type, (world_size(),))
        shard(policy, mesh, compute_dtype(device, dtype))
    return policy


def gather(item):
    """-> list of every rank's item, in the order of the ranks."""
    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item)
    return items


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
        return tqdm(disable=True, file=open(os.devnull, "w"))
    bar = tqdm(total=steps, initial=start, desc=title, disable=None, dynamic_ncols=True)
    bar.write = print0 if bar.disable else bar.write
    return bar


# ---- arguments and folder ----------------------------------------------------------------------


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is written, and every default."""


PARSER = dict(formatter_class=Formatter, allow_abbrev=False)
# what may change when a run is resumed: it does not change what the run computes
FREE = set(
    "out resume save_every keep eval_every eval_samples eval_data workers cache_gb device".split()
)
FREE |= {"micro_tokens", "gradient_checkpointing", "allow_outside"}


def add_flags(parser):
    flag = parser.add_argument
    flag("--model", help="folder or hub id (default: the toy, written to toy/model)")
    flag("--data", help="JSONL of rows (default: the toy's for this stage)")
    flag("--out", help="folder of the run; must be new, or --resume")
    flag("--steps", type=int, help="optimizer steps; 0 = one epoch over the data")
    flag("--seed", type=int, default=0, help="of the data order and every draw")
    flag("--resume", action="store_true", help="continue --out where it stopped")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"])
    dtypes = ["auto", "float32", "bfloat16"]
    flag("--dtype", default="auto", choices=dtypes, help="to compute in; auto: bfloat16 on a GPU")
    flag("--save-every", type=int, default=50, help="steps between checkpoints; 0 = never")
    flag("--keep", type=int, default=2, help="checkpoints kept")


def parse(parser, argv, overrides):
    """
    Parses twice, so that defaults which depend on other flags still lose to a typed one.

    overrides   callable(args of the first pass) -> pairs of (name, {flag: value}), later ones win
    returns     args, {flag: name of the override its value comes from}
    """
    source = {}
    words = sys.argv[1:] if argv is None else argv
    first = [
        word for word in words if word not in ("-h", "--help")
    ]  # help shows the final defaults
    for name, values in overrides(parser.parse_known_args(first)[0]):
        parser.set_defaults(**values)
        source |= {key: name for key in values}
    args = parser.parse_args(argv)
    return args, {
        k: name for k, name in source.items() if getattr(args, k) == parser.get_default(k)
    }


def open_folder(args, source):
    """Checks the run's folder and prints what will run; nothing is written before `begin`."""
    out = Path(args.out)
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
        changed = [k for k in now if k not in FREE and str(before.get(k)) != str(now[k])]
        if changed:
            told = ", ".join(
                f"--{k.replace('_', '-')} was {before.get(k)}, is {now[k]}" for k in changed
            )
            raise UserError(f"--resume: these would make it another run: {told}")
    print0(f"{Path(sys.argv[0]).name}  commit {commit()}  torch {version('torch')}")
    for key, value in sorted(vars(args).items()):
        print0(f"  {key:22} {value}" + (f"   ({source[key]})" if key in source else ""))
    return out


def begin(out, args, step):
    """Writes run.json, or on resuming drops what was logged after `step`: those steps run again."""
    if rank():
        return
    if not args.resume:
        about = dict(script=Path(sys.argv[0]).name, arguments=vars(args), commit=commit())
        packages = ("torch", "transformers", "av", "torchaudio", "numpy")
        about |= dict(versions={p: version(p) for p in packages}, python=platform.python_version())
        about |= dict(world_size=world_size())
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "run.json", json.dumps(about, indent=1, default=str))
        except OSError as error:
            raise UserError(
                f"cannot write to {out}: {error.strerror}: choose another --out"
            ) from None
    for path in (out / "metrics.jsonl", out / "samples.jsonl"):
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
            write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


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


def log(path, item):
    if rank() == 0:
        with open(path, "a") as file:
            file.write(json.dumps(item) + "\n")


# ---- optimisation ------------------------------------------------------------------------------


def micro_batches(sizes, max_tokens):
    """Indices of items, in order, in packs of at most max_tokens (an item over it gets its own)."""
    packs, room = [], -1
    for i, size in enumerate(sizes):
        if size > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(i)
        room -= size
    return packs


def lr_scale(step, steps, warmup, cosine):
    """Factor of `step` (from 1): linear warm-up, then constant, or a cosine down to 10 %."""
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.55 + 0.45 * math.cos(math.pi * done) if cosine else 1.0


def set_lr(optimizer, lr, step, steps, warmup_frac, cosine):
    scale = lr_scale(step, steps, max(1, round(warmup_frac * steps)), cosine)
    for group in optimizer.param_groups:
        group["lr"] = lr * scale


def clip_grad_norm(policy, max_norm, where):
    """
    Clips in place -> the gradient's norm over all ranks and parameters, before clipping (float).

    raises   UserError    it is not finite: the weights are still good, `where` says what was read
    """
    params = [p for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise UserError(f"{where}: gradient norm {norm}: stopped, the last checkpoint is good")
    return norm


def check_at_least(args, **bounds):
    for name, bound in bounds.items():
        if getattr(args, name) < bound:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(args, name)}: at least {bound} is needed")


# ---- checkpoints -------------------------------------------------------------------------------

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def save_checkpoint(out, step, policy, optimizer, state, keep):
    """
    Writes OUT/checkpoints/step-NNNNNN, all of it or nothing.

    state   dict of numbers, strings, lists and tensors: what else the run needs to go on
    """
    model_state = get_model_state_dict(policy, options=WHOLE)
    optimizer_state = get_optimizer_state_dict(policy, optimizer, options=WHOLE)
    if rank():
        return
    folder = out / "checkpoints" / f"step-{step:06d}"
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model_state.items()}, part / "model.safetensors")
    torch.save(dict(step=step, optimizer=optimizer_state, **state), part / "state.pt")
    for path in [*part.iterdir(), part]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)
    for old in sorted((out / "checkpoints").glob("step-??????"))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(out, policy, optimizer):
    """Loads the newest whole checkpoint into policy and optimizer -> its state, or None."""
    for folder in sorted((out / "checkpoints").glob("step-??????"), reverse=True):
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        weights = load_file(folder / "model.safetensors")
        if weights.keys() != get_model_state_dict(policy, options=WHOLE).keys():
            raise UserError(f"{folder} does not hold the weights that this run trains")
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(policy, weights, options=options)
        set_optimizer_state_dict(policy, optimizer, state.pop("optimizer"), options=options)
        return state
    return None
