"""
The objective: advantages, loss and gradients, by hand, by a slow loop, by finite differences.

    python -m pytest tests/test_grpo.py
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo
from grpo import group_advantages, grpo_loss, replay_advantages

# ---- advantages: by hand


def test_group_advantages_by_hand():
    a = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]))  # mean .5, std sqrt(1/3)
    torch.testing.assert_close(
        a, torch.tensor([1, -1, -1, 1]) * 0.5 / (math.sqrt(1 / 3) + grpo.STD_EPS)
    )


@pytest.mark.parametrize("group", [[0.7], [0.3, 0.3, 0.3], [0.0, 0.0], [0.6] * 8, [0.2] * 8])
def test_no_spread_no_advantage(group):
    assert (group_advantages(torch.tensor(group)) == 0).all()


def test_replay_advantages_by_hand():
    rewards, means = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.25, 0.25, 0.5])
    torch.testing.assert_close(
        replay_advantages(rewards, means), torch.tensor([0.75, -0.25, 0.0]) / 0.5
    )  # std .5


def test_sigma_off_is_of_the_step_not_of_one_sample():
    """Defect 3 of the authors' trainer: at micro-batch 1 its sigma_off was 1."""
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    together = replay_advantages(rewards, torch.full((4,), 0.5))
    assert together.std() > 0.9
    one = replay_advantages(rewards[:1], torch.tensor([0.5]))  # nothing to measure: the floor
    torch.testing.assert_close(one, torch.tensor([0.5 / grpo.SIGMA_FLOOR]))
    equal = replay_advantages(torch.full((4,), 0.5), torch.full((4,), 0.45))
    assert (equal <= 0.5 + 1e-6).all()  # nearly equal rewards do not explode
    assert replay_advantages(torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_layout_mistakes_are_errors():
    with pytest.raises(AssertionError):
        group_advantages(torch.zeros(2, 4))
    with pytest.raises(AssertionError):
        replay_advantages(torch.zeros(4), torch.zeros(4, 1))


# ---- loss: by a slow loop written from the equation


def random_case(seed, n=6, t=9):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (n,), generator=g)
    lengths[0] = 1
    mask = torch.arange(t) < lengths[:, None]
    old = -torch.rand(n, t, generator=g) * 3
    logprobs = (old + 0.5 * torch.randn(n, t, generator=g)) * mask
    ref = old + 0.3 * torch.randn(n, t, generator=g)
    advantages = torch.randn(n, t, generator=g)
    weights = torch.rand(n, generator=g)
    return logprobs, old, ref, advantages, mask, weights


def oracle_objective(logprobs, old, ref, advantages, mask, weights, eps, beta, at=None):
    """at: log-probs at which the mean of a completion's log-ratios is taken, and held fixed [U22]."""
    total = 0.0
    for i in range(len(logprobs)):
        tokens = [t for t in range(logprobs.shape[1]) if mask[i, t]]
        value = 0.0
        for t in tokens:
            r, a = math.exp(logprobs[i, t] - old[i, t]), float(advantages[i, t])
            s = r
            if at is not None:
                mean = sum(float(at[i, u] - old[i, u]) for u in tokens) / len(tokens)
                s = math.exp(mean + float(logprobs[i, t] - at[i, t]))
            term = min(s * a, min(max(s, 1 - eps), 1 + eps) * a)
            if a < 0:
                term = max(term, grpo.DUAL_CLIP * a)
            d = float(ref[i, t] - logprobs[i, t])
            value += term - beta * min(r, grpo.KL_RATIO_MAX) * (math.exp(d) - d - 1)
        total += float(weights[i]) * value / len(tokens)
    return total


