"""
Attention on a GPU beside the same in float64 with every score, and its milliseconds: steps of
first_gpu.py, which hands each of them `at`, the sizes and the device.

P prompt tokens, C completion tokens, G completions of a prompt, B prompts, L packed tokens,
H heads, K key/value heads, E head width.
"""

import run.before_torch  # noqa: F401  must come before torch

import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import attention
from models.rollout import sample


def timed(at, task, repeats=5, warm_up=2):
    """-> milliseconds of a run."""
    for i in range(warm_up + repeats):
        if i == warm_up:
            at.sync()
            began = time.perf_counter()
        task()
    at.sync()
    return (time.perf_counter() - began) / repeats * 1e3


def difference(ours, exact):
    """|ours - exact| / |exact|"""
    return ((ours.double() - exact).norm() / exact.norm()).item()


def random(at, *shape):
    return torch.randn(*shape, device=at.device, dtype=at.dtype)


def packed(at, num_prompt, lengths):
    """-> callable(q, k, v), each (L, H or K, E) -> (L, H, E): our attention over one group."""
    packed_attention = attention.PackedAttention([num_prompt], [lengths], at.device)

    def attend(q, k, v):
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # (1, H or K, L, E)
        return packed_attention.attend(0, q, k, v, at.width**-0.5)[0]

    return attend


def dense(at, q, k, v, num_prompt, lengths):
    """The same in float64, with every score."""
    completion = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    owner = torch.cat([torch.full((num_prompt,), -1), completion])  # (L,) -1: the prompt
    visible = ((owner[:, None] == owner) | (owner == -1)).tril().to(at.device)
    heads_per_kv = at.heads // at.kv_heads
    k, v = (x.repeat_interleave(heads_per_kv, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = (q @ k.mT * at.width**-0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def packed_is_right(at):
    """
    Output and gradients of q, k, v against float64; ragged, with a completion of one token. Then the
    output of the last layer, where the prompt's last token is its only query.
    """
    num_prompt, lengths = 333, [64, 1, 130, 7]
    total = num_prompt + sum(lengths)
    qkv = [random(at, total, heads, at.width) for heads in (at.heads, at.kv_heads, at.kv_heads)]
    grad = torch.randn_like(qkv[0])
    exact = [x.double().requires_grad_() for x in qkv]
    ours = [x.to(at.dtype).requires_grad_() for x in qkv]
    expected = dense(at, *exact, num_prompt, lengths)
    expected.backward(grad.double())
    attend = packed(at, num_prompt, lengths)
    out = attend(*ours)
    out.backward(grad)
    q, k, v = ours
    last = attend(q[num_prompt - 1 :], k, v)
    return {
        "out": difference(out, expected),
        "q": difference(q.grad, exact[0].grad),
        "k": difference(k.grad, exact[1].grad),
        "v": difference(v.grad, exact[2].grad),
        "last layer": difference(last, expected[num_prompt - 1 :]),
    }


def packed_ms(at):
    """A layer of the update, forward and with its backward; the prompt alone by torch's kernels."""
    total = at.P + at.G * at.C
    qkv = [random(at, total, heads, at.width) for heads in (at.heads, at.kv_heads, at.kv_heads)]
    grad = torch.randn_like(qkv[0])
    attend = packed(at, at.P, [at.C] * at.G)
    ms = dict(forward=timed(at, lambda: attend(*qkv)))
    qkv = [x.requires_grad_() for x in qkv]
    ms["both"] = timed(at, lambda: attend(*qkv).backward(grad))
    if at.on_gpu:
        prompt = [x[: at.P].detach()[None].transpose(1, 2).requires_grad_() for x in qkv]

        def causal():
            out = F.scaled_dot_product_attention(*prompt, is_causal=True, enable_gqa=True)
            out.sum().backward()

        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(kernel):
                ms[f"prompt, {kernel.name}"] = timed(at, causal)
    return ms


def decode_is_right(at, num_prompts):
    """A token of all completions: against float64, ms a layer, ms of sampling."""
    rows, longest = num_prompts * at.G, 3
    sizes = [at.P - 5 * b for b in range(num_prompts)]
    prompt_kv = [random(at, sum(sizes), at.kv_heads, at.width) for _ in range(2)]
    own_kv = [random(at, rows, longest, at.kv_heads, at.width) for _ in range(2)]
    used = torch.full((rows,), longest, dtype=torch.int32, device=at.device)
    decode = attention.DecodeAttention(
        {0: tuple(prompt_kv)}, sizes, {0: tuple(own_kv)}, used, longest
    )
    q, k, v = (random(at, rows, h, 1, at.width) for h in (at.heads, at.kv_heads, at.kv_heads))
    decode.next_token()
    out = decode.attend(0, q, k, v, at.width**-0.5)[:, 0]  # (B G, H, E)

    exact = []
    for row in range(rows):
        prompt_keys, prompt_values = (x.split(sizes)[row // at.G] for x in prompt_kv)
        keys = torch.cat([prompt_keys, own_kv[0][row], k[row, None, :, 0]]).double()
        values = torch.cat([prompt_values, own_kv[1][row], v[row, None, :, 0]]).double()
        queries = q[row, :, 0].double().view(at.kv_heads, -1, at.width)
        scores = queries @ keys.permute(1, 2, 0) * at.width**-0.5  # (K, H/K, keys)
        exact.append((scores.softmax(-1) @ values.transpose(0, 1)).view(at.heads, at.width))
    logits = torch.randn(rows, at.vocab, device=at.device)
    noise = torch.rand(rows, dtype=torch.float64, device=at.device)
    return dict(
        out=difference(out, torch.stack(exact)),
        layer_ms=timed(at, lambda: decode.attend(0, q, k, v, at.width**-0.5), 20),
        sample_ms=timed(at, lambda: sample(logits, 1.0, noise)),
    )
