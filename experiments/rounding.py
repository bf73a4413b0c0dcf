"""
What rounding to bfloat16 or float32 loses where a small number meets a large one: docs/gpus.md.

    python -m experiments.rounding
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse

from run import arguments


def parse_args(argv=None):
    return argparse.ArgumentParser(description=__doc__, **arguments.PARSER).parse_args(argv)


if __name__ == "__main__":
    arguments.answer_early(parse_args)

import torch

from grpo import grpo_loss
from run.launch import run_main

STEPS = (1, 10, 100, 400)


def arriving(change, exact):
    """How much of an exact change is in another one: the slope of a line through all their numbers."""
    return float((change.double() * exact.double()).sum() / (exact.double() ** 2).sum())


def share_after_cast(weights, lr, steps):
    """
    Float32 weights that Adam has moved one way for so many steps, cast to bfloat16 for the forward pass
    -> the share of the move that is in the cast ones
    """
    move = torch.randn_like(weights).sign() * lr * steps
    return arriving((weights + move).bfloat16().float() - weights.bfloat16().float(), move)


def kl_error(distance):
    """
    distance   standard deviation of log pi_ref - log pi, nats per token
    returns    relative error of the KL in float32, of its gradient
    """
    mask = torch.ones(64, 512, dtype=torch.bool)
    logprobs = -3 * torch.rand(64, 512)
    ref_logprobs = logprobs + distance * torch.randn(64, 512)
    results = []
    for dtype in (torch.float32, torch.float64):
        own = logprobs.to(dtype, copy=True).requires_grad_()
        loss, info = grpo_loss(
            logprobs=own,
            old_logprobs=logprobs.to(dtype),
            ref_logprobs=ref_logprobs.to(dtype),
            token_advantages=torch.zeros_like(own),
            completion_mask=mask,
            weights=torch.full((64,), 1 / 64, dtype=dtype),
            clip_eps=0.2,
            kl_coef=1.0,
        )
        loss.backward()
        results.append((info["kl"].mean().double(), own.grad.double()))
    (kl, grad), (exact_kl, exact_grad) = results
    grad_error = (grad - exact_grad).norm() / exact_grad.norm()
    return float((kl / exact_kl - 1).abs()), float(grad_error)


def merge_error(weight_dtype):
    """
    The outputs of attention to the prompt and to the completion, in bfloat16, merged as a decoded token
    does -> error against rounding the exact result once
    """
    prompt_out = torch.randn(4096, 64).bfloat16()
    own_out = torch.randn(4096, 64).bfloat16()
    weight = (3 * torch.randn(4096, 1)).sigmoid()
    exact = prompt_out.double().lerp(own_out.double(), weight.double())
    if weight_dtype == torch.float32:
        merged = prompt_out.float().lerp(own_out.float(), weight).bfloat16()
    else:
        merged = prompt_out.lerp(own_out, weight.bfloat16())
    once = (exact.bfloat16() - exact).norm()
    return float((merged - exact).norm() / once)


def main():
    parse_args()
    torch.manual_seed(0)
    a = (2 * torch.rand(16, 3584) - 1) / 3584**0.5
    kinds = {
        "weights of .02": (0.02 * torch.randn(1024, 1024)).bfloat16().float(),
        "RMSNorm's weights, near 1": (1 + 0.2 * torch.randn(10**5)).bfloat16().float(),
        "A of a new adapter, as PEFT draws it": a.bfloat16().float(),  # in the dtype of the base
        "A of a trained adapter": a,
    }
    steps = ", ".join(map(str, STEPS))
    for name, weights in kinds.items():
        for lr in (5e-7, 1e-6, 1e-5):
            shares = [f"{share_after_cast(weights, lr, n):.2f}" for n in STEPS]
            print(f"{name}, lr {lr:g}: of {steps} steps arrives {', '.join(shares)}")
    for distance in (1e-2, 1e-3, 1e-4):
        value, grad = kl_error(distance)
        print(f"KL at {distance:g} nats: off by {value:.1%}, its gradient by {grad:.1e}")
    for dtype in (torch.bfloat16, torch.float32):
        print(f"merge with a weight in {dtype}: {merge_error(dtype):.2f} times one rounding")


if __name__ == "__main__":
    run_main(main)
