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

from run.errors import UserError

# rank 0 may work for long while the others wait for it in `gather`; a dead one ends torchrun anyway
LONG_TIMEOUT = timedelta(hours=6)
# the group that objects go through where tensors have NCCL: no GPU is waited for, or for LONG_TIMEOUT
_objects = []
ESTIMATE_AFTER = 5  # steps after which the time of the others is estimated


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def choose_device(device):
    """--device -> "cpu" or "cuda"."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here: leave it out to run on the CPU")
    return device


def init(device):
    """-> torch.device. One process without torchrun, several with it."""
    import torch
    import torch.distributed as dist

    device = choose_device(device)
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device == "cuda":
        torch.cuda.set_device(gpu)
    # the same bits twice, with any number of threads; a GPU's kernels are not all so
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
    import torch

    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, dtype)


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


def even_rounds(items, filler):
    """
    As many rounds on every rank, as a forward under FSDP needs: a rank that has fewer items than
    another goes on with fillers. -> pairs of (item, whether it is one of the items)
    """
    for k in range(max(all_gather_object(len(items)))):
        yield (items[k], True) if k < len(items) else (filler, False)


def local_slice(count):
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


class Steps:
    """
    The steps of a run, from the one after `start`, with a bar on rank 0; without a terminal only what
    is told through it appears.
    """

    def __init__(self, start, count, title):
        self.step, self.count = start, count
        self.bar = tqdm(
            total=count, initial=start, desc=title, dynamic_ncols=True, disable=bool(rank()) or None
        )

    def __iter__(self):
        began, start = time.monotonic(), self.step
        while self.step < self.count:
            self.step += 1
            yield self.step
            self.bar.update()
            left = self.count - self.step
            if self.step == start + ESTIMATE_AFTER and left > ESTIMATE_AFTER:
                minutes = (time.monotonic() - began) / ESTIMATE_AFTER * left / 60
                self.tell(f"about {minutes:.1f} minutes for the other {left} steps")
        self.bar.close()

    def tell(self, text):
        """A line about the present step."""
        line = f"step {self.step:4d}/{self.count}  {text}"
        print0(line) if self.bar.disable else self.bar.write(line)
