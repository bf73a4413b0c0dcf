"""
Attention for many completions of one prompt, without a copy of the prompt. Torch only: copy this
file freely.

    packed row   [ prompt 1 | prompt 2 | ... | c11 | c12 | ... | c21 | ... ]     no span is empty

A prompt token sees its prompt causally; a completion token sees its whole prompt and its own
completion so far. That is two softmaxes with no mask, each by a flash kernel, and merged:

    (a) every prompt and every completion sees itself causally
    (b) all completions of a prompt see all of the prompt
    out = (1 - s) out_a + s out_b,   s = sigmoid(lse_b - lse_a),   lse = log(exp(lse_a) + exp(lse_b))

lse is the log of a softmax's denominator. Flash's backward pass makes the probabilities again from the
scores and lse, P = exp(S - lse); given the merged lse and output they are those of the whole softmax, so
the gradients of (a) and (b) add up to the exact ones. In the last layer a prompt has one query, its
last token: nothing reads the others.

L packed tokens, H heads, K key/value heads, E head width, B prompts, G completions of each.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

aten = torch.ops.aten
# cuDNN's kernel would come first on an H100 or H200. With a mask, its backward can give NaN in torch
# 2.11 (pytorch#196678), and it plans anew for each new length, of which every group has one.
torch.backends.cuda.enable_cudnn_sdp(False)
ROOM, GPU_ROOM = 64, 1024  # tokens by which the room for what is decoded grows
KERNEL = "flash"


def set_attention_kernel(name, device, dtype):
    """
    -> which kernel is used from here on: "flash", torch's own (FlashAttention-2 on a GPU) or with fa3 or
    fa4 a newer one in its place; or "sdpa", slow plain products on any device in any dtype. auto: flash,
    but sdpa on a GPU in float32, for which flash has no kernel there.  raises: ImportError, RuntimeError
    """
    global KERNEL
    no_kernel = device.type == "cuda" and dtype == torch.float32
    if no_kernel and name not in ("auto", "sdpa"):
        raise RuntimeError("it has no kernel for float32 on a GPU")
    if name in ("fa3", "fa4"):
        torch.nn.attention.activate_flash_attention_impl(name.upper())
    KERNEL = "sdpa" if name == "sdpa" or no_kernel else "flash"
    return KERNEL


class Spans:
    """Lengths of the sequences in a packed tensor, and where they end, as flash wants it."""

    def __init__(self, sizes, device):
        assert min(sizes) > 0, (
            "the CPU's kernel dies of an empty sequence, a GPU's leaves it unwritten"
        )
        self.sizes, self.longest = sizes, max(sizes)
        self.ends = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device)


def flash(q, k, v, of_q, of_k, causal, scale):
    """q (L, H, E), k and v (M, K, E), each with its Spans -> out (L, H, E), lse (H, L) float32."""
    if q.is_cuda and KERNEL == "flash":
        given = (
            of_q.ends,
            of_k.ends,
            max(of_q.longest, 2),
            of_k.longest,
            0.0,
            causal,
            False,
        )  # 1: lse in another order
        return aten._flash_attention_forward(q, k, v, *given, scale=scale)[:2]
    each = unpack((q, of_q), (k, of_k), (v, of_k))
    # a lone query is the last of its keys' tokens and sees them all; the CPU's kernel would say the first
    outs, lses = zip(*(sdpa_with_lse(*qkv, scale, causal and qkv[0].shape[2] > 1) for qkv in each))
    return torch.cat([x[0].transpose(0, 1) for x in outs]), torch.cat([x[0] for x in lses], dim=1)


def flash_backward(grad, q, k, v, out, lse, of_q, of_k, causal, scale):
    """-> gradients of q, k, v; out and lse may be those of a larger softmax that this one is a part of."""
    if q.is_cuda:
        given = of_q.ends, of_k.ends, of_q.longest, of_k.longest, 0.0, causal
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        given = grad, q, k, v, out, lse, *given, *no_dropout
        return aten._flash_attention_backward(*given, scale=scale)
    run = aten._scaled_dot_product_flash_attention_for_cpu_backward
    given = unpack((grad, of_q), (q, of_q), (k, of_k), (v, of_k), (out, of_q))
    lses = lse.split(of_q.sizes, dim=1)
    parts = [
        run(*x, y[None], 0.0, causal and y.shape[1] > 1, scale=scale) for x, y in zip(given, lses)
    ]
    return tuple(torch.cat([x[0].transpose(0, 1) for x in part]) for part in zip(*parts))


def sdpa_with_lse(q, k, v, scale, causal=False, bias=None):
    """q (n, H, x, E), k and v (n, K, y, E), bias (n, 1, 1, y) or None -> out as q, lse (n, H, x)"""
    if KERNEL == "flash":
        run = aten._scaled_dot_product_flash_attention_for_cpu
        return run(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1).to(v) @ v, scores.logsumexp(-1)


def unpack(*packed):
    """Packed tensors (L, H, E) with their Spans -> a tuple a sequence, of (1, H, length, E)."""
    return zip(*([x[None].transpose(1, 2) for x in t.split(of.sizes)] for t, of in packed))


def shared_prefix(q, k, v, own_q, own, prompts, answers, scale):
    """
    q (M, H, E), k, v (L, K, E), M = L or, of each prompt, one query; Spans of the queries and of the keys
    of prompts + completions, of prompts, of each prompt's completions -> out (M, H, E), lse (H, M)
    """
    m, n = sum(own_q.sizes[: len(prompts.sizes)]), sum(prompts.sizes)
    out, lse = flash(q, k, v, own_q, own, True, scale)  # (a)
    part, part_lse = flash(q[m:], k[:n], v[:n], answers, prompts, False, scale)  # (b)
    share = (part_lse - lse[:, m:]).sigmoid().T[..., None]  # of the prompt, in float32
    merged = out[m:].to(share).lerp(part.to(share), share).to(out)  # rounded once
    lse = torch.cat([lse[:, :m], torch.logaddexp(lse[:, m:], part_lse)], dim=1)
    return torch.cat([out[:m], merged]), lse


class SharedPrefix(torch.autograd.Function):
    """shared_prefix with flash's own backward passes."""

    @staticmethod
    def forward(ctx, q, k, v, *given):
        out, lse = shared_prefix(q, k, v, *given)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.given = given
        return out

    @staticmethod
    def backward(ctx, grad):
        (q, k, v, out, lse), (own_q, own, prompts, answers, scale) = ctx.saved_tensors, ctx.given
        m, n = sum(own_q.sizes[: len(prompts.sizes)]), sum(prompts.sizes)
        grads = flash_backward(grad.contiguous(), q, k, v, out, lse, own_q, own, True, scale)
        given = grad[m:].contiguous(), q[m:], k[:n], v[:n], out[m:], lse[:, m:].contiguous()
        more = flash_backward(*given, answers, prompts, False, scale)
        for whole, part in zip((grads[0][m:], grads[1][:n], grads[2][:n]), more):
            whole += part
        return *grads, *[None] * len(ctx.given)


