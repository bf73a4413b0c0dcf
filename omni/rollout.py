"""
The sampling loop: prompts are read once, the completions of all of them are decoded together, and
the log-prob of every sampled token is recorded under the distribution it was sampled from.

Prompts that hold the very same media (one object: the questions about one clip) are a family. What
they begin with alike, the clip above all, is encoded and read once for the whole family.

B prompts, G completions each, F families, P prompt tokens, T completion tokens, V vocabulary.
"""

from typing import NamedTuple

import torch

from omni.attention import DecodeAttention, PackedAttention
from run.graphs import record
from run.sharding import gathered


class Completion(NamedTuple):
    """One sampled completion; the length is the mask, EOS included."""

    ids: torch.Tensor  # (T,) int64
    logprobs: torch.Tensor  # (T,) float32, nats, of the policy that sampled it, at its temperature
    truncated: bool  # max_new_tokens came before EOS


@torch.no_grad()
def rollout(policy, prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds):
    """
    Samples completions of all prompts together and records their log-probs.

    prompts          list of B Prompt
    num_completions  list of B int
    temperature      float      0 = greedy (log-probs are then those at temperature 1)
    max_new_tokens   int
    eos_ids          list of int    any of them ends a completion and belongs to it
    seeds            list of B int  one a prompt: its neighbours do not change what it gets
    returns          list of B lists of Completion

    [D3] Nothing is truncated (no top-k, no top-p): the recorded log-probs are those of the full
    distribution that was sampled, which is what `completion_logprobs` recomputes.
    """
    given = prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds
    return policy(lambda policy: _rollout(policy, *given))


