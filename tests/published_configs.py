"""
The published configurations that could be read, as far as others quote them; the hub was not reached.

Qwen3-Omni-30B-A3B: the thinker's part of config.json, as the tests of several projects carry it (one of
them "a structurally faithful copy of the released config.json"), revision 26291f79 of
Qwen/Qwen3-Omni-30B-A3B-Instruct. All that say so have 13 position ids a second, not the 25 that the
configuration class falls back to. Names and shapes of the weights: of the audio tower from an audit of
the shard's header (525 tensors, 1,295,854,336 bytes in bfloat16), of the rest as converters name them.

Qwen2.5-Omni-3B: its text model, as a loader "from HF config.json" has it; the towers are the 7B one's with
another output width.
"""

QWEN3_30B_A3B = dict(
    audio_start_token_id=151669,
    audio_end_token_id=151670,
    audio_token_id=151675,
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    position_id_per_seconds=13,
    user_token_id=872,
    audio_config=dict(
        num_mel_bins=128,
        d_model=1280,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        encoder_layers=32,
        downsample_hidden_size=480,
        output_dim=2048,
        n_window=50,
        n_window_infer=800,
    ),
    vision_config=dict(
        depth=27,
        hidden_size=1152,
        num_heads=16,
        intermediate_size=4304,
        patch_size=16,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=2048,
        in_channels=3,
        num_position_embeddings=2304,  # 768 pixels: 48 x 48 patches
        deepstack_visual_indexes=[8, 16, 24],
    ),
    text_config=dict(
        num_hidden_layers=48,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=152064,
        rope_theta=1000000,
        rope_scaling=dict(
            interleaved=True, mrope_interleaved=True, mrope_section=[24, 20, 20], type="default"
        ),
        max_position_embeddings=65536,
    ),
)

QWEN25_3B = dict(
    text_config=dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0, mrope_section=[16, 24, 24]),
    ),
    vision_config=dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048
    ),
    audio_config=dict(output_dim=2048),
)


def qwen3_weights():
    """{name: shape} of the thinker's weights in the published shards."""
    shapes = {}

    def layer(name, *shape, bias=False):
        shapes[f"thinker.{name}.weight"] = shape
        if bias:
            shapes[f"thinker.{name}.bias"] = shape[:1]

    layer("model.embed_tokens", 152064, 2048)
    layer("model.norm", 2048)
    layer("lm_head", 152064, 2048)
    for i in range(48):
        of = f"model.layers.{i}"
        layer(f"{of}.self_attn.q_proj", 4096, 2048)
        layer(f"{of}.self_attn.k_proj", 512, 2048)
        layer(f"{of}.self_attn.v_proj", 512, 2048)
        layer(f"{of}.self_attn.o_proj", 2048, 4096)
        layer(f"{of}.self_attn.q_norm", 128)
        layer(f"{of}.self_attn.k_norm", 128)
        layer(f"{of}.input_layernorm", 2048)
        layer(f"{of}.post_attention_layernorm", 2048)
        layer(f"{of}.mlp.gate", 128, 2048)
        for expert in range(128):
            layer(f"{of}.mlp.experts.{expert}.gate_proj", 768, 2048)
            layer(f"{of}.mlp.experts.{expert}.up_proj", 768, 2048)
            layer(f"{of}.mlp.experts.{expert}.down_proj", 2048, 768)

    layer("audio_tower.conv2d1", 480, 1, 3, 3, bias=True)
    layer("audio_tower.conv2d2", 480, 480, 3, 3, bias=True)
    layer("audio_tower.conv2d3", 480, 480, 3, 3, bias=True)
    layer("audio_tower.conv_out", 1280, 7680)
    for i in range(32):
        of = f"audio_tower.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer(f"{of}.self_attn.{name}", 1280, 1280, bias=True)
        layer(f"{of}.self_attn_layer_norm", 1280, bias=True)
        layer(f"{of}.final_layer_norm", 1280, bias=True)
        layer(f"{of}.fc1", 5120, 1280, bias=True)
        layer(f"{of}.fc2", 1280, 5120, bias=True)
    layer("audio_tower.ln_post", 1280, bias=True)
    layer("audio_tower.proj1", 1280, 1280, bias=True)
    layer("audio_tower.proj2", 2048, 1280, bias=True)

    layer("visual.patch_embed.proj", 1152, 3, 2, 16, 16, bias=True)
    layer("visual.pos_embed", 2304, 1152)
    for i in range(27):
        of = f"visual.blocks.{i}"
        layer(f"{of}.norm1", 1152, bias=True)
        layer(f"{of}.norm2", 1152, bias=True)
        layer(f"{of}.attn.qkv", 3456, 1152, bias=True)
        layer(f"{of}.attn.proj", 1152, 1152, bias=True)
        layer(f"{of}.mlp.linear_fc1", 4304, 1152, bias=True)
        layer(f"{of}.mlp.linear_fc2", 1152, 4304, bias=True)
    widths = {"visual.merger": 1152} | {f"visual.merger_list.{k}": 4608 for k in range(3)}
    for merger, norm_width in widths.items():
        layer(f"{merger}.ln_q", norm_width, bias=True)
        layer(f"{merger}.mlp.0", 4608, 4608, bias=True)
        layer(f"{merger}.mlp.2", 2048, 4608, bias=True)
    return shapes
