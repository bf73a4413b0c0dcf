"""
Checkpoints: all of a step or nothing of it, on disk before the previous one is deleted.

    OUT/checkpoints/step-000050/   model.safetensors (what trains), state.pt (all the rest)

No pickle is ever loaded. No random generator needs saving: every draw is seeded by (seed, step, ...),
so a step is the same whether or not the run was interrupted before it. The number of ranks may change.
"""

import os
import shutil

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from run import processes
from run.errors import UserError
from run.io import default_file_modes, temp_dir
from run.resume import resume_command
from run.run_dir import LOGS

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

# ---- saving ------------------------------------------------------------------------------------


def save(out, step, *, policy, optimizer, state, keep_checkpoints):
    """
    Writes OUT/checkpoints/step-NNNNNN and deletes all but the newest `keep_checkpoints`.

    state    dict of numbers, strings, lists, dicts and tensors: what else the run needs to continue
    raises   UserError    it cannot be written; the previous checkpoint is whole
    """
    model_state = get_model_state_dict(policy, options=WHOLE)
    optimizer_state = None
    if optimizer.state:  # before its first step it has none, and torch would make some
        optimizer_state = get_optimizer_state_dict(policy, optimizer, options=WHOLE)
    if processes.rank() == 0:
        state = dict(step=step, optimizer=optimizer_state, **state)
        folder = out / "checkpoints" / f"step-{step:06d}"
        write(folder, model_state, state, logs=[out / name for name in LOGS])
        delete_old(folder, keep_checkpoints)
    # a rank that ended now would have torchrun end the one that writes
    processes.all_gather_object(None)


def write(folder, model_state, state, logs):
    """Writes a checkpoint's folder, in the place of one that a dying machine cut off."""
    stale = folder.with_suffix(".stale")
    shutil.rmtree(stale, ignore_errors=True)  # of a run that was killed while it saved
    try:
        part = temp_dir(folder)
        model_state = {name: value.contiguous() for name, value in model_state.items()}
        save_file(model_state, part / "model.safetensors")
        torch.save(state, part / "state.pt")
        default_file_modes(part)
        for path in (*filter(os.path.exists, logs), *part.iterdir(), part):
            sync(path)
    except Exception as error:  # safetensors and torch have classes of their own for a full disk
        shutil.rmtree(folder.with_suffix(".part"), ignore_errors=True)
        reason = str(error).splitlines()[0]
        previous = "no earlier one exists"
        if any(folder.parent.glob("step-??????")):
            previous = "the previous one is whole"
        raise UserError(
            f"the checkpoint of step {state['step']} could not be written ({reason}), {previous}: "
            f"make room and continue with: {resume_command()}"
        ) from None
    if folder.exists():  # cut off by a dying machine: `load` took the one before it
        os.rename(folder, stale)
    os.rename(part, folder)
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


# ---- loading -----------------------------------------------------------------------------------


def restore(state, **parts):
    """Gives each part the state that was saved under its name."""
    for name, part in parts.items():
        part.load_state_dict(state[name])


def load(out, policy, optimizer):
    """
    Loads the newest whole checkpoint into policy and optimizer. Rank 0 reads it and sends the others
    their parts.

    returns   the state that `save` was given, and its `step`; None before any checkpoint
    raises    UserError   no checkpoint is whole, or it holds other weights than this run trains
    """
    checkpoint = newest(out) if processes.rank() == 0 else None
    weights, state = checkpoint or ({}, None)
    optimizer_state = state.pop("optimizer") if state else None
    state, names, has_stepped = processes.broadcast_object(
        (state, list(weights), bool(optimizer_state))
    )
    if state is None:
        return None

    # not WHOLE: with that, only rank 0 gets anything
    trained = get_model_state_dict(policy, options=StateDictOptions(ignore_frozen_params=True))
    if set(names) != trained.keys():
        raise UserError(f"{out} does not hold the weights that this run trains: start a new --out")
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=processes.world_size() > 1, strict=False
    )
    set_model_state_dict(policy, weights, options=options)
    if has_stepped:
        set_optimizer_state_dict(policy, optimizer, optimizer_state or {}, options=options)
    return state


def newest(out):
    """-> (weights, state) of the newest whole checkpoint, None before any."""
    folders = sorted((out / "checkpoints").glob("step-??????"), reverse=True)
    for folder in folders:
        checkpoint = read(folder)
        if checkpoint:
            return checkpoint
    if folders:
        raise UserError(f"no checkpoint in {out} can be read: check the disk, or start a new --out")
    return None


def read(folder):
    """-> (weights, state) of a checkpoint, or None if it is not whole."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        return load_file(folder / "model.safetensors"), state
    except Exception as error:  # cut off anywhere: there is no end to the kinds of error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        processes.print0(f"  {folder} is not whole ({reason:.100}): trying the one before it")
        return None
