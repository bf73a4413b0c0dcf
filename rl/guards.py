"""
When the numbers of a step say that it must not change the weights, or that going on is pointless.
"""

import math
from statistics import median

import torch

from run import processes
from run.errors import UserError
from run.resume import resume_command

PATIENCE = 10  # steps in a row that make a collapse
SPIKE = 20  # times the usual gradient norm, above which a step is told
MEDIAN_OF = (10, 50)  # gradient norms that the usual one is the median of: at least, at most
MIN_ENTROPY = 1e-4  # nats a token: below it the policy writes the same again and again


class StepGuard:
    """
    max_ratio     pi / b of a completion (if fresh: also b / pi), as the geometric mean of its
                  tokens; 0 = no limit. A single token may go far: one sampled against the odds that
                  is likely now; and a stored completion may be given up
    """

    def __init__(self, max_ratio):
        self.max_ratio = max_ratio
        # so far; steps in a row; whether any completion has ended by itself yet
        self.state = dict(
            skipped=0, in_a_row=0, without_entropy=0, cut_off=0, ended=False, norms=[]
        )

    def state_dict(self):
        return dict(self.state)  # its list is replaced, never changed

    def load_state_dict(self, state):
        self.state = dict(state, in_a_row=0)  # who resumes wants to go on

    def report(self):
        """Metrics so far."""
        return {"steps_skipped": self.state["skipped"]}

    def bad_step(self, loss, grad_norm, ratio=1.0, again=0):
        """
        What is wrong with a gradient, before it is applied (str), or None.

        again   int     updates of this step before it: only the first one counts as the step's [U19]
        """
        problem = None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            problem = f"loss {loss:g}, gradient norm {grad_norm:g}"
        elif self.max_ratio and ratio > self.max_ratio:
            problem = f"a mean ratio of {ratio:.3g}, over --max-ratio {self.max_ratio:g}"
        if again:
            return problem
        self.state["skipped"] += problem is not None
        self.state["in_a_row"] = self.state["in_a_row"] + 1 if problem else 0
        if self.state["in_a_row"] >= PATIENCE:
            problem += f", the {PATIENCE}th bad step in a row"
        return problem

    def report_grad_spike(self, info, grad_norm, tell):
        """
        A gradient norm far over the usual is told, with the term and the prompt that pull hardest.

        info   dict of (N,) tensors, a number a completion, and their prompt_ids, as of update.joined
        """
        norms = self.state["norms"]
        usual = median(norms) if len(norms) >= MEDIAN_OF[0] else math.inf
        self.state["norms"] = [*norms, grad_norm][-MEDIAN_OF[1] :]
        if grad_norm > SPIKE * usual:
            pulls = {term: info[f"{term}_pull"] for term in ("surrogate", "kl")}
            term = max(pulls, key=lambda term: pulls[term].max())
            i = int(pulls[term].argmax())
            kind = "fresh" if info["fresh"][i] else f"replayed, {info['age'][i]} steps old"
            told = f"gradient norm {grad_norm:.3g}, {grad_norm / usual:.0f} times the usual"
            tell(f"{told}: most of it the {term} of {info['prompt_id'][i]} ({kind})")

    def refuses(self, problem, prompt_ids, steps, on_bad_step, save):
        """
        Ends the run at a step whose numbers are bad, or tells that it is left out.

        problem     str or None, of bad_step
        prompt_ids  of the step
        save        callable: saves the state before the step; None: the step has moved the weights
                    already, and the rest of it is left out
        returns     bool   whether the gradient must not be used
        """
        if not problem:
            return False
        problem = f"{problem}; its prompts: {', '.join(sorted(prompt_ids))}"
        if save and (on_bad_step == "stop" or self.state["in_a_row"] >= PATIENCE):
            save()
            skip = resume_command("--on-bad-step", "skip")
            told = (
                "the state before it is saved: start a new --out with a lower --lr, or leave such"
            )
            raise UserError(f"step {steps.step}: {problem}; {told} steps out: {skip}")
        steps.tell(f"skipped: {problem}")
        return True

    def stop_if_collapsed(self, report):
        """Ends the run where the policy has collapsed."""
        if problem := self.collapse(report):
            told = f"the policy has collapsed at step {report['step'] - PATIENCE + 1}"
            told += ": start a new --out with a lower --lr"
            raise UserError(f"step {report['step']}: {problem}: {told}")

    def collapse(self, report):
        """What went wrong with the policy (str) after PATIENCE steps of it in a row, or None."""
        state, cut_off = self.state, report["completions/clipped_ratio"] == 1
        state["ended"] |= not cut_off  # before that it is --max-new-tokens that is too low
        low = report["entropy"] < MIN_ENTROPY
        state["without_entropy"] = state["without_entropy"] + 1 if low else 0
        state["cut_off"] = state["cut_off"] + 1 if cut_off and state["ended"] else 0
        if state["without_entropy"] >= PATIENCE:
            return f"entropy below {MIN_ENTROPY:g} nats in {PATIENCE} steps in a row"
        if state["cut_off"] >= PATIENCE:
            return f"every completion of {PATIENCE} steps in a row was cut off by --max-new-tokens"


def worst_ratio(info):
    """The pi / b of a completion that has moved farthest, as the geometric mean of its tokens."""
    drift = info["log_ratio"] / info["num_tokens"]  # a stored one may be given up: ratio 0
    return torch.where(info["fresh"], drift.abs(), drift).max().exp().item()


def stop_if_broken(step, groups):
    """groups: lists of Completion, this rank's. Ends the run where weights have become nonsense."""
    finite = all(c.logprobs.isfinite().all() for group in groups for c in group)
    if not all(processes.all_gather_object(finite)):
        raise UserError(
            f"step {step}: the policy's log-probs are not finite, its weights are broken: start a "
            "new --out with a lower --lr, or remove the newest checkpoints and --resume"
        )
