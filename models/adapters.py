"""
LoRA adapters, PEFT's, computed so that small ones survive bfloat16.                          [D2]

PEFT adds s B A x to a W x that has been rounded to bfloat16 already. After a few hundred steps an
adapter still moves W x by less than half a step of bfloat16, so that most of the sum rounds back to
W x and the policy hardly moves. Here the small product comes first and the large one is accumulated
onto it, in float32 inside the kernel: one rounding, at the end.

For the same reason no adapter is merged into weights in bfloat16: most of it would be rounded away. A
stage that starts from an adapter trains that adapter on. A frozen copy of it, the adapter "reference",
is then the policy that the stage began with.

Experts (--lora-experts) have their weights in one tensor, and one kernel multiplies by all of them. It
accumulates onto nothing, so there the adapter is further columns of the weights: [W, s B] [x; A x].
"""

import re
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, ParamWrapper
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn

from models.paths import is_adapter, read_config
from run.errors import UserError

TRAINED = "default"
REFERENCE = "reference"


# ---- a new adapter, or one that is trained on ----------------------------------------------------


def new_adapter(policy, rank, *, lora_experts, folder, empty):
    """
    A policy's thinker with an adapter to train: a new one, or the one that `folder` holds.

    lora_experts  whether the experts get an adapter too; the router gets none
    empty         without reading weights
    returns       PeftModel
    raises        UserError    the adapter in the folder has another rank, or layers that cannot stay
    """
    targets = target_modules(policy)
    if is_adapter(folder):
        targets = with_layers_of(folder, targets, policy.thinker)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        target_parameters=target_parameters(policy) if lora_experts else None,
    )  # [D2]
    continues = is_adapter(folder)
    if continues:
        config.lora_alpha = check_adapter(folder, rank)["lora_alpha"]
    with torch.random.fork_rng(devices=[]):
        # the same new adapter on every rank and after every restart
        torch.manual_seed(0)
        model = get_peft_model(policy.thinker, config)  # float32, whatever dtype the base has
        if continues:
            model.add_adapter(REFERENCE, config)
    if continues and not empty:
        read_adapter(model, folder)
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            parameter.requires_grad_(False)
    if policy.backbone.EXPERTS:
        # lists, whose order is that of every saved adapter_config.json; sets have none
        config.target_modules = sorted(config.target_modules)
        config.target_parameters = sorted(config.target_parameters or [])
    return use_one_rounding(model)


def target_modules(policy):
    """Which linear layers get an adapter: a regex for their names, or the names."""
    backbone = policy.backbone
    pattern = rf".*language_model\.layers\.\d+\..*\.({backbone.TEXT_LAYERS})"
    if policy.train_towers:
        pattern += rf"|.*({backbone.TOWER_LAYERS})"
    if not backbone.EXPERTS:
        return pattern
    # In a mixture of experts PEFT turns a regex into the last parts of the names that match, which
    # layers of the towers have too. Full names it leaves as they are.
    return [name for name, _ in policy.thinker.named_modules() if re.fullmatch(pattern, name)]


def with_layers_of(folder, targets, thinker):
    """
    The targets, and the layers that the adapter in a folder has beside them: those of towers that trained
    in an earlier stage and are frozen now. They stay as they are, and final/ has them too.
    """
    changed = {name.split(".lora_")[0] for name in load_peft_weights(str(folder), device="cpu")}
    changed = {name.removeprefix("base_model.model.") for name in changed}
    old = []
    new = []
    for name, module in thinker.named_modules():
        is_target = name in targets
        if isinstance(targets, str):
            is_target = re.fullmatch(targets, name) is not None
        if is_target:
            new.append(name)
        elif name in changed and isinstance(module, nn.Linear):
            old.append(name)
    return new + old if old else targets


def target_parameters(policy):
    """The experts' parameters, each of which holds a matrix for every expert."""
    names = [name for name, _ in policy.thinker.named_parameters()]
    experts = [name for name in names if name.endswith(policy.backbone.EXPERTS)]
    if not experts:
        model_type = policy.thinker.config.model_type
        raise UserError(f"--lora-experts: {model_type} has no experts")
    return experts


def check_adapter(folder, rank):
    """The configuration of the adapter in a folder. Raises UserError if it cannot be trained on."""
    config = read_config(Path(folder) / "adapter_config.json")
    variants = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    is_plain = config.get("peft_type") == "LORA" and not any(config.get(key) for key in variants)
    if not is_plain:
        raise UserError(f"{folder}: only a plain LoRA adapter can be trained on")
    if config["r"] != rank:
        raise UserError(
            f"--lora-rank {rank}: {folder} is an adapter of rank {config['r']}, which this run "
            f"continues to train: give --lora-rank {config['r']}"
        )
    return config


def read_adapter(model, folder):
    """Reads an adapter into the trained one and the reference. Layers that it lacks stay at B = 0."""
    weights = load_peft_weights(str(folder), device="cpu")
    for adapter in (TRAINED, REFERENCE):
        result = set_peft_model_state_dict(model, weights, adapter_name=adapter)
        if result.unexpected_keys:
            raise UserError(
                f"{folder}: the adapter has layers such as {result.unexpected_keys[0]}, which this run "
                "would drop: add --lora-experts if it was trained with it"
            )