def _rollout(policy, prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds):
    device, group_size, num_prompts = policy.device, max(num_completions), len(prompts)
    # all randomness of the rollout, drawn before it: (B G, T)
    noise = torch.zeros(num_prompts, group_size, max_new_tokens, dtype=torch.float64)
    for row, count, seed in zip(noise, num_completions, seeds):
        generator = torch.Generator().manual_seed(seed)
        row[:count] = torch.rand(count, max_new_tokens, generator=generator, dtype=torch.float64)
    noise = noise.flatten(0, 1).to(device)
    num_slots = len(noise) + 1  # the last takes what rows write that decode nothing
    ids = torch.zeros(num_slots, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(ids.shape, device=device)
    length = torch.zeros(num_slots, dtype=torch.long, device=device)
    ended = torch.zeros(num_slots, dtype=torch.bool, device=device)
    eos = torch.tensor(eos_ids, device=device)

    # a row decodes one completion; slot[row] says which, -1 if the row is only there to fill up
    families = families_of(prompts)
    slots = [[b * group_size + g for b in f for g in range(num_completions[b])] for f in families]
    width = max(map(len, slots))  # rows of a family
    slot = torch.tensor([s + [-1] * (width - len(s)) for s in slots], device=device).flatten()
    owner = slot.clamp(min=0) // group_size  # (rows,) the prompt that a row goes on from
    num_alive = len(slot)
    with gathered(policy):
        logits, attention = prefill(policy, prompts, families, owner)
        logits = logits[owner]  # (rows, V)
        after = torch.tensor([int(p.position_ids.max()) + 1 for p in prompts], device=device)
        after = after[owner]

        def decode_plainly(token, position):
            """A token of every row, (rows,) and its position (rows,) -> logits of the next (rows, V)."""
            hidden = policy.thinker.model.language_model(
                inputs_embeds=policy.thinker.get_input_embeddings()(token[:, None]),
                position_ids=position[None, :, None].expand(3, -1, 1),
                use_cache=False,
                shared=attention,
            ).last_hidden_state
            return policy.thinker.lm_head(hidden[:, -1]).float()

        for step in range(max_new_tokens):
            token, logprob = sample(logits, temperature, noise[slot.clamp(min=0), step])
            ids[slot, step], logprobs[slot, step] = token, logprob
            length[slot] = step + 1
            ended[slot] = done = torch.isin(token, eos)
            slot = slot.masked_fill(done, -1)
            num_before, num_alive = num_alive, int((slot >= 0).sum())  # the one wait for a GPU
            if num_alive == 0 or step + 1 == max_new_tokens:
                break
            if num_alive < num_before and num_alive <= 0.75 * len(slot):
                families_left, rows, size = compact(slot.view(-1, attention.group_size) >= 0)
                if len(rows) < len(slot):  # finished rows leave
                    attention.keep(families_left, rows, size)
                    slot, token, after = slot[rows], token[rows], after[rows]
            inputs = token, after + step
            if attention.next_token():
                decode = decode_plainly  # over new tensors; it warms up what a recording needs
            elif decode is decode_plainly:
                decode = record(decode_plainly, inputs)
            logits = decode(*inputs)
    rows = zip(ids.cpu(), logprobs.cpu(), length.tolist(), ended.tolist())
    made = [Completion(i[:n].clone(), lp[:n].clone(), not end) for i, lp, n, end in rows]
    return [made[b * group_size :][:count] for b, count in enumerate(num_completions)]


def families_of(prompts):
    """-> lists of indices: prompts with the very same media together, in the order of the first."""
    families = {}
    for b, prompt in enumerate(prompts):
        families.setdefault(id(prompt.media) if prompt.media else -b, []).append(b)
    return list(families.values())


def num_alike(rows):
    """How many tokens these lists of ids begin with alike; each keeps one of its own."""
    if len(rows) == 1:
        return len(rows[0])
    room = min(map(len, rows)) - 1
    alike = torch.stack([row[:room] == rows[0][:room] for row in rows]).all(0)
    return int(alike.cumprod(0).sum())


def prefill(policy, prompts, families, owner):
    """
    Reads every prompt once, and what a family begins with once for all of it. In the packed row

        [ family 1 | tail | tail | family 2 | tail | ... ]

    the tail of a prompt, what is its own, stands where a completion stands in the update.

    owner     (rows,)    the prompt that each row of the decoding goes on from
    returns   logits of the next token (B, V), the attention to decode with
    """
    device = policy.device
    alike = [num_alike([prompts[b].input_ids for b in family]) for family in families]
    order = [(b, n) for n, family in zip(alike, families) for b in family]
    tails = {b: prompts[b].input_ids[n:] for b, n in order}
    tail_ids = torch.cat(list(tails.values())).to(device)
    media = [getattr(policy.thinker.config, f"{m}_token_id") for m in ("image", "video", "audio")]
    # a placeholder there would be read without its features, in silence
    told = "prompts that share their media differ before the last of it"
    assert not torch.isin(tail_ids, torch.tensor(media, device=device)).any(), told
    tail_embeds = policy.thinker.get_input_embeddings()(tail_ids)
    tail_embeds = dict(zip(tails, tail_embeds.split([len(ids) for ids in tails.values()])))

    # where, in the packed row, a family begins and a prompt ends
    embeds, positions, groups, begins, ends, row = [], [], [], [], {}, 0
    firsts = [prompts[family[0]] for family in families]
    for n, family, first, embed in zip(alike, families, firsts, policy.embed(firsts)):
        embeds += [embed[:n], *(tail_embeds[b] for b in family)]
        positions += [first.position_ids[:, :n], *(prompts[b].position_ids[:, n:] for b in family)]
        groups.append((n, [len(tails[b]) for b in family]))
        begins.append(row)
        row += n
        for b in family:
            row += len(tails[b])
            ends[b] = row
    packed = PackedAttention(groups, device, record=True)
    hidden = policy.read(torch.cat(embeds), torch.cat(positions, dim=1), packed)
    ends = torch.tensor([ends[b] for b in range(len(prompts))], device=device)  # (B,)
    logits = policy.thinker.lm_head(hidden[ends - 1]).float()

    # keys and values of the packed row (K, L, E) as padded batches: families, and tails of the rows
    lengths = [len(tails[b]) for b in range(len(prompts))]
    ahead = torch.arange(max(alike), device=device)
    back = torch.arange(max(lengths), 0, -1, device=device)  # all tails end at one place
    alike, begins, lengths = (torch.tensor(x, device=device) for x in (alike, begins, lengths))
    family_at = (begins[:, None] + ahead).clamp(max=row - 1)  # (F, P)
    tail_at = (ends[owner, None] - back).clamp(min=0)  # (rows, tail)
    family_kv, tail_kv = {}, {}
    for layer in list(packed.kept):
        pair = [x[0] for x in packed.kept.pop(layer)]
        family_kv[layer] = tuple(x[:, family_at].transpose(0, 1).contiguous() for x in pair)
        tail_kv[layer] = tuple(x[:, tail_at].transpose(0, 1) for x in pair)
    masks = ahead < alike[:, None], back <= lengths[owner, None]
    width = len(owner) // len(families)
    return logits, DecodeAttention(family_kv, masks[0], width, tail_kv, masks[1])


def compact(alive):
    """alive (F, rows) bool -> families with a row left, the rows to keep, rows a family then."""
    families_left = alive.any(1).nonzero()[:, 0]
    size = int(alive.sum(1).max())
    first = alive[families_left].int().argsort(dim=1, descending=True, stable=True)[:, :size]
    return families_left, (families_left[:, None] * alive.shape[1] + first).flatten(), size


def sample(logits, temperature, noise):
    """logits (n, V), noise (n,) in [0, 1) -> token (n,), its log-prob (n,); inverse of the CDF."""
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        # float32 would lose the tail of a large vocabulary
        cdf = logprobs.double().exp().cumsum(-1)
        token = torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]
