"""
Loads a policy: a folder or hub id becomes a Policy on its device, to be trained or to answer.
"""

from functools import partial

import torch
from transformers.utils.logging import disable_progress_bar

from models.attention import set_attention_kernel
from models.expert_replay import ExpertReplay
from models.inputs import BACKBONES, config_of
from models.paths import from_pretrained, is_adapter, run_final
from models.policy import Policy
from models.sharding import cast_frozen, load_sharded
from run import devices, processes
from run.errors import UserError

# weights above which activations are computed again in the backward pass: less memory, more time
CHECKPOINT_ABOVE_PARAMS = 10**8

# What is read in this dtype has the dtype of its folder: for published models half of the memory.
AS_IN_FOLDER = "auto"


# ---- to be trained -------------------------------------------------------------------------------


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
    replay_experts=False,
):
    """
    The policy to train and the frozen reference policy that the KL is measured against     [U15]

    folder          hub id or folder: a full Omni checkpoint, a thinker, or a PEFT adapter
    dtype           "auto", "float32" or "bfloat16"
    attn            attention kernel: a choice of --attn
    with_reference  whether the loss has a KL term
    lora_experts    whether the experts get an adapter too
    replay_experts  whether the update takes the experts that the rollout took
    returns         policy, reference; the reference is None if no separate one is needed: with LoRA
                    it is the policy with the adapter that it began with (`Policy.reference`)
    """
    compute_dtype = processes.compute_dtype(device, dtype)
    choose_attention(attn, device, compute_dtype)
    if lora_experts and not lora_rank:
        raise UserError("--lora-experts: there is no adapter with --lora-rank 0: all experts train")
    # Weights that train are float32. So are those that an adapter is merged into.
    is_rounded = compute_dtype != torch.float32
    merges = is_adapter(folder) and not lora_rank
    frozen_dtype = AS_IN_FOLDER if is_rounded and not merges else torch.float32
    policy_dtype = AS_IN_FOLDER if is_rounded and lora_rank else torch.float32

    reference = None
    if with_reference and not lora_rank:
        load_reference = partial(load_policy, folder, 0, train_towers, dtype=frozen_dtype)
        reference = load_sharded(load_reference, device, dtype, frozen=True)
    load_trained = partial(
        load_policy,
        folder,
        lora_rank,
        train_towers,
        lora_experts=lora_experts,
        dtype=policy_dtype,
    )
    policy = load_sharded(load_trained, device, dtype)
    if replay_experts:
        policy.expert_replay = expert_replay_of(policy)
    if reference and not train_towers:
        # frozen towers are equal, and whole on every rank: hold them once
        reference.thinker.model.visual = policy.thinker.model.visual
        reference.thinker.model.audio_tower = policy.thinker.model.audio_tower
    return policy, reference


def expert_replay_of(policy):
    if not policy.backbone.EXPERTS:
        model_type = policy.thinker.config.model_type
        raise UserError(f"--replay-experts: {model_type} has no experts")
    return ExpertReplay(policy.backbone.routers(policy.thinker), policy.backbone.route)


def choose_attention(attn, device, dtype):
    """Sets the attention kernel that --attn names; prints device, dtype and kernel."""
    try:
        kernel = set_attention_kernel(attn, device, dtype)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--attn {attn}: {error}: install it, or leave --attn out") from None
    print_device(device, dtype, kernel)
    if attn == "auto" and kernel != "flash":
        processes.print0(
            "  attention without flash, which has no float32 kernel on a GPU: try --dtype bfloat16"
        )


def print_device(device, dtype, kernel):
    """What computes, so that a run on the wrong device is seen at its first line."""
    name = devices.describe(device, processes.world_size())
    dtype_name = str(dtype).removeprefix("torch.")
    processes.print0(f"  {name}, {dtype_name}, attention {kernel}")


def load_policy(
    folder, lora_rank, train_towers, *, empty=False, lora_experts=False, dtype=torch.float32
):
    """
    A policy on the CPU, from a hub id or folder (a full Omni checkpoint, a thinker, or a PEFT adapter).

    lora_rank     int     0 = every weight of the text model trains; an adapter in the folder is then
                          merged into the weights. Else an adapter in the folder is trained on
    train_towers  bool    whether the vision and audio towers train too
    empty         bool    built without reading weights
    lora_experts  bool    whether the experts get an adapter too; the router gets none
    dtype                 of the weights that are read: float32 or AS_IN_FOLDER
    raises        FileNotFoundError     no such folder and no such model on the hub
    """
    folder = run_final(folder)
    thinker = load_thinker(folder, dtype, empty=empty)
    if is_adapter(folder) and not lora_rank and not empty:
        from models.adapters import merged_adapter  # here: PEFT takes a second to load

        thinker = merged_adapter(thinker, folder)
    return wrap_policy(
        thinker,
        lora_rank,
        train_towers,
        lora_experts=lora_experts,
        folder=folder,
        empty=empty,
    )


def load_thinker(folder, dtype, *, empty=False):
    """The thinker of a folder; of an adapter its base. Raises UserError if weights are missing."""
    disable_progress_bar()  # transformers' own, one for each file of weights
    backbone = BACKBONES[config_of(folder).model_type]
    if empty:
        thinker = from_pretrained(backbone.Thinker, folder, empty=True)
    else:
        thinker, report = from_pretrained(
            backbone.Thinker, folder, dtype=dtype, output_loading_info=True
        )
        # transformers would fill what a folder lacks, such as all of a talker's, with random numbers
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} weights of the thinker, such as {missing[0]}: give a "
                "whole checkpoint, or a thinker"
            )
    # transformers writes True into the text_config of an untied model, and some servers believe it
    thinker.config.text_config.tie_word_embeddings = thinker.config.tie_word_embeddings
    return thinker


def wrap_policy(thinker, lora_rank, train_towers, *, lora_experts=False, folder="", empty=False):
    """
    A thinker as the policy to train: freezes what does not train, adds the adapter.

    folder   where an adapter to train on may lie
    """
    policy = Policy(thinker, train_towers)
    if lora_rank:
        from models.adapters import new_adapter  # here: PEFT takes a second to load

        policy.model = new_adapter(
            policy, lora_rank, lora_experts=lora_experts, folder=folder, empty=empty
        )
    for module in policy.frozen:
        module.requires_grad_(False)
    num_params = sum(p.numel() for p in thinker.parameters())
    if num_params > CHECKPOINT_ABOVE_PARAMS:
        # no dropout anywhere, so no random state to preserve
        kwargs = dict(use_reentrant=False, preserve_rng_state=False)
        thinker.activation_checkpointing_enable(kwargs)
    return policy.train()


# ---- to answer -----------------------------------------------------------------------------------


def load_to_answer(folder, device, dtype):
    """
    A policy that only answers, whole, on its device. An adapter stays beside its base: merged into
    weights in bfloat16, most of a small one would be rounded away.

    folder   hub id or folder: a full Omni checkpoint, a thinker, or a PEFT adapter
    dtype    torch.dtype to compute in
    """
    folder = run_final(folder)
    kernel = set_attention_kernel("auto", device, dtype)
    print_device(device, dtype, kernel)
    # in float32 a 7B model takes 36 GB of the host's memory, in each process
    thinker = load_thinker(folder, torch.float32 if dtype == torch.float32 else AS_IN_FOLDER)
    policy = Policy(thinker, train_towers=False)
    if is_adapter(folder):
        from models.adapters import loaded_adapter  # here: PEFT takes a second to load

        policy.model = loaded_adapter(thinker, folder)
    policy.requires_grad_(False)
    cast_frozen(policy, dtype)
    return policy.to(device)
