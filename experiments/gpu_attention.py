"""
Attention on a GPU beside the same in float64 with every score, and its milliseconds: steps of
first_gpu.py, which hands each of them `at`, the sizes and the device.

P prompt tokens, C completion tokens, G completions of a prompt, B prompts, L packed tokens,
H heads, K key/value heads, E head width.
"""

import run.before_torch  # noqa: F401  must come before torch

import time
from functools import partial

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


def difference(mine, exact):
    """|mine - exact| / |exact|"""
    return ((mine.double() - exact).norm() / exact.norm()).item()


def random(at, *shape):
    return torch.randn(*shape, device=at.device, dtype=at.dtype)


def packed(at, num_prompt, lengths):
    """-> callable(q, k, v), each (L, H or K, E) -> (L, H, E): the product's, of one group."""
    attend = attention.PackedAttention([num_prompt], [lengths], at.device).attend
    rows = lambda x: x[None].transpose(1, 2)  # noqa: E731
    return lambda q, k, v: attend(0, rows(q), rows(k), rows(v), at.width**-0.5)[0]


def dense(at, q, k, v, num_prompt, lengths):
    """The same in float64, with every score."""
    owner = torch.tensor([-1] * num_prompt + [i for i, n in enumerate(lengths) for _ in range(n)])
    seen = ((owner[:, None] == owner) | (owner == -1)).tril().to(at.device)
    share = at.heads // at.kv_heads
    k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = (q @ k.mT * at.width**-0.5).masked_fill(~seen, -torch.inf)
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
    exact, mine = ([x.to(t).requires_grad_() for x in qkv] for t in (torch.float64, at.dtype))
    expected = dense(at, *exact, num_prompt, lengths)
    expected.backward(grad.double())
    out = packed(at, num_prompt, lengths)(*mine)
    out.backward(grad)
    of_grads = [difference(a.grad, b.grad) for a, b in zip(mine, exact)]
    last = packed(at, num_prompt, lengths)(mine[0][num_prompt - 1 :], *mine[1:])
    errors = difference(out, expected), *of_grads, difference(last, expected[num_prompt - 1 :])
    return dict(zip(("out", "q", "k", "v", "last layer"), errors))


def packed_ms(at):
    """A layer of the update, forward and with its backward; the prompt alone by torch's kernels."""
    total = at.P + at.G * at.C
    qkv = [random(at, total, heads, at.width) for heads in (at.heads, at.kv_heads, at.kv_heads)]
    grad, attend = torch.randn_like(qkv[0]), packed(at, at.P, [at.C] * at.G)
    found = dict(forward=timed(at, lambda: attend(*qkv)))
    qkv = [x.requires_grad_() for x in qkv]
    found["both"] = timed(at, lambda: attend(*qkv).backward(grad))
    prompt = [x[: at.P].detach()[None].transpose(1, 2).requires_grad_() for x in qkv]
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if at.on_gpu else []
    for kernel in kernels:
        causal = partial(F.scaled_dot_product_attention, *prompt, is_causal=True, enable_gqa=True)
        with sdpa_kernel(kernel):
            found[f"prompt, {kernel.name}"] = timed(at, lambda: causal().sum().backward())
    return found


def decode_is_right(at, num_prompts):
    """A token of all completions: against float64, ms a layer, ms of sampling."""
    rows, longest, sizes = num_prompts * at.G, 3, [at.P - 5 * b for b in range(num_prompts)]
    prompt_kv = [random(at, sum(sizes), at.kv_heads, at.width) for _ in "kv"]
    own_kv = [random(at, rows, longest, at.kv_heads, at.width) for _ in "kv"]
    used = torch.full((rows,), longest, dtype=torch.int32, device=at.device)
    given = {0: tuple(prompt_kv)}, sizes, {0: tuple(own_kv)}, used, longest
    decode = attention.DecodeAttention(*given)
    q, k, v = (random(at, rows, h, 1, at.width) for h in (at.heads, at.kv_heads, at.kv_heads))
    decode.next_token()
    out = decode.attend(0, q, k, v, at.width**-0.5)[:, 0]  # (B G, H, E)

    exact, new = [], (k[:, :, 0], v[:, :, 0])
    for row in range(rows):
        pieces = zip((x.split(sizes)[row // at.G] for x in prompt_kv), own_kv, new)
        keys, values = (torch.cat([x, y[row], z[row, None]]).double() for x, y, z in pieces)
        own = q[row, :, 0].double().view(at.kv_heads, -1, at.width)
        scores = own @ keys.permute(1, 2, 0) * at.width**-0.5  # (K, H/K, seen)
        exact.append((scores.softmax(-1) @ values.transpose(0, 1)).view(at.heads, at.width))
    logits = torch.randn(rows, at.vocab, device=at.device)
    noise = torch.rand(rows, dtype=torch.float64, device=at.device)
    return dict(
        out=difference(out, torch.stack(exact)),
        layer_ms=timed(at, lambda: decode.attend(0, q, k, v, at.width**-0.5), 20),
        sample_ms=timed(at, lambda: sample(logits, 1.0, noise)),
    )
