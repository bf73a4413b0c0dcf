"""
Stratified replay buffer: [R.mean], [TIER], [DRAW], eviction and state.

    python -m pytest tests/test_buffer.py
"""

import io
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from buffer import Entry, ReplayBuffer

# ---- helpers


def entry(prompt_id, reward, born_step=0, hinted=False, length=3, parts=None):
    """A completion of `length` tokens; its first id is a serial number, to tell entries apart."""
    entry.serial = getattr(entry, "serial", 0) + 1
    ids = [entry.serial] + [7] * (length - 1)
    return Entry(
        prompt_id, ids, torch.full((length,), -0.5), reward, parts or {}, born_step, hinted
    )


def filled(num_prompts=20, per_prompt=4, capacity=10_000):
    """Prompts q0.. with R̄ = i / num_prompts, each with stored rewards on both sides of it."""
    b = ReplayBuffer(capacity, 20)
    for i in range(num_prompts):
        b.observe(f"q{i}", [i / num_prompts])
        rewards = [i / num_prompts + (0.5 if j % 2 else -0.5) for j in range(per_prompt)]
        b.add([entry(f"q{i}", reward) for reward in rewards])
    return b


def rewards_of(group):
    return [e.reward for e in group]


def serial(e):
    return e.completion_ids[0].item()


def stored(b):
    return [e for q in sorted(b._stored) for e in b.entries_of(q, 10**9)]


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- mean reward, by hand


def test_mean_reward_is_the_plain_mean_of_the_last_20():
    b = ReplayBuffer(100, 20)
    b.observe("q", [1.0] * 5)
    assert b.mean_reward("q") == 1.0
    b.observe("q", [0.0] * 15)
    assert b.mean_reward("q") == 0.25  # 5 of 20: no EMA, no recency weight
    b.observe("q", [0.0] * 4)
    assert b.mean_reward("q") == 0.05  # four of the ones have left the window
    b.observe("q", [0.0])
    assert b.mean_reward("q") == 0.0


def test_mean_reward_before_any_reward_is_none():
    b = ReplayBuffer(100, 20)
    b.observe("q", [])
    assert b.mean_reward("q") is None
    assert b.tiers() == {}


def test_observe_takes_tensors_and_more_rewards_than_the_window():
    b = ReplayBuffer(100, 3)
    b.observe("q", torch.tensor([9.0, 1.0, 2.0, 3.0]))
    assert b.mean_reward("q") == 2.0


def test_stored_and_replayed_rewards_do_not_move_the_mean():
    b = filled()
    before = {q: b.mean_reward(q) for q in b.tiers()}
    b.add([entry("q3", 1.0, hinted=True), entry("q3", 1.0)])
    b.draw(5, 4, 1, rng())
    assert {q: b.mean_reward(q) for q in b.tiers()} == before


# ---- tiers, by hand


def test_twenty_prompts_are_cut_8_7_5():
    b = ReplayBuffer(100, 20)
    for i in random.Random(0).sample(range(20), 20):
        b.observe(f"q{i}", [i / 20])
    tiers = b.tiers()
    assert [tiers[f"q{i}"] for i in range(20)] == ["hard"] * 8 + ["medium"] * 7 + ["easy"] * 5


def test_defect_4_ties_do_not_empty_or_flood_a_tier():
    b = ReplayBuffer(100, 20)
    for i in range(20):
        b.observe(f"q{i}", [0.5])
    assert Counter(b.tiers().values()) == {"hard": 8, "medium": 7, "easy": 5}
    # the order of first observation decides, and observing again does not reshuffle it
    assert [b.tier(f"q{i}") for i in range(20)] == ["hard"] * 8 + ["medium"] * 7 + ["easy"] * 5
    b.observe("q0", [0.5])
    assert b.tier("q0") == "hard"


