"""
Hints, arXiv:2508.03100: when a prompt gets one, when it loses it, and where it stands in the text.
Python and torch only: copy this file freely.

A prompt that stays Hard while the policy has stopped moving on it would yield no reward forever. A
short strategic suggestion, written beforehand by a teacher, gets it off the ground.

A hint changes the text of a prompt, never its prompt_id, which stays the key everywhere.
"""

import torch


def behavior_kl(logprobs, old_logprobs, completion_mask):
    """
    KL(b || pi) ~ mean_t [exp(d_t) - 1 - d_t],   d_t = log pi(c_t) - log b(c_t)      [HINT.KL]
    How far the present policy has moved away from the one that sampled these completions.

    logprobs         (N, T) float         nats, present policy
    old_logprobs     (N, T) float         nats, behaviour policy b, as stored
    completion_mask  (N, T) bool or 0/1   1 up to and including EOS
    returns          float >= 0           nats per token; d is clamped to [-20, 20]
    raises           ValueError           no valid token: an unknown distance is not a small one

    The samples are b's, and E_b[exp(d)] = 1, so the mean estimates KL(b || pi) and not KL(pi || b).
    """
    shapes = [tuple(x.shape) for x in (logprobs, old_logprobs, completion_mask)]
    assert len(set(shapes)) == 1 and logprobs.ndim == 2, f"expected three (N, T), got {shapes}"
    mask = completion_mask.bool()
    if not mask.any():
        raise ValueError(f"no valid token in a completion_mask of shape {tuple(mask.shape)}")
    # select before subtracting: pads may hold -inf; on the CPU for the sake of float64
    new, old = (x.detach()[mask].cpu().double() for x in (logprobs, old_logprobs))
    d = (new - old).clamp(-20, 20)
    return (torch.expm1(d) - d).mean().item()


class HintSchedule:
    """
    enter: Hard and unsolved at `patience` visits in a row, and KL(b || pi) < kl_threshold;
    leave: at the first visit that finds the prompt outside Hard, or solved without its hint   [HINT]

    patience      int >= 1     visits of a prompt, not steps
    kl_threshold  float > 0    nats per token; inf enters on any known KL
    raises        ValueError   out of range, or an unknown tier

    Being Hard is not enough, because tiers are ranks: 40 % of the prompts always are. A hint is for
    prompts that earn nothing: it enters if no plain completion of the last visits was right, and
    leaves once one is, as the prompt then has a signal of its own.
    Hinted rewards do not count in a prompt's mean reward. A prompt sampled only with its hint would
    keep its old mean and its hint forever, so every second visit is plain (`due`).
    """

    def __init__(self, patience, kl_threshold):
        if patience < 1 or not kl_threshold > 0:
            raise ValueError(f"need patience >= 1, kl > 0, got {patience} and {kl_threshold}")
        self.patience = patience
        self.kl_threshold = kl_threshold
        self.entered = 0  # hints so far
        self.withdrawn = 0
        # prompt_ids whose hint is not used: it leaks the answer, or is too long
        self.refused = set()
        self._visits = {}  # prompt_id -> visits, Hard and unsolved, without a break
        self._active = {}  # prompt_id -> visits since its hint entered, in order of entry

    def needs_kl(self, prompt_id, tier, solved):
        """Whether this visit could enter: only then is behavior_kl worth a forward pass."""
        patient = self._visits.get(prompt_id, 0) + 1 >= self.patience
        return tier == "hard" and not solved and patient and prompt_id not in self._active

    def observe(self, prompt_id, tier, solved, behavior_kl):
        """
        One call per visit of a prompt, before it is sampled.                        [HINT]

        tier         "hard" | "medium" | "easy", at present
        solved       bool            whether a plain completion of the last plain visit was right
        behavior_kl  float or None   nats per token; None = unknown (nothing stored): no entry
        returns      "entered" | "withdrawn" | None
        """
        if tier not in ("hard", "medium", "easy"):
            raise ValueError(f"unknown tier {tier!r} of {prompt_id}")
        could_enter = self.needs_kl(prompt_id, tier, solved)
        is_stuck = tier == "hard" and not solved
        self._visits[prompt_id] = self._visits.get(prompt_id, 0) + 1 if is_stuck else 0
        if prompt_id in self._active:
            if not is_stuck:
                del self._active[prompt_id]
                self.withdrawn += 1
                return "withdrawn"
            self._active[prompt_id] += 1
        # nan compares false, so a broken KL does not enter either
        elif could_enter and behavior_kl is not None and behavior_kl < self.kl_threshold:
            self._active[prompt_id] = 0
            self.entered += 1
            return "entered"
        return None

    def due(self, prompt_id):
        """After observe: whether this visit carries the hint, from entry on every second one."""
        visits = self._active.get(prompt_id)  # since its hint entered; None: it has none
        return visits is not None and visits % 2 == 0

    def state_dict(self):
        """Plain lists and numbers: torch.load(weights_only=True) reads it."""
        return {
            "visits": [list(item) for item in self._visits.items()],
            "active": [list(item) for item in self._active.items()],
            "totals": [self.entered, self.withdrawn],
            "refused": sorted(self.refused),
        }

    def load_state_dict(self, state):
        """Continue as the saved schedule would have; patience and kl_threshold stay our own."""
        self._visits = dict(state["visits"])
        self._active = dict(state["active"])
        self.entered, self.withdrawn = state["totals"]
        self.refused = set(state["refused"])

    def report(self):
        """Metrics so far."""
        return {"hints/entered": self.entered, "hints/withdrawn": self.withdrawn}


def place_hint(question, hint):
    """The text of the user turn: the hint stands before the question, which stays as it is."""
    return f"Hint: {hint.strip().removesuffix('.')}.\n{question}"