class PackedAttention:
    """
    Attention of a packed row. With `record`, the row's keys and values of every layer are kept.

    prompts      list of B lengths
    completions  list of B lists of lengths
    read         (M,) indices of the rows that predict: the last of each prompt, all of completions
    """

    def __init__(self, prompts, completions, device, record=False):
        self.kept, self.record = {}, record
        flat, n = [size for group in completions for size in group], sum(prompts)
        self.read = torch.tensor(
            [*(end - 1 for end in accumulate(prompts)), *range(n, n + sum(flat))]
        ).to(device)
        self.spans = [
            Spans(x, device) for x in ([*prompts, *flat], prompts, list(map(sum, completions)))
        ]
        self.last = Spans([1] * len(prompts) + flat, device)

    def attend(self, layer, q, k, v, scaling):
        """q (1, H, L, E), or of the rows `read` (1, H, M, E), k and v (1, K, L, E) -> (1, L or M, H, E)"""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # views: as the projections wrote them
        if self.record:
            self.kept[layer] = k, v
        given = self.spans[0] if len(q) == len(k) else self.last, *self.spans, scaling
        if KERNEL == "sdpa":
            return shared_prefix(q, k, v, *given)[0][None]
        return SharedPrefix.apply(q, k, v, *given)[None]


def flash_token(counts, q, k, v, ends, longest, scale, used=None):
    """
    A token a sequence, q (n, K, x, E), k and v packed, `used` of each -> out as q, lse (n, K, x). With
    more heads than keys and one token flash takes the heads for tokens, and its kernel that splits the keys.
    """
    given = counts[: len(q) + 1], ends, 1, longest, 0.0, False, False
    kwargs = dict(scale=scale, seqused_k=used)
    out, lse, *_ = aten._flash_attention_forward(q.flatten(1, 2), k, v, *given, **kwargs)
    return out.view(q.shape), lse.T.reshape(q.shape[:3])


def length_bias(lengths, room):
    """A bias (n, 1, 1, room) of -inf beyond each of the lengths (n,), for kernels that read all the room."""
    unused = torch.arange(room, device=lengths.device) >= lengths[:, None]
    return torch.where(unused, -torch.inf, 0.0)[:, None, None]


