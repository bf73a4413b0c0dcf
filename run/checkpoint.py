"""
Checkpoints: all of a step or nothing of it, on disk before the previous one is deleted.

    OUT/checkpoints/step-000050/
        rank-000.safetensors    what trains, with AdamW's moments: the rows that process 0 holds
        rank-001.safetensors    those of process 1, and so on
        state.pt                all the rest, which is the same in every process

Every process writes its own rows (FSDP shards the first axis) and reads those that it holds, from
whichever files have them. Nothing is gathered, and the number of processes may change. OUT must lie on a
disk that all processes see.

No pickle is ever loaded. No random generator needs saving: every draw is seeded by (seed, step, ...),
so a step is the same whether or not the run was interrupted before it.
"""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from run import processes
from run.errors import UserError
from run.io import default_file_modes, temp_dir
from run.resume import resume_command
from run.run_dir import LOGS

MOMENT = "/"  # between the name of a weight and that of a moment: "lm_head.weight/exp_avg"

# ---- saving ------------------------------------------------------------------------------------


def save(out, step, *, policy, optimizer, state, keep_checkpoints):
    """
    Writes OUT/checkpoints/step-NNNNNN and deletes all but the newest `keep_checkpoints`.

    state    dict of numbers, strings, lists, dicts and tensors: what else the run needs to continue
    raises   UserError    it cannot be written; the previous checkpoint is whole
    """
    folder = out / "checkpoints" / f"step-{step:06d}"
    state = dict(
        state,
        step=step,
        world_size=processes.world_size(),
        lrs=[group["lr"] for group in optimizer.param_groups],
    )
    is_main = processes.rank() == 0
    problem = first_problem(lambda: is_main and temp_dir(folder))
    problem = problem or first_problem(lambda: write_own_rows(part_of(folder), policy, optimizer))
    problem = problem or first_problem(lambda: is_main and write_state(part_of(folder), state, out))
    if problem and is_main:
        shutil.rmtree(part_of(folder), ignore_errors=True)
    if problem:
        previous = "no earlier one exists"
        if any(folder.parent.glob("step-??????")):
            previous = "the previous one is whole"
        raise UserError(
            f"the checkpoint of step {step} could not be written ({problem}), {previous}: make room "
            f"and continue with: {resume_command()}"
        )
    if is_main:
        put_in_place(folder)
        delete_old(folder, keep_checkpoints)
    # a rank that ended now would have torchrun end the one that renames
    processes.all_gather_object(None)


def part_of(folder):
    """Where the files of a checkpoint are until all of them are written."""
    return Path(f"{folder}.part")


def first_problem(task):
    """
    Runs task() on every rank and waits for all of them -> the first line of an error, or None; the same
    on every rank.
    """
    problem = None
    try:
        task()
    except Exception as error:  # safetensors and torch have classes of their own for a full disk
        problem = (str(error).splitlines() or [type(error).__name__])[0]
    return next(filter(None, processes.all_gather_object(problem)), None)


def write_own_rows(part, policy, optimizer):
    """Writes this rank's file."""
    tensors = {}
    for name, parameter in trained_parameters(policy).items():
        tensors[name] = local(parameter)
        for key, moment in optimizer.state.get(parameter, {}).items():
            tensors[name + MOMENT + key] = local(moment)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    path = part / rank_file(processes.rank())
    save_file(tensors, path)
    sync(path)


def write_state(part, state, out):
    """Writes state.pt. The folder and the logs of the run are on the disk when it returns."""
    torch.save(state, part / "state.pt")
    default_file_modes(part)
    logs = [out / name for name in LOGS]
    for path in (*filter(os.path.exists, logs), part / "state.pt", part):
        sync(path)


def put_in_place(folder):
    """Renames the finished folder, in the place of one that a dying machine cut off."""
    stale = folder.with_suffix(".stale")
    shutil.rmtree(stale, ignore_errors=True)  # of a run that was killed while it saved
    if folder.exists():  # cut off by a dying machine: `load` took the one before it
        os.rename(folder, stale)
    os.rename(part_of(folder), folder)
    sync(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)


def delete_old(newest, keep_checkpoints):
    """Deletes older checkpoints, and torn ones of later steps, which have run again."""
    folders = sorted(newest.parent.glob("step-??????"))
    place = folders.index(newest)
    for folder in folders[: max(place + 1 - keep_checkpoints, 0)] + folders[place + 1 :]:
        shutil.rmtree(folder)


