"""
The estimates of docs/gpus.md against bytes that the real code holds, on the meta device, where it takes
the branches of a GPU.

    python -m pytest tests/test_gpu_estimates.py
"""

import weakref
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT
from published_configs import QWEN25_3B
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from experiments import bench, gpu_estimates
from models import loading, sharding
from models.policy import completion_logprobs
from models.rollout import prefill
from run import optim

# width and inner width in the 7B's ratio; all weights of the adapters are few beside activations
SMALL = dict(hidden=512, intermediate=2560, layers=6, heads=8, kv_heads=2)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations in this context make: now, and at their peak."""

    def __init__(self, policy):
        super().__init__()
        kept = (*policy.parameters(), *policy.buffers())
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in kept)
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage):
        if storage in self.known:
            return
        self.known.add(storage)
        self.now += storage.nbytes()
        weakref.finalize(storage, self.remove, storage.nbytes())

    def remove(self, num_bytes):
        self.now -= num_bytes


@contextmanager
def as_on_a_gpu():
    """Tensors on the meta device say that they are on a GPU, for the code that asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
        yield


def build(vocab, lora_rank=2, device="meta"):
    """-> policy with checkpointing and weights as on a GPU, its Sizes"""
    config = bench.thinker_config(vocab=vocab, **SMALL)
    with torch.device(device), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "CHECKPOINT_ABOVE_PARAMS", 0)
        policy = loading.wrap_policy(Thinker(config), lora_rank, train_towers=False, empty=True)
    sharding.cast_frozen(policy, torch.bfloat16)
    return policy, gpu_estimates.sizes_of(policy)


# ---- weights


@pytest.fixture(scope="module")
def sizes():
    """{model: Sizes} of the true ones."""
    names = gpu_estimates.MODELS
    return {name: gpu_estimates.sizes_of(gpu_estimates.build(name, lora_rank=16)) for name in names}


def test_the_models_are_the_published_ones(sizes):
    assert sizes["Qwen2.5-Omni-7B"].text == 7_615_616_512  # as Qwen2.5-7B
    assert sizes["Qwen2.5-Omni-7B"].lora == 40_370_176
    published = QWEN25_3B["text_config"]
    for name, value in gpu_estimates.MODELS["Qwen2.5-Omni-3B"].items():
        assert published.get(name, value) == value


def test_weights_gradients_and_moments_are_those_of_a_real_policy():
    policy, sizes = build(vocab=256, device="cpu")
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = optim.adamw(policy, 1e-3)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights = sum(p.nbytes for p in policy.parameters())
    moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
    gradients = sum(p.grad.nbytes for p in trained)
    copy_of_the_adapter = sum(p.nbytes for p in trained)  # that the reference policy needs
    measured = weights + moments + copy_of_the_adapter
    rollout = gpu_estimates.kept_weights(sizes, 1, full=False, in_update=False)
    update = gpu_estimates.kept_weights(sizes, 1, full=False, in_update=True)
    assert rollout == measured and update == measured + gradients
    # all weights: 16 bytes each, a reference in bfloat16, its root whole on every GPU, the towers
    full = gpu_estimates.kept_weights(sizes, 4, full=True, in_update=True)
    assert full == sizes.text * (16 + 2) / 4 + 2 * (sizes.root + sizes.towers)


# ---- activations


@pytest.mark.parametrize("vocab", [256, 8192])
def test_activations_of_an_update(vocab):
    """With few words the backward pass of a layer is the peak, with many the logits."""
    policy, sizes = build(vocab)
    prompts, completions = bench.make_inputs(vocab, 1500, 250, 6)
    num_predicting = 1 + 6 * 249
    num_tokens = 1500 + 6 * 249
    with as_on_a_gpu(), LiveBytes(policy) as live:
        logprobs, _, _ = completion_logprobs(policy, prompts, completions, 1.0)
        kept = live.now
        logprobs.sum().backward()
    last_layer = gpu_estimates.last_layer_activations(sizes, num_tokens, num_predicting)
    checkpoints = gpu_estimates.checkpoints(sizes, num_tokens)
    assert kept == pytest.approx(checkpoints + last_layer, rel=0.03)
    expected = gpu_estimates.update_activations(sizes, num_tokens, num_predicting)
    assert live.peak == pytest.approx(expected, rel=0.03)
    is_head = expected > checkpoints + gpu_estimates.layer_backward(sizes, num_tokens)
    assert is_head == (vocab == 8192)


def test_keys_values_and_activations_of_a_prefill():
    policy, sizes = build(vocab=256)
    policy.eval()
    prompts, _ = bench.make_inputs(256, 1000, 1, 1, 4)
    rows = torch.arange(4).repeat_interleave(8)
    with as_on_a_gpu(), torch.no_grad(), LiveBytes(policy) as live:
        _, attention = prefill(policy, prompts, [[0], [1], [2], [3]], rows, micro_tokens=2000)
    layers = [*attention.prompt_kv.values(), *attention.own_kv.values()]
    num_bytes = sum(k.nbytes + v.nbytes for k, v in layers)
    # of its prompt each row has a copy of the last token, which the completion continues
    assert num_bytes == gpu_estimates.keys_and_values(sizes, 4 * 999 + 32)
    expected = gpu_estimates.keys_and_values(sizes, 4 * 1000)
    expected += gpu_estimates.prefill_activations(sizes, 2000)
    assert live.peak == pytest.approx(expected, rel=0.03)


# ---- what the docs say


def test_the_cards_that_the_docs_name_are_large_enough(sizes):
    args = gpu_estimates.parse_args([])
    for model, card in (("Qwen2.5-Omni-7B", 48e9), ("Qwen2.5-Omni-3B", 24e9)):
        for peak in (gpu_estimates.rollout_bytes, gpu_estimates.update_bytes):
            assert peak(sizes[model], args, 1, False) + gpu_estimates.CUDA <= card


def test_waves_need_less(sizes):
    waves = gpu_estimates.parse_args(["--rollout-prompts", "2"])
    at_once = gpu_estimates.parse_args([])
    seven = sizes["Qwen2.5-Omni-7B"]
    less = gpu_estimates.rollout_bytes(seven, waves, 1, False)
    saved = gpu_estimates.rollout_bytes(seven, at_once, 1, False) - less
    assert saved > gpu_estimates.keys_and_values(seven, 6 * (8192 + 7 * 2048))


def test_the_tables_of_the_docs_are_the_scripts(sizes, capsys):
    args = gpu_estimates.parse_args([])
    seven = sizes["Qwen2.5-Omni-7B"]
    for name in sizes:
        gpu_estimates.print_memory(name, sizes[name], args)
    gpu_estimates.print_parts("Qwen2.5-Omni-7B", seven, args)
    text = gpu_estimates.Qwen2_5OmniThinkerConfig(
        text_config=gpu_estimates.MODELS["Qwen2.5-Omni-7B"]
    ).text_config
    gpu_estimates.print_time("Qwen2.5-Omni-7B", seven, text)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "gpus.md").read_text()
    missing = [row for row in rows if row not in page]
    assert not missing, "run python -m experiments.gpu_estimates and copy its tables"
