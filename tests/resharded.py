"""
Started by test_sharding.py, with any number of processes: saves a checkpoint of a small model after a
step of AdamW, or loads what another number of processes has saved.

    torchrun --nproc-per-node N tests/resharded.py save|load OUT
"""

import sys
from pathlib import Path

import conftest  # noqa: F401  puts the repository on the path
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from run import checkpoint, optim, processes
from run.launch import run_main


class Small(nn.Module):
    """Weights whose rows do not divide evenly; with 3 processes one of them has none of `bias`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(15.0).view(5, 3))
        self.bias = nn.Parameter(torch.tensor([0.5, -2.0]))
        self.long = nn.Parameter(torch.arange(1001.0) - 3)

    def forward(self, x):
        return (self.weight @ x).sum() + self.bias.sum() + self.long.sum()


def trained(model):
    """A step in which every number has a gradient of its own -> AdamW."""
    optimizer = optim.adamw(model, 1e-2)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 3 + 1
    optim.step(optimizer, 1e-2, 1, 1, cosine=False)
    return optimizer


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main():
    task, out = sys.argv[1], Path(sys.argv[2])
    processes.init("cpu")
    (out / "checkpoints").mkdir(exist_ok=True)
    model, expected = Small(), Small()
    expected_optimizer = trained(expected)
    if processes.world_size() > 1:
        fully_shard(model)
    if task == "save":
        optimizer = trained(model)
        with torch.no_grad():
            model(torch.ones(3))  # FSDP's root stays gathered, as after an evaluation
        checkpoint.save(
            out, 1, policy=model, optimizer=optimizer, state=dict(number=7), keep_checkpoints=1
        )
        return
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = optim.adamw(model, 1.0)
    assert checkpoint.load(out, model, optimizer) == dict(number=7, step=1)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(whole(p), q)
        moments, expected_moments = optimizer.state[p], expected_optimizer.state[q]
        assert moments.keys() == expected_moments.keys()
        for key, value in moments.items():
            assert torch.equal(whole(value), expected_moments[key]), key
    processes.print0("all equal")


if __name__ == "__main__":
    run_main(main)
