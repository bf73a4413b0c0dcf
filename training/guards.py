"""
When the numbers of a step say that it must not change the weights, that the policy has collapsed, or
that nothing is being learned.
"""

import math
from statistics import median

import torch

from run import processes
from run.errors import UserError
from run.resume import resume_command

COLLAPSE_STEPS = 10  # in a row that end the run: bad ones, or ones of a collapsed policy
SPIKE = 20  # times the usual gradient norm: a step above it is reported
MIN_NORMS, MAX_NORMS = 10, 50  # gradient norms in the usual one, a median: at least, at most
MIN_ENTROPY = 1e-4  # nats per token: below it the policy writes the same again and again
IDLE_STEPS = 5  # steps in a row without anything to learn from, before the run says so


class StepGuard:
    """
    max_seq_ratio  above which a completion's ratio makes a step bad; 0 = no limit

    The ratio is pi / b, the geometric mean over the completion's tokens: a single unlikely token may
    have a huge one. For fresh completions b / pi counts too. A replayed one may fall as far as it likes:
    the policy may have given it up.
    """

    def __init__(self, max_seq_ratio):
        self.max_seq_ratio = max_seq_ratio
        self.num_skipped = 0  # bad steps so far
        self.num_bad_in_a_row = 0
        self.num_without_entropy = 0  # steps in a row with an entropy below MIN_ENTROPY
        self.num_cut_off = 0  # steps in a row in which every completion was cut off
        self.any_ended = False  # whether any completion has ended by itself yet
        self.grad_norms = []  # of the latest steps
        self.num_idle = {}  # cause -> steps in a row

    STATE = (
        "num_skipped",
        "num_bad_in_a_row",
        "num_without_entropy",
        "num_cut_off",
        "any_ended",
        "grad_norms",
        "num_idle",
    )

    def state_dict(self):
        state = {name: getattr(self, name) for name in self.STATE}
        return state | dict(grad_norms=list(self.grad_norms), num_idle=dict(self.num_idle))

    def load_state_dict(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])
        self.num_bad_in_a_row = 0  # whoever resumes wants to go on

    def report(self):
        """Metrics so far."""
        return {"steps_skipped": self.num_skipped}

    # ---- a gradient that must not be used ------------------------------------------------------

    def rejects(self, info, grad_norm, *, update, prompt_ids, steps, on_bad_step, save_before):
        """
        Whether the gradient of an RL update must not be used. Reports a spike of its norm, and ends
        the run at a bad step, unless it is to be skipped.

        info          dict of gather_infos
        update        int        of the step, from 0
        prompt_ids    of the step's fresh prompts
        save_before   callable() that saves the state before the step
        """
        if update == 0:
            self.report_grad_spike(info, grad_norm, steps.tell)
        loss = info["loss"].sum().item()
        problem = self.find_problem(loss, grad_norm, worst_seq_ratio(info), update)
        return self.stop_or_skip(
            problem,
            prompt_ids={*prompt_ids, *info["prompt_id"]},
            steps=steps,
            on_bad_step=on_bad_step,
            # an earlier update of the step has moved the weights: nothing from before is left
            save=save_before if update == 0 else None,
        )

    def find_problem(self, loss, grad_norm, ratio=1.0, update=0):
        """
        What is wrong with a gradient, before it is applied (str), or None. Counts the bad steps.

        ratio    float    of the completion that has moved farthest, from worst_seq_ratio
        update   int      of the step, from 0: only the first counts as the step's       [U19]
        """
        problem = None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            problem = f"loss {loss:g}, gradient norm {grad_norm:g}"
        elif self.max_seq_ratio and ratio > self.max_seq_ratio:
            problem = f"a mean ratio of {ratio:.3g}, over --max-seq-ratio {self.max_seq_ratio:g}"
        if update > 0:
            return problem

        if problem is None:
            self.num_bad_in_a_row = 0
            return None
        self.num_skipped += 1
        self.num_bad_in_a_row += 1
        if self.num_bad_in_a_row >= COLLAPSE_STEPS:
            problem += f", the {COLLAPSE_STEPS}th bad step in a row"
        return problem

    def stop_or_skip(self, problem, prompt_ids, steps, on_bad_step, save):
        """
        Ends the run at a step with bad numbers, or prints that the step is skipped.

        problem      str or None, from find_problem
        prompt_ids   of the step
        steps        run.processes.Steps
        on_bad_step  "stop" or "skip"
        save         callable() that saves the state before the step; None if an earlier update of
                     the step has moved the weights: then only the rest of the step is skipped
        returns      bool   whether the gradient must not be used
        """
        if not problem:
            return False
        problem = f"{problem}; its prompts: {', '.join(sorted(prompt_ids))}"
        must_stop = on_bad_step == "stop" or self.num_bad_in_a_row >= COLLAPSE_STEPS
        if save and must_stop:
            save()
            remedy = "Start a new run with a lower --lr"
            if on_bad_step == "stop":
                command = resume_command("--on-bad-step", "skip")
                remedy += f", or resume and skip such steps: {command}"
            raise UserError(
                f"step {steps.step}: {problem}. Saved a checkpoint from just before this step. {remedy}"
            )
        steps.tell(f"skipped: {problem}")
        return True

    def report_grad_spike(self, info, grad_norm, tell):
        """
        Reports a gradient norm far above the usual, with the loss term and the prompt that
        contribute most. The run continues: the gradient is clipped.

        info   dict of (N,) tensors, a number per completion, and prompt_id, a list of N
        """
        if not math.isfinite(grad_norm):
            return  # find_problem reports it; in the median it would spoil the next 50 steps
        is_known = len(self.grad_norms) >= MIN_NORMS
        usual = median(self.grad_norms) if is_known else math.inf
        self.grad_norms = [*self.grad_norms, grad_norm][-MAX_NORMS:]
        if grad_norm <= SPIKE * usual:
            return
        scales = {term: info[f"{term}_grad_scale"] for term in ("surrogate", "kl")}
        term = max(scales, key=lambda term: scales[term].max())
        i = int(scales[term].argmax())
        kind = "fresh" if info["fresh"][i] else f"replayed, {info['age'][i]} steps old"
        tell(
            f"gradient norm {grad_norm:.3g}, {grad_norm / usual:.0f} times the usual: most of it "
            f"from the {term} of {info['prompt_id'][i]} ({kind})"
        )

    # ---- a policy that has collapsed, or learns nothing ----------------------------------------

    def stop_if_collapsed(self, report):
        """Ends the run if the policy has collapsed.  report: the step's metrics"""
        problem = self.find_collapse(report)
        if problem:
            first_step = report["step"] - COLLAPSE_STEPS + 1
            raise UserError(
                f"step {report['step']}: {problem}: the policy collapsed at step {first_step}: "
                "start a new --out with a lower --lr"
            )

    def find_collapse(self, report):
        """What went wrong with the policy (str) for COLLAPSE_STEPS steps in a row, or None."""
        is_cut_off = report["completions/clipped_ratio"] == 1
        has_no_entropy = report["entropy"] < MIN_ENTROPY
        if not is_cut_off:
            self.any_ended = True
        # before any has ended by itself, --max-new-tokens is too low: see idle_cause
        self.num_cut_off = self.num_cut_off + 1 if is_cut_off and self.any_ended else 0
        self.num_without_entropy = self.num_without_entropy + 1 if has_no_entropy else 0
        if self.num_without_entropy >= COLLAPSE_STEPS:
            return f"entropy below {MIN_ENTROPY:g} nats in {COLLAPSE_STEPS} steps in a row"
        if self.num_cut_off >= COLLAPSE_STEPS:
            return f"every completion of {COLLAPSE_STEPS} steps in a row was cut off by --max-new-tokens"
        return None

    def warn_if_idle(self, report, tell):
        """Prints one line when IDLE_STEPS steps in a row gave nothing to learn from."""
        causes = idle_causes(report, self.any_ended)
        for cause in IDLE_CAUSES:
            self.num_idle[cause] = self.num_idle.get(cause, 0) + 1 if cause in causes else 0
        for cause in causes:
            if self.num_idle[cause] == IDLE_STEPS:
                tell(f"nothing learned in {IDLE_STEPS} steps: {IDLE_CAUSES[cause]}")
                return  # the first cause explains the others


