"""
Hints: when one enters and leaves [HINT], and the KL that decides [HINT.KL].

    python -m pytest tests/test_hints.py
"""

import io
import math

import pytest
import torch

from hints import HintSchedule, behavior_kl, place_hint

# ---- when a hint enters and leaves


@pytest.mark.parametrize(
    "visits, tier, kl, event",
    [
        (3, "hard", 0.01, "entered"),  # the third visit in Hard, and the policy stands still
        (2, "hard", 0.01, None),  # not Hard for long enough
        (3, "hard", 0.05, None),  # at the threshold is not below it
        (3, "hard", 0.5, None),  # the policy still moves
        (3, "hard", None, None),  # nothing stored: unknown is not near
        (3, "hard", math.nan, None),
        (3, "medium", 0.01, None),
        (3, "easy", 0.01, None),
        (9, "hard", 0.0, "entered"),
    ],
)
def test_trigger_truth_table(visits, tier, kl, event):
    """`visits` counts this one; the earlier ones were Hard with an unknown KL."""
    s = HintSchedule(patience=3, kl_threshold=0.05)
    for _ in range(visits - 1):
        assert s.observe("q", "hard", False, None) is None
    assert s.observe("q", tier, False, kl) == event
    assert s.due("q") == (event == "entered")


def test_patience_one_enters_at_the_first_hard_visit():
    s = HintSchedule(1, 0.05)
    assert s.needs_kl("q", "hard", False)
    assert s.observe("q", "hard", False, 0.0) == "entered"


def test_leaving_hard_restarts_the_count():
    s = HintSchedule(3, 0.05)
    for tier in ("hard", "hard", "medium", "hard", "hard"):
        assert s.observe("q", tier, False, 0.0) is None
    assert s.observe("q", "hard", False, 0.0) == "entered"


def test_the_kl_may_drop_later():
    s = HintSchedule(2, 0.05)
    events = [s.observe("q", "hard", False, kl) for kl in (0.0, 0.3, 0.1, 0.04, 0.01)]
    assert events == [None, None, None, "entered", None]


def test_defect_6_a_hint_is_withdrawn_and_may_return():
    s = HintSchedule(2, 0.05)
    tiers = ["hard", "hard", "hard", "medium", "easy", "hard", "hard", "easy"]
    events = [s.observe("q", tier, False, 0.0) for tier in tiers]
    assert events == [None, "entered", None, "withdrawn", None, None, "entered", "withdrawn"]
    assert (s.entered, s.withdrawn) == (2, 2)


def test_withdrawal_needs_no_kl():
    s = HintSchedule(1, 0.05)
    s.observe("q", "hard", False, 0.0)
    assert s.observe("q", "medium", False, None) == "withdrawn"


def test_defect_6_the_rule_fires_with_a_finite_threshold_and_without():
    for threshold in (1e-6, 0.05, math.inf):
        assert HintSchedule(1, threshold).observe("q", "hard", False, 0.0) == "entered"
    assert HintSchedule(1, math.inf).observe("q", "hard", False, None) is None


def test_defect_5_prompts_are_told_apart_by_prompt_id_alone():
    """Two clips with the same question have two ids; the hinted prompt keeps its own."""
    s = HintSchedule(2, 0.05)
    s.observe("clip1", "hard", False, 0.0)
    s.observe("clip2", "hard", False, 0.0)
    assert s.observe("clip1", "hard", False, 0.0) == "entered"
    assert s.due("clip1") and not s.due("clip2")
    assert (
        s.observe("clip1", "easy", False, 0.0) == "withdrawn"
    )  # same key while its text was hinted


def test_defect_6_every_second_visit_is_plain_so_that_the_mean_can_rise():
    """Hinted rewards stay out of R̄(q): only plain visits can lift the prompt out of Hard."""
    s = HintSchedule(2, 0.05)
    due = []
    for tier in ["hard", "hard", "hard", "hard", "hard", "easy", "hard", "hard", "hard"]:
        s.observe("q", tier, False, 0.0)
        assert not s.due("other")
        due.append(s.due("q"))
    assert due == [False, True, False, True, False, False, False, True, False]


