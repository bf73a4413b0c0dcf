"""
Attention for many completions of one prompt, without a copy of the prompt. Torch only: copy this
file freely.

    packed row   [ prompt 1 | prompt 2 | ... | c11 | c12 | ... | c21 | ... ]     no span is empty

A prompt token attends to its prompt causally. A completion token attends to its whole prompt and to
its own completion so far. That is two softmaxes without a mask, each by a flash kernel, then merged:

    (a) every prompt and every completion attends to itself causally
    (b) all completions of a prompt attend to all of the prompt
    out = (1 - s) out_a + s out_b,   s = sigmoid(lse_b - lse_a),   lse = log(exp(lse_a) + exp(lse_b))

lse is the log of a softmax's denominator. Flash's backward pass recomputes the probabilities from the
scores and lse, P = exp(S - lse). Given the merged lse and output, these are the probabilities of the
whole softmax, so the gradients of (a) and (b) add up to the exact ones.

L packed tokens, H heads, K key/value heads, E head width, B prompts, G completions of each.
M queries: all L tokens, or in the last layer only those that predict a token of a completion: the last
token of each prompt and all completion tokens.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

aten = torch.ops.aten
KERNEL = "flash"  # set by set_attention_kernel

# Tokens by which the buffer of decoded keys and values grows. On a GPU each growth costs a new
# recording of the CUDA graph.
GROWTH = 64
GPU_GROWTH = 1024


def set_attention_kernel(name, device, dtype):
    """
    Chooses the kernel for all attention of this process.

    name     "auto"           flash; sdpa on a GPU in float32, for which flash has no kernel
             "flash"          torch's own: FlashAttention-2 on a GPU
             "fa3", "fa4"     a newer flash kernel in its place, from a package of its own
             "sdpa"           plain matrix products: slow, any device, any dtype
    returns  "flash" or "sdpa"
    raises   ImportError, RuntimeError    the kernel is not installed or does not take the dtype
    """
    global KERNEL
    float32_on_gpu = device.type == "cuda" and dtype == torch.float32
    if float32_on_gpu and name not in ("auto", "sdpa"):
        raise RuntimeError("it has no kernel for float32 on a GPU")
    if name in ("fa3", "fa4"):
        torch.nn.attention.activate_flash_attention_impl(name.upper())
    if device.type == "cuda":
        # torch would prefer cuDNN's kernel on an H100 or H200. With a mask, its backward pass can give
        # NaN in torch 2.11 (pytorch#196678), and it builds a new plan for each new length.
        torch.backends.cuda.enable_cudnn_sdp(False)
    KERNEL = "sdpa" if name == "sdpa" or float32_on_gpu else "flash"
    return KERNEL


# ---- packed sequences --------------------------------------------------------------------------


class Spans:
    """The lengths of the sequences in a packed tensor, and their ends as flash kernels take them."""

    def __init__(self, sizes, device):
        # the CPU's kernel crashes on an empty sequence, a GPU's leaves its output unwritten
        assert min(sizes) > 0, "an empty sequence"
        self.sizes = sizes
        self.longest = max(sizes)
        self.ends = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device)  # (n + 1,)


def unpack(packed, spans):
    """(L, H, E) -> list of (1, H, length, E), one per sequence"""
    return [x[None].transpose(1, 2) for x in packed.split(spans.sizes)]


def flash(q, k, v, *, q_spans, k_spans, causal, scale):
    """
    Softmax attention of each sequence of queries to the sequence of keys at the same place.

    q        (M, H, E)    packed by q_spans
    k, v     (L, K, E)    packed by k_spans
    returns  out (M, H, E), lse (H, M) float32
    """
    if q.is_cuda and KERNEL == "flash":
        out, lse, *_ = aten._flash_attention_forward(
            q,
            k,
            v,
            cum_seq_q=q_spans.ends,
            cum_seq_k=k_spans.ends,
            max_q=max(q_spans.longest, 2),  # for 1 it would return lse in another layout
            max_k=k_spans.longest,
            dropout_p=0.0,
            is_causal=causal,
            return_debug_mask=False,
            scale=scale,
        )
        return out, lse

    outs, lses = [], []
    sequences = zip(unpack(q, q_spans), unpack(k, k_spans), unpack(v, k_spans))
    for q_one, k_one, v_one in sequences:
        # A lone query is the last of its keys' tokens and sees all of them. The CPU's causal mask is
        # aligned at the start: it would let it see the first key only.
        is_causal = causal and q_one.shape[2] > 1
        out, lse = sdpa_with_lse(q_one, k_one, v_one, scale, causal=is_causal)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def flash_backward(grad, q, k, v, out, lse, *, q_spans, k_spans, causal, scale):
    """
    Gradients of q, k, v. `out` and `lse` may be those of a larger softmax that this one is a part of.

    grad, out  (M, H, E)
    lse        (H, M)
    """
    if q.is_cuda:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            cum_seq_q=q_spans.ends,
            cum_seq_k=k_spans.ends,
            max_q=q_spans.longest,
            max_k=k_spans.longest,
            dropout_p=0.0,
            is_causal=causal,
            rng_state=no_dropout,
            unused=q.new_empty(0),
            scale=scale,
        )

    grads_q, grads_k, grads_v = [], [], []
    sequences = zip(
        unpack(grad, q_spans),
        unpack(q, q_spans),
        unpack(k, k_spans),
        unpack(v, k_spans),
        unpack(out, q_spans),
        lse.split(q_spans.sizes, dim=1),
    )
    for grad_one, q_one, k_one, v_one, out_one, lse_one in sequences:
        is_causal = causal and q_one.shape[2] > 1
        grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_one,
            q_one,
            k_one,
            v_one,
            out_one,
            lse_one[None],
            dropout_p=0.0,
            is_causal=is_causal,
            scale=scale,
        )
        grads_q.append(grad_q[0].transpose(0, 1))
        grads_k.append(grad_k[0].transpose(0, 1))
        grads_v.append(grad_v[0].transpose(0, 1))
    return torch.cat(grads_q), torch.cat(grads_k), torch.cat(grads_v)


def sdpa_with_lse(q, k, v, scale, *, causal=False, bias=None):
    """
    q        (n, H, x, E)
    k, v     (n, K, y, E)
    bias     (n, 1, 1, y) or None
    returns  out (n, H, x, E), lse (n, H, x)
    """
    if KERNEL == "flash":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p=0.0, is_causal=causal, attn_mask=bias, scale=scale
        )
    heads_per_key = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(heads_per_key, dim=1)
    v = v.repeat_interleave(heads_per_key, dim=1)
    # scores of 50 rounded to bfloat16 would be off by 0.1
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(score_dtype) @ k.to(score_dtype).mT * scale  # (n, H, x, y)
    if causal:
        visible = torch.ones_like(scores, dtype=torch.bool).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).to(v) @ v, scores.logsumexp(-1)


# ---- prompts and their completions, in the update and the prefill --------------------------------


class SharedSpans(NamedTuple):
    """What shared_prefix needs to know of a packed row."""

    queries: Spans  # of (a): prompts, then completions; in the last layer one query for each prompt
    keys: Spans  # of (a): prompts, then completions
    prompts: Spans  # keys of (b)
    completions: Spans  # queries of (b): all completions of a prompt as one sequence
    num_prompt_queries: int  # rows of q before the first completion
    num_prompt_keys: int  # rows of k and v before the first completion


def shared_prefix(q, k, v, spans, scale):
    """q (M, H, E), k and v (L, K, E), spans SharedSpans -> out (M, H, E), lse (H, M)"""
    first = spans.num_prompt_queries
    num_keys = spans.num_prompt_keys
    out, lse = flash(
        q, k, v, q_spans=spans.queries, k_spans=spans.keys, causal=True, scale=scale
    )  # (a)
    prompt_out, prompt_lse = flash(
        q[first:],
        k[:num_keys],
        v[:num_keys],
        q_spans=spans.completions,
        k_spans=spans.prompts,
        causal=False,
        scale=scale,
    )  # (b)
    prompt_weight = (prompt_lse - lse[:, first:]).sigmoid().T[..., None]  # (., H, 1) float32
    merged = out[first:].to(prompt_weight).lerp(prompt_out.to(prompt_weight), prompt_weight)
    merged = merged.to(out)  # rounded once
    merged_lse = torch.logaddexp(lse[:, first:], prompt_lse)
    return torch.cat([out[:first], merged]), torch.cat([lse[:, :first], merged_lse], dim=1)


class SharedPrefix(torch.autograd.Function):
    """shared_prefix with flash's own backward passes."""

    @staticmethod
    def forward(ctx, q, k, v, spans, scale):
        out, lse = shared_prefix(q, k, v, spans, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spans = spans
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        spans = ctx.spans
        first = spans.num_prompt_queries
        num_keys = spans.num_prompt_keys
        grad_q, grad_k, grad_v = flash_backward(
            grad.contiguous(),
            q,
            k,
            v,
            out,
            lse,
            q_spans=spans.queries,
            k_spans=spans.keys,
            causal=True,
            scale=ctx.scale,
        )  # (a)
        prompt_grad_q, prompt_grad_k, prompt_grad_v = flash_backward(
            grad[first:].contiguous(),
            q[first:],
            k[:num_keys],
            v[:num_keys],
            out[first:],
            lse[:, first:].contiguous(),
            q_spans=spans.completions,
            k_spans=spans.prompts,
            causal=False,
            scale=ctx.scale,
        )  # (b)
        grad_q[first:] += prompt_grad_q
        grad_k[:num_keys] += prompt_grad_k
        grad_v[:num_keys] += prompt_grad_v
        return grad_q, grad_k, grad_v, None, None


class PackedAttention:
    """
    Attention of a packed row of prompts and completions.

    prompts      list of B lengths
    completions  list of B lists of lengths
    record       whether to keep the row's keys and values of every layer, in `recorded`

    predicting   (M,) rows that predict a token: the last of each prompt, and all of completions
    """

    def __init__(self, prompts, completions, device, record=False):
        self.record = record
        self.recorded = {}  # layer -> k, v, each (L, K, E)
        completion_sizes = [size for group in completions for size in group]
        num_prompt_tokens = sum(prompts)
        num_tokens = num_prompt_tokens + sum(completion_sizes)

        last_of_prompts = [end - 1 for end in accumulate(prompts)]
        completion_rows = range(num_prompt_tokens, num_tokens)
        self.predicting = torch.tensor([*last_of_prompts, *completion_rows]).to(device)

        self.all_queries = SharedSpans(
            queries=Spans([*prompts, *completion_sizes], device),
            keys=Spans([*prompts, *completion_sizes], device),
            prompts=Spans(prompts, device),
            completions=Spans([sum(group) for group in completions], device),
            num_prompt_queries=num_prompt_tokens,
            num_prompt_keys=num_prompt_tokens,
        )
        self.predicting_queries = self.all_queries._replace(
            queries=Spans([1] * len(prompts) + completion_sizes, device),
            num_prompt_queries=len(prompts),
        )

    def attend(self, layer, q, k, v, scaling):
        """
        q        (1, H, L, E), or (1, H, M, E): only the rows `predicting`
        k, v     (1, K, L, E)
        returns  (1, L or M, H, E)
        """
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (., heads, E), views
        if self.record:
            self.recorded[layer] = k, v
        spans = self.all_queries if len(q) == len(k) else self.predicting_queries
        if KERNEL == "sdpa":
            out, _ = shared_prefix(q, k, v, spans, scaling)
        else:
            out = SharedPrefix.apply(q, k, v, spans, scaling)
        return out[None]


# ---- decoding ----------------------------------------------------------------------------------


def flash_one_token(q, k, v, *, query_ends, key_ends, longest, scale, lengths=None):
    """
    One query token for each sequence of keys, on a GPU. With one token and more heads than key heads,
    flash takes the heads as tokens, and uses its kernel that splits the keys over the GPU.

    q        (n, K, H/K, E)
    k, v     (tokens, K, E)    packed: sequence i is key_ends[i] ... key_ends[i + 1]
    lengths  (n,) int32        how many tokens of each sequence count; None: all
    returns  out (n, K, H/K, E), lse (n, K, H/K)
    """
    out, lse, *_ = aten._flash_attention_forward(
        q.flatten(1, 2),
        k,
        v,
        cum_seq_q=query_ends[: len(q) + 1],
        cum_seq_k=key_ends,
        max_q=1,
        max_k=longest,
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        scale=scale,
        seqused_k=lengths,
    )
    return out.view(q.shape), lse.T.reshape(q.shape[:3])


def length_bias(lengths, capacity):
    """(n,) -> (n, 1, 1, capacity): -inf at and after each length, for kernels that read all of it"""
    unused = torch.arange(capacity, device=lengths.device) >= lengths[:, None]
    return torch.where(unused, -torch.inf, 0.0)[:, None, None]


class DecodeAttention:
    """
    Attention of one new token for G completions of each of B prompts: (a) and (b) again. In (b) the G
    tokens of a prompt stand as G times as many heads of one token, so that its keys are read once.

    prompt_kv     layer -> (k, v), each (sum of P, K, E), packed
    prompt_sizes  list of B lengths
    own_kv        layer -> (k, v), each (B G, capacity, K, E): what a completion has of its own already,
                  such as its question after a clip that it shares with others
    lengths       (B G,) int32: how many of these tokens count
    max_length    int: the largest of them, known without asking the device

    Between two calls of `select` or growths of the capacity, a new token changes no shape and no
    address, only values. So its kernels can be recorded once and replayed (models/graphs.py).
    """

    def __init__(self, prompt_kv, prompt_sizes, own_kv, lengths, max_length):
        self.prompt_kv = prompt_kv
        self.own_kv = own_kv
        self.lengths = lengths
        self.max_length = max_length
        # flash reads the packed prompts; the other kernels take them padded, all in one call
        self.packed = lengths.is_cuda and KERNEL == "flash"
        if not self.packed:
            for layer, (k, v) in prompt_kv.items():
                prompt_kv[layer] = (
                    pad_sequence(k.split(prompt_sizes), batch_first=True),
                    pad_sequence(v.split(prompt_sizes), batch_first=True),
                )
        self.rebuild_indices(prompt_sizes)

    def rebuild_indices(self, prompt_sizes):
        """What `attend` needs to know of shapes; stays the same for many tokens."""
        device = self.lengths.device
        num_rows = len(self.lengths)
        first_layer_k, _ = next(iter(self.own_kv.values()))
        self.capacity = first_layer_k.shape[1]
        self.rows_per_group = num_rows // len(prompt_sizes)
        self.prompts = Spans(prompt_sizes, device)
        self.rows = torch.arange(num_rows, device=device)
        self.query_ends = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self.own_ends = self.query_ends * self.capacity
        self.newest = self.lengths.long() - 1  # (B G,) place of the newest token
        self.own_bias = length_bias(self.lengths, self.capacity)
        self.prompt_bias = length_bias(self.prompts.ends.diff(), self.prompts.longest)
        self.rebuilt = True

    def next_token(self):
        """
        Makes place for a token. To be called before each one.

        returns  bool    whether the tensors are others than those of the last token
        """
        if self.max_length == self.capacity:
            self.grow()
        self.max_length += 1
        self.lengths += 1
        self.newest += 1
        self.own_bias[self.rows, 0, 0, self.newest] = 0
        rebuilt = self.rebuilt
        self.rebuilt = False
        return rebuilt

    def grow(self):
        """More capacity for the completions' keys and values."""
        added = max(self.capacity, GPU_GROWTH) if self.lengths.is_cuda else GROWTH
        padding = (0, 0, 0, 0, 0, added)  # E, K, capacity: before and after
        for layer, (k, v) in self.own_kv.items():  # a layer at a time: twice all may not fit
            self.own_kv[layer] = F.pad(k, padding), F.pad(v, padding)
        self.rebuild_indices(self.prompts.sizes)

    def attend(self, layer, q, k, v, scaling):
        """q (B G, H, 1, E), k and v (B G, K, 1, E) -> (B G, 1, H, E)"""
        num_rows, num_kv, _, width = k.shape
        heads_per_key = q.shape[1] // num_kv
        own_k, own_v = self.own_kv[layer]
        own_k[self.rows, self.newest] = k[:, :, 0]
        own_v[self.rows, self.newest] = v[:, :, 0]

        own_q = q.reshape(num_rows, num_kv, heads_per_key, width)
        # (B, G, K, H/K, E) -> (B, K, G H/K, E): the prompt's keys, once for all its completions
        by_prompt = own_q.view(-1, self.rows_per_group, num_kv, heads_per_key, width)
        prompt_q = by_prompt.transpose(1, 2).flatten(2, 3)

        if q.is_cuda and KERNEL == "flash":
            own_out, own_lse, prompt_out, prompt_lse = self.attend_with_flash(
                layer, own_q, prompt_q, scaling
            )
        else:
            own_out, own_lse, prompt_out, prompt_lse = self.attend_with_bias(
                layer, own_q, prompt_q, scaling
            )

        # (B, K, G H/K, .) -> (B, G, K, H/K, .), as the completions stand
        prompt_out = prompt_out.unflatten(2, (self.rows_per_group, -1)).transpose(1, 2)
        prompt_lse = prompt_lse.unflatten(2, (self.rows_per_group, -1)).transpose(1, 2)
        own_out = own_out.view(prompt_out.shape)
        own_lse = own_lse.view(prompt_lse.shape)
        own_weight = (own_lse - prompt_lse).sigmoid()[..., None].to(own_out)
        return prompt_out.lerp(own_out, own_weight).reshape(num_rows, 1, -1, width)

    def attend_with_flash(self, layer, own_q, prompt_q, scaling):
        own_k, own_v = self.own_kv[layer]
        prompt_k, prompt_v = self.prompt_kv[layer]
        own_out, own_lse = flash_one_token(
            own_q,
            own_k.flatten(0, 1),
            own_v.flatten(0, 1),
            query_ends=self.query_ends,
            key_ends=self.own_ends,
            longest=self.capacity,
            scale=scaling,
            lengths=self.lengths,
        )
        prompt_out, prompt_lse = flash_one_token(
            prompt_q,
            prompt_k,
            prompt_v,
            query_ends=self.query_ends,
            key_ends=self.prompts.ends,
            longest=self.prompts.longest,
            scale=scaling,
        )
        return own_out, own_lse, prompt_out, prompt_lse

    def attend_with_bias(self, layer, own_q, prompt_q, scaling):
        own_k, own_v = (x.transpose(1, 2) for x in self.own_kv[layer])
        prompt_k, prompt_v = (x.transpose(1, 2) for x in self.prompt_kv[layer])
        own_bias = self.own_bias.to(own_q)
        prompt_bias = self.prompt_bias.to(own_q)
        own_out, own_lse = sdpa_with_lse(own_q, own_k, own_v, scaling, bias=own_bias)
        prompt_out, prompt_lse = sdpa_with_lse(
            prompt_q, prompt_k, prompt_v, scaling, bias=prompt_bias
        )
        return own_out, own_lse, prompt_out, prompt_lse

    def select(self, prompts, rows):
        """Drops all but these prompts (ascending indices) and rows (indices, as many of each prompt)."""
        old_sizes = self.prompts.sizes
        chosen = prompts.tolist()
        sizes = [old_sizes[b] for b in chosen]
        if len(sizes) < len(old_sizes):
            for layer, (k, v) in self.prompt_kv.items():  # a layer at a time: twice all may not fit
                if self.packed:
                    k_parts = k.split(old_sizes)
                    v_parts = v.split(old_sizes)
                    k = torch.cat([k_parts[b] for b in chosen])
                    v = torch.cat([v_parts[b] for b in chosen])
                else:
                    k = k[prompts, : max(sizes)]
                    v = v[prompts, : max(sizes)]
                self.prompt_kv[layer] = k, v
        for layer, (k, v) in self.own_kv.items():
            self.own_kv[layer] = k[rows], v[rows]
        self.lengths = self.lengths[rows]
        self.rebuild_indices(sizes)


# ---- what transformers calls -------------------------------------------------------------------


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, shared, **_):
    """Attention of the text model's layers. shared: a PackedAttention or a DecodeAttention"""
    return shared.attend(module.layer_idx, query, key, value, scaling), None


def window_attention(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **_
):
    """Attention of the towers on a GPU, all windows of a clip at once. (1, H, L, E) -> (1, L, H, E)"""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    ends = cu_seq_lens_q.int()
    longest = int(max_length_q)
    out, *_ = aten._flash_attention_forward(
        q,
        k,
        v,
        cum_seq_q=ends,
        cum_seq_k=ends,
        max_q=longest,
        max_k=longest,
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        scale=scaling,
    )
    return out[None], None
