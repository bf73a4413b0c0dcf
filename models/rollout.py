"""
The sampling loop: prompts are read once, the completions of all of them are decoded together, and
the log-prob of every sampled token is recorded under the distribution it was sampled from.

Prompts that hold the very same media (one object: the questions about one clip) are a family. What
they begin with alike, the clip above all, is encoded and read once for the whole family.

B prompts, G completions each, F families, P prompt tokens, T completion tokens, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from models.attention import DecodeAttention
from models.graphs import DelayedScalar, capture
from models.inputs import shared_clip_groups
from models.sharding import unsharded
from run.errors import out_of_memory_advice
from run.optim import micro_batches

PIECE = 256  # tokens of the vocabulary that are summed before the one is searched


class Completion(NamedTuple):
    """One sampled completion; the length is the mask, EOS included."""

    ids: torch.Tensor  # (T,) int64
    logprobs: torch.Tensor  # (T,) float32, nats, of the policy that sampled it, at its temperature
    truncated: bool  # max_new_tokens came before EOS


@out_of_memory_advice(
    "the rollout: fewer --prompts-per-step (eval.py: --batch-size), or --max-new-tokens"
)
@torch.no_grad()
def rollout(
    policy,
    prompts,
    num_completions,
    *,
    temperature,
    max_new_tokens,
    eos_ids,
    seeds,
    micro_tokens=16384,
):
    """
    Samples completions of all prompts together and records their log-probs.

    prompts          list of B Prompt
    num_completions  list of B int
    temperature      float      0 = greedy (log-probs are then those at temperature 1)
    max_new_tokens   int
    eos_ids          list of int    any of them ends a completion and belongs to it
    seeds            list of B int  one a prompt: its neighbours do not change what it gets
    micro_tokens     int        tokens of prompts that are read at one time
    returns          list of B lists of Completion

    [D3] Nothing is truncated (no top-k, no top-p): the recorded log-probs are those of the full
    distribution that was sampled, which is what `completion_logprobs` recomputes.
    """
    return policy(
        lambda policy: _rollout(
            policy,
            prompts,
            num_completions,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            seeds=seeds,
            micro_tokens=micro_tokens,
        )
    )


def _rollout(
    policy, prompts, num_completions, *, temperature, max_new_tokens, eos_ids, seeds, micro_tokens
):
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
    families = shared_clip_groups(prompts)
    slots = [[b * group_size + g for b in f for g in range(num_completions[b])] for f in families]
    width = max(map(len, slots))  # rows of a family
    slot = torch.tensor([s + [-1] * (width - len(s)) for s in slots], device=device).flatten()
    owner = slot.clamp(min=0) // group_size  # (rows,) the prompt that a row goes on from
    num_alive, count = len(slot), DelayedScalar()
    crowded = 0.25 if slot.is_cuda else 0.75  # there an idle row costs less than a new recording
    with unsharded(policy):
        logits, attention = prefill(policy, prompts, families, owner, micro_tokens)
        logits = logits[owner]  # (rows, V)
        after = torch.stack([p.position_ids.max() + 1 for p in prompts]).to(device)[owner]

        def decode_plainly(token, position):
            """A token of every row, (rows,) and its position (rows,) -> logits of the next (rows, V)."""
            embeds = policy.thinker.get_input_embeddings()(token[:, None])
            inputs = dict(
                inputs_embeds=embeds, position_ids=position[None, :, None].expand(3, -1, 1)
            )
            hidden = policy.thinker.model.language_model(
                **inputs, use_cache=False, shared=attention
            )
            return policy.thinker.lm_head(hidden.last_hidden_state[:, -1]).float()

        for step in range(max_new_tokens):
            token, logprob = sample(logits, temperature, noise[slot.clamp(min=0), step])
            ids[slot, step], logprobs[slot, step] = token, logprob
            length[slot] = step + 1
            ended[slot] = done = torch.isin(token, eos)
            slot = slot.masked_fill(done, -1)
            num_before, num_alive = num_alive, count((slot >= 0).sum(), num_alive)
            if num_alive == 0 or step + 1 == max_new_tokens:
                break
            if num_alive < num_before and num_alive <= crowded * len(slot):
                families_left, rows = compact(slot.view(-1, attention.group_size) >= 0)
                if 0 < len(rows) < len(slot):  # finished rows leave
                    attention.keep(families_left, rows)
                    slot, token, after = slot[rows], token[rows], after[rows]
            inputs = token, after + step
            if attention.next_token():
                decode = decode_plainly  # over new tensors; it warms up what a recording needs
            elif decode is decode_plainly:
                decode = capture(decode_plainly, inputs)
            logits = decode(*inputs)
    rows = zip(ids.cpu(), logprobs.cpu(), length.tolist(), ended.tolist())
    made = [Completion(i[:n].clone(), lp[:n].clone(), not end) for i, lp, n, end in rows]
    return [made[b * group_size :][:count] for b, count in enumerate(num_completions)]


def prefill(policy, prompts, families, owner, micro_tokens):
    """
    Reads every prompt once, and what a family begins with once for all of it: in a packed row that is
    the head, and what a prompt has of its own a tail, as a completion is in the update. In packs of
    micro_tokens: what a layer computes of a long row would be larger than the model.

    owner     (rows,)    the prompt that each row of the decoding goes on from
    returns   logits of the next token (B, V), the attention to decode with
    """
    device = policy.device
    alike = [common_prefix_length([prompts[b].input_ids for b in family]) for family in families]
    order = [b for family in families for b in family]
    cut = {b: n for n, family in zip(alike, families) for b in family}
    media = [getattr(policy.thinker.config, f"{m}_token_id") for m in ("image", "video", "audio")]
    own = {b: prompts[b].input_ids[cut[b] :] for b in order}
    # a placeholder there would be read without its features, in silence
    told = "prompts that share their media differ before the last of it"
    assert not torch.isin(torch.cat(list(own.values())), torch.tensor(media)).any(), told

    sizes = [n + sum(len(own[b]) for b in family) for n, family in zip(alike, families)]
    logits, kept = [], []
    for pack in micro_batches(sizes, micro_tokens):
        firsts = [prompts[families[i][0]] for i in pack]
        heads = [head.first(alike[i]) for i, head in zip(pack, policy.embed(firsts))]
        tails = [
            [(own[b], prompts[b].position_ids[:, cut[b] :]) for b in families[i]] for i in pack
        ]
        hidden, packed = policy.read(heads, tails, record=True)
        ends = torch.tensor([len(own[b]) for i in pack for b in families[i]]).cumsum(0) + len(pack)
        logits.append(policy.thinker.lm_head(hidden[(ends - 1).to(device)]).float())
        kept.append((sum(alike[i] for i in pack), packed.kept))

    # heads stay packed; of the tails every row of the decoding gets its own copy, to go on from
    lengths = torch.tensor([len(own[b]) for b in order])
    place = torch.tensor(order).argsort()  # of prompt b in `order`
    starts, lengths = (lengths.cumsum(0) - lengths)[place].to(device), lengths[place].to(device)
    tail_at = starts[owner, None] + torch.arange(
        longest := max(map(len, own.values())), device=device
    )
    tail_at = tail_at.clamp(max=sum(map(len, own.values())) - 1)  # (rows, longest)
    head_kv, tail_kv = {}, {}
    for layer in list(kept[0][1]):
        pairs = [(n, pack.pop(layer)) for n, pack in kept]
        head_kv[layer] = tuple(torch.cat([pair[i][:n] for n, pair in pairs]) for i in (0, 1))
        tail_kv[layer] = tuple(
            torch.cat([pair[i][n:] for n, pair in pairs])[tail_at] for i in (0, 1)
        )
    used = lengths[owner].int()
    attention = DecodeAttention(head_kv, alike, tail_kv, used, longest)
    return torch.cat(logits)[place.to(device)], attention


def common_prefix_length(rows):
    """How many tokens these lists of ids begin with alike; each keeps one of its own."""
    room = min(map(len, rows)) - 1
    alike = torch.stack([row[:room] == rows[0][:room] for row in rows]).all(0)
    return int(alike.cumprod(0).sum())


def compact(alive):
    """alive (F, rows) bool -> families with a row left, the rows to keep, as many of each."""
    families_left = alive.any(1).nonzero()[:, 0]
    size = int(alive.sum(1).max())  # 0: all have ended meanwhile
    first = alive[families_left].int().argsort(dim=1, descending=True, stable=True)[:, :size]
    return families_left, (families_left[:, None] * alive.shape[1] + first).flatten()


def sample(logits, temperature, noise):
    """logits (n, V), noise (n,) in [0, 1) -> token (n,), its log-prob (n,); inverse of the CDF."""
    logprobs = (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        # in two levels: only the sums of pieces need float64, where float32 would lose the tail
        pieces = F.pad(logprobs.exp(), (0, -logits.shape[1] % PIECE)).unflatten(1, (-1, PIECE))
        cdf = pieces.sum(-1, dtype=torch.float64).cumsum(-1)  # (n, V / PIECE)
        aim = noise[:, None] * cdf[:, -1:]
        piece = torch.searchsorted(cdf, aim, right=True).clamp(max=cdf.shape[1] - 1)  # (n, 1)
        aim = aim - F.pad(cdf, (1, 0)).gather(1, piece)
        cdf = pieces.gather(1, piece[..., None].expand(-1, -1, PIECE))[:, 0].double().cumsum(-1)
        # at most the last token that is not impossible: sums of other orders differ by rounding
        within = torch.searchsorted(cdf, aim.clamp(max=cdf[:, -1:] * (1 - 1e-12)), right=True)
        token = (piece * PIECE + within)[:, 0]
    return token, logprobs.gather(-1, token[:, None])[:, 0]