def test_means_that_differ_by_float_noise_are_ties():
    b = ReplayBuffer(100, 20)
    b.observe("first", [0.1 + 0.2])
    b.observe("second", [0.3])  # smaller by 5e-17 only
    assert b.tiers() == {"first": "hard", "second": "medium"}


@pytest.mark.parametrize(
    "n, hard, medium, easy",
    [(1, 0, 1, 0), (2, 1, 1, 0), (3, 1, 1, 1), (4, 2, 1, 1), (5, 2, 2, 1), (100, 40, 35, 25)],
)
def test_few_prompts(n, hard, medium, easy):
    b = ReplayBuffer(100, 20)
    for i in range(n):
        b.observe(f"q{i}", [float(i)])
    counts = Counter(b.tiers().values())
    assert (counts["hard"], counts["medium"], counts["easy"]) == (hard, medium, easy)


def test_a_prompt_moves_up_as_it_improves_and_down_as_it_forgets():
    b = filled()
    assert b.tier("q0") == "hard"
    b.observe("q0", [1.0] * 20)
    assert (b.tier("q0"), b.tier("q8")) == ("easy", "hard")
    b.observe("q0", [-1.0] * 20)
    assert (b.tier("q0"), b.tier("q8")) == ("hard", "medium")


def test_stored_entries_move_with_their_prompt():
    b = filled()
    before = b.stats(1)
    b.observe("q0", [1.0] * 20)
    assert b.stats(1)["buffer/frac_hard"] == before["buffer/frac_hard"]  # q8 took its place
    assert len(b.entries_of("q0", 1)) == 4
    b.draw(20, 4, 1, rng())
    assert b.tier("q0") == "easy"


def test_a_prompt_never_observed_is_hard_and_never_drawn():
    b = ReplayBuffer(100, 20)
    b.add([entry("hinted only", 1.0, hinted=True) for _ in range(8)])
    assert b.tier("hinted only") == b.tier("unknown") == "hard"
    assert b.draw(4, 4, 1, rng()) == []


# ---- eviction


def test_oldest_goes_first_by_birth_then_by_arrival():
    b = ReplayBuffer(20, 20)  # one prompt: medium, room for 7
    b.observe("q", [0.0])
    entries = [entry("q", 0.0, born_step=s) for s in (5, 1, 1, 2, 9, 9, 9, 9, 9)]
    b.add(entries[:7])
    assert len(b) == 7
    b.add(entries[7:8])
    assert entries[1] not in b.entries_of("q", 99)  # born at 1, arrived first
    b.add(entries[8:])
    assert b.entries_of("q", 99) == [entries[0]] + entries[3:]


def test_shares_of_the_capacity_are_respected():
    b = filled(num_prompts=20, per_prompt=0, capacity=100)
    for step in range(30):
        b.add([entry(f"q{i}", 0.0, step) for i in range(20) for _ in range(4)])
        assert len(b) <= 100
    s = b.stats(30)
    assert s["buffer/size"] == 100
    assert (s["buffer/frac_hard"], s["buffer/frac_medium"], s["buffer/frac_easy"]) == (
        0.4,
        0.35,
        0.25,
    )
    assert s["buffer/staleness_mean"] < 3  # the newest survive


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 10, 11, 99, 10_000])
def test_tier_capacities_sum_to_the_capacity(capacity):
    b = ReplayBuffer(capacity, 20)
    assert sum(b.tier_capacity.values()) == capacity and min(b.tier_capacity.values()) >= 0


def test_a_rare_hard_success_survives_a_flood_of_failures():
    b = filled(num_prompts=5, per_prompt=0, capacity=50)  # q0 and q1 are hard, room for 20
    success = entry("q0", 1.0, born_step=0)
    b.add([success])
    for step in range(1, 200):
        b.observe("q0", [0.0] * 4)
        b.add([entry("q0", 0.0, step) for _ in range(4)])
        b.add([entry("q1", 0.0, step) for _ in range(4)])
    assert b.tier("q0") == "hard" and len(b) == 20
    assert success in b.entries_of("q0", 200)
    b.forget("q1")
    (group,) = b.draw(1, 4, 200, rng())
    assert success in group


