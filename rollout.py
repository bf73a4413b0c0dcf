"""
The sampling loop: prompts are read once, the completions of all of them are decoded together, and
the log-prob of every sampled token is recorded under the distribution it was sampled from.

B prompts, G completions each, P prompt tokens, T completion tokens, V vocabulary.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
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
    seeds            list of B int  one a prompt: what a prompt gets does not depend on its neighbours
    returns          list of B lists of Completion

    [D3] Nothing is truncated (no top-k, no top-p): the recorded log-probs are those of the full
    distribution that was sampled, which is what `completion_logprobs` recomputes.
    """
    return policy(_rollout, prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds)


def _rollout(policy, prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds):
    device, group_size, num_prompts = policy.device, max(num_completions), len(prompts)
    lengths = [len(p.input_ids) for p in prompts]
    with gathered(policy):
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        packed = PackedAttention([(s, n, []) for s, n in zip(starts, lengths)], device, record=True)
        hidden = policy.read(
            torch.cat(policy.embed(prompts)),
            torch.cat([p.position_ids for p in prompts], dim=1),
            packed,
        )
        logits = policy.thinker.lm_head(
            hidden[torch.tensor(lengths).cumsum(0).to(device) - 1]
        ).float()  # (B, V)
        split = lambda x: pad_sequence(
            x[0].transpose(0, 1).split(lengths), batch_first=True
        ).transpose(1, 2)  # noqa: E731
        cache = {
            i: tuple(split(x).contiguous() for x in kv) for i, kv in packed.kept.items()
        }  # (B, K, P, E)
        mask = (
            torch.arange(max(lengths), device=device)
            < torch.tensor(lengths, device=device)[:, None]
        )
        attention = DecodeAttention(cache, mask, group_size)

        noise = torch.stack([  # (B, G, T): all randomness of the rollout, drawn before it
            torch.rand(group_size, max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
            for s in seeds
        ]).to(device)  # fmt: skip
        position = torch.tensor([int(p.position_ids.max()) + 1 for p in prompts], device=device)
        logits = logits.repeat_interleave(group_size, dim=0)  # (B * G, V)
        ends = torch.tensor(eos_ids, device=device)
        wanted = torch.arange(group_size) < torch.tensor(num_completions)[:, None]  # (B, G)
        # slot[r] = which of the B * G completions row r is making, -1 for a row kept only to fill up
        slot = (
            torch.arange(num_prompts * group_size)
            .view(num_prompts, group_size)
            .masked_fill(~wanted, -1)
            .flatten()
            .to(device)
        )
        ids = torch.zeros(num_prompts * group_size, max_new_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(ids.shape, device=device)
        length = torch.zeros(len(ids), dtype=torch.long, device=device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
        noise = noise.view(-1, max_new_tokens)
        prompt_of = torch.arange(num_prompts, device=device)
        for step in range(max_new_tokens):
            token, logprob = sample(logits, temperature, noise[slot.clamp(min=0), step])
            alive = slot >= 0
            live = slot[alive]
            ids[live, step], logprobs[live, step], length[live] = (
                token[alive],
                logprob[alive],
                step + 1,
            )
            done = alive & torch.isin(token, ends)
            ended[slot[done]] = True
            slot = slot.masked_fill(done, -1)
            num_alive = int((slot >= 0).sum())
            if num_alive == 0 or step + 1 == max_new_tokens:
                break
            rows = torch.arange(len(slot), device=device)
            if num_alive <= 0.75 * len(slot):  # finished rows leave
                by_prompt = (slot >= 0).view(-1, attention.group_size)
                prompts_left = by_prompt.any(1).nonzero()[:, 0]
                new_size = int(by_prompt.sum(1).max())
                if len(prompts_left) * new_size < len(slot):
                    first = (
                        by_prompt[prompts_left]
                        .int()
                        .argsort(dim=1, descending=True, stable=True)[:, :new_size]
                    )
                    rows = (prompts_left[:, None] * attention.group_size + first).flatten()
                    attention.keep(prompts_left, rows, new_size)
                    slot, token, prompt_of = slot[rows], token[rows], prompt_of[prompts_left]
            embeds = policy.thinker.get_input_embeddings()(token[:, None])  # (rows, 1, D)
            place = (position[prompt_of] + step).repeat_interleave(attention.group_size)
            out = policy.thinker.model.language_model(
                inputs_embeds=embeds,
                position_ids=place[None, :, None].expand(3, -1, 1),
                use_cache=False,
                shared=attention,
            )
            attention.length += 1
            logits = policy.thinker.lm_head(out.last_hidden_state[:, -1]).float()
    ids, logprobs, length, ended = ids.cpu(), logprobs.cpu(), length.tolist(), ended.tolist()
    return [
        [
            Completion(ids[r, : length[r]].clone(), logprobs[r, : length[r]].clone(), not ended[r])
            for r in range(b * group_size, b * group_size + num_completions[b])
        ]
        for b in range(num_prompts)
    ]


def sample(logits, temperature, noise):
    """logits (n, V), noise (n,) in [0, 1) -> token (n,), its log-prob (n,), by the inverse of the CDF."""
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
