"""
Qwen2.5-Omni as a backbone: what inputs.py asks of one. Only this file knows the model by name.

P prompt tokens, n features of one medium, D width.
"""

import math

import torch
import torch.distributed as dist
from transformers import Qwen2_5OmniProcessor as Processor  # noqa: F401
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")

# ---- which layers train and are sharded --------------------------------------------------------

# linear layers that get a LoRA adapter
TEXT_LAYERS = r"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
# not the patch embedding: it is a convolution, for which PEFT would run another one
TOWER_LAYERS = r"(visual|audio_tower)\.(?!patch_embed\.)(.*\.)?([qkv](_proj)?|((out|gate|up|down)_)?proj|fc[12]|mlp\.[02])"
EXPERTS = ()
# what FSDP gathers one at a time
TEXT_UNITS = (omni.Qwen2_5OmniDecoderLayer,)
TOWER_UNITS = (omni.Qwen2_5OmniVisionBlock, omni.Qwen2_5OmniAudioEncoderLayer)
FROZEN = ()  # parts of the towers that never train

# ---- a row as a prompt -------------------------------------------------------------------------

SIDE = 28  # pixels; both sides of a frame are multiples of it
MEL_HOP = 160  # samples of sound for one mel frame


def check(config, processor, folder):
    """Nothing to compare: configuration and processor fall back to the same values."""


def media_ends(tokenizer, config):
    """The tokens that media end with in a prompt, a sound's last."""
    return [tokenizer.vision_eos_token, tokenizer.audio_eos_token]


def inputs(processor, config, text, clip, name):
    """A prompt's text, a placeholder for each medium -> input_ids (P,), position_ids (3, P), media."""
    # without max_length the extractor pads every clip to 300 s
    longest = max((len(sound) for sound in clip.sounds), default=0)
    max_length = math.ceil(longest / MEL_HOP) * MEL_HOP
    audio_kwargs = dict(max_length=max_length, truncation=False)
    batch = process(processor, text, clip, audio_kwargs=audio_kwargs)
    return from_batch(Thinker, config, batch, use_audio=clip.use_audio)


def process(processor, text, clip, **kwargs):
    """Calls the processor of a Qwen-Omni with frames and sounds as they were decoded -> its batch."""
    return processor(
        text=text,
        images=clip.images or None,
        audio=clip.sounds or None,
        videos=None if clip.frames is None else [clip.frames],
        return_tensors="pt",
        load_audio_from_video=clip.use_audio,
        audio_from_video_indices=[0] if clip.use_audio else [],
        images_kwargs=dict(do_resize=False),
        videos_kwargs=dict(
            do_resize=False,
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            fps=clip.fps,  # of the frames that were taken: positions are their times
        ),
        **kwargs,
    )


def from_batch(thinker_class, config, batch, use_audio):
    """A processor's batch of one prompt -> input_ids (P,), position_ids (3, P), media."""
    media = {}
    if "pixel_values" in batch:
        media["image"] = dict(pixels=batch["pixel_values"], grid=batch["image_grid_thw"])
    if "pixel_values_videos" in batch:
        media["video"] = dict(pixels=batch["pixel_values_videos"], grid=batch["video_grid_thw"])
    mel_lengths = None
    if "input_features" in batch:
        mel_lengths = batch["feature_attention_mask"].sum(1)
        mels = [mel[:, :n] for mel, n in zip(batch["input_features"], mel_lengths)]  # no padding
        media["audio"] = dict(mel=torch.cat(mels, dim=1), lengths=mel_lengths)

    # the model's own positions, without building the model
    input_ids = batch["input_ids"]
    seconds = batch.get("video_second_per_grid")
    thinker = thinker_class.__new__(thinker_class)
    thinker.config = config
    thinker.spatial_merge_size = config.vision_config.spatial_merge_size
    position_ids, _ = thinker.get_rope_index(
        input_ids,
        image_grid_thw=batch.get("image_grid_thw"),
        video_grid_thw=batch.get("video_grid_thw"),
        attention_mask=torch.ones_like(input_ids),
        audio_seqlens=mel_lengths,
        second_per_grids=None if seconds is None else torch.as_tensor(seconds),
        use_audio_in_video=use_audio,
    )
    return input_ids[0], position_ids[:, 0].clone(), media


# ---- towers ------------------------------------------------------------------------------------


def encode(core, prompts, device, train_towers):
    """
    The towers' outputs; each tower runs once for all prompts.

    returns  list of {modality: (n, D)}, one per prompt, and a dummy one where towers train on several
             processes; media that are encoded already pass through
    """
    return encode_by(core, prompts, device, train_towers, run_visual, run_audio)


def run_visual(core, pixels, grid):
    """-> features of each image and video of a batch"""
    return core.get_video_features(pixels, grid, return_dict=True).pooler_output


def run_audio(core, mels, lengths):
    """mels (num_mels, sum of lengths) -> features of each sound of a batch"""
    after_conv, num_features = core.audio_tower._get_feat_extract_output_lengths(lengths)
    outputs = core.audio_tower(mels, lengths.to(mels.device), after_conv.to(mels.device))
    return outputs.last_hidden_state.split(num_features.tolist())


def encode_by(core, prompts, device, train_towers, run_visual, run_audio):
    """encode, with functions that run a backbone's towers."""
    if device.type == "cuda" and core.dtype != torch.float32:
        # else transformers calls attention once for every window
        for tower in (core.visual, core.audio_tower):
            tower.config._attn_implementation_internal = "flash_windows"
    features = [dict(prompt.media) for prompt in prompts]
    if train_towers and dist.is_initialized():
        # if a rank skipped a sharded tower, the others would wait in its collectives for ever
        features.append(smallest_media(core.visual.config, core.audio_tower.config))

    pictures = []  # (features of a prompt, "image" or "video") still to be encoded
    sounds = []
    for media in features:
        for modality in ("image", "video"):
            if isinstance(media.get(modality), dict):
                pictures.append((media, modality))
        if isinstance(media.get("audio"), dict):
            sounds.append((media, "audio"))
    if pictures:
        pixels = torch.cat([media[modality]["pixels"].to(device) for media, modality in pictures])
        grid = torch.cat([media[modality]["grid"].to(device) for media, modality in pictures])
        replace_by(run_visual(core, pixels, grid), pictures, counted_by="grid")
    if sounds:
        mels = torch.cat([media["audio"]["mel"] for media, _ in sounds], dim=1).to(device)
        lengths = torch.cat([media["audio"]["lengths"] for media, _ in sounds])
        replace_by(run_audio(core, mels, lengths), sounds, counted_by="lengths")
    return features


def replace_by(parts, places, counted_by):
    """
    Puts a tower's outputs in the place of its inputs.

    parts       features of each picture or sound, in the order of the batch
    places      list of (media of a prompt, modality)
    counted_by  the input of a modality that has a row for each of its pictures or sounds
    """
    parts = iter(parts)
    for media, modality in places:
        own_parts = [next(parts) for _ in media[modality][counted_by]]
        media[modality] = torch.cat(own_parts)


def smallest_media(vision, audio):
    """A pair of frames and some sound, by the towers' configurations, that every rank can run."""
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    size = vision.spatial_merge_size
    frames = dict(pixels=torch.zeros(size**2, patch), grid=torch.tensor([[1, size, size]]))
    mel = torch.zeros(audio.num_mel_bins, 200)
    return dict(video=frames, audio=dict(mel=mel, lengths=torch.tensor([200])))
