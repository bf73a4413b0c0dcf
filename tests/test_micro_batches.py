"""
Micro-batches: what is packed together, what the reference reads once, and the gradient over them.

    python -m pytest tests/test_micro_batches.py
"""

import pytest
import torch
from conftest import random_completions, toy_prompts

import train_rl
from buffer import Entry
from grpo import group_advantages
from models.loading import load_policy
from models.policy import completion_logprobs
from training import metrics
from training.hint_visits import is_solved
from training.micro_batches import WeightedGroup, add_ref_logprobs, dummy_group, pack

SIZES = [(5, 9, 2), (7, 3), (4, 4, 4, 1)]  # tokens of the completions of three prompts
TAS = dict(shape="parabolic", tas_lambda=0.3, equal_mean=False)


@pytest.fixture(scope="module")
def setup(toy_dir):
    """-> policy, a reference that differs from it, three prompts, a dummy group"""
    prompts, build = toy_prompts(toy_dir)
    policy = load_policy(toy_dir / "model", 0, False)
    reference = load_policy(toy_dir / "model", 0, False).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # else pi = pi_ref, and no KL would show
        for parameter in policy.thinker.lm_head.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy, reference, prompts, dummy_group(build.filler)


def entry_of(prompt_id, ids, born_step, reward=0.0, acc=0.0, hinted=False):
    return Entry(
        prompt_id=prompt_id,
        completion_ids=ids,
        old_logprobs=torch.full((len(ids),), -1.5),
        reward=reward,
        reward_parts={"acc": acc},
        born_step=born_step,
        hinted=hinted,
    )


def entries_of(born_step):
    """-> three groups of entries with rewards 0, 1/3, 2/3, 1"""
    groups = []
    for i, completions in enumerate(random_completions(SIZES)):
        groups.append(
            [entry_of(f"q{i}", ids, born_step, k / 3) for k, ids in enumerate(completions)]
        )
    return groups


def weighted(prompts, groups):
    weighted_groups = []
    for prompt, entries in zip(prompts, groups):
        advantages = group_advantages(torch.tensor([entry.reward for entry in entries]))
        weighted_groups.append(WeightedGroup(prompt, entries, advantages, weight=1 / 9))
    return weighted_groups


def gradient_of(policy, batches, step=3, sequence_ratio=False):
    """-> info of all completions, {name: gradient}"""
    policy.zero_grad()
    infos = train_rl.add_gradient(
        policy,
        batches,
        step,
        temperature=1.0,
        tas=TAS,
        clip_eps=0.2,
        kl_coef=0.1,
        sequence_ratio=sequence_ratio,
    )
    grads = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return metrics.gather_infos(infos), grads


# ---- packing


def test_every_completion_is_in_one_micro_batch(setup):
    _, _, prompts, dummy = setup
    groups = weighted(prompts, entries_of(born_step=3))
    for micro_tokens in (1, 40, 100, 10_000):
        batches = pack(groups, micro_tokens, dummy)
        entries = [entry for batch in batches for entry in batch.entries]
        assert entries == [entry for group in groups for entry in group.entries]
        for batch in batches:
            flat = [ids for completions in batch.completions for ids in completions]
            assert [e.completion_ids.tolist() for e in batch.entries] == [x.tolist() for x in flat]
            assert len(batch.advantages) == len(batch.weights) == len(batch.entries)
    assert len(batches) == 1  # all fit into 10,000 tokens


def test_the_split_does_not_change_the_gradient(setup):
    policy, reference, prompts, dummy = setup
    groups = entries_of(born_step=3)
    gradients = []
    for micro_tokens in (10_000, 12):
        batches = pack(weighted(prompts, groups), micro_tokens, dummy)
        add_ref_logprobs(policy, reference, batches, groups, temperature=1.0)
        gradients.append(gradient_of(policy, batches)[1])
    whole, split = gradients
    assert len(batches) > 3
    for name, gradient in whole.items():
        assert (gradient - split[name]).norm() <= 1e-4 * gradient.norm().clamp(min=1e-6), name


