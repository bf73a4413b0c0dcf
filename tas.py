"""
Temporal Advantage Shaping (TAS), arXiv:2508.03100. Torch only: copy this file freely.

One advantage per completion becomes one per token: more credit to the beginning (planning) and
the end (synthesis) of a reasoning chain than to its middle, without a learned critic.

N completions, T padded length, L_i the number of valid tokens of completion i.
"""

import math

import torch

SHAPES = ("parabolic", "uniform", "linear-up", "linear-down", "inverse")


def tas_weights(completion_mask, shape, tas_lambda, equal_mean=False):
    """
    w_t = 1 + lambda (2 t~ - 1)^2,   t~ = t / (L_i - 1),   t = 0 .. L_i - 1          [TAS.w]
    The U-shaped weight of the paper, and the other shapes of its ablation:
        uniform      1
        linear-up    1 + lambda t~
        linear-down  1 + lambda (1 - t~)
        inverse      1 + lambda (1 - (2 t~ - 1)^2)

    completion_mask  (N, T) bool or 0/1   1 up to and including EOS, right padded
    shape            one of SHAPES
    tas_lambda       float >= 0           how much more the ends count than the middle
    equal_mean       bool                 divide each row by its mean weight, so that a shape
                                          only moves credit between tokens (a control)
    returns          (N, T) float32       in [1, 1 + lambda] without equal_mean, 0 off the mask
    raises           ValueError           unknown shape; tas_lambda negative or not finite

    [U10] The mean weight of a long row is 1 + lambda / 3 (parabolic), so the surrogate counts that much
    more against the KL, whose terms TAS does not weigh; with equal_mean it does not. The size of Adam's
    steps is nearly the same either way. A row of one token is all planning: t~ = 0.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown TAS shape {shape!r}, choose one of {', '.join(SHAPES)}")
    if not (math.isfinite(tas_lambda) and tas_lambda >= 0):
        raise ValueError(f"tas_lambda must be finite and >= 0, got {tas_lambda}")
    assert completion_mask.ndim == 2, (
        f"completion_mask is (N, T), got {tuple(completion_mask.shape)}"
    )
    mask = completion_mask.bool()
    length = mask.sum(1, keepdim=True)  # (N, 1) each row its own, not T
    t = mask.long().cumsum(1) - 1  # (N, T) 0 on the first valid token
    t_rel = t.float() / (length - 1).clamp(min=1)  # (N, T) t~; L = 1 gives 0, not 0/0
    bump = {
        "parabolic": (2 * t_rel - 1) ** 2,
        "uniform": torch.zeros_like(t_rel),
        "linear-up": t_rel,
        "linear-down": 1 - t_rel,
        "inverse": 1 - (2 * t_rel - 1) ** 2,
    }[shape]
    # where, not a product: an empty row has t = -1 everywhere, which must not leak out
    weights = torch.where(mask, 1 + tas_lambda * bump, 0.0)  # (N, T)
    if equal_mean:
        mean = weights.sum(1, keepdim=True) / length.clamp(min=1)
        weights = weights / torch.where(length > 0, mean, 1.0)
    return weights


def shape_advantages(advantages, completion_mask, shape, tas_lambda, equal_mean=False):
    """
    A_{i,t} = w_t A_i                                                                [TAS.A]
    The advantage of a completion, spread over its tokens.

    advantages       (N,) float           one scalar per completion, any sign
    completion_mask  (N, T) bool or 0/1   1 up to and including EOS, right padded
    returns          (N, T) float         token_advantages, 0 off the mask
    raises           ValueError           as tas_weights

    All weights are >= 0, so no token is pushed against the sign of its completion. The KL term of the
    loss is not weighted: shaping moves credit, not the distance to the reference.
    """
    # (N,) against (N, T) broadcasts silently when N == T, and shapes the wrong axis
    assert advantages.ndim == 1, f"advantages is (N,), got {tuple(advantages.shape)}"
    weights = tas_weights(completion_mask, shape, tas_lambda, equal_mean)
    assert len(advantages) == len(weights), f"{len(advantages)} advantages, {len(weights)} rows"
    return weights * advantages[:, None]  # (N, T)