# ---- an adapter that is used ---------------------------------------------------------------------


def loaded_adapter(thinker, folder):
    """The thinker with the adapter that `folder` holds beside its base, not merged into it."""
    return use_one_rounding(PeftModel.from_pretrained(thinker, folder))


def merged_adapter(thinker, folder):
    """The thinker with the adapter merged into its weights, which must be float32."""
    assert next(thinker.parameters()).dtype == torch.float32
    thinker = PeftModel.from_pretrained(thinker, folder).merge_and_unload()
    return thinker.requires_grad_(True)  # PEFT had frozen them


# ---- forward -------------------------------------------------------------------------------------


class Switch:
    """Which adapter the layers of a policy use: TRAINED, REFERENCE, or None for the base alone."""

    def __init__(self):
        self.adapter = TRAINED


def use_one_rounding(model):
    """
    Gives the LoRA layers of a PeftModel the forward of this file, and one switch. An adapter from
    elsewhere may have other kinds, such as convolutions: they keep PEFT's forward.
    """
    model.switch = Switch()
    for layer in model.modules():
        if isinstance(layer, Linear | ParamWrapper):
            forward = lora_forward if isinstance(layer, Linear) else experts_forward
            layer.switch = model.switch
            layer.forward = MethodType(forward, layer)
    return model


@contextmanager
def reference_adapter(model):
    """In this context a PeftModel is the policy that its stage began with."""
    model.switch.adapter = REFERENCE if REFERENCE in model.peft_config else None
    try:
        yield
    finally:
        model.switch.adapter = TRAINED


def lora_forward(layer, x):
    """
    W x + bias + s B A x, where W x is accumulated onto s B A x

    x        (..., D)
    returns  (..., D_out)
    """
    base = layer.base_layer
    adapter = layer.switch.adapter
    rows = x.flatten(0, -2)  # (n, D)
    if adapter is None:
        # not base(x), which would add the bias before rounding: an adapter that is 0 has no KL
        out = rows @ base.weight.T
    else:
        # the weights are float32, unless FSDP has cast them already
        a = layer.lora_A[adapter].weight.to(x.dtype)  # (r, D)
        b = layer.lora_B[adapter].weight.to(x.dtype)  # (D_out, r)
        small = rows @ a.T @ b.T
        out = torch.addmm(small, rows, base.weight.T, beta=layer.scaling[adapter])
    # Not added to `small`: beside a bias of 100, bfloat16 has no room for it.
    if base.bias is not None:
        out = out + base.bias
    return out.view(*x.shape[:-1], -1)


def experts_forward(layer, hidden, indices, weights):
    """
    Forward of all experts of a layer, as transformers' grouped_mm_experts_forward

    layer     PEFT's wrapper of `down_proj`, around the one of `gate_up_proj`, around the experts
    hidden    (n, D)
    indices   (n, K) int64    the experts of each token
    weights   (n, K)          how much each of them counts
    returns   (n, D)
    """
    wrappers = {layer.parameter_name: layer, layer.base_layer.parameter_name: layer.base_layer}
    experts = layer.get_base_layer()
    num_experts = len(experts.down_proj)
    sorted_indices, order = indices.flatten().sort(stable=True)  # (n K,)
    ends = torch.searchsorted(
        sorted_indices, torch.arange(num_experts, device=hidden.device), right=True
    ).int()  # (E,) where the rows of each expert end

    rows = hidden[order // indices.shape[1]]  # (n K, D)
    gate, up = experts_product(wrappers["gate_up_proj"], rows, ends).chunk(2, dim=-1)
    out = experts_product(wrappers["down_proj"], experts.act_fn(gate) * up, ends)
    out = out * weights.flatten()[order, None]
    out = out[order.argsort()].view(*indices.shape, -1)  # (n, K, D)
    return out.sum(1).to(hidden.dtype)


def experts_product(wrapper, rows, ends):
    """
    W_e x + s B_e A_e x for the expert e of each row

    wrapper  PEFT's, of a parameter (E, D_out, D)
    rows     (m, D)      sorted by expert
    ends     (E,) int32  where the rows of each expert end
    returns  (m, D_out)
    """
    weight = wrapper.get_param()
    num_experts, num_out, width = weight.shape
    adapter = wrapper.switch.adapter or TRAINED
    # PEFT's layout of all experts' matrices in one
    a = wrapper.lora_A[adapter].weight.to(rows.dtype).view(num_experts, -1, width)  # (E, r, D)
    b = wrapper.lora_B[adapter].weight.to(rows.dtype).view(num_out, -1, num_experts)
    b = b.permute(2, 0, 1) * wrapper.scaling[adapter]  # (E, D_out, r)
    if wrapper.switch.adapter is None:
        # the same kernel on as many columns: an adapter that is 0 has no KL
        b = torch.zeros_like(b)
    missing = -a.shape[1] % 8  # a GPU's kernel takes rows of whole 16 bytes
    a = F.pad(a, (0, 0, 0, missing))
    b = F.pad(b, (0, missing))
    small = F.grouped_mm(rows, a.mT, offs=ends)  # (m, r)
    wide = torch.cat([weight, b], dim=2)  # as large as the weights that PEFT would add up
    return F.grouped_mm(torch.cat([rows, small], dim=1), wide.mT, offs=ends)