def test_of_equal_successes_the_newest_is_kept():
    b = filled(num_prompts=5, per_prompt=0, capacity=50)
    old, new = entry("q0", 1.0, 0), entry("q0", 1.0, 1)
    b.add([new, old])  # by birth, not by arrival
    b.add([entry("q0", 0.0, 2) for _ in range(40)])
    assert new in b.entries_of("q0", 9) and old not in b.entries_of("q0", 9)


def test_hinted_and_plain_successes_are_kept_apart():
    """A hint makes successes common: they must not displace the plain one that is rare."""
    b = filled(num_prompts=5, per_prompt=0, capacity=50)
    plain, hinted = entry("q0", 0.8, 0), entry("q0", 1.0, 0, hinted=True)
    b.add([plain, hinted])
    b.add([entry("q0", 0.0, 1) for _ in range(40)])
    assert {plain, hinted} <= set(b.entries_of("q0", 9))


def test_a_success_of_another_tier_is_not_spared():
    b = filled(num_prompts=5, per_prompt=0, capacity=20)  # q4 is easy, room for 5
    b.add([entry("q4", 9.0, 0)])
    b.add([entry("q4", 0.0, 1) for _ in range(5)])
    assert max(rewards_of(b.entries_of("q4", 9))) == 0.0


def test_the_best_of_a_prompt_without_a_success_is_not_spared():
    b = filled(num_prompts=5, per_prompt=0, capacity=50)
    b.observe("q0", [0.5] * 20)
    b.observe("q4", [0.1] * 20)  # q0 stays out of Hard, q1 and q4 are in
    b.observe("q1", [0.2] * 20)
    best = entry("q1", 0.2, 0)
    b.add([best])
    b.add([entry("q4", 0.0, 1) for _ in range(20)])
    assert b.tier("q1") == "hard" and best not in b.entries_of("q1", 9)
    assert b.stats(9)["buffer/prompts"] == 1  # a prompt without entries is not counted


def test_when_all_are_spared_the_oldest_goes():
    b = ReplayBuffer(10, 20)  # hard: room for 4, of which 2 spared
    for i in range(20):
        b.observe(f"q{i}", [i / 20])
    b.add([entry(f"q{i}", 1.0, born_step=i) for i in range(5)])
    assert [len(b.entries_of(f"q{i}", 99)) for i in range(5)] == [0, 1, 1, 1, 1]


def test_single_successes_leave_room_for_groups():
    """More hard prompts than room: were all best entries spared, no group could ever be drawn."""
    b = ReplayBuffer(100, 20)  # hard: room for 40
    for i in range(1000):
        b.observe(f"q{i}", [0.25])
    hard = [q for q, tier in b.tiers().items() if tier == "hard"]
    for step, prompt_id in enumerate(hard):
        b.add([entry(prompt_id, reward, step) for reward in (1.0, 0.0, 0.0, 0.0)])
    assert b.stats(400)["buffer/frac_hard"] == 1.0 and len(b) == 40
    assert len(b.draw(4, 4, 400, rng())) >= 4


def test_eviction_forgets_no_mean():
    b = ReplayBuffer(4, 20)
    b.observe("q", [0.5])
    for step in range(9):
        b.add([entry("q", 0.0, step)])
    assert b.mean_reward("q") == 0.5


# ---- draws: which prompts


def test_empty_buffer_first_step_and_zero_groups():
    b = ReplayBuffer(100, 20)
    assert b.draw(4, 4, 0, rng()) == []
    b = filled()  # everything was born at step 0
    assert b.draw(4, 4, 0, rng()) == []
    assert b.draw(0, 4, 1, rng()) == []


