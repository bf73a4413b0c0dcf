"""
When a step's numbers are bad, and when they are only told.

    python -m pytest tests/test_guards.py
"""

import pytest
import torch

from rl import guards
from run.errors import UserError


class Steps:
    """Stands for processes.Steps."""

    def __init__(self):
        self.step, self.told = 7, []

    def tell(self, text):
        self.told.append(text)


def info_of(surrogate, kl):
    """Three completions, the last one replayed."""
    ages = torch.tensor([0, 0, 31])
    pulls = dict(surrogate_pull=torch.tensor(surrogate), kl_pull=torch.tensor(kl))
    return pulls | dict(fresh=ages == 0, age=ages, prompt_id=["a", "b", "c"])


def test_a_spike_names_its_term_and_its_prompt():
    watch, told = guards.StepGuard(max_ratio=0), []
    quiet, loud = (
        info_of([0.1, 0.2, 0.1], [0.0, 0.0, 0.1]),
        info_of([0.1, 0.2, 0.1], [0.0, 0.0, 9.0]),
    )
    for norm in (0.4, 0.5, 0.6) * 4:
        watch.tell_spike(quiet, norm, told.append)
    watch.tell_spike(loud, 9.9, told.append)  # under 20 times the median .5
    assert told == []
    watch.tell_spike(loud, 50.0, told.append)
    (line,) = told
    assert line.startswith("gradient norm 50, 100 times the usual")
    assert line.endswith("the kl of c (replayed, 31 steps old)")
    watch.tell_spike(info_of([0.1, 5.0, 0.1], [0.0, 0.0, 0.0]), 50.0, told.append)
    assert told[-1].endswith("the surrogate of b (fresh)")


def test_the_first_steps_have_no_usual_norm():
    watch, told = guards.StepGuard(max_ratio=0), []
    for norm in (0.1, 99.0, 0.1, 99.0):
        watch.tell_spike(info_of([0.1] * 3, [0.1] * 3), norm, told.append)
    assert told == []


def test_what_was_usual_is_saved_with_the_run():
    watch, again, told = guards.StepGuard(0), guards.StepGuard(0), []
    quiet = info_of([0.1] * 3, [0.1] * 3)
    for _ in range(10):
        watch.tell_spike(quiet, 0.5, told.append)
    saved = watch.state_dict()
    watch.tell_spike(quiet, 0.5, told.append)
    assert len(saved["norms"]) == 10  # what goes on does not change what was saved
    again.load_state_dict(saved)
    again.tell_spike(quiet, 50.0, told.append)
    assert len(told) == 1


def test_a_bad_step_is_saved_before_or_left_out():
    watch, steps, saved = guards.StepGuard(0), Steps(), []
    problem = watch.bad_step(float("nan"), 1.0)
    with pytest.raises(
        UserError, match=r"step 7: loss nan.*its prompts: p, q; the state before it"
    ):
        watch.refuses(problem, {"q", "p"}, steps, "stop", lambda: saved.append(1))
    assert saved == [1]
    assert watch.refuses(problem, {"q"}, steps, "skip", lambda: saved.append(2))
    assert saved == [1] and steps.told[0].startswith("skipped: loss nan")
    assert not watch.refuses(watch.bad_step(1.0, 1.0), {"q"}, steps, "stop", None)
