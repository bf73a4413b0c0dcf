"""
Started by test_sharding.py under torchrun: a policy that rank 0 alone reads, against the one that
every rank reads; peaks of memory; a checkpoint and `final/` of it.

    torchrun --nproc-per-node 2 tests/loaded_once.py MODEL OUT
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import conftest  # noqa: F401  puts the repository on the path
from run import checkpoint, ending, folders, optim, processes, sharding  # before torch

import torch
from torch.distributed.tensor import DTensor

from experiments.bench import resident_mb
from omni import model


def peak_mb(task):
    """-> what the task gives, MB that it adds to this process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = resident_mb("VmRSS")
    found = task()
    return found, resident_mb("VmHWM") - before


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_policy(a, b):
    """b is whole on every rank."""
    pairs = list(zip(a.named_parameters(), b.named_parameters(), strict=True))
    for (name, p), (other, q) in pairs:
        assert name == other and p.requires_grad == q.requires_grad and not p.is_meta
        assert torch.equal(whole(p.detach()), q.detach()), name
    for (name, x), (other, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert name == other and torch.equal(x, y), name
    return len(pairs)


def fake_step(policy, optimizer):
    """As from a backward pass in which every weight has a gradient of its own."""
    for i, parameter in enumerate(p for p in policy.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, 1 + i % 7)
    optim.step(optimizer, 1e-2, 1, 1, cosine=False)


class NoProcessor:
    def save_pretrained(self, folder):
        pass


def check(folder, lora_rank, out):
    """Loaded, stepped, saved, resumed: all as on one process. -> lines with the peaks"""
    device = torch.device("cpu")
    args = argparse.Namespace(lora_rank=lora_rank, train_towers=False, dtype="float32")
    plain = model.load(folder, lora_rank, False)  # warms up what loading needs once, too
    size = sum(p.nbytes for p in plain.parameters()) / 2**20
    load = partial(model.load, folder, lora_rank, False)
    _, plain_peak = peak_mb(lambda: sharding.place(load(), device, "float32"))
    open_policies = partial(model.open_policies, folder, args, device, with_reference=False)
    (policy, _), peak = peak_mb(open_policies)
    assert same_policy(policy, plain) > 100
    found = dict(size=size, plain=processes.gather(plain_peak), once=processes.gather(peak))

    # ---- a checkpoint that rank 0 alone can read, and what a run ends with
    optimizer = optim.adamw(policy, 1e-2)
    fake_step(policy, optimizer)
    fake_step(plain, optim.adamw(plain, 1e-2))
    same_policy(policy, plain)
    checkpoint.save(out, 1, policy, optimizer, dict(number=7), keep=1)
    for name, whose in (("final", policy), ("plain", plain)):
        folders.save(whose, out / name, NoProcessor())
    again, _ = open_policies()
    other = optim.adamw(again, 1e-2)
    here = out / "not on this node" if processes.rank() else out
    state, peak = peak_mb(lambda: checkpoint.load(here, again, other))
    assert state == dict(number=7, step=1), state
    same_policy(again, plain)
    for p, q in zip(policy.parameters(), again.parameters(), strict=True):
        assert optimizer.state.get(p, {}).keys() == other.state.get(q, {}).keys()
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(whole(value), whole(other.state[q][key])), key
    return found | dict(resumed=processes.gather(peak))


def main():
    folder, out = sys.argv[1], Path(sys.argv[2])
    processes.init("cpu")
    for lora_rank in (0, 8):
        (out / str(lora_rank) / "checkpoints").mkdir(parents=True, exist_ok=True)
        processes.print0(json.dumps(check(folder, lora_rank, out / str(lora_rank))))


if __name__ == "__main__":
    ending.main_guard(main)
