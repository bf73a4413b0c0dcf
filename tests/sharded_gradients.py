"""
Started by test_model.py under torchrun: the sharded policy's gradients against the plain policy's.

    torchrun --nproc-per-node 2 tests/sharded_gradients.py MODEL ROWS LORA_RANK
"""

import sys
from pathlib import Path

import conftest  # puts the repository on the path
import torch

from data.rows import Rows
from models import sharding
from models.inputs import InputBuilder
from models.loading import load_policy
from models.policy import completion_logprobs
from run import processes
from run.launch import run_main


def policy_of(folder, lora_rank):
    policy = load_policy(folder, lora_rank, train_towers=True)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # they start at 0, and then the others have no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def backward(policy, prompts, completions, scale):
    logprobs, _, _ = completion_logprobs(policy, prompts, completions, 1.0)
    (logprobs.sum() * scale).backward()


def main():
    folder, rows, lora_rank = sys.argv[1:]
    device, rows = processes.init("cpu"), Rows(Path(rows) / "train.jsonl")
    build = InputBuilder(folder, conftest.RECIPE, rows.path.parent, audio_captions=False)
    prompts = [build(rows[i]) for i in range(4)]
    completions = conftest.random_completions([[5, 1], [7, 2, 2], [9], [3, 4]])
    plain = policy_of(folder, int(lora_rank))
    sharded = sharding.to_device(policy_of(folder, int(lora_rank)), device, "float32")
    mine = processes.local_slice(len(prompts))
    backward(plain, prompts, completions, 1.0)
    # FSDP takes the mean
    backward(sharded, prompts[mine], completions[mine], float(processes.world_size()))
    expected, compared = dict(plain.named_parameters()), 0
    for name, parameter in sharded.named_parameters():
        if (other := expected[name].grad) is None:
            assert parameter.grad is None, name
            continue
        gradient = parameter.grad.full_tensor()
        assert (gradient - other).norm() <= 1e-4 * other.norm().clamp(min=1e-6), name
        compared += 1
    assert compared > 50
    processes.print0(f"{compared} parameters agree")


if __name__ == "__main__":
    run_main(main)
