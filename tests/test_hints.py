"""
Hints: when one enters and leaves [HINT], the KL that decides [HINT.KL], and answer leaks.

    PYTHONPATH=. python -m pytest -q tests/test_hints.py
"""

import ast
import io
import math

import pytest
import torch

import hints
from hints import HintSchedule, behavior_kl, hint_leak, place_hint

# --- when a hint enters and leaves ----------------------------------------------------------------


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
        assert s.observe("q", "hard", None) is None
    assert s.observe("q", tier, kl) == event
    assert s.active("q") == (event == "entered")


def test_patience_one_enters_at_the_first_hard_visit():
    s = HintSchedule(1, 0.05)
    assert s.needs_kl("q", "hard")
    assert s.observe("q", "hard", 0.0) == "entered"


def test_leaving_hard_restarts_the_count():
    s = HintSchedule(3, 0.05)
    for tier in ("hard", "hard", "medium", "hard", "hard"):
        assert s.observe("q", tier, 0.0) is None
    assert s.observe("q", "hard", 0.0) == "entered"


def test_the_kl_may_drop_later():
    s = HintSchedule(2, 0.05)
    events = [s.observe("q", "hard", kl) for kl in (0.0, 0.3, 0.1, 0.04, 0.01)]
    assert events == [None, None, None, "entered", None]


def test_defect_6_a_hint_is_withdrawn_and_may_return():
    s = HintSchedule(2, 0.05)
    tiers = ["hard", "hard", "hard", "medium", "easy", "hard", "hard", "easy"]
    events = [s.observe("q", tier, 0.0) for tier in tiers]
    assert events == [None, "entered", None, "withdrawn", None, None, "entered", "withdrawn"]
    assert (s.entered, s.withdrawn) == (2, 2)
    assert s.active_prompts == []


def test_withdrawal_needs_no_kl():
    s = HintSchedule(1, 0.05)
    s.observe("q", "hard", 0.0)
    assert s.observe("q", "medium", None) == "withdrawn"


def test_defect_6_the_rule_fires_with_a_finite_threshold_and_without():
    for threshold in (1e-6, 0.05, math.inf):
        assert HintSchedule(1, threshold).observe("q", "hard", 0.0) == "entered"
    assert HintSchedule(1, math.inf).observe("q", "hard", None) is None


def test_defect_5_prompts_are_told_apart_by_prompt_id_alone():
    """Two clips with the same question have two ids; the hinted prompt keeps its own."""
    s = HintSchedule(2, 0.05)
    s.observe("clip1", "hard", 0.0)
    s.observe("clip2", "hard", 0.0)
    assert s.observe("clip1", "hard", 0.0) == "entered"
    assert s.active("clip1") and not s.active("clip2")
    assert s.observe("clip1", "easy", 0.0) == "withdrawn"  # same key while its text was hinted


def test_defect_6_every_second_visit_is_plain_so_that_the_mean_can_rise():
    """Hinted rewards stay out of R̄(q): only plain visits can lift the prompt out of Hard."""
    s = HintSchedule(2, 0.05)
    due = []
    for tier in ["hard", "hard", "hard", "hard", "hard", "easy", "hard", "hard", "hard"]:
        s.observe("q", tier, 0.0)
        assert not s.due("other") and (s.active("q") or not s.due("q"))
        due.append(s.due("q"))
    assert due == [False, True, False, True, False, False, False, True, False]


def test_needs_kl_is_true_exactly_when_a_kl_could_matter():
    s = HintSchedule(3, 0.05)
    tiers = ["hard", "hard", "hard", "hard", "medium", "hard", "hard", "hard", "hard"]
    for tier, kl in zip(tiers, [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, None, 0.0]):
        twin = HintSchedule(3, 0.05)
        twin.load_state_dict(s.state_dict())
        could_enter = twin.observe("q", tier, 0.0) == "entered"
        assert s.needs_kl("q", tier) == could_enter
        s.observe("q", tier, kl)
    assert not s.needs_kl("q", "hard")  # it has its hint


def test_active_prompts_keep_the_order_of_entry():
    s = HintSchedule(1, 0.05)
    for q in ("c", "a", "b"):
        s.observe(q, "hard", 0.0)
    s.observe("a", "easy", 0.0)
    assert s.active_prompts == ["c", "b"]