def test_nothing_from_the_present_step_is_drawn():
    b = filled()
    b.add([entry("q0", 5.0, born_step=3) for _ in range(4)])
    for group in b.draw(20, 4, 3, rng()):
        assert all(e.born_step < 3 for e in group)
    drawn = b.draw(20, 4, 4, rng())
    assert any(e.born_step == 3 for group in drawn for e in group)


def test_defect_8_prompts_are_drawn_without_replacement():
    b = filled()
    for seed in range(50):
        prompts = [group[0].prompt_id for group in b.draw(10, 4, 1, rng(seed))]
        assert len(prompts) == len(set(prompts)) == 10
    everything = b.draw(50, 4, 1, rng())
    assert {group[0].prompt_id for group in everything} == {f"q{i}" for i in range(20)}


def test_a_group_is_one_prompt_and_no_entry_twice():
    b = filled(per_prompt=8)
    for group in b.draw(20, 4, 1, rng()):
        assert len({e.prompt_id for e in group}) == 1
        assert len({serial(e) for e in group}) == len(group) == 4


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 8])
def test_quotas_over_many_draws(num_groups):
    b, r, counts = filled(num_prompts=100), rng(), Counter()
    draws = 2000 // num_groups
    for _ in range(draws):
        counts.update(b.tier(group[0].prompt_id) for group in b.draw(num_groups, 4, 1, r))
    total = sum(counts.values())
    assert total == draws * num_groups
    for tier, share in (("hard", 0.40), ("medium", 0.35), ("easy", 0.25)):
        assert counts[tier] / total == pytest.approx(share, abs=0.05)


def test_whole_quotas_leave_nothing_to_chance():
    b = filled(num_prompts=100)
    for seed in range(20):
        tiers = Counter(b.tier(group[0].prompt_id) for group in b.draw(20, 4, 1, rng(seed)))
        assert tiers == {"hard": 8, "medium": 7, "easy": 5}


def test_a_short_tier_passes_its_quota_on():
    b = filled(num_prompts=20)
    hard = [q for q, tier in b.tiers().items() if tier == "hard"]
    for q in hard[1:]:
        b.forget(q)
    tiers = Counter(b.tier(g[0].prompt_id) for g in b.draw(10, 4, 1, rng()))
    assert tiers["hard"] == 1 and sum(tiers.values()) == 10
    b.forget(hard[0])
    assert len(b.draw(20, 4, 1, rng())) == 12  # all that is left


@pytest.mark.parametrize("seed", range(5))
def test_flat_prompts_take_only_the_places_that_useful_ones_leave(seed):
    b = ReplayBuffer(10_000, 20)
    for i in range(16):  # q0..q11 always wrong; of the others some are right
        rewards = [0.0] * 4 if i < 12 else [0.0, 1.0] * 2
        b.observe(f"q{i}", rewards)
        b.add([entry(f"q{i}", reward) for reward in rewards])
    names = [group[0].prompt_id for group in b.draw(8, 4, 1, rng(seed))]
    assert len(set(names)) == 8 and {"q12", "q13", "q14", "q15"} <= set(names)


def test_prompts_with_too_few_entries_are_not_eligible():
    b = filled(num_prompts=20, per_prompt=3)
    assert b.draw(4, 4, 1, rng()) == []
    b.add([entry("q5", 0.0)])
    assert [g[0].prompt_id for g in b.draw(4, 4, 1, rng())] == ["q5"]


