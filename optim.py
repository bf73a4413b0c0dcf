"""
The loop around the gradient: packs that fit in memory, the learning rate, clipping. Copy it freely.
"""

import math

import torch


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


def set_lr(optimizer, lr, step, steps, warmup_frac, cosine):
    scale = lr_scale(step, steps, max(1, round(warmup_frac * steps)), cosine)
    for group in optimizer.param_groups:
        group["lr"] = lr * scale


def clip_grad_norm(policy, max_norm):
    """Clips in place -> the gradient's norm over all ranks and parameters before clipping, float."""
    params = [p for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
