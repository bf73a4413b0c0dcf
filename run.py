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

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# With the default, waiting threads spin: on a busy laptop that makes small models 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit code 2."""


def main_guard(main):
    """Runs `main`; a user's mistake ends it with one line and no traceback."""
    from data import BadRow

    try:
        main()
    except (UserError, BadRow, FileNotFoundError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- processes ---------------------------------------------------------------------------------


def init_processes(device):
    """-> rank, world_size, torch.device. One process without torchrun, several with it."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world_size > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    elif device == "cuda":  # FSDP keeps the fp32 master weights on one GPU too
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return rank, world_size, torch.device(device)


def place(policy, device, dtype):
    """Moves the policy to its device; sharded when there is a GPU or more than one process."""
    policy.to(device)
    if dist.is_initialized():
        from model import shard

        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        shard(policy, mesh, getattr(torch, dtype))
    return policy


def gather(item):
    """-> list of every rank's item, in the order of the ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


# ---- arguments and folder ----------------------------------------------------------------------


def add_flags(parser, out):
    parser.add_argument("--model", help="folder or hub id (default: the toy, written to toy/model)")
    parser.add_argument("--data", help="JSONL of rows (default: the toy's for this stage)")
    parser.add_argument("--out", default=out, help="folder of the run; must be new, or --resume")
    parser.add_argument("--steps", type=int, help="optimizer steps; 0 = one epoch over the data")
    parser.add_argument("--seed", type=int, default=0, help="of the data order and every draw")
    parser.add_argument("--resume", action="store_true", help="continue --out where it stopped")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the computation; weights are kept in float32 (auto: bfloat16 on a GPU)")  # fmt: skip
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints; 0 = never")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints kept")


def parse(parser, argv, overrides):
    """Parses twice, so that defaults which depend on other flags still lose to a typed flag."""
    first = parser.parse_known_args(argv)[0]
    source = {}
    for name, values in overrides(first):
        parser.set_defaults(**values)
        source.update({key: name for key in values})
    args = parser.parse_args(argv)
    typed = {key for key in source if getattr(args, key) != parser.get_default(key)}
    return args, {key: name for key, name in source.items() if key not in typed}


def open_folder(args, source, is_main):
    """Checks and makes the run's folder, writes run.json and prints what will run."""
    out = Path(args.out)
    started = (out / "run.json").exists()
    if started and not args.resume:
        raise UserError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    if args.resume and not started:
        raise UserError(f"--resume: {out} holds no run: start one without --resume")
    if not is_main:
        return out
    about = dict(
        script=Path(sys.argv[0]).name, arguments=vars(args), commit=commit(),
        versions={p: version(p) for p in ("torch", "transformers", "av", "torchaudio", "numpy")},
        python=platform.python_version(), world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )  # fmt: skip
    print(f"{about['script']}  commit {about['commit']}  torch {about['versions']['torch']}")
    for key, value in sorted(vars(args).items()):
        print(f"  {key:22} {value}" + (f"   ({source[key]})" if key in source else ""))
    if not started:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "run.json", json.dumps(about, indent=1, default=str))
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}: choose another --out") from None
    return out


def commit():
    """The short git commit of this code, or None outside git."""
    try:
        told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return told.stdout.strip() or None


def write_text(path, text):
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def log(path, item):
    with open(path, "a") as file:
        file.write(json.dumps(item) + "\n")


def cut_log(path, step):
    """Drops what was logged after `step`: those steps run again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        write_text(path, "".join(line + "\n" for line in kept))


# ---- optimisation ------------------------------------------------------------------------------


def lr_scale(step, steps, warmup, cosine):
    """Learning-rate factor of `step` (from 1): linear warm-up, then cosine to 10 % or constant."""
    if step <= warmup:
        return step / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)) if cosine else 1.0


def clip_grad_norm(policy, max_norm):
    """-> the gradient's norm over all ranks and parameters, before clipping (float)."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.grad is not None], max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


# ---- checkpoints -------------------------------------------------------------------------------

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def save_checkpoint(out, step, policy, optimizer, state, keep, is_main):
    """
    Writes OUT/checkpoints/step-NNNNNN, all of it or nothing.

    state   dict of numbers, strings, lists and tensors: what else the run needs to go on
    """
    model_state = get_model_state_dict(policy, options=WHOLE)
    optimizer_state = get_optimizer_state_dict(policy, optimizer, options=WHOLE)
    if not is_main:
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


def load_checkpoint(out, policy, optimizer, map_location="cpu"):
    """Loads the newest whole checkpoint into policy and optimizer -> its state, or None."""
    for folder in sorted((out / "checkpoints").glob("step-??????"), reverse=True):
        state = torch.load(folder / "state.pt", map_location=map_location, weights_only=True)
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(policy, load_file(folder / "model.safetensors"), options=options)
        set_optimizer_state_dict(policy, optimizer, state.pop("optimizer"), options=options)
        return state
    return None
