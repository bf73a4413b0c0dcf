"""A whole Qwen2.5-Omni of random weights: the toy's thinker, a tiny talker and a tiny vocoder."""

import json
import shutil

import torch
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

TALKER = dict(
    vocab_size=64,
    embedding_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]),
)
DIT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=16,
    emb_dim=16,
    num_embeds=64,
    mel_dim=8,
    enc_emb_dim=8,
    enc_dim=8,
    enc_channels=[8, 8, 8, 8, 24],
    enc_attention_channels=4,
    enc_res2net_scale=2,
    enc_se_channels=4,
    look_ahead_layers=[1],
    look_backward_layers=[0],
)
BIGVGAN = dict(
    mel_dim=8,
    upsample_initial_channel=16,
    resblock_kernel_sizes=[3],
    resblock_dilation_sizes=[[1, 3, 5]],
    upsample_rates=[2, 2],
    upsample_kernel_sizes=[4, 4],
)


def write_whole_omni(toy_model, folder, dtype=torch.bfloat16, max_shard_size="4MB"):
    """Writes a whole checkpoint in several shards; its thinker is that of the folder toy_model."""
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(toy_model)
    config = Qwen2_5OmniConfig(
        thinker_config=thinker.config.to_dict(),
        talker_config=TALKER,
        token2wav_config=dict(dit_config=DIT, bigvgan_config=BIGVGAN),
    )
    torch.manual_seed(0)
    whole = Qwen2_5OmniForConditionalGeneration(config)
    whole.thinker.load_state_dict(thinker.state_dict())
    whole.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    torch.save({"Chelsie": dict(cond=torch.zeros(8))}, folder / "spk_dict.pt")
    for path in toy_model.iterdir():  # the processor's files
        if path.suffix != ".safetensors" and not (folder / path.name).exists():
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["thinker_config"]["avatar_toy"] = True
    (folder / "config.json").write_text(json.dumps(config, indent=2))