def test_needs_kl_is_true_exactly_when_a_kl_could_matter():
    s = HintSchedule(3, 0.05)
    tiers = ["hard", "hard", "hard", "hard", "medium", "hard", "hard", "hard", "hard"]
    for tier, kl in zip(tiers, [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, None, 0.0]):
        twin = HintSchedule(3, 0.05)
        twin.load_state_dict(s.state_dict())
        could_enter = twin.observe("q", tier, False, 0.0) == "entered"
        assert s.needs_kl("q", tier, False) == could_enter
        s.observe("q", tier, False, kl)
    assert not s.needs_kl("q", "hard", False)  # it has its hint


@pytest.mark.parametrize("patience, entry", [(1, 1), (2, 1), (3, 2)])
def test_the_first_visit_counts_though_nothing_is_stored_yet(patience, entry):
    s = HintSchedule(patience, 0.05)
    kls = [None, 0.01, 0.01]
    events = [s.observe("q", "hard", solved=False, behavior_kl=kl) for kl in kls]
    assert events.index("entered") == entry


# --- by need: the paper's "would otherwise yield zero reward"


def story(patience, *visits):
    """visits: (tier, whether the last plain visit was right) -> what each brought, whether it is due."""
    s = HintSchedule(patience, 0.05)
    return [(s.observe("q", tier, solved, 0.0), s.due("q")) for tier, solved in visits]


def test_a_prompt_that_is_solved_now_and_then_gets_no_hint():
    """Hard is a rank: the lowest of well-solved prompts are Hard too."""
    assert (
        story(3, *[("hard", x) for x in (False, True, False, False, True) * 3])
        == [(None, False)] * 15
    )


def test_one_right_answer_restarts_the_count():
    events = [e for e, _ in story(3, *[("hard", x) for x in (0, 0, 1, 0, 0, 0)])]
    assert events == [None, None, None, None, None, "entered"]


def test_a_hint_leaves_when_the_prompt_is_solved_without_it_whatever_the_rank():
    told = story(3, *[("hard", x) for x in (0, 0, 0, 0, 0, 1, 0, 0, 0)])
    events = [e for e, _ in told]
    assert events == [None, None, "entered", None, None, "withdrawn", None, None, "entered"]
    # every second visit is plain; after the withdrawal all are
    assert [d for _, d in told] == [False, False, True, False, True, False, False, False, True]


def test_a_hint_leaves_with_the_rank_too():
    assert story(1, ("hard", False), ("medium", False))[-1] == ("withdrawn", False)


def test_refused_hints_are_part_of_the_state():
    s, twin = HintSchedule(1, 0.05), HintSchedule(1, 0.05)
    s.refused.add("q")
    twin.load_state_dict(s.state_dict())
    assert twin.refused == {"q"} and twin.refused is not s.refused


def test_state_round_trip_continues_identically():
    s = HintSchedule(2, 0.05)
    for q, tier in [("a", "hard"), ("a", "hard"), ("b", "hard"), ("c", "hard"), ("c", "easy")]:
        s.observe(q, tier, False, 0.0)
    file = io.BytesIO()
    torch.save(s.state_dict(), file)
    file.seek(0)
    twin = HintSchedule(2, 0.05)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.state_dict() == s.state_dict()
    for q, tier in [("b", "hard"), ("a", "hard"), ("a", "easy"), ("c", "hard"), ("c", "hard")]:
        assert twin.observe(q, tier, False, 0.0) == s.observe(q, tier, False, 0.0)
        assert twin.due(q) == s.due(q)
    assert (twin.entered, twin.withdrawn) == (s.entered, s.withdrawn) == (3, 1)


def test_a_loaded_state_is_a_copy():
    s = HintSchedule(1, 0.05)
    state = s.state_dict()
    s.observe("q", "hard", False, 0.0)
    assert state["active"] == [] and state["visits"] == []


