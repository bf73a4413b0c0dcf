"""
Two LoRA adapters, one trained on top of the other, as one adapter of the first one's base:

    W + s1 B1 A1 + s2 B2 A2  =  W + [s1 B1, s2 B2] [A1; A2]

So the adapter of a later stage needs no merged copy of the earlier stage beside it: PEFT loads it
wherever the run has been moved.

r rank, s = lora_alpha / r.
"""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# with any of these an adapter is more than s B A
OTHER_KINDS = """
    use_dora use_rslora modules_to_save rank_pattern alpha_pattern layer_replication
    trainable_token_indices lora_bias target_parameters
""".split()


def can_stack(folder):
    """Whether an adapter's folder holds plain LoRA matrices, chosen by a pattern as ours are."""
    config = json.loads((folder / CONFIG).read_text())
    is_plain = not any(config.get(name) for name in OTHER_KINDS) and config.get("bias") == "none"
    return is_plain and isinstance(config["target_modules"], str) and (folder / WEIGHTS).is_file()


def copy_adapter(folder, target):
    """Copies an adapter without the model beside it."""
    target.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / name, target / name)


def stack(first, second):
    """
    Rewrites the adapter in `second`, which was trained on the merged `first`, as one on the base of
    `first`. Its rank is the sum of both.
    """
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (first, second)]
    weights = [load_file(folder / WEIGHTS) for folder in (first, second)]
    ranks = [config["r"] for config in configs]
    scales = [config["lora_alpha"] / config["r"] for config in configs]

    stacked = {}
    for name in sorted(weights[0].keys() | weights[1].keys()):
        is_a = "lora_A" in name  # A is (r, in), B is (out, r)
        like = weights[0].get(name, weights[1].get(name))
        parts = []
        for part, rank, scale in zip(weights, ranks, scales):
            if name in part:
                parts.append(part[name] if is_a else scale * part[name])
            else:  # a layer that only the other adapter changes
                shape = (rank, like.shape[1]) if is_a else (like.shape[0], rank)
                parts.append(torch.zeros(shape, dtype=like.dtype))
        stacked[name] = torch.cat(parts, dim=0 if is_a else 1).contiguous()

    patterns = dict.fromkeys(config["target_modules"] for config in configs)
    config = configs[1] | dict(
        base_model_name_or_path=configs[0]["base_model_name_or_path"],
        r=sum(ranks),
        lora_alpha=sum(ranks),  # the scales are in B
        target_modules="|".join(f"({pattern})" for pattern in patterns),
    )
    save_file(stacked, second / WEIGHTS, metadata={"format": "pt"})
    (second / CONFIG).write_text(json.dumps(config, indent=2))
