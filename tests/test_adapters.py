"""
LoRA in bfloat16: what of a small adapter arrives, a stage that starts from an adapter, what is refused.

    python -m pytest tests/test_adapters.py
"""

import copy
import json
from types import MethodType

import pytest
import torch
from conftest import assert_same_values, random_completions, toy_prompts
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerTextExperts,
)

from models import adapters, sharding
from models.inputs import Prompt
from models.loading import AS_IN_FOLDER, load_policy, load_to_answer, wrap_policy
from models.paths import save_model
from models.policy import completion_logprobs
from models.qwen import Thinker
from models.rollout import rollout
from run.errors import UserError

RANK = 16
CPU = torch.device("cpu")


def fill_adapter(model, lr, steps):
    """B as after so many steps of Adam that all went one way: each moves every weight by about lr."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            direction = torch.randn(parameter.shape, generator=generator).sign()
            parameter.data.copy_(direction * lr * steps)


# ---- one rounding ------------------------------------------------------------------------------


def one_layer(bias):
    """-> a linear layer whose weights are those of bfloat16, with an adapter of PEFT; inputs"""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(1024, 1024, bias=bias))
    nn.init.normal_(layer[0].weight, std=0.02)
    if bias:
        nn.init.normal_(layer[0].bias, std=30)  # as large as those of Qwen2.5's keys
    model = get_peft_model(layer, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]))
    sharding.cast_params(layer.parameters(), torch.bfloat16)
    return model, torch.randn(1024, 1024).bfloat16()


def arriving(change, exact):
    """How much of an exact change is in another one: the slope of a line through all their numbers."""
    return float((change.double() * exact.double()).sum() / (exact.double() ** 2).sum())


@torch.no_grad()
@pytest.mark.parametrize(
    "lr, steps", [(5e-7, 10), (5e-7, 100), (1e-5, 10), (1e-5, 100), (1e-5, 400)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_all_of_an_adapter_arrives_in_bfloat16(bias, lr, steps):
    if bias and lr * steps < 1e-4:
        pytest.skip("beside a bias of 30 the output is rounded too coarsely to measure the slope")
    model, x = one_layer(bias)
    fill_adapter(model, lr, steps)
    exact_model = copy.deepcopy(model)
    sharding.cast_params(exact_model.parameters(), torch.float64)
    adapters.use_one_rounding(exact_model)
    exact = exact_model(x.double())
    adapters.use_one_rounding(model)
    ours = model(x)
    with adapters.reference_adapter(model), adapters.reference_adapter(exact_model):
        ours = ours.double() - model(x).double()
        exact = exact - exact_model(x.double())
    assert arriving(ours, exact) == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_peft_alone_loses_most_of_a_small_adapter():
    model, x = one_layer(bias=False)
    base = model.get_base_model()[0].base_layer
    fill_adapter(model, 5e-7, 100)
    sharding.cast_params(model.parameters(), torch.bfloat16)
    change = model(x).double() - base(x).double()
    layer = model.get_base_model()[0]
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    assert arriving(change, 2 * x.double() @ a.T @ b.T) < 0.3


def some_experts():
    """-> experts of a layer with an adapter of PEFT, hidden states, chosen experts, their weights"""
    torch.manual_seed(0)
    config = Qwen3OmniMoeTextConfig(
        hidden_size=512,
        moe_intermediate_size=256,
        num_experts=4,
        experts_implementation="grouped_mm",
    )
    experts = nn.Sequential(Qwen3OmniMoeThinkerTextExperts(config))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
        parameter.data = parameter.data.bfloat16().float()
    names = ["0.gate_up_proj", "0.down_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=names)
    model = get_peft_model(experts, lora)
    indices = torch.stack([torch.randperm(4)[:2] for _ in range(100)])
    return model, torch.randn(100, 512), indices, torch.rand(100, 2)


def test_adapters_of_experts_compute_what_peft_computes():
    model, *inputs = some_experts()
    fill_adapter(model, 1e-2, 1)
    results = []
    for is_ours in (False, True):
        if is_ours:
            adapters.use_one_rounding(model)
        hidden, indices, weights = inputs
        hidden = hidden.clone().requires_grad_()
        out = model.get_base_model()[0](hidden, indices, weights)
        model.zero_grad()
        out.square().sum().backward()
        results.append([out, hidden.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 6
    for theirs, ours in zip(*results):
        largest = theirs.detach().abs().max().item()
        assert largest > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


@torch.no_grad()
@pytest.mark.parametrize("is_ours", [True, False])
def test_all_of_an_adapter_of_experts_arrives_in_bfloat16(is_ours):
    """PEFT adds it to the weights in bfloat16, which keep a part of it."""
    model, hidden, indices, weights = some_experts()
    fill_adapter(model, 5e-7, 100)
    if is_ours:
        adapters.use_one_rounding(model)
    layer = model.get_base_model()[0]
    experts = layer.get_base_layer()
    changes = []
    for dtype in (torch.float32, torch.bfloat16):
        sharding.cast_params(experts.parameters(), dtype)
        inputs = hidden.to(dtype), indices, weights.to(dtype)
        changes.append(layer(*inputs) - experts(*inputs))
    exact, rounded = changes
    share = arriving(rounded, exact)
    assert share == pytest.approx(1, abs=0.1) if is_ours else share < 0.5


def eight_layers(toy_dir):
    """A text model of eight layers with weights as those of a language model before training."""
    config = AutoConfig.from_pretrained(toy_dir / "model")
    text = config.text_config
    width = 256
    text.update(
        dict(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["full_attention"] * 8,
            max_window_layers=8,
            initializer_range=0.02,
        )
    )
    text.rope_parameters["mrope_section"] = [8, 12, 12]
    config.initializer_range = 0.02
    config.vision_config.out_hidden_size = width
    config.audio_config.output_dim = width
    torch.manual_seed(0)
    thinker = Thinker(config)
    sharding.cast_params(thinker.parameters(), torch.bfloat16)
    sharding.cast_params(thinker.parameters(), torch.float32)
    return wrap_policy(thinker, RANK, train_towers=False)


@torch.no_grad()
def change_of_logprobs(policy):
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for _ in range(4):
        ids = torch.randint(10, 250, (30,), generator=generator)
        prompts.append(Prompt(ids, torch.arange(30).expand(3, -1), {}))
    completions = random_completions([[60, 60]] * 4)
    after, _, _ = completion_logprobs(policy, prompts, completions, 1.0)
    with policy.reference():
        before, _, _ = completion_logprobs(policy, prompts, completions, 1.0)
    return (after - before).flatten()


def without_rounding(layer, x):
    """What lora_forward computes, in float64 up to its end."""
    base = layer.base_layer
    adapter = layer.switch.adapter
    rows = x.double()
    out = rows @ base.weight.double().T
    if adapter is not None:
        a = layer.lora_A[adapter].weight.double()
        b = layer.lora_B[adapter].weight.double()
        out += layer.scaling[adapter] * (rows @ a.T @ b.T)
    if base.bias is not None:
        out += base.bias.double()
    return out.to(x.dtype)


def test_log_probs_move_in_bfloat16_as_in_float32(toy_dir):
    """
    At the learning rate for LoRA, 1e-5. After 10 steps a token's log-prob moves by less than what rounding
    activations does to it: adapters whose products are not rounded at all correlate no better.
    """
    policy = eight_layers(toy_dir)
    for steps, least, tolerance in ((10, 0.3, 0.25), (100, 0.95, 0.1), (400, 0.99, 0.1)):
        fill_adapter(policy, 1e-5, steps)
        exact = change_of_logprobs(policy)
        correlations = []
        for forward in (adapters.lora_forward, without_rounding):
            rounded = copy.deepcopy(policy)
            sharding.cast_frozen(rounded, torch.bfloat16)
            for module in rounded.modules():
                if isinstance(module, Linear):
                    module.forward = MethodType(forward, module)
            change = change_of_logprobs(rounded)
            correlations.append(torch.corrcoef(torch.stack([exact, change]))[0, 1].item())
            assert arriving(change, exact) == pytest.approx(1, abs=tolerance)
        print(f"{steps} steps: {correlations[0]:.3f}, without rounding {correlations[1]:.3f}")
        assert correlations[0] >= max(least, correlations[1] - 0.1), (steps, correlations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_is_0_has_no_kl(toy_dir, dtype):
    policy = eight_layers(toy_dir)
    sharding.cast_frozen(policy, dtype)
    assert (change_of_logprobs(policy) == 0).all()


# ---- stages ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(toy_dir, tmp_path_factory):
    """-> an adapter as a stage leaves it, its policy, prompts, what built them"""
    folder = tmp_path_factory.mktemp("adapter") / "final"
    prompts, build = toy_prompts(toy_dir)
    policy = load_policy(str(toy_dir / "model"), 4, train_towers=False)
    fill_adapter(policy, 1e-3, 30)
    save_model(policy, folder, build.processor)
    return folder, policy, prompts, build


COMPLETIONS = random_completions([[5, 1], [7], [2, 12]])


@torch.no_grad()
def logprobs_of(policy, prompts):
    return completion_logprobs(policy, prompts, COMPLETIONS, 1.0)[0]


def test_a_stage_trains_the_adapter_on_and_stays_close_to_its_start(trained, toy_dir, tmp_path):
    folder, policy, prompts, build = trained
    start = logprobs_of(policy, prompts)
    base = logprobs_of(load_policy(str(toy_dir / "model"), 0, False), prompts)
    assert (start - base).abs().max() > 0.05
    second = load_policy(str(folder), 4, train_towers=False)
    assert torch.equal(logprobs_of(second, prompts), start)
    fill_adapter(second, 1e-3, 60)
    assert (logprobs_of(second, prompts) - start).abs().max() > 0.01
    with second.reference():
        assert torch.equal(logprobs_of(second, prompts), start)
    assert all(".default." in n for n, p in second.named_parameters() if p.requires_grad)
    # its final/ is one adapter beside the same base, as PEFT loads it
    save_model(second, tmp_path / "final", build.processor)
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(toy_dir / "model")
    assert not list(tmp_path.glob("final/*/"))
    third = load_policy(str(tmp_path / "final"), 4, False)
    assert torch.equal(logprobs_of(third, prompts), logprobs_of(second, prompts))
    PeftModel.from_pretrained(Thinker.from_pretrained(toy_dir / "model"), tmp_path / "final")


def test_towers_may_join_later_and_be_frozen_again(trained, tmp_path):
    folder, policy, prompts, build = trained
    with_towers = load_policy(str(folder), 4, train_towers=True)
    assert_same_values(logprobs_of(with_towers, prompts), logprobs_of(policy, prompts))
    with with_towers.reference():
        assert_same_values(logprobs_of(with_towers, prompts), logprobs_of(policy, prompts))
    fill_adapter(with_towers, 1e-3, 30)
    expected = logprobs_of(with_towers, prompts)
    assert (expected - logprobs_of(policy, prompts)).abs().max() > 0.01
    save_model(with_towers, tmp_path / "final", build.processor)
    # their adapters stay, also through a stage that does not train them
    frozen = load_policy(str(tmp_path / "final"), 4, train_towers=False)
    assert_same_values(logprobs_of(frozen, prompts), expected)
    assert not any("visual" in n for n, p in frozen.named_parameters() if p.requires_grad)
    save_model(frozen, tmp_path / "next", build.processor)
    again = load_policy(str(tmp_path / "next"), 4, train_towers=False)
    assert_same_values(logprobs_of(again, prompts), expected)
    with again.reference():
        assert_same_values(logprobs_of(again, prompts), expected)


def test_an_adapter_of_another_rank_is_refused(trained):
    with pytest.raises(UserError, match="--lora-rank 4"):
        load_policy(str(trained[0]), 8, train_towers=False)


def test_full_fine_tuning_starts_from_base_and_adapter(trained):
    folder, policy, prompts, _ = trained
    merged = load_policy(str(folder), 0, train_towers=False)
    assert not merged.has_adapter
    assert_same_values(logprobs_of(merged, prompts), logprobs_of(policy, prompts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answering_policy_keeps_its_adapter_beside_the_base(trained, dtype):
    folder, policy, prompts, build = trained
    answering = load_to_answer(str(folder), CPU, dtype)
    assert answering.has_adapter and not any(p.requires_grad for p in answering.parameters())
    assert {p.dtype for n, p in answering.named_parameters() if "lora_" not in n} == {dtype}
    gap = (logprobs_of(answering, prompts) - logprobs_of(policy, prompts)).abs()
    assert gap.max() < (1e-5 if dtype == torch.float32 else 0.5)
    sampling = dict(temperature=0.0, max_new_tokens=4, eos_ids=build.eos_ids, seeds=[0])
    rollout(answering, prompts[:1], [1], **sampling)


def test_merging_a_small_adapter_into_bfloat16_would_lose_it():
    """Why no stage and no evaluation merges: after 100 steps at 5e-7 a third of it is left."""
    torch.manual_seed(0)
    weight = (torch.randn(1024, 1024) * 0.02).bfloat16()
    a = torch.randn(RANK, 1024) / 32
    b = torch.randn(1024, RANK).sign() * 5e-7 * 100
    adapter = 2 * b @ a
    left = (weight.float() + adapter).bfloat16().float() - weight.float()
    assert arriving(left, adapter) < 0.5


# ---- what is read and written --------------------------------------------------------------------


def test_weights_read_in_their_own_dtype_are_those_read_in_float32_and_cast(toy_dir, tmp_path):
    """Buffers too: rotary frequencies in bfloat16 would give other positions."""
    _, build = toy_prompts(toy_dir)
    thinker = Thinker.from_pretrained(toy_dir / "model").to(torch.bfloat16)
    thinker.save_pretrained(tmp_path / "model")
    build.processor.save_pretrained(tmp_path / "model")
    own = load_policy(str(tmp_path / "model"), 4, train_towers=False, dtype=AS_IN_FOLDER)
    wide = load_policy(str(tmp_path / "model"), 4, train_towers=False, dtype=torch.float32)
    trained = [p.dtype for p in own.parameters() if p.requires_grad]
    assert trained and set(trained) == {torch.float32}
    frozen = [p.dtype for p in own.parameters() if not p.requires_grad]
    assert set(frozen) == {torch.bfloat16}
    for policy in (own, wide):
        sharding.cast_frozen(policy, torch.bfloat16)
    for (name, one), two in zip(own.named_parameters(), wide.parameters(), strict=True):
        if one.requires_grad:  # a new adapter is drawn in the dtype of its base
            torch.testing.assert_close(one, two, rtol=0.01, atol=1e-3)
        else:
            assert one.dtype == two.dtype and torch.equal(one, two), name
    for (name, one), two in zip(own.named_buffers(), wide.buffers(), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two), name


def test_a_saved_config_agrees_with_itself_about_tied_weights(toy_dir, tmp_path):
    _, build = toy_prompts(toy_dir)
    save_model(load_policy(str(toy_dir / "model"), 0, False), tmp_path / "final", build.processor)
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["tie_word_embeddings"] is False