def test_two_sided_prompts_are_preferred_and_flat_ones_rare():
    b = ReplayBuffer(1000, 20)
    for q in "abc":  # three prompts of one tier: a flat, b one-sided, c two-sided, equal reach
        b.observe(q, [0.5])
    for i in range(30):
        b.observe(f"top{i}", [9.0])
    assert {b.tier(q) for q in "abc"} == {"hard"}
    b.add([entry("a", 0.5) for _ in range(4)])
    b.add([entry("b", reward) for reward in (1.5, 0.5, 0.5, 0.5)])
    b.add([entry("c", reward) for reward in (1.0, 0.0, 0.5, 0.5)])
    counts = Counter(b.draw(1, 4, 1, rng(seed))[0][0].prompt_id for seed in range(1500))
    assert counts["c"] / 1500 == pytest.approx(2 / 3, abs=0.05)  # weights 2 and 1
    assert counts["b"] / 1500 == pytest.approx(1 / 3, abs=0.05)
    assert counts["a"] == 0  # only where the others do not suffice:
    assert {g[0].prompt_id for g in b.draw(3, 4, 1, rng())} == {"a", "b", "c"}


def test_defect_8_failures_are_drawn_as_well_as_successes():
    """Prompts with a mean of 0.5 and one unusual completion each, half of them a failure."""
    b = ReplayBuffer(1000, 20)
    for i in range(40):
        b.observe(f"q{i}", [0.5])
        b.add([entry(f"q{i}", reward) for reward in ((i + 1) % 2, 0.5, 0.5, 0.5)])
    signs = Counter()
    for seed in range(200):
        for group in b.draw(4, 4, 1, rng(seed)):
            signs.update(np.sign(e.reward - 0.5) for e in group)
    assert signs[-1.0] / (signs[-1.0] + signs[1.0]) == pytest.approx(0.5, abs=0.08)


def test_equal_rewards_everywhere_still_draw():
    """All weights are zero: no 0/0, and every prompt equally likely."""
    b = ReplayBuffer(1000, 20)
    for i in range(10):
        b.observe(f"q{i}", [1.0])
        b.add([entry(f"q{i}", 1.0) for _ in range(4)])
    counts = Counter(g[0].prompt_id for s in range(500) for g in b.draw(5, 4, 1, rng(s)))
    assert sum(counts.values()) == 2500 and len(counts) == 10
    assert max(counts.values()) < 2.5 * min(counts.values())


# ---- draws: which completions of a prompt


def one_prompt(rewards, mean, num_off, born=None, hinted=()):
    b = ReplayBuffer(1000, 20)
    b.observe("q", [mean])
    born = born or [0] * len(rewards)
    entries = [entry("q", r, s, i in hinted) for i, (r, s) in enumerate(zip(rewards, born))]
    b.add(entries)
    (group,) = b.draw(1, num_off, 1000, rng())
    return [entries.index(e) for e in group]


