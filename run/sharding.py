"""
A policy on its device: sharded by FSDP2 when there is a GPU or more than one process.

A policy is a module with `units`, classes of the modules that are gathered at one time, and `frozen`,
modules in which nothing trains.
"""

from contextlib import contextmanager

from run import UserError, processes  # before torch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def place(policy, device, dtype):
    """Moves the policy to its device; sharded when there is a GPU or more than one process."""
    if not dist.is_initialized():
        if dtype == "bfloat16":
            told = "--dtype bfloat16 needs a GPU or several processes: FSDP computes in it"
            raise UserError(told)
        return policy.to(device)
    param_dtype = processes.compute_dtype(
        device, dtype
    )  # FSDP's of all; float32 is for what trains
    cast((p for p in policy.parameters() if not p.requires_grad), param_dtype)
    mesh = dist.init_device_mesh(device.type, (processes.world_size(),))
    return shard(policy.to(device), mesh, param_dtype)


def shard(policy, mesh, param_dtype):
    """
    FSDP2: one unit a decoder layer (and a tower layer if towers train), the rest in the root.

    Frozen towers stay whole on every rank, outside FSDP: who has no audio or no video to encode
    does not call them, and nobody waits. What is frozen has param_dtype already (model.place).
    """
    ignored = {p for tower in policy.frozen for p in tower.parameters()}
    precision = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in policy.modules():
        if isinstance(module, policy.units):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision, ignored_params=ignored)


def cast(parameters, dtype):
    """Never a whole module: the rotary frequencies are buffers, and in bfloat16 they lose count."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


@contextmanager
def gathered(policy):
    """
    Under FSDP, the layers whole from here to the end: gathered once a rollout, not once a token.
    To be used inside the policy's forward, which does the same for the root unit. Nothing else
    in a rollout talks to other ranks, so each ends in its own time.
    """
    units = [m for m in policy.modules() if hasattr(m, "unshard") and m is not policy]
    policy.eval()  # in training, layers with gradient checkpointing cost time even here
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        policy.train()
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
