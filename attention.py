"""
Attention for many completions of one prompt, without a copy of the prompt. Torch only: copy
this file freely.

    [ prompt 1 | c11 | c12 | ... | prompt 2 | c21 | ... ]       a packed row, for log-probs

A prompt token sees its prompt causally; a completion token sees its whole prompt and its own
completion so far. In a rollout all completions of a prompt read the prompt's keys in one product.

B prompts, G completions each, L packed tokens, P prompt tokens, H heads, K key/value heads,
E head width.
"""

import torch
import torch.nn.functional as F


class PackedAttention:
    """
    Attention of a packed row. With `record`, the prompts' keys and values of every layer are kept.

    groups   list of (start of the prompt in the row, P, lengths of the completions behind it)
    """

    def __init__(self, groups, device, record=False):
        self.groups, self.kept, self.masks, self.record = groups, {}, [], record
        for _, num_prompt, lengths in groups:
            # (sum of lengths, P + sum of lengths): the prompt, and its own completion up to itself
            owner = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, dtype=torch.long, device=device))  # fmt: skip
            own = (owner[:, None] == owner[None, :]).tril()
            self.masks.append(F.pad(own, (num_prompt, 0), value=True))

    def attend(self, layer, q, k, v, scaling):
        """q (1, H, L, E), k and v (1, K, L, E) -> (1, L, H, E)"""
        if self.record:
            self.kept[layer] = (k, v)
        k, v = (
            x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)
        )  # (1, H, L, E)
        pieces = []
        sizes = [num_prompt + sum(lengths) for _, num_prompt, lengths in self.groups]
        # split, not slices: the backward of a slice is as long as the whole row
        for group, q, k, v, mask in zip(
            self.groups, *(x.split(sizes, dim=2) for x in (q, k, v)), self.masks
        ):
            (q, q_own), (k_prompt, _), (v_prompt, _) = (
                x.split([group[1], x.shape[2] - group[1]], dim=2) for x in (q, k, v)
            )
            pieces.append(
                F.scaled_dot_product_attention(q, k_prompt, v_prompt, is_causal=True, scale=scaling)
            )
            if q_own.shape[2]:
                pieces.append(
                    F.scaled_dot_product_attention(q_own, k, v, attn_mask=mask, scale=scaling)
                )
        return torch.cat(pieces, dim=2).transpose(1, 2)


class DecodeAttention:
    """
    Attention of one new token for G completions of each of B prompts. The prompt's keys are read
    where they are, by all its completions at once: no copy per completion.

    prompt_kv   layer -> (k, v), each (B, K, P, E), padded; prompt_mask (B, P) says what is real
    own_kv      layer -> (k, v), each (B * G, K, room, E), filled up to `length`
    """

    def __init__(self, prompt_kv, prompt_mask, group_size):
        self.prompt_kv, self.group_size, self.own_kv, self.length = prompt_kv, group_size, {}, 0
        self.bias = torch.zeros(prompt_mask.shape, device=prompt_mask.device).masked_fill(
            ~prompt_mask, -torch.inf
        )

    def attend(self, layer, q, k, v, scaling):
        """q (B * G, H, 1, E), k and v (B * G, K, 1, E) -> (B * G, 1, H, E)"""
        rows, num_heads, _, width = q.shape
        own_k, own_v = self._append(layer, k, v)  # (B * G, K, length + 1, E)
        prompt_k, prompt_v = self.prompt_kv[layer]  # (B, K, P, E)
        num_prompts, num_kv, num_prompt_tokens, _ = prompt_k.shape
        share = (
            num_heads // num_kv
        )  # heads that share one key: with G, the rows of one matrix product
        q_own = q.view(rows, num_kv, share, width)
        q_prompt = (
            q_own.view(num_prompts, -1, num_kv, share, width)
            .transpose(1, 2)
            .reshape(num_prompts, num_kv, -1, width)
        )
        to_prompt = (q_prompt @ prompt_k.transpose(2, 3)).float() * scaling + self.bias[
            :, None, None
        ]
        to_own = (q_own @ own_k.transpose(2, 3)).float() * scaling  # (B * G, K, share, length + 1)

        def by_row(x):  # (B, K, G * share, X) -> (B * G, K, share, X)
            return (
                x.view(num_prompts, num_kv, -1, share, x.shape[-1])
                .transpose(1, 2)
                .reshape(rows, num_kv, share, -1)
            )

        def by_prompt(x):
            return (
                x.view(num_prompts, -1, num_kv, share, x.shape[-1])
                .transpose(1, 2)
                .reshape(num_prompts, num_kv, -1, x.shape[-1])
            )

        weights = torch.cat([by_row(to_prompt), to_own], dim=-1).softmax(-1).to(q.dtype)
        out = weights[..., num_prompt_tokens:] @ own_v
        out = out + by_row(by_prompt(weights[..., :num_prompt_tokens]) @ prompt_v)
        return out.reshape(rows, 1, num_heads, width)

    def _append(self, layer, k, v):
        if layer not in self.own_kv or self.own_kv[layer][0].shape[2] == self.length:
            room = [
                F.pad(x, (0, 0, 0, max(64, self.length)))
                for x in self.own_kv.get(layer, (k[:, :, :0], v[:, :, :0]))
            ]
            self.own_kv[layer] = tuple(room)
        for store, new in zip(self.own_kv[layer], (k, v)):
            store[:, :, self.length] = new[:, :, 0]
        return (store[:, :, : self.length + 1] for store in self.own_kv[layer])

    def keep(self, prompts, rows, group_size):
        """Only these prompts (index tensor) and rows (index tensor, group_size a prompt) go on."""
        self.prompt_kv = {i: (k[prompts], v[prompts]) for i, (k, v) in self.prompt_kv.items()}
        self.own_kv = {i: (k[rows], v[rows]) for i, (k, v) in self.own_kv.items()}
        self.bias, self.group_size = self.bias[prompts], group_size


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, shared, **_):
    """What the text layers call: `shared` is a PackedAttention or a DecodeAttention."""
    return shared.attend(module.layer_idx, query, key, value, scaling), None
