"""
The head's logits in float32 from weights in bfloat16; patch embeddings as matrix products.

    python -m pytest tests/test_head.py
"""

import copy

import pytest
import torch
from pretended_gpu import GPU, pretended_gpu
from torch import nn

from models.clip_prefix import continue_prefix, read_prefix
from models.head import float32_logits, head_logprobs
from models.inputs import Prompt
from models.loading import load_policy, load_to_answer
from models.patch_embedding import is_patch_embedding, patch_product


def head_with_large_logits(dtype):
    """Three tokens with logits near 20, others near 0 -> lm_head, hidden states (64, D)"""
    torch.manual_seed(0)
    width = 256
    direction = torch.randn(width) / width**0.5
    lm_head = nn.Linear(width, 300, bias=False)
    nn.init.normal_(lm_head.weight, std=0.02)
    lm_head.weight.data[:3] += 20 * direction + 0.02 * torch.randn(3, width)
    hidden = direction * width**0.5 / direction.norm() / width**0.5 + 0.02 * torch.randn(64, width)
    return lm_head.to(dtype), hidden.to(dtype)


def gaps(logits_of, dtype=torch.bfloat16):
    """|log-prob in float32 from the same operands - ours| of each token, in nats"""
    lm_head, hidden = head_with_large_logits(dtype)
    exact = hidden.double() @ lm_head.weight.double().T
    assert 15 < exact[:, :3].min() and exact[:, :3].max() < 30
    expected = exact.log_softmax(-1)[:, :3]
    ours = logits_of(lm_head, hidden).float().log_softmax(-1)[:, :3]
    return (ours - expected).abs()


@torch.no_grad()
def test_large_logits_are_not_rounded():
    assert gaps(float32_logits).max() <= 0.02
    assert gaps(lambda lm_head, hidden: lm_head(hidden)).max() > 0.05  # what a bfloat16 head gives


def test_a_gpu_computes_them_in_one_product():
    lm_head, hidden = head_with_large_logits(torch.bfloat16)
    hidden.requires_grad_()
    expected = float32_logits(lm_head, hidden)
    expected[:, :3].sum().backward()
    with pretended_gpu():
        there = copy.deepcopy(lm_head).to(GPU)
        there.weight.grad = None
        inputs = hidden.detach().to(GPU).requires_grad_()
        logits = float32_logits(there, inputs)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.cpu(), expected)
        logits[:, :3].sum().backward()
        torch.testing.assert_close(
            inputs.grad.cpu().float(), hidden.grad.float(), rtol=0.02, atol=0.1
        )
        grad = there.weight.grad.cpu().float()
        torch.testing.assert_close(grad, lm_head.weight.grad.float(), rtol=0.02, atol=0.1)


def test_float32_and_float64_are_as_ever():
    for dtype in (torch.float32, torch.float64):
        lm_head, hidden = head_with_large_logits(dtype)
        assert torch.equal(float32_logits(lm_head, hidden), lm_head(hidden))


def test_chunks_change_nothing(monkeypatch):
    lm_head, hidden = head_with_large_logits(torch.bfloat16)
    targets = torch.arange(64) % 300
    whole = head_logprobs(lm_head, hidden, targets, 0.9)
    monkeypatch.setattr("models.head.CHUNK", 10)
    for one, two in zip(whole, head_logprobs(lm_head, hidden, targets, 0.9), strict=True):
        torch.testing.assert_close(one, two)


@torch.no_grad()
def test_the_first_token_after_a_kept_clip_has_float32_logits_too(toy_dir):
    policy = load_to_answer(str(toy_dir / "model"), torch.device("cpu"), torch.bfloat16)
    prompt = Prompt(torch.arange(10, 30), torch.arange(20).expand(3, -1), {})
    logits, _ = continue_prefix(policy, prompt, read_prefix(policy, prompt, 12), num_rows=1)
    assert logits.dtype == torch.float32 and (logits.bfloat16() != logits).any()


# ---- patch embeddings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv, shape",
    [
        (nn.Conv3d(3, 32, (2, 14, 14), stride=(2, 14, 14), bias=False), (7, 3, 2, 14, 14)),
        (nn.Conv3d(3, 32, (2, 4, 4), stride=(2, 4, 4)), (2, 3, 4, 12, 20)),
        (nn.Conv2d(3, 32, 16, stride=16), (2, 3, 32, 48)),
        (nn.Conv2d(1, 32, 16, stride=16, bias=False), (2, 1, 45, 128)),  # rows are left over
    ],
)
def test_patch_embedding_is_the_convolution(conv, shape):
    torch.manual_seed(0)
    assert is_patch_embedding(conv)
    conv = conv.double()
    pixels = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = conv(pixels)
    expected.square().sum().backward()
    grads = pixels.grad.clone(), conv.weight.grad.clone()
    pixels.grad = conv.weight.grad = None
    product = patch_product(conv, pixels)
    torch.testing.assert_close(product, expected)
    product.square().sum().backward()
    torch.testing.assert_close(pixels.grad, grads[0])
    torch.testing.assert_close(conv.weight.grad, grads[1])


def test_other_convolutions_stay():
    assert not is_patch_embedding(nn.Conv2d(3, 8, 3, stride=2))
    assert not is_patch_embedding(nn.Conv2d(4, 8, 2, stride=2, groups=2))
    assert not is_patch_embedding(nn.Conv2d(4, 8, 2, stride=2, padding=1))


def test_the_vision_tower_has_no_convolution_in_bfloat16(toy_dir):
    policy = load_policy(str(toy_dir / "model"), 0, False)
    convolutions = [m for m in policy.thinker.model.visual.modules() if isinstance(m, nn.Conv3d)]
    assert convolutions and all(m.forward.__func__ is patch_product for m in convolutions)


def test_the_patch_embedding_gets_no_adapter(toy_dir):
    policy = load_policy(str(toy_dir / "model"), 2, train_towers=True)
    names = [name for name, p in policy.named_parameters() if "lora_A" in name]
    assert any("visual.blocks" in name for name in names)
    assert not any("patch_embed" in name for name in names)