@pytest.mark.parametrize(
    "rewards, mean, num_off, chosen",
    [
        ([0.0, 0.1, 0.4, 0.6, 0.9, 1.0], 0.5, 4, {0, 1, 4, 5}),  # two farthest of each side
        ([0.0, 0.5, 0.5, 0.5, 0.5, 0.6], 0.5, 4, {0, 5, 4, 3}),  # then the newest at the mean
        ([0.6, 0.7, 0.8, 0.9, 1.0], 0.5, 4, {1, 2, 3, 4}),  # nothing below: above fills
        ([0.4, 0.3, 0.2, 0.1, 0.6], 0.5, 4, {4, 3, 2, 1}),  # one above: below fills
        ([0.5, 0.5, 0.5, 0.5, 0.5], 0.5, 4, {1, 2, 3, 4}),  # flat: the newest
        ([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 0.5, 4, {1, 2, 4, 5}),  # ties: the newest
        ([0.0, 0.9, 0.5], 0.5, 1, {0}),  # one: the farthest of all
        ([0.0, 1.0, 0.5], 0.5, 1, {1}),  # equally far: the newest
        ([0.3, 0.8, 0.1, 0.6], 0.5, 3, {2, 1, 0}),  # odd: the third is the farthest left
    ],
)
def test_two_sided_selection_by_hand(rewards, mean, num_off, chosen):
    assert set(one_prompt(rewards, mean, num_off)) == chosen


def test_newest_means_born_last_then_arrived_last():
    assert set(one_prompt([0.0] * 4, 0.5, 2, born=[3, 9, 9, 1])) == {1, 2}
    assert one_prompt([0.0] * 4, 0.5, 1, born=[3, 9, 9, 1]) == [2]


def test_distances_that_differ_by_float_noise_are_ties():
    assert one_prompt([0.3, 0.1 + 0.2], 0.6, 1) == [1]  # nearer by 5e-17 only, and newer
    assert one_prompt([0.1 + 0.2, 0.3], 0.3, 1) == [1]  # both are at the mean


def test_hinted_and_plain_are_never_mixed():
    b = filled(num_prompts=10, per_prompt=3)
    b.add([entry(f"q{i}", 1.0, hinted=True) for i in range(10) for _ in range(3)])
    assert b.draw(10, 4, 1, rng()) == []  # six of each prompt, but three of each kind
    b.add([entry("q0", 0.0, hinted=True)])
    b.add([entry("q1", 0.0)])
    groups = b.draw(10, 4, 1, rng())
    assert sorted((g[0].prompt_id, *{e.hinted for e in g}) for g in groups) == [
        ("q0", True),
        ("q1", False),
    ]


def test_the_more_useful_kind_is_drawn_and_plain_on_a_tie():
    assert set(one_prompt([0.5] * 4 + [1.0] * 4, 0.5, 4, hinted=range(4, 8))) == {4, 5, 6, 7}
    assert set(one_prompt([1.0] * 4 + [0.5] * 4, 0.5, 4, hinted=range(4, 8))) == {0, 1, 2, 3}
    assert set(one_prompt([1.0] * 8, 0.5, 4, hinted=range(4))) == {4, 5, 6, 7}


# ---- the defects of the released trainer


def test_defect_2_every_generated_completion_is_kept():
    """Nothing that was paid for is thrown away while there is room: 8 made, 8 stored."""
    b = filled(num_prompts=20, per_prompt=0)
    made = [entry(f"q{i}", j / 8) for i in range(20) for j in range(8)]
    b.add(made)
    assert {serial(e) for e in stored(b)} == {serial(e) for e in made}


def test_defect_5_the_key_is_the_prompt_id_and_hints_do_not_change_it():
    """Two clips with one question are two prompts; a hinted completion belongs to its prompt."""
    b = ReplayBuffer(100, 20)
    b.observe("clip1", [1.0])
    b.observe("clip2", [0.0])
    assert (b.mean_reward("clip1"), b.mean_reward("clip2")) == (1.0, 0.0)
    b.add([entry("clip2", 1.0, hinted=True)])
    assert [e.hinted for e in b.entries_of("clip2", 1)] == [True]
    assert b.mean_reward("clip2") == 0.0  # the caller does not observe hinted rewards
    assert set(b.tiers()) == {"clip1", "clip2"}


def test_defect_7_ten_thousand_entries_are_small_and_hold_no_pixels():
    b = filled(num_prompts=1000, per_prompt=0)
    length = 512
    for step in range(11):
        b.add([entry(f"q{i}", step % 2, step, length=length) for i in range(1000)])
    assert len(b) == 10_000
    state = io.BytesIO()
    torch.save(b.state_dict(), state)
    assert state.getbuffer().nbytes < 10_000 * (
        12 * length + 200
    )  # 4 + 4 + 4 bytes a token, and keys
    held = {name for e in stored(b)[:50] for name in vars(e)}
    assert held == set(Entry.__dataclass_fields__)


def test_defect_7_an_entry_does_not_keep_the_batch_it_came_from():
    ids = torch.arange(8 * 4096).view(8, 4096)
    old = torch.zeros(8, 4096, requires_grad=True) * 2
    e = Entry("q", ids[0, :3], old[0, :3], 1.0, {}, 0, False)
    assert e.completion_ids.untyped_storage().nbytes() == 3 * 4
    assert e.old_logprobs.untyped_storage().nbytes() == 3 * 4
    assert not e.old_logprobs.requires_grad
    ids[0, 0] = 99
    assert e.completion_ids.tolist() == [0, 1, 2]


def test_old_logprobs_are_never_rewritten_by_replay():
    b = filled()
    before = {serial(e): e.old_logprobs.clone() for e in stored(b)}
    for step in range(1, 20):
        b.draw(8, 4, step, rng(step))
    assert all(torch.equal(e.old_logprobs, before[serial(e)]) for e in stored(b))


# ---- entries


def test_entry_normalises_its_types():
    e = Entry(
        "q",
        np.array([1, 2]),
        torch.tensor([-1, -2], dtype=torch.bfloat16),
        np.float64(0.5),
        {"acc": torch.tensor(1.0)},
        np.int64(3),
        np.bool_(True),
    )
    assert (e.completion_ids.dtype, e.old_logprobs.dtype) == (torch.int32, torch.float32)
    types = [type(x) for x in (e.reward, e.reward_parts["acc"], e.born_step, e.hinted)]
    assert types == [float, float, int, bool]


@pytest.mark.parametrize(
    "ids, old, reward",
    [
        ([1, 2], [0.0], 1.0),
        ([], [], 1.0),
        ([[1, 2]], [[0.0, 0.0]], 1.0),
        ([1], [0.0], float("nan")),
        ([1], [float("-inf")], 1.0),
    ],
)
def test_bad_entries_are_refused(ids, old, reward):
    with pytest.raises(ValueError):
        Entry("q", torch.tensor(ids), torch.tensor(old), reward, {}, 0, False)


def test_bad_arguments_are_refused():
    for capacity, window in ((0, 20), (100, 0)):
        with pytest.raises(ValueError, match="capacity and window"):
            ReplayBuffer(capacity, window)
    b = ReplayBuffer(100, 20)
    with pytest.raises(ValueError, match="nan"):
        b.observe("q", [1.0, float("nan")])
    assert b.mean_reward("q") is None
    for num_groups, num_off in ((-1, 4), (1, 0)):
        with pytest.raises(ValueError, match="num_off"):
            b.draw(num_groups, num_off, 0, rng())


def test_equal_priorities_and_duplicate_adds():
    """Equal births, rewards and even the same object twice: no comparison of entries or tensors."""
    b = ReplayBuffer(20, 20)  # one prompt: medium, room for 7
    b.observe("q", [0.5])
    same = entry("q", 1.0)
    for _ in range(10):
        b.add([same, same])
    assert len(b) == 7
    (group,) = b.draw(1, 4, 1, rng())
    assert group == [same] * 4


def test_entries_of_is_before_the_step_and_in_order():
    b = ReplayBuffer(100, 20)
    entries = [entry("q", 0.0, step) for step in (2, 0, 1, 3)]
    b.add(entries)
    assert b.entries_of("q", 3) == entries[:3]
    assert b.entries_of("q", 0) == b.entries_of("unknown", 9) == []


def test_stats_by_hand():
    b = ReplayBuffer(1000, 20)
    for i in range(20):
        b.observe(f"q{i}", [i / 20])
    b.add([entry("q0", 0.0, 2), entry("q0", 0.0, 4), entry("q9", 0.0, 6), entry("q19", 0.0, 8)])
    assert b.stats(10) == {
        "buffer/size": 4,
        "buffer/prompts": 3,
        "buffer/frac_hard": 0.5,
        "buffer/frac_medium": 0.25,
        "buffer/frac_easy": 0.25,
        "buffer/staleness_mean": 5.0,
        "buffer/mean_reward": pytest.approx(0.475),
    }
    assert set(ReplayBuffer(1000, 20).stats(0).values()) == {0}


# ---- resume


def train(b, r, steps):
    """A stand-in for training: observe, draw, add; returns what was drawn, by rewards and birth."""
    drawn = []
    for step in steps:
        ids = [f"q{i}" for i in r.choice(30, size=8, replace=False)]
        for group in b.draw(4, 4, step, r):
            drawn.append([(e.prompt_id, e.reward, e.born_step, e.hinted) for e in group])
        for q in ids:
            rewards = [round(float(x), 1) for x in r.random(4)]
            hinted = bool(r.random() < 0.2)
            if not hinted:
                b.observe(q, rewards)
            b.add([entry(q, x, step, hinted, length=int(r.integers(1, 9))) for x in rewards])
    return drawn


def saved_and_loaded(b):
    file = io.BytesIO()
    torch.save(b.state_dict(), file)
    file.seek(0)
    loaded = ReplayBuffer(b.capacity, b.window)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return loaded


def test_state_round_trip_continues_identically():
    b, r = ReplayBuffer(200, 20), rng()
    assert train(b, r, range(40))
    twin, r2 = saved_and_loaded(b), rng()
    r2.bit_generator.state = r.bit_generator.state
    for q in b.tiers():
        for e, t in zip(b.entries_of(q, 99), twin.entries_of(q, 99), strict=True):
            assert torch.equal(e.completion_ids, t.completion_ids)
            assert torch.equal(e.old_logprobs, t.old_logprobs)
            assert (e.reward, e.reward_parts, e.born_step) == (
                t.reward,
                t.reward_parts,
                t.born_step,
            )
    assert twin.tiers() == b.tiers() and list(twin.tiers()) == list(b.tiers())
    assert train(b, r, range(40, 80)) == train(twin, r2, range(40, 80))
    assert b.stats(80) == twin.stats(80)


def test_state_taken_before_a_due_eviction_continues_identically():
    """A tier that only became too full by observe is thinned at the next add, saved or not."""
    b = filled(num_prompts=5, per_prompt=8, capacity=40)
    b.observe("q0", [9.0] * 20)
    twin = saved_and_loaded(b)
    assert len(twin) == len(b)
    for each in (b, twin):
        each.add([entry("q3", 0.5, 1)])
    assert b.stats(2) == twin.stats(2)


def test_empty_state_round_trip():
    b = saved_and_loaded(ReplayBuffer(100, 20))
    assert len(b) == 0 and b.draw(4, 4, 1, rng()) == []


def test_loading_replaces_what_was_there():
    b = filled()
    state = filled(num_prompts=3).state_dict()
    b.load_state_dict(state)
    assert len(b) == 12 and set(b.tiers()) == {"q0", "q1", "q2"}


def test_loaded_entries_own_their_memory():
    twin = saved_and_loaded(filled())
    assert all(e.completion_ids.untyped_storage().nbytes() == 3 * 4 for e in stored(twin))


def test_state_of_another_size_is_refused():
    state = ReplayBuffer(100, 20).state_dict()
    with pytest.raises(ValueError, match="capacity"):
        ReplayBuffer(101, 20).load_state_dict(state)
    with pytest.raises(ValueError, match="window"):
        ReplayBuffer(100, 10).load_state_dict(state)


# ---- determinism


def test_two_ranks_draw_the_same():
    one, two = rng(7), rng(7)
    assert train(ReplayBuffer(200, 20), one, range(30)) == train(
        ReplayBuffer(200, 20), two, range(30)
    )


def test_hash_randomisation_does_not_change_the_draws():
    code = (
        "import numpy as np, test_buffer as t\n"
        "b = t.ReplayBuffer(120, 20)\n"
        "print(t.train(b, np.random.default_rng(0), range(25)))\n"
        "print(b.draw.__self__.stats(25), list(b.tiers()))\n"
    )
    tests = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([tests, os.path.dirname(tests)])
    outputs = set()
    for seed in ("0", "1", "31337"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        run = [sys.executable, "-c", code]
        outputs.add(subprocess.run(run, env=env, check=True, capture_output=True, text=True).stdout)
    assert len(outputs) == 1