@pytest.mark.parametrize("sequence_ratio", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_slow_loop(seed, sequence_ratio):
    case = random_case(seed)
    loss, info = grpo_loss(*case, clip_eps=0.2, kl_coef=0.1, sequence_ratio=sequence_ratio)
    oracle = oracle_objective(*case, 0.2, 0.1, at=case[0] if sequence_ratio else None)
    assert loss.item() == pytest.approx(-oracle, rel=1e-4)
    assert (info["kl"] >= -1e-6).all()  # of tokens it is never negative but for rounding


@pytest.mark.parametrize("seed", range(5))
def test_gradient_of_one_ratio_equals_finite_differences(seed):
    case = [x.double() if x.is_floating_point() else x for x in random_case(seed, n=4, t=4)]
    case[1] = torch.where(
        case[0] - case[1] > 1, case[0] - 1, case[1]
    )  # else see the truncation's test
    logprobs = case[0].requires_grad_()
    loss, info = grpo_loss(logprobs, *case[1:], clip_eps=0.2, kl_coef=0.1, sequence_ratio=True)
    (grad,) = torch.autograd.grad(loss, logprobs)
    h, at = 1e-6, logprobs.detach()
    for i, t in np.ndindex(*at.shape):
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved[i, t] += sign * h
            ends.append(-oracle_objective(moved, *case[1:], 0.2, 0.1, at=at))
        assert grad[i, t].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=1e-5)


def test_gradient_equals_finite_differences():
    case = [x.double() if x.is_floating_point() else x for x in random_case(3, n=3, t=4)]
    assert (
        (case[0] - case[1]) * case[4]
    ).exp().max() < grpo.DUAL_CLIP  # else see the truncation's test
    logprobs = case[0].requires_grad_()
    loss, _ = grpo_loss(logprobs, *case[1:], clip_eps=0.2, kl_coef=0.1)
    (grad,) = torch.autograd.grad(loss, logprobs)
    h = 1e-6
    for i, t in np.ndindex(*logprobs.shape):
        ends = []
        for sign in (1, -1):
            moved = logprobs.detach().clone()
            moved[i, t] += sign * h
            ends.append(grpo_loss(moved, *case[1:], clip_eps=0.2, kl_coef=0.1)[0].item())
        assert grad[i, t].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=1e-5)


def one_token(log_ratio, advantage, kl_coef=0.0, d=0.0, clip_eps=0.2, sequence_ratio=False):
    """A token of b = exp(-1), pi = b exp(log_ratio), pi_ref = pi exp(d) -> loss, its slope, info."""
    logprobs = torch.tensor([[-1.0 + log_ratio]], requires_grad=True)
    old, ref = torch.tensor([[-1.0]]), torch.tensor([[-1.0 + log_ratio + d]])
    loss, info = grpo_loss(
        logprobs=logprobs,
        old_logprobs=old,
        ref_logprobs=ref,
        token_advantages=torch.tensor([[advantage]]),
        completion_mask=torch.ones(1, 1, dtype=torch.bool),
        weights=torch.ones(1),
        clip_eps=clip_eps,
        kl_coef=kl_coef,
        sequence_ratio=sequence_ratio,
    )
    loss.backward()
    return loss.item(), logprobs.grad.item(), info


def test_gradient_facts():
    loss, grad, _ = one_token(0.0, 2.0)
    assert loss == -2 and grad == pytest.approx(
        -2
    )  # ratio 1: the loss says nothing, the gradient all
    assert one_token(0.0, -2.0)[1] == pytest.approx(2)  # the sign follows the advantage
    assert one_token(0.5, 1.0)[1] == 0 and one_token(-0.5, -1.0)[1] == 0  # beyond the clip
    assert one_token(-0.5, 1.0)[1] != 0 and one_token(0.5, -1.0)[1] != 0  # the way back stays open
    assert one_token(0.1, 1.0)[2]["clip_frac"] == 0 and one_token(0.5, 1.0)[2]["clip_frac"] == 1


@pytest.mark.parametrize("sequence_ratio", [False, True])
def test_dual_clip_and_log_ratio_clamp(sequence_ratio):
    loss, grad, info = one_token(5.0, -1.0, sequence_ratio=sequence_ratio)  # ratio 148
    assert info["clip_frac"] == 1
    assert loss == pytest.approx(grpo.DUAL_CLIP) and grad == 0
    loss, grad, info = one_token(1000.0, -1.0, sequence_ratio=sequence_ratio)  # exp would be inf
    assert math.isfinite(loss) and math.isfinite(grad) and math.isfinite(info["ratio_max"].item())


def test_kl_is_not_shaped():
    case = list(random_case(1))
    _, plain = grpo_loss(*case, clip_eps=0.2, kl_coef=0.1)
    case[3] = case[3] * 7  # whatever TAS does to the advantages
    torch.testing.assert_close(grpo_loss(*case, clip_eps=0.2, kl_coef=0.1)[1]["kl"], plain["kl"])


