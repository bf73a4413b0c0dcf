"""
Attention for many completions of one prompt, without a copy of the prompt. Torch only: copy this
file freely.

    [ prompt 1 | c11 | c12 | ... | prompt 2 | c21 | ... ]       a packed row, for log-probs

A prompt token sees its prompt causally; a completion token sees its whole prompt and its own
completion so far. In a rollout all completions of a prompt read the prompt's keys in one product.

B prompts, G completions each, L packed tokens, P prompt tokens, N completion tokens of a group,
H heads, K key/value heads, E head width.
"""

import torch
import torch.nn.functional as F

sdpa = F.scaled_dot_product_attention
# cuDNN's kernel would come first on an H100 or H200. With a mask, its backward can give NaN in torch
# 2.11 (pytorch#196678), and it plans anew for each new length, of which every group has one.
torch.backends.cuda.enable_cudnn_sdp(False)
ROOM = 64  # tokens by which the room for what is decoded grows


class PackedAttention:
    """
    Attention of a packed row. With `record`, the row's keys and values of every layer are kept.

    groups   list of (P, lengths of the completions behind the prompt), in the order of the row
    """

    def __init__(self, groups, device, record=False):
        self.splits = [(num_prompt, sum(lengths)) for num_prompt, lengths in groups]
        self.kept, self.masks, self.record = {}, [], record
        for num_prompt, lengths in groups:
            lengths = torch.tensor(lengths, dtype=torch.long)  # on the CPU: nobody waits for a GPU
            owner = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)  # (N,)
            own = (owner[:, None] == owner[None, :]).tril()
            self.masks.append(F.pad(own, (num_prompt, 0), value=True))  # (N, P + N) bool

    def attend(self, layer, q, k, v, scaling):
        """q (1, H, L, E), k and v (1, K, L, E) -> (1, L, H, E)"""
        if self.record:
            self.kept[layer] = (k, v)
        share = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))  # (1, H, L, E)
        # split, not slices: the backward of a slice is as long as the whole row
        rows = zip(*(x.split([sum(split) for split in self.splits], dim=2) for x in (q, k, v)))
        pieces = []
        for i, (q_row, k_row, v_row) in enumerate(rows):
            q_prompt, q_own = q_row.split(self.splits[i], dim=2)
            k_prompt, v_prompt = (x.split(self.splits[i], dim=2)[0] for x in (k_row, v_row))
            pieces.append(sdpa(q_prompt, k_prompt, v_prompt, is_causal=True, scale=scaling))
            if q_own.shape[2]:
                mask = self._mask(i, q)
                pieces.append(sdpa(q_own, k_row, v_row, attn_mask=mask, scale=scaling))
        return torch.cat(pieces, dim=2).transpose(1, 2)

    def _mask(self, i, q):
        """On a GPU additive and made once: SDPA would make, and autograd keep, one a layer."""
        mask = self.masks[i]
        if q.is_cuda and mask.dtype == torch.bool:
            aligned = -(-mask.shape[1] // 8) * 8  # as the kernels want their rows
            zeros = torch.zeros(len(mask), aligned, dtype=q.dtype, device=q.device)
            mask = self.masks[i] = zeros[:, : mask.shape[1]].masked_fill_(~mask, -torch.inf)
        return mask


class DecodeAttention:
    """
    Attention of one new token for G completions of each of B prompts. The prompt's keys are read
    where they are, by all its completions at once: no copy per completion.

    prompt_kv   layer -> (k, v), each (B, K, P, E), padded; prompt_mask (B, P) says what is real
    own_kv      layer -> (k, v), each (B G, K, length, E): what a completion has already, such as
                its own question after a clip that it shares with others; own_mask (B G, length)
                says what of it is real

    Between two growths of the room or calls of `keep`, a token changes no shape and no address, only
    values: so its kernels can be recorded once and replayed (rollout.record).
    """

    def __init__(self, prompt_kv, prompt_mask, group_size, own_kv, own_mask):
        self.prompt_kv, self.group_size, self.own_kv = prompt_kv, group_size, own_kv
        self.bias, self.own_bias = (
            torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
            for mask in (prompt_mask, own_mask)
        )
        self.length, self.new = own_mask.shape[1], True
        self.now = torch.zeros(1, dtype=torch.long, device=own_mask.device)

    def next_token(self):
        """To be called before each token. -> True if the tensors are not those of the last one."""
        room = self.own_bias.shape[1]
        if self.length == room:
            more = 4 * ROOM if self.now.is_cuda else ROOM  # a GPU reads fast and records slowly
            for layer, pair in self.own_kv.items():  # one at a time: twice all may not fit
                self.own_kv[layer] = tuple(F.pad(x, (0, 0, 0, more)) for x in pair)
            self.own_bias = F.pad(self.own_bias, (0, more), value=-torch.inf)
            self.new = True
        self.own_bias[:, self.length] = 0
        self.now.fill_(self.length)
        self.length += 1
        new, self.new = self.new, False
        return new

    def attend(self, layer, q, k, v, scaling):
        """q (B G, H, 1, E), k and v (B G, K, 1, E) -> (B G, 1, H, E)"""
        own_k, own_v = self.own_kv[layer]  # (B G, K, room, E)
        own_k.index_copy_(2, self.now, k)
        own_v.index_copy_(2, self.now, v)
        prompt_k, prompt_v = self.prompt_kv[layer]  # (B, K, P, E)
        num_prompts, num_kv, num_prompt_tokens, width = prompt_k.shape
        share = q.shape[1] // num_kv  # heads with the same key

        def by_row(x):  # (B, K, G share, X), rows of one matrix product -> (B, G, K, share, X)
            return x.unflatten(2, (-1, share)).transpose(1, 2)

        q = q.view(num_prompts, -1, num_kv, share, width)
        of_prompt = by_row(float32_product(q.transpose(1, 2).flatten(2, 3), prompt_k.mT))
        of_own = float32_product(q.flatten(0, 1), own_k.mT).view(*q.shape[:4], -1)
        biases = self.bias, self.own_bias
        bias, own_bias = (x.view(num_prompts, -1, 1, 1, x.shape[1]) for x in biases)
        # (B, G, K, share, P + room), written once: on a GPU, long prompts are bound by this traffic
        scores = of_own.new_empty(*q.shape[:4], num_prompt_tokens + of_own.shape[-1])
        torch.add(bias, of_prompt, alpha=scaling, out=scores[..., :num_prompt_tokens])
        torch.add(own_bias, of_own, alpha=scaling, out=scores[..., num_prompt_tokens:])
        weights = scores.softmax(-1)
        to_prompt = weights[..., :num_prompt_tokens].transpose(1, 2).to(q.dtype).flatten(2, 3)
        to_own = weights[..., num_prompt_tokens:].to(q.dtype).flatten(0, 1)
        out = by_row(to_prompt @ prompt_v) + (to_own @ own_v).view(q.shape)
        return out.reshape(len(own_k), 1, -1, width)

    def keep(self, prompts, rows, group_size):
        """Only these prompts (indices, ascending) and rows (indices, group_size a prompt) go on."""
        stores = [(self.own_kv, rows)]
        if len(prompts) < len(self.bias):
            stores.append((self.prompt_kv, prompts))
        for kv, kept in stores:
            for layer, (k, v) in kv.items():  # one at a time: twice all of them may not fit
                kv[layer] = (k[kept], v[kept])
        self.bias, self.own_bias = self.bias[prompts], self.own_bias[rows]
        self.group_size, self.new = group_size, True


def float32_product(a, b):
    """a (B, K, n, E) @ b (B, K, E, m), not rounded to bfloat16: a score of 50 would be off by .1."""
    if a.is_cuda and a.dtype != torch.float32:  # the kernels sum in float32 anyway
        product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, a.shape[:2])
    return a.float() @ b.float()


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, shared, **_):
    """What the text layers call: `shared` is a PackedAttention or a DecodeAttention."""
    return shared.attend(module.layer_idx, query, key, value, scaling), None
