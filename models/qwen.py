"""
Qwen2.5-Omni: a row as what its thinker takes, what its towers make of a clip, and which of its layers
train and are sharded. Only this file knows the backbone by name.

P prompt tokens, D width.
"""

import torch
import torch.distributed as dist
from transformers import Qwen2_5OmniProcessor as Processor  # noqa: F401
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")
# linear layers that get a LoRA adapter: of the text model, of the towers
TEXT_LAYERS = r"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
TOWER_LAYERS = (
    r"(visual|audio_tower)\.(.*\.)?([qkv](_proj)?|((out|gate|up|down)_)?proj|fc[12]|mlp\.[02])"
)
EXPERTS = ()
TEXT_UNITS = (omni.Qwen2_5OmniDecoderLayer,)  # what FSDP gathers at one time
TOWER_UNITS = (omni.Qwen2_5OmniVisionBlock, omni.Qwen2_5OmniAudioEncoderLayer)
FROZEN = ()  # parts of the towers that never train
SIDE = 28  # pixels; of a frame both sides are multiples


def check(config, processor, folder):
    """Nothing to compare: configuration and processor fall back to the same values."""


def media_ends(tokenizer, config):
    """The tokens that media end with in a prompt, a sound's last."""
    return [tokenizer.vision_eos_token, tokenizer.audio_eos_token]


def inputs(processor, config, text, clip, name):
    """A prompt's text, a placeholder for each medium -> input_ids (P,), position_ids (3, P), media."""
    sounds, media, mel_lengths = clip.sounds, {}, None
    # without max_length the extractor pads every clip to 300 s
    length = -(-max(map(len, sounds), default=0) // 160) * 160
    batch = processor(
        text=text,
        images=clip.images or None,
        audio=sounds or None,
        videos=None if clip.frames is None else [clip.frames],
        return_tensors="pt",
        load_audio_from_video=clip.use_audio,
        audio_from_video_indices=[0] * clip.use_audio,
        images_kwargs=dict(do_resize=False),
        audio_kwargs=dict(max_length=length, truncation=False),
        videos_kwargs=dict(  # fps: of the frames really taken: the positions tell their time
            do_resize=False,
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            fps=clip.fps,
        ),
    )
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in batch:
            media[name] = dict(pixels=batch[pixels], grid=batch[f"{name}_grid_thw"])
    if "input_features" in batch:
        mel_lengths = batch["feature_attention_mask"].sum(1)
        mels = [x[:, :n] for x, n in zip(batch["input_features"], mel_lengths)]  # no padding
        media["audio"] = dict(mel=torch.cat(mels, dim=1), lengths=mel_lengths)
    input_ids, seconds = batch["input_ids"], batch.get("video_second_per_grid")
    index = Thinker.__new__(Thinker)  # the model's own positions without the model
    index.config, index.spatial_merge_size = config, config.vision_config.spatial_merge_size
    position_ids, _ = index.get_rope_index(
        input_ids,
        **{key: batch.get(key) for key in ("image_grid_thw", "video_grid_thw")},
        attention_mask=torch.ones_like(input_ids),
        audio_seqlens=mel_lengths,
        second_per_grids=None if seconds is None else torch.as_tensor(seconds),
        use_audio_in_video=clip.use_audio,
    )
    return input_ids[0], position_ids[:, 0].clone(), media


def encode(core, prompts, device, train_towers):
    """
    The towers' outputs; each tower is run once for all prompts.

    returns  list, a prompt each, of modality -> (n, D); what was encoded before passes through
    """
    if device.type == "cuda" and core.dtype != torch.float32:  # else a call for every window
        for tower in (core.visual, core.audio_tower):
            tower.config._attn_implementation_internal = "flash_windows"
    out = [dict(p.media) for p in prompts]
    if train_towers and dist.is_initialized():
        # sharded towers: a rank that skips one leaves the others waiting in its collectives
        video = dict(pixels=torch.zeros(4, 1176), grid=torch.tensor([[1, 2, 2]]))
        num_mels = core.audio_tower.config.num_mel_bins
        sound = dict(mel=torch.zeros(num_mels, 200), lengths=torch.tensor([200]))
        out.append(dict(video=video, audio=sound))
    seen = [(o, m) for o in out for m in ("image", "video") if isinstance(o.get(m), dict)]
    heard = [o for o in out if isinstance(o.get("audio"), dict)]
    if seen:
        pixels = torch.cat([o[m]["pixels"].to(device) for o, m in seen])
        grid = torch.cat([o[m]["grid"].to(device) for o, m in seen])
        pieces = list(core.get_video_features(pixels, grid, return_dict=True).pooler_output)
        for o, m in seen:
            o[m] = torch.cat([pieces.pop(0) for _ in o[m]["grid"]])
    if heard:
        lengths = torch.cat([o["audio"]["lengths"] for o in heard])
        mels = torch.cat([o["audio"]["mel"] for o in heard], dim=1).to(device)
        after_conv, sizes = core.audio_tower._get_feat_extract_output_lengths(lengths)
        sound = core.audio_tower(mels, lengths.to(device), after_conv.to(device))
        pieces = list(sound.last_hidden_state.split(sizes.tolist()))
        for o in heard:
            o["audio"] = torch.cat([pieces.pop(0) for _ in o["audio"]["lengths"]])
    return out
