"""
Checkpoints: all of a step or nothing of it, on disk before the one before it goes.

    OUT/checkpoints/step-000050/   model.safetensors (what trains), state.pt (all the rest)

No pickle is ever loaded. No generator needs saving: every draw is seeded by (seed, step, ...), so a
step is the same whether the run was interrupted before it or not. The number of ranks may change.
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
from run.io import temp_dir
from run.resume import resume_command
from run.run_dir import LOGS

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def save(out, step, policy, optimizer, state, keep):
    """
    Writes OUT/checkpoints/step-NNNNNN, and drops all but the newest `keep`.

    state    dict of numbers, strings, lists, dicts and tensors: what else the run needs to go on
    raises   UserError    it cannot be written; the one before it is whole
    """
    model_state, optimizer_state = get_model_state_dict(policy, options=WHOLE), None
    if optimizer.state:  # before its first step it has none, and torch would make some
        optimizer_state = get_optimizer_state_dict(policy, optimizer, options=WHOLE)
    if processes.rank():
        return processes.all_gather_object(
            None
        )  # a rank that ends now would have torchrun end the one that writes
    folder = out / "checkpoints" / f"step-{step:06d}"
    stale = folder.with_suffix(".stale")
    shutil.rmtree(stale, ignore_errors=True)  # of a run that was killed while it saved
    try:
        part = temp_dir(folder)
        save_file({k: v.contiguous() for k, v in model_state.items()}, part / "model.safetensors")
        torch.save(dict(step=step, optimizer=optimizer_state, **state), part / "state.pt")
        logs = [out / name for name in LOGS]
        for path in (*filter(os.path.exists, logs), *part.iterdir(), part):
            sync(path)
    except Exception as error:  # safetensors and torch have classes of their own for a full disk
        shutil.rmtree(folder.with_suffix(".part"), ignore_errors=True)
        why = str(error).splitlines()[0]
        raise UserError(
            f"the checkpoint of step {step} could not be written ({why}), the one before it is "
            f"whole: make room and go on with: {resume_command()}"
        ) from None
    if folder.exists():  # cut off by a dying machine: `load` passed it over
        os.rename(folder, stale)
    os.rename(part, folder)
    sync(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)
    saved = sorted(folder.parent.glob("step-??????"))
    at = saved.index(folder)  # beyond it: torn ones, of steps that have run again
    for old in saved[: max(at + 1 - keep, 0)] + saved[at + 1 :]:
        shutil.rmtree(old)
    processes.all_gather_object(None)


def states(**parts):
    """-> {name: state} of the parts of a run that know theirs."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(found, **parts):
    """Each part goes on as the one whose state was saved under its name."""
    for name, part in parts.items():
        part.load_state_dict(found[name])


def sync(path):
    """What is written to a file, or renamed in a folder, survives a power cut from here on."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def read(folder):
    """-> (weights, state) of a checkpoint, or None if it is not whole."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        return load_file(folder / "model.safetensors"), state
    except Exception as error:  # cut off anywhere: there is no end to the kinds of error
        why = (str(error).splitlines() or [type(error).__name__])[0]
        processes.print0(f"  {folder} is not whole ({why:.100}): taking the one before it")
        return None


def newest(out):
    """-> (weights, state) of the newest whole checkpoint, None before any."""
    folders = sorted((out / "checkpoints").glob("step-??????"), reverse=True)
    found = next(filter(None, map(read, folders)), None)
    if folders and not found:
        raise UserError(f"no checkpoint in {out} can be read: look at the disk, or start anew")
    return found


def load(out, policy, optimizer):
    """
    Loads the newest whole checkpoint into policy and optimizer -> its state, None before any. Only
    rank 0 reads it, and each is sent its parts.
    """
    found = newest(out) if processes.rank() == 0 else None
    weights, state = found or ({}, None)
    moments = state.pop("optimizer") if state else None
    state, names, stepped = processes.broadcast_object((state, list(weights), bool(moments)))
    if state is None:
        return None
    # not WHOLE: of that, only rank 0 gets anything
    trained = get_model_state_dict(policy, options=StateDictOptions(ignore_frozen_params=True))
    if set(names) != trained.keys():
        raise UserError(f"{out} does not hold the weights that this run trains")
    sent = dict(full_state_dict=True, broadcast_from_rank0=processes.world_size() > 1)
    options = StateDictOptions(**sent, strict=False)
    set_model_state_dict(policy, weights, options=options)
    if stepped:
        set_optimizer_state_dict(policy, optimizer, moments or {}, options=options)
    return state
