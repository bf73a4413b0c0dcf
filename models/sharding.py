"""
A policy on its device, sharded by FSDP2 when there is a GPU or more than one process.

A policy is a module with `units`, the classes of the modules that are gathered one at a time;
`frozen`, the modules in which nothing trains; and `float32_parts`, those that stay in float32.
"""

import functools
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from run import processes


def in_forward(function):
    """
    A function of a policy and more that runs inside the policy's forward, where FSDP holds the
    parameters in place. The other arguments do not pass through FSDP: it would move every tensor
    among them to the GPU, and copy the dicts that hold them.
    """

    @functools.wraps(function)
    def run(policy, *args, **kwargs):
        return policy(lambda policy: function(policy, *args, **kwargs))

    return run


def load_sharded(load, device, dtype, frozen=False):
    """
    Loads a policy onto its device. With several processes only rank 0 reads the weights: the others
    build the policy without memory for them, and then receive their shards, one tensor at a time. So
    the whole model is in the host's memory once.

    load     callable(empty) -> policy; empty: without reading weights
    frozen   nothing of it trains: a reference policy
    """
    reads_weights = processes.rank() == 0
    with nullcontext() if reads_weights else no_weights():
        policy = load(empty=not reads_weights)
    if frozen:
        policy.requires_grad_(False)
    if processes.world_size() == 1:
        return to_device(policy, device, dtype)
    processes.all_gather_object(None)  # wait for rank 0 here: this group has a long timeout
    param_dtype = processes.compute_dtype(device, dtype)
    cast_frozen(policy, param_dtype)
    state = policy.state_dict() if reads_weights else {}
    shard(policy, device, param_dtype)
    policy._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, state, options=options)
    return policy


@contextmanager
def no_weights():
    """
    Modules that are built in this context have parameters without memory. Buffers are real, because no
    file holds them. (accelerate's init_empty_weights makes two parameters of tied weights.)
    """
    register = nn.Module.register_parameter

    def register_empty(module, name, parameter):
        if parameter is not None and not parameter.is_meta:  # tied weights: meta already, still one
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def to_device(policy, device, dtype):
    """
    Moves a whole policy to its device, sharded where FSDP is needed.

    One process needs FSDP only for its casting: if weights of the base train, their masters are float32
    while a GPU computes in bfloat16. An adapter casts its own weights (adapters.py), so one GPU holds
    a LoRA policy without FSDP, and without the second copy of the layers that FSDP would make.
    """
    param_dtype = processes.compute_dtype(device, dtype)
    cast_frozen(policy, param_dtype)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    trains_base = any(".lora_" not in name for name in trained)
    policy = policy.to(device)
    if processes.world_size() == 1 and (param_dtype == torch.float32 or not trains_base):
        return policy
    return shard(policy, device, param_dtype)


def shard(policy, device, param_dtype):
    """
    FSDP2: each decoder layer is a unit (and each tower layer if towers train), the rest is the root.

    Frozen towers stay whole on every rank, outside FSDP: a rank without audio or video to encode does
    not call them, and no other rank waits. Frozen parameters have param_dtype already.
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


def cast_frozen(policy, dtype):
    """Casts the parameters that do not train, but for adapters and parts that need float32."""
    kept = {p for module in policy.float32_parts for p in module.parameters()}
    to_cast = []
    for name, parameter in policy.named_parameters():
        is_adapter = ".lora_" in name  # small; lora_forward casts it
        if not parameter.requires_grad and not is_adapter and parameter not in kept:
            to_cast.append(parameter)
    cast_params(to_cast, dtype)


def cast_params(parameters, dtype):
    """Never `module.to(dtype)`: rotary frequencies are buffers, and need float32."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def on_host(tensor):
    """
    A copy in the host's memory. From a GPU the copy is asynchronous, into pinned memory, so only a copy
    back to the GPU may read it: on the same stream it comes later.
    """
    if not tensor.is_cuda:
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@contextmanager
def unsharded(policy):
    """
    Under FSDP, all layers stay gathered in this context: once per rollout instead of once per token.

    To be used inside the policy's forward, which gathers the root. Nothing else in a rollout
    communicates, so each rank may end at its own time.
    """
    units = [m for m in policy.modules() if hasattr(m, "unshard") and m is not policy]
    policy.eval()  # in train mode, layers with gradient checkpointing cost time even without gradients
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
