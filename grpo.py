"""
The objective of AVATAR, arXiv:2508.03100: advantages of fresh and of replayed completions, and the
clipped, KL-regularised loss over both. Torch only: copy this file freely.

The constants are our choices where the paper is silent: numerics, not hyperparameters of a run.

N completions of a micro-batch, T tokens of the longest, G fresh completions of a prompt, M replayed
completions of a step.
"""

import torch

STD_EPS = 1e-4  # added to a group's std, as TRL does: equal rewards give 0, not 0/0 [U1]
SIGMA_FLOOR = 0.1  # least sigma_off: few, nearly equal replayed rewards must not explode [U1]
LOG_RATIO_MAX = 20.0  # |log ratio| beyond which exp is not taken [U1]
DUAL_CLIP = 3.0  # most a negative advantage counts, in multiples of itself [U1]


def group_advantages(group_rewards):
    """
    A_i = (R_i - mean(R)) / (std(R) + eps)                                            [GRPO.A]
    A fresh completion against the others of its prompt.

    group_rewards  (G,) float     of one prompt's fresh completions
    returns        (G,) float     0 for a group of one, or of equal rewards
    """
    assert group_rewards.ndim == 1, f"one group (G,), got {tuple(group_rewards.shape)}"
    # equal rewards first: their mean may round to another number, which eps would blow up
    if len(group_rewards) < 2 or (group_rewards == group_rewards[0]).all():
        return torch.zeros_like(group_rewards)
    return (group_rewards - group_rewards.mean()) / (group_rewards.std() + STD_EPS)


def replay_advantages(replayed_rewards, mean_rewards):
    """
    A_i = (R_i - R̄(q_i)) / sigma_off,   sigma_off = std of the step's replayed rewards  [VCRS.A]
    A replayed completion against what its prompt now usually earns.

    replayed_rewards  (M,) float     all that are replayed in the step, on all ranks
    mean_rewards      (M,) float     R̄(q_i): mean of the prompt's last 20 on-policy rewards
    returns           (M,) float

    sigma_off is taken over the step, not the prompt or the micro-batch: over one sample it is 0.
    """
    assert replayed_rewards.shape == mean_rewards.shape and replayed_rewards.ndim == 1
    sigma = replayed_rewards.std() if len(replayed_rewards) > 1 else torch.tensor(0.0)
    return (replayed_rewards - mean_rewards) / sigma.clamp(min=SIGMA_FLOOR)


def grpo_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    token_advantages,
    completion_mask,
    weights,
    clip_eps,
    kl_coef,
    kl_ratio=False,
):
    """
    J = sum_i weight_i mean_t [ min(r A, clip(r, 1-eps, 1+eps) A) - beta KL ]            [J]
    r_t = pi(c_t) / b(c_t), b the policy that sampled the completion                     [RATIO]
    KL_t = exp(d) - d - 1,  d = log pi_ref(c_t) - log pi(c_t)   (k3, never negative)     [KL]

    logprobs          (N, T) float   present policy pi, with gradient
    old_logprobs      (N, T) float   behaviour policy b, as recorded when it sampled
    ref_logprobs      (N, T) float   frozen reference, or None for no KL
    token_advantages  (N, T) float   A_{i,t}, after TAS
    completion_mask   (N, T) bool    1 up to and including EOS: ending is an action too
    weights           (N,) float     1 / (fresh completions in the update, all ranks) [J.on], or
                                     alpha / (replayed ones) [J.off]: no split changes the sum
    kl_ratio          bool           KL_t times min(r, DUAL_CLIP), held fixed: the samples are b's,
                                     not pi's, and exp(d) of a token pi has given up explodes [U20]
    returns           loss (), -J; info: dict of (N,) float without gradient

    On fresh completions r is 1, so the loss is about -mean(A) = 0 at first; its gradient is not.
    Before any update b = pi for them; for replayed ones r is a true importance ratio. A negative A
    with a huge r would pull without bound: it counts at most DUAL_CLIP A.
    """
    assert logprobs.shape == old_logprobs.shape == token_advantages.shape == completion_mask.shape
    assert weights.shape == logprobs.shape[:1]
    mask, num_tokens = completion_mask.float(), completion_mask.sum(1).clamp(min=1)
    log_ratio = ((logprobs - old_logprobs) * mask).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)  # (N, T)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    surrogate = torch.min(ratio * token_advantages, clipped * token_advantages)
    surrogate = torch.where(
        token_advantages < 0, torch.max(surrogate, DUAL_CLIP * token_advantages), surrogate
    )
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        d = ((ref_logprobs - logprobs) * mask).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
        kl = d.exp() - d - 1
        if kl_ratio:
            kl = kl * ratio.detach().clamp(max=DUAL_CLIP)
    objective = ((surrogate - kl_coef * kl) * mask).sum(1) / num_tokens  # (N,) per sequence
    with torch.no_grad():
        up, down = ratio > 1 + clip_eps, (ratio < 1 - clip_eps) | (ratio > DUAL_CLIP)
        outside = torch.where(token_advantages > 0, up, down & (token_advantages < 0))
        info = dict(
            loss=-weights * objective,
            num_tokens=completion_mask.sum(1),
            kl=(kl * mask).sum(1) / num_tokens,
            clip_frac=(outside * mask).sum(1) / num_tokens,
            ratio_max=(ratio * mask).amax(1),
            log_ratio=log_ratio.sum(1),  # of the whole completion
            gap=log_ratio.abs().amax(1),
        )
    return -(weights * objective).sum(), info
