"""
When a step's numbers are bad, and when they are only reported.

    python -m pytest tests/test_guards.py
"""

import pytest
import torch

from run.errors import UserError
from training import guards


class Steps:
    """Stands for processes.Steps."""

    def __init__(self):
        self.step = 7
        self.lines = []

    def tell(self, text):
        self.lines.append(text)


def info_of(surrogate, kl):
    """Three completions, the last one replayed."""
    ages = torch.tensor([0, 0, 31])
    return dict(
        surrogate_grad_scale=torch.tensor(surrogate),
        kl_grad_scale=torch.tensor(kl),
        fresh=ages == 0,
        age=ages,
        prompt_id=["a", "b", "c"],
    )


# ---- a gradient norm far above the usual


def test_a_spike_names_its_term_and_its_prompt():
    guard = guards.StepGuard(max_seq_ratio=0)
    lines = []
    quiet = info_of([0.1, 0.2, 0.1], [0.0, 0.0, 0.1])
    loud = info_of([0.1, 0.2, 0.1], [0.0, 0.0, 9.0])
    for norm in (0.4, 0.5, 0.6) * 4:
        guard.report_grad_spike(quiet, norm, lines.append)
    guard.report_grad_spike(loud, 9.9, lines.append)  # below 20 times the median .5
    assert lines == []
    guard.report_grad_spike(loud, 50.0, lines.append)
    assert "50" in lines[0] and "100 times" in lines[0]
    assert lines[0].endswith("the kl of c (replayed, 31 steps old)")
    guard.report_grad_spike(info_of([0.1, 5.0, 0.1], [0.0, 0.0, 0.0]), 50.0, lines.append)
    assert lines[1].endswith("the surrogate of b (fresh)")


def test_the_first_steps_have_no_usual_norm():
    guard = guards.StepGuard(max_seq_ratio=0)
    lines = []
    for norm in (0.1, 99.0, 0.1, 99.0):
        guard.report_grad_spike(info_of([0.1] * 3, [0.1] * 3), norm, lines.append)
    assert lines == []


def test_a_norm_that_is_not_finite_does_not_enter_the_usual_one():
    guard = guards.StepGuard(max_seq_ratio=0)
    lines = []
    quiet = info_of([0.1] * 3, [0.1] * 3)
    for norm in [0.5] * 12 + [float("nan"), float("inf")] * 6 + [0.5] * 3:
        guard.report_grad_spike(quiet, norm, lines.append)
    assert lines == []
    guard.report_grad_spike(quiet, 50.0, lines.append)
    assert len(lines) == 1


def test_the_usual_norm_is_saved_with_the_run():
    guard = guards.StepGuard(max_seq_ratio=0)
    lines = []
    quiet = info_of([0.1] * 3, [0.1] * 3)
    for _ in range(10):
        guard.report_grad_spike(quiet, 0.5, lines.append)
    saved = guard.state_dict()
    guard.report_grad_spike(quiet, 0.5, lines.append)
    assert len(saved["grad_norms"]) == 10  # later steps do not change what was saved
    resumed = guards.StepGuard(max_seq_ratio=0)
    resumed.load_state_dict(saved)
    resumed.report_grad_spike(quiet, 50.0, lines.append)
    assert len(lines) == 1


# ---- a gradient that must not be used


def test_a_bad_step_stops_or_is_skipped():
    guard, steps, saved = guards.StepGuard(max_seq_ratio=0), Steps(), []
    problem = guard.find_problem(float("nan"), 1.0)
    with pytest.raises(UserError, match=r"step 7: loss nan.*its prompts: p, q.*--on-bad-step skip"):
        guard.stop_or_skip(problem, {"q", "p"}, steps, "stop", lambda: saved.append(1))
    assert saved == [1]
    assert guard.stop_or_skip(problem, {"q"}, steps, "skip", lambda: saved.append(2))
    assert saved == [1] and steps.lines[0].startswith("skipped: loss nan")
    assert not guard.stop_or_skip(guard.find_problem(1.0, 1.0), {"q"}, steps, "stop", None)


def test_a_later_update_of_a_step_is_left_out_not_saved():
    guard, steps, saved = guards.StepGuard(max_seq_ratio=2), Steps(), []
    info = info_of([0.1] * 3, [0.1] * 3) | dict(
        loss=torch.tensor([0.0, float("nan"), 0.0]),
        log_ratio=torch.zeros(3),
        num_tokens=torch.ones(3),
    )
    reject = dict(prompt_ids=["d"], steps=steps, save_before=lambda: saved.append(1))
    assert guard.rejects(info, 1.0, update=1, on_bad_step="stop", **reject)
    assert saved == [] and "a, b, c, d" in steps.lines[0]
    with pytest.raises(UserError, match="step 7"):
        guard.rejects(info, 1.0, update=0, on_bad_step="stop", **reject)
    assert saved == [1]
    fine = info | dict(loss=torch.zeros(3))
    assert not guard.rejects(fine, 1.0, update=0, on_bad_step="stop", **reject)


