"""
The processes of a run, one or many: who does what, and what all of them know.

torch is imported by the functions that need it: commands parse their flags, with the help of this
file, before anything slow is loaded.
"""

import os
import time
from datetime import timedelta

import numpy as np
from tqdm import tqdm

from run import devices
from run.errors import UserError

# rank 0 may work for long while the others wait for it; if it dies, torchrun ends them all
LONG_TIMEOUT = timedelta(hours=6)
ESTIMATE_AFTER = 5  # steps, before the time of the remaining ones is estimated
# With NCCL, Python objects go through a gloo group of their own: waiting in it occupies no GPU, and may
# last for LONG_TIMEOUT.
_objects = []

# ---- ranks -------------------------------------------------------------------------------------


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(*words):
    if rank() == 0:
        print(*words, flush=True)


# ---- devices -----------------------------------------------------------------------------------


def init(device):
    """-> torch.device. One process without torchrun, several with it."""
    import torch
    import torch.distributed as dist

    device = devices.choose_device(device)
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device == "cuda":
        torch.cuda.set_device(gpu)
    # on a CPU two equal runs give the same bits; not all kernels of a GPU can
    torch.use_deterministic_algorithms(device == "cpu")
    if world_size() > 1 and device == "cpu":
        dist.init_process_group("gloo", timeout=LONG_TIMEOUT)
    elif world_size() > 1:
        dist.init_process_group("nccl", timeout=timedelta(minutes=30), device_id=gpu)
        _objects.append(dist.new_group(backend="gloo", timeout=LONG_TIMEOUT))
    elif device == "cuda":  # FSDP keeps float32 master weights on one GPU too
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return torch.device(device)


def compute_dtype(device, dtype):
    """--dtype -> torch.dtype"""
    import torch

    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, dtype)


def check_dtype(device, dtype, lora_rank=0):
    """raises   UserError   --dtype cannot be trained in here: FSDP casts whole weights, LoRA its own"""
    if dtype == "bfloat16" and device.type == "cpu" and world_size() == 1 and not lora_rank:
        raise UserError(
            "--dtype bfloat16 needs a GPU, several processes or --lora-rank: leave it out"
        )


# ---- what all ranks know -----------------------------------------------------------------------


def all_gather_object(item):
    """-> list of every rank's item, in the order of the ranks."""
    items = [item] * world_size()
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_gather_object(items, item, *_objects)
    return items


def all_gather_dict(part):
    """-> the union of every rank's dict, on every rank; in the order of the ranks."""
    union = {}
    for other in all_gather_object(part):
        union |= other
    return union


def broadcast_object(item):
    """-> rank 0's item, on every rank."""
    items = [item]
    if world_size() > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(items, 0, *_objects)
    return items[0]


# ---- who does what -----------------------------------------------------------------------------


def even_rounds(items, dummy):
    """
    Yields (item, True) for each item, then (dummy, False) until every rank has had as many rounds: in
    each round all ranks must make the same forward passes, or FSDP would hang.
    """
    num_rounds = max(all_gather_object(len(items)))
    for item in items:
        yield item, True
    for _ in range(num_rounds - len(items)):
        yield dummy, False


def local_slice(count):
    """The slice of `count` things that belongs to this rank."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())


def seed(*numbers):
    """A 63-bit seed that depends on every number."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def check_multiple(flag, value):
    if value % world_size():
        raise UserError(f"{flag} {value} must be a multiple of the {world_size()} processes")


# ---- the steps ---------------------------------------------------------------------------------


class Steps:
    """
    The numbers of a run's steps, from the one after `start` to `count`, with a bar on rank 0. The bar
    appears only on a terminal; what is printed through `tell` appears anywhere.
    """

    def __init__(self, start, count, title):
        self.step = start
        self.count = count
        self.bar = tqdm(
            total=count,
            initial=start,
            desc=title,
            dynamic_ncols=True,
            disable=True if rank() else None,  # None: only on a terminal
        )

    def __iter__(self):
        start = self.step
        start_time = time.monotonic()
        while self.step < self.count:
            self.step += 1
            yield self.step
            self.bar.update()
            remaining = self.count - self.step
            if self.step == start + ESTIMATE_AFTER and remaining > ESTIMATE_AFTER:
                step_s = (time.monotonic() - start_time) / ESTIMATE_AFTER
                minutes = step_s * remaining / 60
                self.tell(f"about {minutes:.1f} minutes for the remaining {remaining} steps")
        self.bar.close()

    def tell(self, text):
        """Prints a line about the present step."""
        line = f"step {self.step:4d}/{self.count}  {text}"
        if self.bar.disable:
            print0(line)
        else:
            self.bar.write(line)
