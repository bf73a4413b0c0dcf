"""
What bfloat16 leaves of a small adapter, of large logits and of a clip: steps of first_gpu.py, which
hands each of them `at`, the sizes and the device. Beside each stands the same in float32 or float64.
"""

import run.before_torch  # noqa: F401  must come before torch

import copy
from functools import partial
from unittest.mock import patch

import torch
from torch import nn
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from experiments import bench
from experiments.gpu_attention import difference, timed
from models import attention, qwen, sharding
from models.head import float32_logits
from models.inputs import Prompt
from models.loading import wrap_policy
from models.patch_embedding import is_patch_embedding
from models.policy import completion_logprobs

SHAPE = dict(hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=4, vocab=4096)
TINY = dict(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, vocab=512)
STEPS_AT = ((5e-7, 100), (1e-5, 10), (1e-5, 100), (1e-5, 400))  # learning rate, steps


def fill_adapter(policy, size):
    """B as after steps of Adam that all went one way, which move every weight by `size`."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B.default" in name:
            direction = torch.randn(parameter.shape, generator=generator).sign()
            parameter.data.copy_(direction * size)


@torch.no_grad()
def changes(policy, inputs):
    """How much the adapter changes the log-prob of each token: (n,) float64, nats"""
    logprobs, mask, _ = completion_logprobs(policy, *inputs, 1.0)
    with policy.reference():
        reference, _, _ = completion_logprobs(policy, *inputs, 1.0)
    return (logprobs - reference)[mask].double()


def adapter_arrives(at):
    """
    Correlation of these changes in bfloat16 with those in float32, and their standard deviations. With
    an adapter that is rounded away, the first is near 0.
    """
    torch.manual_seed(0)
    with torch.device(at.device):
        thinker = Thinker(bench.thinker_config(**(TINY if at.tiny else SHAPE)))
    policy = wrap_policy(thinker, 16, train_towers=False)
    sharding.cast_frozen(policy, torch.bfloat16)
    policy = policy.to(at.device)
    exact = copy.deepcopy(policy)
    sharding.cast_params(exact.parameters(), torch.float32)
    inputs = bench.make_inputs(policy.thinker.config.text_config.vocab_size, 256, 64, 8)
    result = {}
    for lr, steps in STEPS_AT:
        fill_adapter(policy, lr * steps)
        fill_adapter(exact, lr * steps)
        rounded = changes(policy, inputs)
        with patch.object(attention, "KERNEL", "sdpa"):  # flash has no kernel for float32 on a GPU
            true = changes(exact, inputs)
        result[f"lr {lr:g}, {steps} steps"] = dict(
            correlation=torch.corrcoef(torch.stack([rounded, true]))[0, 1].item(),
            bfloat16=rounded.std().item(),
            float32=true.std().item(),
        )
    return result


@torch.no_grad()
def head_gap(at):
    """Log-probs of three tokens with logits near 20, against float64: the largest gap, nats."""
    width, vocab = at.hidden, min(at.vocab, 16384)
    torch.manual_seed(0)
    direction = torch.randn(width)
    direction /= direction.norm()
    lm_head = nn.Linear(width, vocab, bias=False)
    nn.init.normal_(lm_head.weight, std=0.02)
    lm_head.weight[:3] += 20 * direction + 0.02 * torch.randn(3, width)
    hidden = direction + 0.3 * torch.randn(64, width) / width**0.5
    sharding.cast_params(lm_head.parameters(), torch.bfloat16)
    lm_head = lm_head.to(at.device)
    hidden = hidden.to(at.device, torch.bfloat16)
    exact = (hidden.double() @ lm_head.weight.double().T).log_softmax(-1)[:, :3]
    result = {}
    for name, logits_of in (("ours", partial(float32_logits, lm_head)), ("bfloat16", lm_head)):
        logprobs = logits_of(hidden).float().log_softmax(-1)[:, :3]
        result[name] = (logprobs - exact).abs().max().item()
    return result


@torch.no_grad()
def tower(at):
    """
    A clip through the vision tower: ms, difference from the tower in float32 with its convolution, and
    ms of that convolution in the tower's own dtype, which a product replaces.
    """
    core = at.policy.thinker.model
    vision = core.visual.config
    frames, side = (2, 4) if at.tiny else (32, 24)  # pairs of frames; patches of a side
    patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(frames * side * side, patch_size)
    video = dict(pixels=pixels, grid=torch.tensor([[frames, side, side]]))
    prompt = Prompt(torch.zeros(1, dtype=torch.long), torch.zeros(3, 1), dict(video=video))
    (features,) = at.policy.encode([prompt])

    exact = copy.deepcopy(core.visual)
    sharding.cast_params(exact.parameters(), torch.float32)
    exact.config._attn_implementation_internal = "sdpa"
    (conv,) = [module for module in exact.modules() if is_patch_embedding(module)]
    del conv.forward  # the product's: the class's own again
    with patch.object(core, "visual", exact):
        (expected,) = qwen.run_visual(core, pixels.to(at.device), video["grid"].to(at.device))

    (conv,) = [module for module in core.visual.modules() if is_patch_embedding(module)]
    shape = (-1, vision.in_channels, vision.temporal_patch_size, *2 * (vision.patch_size,))
    patches = pixels.to(at.device, conv.weight.dtype).view(shape)
    return dict(
        difference=difference(features["video"], expected.double()),
        tokens=len(expected),
        ms=timed(at, lambda: at.policy.encode([prompt]), 3, 1),
        product_ms=timed(at, lambda: conv.forward(patches), 3, 1),
        convolution_ms=timed(at, lambda: type(conv).forward(conv, patches), 1, 1),
    )
