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


def oracle_objective(logprobs, old, ref, advantages, mask, weights, eps, beta):
    total = 0.0
    for i in range(len(logprobs)):
        tokens = [t for t in range(logprobs.shape[1]) if mask[i, t]]
        value = 0.0
        for t in tokens:
            r, a = math.exp(logprobs[i, t] - old[i, t]), float(advantages[i, t])
            term = min(r * a, min(max(r, 1 - eps), 1 + eps) * a)
            if a < 0:
                term = max(term, grpo.DUAL_CLIP * a)
            d = float(ref[i, t] - logprobs[i, t])
            value += term - beta * (math.exp(d) - d - 1)
        total += float(weights[i]) * value / len(tokens)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_slow_loop(seed):
    case = random_case(seed)
    loss, info = grpo_loss(*case, clip_eps=0.2, kl_coef=0.1)
    assert loss.item() == pytest.approx(-oracle_objective(*case, 0.2, 0.1), rel=1e-4)
    assert (info["kl"] >= 0).all()


def test_gradient_equals_finite_differences():
    case = [x.double() if x.is_floating_point() else x for x in random_case(3, n=3, t=4)]
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


def one_token(log_ratio, advantage, kl_coef=0.0, ref=0.0, clip_eps=0.2, kl_ratio=False):
    logprobs = torch.tensor([[-1.0 + log_ratio]], requires_grad=True)
    old, reference = torch.tensor([[-1.0]]), torch.tensor([[-1.0 + log_ratio + ref]])
    loss, info = grpo_loss(
        logprobs,
        old,
        reference,
        torch.tensor([[advantage]]),
        torch.ones(1, 1, dtype=torch.bool),
        torch.ones(1),
        clip_eps,
        kl_coef,
        kl_ratio,
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


def test_dual_clip_and_log_ratio_clamp():
    loss, grad, info = one_token(5.0, -1.0)  # ratio 148
    assert info["clip_frac"] == 1
    assert loss == pytest.approx(grpo.DUAL_CLIP) and grad == 0
    loss, grad, info = one_token(1000.0, -1.0)  # exp would be inf
    assert math.isfinite(loss) and math.isfinite(grad) and math.isfinite(info["ratio_max"].item())


def test_kl_is_k3_and_not_shaped():
    d = 0.3
    loss, grad, info = one_token(0.0, 0.0, kl_coef=0.5, ref=d)
    assert info["kl"].item() == pytest.approx(math.exp(d) - d - 1, rel=1e-5)
    assert loss == pytest.approx(0.5 * (math.exp(d) - d - 1), rel=1e-5)
    assert grad == pytest.approx(0.5 * (1 - math.exp(d)), rel=1e-4)
    case = list(random_case(1))
    _, plain = grpo_loss(*case, clip_eps=0.2, kl_coef=0.1)
    case[3] = case[3] * 7  # whatever TAS does to the advantages
    torch.testing.assert_close(grpo_loss(*case, clip_eps=0.2, kl_coef=0.1)[1]["kl"], plain["kl"])


def test_kl_of_a_token_that_the_policy_has_given_up():
    """Sampled at b = exp(-1), reference as b, policy exp(-5) of it: k3's slope is exp(5) - 1."""
    plain = one_token(-5.0, 0.0, kl_coef=1.0, ref=5.0)
    assert plain[1] == pytest.approx(1 - math.exp(5), rel=1e-4)  # -147
    ratio = math.exp(-5)
    weighed = one_token(-5.0, 0.0, kl_coef=1.0, ref=5.0, kl_ratio=True)
    assert weighed[0] == pytest.approx(ratio * (math.exp(5) - 6), rel=1e-4)
    assert weighed[1] == pytest.approx(ratio - 1, rel=1e-4)  # never beyond pi_ref / b
    fresh = [one_token(0.0, 0.0, kl_coef=1.0, ref=0.3, kl_ratio=flag)[:2] for flag in (True, False)]
    assert fresh[0] == fresh[1]  # r = 1
    far = one_token(3.0, 0.0, kl_coef=1.0, ref=-3.0, kl_ratio=True)  # r = 20 counts as 3
    assert far[1] == pytest.approx(grpo.DUAL_CLIP * (1 - math.exp(-3)), rel=1e-4)


def test_nothing_off_the_mask_matters():
    case = [x.clone() for x in random_case(2)]
    case[0].requires_grad_()
    loss, _ = grpo_loss(*case, clip_eps=0.2, kl_coef=0.1)
    (grad,) = torch.autograd.grad(loss, case[0])
    assert (grad[~case[4]] == 0).all() and (grad[case[4]] != 0).any()
    wild = [x.detach().clone() for x in case]
    for x in wild[:4]:
        x[~wild[4]] = 50.0
    torch.testing.assert_close(grpo_loss(*wild, clip_eps=0.2, kl_coef=0.1)[0], loss.detach())
    wider = [
        torch.nn.functional.pad(x.detach(), (0, 5)) if x.ndim == 2 else x for x in case
    ]  # more padding
    torch.testing.assert_close(grpo_loss(*wider, clip_eps=0.2, kl_coef=0.1)[0], loss.detach())


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
    loss, _ = grpo_loss(logprobs, old, ref, advantages, mask, weights, TRL["eps"], TRL["beta"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(logprobs.grad, torch.tensor(case["grad"]), atol=1e-6, rtol=1e-5)