@pytest.mark.parametrize(
    "patience, kl", [(0, 0.05), (-1, 0.05), (3, 0.0), (3, -1.0), (3, math.nan)]
)
def test_bad_arguments_are_refused(patience, kl):
    with pytest.raises(ValueError, match="patience"):
        HintSchedule(patience, kl)


def test_an_unknown_tier_is_refused():
    with pytest.raises(ValueError, match="Hard"):
        HintSchedule(1, 0.05).observe("q", "Hard", False, 0.0)


def test_the_hint_stands_before_an_untouched_question():
    text = place_hint("How many dogs bark?\nA. 1\nB. 2", "  listen first. \n")
    assert text == "Hint: listen first.\nHow many dogs bark?\nA. 1\nB. 2"


# ---- KL to the behaviour policy


def test_kl_by_hand():
    d = torch.tensor([[math.log(2.0), math.log(0.5)]])  # exp(d) = 2 and 0.5
    expected = ((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2))) / 2
    assert behavior_kl(d, torch.zeros(1, 2), torch.ones(1, 2)) == pytest.approx(expected)
    assert expected == pytest.approx(0.25)


def test_kl_is_zero_for_the_same_policy_and_positive_otherwise():
    old = -torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 7).bool()
    assert behavior_kl(old, old, mask) == 0.0
    for shift in (-1e-4, 1e-4, -3.0, 3.0):
        assert behavior_kl(old + shift, old, mask) > 0


def test_kl_matches_the_loop():
    g = torch.Generator().manual_seed(1)
    new, old = -3 * torch.rand(5, 9, generator=g), -3 * torch.rand(5, 9, generator=g)
    mask = torch.arange(9)[None] < torch.tensor([9, 1, 4, 0, 7])[:, None]
    terms = []
    for i in range(5):
        for t in range(9):
            if mask[i, t]:
                d = new[i, t].item() - old[i, t].item()
                terms.append(math.exp(d) - 1 - d)
    assert behavior_kl(new, old, mask) == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_kl_estimates_the_divergence_from_the_behaviour_policy():
    """Samples of b: the mean of k3 is KL(b || pi), which is not KL(pi || b)."""
    b, pi = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    g = torch.Generator().manual_seed(2)
    tokens = torch.multinomial(b, 200_000, replacement=True, generator=g)[None]
    kl = behavior_kl(pi.log()[tokens], b.log()[tokens], torch.ones_like(tokens))
    assert kl == pytest.approx((b * (b / pi).log()).sum().item(), rel=0.02)
    assert kl != pytest.approx((pi * (pi / b).log()).sum().item(), rel=0.05)


def test_kl_ignores_what_is_off_the_mask():
    new, old = torch.tensor([[-1.0, -2.0, -math.inf]]), torch.tensor([[-1.5, -2.0, math.nan]])
    mask = torch.tensor([[1, 1, 0]])
    assert behavior_kl(new, old, mask) == pytest.approx((math.exp(0.5) - 1.5) / 2)


def test_kl_is_per_token_not_per_row():
    new = torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    k3 = math.exp(0.5) - 1.5
    assert behavior_kl(new, torch.zeros(2, 3), mask) == pytest.approx(k3 * 3 / 4)


def test_kl_is_clamped_and_finite():
    kl = behavior_kl(torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]]), torch.ones(1, 2))
    assert kl == pytest.approx((math.exp(20) - 21 + math.exp(-20) + 19) / 2)


def test_kl_takes_logprobs_with_gradients_in_half_precision():
    new = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    kl = behavior_kl(new, torch.full((1, 2), -1.0), torch.ones(1, 2))
    assert isinstance(kl, float) and kl == pytest.approx(math.e - 2)


def test_kl_of_nothing_and_layout_mistakes():
    with pytest.raises(ValueError, match="no valid token"):
        behavior_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(AssertionError, match="expected three"):
        behavior_kl(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3))
    with pytest.raises(AssertionError, match="expected three"):
        behavior_kl(torch.zeros(3), torch.zeros(3), torch.ones(3))
