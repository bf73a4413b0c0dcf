"""
A policy on its device: sharded by FSDP2 when there is a GPU or more than one process.

A policy is a module with `units`, classes of the modules that are gathered at one time, and `frozen`,
modules in which nothing trains.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from run import processes


def load_sharded(load, device, dtype, frozen=False):
    """
    The policy that load(empty=False) gives, in its place. Of several processes only rank 0 reads it;
    the others build it empty, hold nothing until it is sharded, and are then sent their parts, a
    tensor at a time: the whole model is in memory once.

    load     callable(empty) -> policy; empty: without reading weights
    frozen   nothing of it trains: a reference
    """
    first = processes.rank() == 0
    with nullcontext() if first else no_weights():
        policy = load(empty=not first)
    if frozen:
        policy.requires_grad_(False)
    if processes.world_size() == 1:
        return to_device(policy, device, dtype)
    processes.all_gather_object(
        None
    )  # who waits for rank 0 to read waits here, where it may take long
    param_dtype = cast_frozen(policy, device, dtype)
    whole = policy.state_dict() if first else {}
    shard(policy, device, param_dtype)
    policy._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, whole, options=options)
    return policy


@contextmanager
def no_weights():
    """Modules built in here have parameters of no memory. Buffers are real: no file has them."""
    register = nn.Module.register_parameter

    def register_empty(module, name, parameter):
        if parameter is not None and not parameter.is_meta:  # one of two names stays one parameter
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def to_device(policy, device, dtype):
    """Moves a whole policy to its device; sharded when there is a GPU or more than one process."""
    if not dist.is_initialized():
        processes.check_dtype(device, dtype)
        return policy.to(device)
    param_dtype = cast_frozen(policy, device, dtype)
    return shard(policy.to(device), device, param_dtype)


def shard(policy, device, param_dtype):
    """
    FSDP2: one unit a decoder layer (and a tower layer if towers train), the rest in the root.

    Frozen towers stay whole on every rank, outside FSDP: who has no audio or no video to encode
    does not call them, and nobody waits. What is frozen has param_dtype already.
    """
    mesh = dist.init_device_mesh(device.type, (processes.world_size(),))
    ignored = {p for module in policy.frozen for p in module.parameters()}
    precision = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in policy.modules():
        if isinstance(module, policy.units):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision, ignored_params=ignored)


def cast_frozen(policy, device, dtype):
    """-> FSDP's dtype of all parameters, which those have from here on that do not train."""
    param_dtype = processes.compute_dtype(device, dtype)
    cast_params((p for p in policy.parameters() if not p.requires_grad), param_dtype)
    return param_dtype


def cast_params(parameters, dtype):
    """Never a whole module: the rotary frequencies are buffers, and in bfloat16 they lose count."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def on_host(tensor):
    """
    The tensor in the host's memory. From a GPU it comes without a wait, into memory that it can go
    back from without one: only a copy back to the GPU may read it.
    """
    if not tensor.is_cuda:
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@contextmanager
def unsharded(policy):
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
