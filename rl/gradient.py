"""
The parts of a step that read completions again: the gradient of [J], over fresh and replayed ones, in
packed micro-batches; and how far the policy has moved on stored ones, which decides about hints.
N completions in all, G of a group.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

import tas
from grpo import group_advantages, grpo_loss, replay_advantages
from models.policy import completion_logprobs
from run import optim, processes


def fresh_gradient(policy, reference, prompts, made, filler, step, args):
    """
    Adds the gradient of J_on: each fresh completion against the others of its prompt.

    prompts  this rank's slice of the step's Prompts
    made     list of lists of Entry, a prompt of the step each
    returns  infos as `gradient`; advantages, a list of (G,)
    """
    advantages = [group_advantages(torch.tensor([e.reward for e in group])) for group in made]
    weight = 1 / max(sum(map(len, made)), 1)  # [J.on]
    own = enumerate(prompts, processes.local_slice(len(made)).start)
    groups = [(prompt, made[i], advantages[i], weight) for i, prompt in own]
    infos = gradient(policy, reference, groups, filler, step, args)
    share_reference(made)
    return infos, advantages


def replayed_gradient(policy, reference, prompts, drawn, mean_reward, filler, step, args):
    """
    Adds the gradient of alpha J_off: each replayed completion against what its prompt now usually earns.

    prompts      {place in `drawn`: Prompt}, this rank's
    drawn        list of lists of Entry, a stored prompt each
    mean_reward  callable(prompt_id) -> R̄(q)
    returns      infos as `gradient`; advantages, a list of (M,)
    """
    replayed = [e for group in drawn for e in group]
    earned = torch.tensor([e.reward for e in replayed])
    usual = torch.tensor([mean_reward(e.prompt_id) for e in replayed])
    advantages = replay_advantages(earned, usual).split([len(group) for group in drawn])
    weight = args.off_policy_coef / max(len(replayed), 1)  # [J.off]
    groups = [(prompt, drawn[i], advantages[i], weight) for i, prompt in prompts.items()]
    infos = gradient(policy, reference, groups, filler, step, args)
    share_reference(drawn)
    return infos, advantages


def gradient(policy, reference, groups, filler, step, args):
    """
    Adds a gradient over micro-batches; a prompt is read once for all its completions.

    groups   list of (Prompt, list of G Entry, advantages (G,), weight of each in J), this rank's
    filler   (Prompt, [Entry]): what a rank reads that has less to do than others, with weight 0
    returns  list, of all ranks, of dicts of tensors, a number a completion; of lists: the prompt_ids, and
             of each completion its tokens' tas_weights and log_ratios
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
    entries = [e for _, group, _, _ in groups for e in group]
    # one answer for all ranks: what one of them reads, all read
    known = all(processes.all_gather_object(all(e.ref_logprobs is not None for e in entries)))
    infos = []
    idle = [(filler[0], [(entry, 0.0, 0.0) for entry in filler[1]])]
    for part, counts in processes.even_rounds(packs, idle):
        prompts = [prompt for prompt, _ in part]
        completions = [[e.completion_ids.long() for e, _, _ in items] for _, items in part]
        entries, advantages, weights = zip(*(item for _, items in part for item in items))
        inputs = (prompts, completions, args.temperature)

        logprobs, mask, entropy = completion_logprobs(policy, *inputs)
        # of the policy that sampled the completion: this one if fresh, an earlier one if replayed
        old_logprobs = pad_sequence([e.old_logprobs for e in entries], True).to(logprobs)
        ref_logprobs = None
        if args.kl_coef:
            if not known:
                with torch.no_grad(), policy.reference():
                    ref, _, _ = completion_logprobs(reference or policy, *inputs)
                for e, row in zip(entries, ref.cpu()):
                    e.ref_logprobs = row[: len(e.completion_ids)].clone()
            ref_logprobs = pad_sequence([e.ref_logprobs for e in entries], True).to(logprobs)
        name, equal_mean = args.tas_shape.removesuffix("-mean1"), args.tas_shape.endswith("-mean1")
        shape = (mask, name, args.tas_lambda, equal_mean)
        token_advantages = tas.shape_advantages(torch.tensor(advantages).to(logprobs), *shape)
        loss, info = grpo_loss(
            logprobs,
            old_logprobs,
            ref_logprobs,
            token_advantages,
            mask,
            torch.tensor(weights).to(logprobs),
            args.clip_eps,
            args.kl_coef,
            args.algo == "avatar-gspo",
        )
        # the weights are those of a sum over all ranks, and FSDP takes the mean over ranks
        (loss * processes.world_size()).backward()
        if counts:
            lengths, tas_weights = mask.sum(1), tas.tas_weights(*shape)
            info["entropy"] = (entropy * mask).sum(1) / lengths
            info["tas_weight"] = tas_weights.sum(1) / lengths
            info["age"] = torch.tensor([step - e.born_step for e in entries])
            info["fresh"] = info["age"] == 0
            infos.append({name: value.cpu() for name, value in info.items()})
            infos[-1]["prompt_id"] = [e.prompt_id for e in entries]
            tokens = dict(tas_weights=tas_weights, log_ratios=logprobs.detach() - old_logprobs)
            for (
                name,
                rows,
            ) in tokens.items():  # for those who look at single tokens: rl/samples.py
                infos[-1][name] = [row[:n] for row, n in zip(rows.tolist(), lengths.tolist())]
    return [info for part in processes.all_gather_object(infos) for info in part]


def concat_infos(infos):
    """infos of `gradient` -> one dict of (N,) tensors and of lists of N."""
    parts = {name: [info[name] for info in infos] for name in infos[0]}
    return {k: torch.cat(v) if torch.is_tensor(v[0]) else sum(v, []) for k, v in parts.items()}


def share_reference(groups):
    """Every rank learns the reference's log-probs of all entries, so that all store the same."""
    entries = [e for group in groups for e in group]
    known = {i: e.ref_logprobs for i, e in enumerate(entries) if e.ref_logprobs is not None}
    for part in processes.all_gather_object(known):
        for i, ref_logprobs in part.items():
            entries[i].ref_logprobs = ref_logprobs
