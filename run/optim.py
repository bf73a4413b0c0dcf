"""
The loop around the gradient: packs that fit in memory, the learning rate, clipping. Copy it freely.
"""

import math

import torch

MAX_GRAD_NORM = 1.0  # [U18]
WEIGHT_DECAY = 0.0  # [U18]
WARMUP_FRAC = 0.05  # share of the steps in which the learning rate rises (authors' script)


def micro_batches(sizes, max_tokens):
    """Indices of items, in order, in packs of at most max_tokens (an item over it gets its own)."""
    packs, room = [], -1
    for i, size in enumerate(sizes):
        if size > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(i)
        room -= size
    return packs


def lr_scale(step, steps, warmup, cosine):
    """Factor of `step` (from 1): linear warm-up, then constant, or a cosine down to 10 %."""
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.55 + 0.45 * math.cos(math.pi * done) if cosine else 1.0


def adamw(policy, lr):
    trained = [p for p in policy.parameters() if p.requires_grad]
    # on a GPU one kernel: the default there makes copies as large as what it is given
    fused = trained[0].device.type == "cuda" or None
    return torch.optim.AdamW(trained, lr=lr, weight_decay=WEIGHT_DECAY, fused=fused)


def step(optimizer, lr, step, steps, cosine):
    """A step with the gradient that was added up, which is then gone, at the rate of `step`."""
    scale = lr_scale(step, steps, max(1, round(WARMUP_FRAC * steps)), cosine)
    for group in optimizer.param_groups:
        group["lr"] = lr * scale
    optimizer.step()
    optimizer.zero_grad()


def clip_grad_norm(policy):
    """Clips in place -> the gradient's norm over all ranks and parameters before clipping, float."""
    params = [p for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
