"""
Shared-prefix attention against a dense softmax in float64, and the sampler against the plain CDF.

    python -m pytest tests/test_attention.py
"""

import pytest
import torch

from models import attention
from models.attention import DecodeAttention, PackedAttention
from models.rollout import sample

CASES = {  # prompts, completions of each, H, K, E
    "one": ([5], [[3]], 2, 2, 8),
    "ragged": ([7, 1, 12], [[4, 1, 9], [1], [2, 30]], 4, 2, 16),
    "one token each": ([3, 2], [[1, 1], [1]], 4, 1, 8),
    "the 7B model's heads": ([40], [[11, 6]], 28, 4, 128),
    "longer than a block of the kernel": ([600, 90], [[150, 33], [70]], 4, 2, 32),
}


def inputs(case, dtype, scale=1.0):
    prompts, completions, H, K, E = CASES[case]
    generator = torch.Generator().manual_seed(0)
    length = sum(prompts) + sum(map(sum, completions))
    make = lambda heads: torch.randn(length, heads, E, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v, grad = make(H) * scale, make(K) * scale, make(K), make(H)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)], grad.to(dtype)


def oracle(q, k, v, prompts, completions):
    """For each token the keys that it may see, one by one; one softmax, in float64. (L, H, E)"""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    spans, row = [], sum(prompts)  # (the prompt's tokens, the first own token, its end)
    for b, (size, group) in enumerate(zip(prompts, completions)):
        begin = sum(prompts[:b])
        spans += [([], begin, begin + size)]
        for n in group:
            spans += [([*range(begin, begin + size)], row, row + n)]
            row += n
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for before, begin, end in spans:
        for t in range(begin, end):
            seen[t, before + [*range(begin, t + 1)]] = True
    scores = torch.einsum("the,she->hts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hts,she->the", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def packed(q, k, v, case, dtype=None):
    prompts, completions, _, _, E = CASES[case]
    shared = PackedAttention(prompts, completions, "cpu")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # as the layers hand them over
    return shared.attend(0, q, k, v, E**-0.5)[0]


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kernel", ["flash", "sdpa"])
@pytest.mark.parametrize("scale", [1.0, 4.0])  # flat softmaxes and hard ones
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_a_dense_softmax(case, scale, kernel, monkeypatch):
    monkeypatch.setattr(attention, "KERNEL", kernel)
    (qkv, grad), (exact, _) = inputs(case, torch.float64, scale), inputs(case, torch.float64, scale)
    out, expected = packed(*qkv, case), oracle(*exact, *CASES[case][:2])
    assert error(out, expected) < 1e-13
    out.backward(grad)
    expected.backward(grad)
    for x, y in zip(qkv, exact, strict=True):
        assert error(x.grad, y.grad) < 1e-12


@pytest.mark.parametrize("kernel", ["flash", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_the_last_layer_asks_for_what_is_read(case, kernel, monkeypatch):
    """One query a prompt, its last token's: values and gradients are those of all queries, at these rows."""
    monkeypatch.setattr(attention, "KERNEL", kernel)
    prompts, completions, H, _, E = CASES[case]
    (qkv, grad), (exact, _) = inputs(case, torch.float64), inputs(case, torch.float64)
    shared = PackedAttention(prompts, completions, "cpu")
    ends = [sum(prompts[: b + 1]) - 1 for b in range(len(prompts))]
    assert shared.predicting.tolist() == ends + [*range(sum(prompts), len(grad))]
    q, k, v = (x.transpose(0, 1)[None] for x in qkv)
    out = shared.attend(0, q[:, :, shared.predicting], k, v, E**-0.5)[0]
    expected = oracle(*exact, prompts, completions)[shared.predicting]
    assert error(out, expected) < 1e-13
    out.backward(grad[shared.predicting])
    expected.backward(grad[shared.predicting])
    for x, y in zip(qkv, exact, strict=True):
        assert error(x.grad, y.grad) < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("case", ["ragged", "longer than a block of the kernel"])
def test_in_less_than_float64(case, dtype, tolerance):
    qkv, grad = inputs(case, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out, expected = packed(*qkv, case), oracle(*exact, *CASES[case][:2])
    out.backward(grad)
    expected.backward(grad.double())
    assert error(out, expected) < tolerance / 2
    for x, y in zip(qkv, exact, strict=True):
        assert error(x.grad, y.grad) < tolerance


def test_gradients_by_differences():
    """gradcheck: the merged backward pass is the derivative of the merged forward pass."""
    case = "one token each"
    qkv, _ = inputs(case, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: packed(*x, case), qkv)


def test_an_empty_sequence_is_refused():
    for sizes in (([3], [[0]]), ([0], [[2]]), ([3, 1], [[1], []])):
        with pytest.raises(AssertionError, match="empty sequence"):
            PackedAttention(*sizes, "cpu")


def test_what_is_chosen(monkeypatch):
    monkeypatch.setattr(attention, "KERNEL", "flash")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert attention.set_attention_kernel("auto", cpu, torch.float32) == "flash" == attention.KERNEL
    assert attention.set_attention_kernel("auto", gpu, torch.bfloat16) == "flash"
    assert attention.set_attention_kernel("auto", gpu, torch.float32) == "sdpa" == attention.KERNEL
    assert attention.set_attention_kernel("sdpa", cpu, torch.bfloat16) == "sdpa"
    for name, dtype in (("flash", torch.float32), ("fa3", torch.bfloat16)):  # no kernel; no package
        with pytest.raises((ImportError, RuntimeError)):
            attention.set_attention_kernel(name, gpu, dtype)


# ---- decoding ------------------------------------------------------------------------------------


def decoded(qkv, prompts, tails, new, group_size, E, leave=()):
    """
    The outputs (B G, new, H, E) of decoding token by token what stands behind prompts and tails;
    `leave`: {token: (prompts, rows) that go on from it}.
    """
    q, k, v = (x.detach() for x in qkv)
    n, rows = sum(prompts), len(prompts) * group_size
    own = [
        x[n:].view(rows, -1, *x.shape[1:]) for x in (q, k, v)
    ]  # a tail and what is new, alike long
    longest = max(tails)
    first = [torch.zeros_like(x[:, :longest]) for x in own[1:]]
    for x, y in zip(first, own[1:]):
        for row, tail in enumerate(tails):
            x[row, :tail] = y[row, :tail]
    used = torch.tensor(tails, dtype=torch.int32)
    decode = DecodeAttention({0: (k[:n], v[:n])}, prompts, {0: tuple(first)}, used, longest)
    outs, alive = (
        torch.full((rows, new, *q.shape[1:]), torch.nan, dtype=q.dtype),
        torch.arange(rows),
    )
    for t in range(new):
        if t in leave:
            left, kept = leave[t]
            decode.select(torch.tensor(left), torch.tensor(kept))
            alive = alive[kept]
        fresh = decode.next_token()
        assert fresh == (
            t in (0, *leave) or decode.max_length == decode.capacity - attention.GROWTH + 1
        )
        at = torch.tensor(tails)[alive] + t
        q_t, k_t, v_t = (x[alive, at][:, :, None] for x in own)
        outs[alive, t] = decode.attend(0, q_t, k_t, v_t, E**-0.5)[:, 0]
    return outs


@pytest.mark.parametrize("kernel", ["flash", "sdpa"])
def test_decoding_equals_the_packed_row(kernel, monkeypatch):
    """Also as the room grows, with tails of several lengths, and after rows and prompts have left."""
    monkeypatch.setattr(attention, "KERNEL", kernel)
    monkeypatch.setattr(attention, "GROWTH", 4)
    prompts, tails, new, H, K, E = [9, 4, 6], [2, 1, 3, 3, 1, 2], 10, 4, 2, 16
    CASES["decode"] = prompts, [[13, 13]] * 3, H, K, E
    qkv, _ = inputs("decode", torch.float64)
    expected = oracle(*qkv, *CASES.pop("decode")[:2])[sum(prompts) :].view(6, 13, H, E).detach()
    outs = decoded(qkv, prompts, tails, new, 2, E, leave={6: ([0, 2], [0, 1, 4, 5]), 8: ([1], [3])})
    for row, (tail, last) in enumerate(zip(tails, [8, 8, 6, 6, 8, 10])):
        assert error(outs[row, :last], expected[row, tail : tail + last]) < 1e-6
        assert outs[row, last:].isnan().all()


def test_scores_are_not_rounded_to_bfloat16():
    """A score of 50 in bfloat16 is off by up to 0.12, and so would be the log of an attention weight."""
    prompts, tails, E = [30, 30], [1, 1], 16
    CASES["hard"] = prompts, [[6], [6]], 4, 2, E
    qkv, _ = inputs("hard", torch.bfloat16, scale=6.0)
    expected = oracle(*qkv, *CASES.pop("hard")[:2])[60:].view(2, 6, 4, E).detach()
    assert error(decoded(qkv, prompts, tails, 5, 1, E), expected[:, 1:]) < 4e-3


# ---- sampling ------------------------------------------------------------------------------------


def test_the_sampler_of_two_levels_gives_the_tokens_of_one():
    generator = torch.Generator().manual_seed(0)
    for vocabulary, spread in ((152_064, 3.0), (1000, 8.0), (257, 1.0), (3, 1.0)):
        logits = torch.randn(40, vocabulary, generator=generator) * spread
        logits[:, 1] = -torch.inf  # impossible
        noise = torch.rand(40, generator=generator, dtype=torch.float64)
        noise[:2] = torch.tensor([0.0, 1 - 2**-53])
        token, logprobs = sample(logits, 0.7, noise)
        cdf = (logits / 0.7).log_softmax(-1).exp().double().cumsum(-1)
        plain = torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0]
        assert token[0] == 0 and (token == plain)[2:].all() and (token < vocabulary).all()
        assert logprobs.isfinite().all()
        expected = (logits / 0.7).log_softmax(-1).gather(1, token[:, None])[:, 0]
        assert torch.equal(logprobs, expected)


def test_the_sampler_draws_each_token_as_often_as_it_should():
    logits = torch.tensor([0.5, 0.2, 0.3]).log().expand(30_000, -1)
    noise = torch.rand(30_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = sample(logits, 1.0, noise)[0].bincount(minlength=3) / 30_000
    assert (counts - torch.tensor([0.5, 0.2, 0.3])).abs().max() < 0.01