def test_ten_bad_steps_in_a_row_stop_even_with_skip():
    guard, steps, saved = guards.StepGuard(max_seq_ratio=0), Steps(), []
    for _ in range(guards.COLLAPSE_STEPS - 1):
        problem = guard.find_problem(1.0, float("inf"))
        assert guard.stop_or_skip(problem, {"q"}, steps, "skip", lambda: saved.append(1))
    problem = guard.find_problem(1.0, float("inf"))
    with pytest.raises(UserError):
        guard.stop_or_skip(problem, {"q"}, steps, "skip", lambda: saved.append(1))
    assert saved == [1] and guard.report() == {"steps_skipped": 10}


def test_bad_steps_by_hand():
    guard, nan = guards.StepGuard(max_seq_ratio=100), float("nan")
    assert guard.find_problem(0.5, 1.0) is None
    assert "gradient norm nan" in guard.find_problem(0.5, nan)
    assert "loss inf" in guard.find_problem(float("inf"), 2.0)
    assert "--max-seq-ratio 100" in guard.find_problem(0.5, 1.0, 101.0)
    assert guard.num_skipped == 3 and guard.num_bad_in_a_row == 3
    assert guard.find_problem(0.5, 1.0, 100.0) is None and guard.num_bad_in_a_row == 0
    assert "10th bad step in a row" in [guard.find_problem(nan, 1.0) for _ in range(10)][-1]
    assert guards.StepGuard(0).find_problem(0.5, 1.0, 1e9) is None


# ---- a policy that has collapsed


def test_collapses_by_hand():
    guard = guards.StepGuard(100)
    no_entropy, cut_off = step_report(entropy=1e-5), step_report(**{"completions/clipped_ratio": 1})
    assert [guard.find_collapse(no_entropy) for _ in range(9)] == [None] * 9
    assert "entropy" in guard.find_collapse(no_entropy)
    assert guard.find_collapse(step_report()) is None  # it has recovered
    assert [guard.find_collapse(cut_off) for _ in range(9)] == [None] * 9
    assert "--max-new-tokens" in guard.find_collapse(cut_off)
    # a model that has never ended a completion has not collapsed
    short = guards.StepGuard(100)
    assert [short.find_collapse(cut_off) for _ in range(30)] == [None] * 30


# ---- nothing is learned


def step_report(**changes):
    report = {
        "completions/clipped_ratio": 0.0,
        "frac_reward_zero_std": 0.0,
        "advantage_zero_frac": 0.1,
        "grad_norm": 0.5,
        "entropy": 1.0,
    }
    return report | changes


@pytest.mark.parametrize(
    "changes, flag",
    [
        ({"completions/clipped_ratio": 1.0, "grad_norm": 0.0}, "--max-new-tokens"),
        ({"frac_reward_zero_std": 1.0, "advantage_zero_frac": 1.0}, "--reward-weights"),
        ({"grad_norm": 0.0}, "--lora-rank"),
    ],
)
def test_a_run_that_learns_nothing_says_why(changes, flag):
    guard, lines = guards.StepGuard(max_seq_ratio=0), []
    report = step_report(**changes)
    for _ in range(guards.IDLE_STEPS - 1):
        guard.find_collapse(report)
        guard.warn_if_idle(report, lines.append)
    assert lines == []
    for _ in range(20):  # once, not at every step
        guard.find_collapse(report)
        guard.warn_if_idle(report, lines.append)
    assert len(lines) == 1 and flag in lines[0]


def test_a_step_with_a_signal_starts_the_count_anew():
    guard, lines = guards.StepGuard(max_seq_ratio=0), []
    idle = step_report(frac_reward_zero_std=1.0, advantage_zero_frac=1.0)
    for report in [*[idle] * (guards.IDLE_STEPS - 1), step_report()] * 3:
        guard.warn_if_idle(report, lines.append)
    assert lines == []


def test_completions_that_are_cut_off_late_are_a_collapse_not_idleness():
    guard, lines = guards.StepGuard(max_seq_ratio=0), []
    guard.find_collapse(step_report())  # some end by themselves
    cut_off = step_report(**{"completions/clipped_ratio": 1.0})
    for _ in range(guards.COLLAPSE_STEPS - 1):
        assert guard.find_collapse(cut_off) is None
        guard.warn_if_idle(cut_off, lines.append)
    assert "cut off" in guard.find_collapse(cut_off) and lines == []
