"""
The sampling loop: prompts are read once, the completions of all of them are decoded together, and
the log-prob of every sampled token is recorded under the distribution it was sampled from.

B prompts, G completions each, P prompt tokens, T completion tokens, V vocabulary.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from attention import DecodeAttention, PackedAttention


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
    return policy(_rollout, prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds)


def _rollout(policy, prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds):
    device, group_size, num_prompts = policy.device, max(num_completions), len(prompts)
    # all randomness of the rollout, drawn before it: (B G, T)
    noise = torch.zeros(num_prompts, group_size, max_new_tokens, dtype=torch.float64)
    for row, count, seed in zip(noise, num_completions, seeds):
        generator = torch.Generator().manual_seed(seed)
        row[:count] = torch.rand(count, max_new_tokens, generator=generator, dtype=torch.float64)
    noise = noise.flatten(0, 1).to(device)
    ids = torch.zeros(noise.shape, dtype=torch.long, device=device)
    logprobs = torch.zeros(noise.shape, device=device)
    length = torch.zeros(len(noise), dtype=torch.long, device=device)
    ended = torch.zeros(len(noise), dtype=torch.bool, device=device)
    eos = torch.tensor(eos_ids, device=device)

    # a row decodes one completion; slot[row] says which, -1 if the row is only there to fill up
    slot = torch.arange(len(noise)).view(num_prompts, group_size)
    slot[torch.arange(group_size) >= torch.tensor(num_completions)[:, None]] = -1
    slot = slot.flatten().to(device)
    with gathered(policy):
        logits, attention = prefill(policy, prompts, group_size)
        logits = logits.repeat_interleave(group_size, dim=0)  # (B G, V)
        after = torch.tensor(
            [int(p.position_ids.max()) + 1 for p in prompts], device=device
        )  # (B,)
        for step in range(max_new_tokens):
            token, logprob = sample(logits, temperature, noise[slot.clamp(min=0), step])
            alive = slot >= 0
            live = slot[alive]
            ids[live, step], logprobs[live, step] = token[alive], logprob[alive]
            length[live] = step + 1
            done = alive & torch.isin(token, eos)
            ended[slot[done]] = True
            slot = slot.masked_fill(done, -1)
            num_alive = int((slot >= 0).sum())
            if num_alive == 0 or step + 1 == max_new_tokens:
                break
            if num_alive <= 0.75 * len(slot):
                prompts_left, rows, size = compact(slot.view(-1, attention.group_size) >= 0)
                if len(rows) < len(slot):  # finished rows leave
                    attention.keep(prompts_left, rows, size)
                    slot, token, after = slot[rows], token[rows], after[prompts_left]
            embeds = policy.thinker.get_input_embeddings()(token[:, None])  # (rows, 1, D)
            position = (after + step).repeat_interleave(attention.group_size)
            hidden = policy.thinker.model.language_model(
                inputs_embeds=embeds,
                position_ids=position[None, :, None].expand(3, -1, 1),
                use_cache=False,
                shared=attention,
            ).last_hidden_state
            attention.length += 1
            logits = policy.thinker.lm_head(hidden[:, -1]).float()
    ids, logprobs, length, ended = ids.cpu(), logprobs.cpu(), length.tolist(), ended.tolist()
    made = [
        Completion(ids[r, :n].clone(), logprobs[r, :n].clone(), not end)
        for r, (n, end) in enumerate(zip(length, ended))
    ]
    return [made[b * group_size :][:count] for b, count in enumerate(num_completions)]


def prefill(policy, prompts, group_size):
    """Reads every prompt once -> logits of the next token (B, V), the attention to decode with."""
    lengths = [len(p.input_ids) for p in prompts]
    packed = PackedAttention([(n, []) for n in lengths], policy.device, record=True)
    position_ids = torch.cat([p.position_ids for p in prompts], dim=1)
    hidden = policy.read(torch.cat(policy.embed(prompts)), position_ids, packed)
    lengths = torch.tensor(lengths, device=policy.device)
    logits = policy.thinker.lm_head(hidden[lengths.cumsum(0) - 1]).float()
    cache = {}
    for layer in list(packed.kept):  # the packed row (1, K, L, E) as a padded batch (B, K, P, E)
        rows = [x[0].transpose(0, 1).split(lengths.tolist()) for x in packed.kept.pop(layer)]
        cache[layer] = tuple(pad_sequence(x, True).transpose(1, 2).contiguous() for x in rows)
    mask = torch.arange(int(lengths.max()), device=policy.device) < lengths[:, None]
    return logits, DecodeAttention(cache, mask, group_size)


def compact(alive):
    """alive (B, G) bool -> prompts with a row left, the rows to keep, rows a prompt then."""
    prompts_left = alive.any(1).nonzero()[:, 0]
    size = int(alive.sum(1).max())
    first = alive[prompts_left].int().argsort(dim=1, descending=True, stable=True)[:, :size]
    return prompts_left, (prompts_left[:, None] * alive.shape[1] + first).flatten(), size


def sample(logits, temperature, noise):
    """logits (n, V), noise (n,) in [0, 1) -> token (n,), its log-prob (n,); inverse of the CDF."""
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cdf = (
            logprobs.double().exp().cumsum(-1)
        )  # float32 would lose the tail of a large vocabulary
        token = torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0].clamp(
            max=logits.shape[1] - 1
        )
    return token, logprobs.gather(-1, token[:, None])[:, 0]


@contextmanager
def gathered(policy):
    """
    Under FSDP, the layers whole from here to the end: gathered once a rollout, not once a token.
    To be used inside the policy's forward, which does the same for the root unit. Nothing else
    in a rollout talks to other ranks, so each ends in its own time.
    """
    units = [m for m in policy.modules() if hasattr(m, "unshard") and m is not policy]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
