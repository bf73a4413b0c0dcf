"""
Started by test_sharding.py under torchrun: a policy that rank 0 alone reads, against the one that
every rank reads; peaks of memory; a checkpoint and `final/` of it.

    torchrun --nproc-per-node 2 tests/loaded_once.py MODEL OUT
"""

import gc
import json
import sys
from functools import partial
from pathlib import Path

import conftest  # noqa: F401  puts the repository on the path
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from experiments.bench import resident_mb
from models.loading import load_policy, open_policies
from models.paths import save_model
from run import checkpoint, optim, processes
from run.launch import run_main


def peak_mb(task):
    """-> what the task gives, MB that it adds to this process at its peak."""
    gc.collect()  # what was held in cycles until now
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


def check_loading(load_plain, load_sharded):
    """Every parameter and buffer -> the policy, the plain one, MB of each rank at its peak."""
    (policy, _), once = peak_mb(load_sharded)
    whole_one, plain = peak_mb(load_plain)
    assert same_policy(policy, whole_one) > 100
    size = sum(p.nbytes for p in whole_one.parameters()) / 2**20
    found = dict(
        size=size, plain=processes.all_gather_object(plain), once=processes.all_gather_object(once)
    )
    return policy, whole_one, found


def check_resuming(policy, plain, load_sharded, out):
    """A checkpoint, saved and loaded by all ranks -> MB of each at its peak while it loads."""
    optimizer = optim.adamw(policy, 1e-2)
    fake_step(policy, optimizer)
    fake_step(plain, optim.adamw(plain, 1e-2))
    checkpoint.save(
        out, 1, policy=policy, optimizer=optimizer, state=dict(number=7), keep_checkpoints=1
    )
    again, _ = load_sharded()
    other = optim.adamw(again, 1e-2)
    state, peak = peak_mb(lambda: checkpoint.load(out, again, other))
    assert state == dict(number=7, step=1), state
    same_policy(again, plain)
    for p, q in zip(policy.parameters(), again.parameters(), strict=True):
        assert optimizer.state.get(p, {}).keys() == other.state.get(q, {}).keys()
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(whole(value), whole(other.state[q][key])), key
    return processes.all_gather_object(peak)


def check(folder, lora_rank, out, device):
    load_plain = partial(load_policy, folder, lora_rank, False)
    load_sharded = partial(
        open_policies,
        folder,
        device=device,
        dtype="float32",
        attn="auto",
        lora_rank=lora_rank,
        train_towers=False,
        with_reference=False,
    )
    policy, plain, found = check_loading(load_plain, load_sharded)
    if not lora_rank:
        found["resumed"] = check_resuming(policy, plain, load_sharded, out)
    for name, whose in (("final", policy), ("plain", plain)):
        save_model(whose, out / f"{name}-{lora_rank}", NoProcessor())
    processes.print0(json.dumps(found))


def main():
    folder, out = sys.argv[1], Path(sys.argv[2])
    device = processes.init("cpu")
    processes._objects.append(dist.new_group(backend="gloo"))  # as beside NCCL
    load_policy(folder, 8, False)  # what loading needs once
    for lora_rank in (0, 8):
        check(folder, lora_rank, out, device)


if __name__ == "__main__":
    run_main(main)
