"""
Loads a policy: a folder or hub id becomes a Policy on its device, with a new adapter or without.
"""

import re
from functools import partial
from types import MethodType

import torch
from transformers.utils.logging import disable_progress_bar

from models.attention import set_attention_kernel
from models.inputs import BACKBONES, config_of
from models.paths import from_pretrained, is_adapter
from models.policy import Policy
from models.sharding import cast_params, load_sharded
from run import processes
from run.errors import UserError

CHECKPOINT_ABOVE_PARAMS = 10**8  # above it activations are computed again: less memory, more time


def open_policies(
    folder,
    *,
    device,
    dtype,
    attn,
    lora_rank,
    train_towers,
    with_reference,
    lora_experts=False,
):
    """
    The policy to train and the frozen reference policy that the KL is measured against     [U15]

    folder          hub id or folder: a full Omni checkpoint, a thinker, or a PEFT adapter
    dtype           "auto", "float32" or "bfloat16"
    attn            attention kernel: a choice of --attn
    with_reference  whether the loss has a KL term
    lora_experts    whether the experts get an adapter too
    returns         policy, reference; the reference is None if no separate one is needed: with LoRA
                    it is the policy without its adapter (`Policy.reference`)
    """
    choose_attention(attn, device, processes.compute_dtype(device, dtype))
    if lora_experts and not lora_rank:
        raise UserError("--lora-experts: there is no adapter with --lora-rank 0: all experts train")
    reference = None
    if with_reference and not lora_rank:
        load_reference = partial(load_policy, folder, 0, train_towers)
        reference = load_sharded(load_reference, device, dtype, frozen=True)
    load = partial(load_policy, folder, lora_rank, train_towers, lora_experts=lora_experts)
    policy = load_sharded(load, device, dtype)
    if reference and not train_towers:
        # frozen towers are equal, and whole on every rank: hold them once
        reference.thinker.model.visual = policy.thinker.model.visual
        reference.thinker.model.audio_tower = policy.thinker.model.audio_tower
    return policy, reference


def choose_attention(attn, device, dtype):
    """Sets the attention kernel that --attn names; prints a line if `auto` cannot be flash."""
    try:
        kernel = set_attention_kernel(attn, device, dtype)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--attn {attn}: {error}: install it, or leave --attn out") from None
    if attn == "auto" and kernel != "flash":
        processes.print0(
            "  attention without flash, which has no float32 kernel on a GPU: try --dtype bfloat16"
        )


def load_policy(folder, lora_rank, train_towers, empty=False, lora_experts=False):
    """
    A thinker from a hub id or folder (a full Omni checkpoint, a thinker, or a PEFT adapter).

    lora_rank     int     0 = every weight of the text model trains
    train_towers  bool    whether the vision and audio towers train too
    empty         bool    built alone, without reading weights
    lora_experts  bool    whether the experts get an adapter too; the router gets none
    raises        FileNotFoundError     no such folder and no such model on the hub
    """
    disable_progress_bar()  # transformers' own, one for each shard
    backbone = BACKBONES[config_of(folder).model_type]
    if empty:
        thinker = from_pretrained(backbone.Thinker, folder, empty=True)
    else:
        thinker = read_thinker(backbone, folder)
    if is_adapter(folder) and not empty:  # it becomes part of the weights; what trains now is new
        from peft import PeftModel

        thinker = PeftModel.from_pretrained(thinker, folder).merge_and_unload()
        thinker.requires_grad_(True)  # PEFT had frozen them
    return wrap_policy(thinker, lora_rank, train_towers, lora_experts)


def read_thinker(backbone, folder):
    """transformers would fill what a folder lacks, such as all of a talker's, with random numbers."""
    thinker, report = from_pretrained(
        backbone.Thinker, folder, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing:
        problem = f"{folder} lacks {len(missing)} weights of the thinker, such as {missing[0]}"
        raise UserError(f"{problem}: give a whole checkpoint, or a thinker")
    return thinker


def wrap_policy(thinker, lora_rank, train_towers, lora_experts=False):
    """A thinker -> the policy to train: what is frozen frozen, a new adapter in its place."""
    policy = Policy(thinker, train_towers)
    for module in policy.frozen:
        module.requires_grad_(False)
    if lora_rank:
        add_adapter(policy, lora_rank, lora_experts)
    if sum(p.numel() for p in thinker.parameters()) > CHECKPOINT_ABOVE_PARAMS:
        thinker.activation_checkpointing_enable(
            dict(use_reentrant=False, preserve_rng_state=False)
        )  # no dropout
    return policy.train()


def add_adapter(policy, lora_rank, lora_experts):
    """Gives a policy a new LoRA adapter, the same on every rank and after every restart."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    thinker, backbone = policy.thinker, policy.backbone
    target = rf".*language_model\.layers\.\d+\..*\.({backbone.TEXT_LAYERS})"
    if policy.train_towers:
        target += rf"|.*({backbone.TOWER_LAYERS})"
    experts = None
    if lora_experts:
        experts = [n for n, _ in thinker.named_parameters() if n.endswith(backbone.EXPERTS)]
        if not experts:
            raise UserError(f"--lora-experts: {thinker.config.model_type} has no experts")
    if backbone.EXPERTS:
        # Of a mixture of experts PEFT turns a regex into the last parts of the names that match, which
        # layers of the towers have too: names in full are left as they are.
        target = [name for name, _ in thinker.named_modules() if re.fullmatch(target, name)]
    config = LoraConfig(
        r=lora_rank, lora_alpha=2 * lora_rank, target_modules=target, target_parameters=experts
    )  # [D2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy.model = get_peft_model(thinker, config, autocast_adapter_dtype=False)
    if (
        backbone.EXPERTS
    ):  # lists, whose order is that of every saved adapter_config.json; sets have none
        config.target_modules = sorted(config.target_modules)
        config.target_parameters = sorted(config.target_parameters)
    for module in policy.modules():
        if isinstance(module, Linear):
            module.forward = MethodType(fused_lora_forward, module)


def fused_lora_forward(layer, x):
    """W x + s B A x of a PEFT layer, as it computes it, but the sum is the end of the last product."""
    result = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    a, b, scale = (part["default"] for part in (layer.lora_A, layer.lora_B, layer.scaling))
    added = torch.addmm(result.flatten(0, -2), a(x).flatten(0, -2), b.weight.T, alpha=scale)
    return added.view(result.shape)


def load_to_answer(folder, device, dtype):
    """A policy that only answers, on its device: whole, computing in dtype (a torch.dtype)."""
    policy = load_policy(folder, lora_rank=0, train_towers=False)
    cast_params(policy.parameters(), dtype)  # before it moves: in float32 it is twice as large
    set_attention_kernel("auto", device, dtype)
    return policy.to(device)


def write_merged(folder, part):
    """Writes a trained adapter and its base as one model."""
    merged = load_policy(folder, lora_rank=0, train_towers=False)
    merged.thinker.save_pretrained(part)
    from_pretrained(merged.backbone.Processor, folder).save_pretrained(part)
