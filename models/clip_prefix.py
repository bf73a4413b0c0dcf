"""
A clip that is read once, for questions about it that come one after another: its keys and values in
every layer are kept, and a rollout continues them (`rollout(..., prefix=)`).

P tokens of the prefix, S tokens of a question after it, K key/value heads, E head width.
"""

from typing import NamedTuple

import torch

from models.attention import DecodeAttention, Spans, flash
from models.head import float32_logits
from models.sharding import in_forward


class ClipPrefix(NamedTuple):
    """What the prompts about one clip begin with, as the text model has read it."""

    ids: torch.Tensor  # (P,) int64, up to the last token of the clip
    kv: dict  # layer -> k, v, each (P, K, E)


@torch.no_grad()
@in_forward
def read_prefix(policy, prompt, length):
    """Encodes the clip of a prompt and reads the prompt's first `length` tokens -> ClipPrefix"""
    (embeds,) = policy.embed([prompt])
    # a packed row has a suffix after each prefix; this one is thrown away
    suffix = prompt.input_ids[length : length + 1], prompt.position_ids[:, length : length + 1]
    _, attention = policy.packed_forward([embeds.first(length)], [[suffix]], record=True)
    kv = {}
    for layer, (k, v) in attention.recorded.items():
        kv[layer] = k[:length].clone(), v[:length].clone()
    return ClipPrefix(prompt.input_ids[:length], kv)


def continue_prefix(policy, prompt, prefix, num_rows):
    """
    Reads what a prompt has after the prefix.

    returns  logits of the next token (1, V), DecodeAttention of num_rows completions
    """
    length = len(prefix.ids)
    assert torch.equal(prompt.input_ids[:length], prefix.ids), "the prompt is about another clip"
    ids = prompt.input_ids[length:].to(policy.device)
    positions = prompt.position_ids[:, length:].to(policy.device)
    attention = SuffixAttention(prefix.kv, length, len(ids), policy.device)
    outputs = policy.thinker.model.language_model(
        inputs_embeds=policy.thinker.get_input_embeddings()(ids)[None],
        position_ids=positions[:, None],
        use_cache=False,
        shared=attention,
    )
    logits = float32_logits(policy.thinker.lm_head, outputs.last_hidden_state[0, -1:])

    own_kv = {}  # every completion gets its own copy of the question, and continues it
    for layer, (k, v) in attention.recorded.items():
        own_kv[layer] = (
            k[None].repeat(num_rows, 1, 1, 1),
            v[None].repeat(num_rows, 1, 1, 1),
        )
    lengths = torch.full((num_rows,), len(ids), dtype=torch.int32, device=policy.device)
    # a copy of the dict: decoding puts other tensors into it
    return logits, DecodeAttention(dict(prefix.kv), [length], own_kv, lengths, len(ids))


class SuffixAttention:
    """
    Attention of the tokens after a prefix whose keys and values are known: as attention.py says, (a)
    each token sees the suffix so far, (b) all of them see all of the prefix.
    """

    def __init__(self, prefix_kv, prefix_len, suffix_len, device):
        self.prefix_kv = prefix_kv
        self.prefix = Spans([prefix_len], device)
        self.suffix = Spans([suffix_len], device)
        self.recorded = {}  # layer -> k, v of the suffix, each (S, K, E)

    def attend(self, layer, q, k, v, scaling):
        """q (1, H, S, E), k and v (1, K, S, E) -> (1, S, H, E)"""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        self.recorded[layer] = k, v
        out, lse = flash(
            q, k, v, q_spans=self.suffix, k_spans=self.suffix, causal=True, scale=scaling
        )  # (a)
        prefix_k, prefix_v = self.prefix_kv[layer]
        prefix_out, prefix_lse = flash(
            q,
            prefix_k,
            prefix_v,
            q_spans=self.suffix,
            k_spans=self.prefix,
            causal=False,
            scale=scaling,
        )  # (b)
        prefix_weight = (prefix_lse - lse).sigmoid().T[..., None]  # (S, H, 1) float32
        merged = out.to(prefix_weight).lerp(prefix_out.to(prefix_weight), prefix_weight)
        return merged.to(out)[None]
