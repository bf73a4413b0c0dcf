"""
The gradient of a step: what is computed once, what a rank tells the others, who is solved.

    python -m pytest tests/test_gradient.py
"""

from argparse import Namespace

import pytest
import torch
from conftest import random_completions, toy_prompts

from buffer import Entry
from models.loading import load_policy
from models.policy import completion_logprobs
from rl.gradient import concat_infos, fresh_gradient, replayed_gradient
from rl.hint_visits import is_solved

ARGS = Namespace(
    algo="avatar",
    temperature=1.0,
    micro_tokens=4096,
    kl_coef=0.1,
    clip_eps=0.2,
    tas_shape="parabolic",
    tas_lambda=0.3,
    off_policy_coef=0.6,
)


@pytest.fixture(scope="module")
def setup(toy_dir):
    prompts, build = toy_prompts(toy_dir)
    policy = load_policy(toy_dir / "model", 0, False)
    reference = load_policy(toy_dir / "model", 0, False).requires_grad_(False)
    with torch.no_grad():  # else pi = pi_ref, and no KL would show
        for parameter in policy.thinker.lm_head.parameters():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0)
            )
    return policy, reference, prompts, (build.filler, [entry_of("", build.filler.input_ids, 0)])


def entry_of(q, ids, born_step, reward=0.0, acc=0.0, hinted=False):
    return Entry(q, ids, torch.full((len(ids),), -1.5), reward, {"acc": acc}, born_step, hinted)


def groups_of(prompts, born_step):
    sizes, made = [(5, 9, 2), (7, 3), (4, 4, 4, 1)], []
    for q, group in enumerate(random_completions(sizes)):
        made.append([entry_of(f"q{q}", ids, born_step, i / 3) for i, ids in enumerate(group)])
    return made


def gradient_of(policy, call):
    policy.zero_grad()
    infos, _ = call()
    return concat_infos(infos), {
        n: p.grad for n, p in policy.named_parameters() if p.grad is not None
    }


def test_the_reference_reads_a_completion_once(setup, monkeypatch):
    policy, reference, prompts, filler = setup
    made, calls = groups_of(prompts, born_step=3), []
    read = completion_logprobs
    spy = lambda who, *rest: calls.append(who is reference) or read(who, *rest)  # noqa: E731
    monkeypatch.setattr("rl.gradient.completion_logprobs", spy)
    fresh = lambda: fresh_gradient(policy, reference, prompts, made, filler, 3, ARGS)  # noqa: E731
    first, grads = gradient_of(policy, fresh)
    assert sum(calls) == 1 and first["kl"].abs().max() > 0
    with torch.no_grad():  # what is stored is what the reference says, for every completion
        ids = [[e.completion_ids.long() for e in group] for group in made]
        expected, mask, _ = read(reference, prompts, ids, 1.0)
    stored = [e.ref_logprobs for group in made for e in group]
    assert all(torch.equal(s, row[keep]) for s, row, keep in zip(stored, expected, mask))
    # again, and replayed: from what is stored, and the same to the bit
    again, same = gradient_of(policy, fresh)
    assert sum(calls) == 1
    assert all(torch.equal(first[k], again[k]) for k in first if torch.is_tensor(first[k]))
    assert all(torch.equal(grads[name], same[name]) for name in grads)
    drawn, mean = dict(enumerate(prompts)), lambda q: 0.4
    given = (policy, reference, drawn, made, mean, filler, 9, ARGS)
    replayed, _ = gradient_of(policy, lambda: replayed_gradient(*given))
    assert sum(calls) == 1 and not replayed["fresh"].any() and (replayed["age"] == 6).all()


@pytest.mark.parametrize("algo", ["avatar", "avatar-gspo", "grpo"])
def test_whose_ratio_counts(setup, algo):
    """[RATIO] [U22] That of each token, or one of the whole completion."""
    policy, reference, prompts, filler = setup
    drawn, args = dict(enumerate(prompts)), Namespace(**vars(ARGS) | dict(algo=algo))
    given = (
        policy,
        reference,
        drawn,
        groups_of(prompts, born_step=3),
        lambda q: 0.4,
        filler,
        9,
        args,
    )
    info, _ = gradient_of(policy, lambda: replayed_gradient(*given))
    largest = torch.tensor([max(row) for row in info["log_ratios"]])
    mean = info["log_ratio"] / info["num_tokens"]
    assert (largest - mean)[info["num_tokens"] > 1].min() > 0.01
    torch.testing.assert_close(info["ratio_max"].log(), mean if algo == "avatar-gspo" else largest)


def test_one_unknown_completion_has_all_of_them_read(setup):
    """Ranks must agree on what they read together, so the answer is for the whole call."""
    policy, reference, prompts, filler = setup
    made = groups_of(prompts, born_step=3)
    whole = lambda: fresh_gradient(policy, reference, prompts, made, filler, 3, ARGS)  # noqa: E731
    before, _ = gradient_of(policy, whole)
    made[1][0].ref_logprobs = None
    after, _ = gradient_of(policy, whole)
    assert torch.equal(before["kl"], after["kl"]) and made[1][0].ref_logprobs is not None


def test_who_is_solved():
    wrong, right = (
        (lambda s: entry_of("q", torch.ones(2), s, acc=0.5)),
        (lambda s: entry_of("q", torch.ones(2), s, acc=1.0)),
    )
    assert not is_solved([]) and not is_solved([wrong(1), wrong(1)])
    assert not is_solved([right(1), right(1), wrong(4), wrong(4)])  # a visit ago
    assert is_solved([wrong(1), wrong(4), right(4)])