def test_state_round_trip_continues_identically():
    s = HintSchedule(2, 0.05)
    for q, tier in [("a", "hard"), ("a", "hard"), ("b", "hard"), ("c", "hard"), ("c", "easy")]:
        s.observe(q, tier, 0.0)
    file = io.BytesIO()
    torch.save(s.state_dict(), file)
    file.seek(0)
    twin = HintSchedule(2, 0.05)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.state_dict() == s.state_dict()
    for q, tier in [("b", "hard"), ("a", "hard"), ("a", "easy"), ("c", "hard"), ("c", "hard")]:
        assert twin.observe(q, tier, 0.0) == s.observe(q, tier, 0.0)
        assert twin.due(q) == s.due(q)
    assert (twin.entered, twin.withdrawn) == (s.entered, s.withdrawn) == (3, 1)


def test_a_loaded_state_is_a_copy():
    s = HintSchedule(1, 0.05)
    state = s.state_dict()
    s.observe("q", "hard", 0.0)
    assert state["active"] == [] and state["visits"] == []


@pytest.mark.parametrize(
    "patience, kl", [(0, 0.05), (-1, 0.05), (3, 0.0), (3, -1.0), (3, math.nan)]
)
def test_bad_arguments_are_refused(patience, kl):
    with pytest.raises(ValueError, match="patience"):
        HintSchedule(patience, kl)


def test_an_unknown_tier_is_refused():
    with pytest.raises(ValueError, match="Hard"):
        HintSchedule(1, 0.05).observe("q", "Hard", 0.0)


def test_the_hint_stands_before_an_untouched_question():
    text = place_hint("How many dogs bark?\nA. 1\nB. 2", "  listen first. \n")
    assert text == "Hint: listen first.\nHow many dogs bark?\nA. 1\nB. 2"


# --- KL to the behaviour policy -------------------------------------------------------------------


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


# --- leaks ----------------------------------------------------------------------------------------