def test_a_rank_without_groups_reads_a_dummy_of_weight_0(setup, monkeypatch):
    policy, _, _, dummy = setup
    monkeypatch.setattr("training.micro_batches.all_gather_object", lambda item: [item, 2])
    batches = pack([], 1000, dummy)
    assert [batch.is_dummy for batch in batches] == [True, True]
    policy.zero_grad()
    infos = train_rl.add_gradient(
        policy, batches, 3, temperature=1.0, tas=TAS, clip_eps=0.2, kl_coef=0.1
    )
    assert infos == []
    assert all(not p.grad.any() for p in policy.parameters() if p.grad is not None)


# ---- the reference


def test_the_reference_reads_a_completion_once(setup, monkeypatch):
    policy, reference, prompts, dummy = setup
    groups = entries_of(born_step=3)
    calls = []

    def spy(who, *rest):
        calls.append(who is reference)
        return completion_logprobs(who, *rest)

    monkeypatch.setattr("training.micro_batches.completion_logprobs", spy)
    batches = pack(weighted(prompts, groups), 4096, dummy)
    add_ref_logprobs(policy, reference, batches, groups, temperature=1.0)
    assert calls == [True]

    # what is stored is what the reference says, for every completion
    ids = [[entry.completion_ids.long() for entry in group] for group in groups]
    with torch.no_grad():
        expected, mask, _ = completion_logprobs(reference, prompts, ids, 1.0)
    stored = [entry.ref_logprobs for group in groups for entry in group]
    assert all(torch.equal(s, row[keep]) for s, row, keep in zip(stored, expected, mask))

    # again, and replayed at a later step: from what is stored, and the same to the bit
    info, grads = gradient_of(policy, batches)
    assert info["kl"].abs().max() > 0
    add_ref_logprobs(policy, reference, batches, groups, temperature=1.0)
    again, same = gradient_of(policy, pack(weighted(prompts, groups), 4096, dummy), step=9)
    assert calls == [True]
    assert torch.equal(info["kl"], again["kl"])
    assert all(torch.equal(grads[name], same[name]) for name in grads)
    assert not again["fresh"].any() and (again["age"] == 6).all()


def test_one_unread_completion_has_all_of_them_read(setup):
    """Ranks must agree on what they read together, so the answer is for the whole call."""
    policy, reference, prompts, dummy = setup
    groups = entries_of(born_step=3)
    batches = pack(weighted(prompts, groups), 4096, dummy)
    add_ref_logprobs(policy, reference, batches, groups, temperature=1.0)
    before = [entry.ref_logprobs for group in groups for entry in group]
    groups[1][0].ref_logprobs = None
    add_ref_logprobs(policy, reference, batches, groups, temperature=1.0)
    after = [entry.ref_logprobs for group in groups for entry in group]
    assert all(torch.equal(one, two) for one, two in zip(before, after))


# ---- ratios and hints


@pytest.mark.parametrize("sequence_ratio", [False, True])
def test_ratio_of_each_token_or_of_the_completion(setup, sequence_ratio):
    """[RATIO] [U22] That of each token, or one of the whole completion."""
    policy, reference, prompts, dummy = setup
    groups = entries_of(born_step=3)
    batches = pack(weighted(prompts, groups), 4096, dummy)
    add_ref_logprobs(policy, reference, batches, groups, temperature=1.0)
    info, _ = gradient_of(policy, batches, step=9, sequence_ratio=sequence_ratio)
    largest = torch.tensor([max(row) for row in info["token_log_ratios"]])
    mean = info["log_ratio"] / info["num_tokens"]
    assert (largest - mean)[info["num_tokens"] > 1].min() > 0.01
    torch.testing.assert_close(info["ratio_max"].log(), mean if sequence_ratio else largest)


def test_is_solved_looks_at_the_last_visit():
    def wrong(step):
        return entry_of("q", torch.ones(2), step, acc=0.5)

    def right(step):
        return entry_of("q", torch.ones(2), step, acc=1.0)

    assert not is_solved([])
    assert not is_solved([wrong(1), wrong(1)])
    assert not is_solved([right(1), right(1), wrong(4), wrong(4)])  # solved a visit ago
    assert is_solved([wrong(1), wrong(4), right(4)])