IDLE_CAUSES = {  # the most specific first
    "cut off": "every completion was cut off: raise --max-new-tokens, or begin with stage 0 "
    "(train_sft.py), which teaches the format",
    "equal rewards": "all rewards were equal in every group, so all advantages are 0: look at "
    "samples.jsonl; are the answers parsed, are prompts too easy or too hard, are all "
    "--reward-weights 0?",
    "no gradient": "the gradient is 0: does anything train (--lora-rank, --lr)?",
}


def idle_causes(report, any_ended):
    """Why a step taught nothing, the most specific cause first: a list of keys of IDLE_CAUSES."""
    causes = []
    if report["completions/clipped_ratio"] == 1 and not any_ended:
        causes.append("cut off")
    if report["frac_reward_zero_std"] == 1 and report["advantage_zero_frac"] == 1:
        causes.append("equal rewards")
    if report["grad_norm"] == 0:
        causes.append("no gradient")
    return causes


def worst_seq_ratio(info):
    """pi / b of the completion that has moved farthest, as the geometric mean over its tokens."""
    drift = info["log_ratio"] / info["num_tokens"]
    # a stored completion may be given up (ratio 0); a fresh one must not move either way
    return torch.where(info["fresh"], drift.abs(), drift).max().exp().item()


def stop_if_broken(step, groups):
    """Ends the run if weights are broken.  groups: this rank's lists of Completion"""
    is_finite = all(c.logprobs.isfinite().all() for group in groups for c in group)
    if not all(processes.all_gather_object(is_finite)):
        raise UserError(
            f"step {step}: the policy's log-probs are not finite, its weights are broken: start a "
            "new --out with a lower --lr, or remove the newest checkpoints and --resume"
        )
