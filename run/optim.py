"""
Around the gradient: the learning rate, clipping, the optimizer step. Copy it freely.
"""

import math

import torch

MAX_GRAD_NORM = 1.0  # [U18]
WEIGHT_DECAY = 0.0  # [U18]
WARMUP_FRAC = 0.05  # share of the steps in which the learning rate rises (authors' script)


def lr_scale(step, num_steps, warmup, cosine):
    """Factor of `step` (from 1): linear warm-up, then constant, or a cosine down to 10 %."""
    if step <= warmup:
        return step / warmup
    if not cosine:
        return 1.0
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def adamw(policy, lr):
    trained = [p for p in policy.parameters() if p.requires_grad]
    # on a GPU the fused kernel: the default one makes temporary copies as large as the parameters
    fused = True if trained[0].device.type == "cuda" else None
    return torch.optim.AdamW(trained, lr=lr, weight_decay=WEIGHT_DECAY, fused=fused)


def step(optimizer, lr, step, num_steps, cosine):
    """Takes step `step` of `num_steps` with the accumulated gradient, and clears the gradient."""
    warmup = max(1, round(WARMUP_FRAC * num_steps))
    scale = lr_scale(step, num_steps, warmup, cosine)
    for group in optimizer.param_groups:
        group["lr"] = lr * scale
    optimizer.step()
    optimizer.zero_grad()


def clip_grad_norm(policy):
    """Clips in place -> norm before clipping, over all parameters and ranks (float)."""
    params = [p for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
    if hasattr(norm, "full_tensor"):  # under FSDP each rank holds a part of it
        norm = norm.full_tensor()
    return float(norm)