# ---- one ratio a completion [U22]


def test_one_ratio_by_hand():
    """Log-ratios .3 and -.1: each token's ratio is exp(.1), within the clip; a pad takes no part."""
    old = torch.tensor([[-1.0, -2.0, 7.0]])
    logprobs = (old + torch.tensor([[0.3, -0.1, 5.0]])).requires_grad_()
    case = dict(
        logprobs=logprobs,
        old_logprobs=old,
        ref_logprobs=None,
        token_advantages=torch.tensor([[2.0, 4.0, 9.0]]),
        completion_mask=torch.tensor([[True, True, False]]),
        weights=torch.ones(1),
        clip_eps=0.2,
        kl_coef=0.0,
    )
    loss, info = grpo_loss(**case, sequence_ratio=True)
    ratio = math.exp(0.1)
    assert loss.item() == pytest.approx(-3 * ratio)
    assert info["ratio_max"].item() == pytest.approx(ratio) and info["clip_frac"] == 0
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, torch.tensor([[-ratio, -2 * ratio, 0.0]]))
    assert info["surrogate_grad_scale"].item() == pytest.approx(3 * ratio)
    # token by token, the first is clipped: exp(.3) > 1.2
    loss, info = grpo_loss(**case)
    assert (
        loss.item() == pytest.approx(-(2 * 1.2 + 4 * math.exp(-0.1)) / 2)
        and info["clip_frac"] == 0.5
    )
    # the numbers of the tokens themselves stay
    again = grpo_loss(**case, sequence_ratio=True)[1]
    assert all(again[name] == info[name] for name in ("logprob_gap_max", "log_ratio", "num_tokens"))


@pytest.mark.parametrize(
    "first, advantage, ratio",
    [
        (0.7, 1.0, 0),
        (0.7, -1.0, math.exp(0.3)),  # mean .3 > log 1.2, though the second token is within
        (-0.7, 1.0, math.exp(-0.4)),
        (-0.7, -1.0, 0),  # mean -.4 < log .8
        (3.0, -1.0, 0),
        (2.1, -1.0, math.exp(1.0)),  # mean 1.45 > log 3, and 1: the dual clip
    ],
)
def test_one_ratio_is_clipped_as_one(first, advantage, ratio):
    """Log-ratios `first` and -.1, A of both tokens: all of them pull, with one ratio, or none does."""
    old, slope = torch.tensor([[-1.0, -2.0]]), -advantage * ratio / 2
    logprobs = (old + torch.tensor([[first, -0.1]])).requires_grad_()
    rest = (torch.full((1, 2), advantage), torch.ones(1, 2), torch.ones(1), 0.2, 0.0)
    loss, info = grpo_loss(logprobs, old, None, *rest, sequence_ratio=True)
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, torch.full((1, 2), slope))
    assert info["clip_frac"] == (ratio == 0)
    assert info["surrogate_grad_scale"].item() == pytest.approx(ratio)


def test_one_ratio_of_equal_advantages_has_the_gradient_of_gspo():
    """There the ratio itself is differentiated: s = exp(mean_t log r_t), J = min(s A, clip(s) A)."""
    case = list(random_case(5))
    logprobs, old, mask, weights = case[0].requires_grad_(), case[1], case[4], case[5]
    advantage = torch.randn(len(mask), generator=torch.Generator().manual_seed(0))
    s = (((logprobs - old) * mask).sum(1) / mask.sum(1)).exp()
    assert (s < grpo.DUAL_CLIP).all()
    gspo = -(weights * torch.min(s * advantage, s.clamp(0.8, 1.2) * advantage)).sum()
    rest = (advantage[:, None].expand_as(old), mask, weights, 0.2, 0.0)
    ours, _ = grpo_loss(logprobs, old, None, *rest, sequence_ratio=True)
    torch.testing.assert_close(ours, gspo)
    grads = (torch.autograd.grad(loss, logprobs)[0] for loss in (ours, gspo))
    torch.testing.assert_close(*grads)


def test_one_ratio_leaves_the_kl_as_it_was():
    case = list(random_case(1))
    case[3] = torch.zeros_like(case[3])  # no surrogate
    losses = []
    for sequence_ratio in (False, True):
        case[0] = case[0].detach().requires_grad_()
        loss, info = grpo_loss(*case, clip_eps=0.2, kl_coef=0.7, sequence_ratio=sequence_ratio)
        losses.append(
            [loss.detach(), *torch.autograd.grad(loss, case[0]), info["kl"], info["kl_grad_scale"]]
        )
    torch.testing.assert_close(*losses, rtol=0, atol=0)


