"""
One update of the policy: the gradient of [J] over the step's completions, fresh and replayed, in
packed micro-batches; and how far the policy has moved on stored completions.

N completions in all, G of a group.
"""

import run  # before torch: it sets how torch's threads wait

import torch
from torch.nn.utils.rnn import pad_sequence

import hints
import model
import optim
import tas
from grpo import grpo_loss


def update(policy, reference, groups, filler, step, args):
    """
    Adds the step's gradient over micro-batches; a prompt is read once for all its completions.

    groups   list of (Prompt, list of G Entry, advantages (G,), weight of each in J), this rank's
    filler   (Prompt, [Entry]): what a rank reads that has less to do than others, with weight 0
    returns  list, of all ranks, of dicts of tensors, a number a completion, for metrics.py
    """
    pieces = []  # a group larger than --micro-tokens is read in parts
    for prompt, entries, advantages, weight in groups:
        items = [(e, a, weight) for e, a in zip(entries, advantages.tolist())]
        # not less than half: else a long prompt would be read for every completion anew
        room = max(args.micro_tokens - len(prompt.input_ids), args.micro_tokens // 2)
        for pack in optim.micro_batches([len(e.completion_ids) for e, _, _ in items], room):
            pieces.append((prompt, [items[i] for i in pack]))
    sizes = [len(p.input_ids) + sum(len(e.completion_ids) for e, _, _ in i) for p, i in pieces]
    packs = [[pieces[i] for i in pack] for pack in optim.micro_batches(sizes, args.micro_tokens)]
    infos = []
    idle = [(filler[0], [(entry, 0.0, 0.0) for entry in filler[1]])]
    for part, counts in run.rounds(packs, idle):
        prompts = [prompt for prompt, _ in part]
        completions = [[e.completion_ids.long() for e, _, _ in items] for _, items in part]
        entries, advantages, weights = zip(*(item for _, items in part for item in items))
        inputs = (prompts, completions, args.temperature)

        logprobs, mask, entropy = model.completion_logprobs(policy, *inputs)
        # of the policy that sampled the completion: this one if fresh, an earlier one if replayed
        old_logprobs = pad_sequence([e.old_logprobs for e in entries], True).to(logprobs)
        ref_logprobs = None
        if args.kl_coef:
            with torch.no_grad(), policy.reference():
                ref_logprobs, _, _ = model.completion_logprobs(reference or policy, *inputs)
        shape = (mask, args.tas_shape, args.tas_lambda, args.tas_equal_mean)
        token_advantages = tas.shape_advantages(torch.tensor(advantages).to(logprobs), *shape)
        loss, info = grpo_loss(
            logprobs, old_logprobs, ref_logprobs, token_advantages, mask,
            torch.tensor(weights).to(logprobs), args.clip_eps, args.kl_coef,
            args.kl_ratio,
        )  # fmt: skip
        # the weights are those of a sum over all ranks, and FSDP takes the mean over ranks
        (loss * run.world_size()).backward()
        if counts:
            lengths = mask.sum(1)
            info["entropy"] = (entropy * mask).sum(1) / lengths
            info["tas_weight"] = tas.tas_weights(*shape).sum(1) / lengths
            info["fresh"] = torch.tensor([e.born_step == step for e in entries])
            infos.append({name: value.cpu() for name, value in info.items()})
    return [info for part in run.gather(infos) for info in part]


def stored_kls(policy, stored, filler, temperature):
    """
    How far the policy has moved from the ones that sampled the stored completions.  [HINT.KL]

    stored   {prompt_id: (Prompt, list of Entry)}, this rank's
    filler   as for `update`
    returns  {prompt_id: nats per token}, of all ranks
    """
    kls = {}
    for (prompt_id, (prompt, entries)), _ in run.rounds(list(stored.items()), (None, filler)):
        completions = [e.completion_ids.long() for e in entries]
        with torch.no_grad():
            inputs = ([prompt], [completions], temperature)
            logprobs, mask, _ = model.completion_logprobs(policy, *inputs)
        old_logprobs = pad_sequence([e.old_logprobs for e in entries], True).to(logprobs)
        kls[prompt_id] = hints.behavior_kl(logprobs, old_logprobs, mask)
    kls.pop(None, None)
    return {q: kl for part in run.gather(kls) for q, kl in part.items()}