COLORS = ["red", "blue", "green", "yellow"]
LEAKS = [
    # above a hundred, in words
    ("there are one hundred and twenty", "120", "number", None),
    ("one hundred twenty of them", "120", "number", None),
    ("a hundred and one dogs", "101", "number", None),
    ("three hundred and five", "305", "number", None),
    ("between one hundred and twenty", "20", "number", None),
    # a letter used as a choice
    ("The answer is B", "B", "choice", None),
    ("the answer is b.", "B", "choice", None),
    ("Answer: B", "B", "choice", None),
    ("Look at option B again", "B", "choice", None),
    ("consider option b again", "B", "choice", None),
    ("the last choice, (B), fits", "B", "choice", None),
    ("the last choice (b) fits", "B", "choice", None),
    ("B fits best", "B", "choice", None),
    ("it can only be **B**", "B", "choice", None),
    ("The answer is A.", "A", "choice", None),
    ("The answer is A", "A", "choice", None),
    ("option A is right", "A", "choice", None),
    ("the answer is a", "A", "choice", None),
    ("(A) or something else", "A", "choice", None),
    ("A is the only one left", "A", "choice", None),
    ("it is A, not C", "A", "choice", None),
    # the text of the right option
    ("watch for the blue shape", "B", "choice", COLORS),
    ("watch for the BLUE shape", "B", "choice", COLORS),
    ("it is 'blue'!", "(b)", "choice", COLORS),
    ("it is blue", "blue", "choice", COLORS),
    ("it is blue", "B", "choice", ["A. red", "B. blue"]),
    ("it is blue", "B", "choice", {"A": "red", "B": "blue"}),
    ("either red or blue", "B", "choice", COLORS),
    ("not red, not green, not yellow, so blue remains", "B", "choice", COLORS),
    ("compare red, blue, green and yellow in turn", "B", "choice", COLORS),  # cannot be told apart
    ("the sky is blue", "B. blue", "choice", COLORS),
    ("the sky is blue", "B. blue", "choice", None),
    ("count to two", "C", "choice", ["0", "1", "2"]),
    ("there are 2", "C", "choice", ["zero", "one", "two"]),
    ("two dogs bark", "A", "choice", ["2 dogs", "3 dogs"]),
    ("two dogs bark", 2, "choice", [2, 3]),
    ("listen to the dogs", "A", "choice", ["a dog", "a cat"]),
    ("of red, blue, green and yellow the answer is blue", "B", "choice", COLORS),
    ("red, blue, green, yellow: blue is correct", "B", "choice", COLORS),
    # all that is wrong
    ("neither red, nor green, nor yellow", "B", "choice", COLORS),
    ("rule out A, C and D", "B", "choice", COLORS),
    ("rule out A, (c) and yellow", "B", "choice", COLORS),
    # several right options
    ("C is one of them", "A, C", "multi", None),
    ("think of C", "AC", "multi", None),
    ("think of C", ["A", "C"], "multi", COLORS),
    ("green is one of them", "A and C", "multi", COLORS),
    ("green is one of them", ["red", "green"], "multi", COLORS),
    ("green is one of them", "red, green", "multi", COLORS),
    ("green is one of them", "red, green", "multi", None),
    ("think of C", "(A)(C)", "multi", None),
    # numbers
    ("there are 2 of them", "2", "number", None),
    ("there are two of them", "2", "number", None),
    ("Two.", "2.0", "number", None),
    ("it rings twice", "2", "number", None),
    ("count to 2", "two", "number", None),
    ("exactly one dog", "1", "number", None),
    ("there are twenty-two", "22", "number", None),
    ("there are three hundred", "300", "number", None),
    ("about 1,000 birds", "1000", "number", None),
    ("3.5 seconds", "3.50", "number", None),
    ("it takes 2s", "2 s", "number", None),
    ("it takes two seconds", "2 s", "number", None),
    ("half of it, 50 percent", "50%", "number", None),
    ("it drops to minus 3", "-3", "number", None),
    ("there are 2 dogs", 2, "number", None),
    # text
    ("listen to the church bell", "church bell", "text", None),
    ("listen to the Church-Bell!", "a church bell", "text", None),
    ("two church bells ring", "church bell", "text", None),
    ("a café, at night", "Café", "text", None),
    # location
    ("the red circle is on the left", "left: red circle | right: drum", "location", None),
    ("look left, there is a red circle", "Left: Red circle", "location", None),
    ("Look left. There is a red circle.", "left: a red circle", "location", None),
    ("a drum to the right", "left: red circle | right: drum", "location", None),
    ("a drum to the right", "left: red circle, right: drum", "location", None),
    ("two dogs in the center", "center: 2 dogs", "location", None),
    ("look at the left", "left", "location", None),
    # yes and no
    ("the answer is yes", "yes", "yesno", None),
    ("The correct answer: no.", "no", "yesno", None),
    ("The answer should be 'Yes'", "Yes", "yesno", None),
    ("Yes, it does", "yes", "yesno", None),
    ("No. Look again", "no", "yesno", None),
    ("yes is correct", "yes", "yesno", None),
    ("the answer is not yes", "no", "yesno", None),
    ("answer no here", "no", "yesno", None),
    ("the answer is true", "yes", "yesno", None),
    ("the answer is no", "B", "choice", ["Yes", "No"]),
    # an option by its place
    ("look at the second option again", "B", "choice", COLORS),
    ("the 2nd choice is worth a look", "B", "choice", COLORS),
    ("option two fits", "B", "choice", COLORS),
    ("option number 2 fits", "blue", "choice", COLORS),
    ("the first listed option", "A", "choice", COLORS),
    ("the last option", "D", "choice", COLORS),
    ("the middle option", "B", "choice", ["red", "blue", "green"]),
    ("the first and the third option are wrong, so is the last option", "B", "choice", COLORS[:3]),
    ("consider the fourth alternative", "A, D", "multi", COLORS),
    # in other words
    ("a pair of them rings", "2", "number", None),
    ("a couple of dogs", "2", "number", None),
    ("it rings once", "1", "number", None),
    ("a dozen birds", "12", "number", None),
    ("it rings thrice", "3", "number", None),
    ("there are none", "0", "number", None),
    ("the guitar is played by the man", "A", "choice", ["a man playing a guitar", "a dog barking"]),
    ("listen to the barks of a dog", "B", "choice", ["a man playing a guitar", "a dog barking"]),
    ("someone cut wood", "cutting wood", "text", None),
    ("the bell of a church", "church bell", "text", None),
    ("a girl who plays the flute, in the center", "center: girl playing flute", "location", None),
]
HARMLESS = [
    ("three hundred and five", "205", "number", None),
    ("first locate the object making the sound, then count", "2", "number", None),
    ("first locate the object making the sound, then count", "A", "choice", COLORS),
    ("A good start: watch the shapes while the high tone sounds", "A", "choice", COLORS),
    ("A good start: watch the shapes while the high tone sounds", "A", "choice", None),
    ("start with a list of sounds (a short one)", "A", "choice", None),
    ("choose a moment when the tone sounds", "A", "choice", None),
    ("to answer a question like this, listen first", "A", "choice", None),
    ("Pick the answer. A good start is to listen", "A", "choice", None),
    ("the answer is a high tone away", "A", "choice", None),
    ("FIND A SOUND FIRST", "A", "choice", None),
    ("what would I hear?", "I", "choice", None),
    ("listen to the B-flat tone", "B", "choice", COLORS),
    ("find the red shape, then look one second later", "B", "choice", COLORS),
    ("compare the colors in turn", "B", "choice", COLORS),
    ("look for the bluebird", "B", "choice", COLORS),
    ("look for the reddish one", "A", "choice", COLORS),
    ("it is not red, I think", "B", "choice", COLORS),
    ("there is no need to hurry", "B", "choice", ["Yes", "No"]),
    ("think of B", "A, C", "multi", COLORS),
    ("listen to each one", "1", "number", None),
    ("find the one that sounds, then go one by one", "1", "number", None),
    ("watch only the second second", "2", "number", None),
    ("watch the 2nd clip", "2", "number", None),
    ("there are 12 seconds, 2.5 of them silent", "2", "number", None),
    ("twenty-two frames", "2", "number", None),
    ("20 frames, 100 seconds", "2", "number", None),
    ("often listen to the weight", "10", "number", None),
    ("write a line for each second, then count the lines with a shape", "0", "number", None),
    ("listen to the bell", "church bell", "text", None),
    ("a bellows works hard", "bell", "text", None),
    ("the high tone sounds in the first second", "left: red circle", "location", None),
    ("go from left to right", "left: red circle | right: drum", "location", None),
    ("when is the red circle silent?", "left: red circle", "location", None),
    ("what is no longer there? say yes only if you hear it", "no", "yesno", None),
    ("the answer is no longer visible, so listen", "no", "yesno", None),
    ("there is no hurry; nod yes or no", "yes", "yesno", None),
    ("on the right no object moves", "no", "yesno", None),
    ("the answer is yes", "no", "yesno", None),  # wrong, but it does not give "no" away
    ("the second time it sounds, compare the options", "B", "choice", COLORS),
    ("first answer what sounds, then where", "B", "choice", COLORS),
    ("watch what the man does", "A", "choice", ["a man playing a guitar", "a man barking"]),
    ("listen to a single voice", "2", "number", None),
    ("look at both sides", "4", "number", None),
    ("", "B", "choice", COLORS),
    ("", "2", "number", None),
    ("listen", "?", "text", None),
    ("listen", "B", "choice", []),
]


@pytest.mark.parametrize("hint, answer, answer_type, options", LEAKS)
def test_leaks_are_refused(hint, answer, answer_type, options):
    reason = hint_leak(hint, answer, answer_type, options)
    assert isinstance(reason, str) and reason


@pytest.mark.parametrize("hint, answer, answer_type, options", HARMLESS)
def test_harmless_hints_pass(hint, answer, answer_type, options):
    assert hint_leak(hint, answer, answer_type, options) is None


def test_the_reason_names_what_was_found():
    assert "'2'" in hint_leak("there are two", "2", "number")
    assert "option B" in hint_leak("B fits", "B", "choice", COLORS)
    assert "blue" in hint_leak("it is blue", "B", "choice", COLORS)
    assert "left: drum" in hint_leak("left, a drum", "left: drum | right: cat", "location")


def test_the_file_is_a_leaf():
    """Copied alone into other projects: nothing of ours is imported when the file is."""
    tree = ast.parse(open(hints.__file__).read())
    names = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert not {"data", "model", "teachers", "rewards", "buffer", "transformers"} & set(names)