# ---- the KL: exact on samples of b [KL] [U20]


def test_kl_by_hand():
    """pi = b / 2, pi_ref = 3 pi: r k3 = (3 - log 3 - 1) / 2, its slope r log(pi / pi_ref) = -log(3) / 2."""
    loss, slope, info = one_token(-math.log(2), 0.0, kl_coef=0.5, d=math.log(3))
    assert info["kl"].item() == pytest.approx((2 - math.log(3)) / 2, rel=1e-5)
    assert loss == pytest.approx(0.5 * (2 - math.log(3)) / 2, rel=1e-5)
    assert slope == pytest.approx(-0.5 * math.log(3) / 2, rel=1e-5)


def test_kl_of_a_fresh_token():
    """r = 1: the value is k3; the slope is log(pi / pi_ref), where k3's own is 1 - pi_ref / pi."""
    loss, slope, _ = one_token(0.0, 0.0, kl_coef=1.0, d=0.3)
    assert loss == pytest.approx(math.exp(0.3) - 0.3 - 1, rel=1e-4)
    assert slope == pytest.approx(-0.3, rel=1e-5)


def test_kl_under_samples_of_b_is_that_of_pi():
    """By enumeration of a vocabulary: E_b of value and gradient are KL(pi || ref) and its gradient."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=g, dtype=torch.float64).requires_grad_()
    b, ref = (torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    b = 0.5 * b + 0.5 * logits.detach().log_softmax(0)  # near enough that no ratio is truncated
    b = b.log_softmax(0)
    logprobs = logits.log_softmax(0)
    assert (logprobs - b).exp().max() < grpo.KL_RATIO_MAX
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    (exact_grad,) = torch.autograd.grad(exact, logits, retain_graph=True)
    # a completion of one token for every word, weighed by how often b writes it
    column = lambda x: x[:, None]  # noqa: E731
    nothing = torch.zeros(7, 1, dtype=torch.float64)
    loss, _ = grpo_loss(
        column(logprobs),
        column(b),
        column(ref),
        nothing,
        torch.ones(7, 1, dtype=torch.bool),
        b.exp(),
        clip_eps=0.2,
        kl_coef=1.0,
    )
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(grad, exact_grad)
    # the plain k3 of before: neither
    d = ref - logprobs
    (k3_grad,) = torch.autograd.grad((b.exp() * (d.exp() - d - 1)).sum(), logits)
    assert (k3_grad - exact_grad).abs().max() > 0.1


def test_kl_gradient_vanishes_where_the_policy_gives_a_token_up():
    """Whatever pi, b and pi_ref of the token: no pull beyond 3 |log(pi / ref)|; none as pi -> 0."""
    for log_ratio in (-2.0, -8.0, -15.0, -30.0, -80.0):
        _, slope, info = one_token(log_ratio, 0.0, kl_coef=1.0, d=-log_ratio)  # the reference is b
        assert slope == pytest.approx(math.exp(log_ratio) * log_ratio, abs=2e-6)
        assert 0 <= info["kl"].item() <= 1 + 1e-6  # ref / b at the most
    for log_ratio in np.linspace(-60, 25, 35):
        for d in np.linspace(-20, 20, 21):
            loss, slope, _ = one_token(float(log_ratio), 0.0, kl_coef=1.0, d=float(d))
            assert math.isfinite(loss) and math.isfinite(slope)
            bound = min(math.exp(min(log_ratio, 20)), grpo.KL_RATIO_MAX) * max(abs(d), 1)
            assert abs(slope) <= bound + 2e-5 * max(1, math.exp(min(log_ratio + d, 20)))


def test_kl_counts_a_token_that_became_likely_at_most_three_times():
    loss, slope, _ = one_token(3.0, 0.0, kl_coef=1.0, d=-3.0)  # r = 20 counts as 3
    assert loss == pytest.approx(grpo.KL_RATIO_MAX * (math.exp(-3) + 3 - 1), rel=1e-4)
    assert slope == pytest.approx(grpo.KL_RATIO_MAX * 3, rel=1e-4)


def test_grad_scales_are_the_factors_of_grad_logprob():
    loss, slope, info = one_token(-0.1, 2.0, kl_coef=0.0)
    assert (
        info["surrogate_grad_scale"].item()
        == pytest.approx(-slope)
        == pytest.approx(2 * math.exp(-0.1))
    )
    for log_ratio, d in ((-1.0, 0.4), (3.0, 0.4)):  # the second counts with a ratio of 3
        _, slope, info = one_token(log_ratio, 0.0, kl_coef=0.7, d=d)
        assert info["kl_grad_scale"].item() == pytest.approx(-slope, rel=1e-4)


@pytest.mark.parametrize("sequence_ratio", [False, True])
def test_nothing_off_the_mask_matters(sequence_ratio):
    case = [x.clone() for x in random_case(2)]
    settings = dict(clip_eps=0.2, kl_coef=0.1, sequence_ratio=sequence_ratio)
    case[0].requires_grad_()
    loss, info = grpo_loss(*case, **settings)
    (grad,) = torch.autograd.grad(loss, case[0])
    assert (grad[~case[4]] == 0).all() and (grad[case[4]] != 0).any()
    wild = [x.detach().clone() for x in case]
    for off in (50.0, -math.inf, math.nan):
        for x in wild[:4]:
            x[~wild[4]] = off
        wild[0].requires_grad_()
        again, same_info = grpo_loss(*wild, **settings)
        torch.testing.assert_close(again, loss)
        torch.testing.assert_close(same_info, info)
        torch.testing.assert_close(torch.autograd.grad(again, wild[0])[0], grad)
        wild[0].requires_grad_(False)
    wider = [
        torch.nn.functional.pad(x.detach(), (0, 5)) if x.ndim == 2 else x for x in case
    ]  # more padding
    torch.testing.assert_close(grpo_loss(*wider, **settings)[0], loss.detach())


def test_split_and_order_do_not_change_the_sum():
    case = random_case(4, n=8)
    whole = grpo_loss(*case, clip_eps=0.2, kl_coef=0.1)[0]
    parts = [
        grpo_loss(*(x[s] for x in case), clip_eps=0.2, kl_coef=0.1)[0]
        for s in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(parts), whole)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        grpo_loss(*(x[order] for x in case), clip_eps=0.2, kl_coef=0.1)[0], whole
    )


# ---- a peer: numbers recorded from trl's GRPOTrainer by record_trl.py

TRL = json.loads(Path(__file__).with_name("trl_loss.json").read_text())


@pytest.mark.parametrize("case", TRL["cases"])
def test_loss_and_gradient_equal_trl(case):
    """One value a completion, or one a token; the last two clips of a negative advantage included."""
    assert TRL["delta"] == grpo.DUAL_CLIP
    logprobs, old, ref, advantages, mask = (
        torch.tensor(case[k]) for k in ("logprobs", "old", "ref", "advantages", "mask")
    )
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(logprobs)
    logprobs.requires_grad_()
    weights = torch.full((len(logprobs),), 1 / len(logprobs))  # trl's mean over the batch
    loss, _ = grpo_loss(
        logprobs=logprobs,
        old_logprobs=old,
        ref_logprobs=ref,
        token_advantages=advantages,
        completion_mask=mask,
        weights=weights,
        clip_eps=TRL["eps"],
        kl_coef=case["beta"],
        sequence_ratio=case["level"] == "sequence",
    )
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(logprobs.grad, torch.tensor(case["grad"]), atol=1e-6, rtol=1e-5)


def test_how_far_the_policy_moved_is_told_apart_from_rounding():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]])
    mask = torch.tensor([[True, True, False]])
    _, info = grpo_loss(
        logprobs=logprobs,
        old_logprobs=logprobs + torch.tensor([[0.01, -0.03, 5.0]]),
        ref_logprobs=logprobs + torch.tensor([[0.5, -0.1, 5.0]]),
        token_advantages=torch.ones(1, 3),
        completion_mask=mask,
        weights=torch.ones(1),
        clip_eps=0.2,
        kl_coef=0.1,
        sequence_ratio=False,
    )
    torch.testing.assert_close(info["moved"], torch.tensor([0.3]))
    torch.testing.assert_close(info["logprob_gap_mean"], torch.tensor([0.02]))
