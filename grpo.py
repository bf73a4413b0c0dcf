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
LOG_RATIO_MAX = 20.0  # log ratio beyond which exp is not taken [U1]
DUAL_CLIP = 3.0  # with a negative advantage, a token's ratio counts at most this much [U1]
KL_RATIO_MAX = 3.0  # in the KL, a token's ratio counts at most this much [U20]


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
    sequence_ratio=False,
):
    """
    J = sum_i weight_i mean_t [ min(r A, clip(r, 1-eps, 1+eps) A) - beta KL ]            [J]
    r_t = pi(c_t) / b(c_t), b the policy that sampled the completion                     [RATIO]
    with sequence_ratio: exp(mean_t log r_t) in its place, for all tokens; not in the KL [U22]
    KL_t = r (exp(d) - d - 1),  d = log pi_ref(c_t) - log pi(c_t)                        [KL]

    logprobs          (N, T) float   present policy pi, with gradient
    old_logprobs      (N, T) float   behaviour policy b, as recorded when it sampled
    ref_logprobs      (N, T) float   frozen reference, or None for no KL
    token_advantages  (N, T) float   A_{i,t}, after TAS
    completion_mask   (N, T) bool    1 up to and including EOS; values off the mask are never read
    weights           (N,) float     1 / (fresh completions in the update, all ranks) [J.on], or
                                     alpha / (replayed ones) [J.off]: no split changes the sum
    returns           loss (), which is -J; info: dict of (N,) float without gradient

    At the first update b = pi on fresh completions, so r = 1 and the loss is about -mean(A) = 0. Its
    gradient is not 0.

    A negative A with a huge r would pull without bound. Such a token counts at most DUAL_CLIP A.

    The KL is exact on samples of any b: E_b[KL_t] = KL(pi || ref), and its gradient, through r as
    well, has the expectation grad KL(pi || ref). It is 0 where pi has given up a token. k3 alone
    (without r) has the factor 1 - ref / pi there, which explodes, and on fresh samples its
    expectation is the gradient of the other direction, KL(ref || pi).                     [U20]
    """
    assert logprobs.shape == old_logprobs.shape == token_advantages.shape == completion_mask.shape
    assert weights.shape == logprobs.shape[:1]
    mask = completion_mask.bool()
    num_tokens = completion_mask.sum(1).clamp(min=1)  # (N,)
    advantages = torch.where(mask, token_advantages, 0.0)

    # ---- ratio                                                               [RATIO] [U22]
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (N, T)
    token_ratio = log_ratio.clamp(max=LOG_RATIO_MAX).exp()
    ratio = token_ratio
    if sequence_ratio:
        # GSPO-token: one value for all tokens, and each token's own gradient
        mean_log_ratio = (log_ratio.sum(1) / num_tokens)[:, None]
        own_gradient = log_ratio - log_ratio.detach()  # 0 in value
        ratio = (mean_log_ratio.detach() + own_gradient).clamp(max=LOG_RATIO_MAX).exp()

    # ---- clipped surrogate                                                            [J]
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    surrogate = torch.min(ratio * advantages, clipped_ratio * advantages)
    dual_clipped = torch.max(surrogate, DUAL_CLIP * advantages)
    surrogate = torch.where(advantages < 0, dual_clipped, surrogate)

    # ---- KL(pi || ref)                                                         [KL] [U20]
    kl = torch.zeros_like(ratio)
    d = torch.zeros_like(ratio)
    if ref_logprobs is not None:
        d = torch.where(mask, ref_logprobs - logprobs, 0.0)
        # r (exp(d) - d - 1) = ref / b - r (1 + d): nothing overflows in this form
        log_ref_ratio = torch.where(mask, ref_logprobs - old_logprobs, 0.0)
        ref_ratio = log_ref_ratio.clamp(max=LOG_RATIO_MAX).exp()
        # min(r, KL_RATIO_MAX) / r, held constant: the cap scales the value and the gradient alike
        truncation = (KL_RATIO_MAX / token_ratio.detach()).clamp(max=1)
        kl = truncation * (ref_ratio - token_ratio * (1 + d))

    objective = (surrogate - kl_coef * kl).sum(1) / num_tokens  # (N,) mean over the tokens
    loss = -(weights * objective).sum()

    # ---- what is reported of each completion, and read by the guards
    with torch.no_grad():
        too_high = ratio > 1 + clip_eps
        too_low = (ratio < 1 - clip_eps) | (ratio > DUAL_CLIP)
        is_clipped = torch.where(advantages > 0, too_high, too_low & (advantages < 0)) & mask
        effective_ratio = torch.where(mask, ratio.clamp(max=DUAL_CLIP), 0.0)
        kl_ratio = token_ratio.clamp(max=KL_RATIO_MAX)
        pulls = torch.where(is_clipped, 0.0, ratio * advantages)
        weight_per_token = weights / num_tokens
        info = dict(
            loss=-weights * objective,
            num_tokens=completion_mask.sum(1),
            kl=kl.sum(1) / num_tokens,
            clip_frac=is_clipped.sum(1) / num_tokens,
            ratio_max=torch.where(mask, ratio, 0.0).amax(1),
            log_ratio=log_ratio.sum(1),  # of the whole completion: the sum over its tokens
            logprob_gap_max=log_ratio.abs().amax(1),
            logprob_gap_mean=log_ratio.abs().sum(1) / num_tokens,
            moved=d.abs().sum(1) / num_tokens,  # from the reference; 0 without one
            ratio_sum=effective_ratio.sum(1),
            ratio_square_sum=(effective_ratio**2).sum(1),
            # how hard each term pulls: sums of the factors of grad log pi
            surrogate_grad_scale=weight_per_token * pulls.abs().sum(1),
            kl_grad_scale=weight_per_token * kl_coef * (kl_ratio * d).abs().sum(1),
        )
    return loss, info
