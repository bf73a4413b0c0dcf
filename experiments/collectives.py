"""
What processes say to each other, each collective that a run uses: right? GB/s. A step of first_gpu.py,
which starts it with two processes; prints one line of JSON.

    torchrun --nproc-per-node 2 -m experiments.collectives
"""

import run.before_torch  # noqa: F401  must come before torch

import json
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from run import processes
from run.launch import run_main

LAYER = 233_057_792  # weights of a layer of the 7B model, which FSDP gathers and sums at one time
FEW = 2**14


def timed(device, task, num_bytes):
    """-> GB/s of the second of two runs"""
    for _ in range(2):
        dist.barrier()
        began = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return num_bytes / seconds / 1e9


def collectives(device, size):
    """The three that FSDP uses, on `size` numbers in all."""
    rank, world_size = processes.rank(), processes.world_size()
    own = torch.full((size // world_size,), rank + 1.0, device=device, dtype=torch.bfloat16)
    whole = torch.empty(size, device=device, dtype=torch.bfloat16)
    gradient = torch.full((size,), rank + 1.0, device=device)
    summed = torch.empty(size // world_size, device=device)
    total = torch.tensor(rank + 1.0, device=device)
    result = {}
    result["all_gather GB/s"] = timed(
        device, lambda: dist.all_gather_into_tensor(whole, own), whole.nbytes
    )
    result["reduce_scatter GB/s"] = timed(
        device, lambda: dist.reduce_scatter_tensor(summed, gradient), gradient.nbytes
    )
    dist.all_reduce(total)
    expected = sum(range(1, world_size + 1))
    is_gathered = torch.equal(whole.view(world_size, -1)[:, 0].cpu(), torch.arange(world_size) + 1)
    result["right"] = is_gathered and bool((summed == expected).all()) and total.item() == expected
    return result


def objects():
    """Python objects, through gloo where tensors go through NCCL."""
    rank = processes.rank()
    began = time.perf_counter()
    gathered = processes.all_gather_object(dict(rank=rank))
    ms = (time.perf_counter() - began) * 1e3
    is_right = gathered == [dict(rank=i) for i in range(processes.world_size())]
    return dict(right=is_right and processes.broadcast_object(rank) == 0, ms=ms)


def fsdp(device):
    """|gradient of two sharded layers in bfloat16 - of the whole ones in float32| / |the latter|"""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(device)
    sharded = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(device)
    sharded.load_state_dict(whole.state_dict())
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in sharded:
        fully_shard(layer, mp_policy=precision)
    fully_shard(sharded, mp_policy=precision)
    x = torch.randn(processes.world_size(), 8, 64, device=device)  # each rank its own
    whole(x).square().sum().backward()
    sharded(x[processes.rank()]).square().sum().mul(processes.world_size()).backward()
    errors = []
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        difference = q.grad.full_tensor() - p.grad
        errors.append((difference.norm() / p.grad.norm()).item())
    return max(errors)


def main():
    device = processes.init("auto")
    size = LAYER if device.type == "cuda" else FEW
    size -= size % processes.world_size()
    found = dict(
        processes=processes.world_size(),
        backend=dist.get_backend(),
        collectives=collectives(device, size),
        objects=objects(),
        fsdp=fsdp(device),
    )
    processes.print0(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
