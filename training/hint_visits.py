"""
A visit of a prompt: whether it carries its hint. The rules are in hints.py; here is what they need to
know (is the prompt solved, has the policy moved on it), gathered from all ranks.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

import hints
from data.row_stream import read_on_all_ranks
from models.policy import completion_logprobs
from run import processes
from run.errors import out_of_memory_advice
from teachers.leaks import hint_leak

KL_SAMPLES = 8  # stored completions from which KL(b || pi) is estimated [U7]


class HintVisits:
    """
    schedule     hints.HintSchedule
    buffer       ReplayBuffer
    clip_cache   ClipCache     makes the prompt of a row with its hint
    policy       Policy
    dummy        WeightedGroup of weight 0 (training/micro_batches.py)
    temperature  float         of the log-probs
    """

    def __init__(self, *, schedule, buffer, clip_cache, policy, dummy, temperature):
        self.schedule = schedule
        self.buffer = buffer
        self.clip_cache = clip_cache
        self.policy = policy
        self.dummy = dummy
        self.temperature = temperature

    def add_hints(self, step, rows, prompts, tell):
        """
        Chooses the prompts of a step that carry their hint, and puts the hints in.        [HINT]

        rows      list of P dict, of all ranks
        prompts   list of Prompt, this rank's slice of them
        tell      callable(str)     prints a line about the step
        returns   prompts, some of them with their hint; set of the hinted prompt_ids of all ranks
        """
        hint_of = {}
        for row in rows:
            hint = check_hint(row, refused=self.schedule.refused, tell=tell)
            if hint:
                hint_of[row["prompt_id"]] = (row, hint)
        prompt_ids = [row["prompt_id"] for row in rows]
        local = processes.local_slice(len(rows))
        local_prompts = dict(zip(prompt_ids[local], prompts))

        self._observe(step, prompt_ids, hint_of, local_prompts, tell)

        hinted = {prompt_id for prompt_id in hint_of if self.schedule.due(prompt_id)}
        wanted = {q: hint_of[q] for q in prompt_ids[local] if q in hinted}
        hinted_prompts, too_long = read_on_all_ranks(self.clip_cache, wanted)
        for prompt_id, problem in too_long.items():
            self.schedule.refused.add(prompt_id)
            hinted.discard(prompt_id)
            tell(f"hint refused: {problem}")
        prompts = [hinted_prompts.get(q, prompt) for q, prompt in zip(prompt_ids[local], prompts)]
        return prompts, hinted

    def _observe(self, step, prompt_ids, hint_of, local_prompts, tell):
        """Tells the schedule about this visit of each prompt. Hints enter and leave here."""
        plain, solved = {}, {}
        for prompt_id in prompt_ids:
            stored = self.buffer.entries_of(prompt_id, step)
            plain[prompt_id] = [entry for entry in stored if not entry.hinted]
            solved[prompt_id] = is_solved(plain[prompt_id])

        # the KL costs a forward pass: only where a hint could enter at this visit
        stored_groups = {}
        for prompt_id, prompt in local_prompts.items():
            tier = self.buffer.tier(prompt_id)
            could_enter = self.schedule.needs_kl(prompt_id, tier, solved[prompt_id])
            if could_enter and prompt_id in hint_of and plain[prompt_id]:
                stored_groups[prompt_id] = (prompt, plain[prompt_id][-KL_SAMPLES:])
        kls = stored_kls(self.policy, stored_groups, self.dummy, self.temperature)

        for prompt_id in dict.fromkeys(prompt_ids):  # once, even if an epoch ends inside the step
            event = self.schedule.observe(
                prompt_id,
                tier=self.buffer.tier(prompt_id),
                solved=solved[prompt_id],
                behavior_kl=kls.get(prompt_id),
            )
            if event:
                tell(f"hint {event}: {prompt_id}")


def check_hint(row, refused, tell):
    """
    The row's hint, unless it gives the answer away: then it is refused, once.

    refused  set of prompt_ids whose hint cannot be used; grows
    tell     callable(str)     prints a line
    returns  str or None
    """
    prompt_id = row["prompt_id"]
    hint = row.get("hint")
    if not hint or prompt_id in refused:
        return None
    reason = hint_leak(hint, row["answer"], row["answer_type"], row.get("options"))
    if reason:
        refused.add(prompt_id)
        tell(f"hint refused: {prompt_id}: {reason}")
        return None
    return hint


def is_solved(plain_entries):
    """Whether any unhinted completion from the prompt's last unhinted visit is correct."""
    if not plain_entries:
        return False
    last_visit = plain_entries[-1].born_step
    return any(e.reward_parts["acc"] == 1 for e in plain_entries if e.born_step == last_visit)


@out_of_memory_advice(
    "reading stored completions again: lower --max-frames or --max-pixels, or --no-hints"
)
def stored_kls(policy, stored_groups, dummy, temperature):
    """
    How far the policy has moved from the ones that sampled the stored completions.  [HINT.KL]

    stored_groups  {prompt_id: (Prompt, list of Entry)}, this rank's
    dummy          WeightedGroup: ranks with fewer groups read it, as FSDP needs it
    returns        {prompt_id: nats per token}, of all ranks
    """
    kls = {}
    dummy_item = (None, (dummy.prompt, dummy.entries))
    for item, _ in processes.even_rounds(list(stored_groups.items()), dummy_item):
        prompt_id, (prompt, entries) = item
        completions = [entry.completion_ids.long() for entry in entries]
        with torch.no_grad():
            logprobs, completion_mask, _ = completion_logprobs(
                policy, [prompt], [completions], temperature
            )
        old_logprobs = pad_sequence([e.old_logprobs for e in entries], batch_first=True)
        kl = hints.behavior_kl(logprobs, old_logprobs.to(logprobs), completion_mask)
        if prompt_id is not None:
            kls[prompt_id] = kl
    return processes.all_gather_dict(kls)
