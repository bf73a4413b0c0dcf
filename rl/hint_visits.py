"""
Which prompts of a step carry their hint.
"""

import functools

import torch
from torch.nn.utils.rnn import pad_sequence

import hints
from data.row_stream import read_on_all_ranks
from models.policy import completion_logprobs
from run import processes
from teachers.leaks import usable_hint

KL_SAMPLES = 8  # stored completions that tell whether the policy still moves on a prompt [U7]


def give_hints(replay, schedule, clip_cache, policy, filler, steps, step_rows, prompts, args):
    """
    Which prompts of the step carry their hint                                             [HINT]

    returns  prompts, this rank's, some of them with their hints; all ranks' hinted prompt_ids
    """
    mine, ids = processes.local_slice(len(step_rows)), [row["prompt_id"] for row in step_rows]
    usable = functools.partial(usable_hint, refused=schedule.refused, tell=processes.print0)
    told = {row["prompt_id"]: (row, hint) for row in step_rows if (hint := usable(row))}
    plain = {q: [e for e in replay.entries_of(q, steps.step) if not e.hinted] for q in ids}
    solved = {q: is_solved(entries) for q, entries in plain.items()}
    stored = {}
    for q, prompt in zip(ids[mine], prompts):
        if plain[q] and q in told and schedule.needs_kl(q, replay.tier(q), solved[q]):
            stored[q] = (prompt, plain[q][-KL_SAMPLES:])
    kls = stored_kls(policy, stored, filler, args.temperature)
    for q in dict.fromkeys(ids):  # once, also if the end of an epoch brings a prompt twice
        if event := schedule.observe(q, replay.tier(q), solved[q], kls.get(q)):
            steps.tell(f"hint {event}: {q}")
    hinted = {q for q in told if schedule.due(q)}
    found, too_long = read_on_all_ranks(clip_cache, {q: told[q] for q in ids[mine] if q in hinted})
    for q, problem in too_long.items():
        schedule.refused.add(q)
        hinted.discard(q)
        processes.print0(f"hint refused: {problem}")
    return [found.get(q, prompt) for q, prompt in zip(ids[mine], prompts)], hinted


def is_solved(entries):
    """Whether one of a prompt's plain entries, of its last visit, is right."""
    return any(e.reward_parts["acc"] == 1 for e in entries if e.born_step == entries[-1].born_step)


def stored_kls(policy, stored, filler, temperature):
    """
    How far the policy has moved from the ones that sampled the stored completions.  [HINT.KL]

    stored   {prompt_id: (Prompt, list of Entry)}, this rank's
    filler   as for `gradient`
    returns  {prompt_id: nats per token}, of all ranks
    """
    kls = {}
    for (prompt_id, (prompt, entries)), _ in processes.even_rounds(
        list(stored.items()), (None, filler)
    ):
        completions = [e.completion_ids.long() for e in entries]
        with torch.no_grad():
            logprobs, mask, _ = completion_logprobs(policy, [prompt], [completions], temperature)
        old_logprobs = pad_sequence([e.old_logprobs for e in entries], True).to(logprobs)
        kls[prompt_id] = hints.behavior_kl(logprobs, old_logprobs, mask)
    kls.pop(None, None)
    return {q: kl for part in processes.all_gather_object(kls) for q, kl in part.items()}