def sync(path):
    """What was written to a file, or renamed in a folder, survives a power cut from here on."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def states(**parts):
    """-> {name: state} of parts of a run that have a state_dict."""
    return {name: part.state_dict() for name, part in parts.items()}


# ---- what a rank holds ---------------------------------------------------------------------------


def trained_parameters(policy):
    """-> {name: parameter}; under FSDP each is this rank's shard, a DTensor."""
    for module in policy.modules():
        # after a forward without gradients FSDP's root still holds whole parameters
        if isinstance(module, FSDPModule):
            module.reshard()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    is_sharded = all(isinstance(p, DTensor) for p in trained.values())
    assert is_sharded or processes.world_size() == 1, "several ranks would save the same rows"
    return trained


def local(tensor):
    """The rows of a parameter or moment that this rank holds, without a copy."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor):
    """-> first and last + 1 of these rows."""
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    num_rows = -(-len(tensor) // processes.world_size())  # as torch.chunk does, and so FSDP
    first = min(processes.rank() * num_rows, len(tensor))
    return first, first + len(local(tensor))


def rank_file(rank):
    return f"rank-{rank:03d}.safetensors"


# ---- loading -----------------------------------------------------------------------------------


def restore(state, **parts):
    """Gives each part the state that was saved under its name."""
    for name, part in parts.items():
        part.load_state_dict(state[name])


def load(out, policy, optimizer):
    """
    Loads the newest whole checkpoint into policy and optimizer; each rank reads what it holds.

    returns   the state that `save` was given, and its `step`; None before any checkpoint
    raises    UserError   no checkpoint is whole, or it holds other weights than this run trains
    """
    checkpoint = newest(out) if processes.rank() == 0 else None
    folder, state = processes.broadcast_object(checkpoint) or (None, None)
    if state is None:
        return None
    num_files = state.pop("world_size")
    trained = trained_parameters(policy)
    with ExitStack() as stack, torch.no_grad():
        files = []
        for rank in range(num_files):
            files.append(stack.enter_context(safe_open(folder / rank_file(rank), "pt")))
        weights = {name for name in files[0].keys() if MOMENT not in name}
        if weights != trained.keys():
            raise UserError(
                f"{out} does not hold the weights that this run trains: start a new --out"
            )
        moments = {}
        for i, (name, parameter) in enumerate(trained.items()):
            copy_rows(files, name, parameter)
            moments[i] = read_moments(files, name, parameter)
    load_moments(optimizer, moments, lrs=state.pop("lrs"))
    return state


def copy_rows(files, name, tensor):
    """
    Copies a saved tensor into one of the same shape: the rows that this rank holds.

    files    of all ranks that saved it, in their order: their rows follow one another
    """
    first, end = local_rows(tensor)
    start = 0  # of the present file's rows
    for file in files:
        rows = file.get_slice(name)
        stop = start + rows.get_shape()[0]
        from_row = max(first, start)
        to_row = min(end, stop)
        if from_row < to_row:
            part = rows[from_row - start : to_row - start]
            local(tensor)[from_row - first : to_row - first] = part
        start = stop
    assert start == len(tensor), f"{name}: {start} rows are saved, not {len(tensor)}"


def read_moments(files, name, parameter):
    """-> {"exp_avg": ...} of a parameter, sharded like it; {} if AdamW has made no step with it."""
    moments = {}
    prefix = name + MOMENT
    for saved in files[0].keys():
        if not saved.startswith(prefix):
            continue
        if files[0].get_slice(saved).get_shape():
            moment = torch.empty_like(parameter)
            copy_rows(files, saved, moment)
        else:  # the count of steps: a number, the same in every file
            moment = files[0].get_tensor(saved).clone()
        moments[saved.removeprefix(prefix)] = moment
    return moments


def load_moments(optimizer, moments, lrs):
    """
    moments    {place of a parameter among those that train: {name: moment}}
    lrs        learning rate of each group
    """
    moments = {place: value for place, value in moments.items() if value}
    optimizer.load_state_dict(optimizer.state_dict() | dict(state=moments))
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr


def newest(out):
    """-> folder and state of the newest whole checkpoint, None before any."""
    folders = sorted((out / "checkpoints").glob("step-??????"), reverse=True)
    for folder in folders:
        if (folder / "model.safetensors").exists():
            raise UserError(
                f"{folder} was written by an earlier version of this code: continue the run with that "
                "(run.json names its commit), or start a new --out"
            )
        state = read(folder)
        if state:
            return folder, state
    if folders:
        raise UserError(f"no checkpoint in {out} can be read: check the disk, or start a new --out")
    return None


def read(folder):
    """-> the state of a checkpoint, or None if the checkpoint is not whole."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        for rank in range(state["world_size"]):
            with safe_open(folder / rank_file(rank), "pt"):
                pass  # refuses a file that was cut off
        return state
    except Exception as error:  # cut off anywhere: there is no end to the kinds of error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        processes.print0(f"  {folder} is not whole ({reason:.100}): trying the one before it")
        return None