class DecodeAttention:
    """
    Attention of one new token for G completions of each of B prompts: (a) and (b) again. In (b) the G
    tokens of a prompt are G times as many heads of one token: its keys are read once for all of them.

    prompt_kv   layer -> (k, v), each (sum of P, K, E), packed; sizes: list of B lengths
    own_kv      layer -> (k, v), each (B G, room, K, E): what a completion has already, such as its own
                question after a clip that it shares with others; used (B G,) int32: how much of it

    Between two growths of the room or calls of `keep`, a token changes no shape and no address, only
    values: so its kernels can be recorded once and replayed (models/graphs.py).
    """

    def __init__(self, prompt_kv, sizes, own_kv, used, longest):
        self.prompt_kv, self.own_kv, self.used, self.longest = prompt_kv, own_kv, used, longest
        self.packed = used.is_cuda and KERNEL == "flash"  # else padded: one call for all prompts
        if not self.packed:
            for layer, pair in prompt_kv.items():
                prompt_kv[layer] = tuple(pad_sequence(x.split(sizes), True) for x in pair)
        self.place(sizes)

    def place(self, sizes):
        """What attend needs to know of shapes, made once for many tokens."""
        device, self.group_size, self.new = self.used.device, len(self.used) // len(sizes), True
        self.prompts, self.room = Spans(sizes, device), next(iter(self.own_kv.values()))[0].shape[1]
        self.rows = torch.arange(len(self.used), device=device)
        self.counts = torch.arange(len(self.used) + 1, dtype=torch.int32, device=device)
        self.own_ends = self.counts * self.room
        self.at, self.bias = self.used.long() - 1, length_bias(self.used, self.room)
        self.prompt_bias = length_bias(self.prompts.ends.diff(), self.prompts.longest)

    def next_token(self):
        """To be called before each token. -> True if the tensors are not those of the last one."""
        if self.longest == self.room:
            more = max(self.room, GPU_ROOM) if self.used.is_cuda else ROOM  # a GPU records slowly
            for layer, pair in self.own_kv.items():  # one at a time: twice all may not fit
                self.own_kv[layer] = tuple(F.pad(x, (0, 0, 0, 0, 0, more)) for x in pair)
            self.place(self.prompts.sizes)
        self.longest += 1
        self.used += 1
        self.at += 1
        self.bias[self.rows, 0, 0, self.at] = 0
        new, self.new = self.new, False
        return new

    def attend(self, layer, q, k, v, scaling):
        """q (B G, H, 1, E), k and v (B G, K, 1, E) -> (B G, 1, H, E)"""
        own_k, own_v = self.own_kv[layer]
        own_k[self.rows, self.at], own_v[self.rows, self.at] = k[:, :, 0], v[:, :, 0]
        num_kv, width = k.shape[1], k.shape[3]
        q = q.reshape(-1, self.group_size, num_kv, q.shape[1] // num_kv, width)  # (B, G, K, H/K, E)
        of_own, of_prompt = q.flatten(0, 1), q.transpose(1, 2).flatten(2, 3)  # (B, K, G H/K, E)
        if q.is_cuda and KERNEL == "flash":
            kv = own_k.flatten(0, 1), own_v.flatten(0, 1), self.own_ends, self.room, scaling
            own, own_lse = flash_token(self.counts, of_own, *kv, self.used)
            kv = *self.prompt_kv[layer], self.prompts.ends, self.prompts.longest, scaling
            part, lse = flash_token(self.counts, of_prompt, *kv)
        else:
            kv = (x.transpose(1, 2) for x in (own_k, own_v))
            own, own_lse = sdpa_with_lse(of_own, *kv, scaling, bias=self.bias.to(q))
            kv = (x.transpose(1, 2) for x in self.prompt_kv[layer])
            part, lse = sdpa_with_lse(of_prompt, *kv, scaling, bias=self.prompt_bias.to(q))
        part, lse = (x.unflatten(2, (self.group_size, -1)).transpose(1, 2) for x in (part, lse))
        share = (own_lse.view(lse.shape) - lse).sigmoid()[..., None].to(own)
        return part.lerp(own.view(part.shape), share).reshape(len(own_k), 1, -1, width)

    def keep(self, prompts, rows):
        """Only these prompts (indices, ascending) and rows (indices, as many of each prompt) go on."""
        chosen, old = prompts.tolist(), self.prompts.sizes
        sizes = [old[b] for b in chosen]
        if len(sizes) < len(old):
            join = lambda x: torch.cat([x.split(old)[b] for b in chosen])  # noqa: E731
            take = join if self.packed else lambda x: x[prompts, : max(sizes)]
            for layer, pair in self.prompt_kv.items():  # one at a time: twice all may not fit
                self.prompt_kv[layer] = tuple(map(take, pair))
        for layer, pair in self.own_kv.items():
            self.own_kv[layer] = tuple(x[rows] for x in pair)
        self.used = self.used[rows]
        self.place(sizes)


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, shared, **_):
    """What the text layers call: `shared` is a PackedAttention or a DecodeAttention."""
    return shared.attend(module.layer_idx, query, key, value, scaling), None


def window_attention(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **_
):
    """What towers call on a GPU: all windows of a clip at once. (1, H, L, E) -> (1, L, H, E)"""
    qkv, ends = (x[0].transpose(0, 1) for x in (query, key, value)), cu_seq_lens_q.int()
    given = ends, ends, int(max_length_q), int(max_length_q), 0.0, False, False
    return torch.ops.aten._flash_attention_forward(*qkv, *given, scale=scaling)[0][None], None
