"""
Ola-7B as a backbone (what inputs.py asks of one), and the published weights as one standard folder:

    python -m models.ola convert OLA_FOLDER ENCODERS_FOLDER --out FOLDER

Only this file and its network (modeling_ola.py) know the model by name. In a prompt frames come first,
then the sound. Positions are plain ones: 0, 1, 2, ...

T frames, W windows of sound, P prompt tokens, n features of one medium, D width of the text model.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from data.clips import AUDIO_RATE, BadRow
from models.modeling_ola import OlaConfig, OlaForConditionalGeneration, fbank
from models.paths import read_config
from run import arguments
from run.errors import UserError
from run.io import temp_dir
from run.launch import run_main

# ---- which layers train and are sharded ----------------------------------------------------------

# linear layers that get a LoRA adapter
TEXT_LAYERS = r"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
TOWER_LAYERS = r"visual\.(.*\.)?([qkv]_proj|out_proj|fc[12]|proj[12]|predictor\.[02])"
TOWER_LAYERS += r"|audio_tower\.projector\.linear[12]"
EXPERTS = ()
# what FSDP gathers one at a time
TEXT_UNITS = (Qwen2DecoderLayer,)
TOWER_UNITS = (SiglipEncoderLayer,)
# the sound encoders never train, as in the original
FROZEN = ("audio_tower.speech", "audio_tower.music")
SIDE = 32  # pixels; both sides of a frame are multiples of it: patches of 16, pooled 2 x 2
MAX_WINDOWS = 25  # of one sound


# ---- classes -------------------------------------------------------------------------------------


class OlaProcessor(ProcessorMixin):
    def __init__(self, feature_extractor=None, tokenizer=None, chat_template=None):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)


MODEL_TYPES = ("ola",)
Thinker = OlaForConditionalGeneration
Processor = OlaProcessor


# ---- a row as a prompt -------------------------------------------------------------------------


def chat_template(tokens):
    """
    Qwen's chat template, in Jinja, with one token for each medium. Media end with a new line.

    tokens   {"image" | "video" | "audio": token}
    """
    media = ""
    for kind, token in tokens.items():
        media += f"{{% elif c['type'] == '{kind}' %}}{token}"
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{% if loop.last and loop.previtem and loop.previtem['type'] != 'text' %}"
        "{{ '\n' }}{% endif %}{{ c['text'] }}"
        + media
        + "{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def check(config, processor, folder):
    """Nothing to compare: `convert` wrote configuration and processor together."""


def media_ends(tokenizer, config):
    """The tokens that media end with in a prompt, a sound's last."""
    ids = config.image_token_id, config.video_token_id, config.audio_token_id
    return tokenizer.convert_ids_to_tokens(ids)


def inputs(processor, config, text, clip, name):
    """
    text      the prompt, with one token of `media_ends` for each medium; none for the sound of a video,
              whose features follow those of its frames
    returns   input_ids (P,), position_ids (3, P), media
    """
    image, video, audio = config.image_token_id, config.video_token_id, config.audio_token_id
    media = {}
    placeholders = {}  # token of a modality -> for each medium in the text, the tokens it becomes
    if clip.images:
        views = []
        placeholders[image] = []
        for picture in clip.images:
            pair = resized(picture, config.low_view_pixels), checked(picture, name)
            views.append(pair)
            length = 1 + num_tokens(pair[0]) + num_tokens(pair[1])
            placeholders[image].append([image] * length)
        media["image"] = dict(views=views)
    if clip.frames is not None:
        frames = checked(clip.frames, name)
        if frames.shape[2] * frames.shape[3] < config.min_frame_pixels:
            frames = resized(frames, config.min_frame_pixels)
        media["video"] = dict(pixels=frames)
        length = 2 + len(frames) * num_tokens(frames)
        placeholders[video] = [[video] * length]
    if clip.sounds:
        media["audio"] = sound_windows(clip.sounds, processor.feature_extractor, name)
        # mel frames of 10 ms, encoder frames of 20 ms, and a mark after each window
        num_frames = media["audio"]["mel"].shape[2] // 2
        per_window = num_frames // config.frames_per_token + 1
        placeholders[audio] = []
        for num_windows in media["audio"]["counts"]:
            length = 2 + num_windows * per_window
            placeholders[audio].append([audio] * length)
    if clip.use_audio:
        placeholders[video][0] += placeholders.pop(audio)[0]

    next_of = {token: iter(runs) for token, runs in placeholders.items()}
    ids = []
    for token in processor.tokenizer(text).input_ids:
        if token in next_of:
            ids += next(next_of[token])
        else:
            ids.append(token)
    position_ids = torch.arange(len(ids)).expand(3, -1)
    return torch.tensor(ids), position_ids, media


def checked(pixels, name):
    """Pixels (..., H, W) as they are; raises BadRow if a side has an odd number of patches."""
    height, width = pixels.shape[-2:]
    if height % SIDE or width % SIDE:
        raise BadRow(f"{name}: a frame of {width} x {height} pixels: Ola takes multiples of {SIDE}")
    return pixels


def resized(pixels, area):
    """(..., 3, H, W) uint8 -> the same picture with about `area` pixels; sides are multiples of SIDE"""
    scale = (area / (pixels.shape[-2] * pixels.shape[-1])) ** 0.5
    size = [max(SIDE, int(side * scale / SIDE) * SIDE) for side in pixels.shape[-2:]]
    x = pixels.float().reshape(-1, *pixels.shape[-3:])
    x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()
    return x.reshape(*pixels.shape[:-2], *size)


def num_tokens(pixels):
    """Features of a frame or view: pooled patches, a mark after each row of them, one at the end."""
    height, width = (side // SIDE for side in pixels.shape[-2:])
    return height * (width + 1) + 1


def sound_windows(sounds, extractor, name):
    """
    What both encoders take of sounds: windows of 30 s, the last of each sound padded with silence.

    sounds   list of (S,) at AUDIO_RATE
    returns  mel (W, bands, 3000) for Whisper, fbank (W, 2998, 128) for BEATs, counts: windows per sound
    """
    size = extractor.n_samples
    counts = [math.ceil(len(sound) / size) for sound in sounds]
    if max(counts) > MAX_WINDOWS:
        seconds = max(len(sound) for sound in sounds) / AUDIO_RATE
        raise BadRow(
            f"{name}: {seconds:.0f} s of sound: Ola takes {MAX_WINDOWS} windows of "
            f"{size // AUDIO_RATE} s: set start and end"
        )
    padded = []
    for sound, count in zip(sounds, counts):
        padded.append(np.pad(sound, (0, count * size - len(sound))))
    waves = torch.from_numpy(np.concatenate(padded)).float().view(-1, size)  # (W, size)
    batch = extractor(list(waves.numpy()), sampling_rate=AUDIO_RATE, return_tensors="pt")
    banks = torch.stack([fbank(wave) for wave in waves])
    return dict(mel=batch.input_features, fbank=banks, counts=counts)


# ---- towers ------------------------------------------------------------------------------------


def encode(core, prompts, device, train_towers):
    """
    The towers' outputs; the vision tower runs once for all prompts.

    returns  list of {modality: (n, D)}, one per prompt, and a dummy one where towers train on several
             processes; media that are encoded already pass through
    """
    features = [dict(prompt.media) for prompt in prompts]
    if train_towers and dist.is_initialized():
        features.append(dummy_media(core))
    pictures = []
    for media in features:
        if isinstance(media.get("image"), dict):
            for low_view, high_view in media["image"]["views"]:
                pictures += [low_view[None], high_view[None]]
        if isinstance(media.get("video"), dict):
            pictures.append(media["video"]["pixels"])
    encoded = iter(())
    if pictures:
        encoded = iter(core.visual([pixels.to(device) for pixels in pictures]))

    layout = core.visual.projector.lay_out
    for media in features:
        if isinstance(media.get("image"), dict):
            parts = []
            for _ in media["image"]["views"]:
                views = [next(encoded)[0], next(encoded)[0]]
                parts.append(layout(views, is_video=False))
            media["image"] = torch.cat(parts)
        if isinstance(media.get("video"), dict):
            media["video"] = layout(next(encoded), is_video=True)
        if isinstance(media.get("audio"), dict):
            media["audio"] = encode_sounds(core.audio_tower, media["audio"], device)
    return features


def encode_sounds(tower, audio, device):
    """What sound_windows gives -> (n, D)"""
    frames = tower.encode(audio["mel"].to(device), audio["fbank"].to(device))  # (W, L, C)
    parts = [tower.projector(windows) for windows in frames.split(audio["counts"])]
    return torch.cat(parts)


def dummy_media(core):
    """A frame and a moment of silence: if a rank skipped a sharded tower, the others would wait for ever."""
    projector = core.audio_tower.projector
    size = projector.linear1.in_features // projector.frames_per_token
    silence = projector.newline.new_zeros(1, projector.frames_per_token, size)
    frame = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    return dict(video=dict(pixels=frame), audio=projector(silence))


# ---- published weights -------------------------------------------------------------------------

PLACES = {"image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|vision_pad|>"}
TEXT_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rope_theta "
    "num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id"
).split()
BEATS_KEYS = dict(
    hidden_size="encoder_embed_dim",
    num_layers="encoder_layers",
    num_heads="encoder_attention_heads",
    intermediate_size="encoder_ffn_embed_dim",
    embed_size="embed_dim",
    patch_size="input_patch_size",
    conv_pos="conv_pos",
    conv_pos_groups="conv_pos_groups",
    num_buckets="num_buckets",
    max_distance="max_distance",
)
RENAMED = [  # published -> ours, one after the other; the encoders' files as speech.* and music.*
    (r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1"),
    (r"^model\.vision_tower\.vision_tower\.", "model.visual."),
    (r"^model\.mm_projector\.(image_|pooler\.)?", "model.visual.projector."),
    (r"^model\.speech_projector\.(speech_)?", "model.audio_tower.projector."),
    (r"^speech\.encoder\.", "model.audio_tower.speech."),
    (r"^music\.layer_norm\b", "music.patch_norm"),
    (r"^music\.encoder\.layer_norm\b", "music.norm"),
    (r"^music\.encoder\.layers\.0\.self_attn\.relative_attention_bias", "music.distances"),
    (r"^music\.(encoder\.)?", "model.audio_tower.music."),
    (r"post_extract_proj", "patch_proj"),
    (r"patch_embedding|patch_embed\.proj", "patches"),
    (r"pos_conv\.0\.", "pos_conv."),
    (r"(music\.layers\.\d+)\.self_attn\.", r"\1."),
    (r"pos_embed$", "positions.weight"),
    (r"positional_embedding$", "embed_positions.weight"),
    (r"\.blocks\.", ".layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.(q|k|v)[a-z]+\.", r".self_attn.\1_proj."),
    (r"\.attn\.(out|proj)\.", ".self_attn.out_proj."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.ln_post\.", ".layer_norm."),
]
UNUSED = r"model\.speech_encoder\.|speech\.decoder\.|music\.predictor\.|.*layers\.[1-9]\d*\.self_attn\.relative"


def renamed(published):
    """{published name: tensor} -> {our name: tensor}; the encoders' names begin with speech., music."""
    state = {}
    for name, value in published.items():
        if name.endswith("pos_embed"):
            value = value[0]
        if ".attn.qkv." in name:  # one matrix there, three here
            query, key, value = value.chunk(3)
            state[name.replace("qkv", "query")] = query
            state[name.replace("qkv", "key")] = key
            state[name.replace("qkv", "value")] = value
        elif not re.match(UNUSED, name):
            state[name] = value
    conv = "music.encoder.pos_conv.0.weight"
    if f"{conv}_v" in state:  # weight-normalised; it is frozen, so the norm need not stand apart
        scale = state.pop(f"{conv}_g")
        direction = state.pop(f"{conv}_v")
        state[conv] = direction * scale / direction.norm(dim=(0, 1), keepdim=True)
    ours = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        ours[name] = value
    return ours


def config_of(published, whisper, beats, tokenizer=None, num_blocks=27):
    """config.json, the `dims` of Whisper's file and the `cfg` of BEATs' -> OlaConfig"""
    text = Qwen2Config(**{key: published[key] for key in TEXT_KEYS if key in published})
    size = published["mm_hidden_size"]
    vision = SiglipVisionConfig(
        hidden_size=size,
        intermediate_size=int(size * 3.7362),
        num_hidden_layers=num_blocks,
        num_attention_heads=16,
        image_size=2048,
        patch_size=16,
        hidden_act="gelu",
    )
    speech = WhisperConfig(
        d_model=whisper["n_audio_state"],
        encoder_layers=whisper["n_audio_layer"],
        encoder_attention_heads=whisper["n_audio_head"],
        encoder_ffn_dim=4 * whisper["n_audio_state"],
        max_source_positions=whisper["n_audio_ctx"],
        num_mel_bins=whisper["n_mels"],
    )
    music = {ours: beats[theirs] for ours, theirs in BEATS_KEYS.items()}
    rate = published["speech_encoder_ds_rate"]
    configs = dict(text_config=text, vision_config=vision, speech_config=speech, music_config=music)
    ids = {}
    if tokenizer is not None:
        for kind, token in PLACES.items():
            ids[f"{kind}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    return OlaConfig(**configs, frames_per_token=rate, **ids)


def tensors_of(path, keys):
    """These entries of a published encoder's file: tensors and plain values; nothing is executed."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. It is one of Ola's two sound encoders: download it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each way in which a file can be broken has a class of its own
        raise UserError(
            f"{path} does not load as tensors alone ({type(error).__name__}): download it again, or if "
            f"you trust it, save its {keys} anew with torch.save"
        ) from None
    if not isinstance(state, dict) or not set(keys) <= set(state):
        raise UserError(f"{path} has no {' and '.join(keys)}: give the encoder as published")
    return [state[key] for key in keys]


def convert(ola_folder, encoders_folder, out):
    """Writes one standard folder of the published weights and the two sound encoders' files."""
    ola = Path(ola_folder)
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists: give another --out")
    published = read_published_config(ola)
    speech_path = Path(encoders_folder) / Path(published["speech_encoder"]).name
    music_path = Path(encoders_folder) / Path(published["music_encoder"]).name
    whisper_dims, whisper = tensors_of(speech_path, ("dims", "model_state_dict"))
    beats_config, beats = tensors_of(music_path, ("cfg", "model"))
    check_encoders(published, speech_path, whisper_dims, music_path, beats_config)

    published_state = {}
    for path in sorted(ola.glob("*.safetensors")):
        published_state |= load_file(path)
    for name, value in whisper.items():
        published_state[f"speech.{name}"] = value
    for name, value in beats.items():
        published_state[f"music.{name}"] = value
    state = renamed(published_state)

    tokenizer = AutoTokenizer.from_pretrained(ola)
    unknown = (None, tokenizer.unk_token_id)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in PLACES.values()}
    missing = [token for token, id in ids.items() if id in unknown]
    if missing:
        raise UserError(
            f"{ola}: its tokenizer lacks {', '.join(missing)}, which every tokenizer of Qwen2.5 has"
        )
    num_blocks = sum(name.endswith("layer_norm1.bias") for name in state)
    config = config_of(published, whisper_dims, beats_config, tokenizer, num_blocks)
    with torch.device("meta"):
        model = OlaForConditionalGeneration(config)
    check_shapes(model.state_dict(), state, ola)
    model.load_state_dict(state, assign=True)

    extractor = WhisperFeatureExtractor(
        feature_size=whisper_dims["n_mels"], chunk_length=whisper_dims["n_audio_ctx"] // 50
    )
    processor = OlaProcessor(extractor, tokenizer, chat_template=chat_template(PLACES))
    temporary = temp_dir(out)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(out)
    num_weights = sum(value.numel() for value in state.values())
    print(f"{out}: {num_weights / 1e6:.0f} M weights")


def read_published_config(ola):
    """config.json of the published folder; raises UserError if it is another model's."""
    if not (ola / "config.json").is_file():
        raise UserError(f"{ola} is not a model's folder: it has no config.json")
    published = read_config(ola / "config.json")
    keys = ("model_type", "mm_projector_type", "speech_encoder_type")
    kind = tuple(published.get(key) for key in keys)
    if kind != ("ola_qwen", "ola_mlp", "dual"):
        raise UserError(
            f"{ola} is not Ola as published (ola_qwen, ola_mlp, dual): its config.json says {kind}"
        )
    return published


def check_encoders(published, speech_path, whisper_dims, music_path, beats_config):
    """Raises UserError if the sound encoders are not those that Ola was trained with."""
    needed = (*BEATS_KEYS.values(), "deep_norm", "gru_rel_pos")
    missing = [key for key in needed if not beats_config.get(key)]
    if missing or beats_config.get("layer_norm_first"):
        raise UserError(f"{music_path}: not the kind of BEATs that Ola uses: {missing} missing")
    speech_size = whisper_dims["n_audio_state"]
    music_size = beats_config["encoder_embed_dim"]
    expected = published["speech_encoder_hidden_size"]
    if speech_size + music_size != expected:
        raise UserError(
            f"{speech_path.name} and {music_path.name} give {speech_size} + {music_size} numbers a "
            f"frame, not {expected}: give the encoders as published"
        )


def check_shapes(expected_state, state, ola):
    """Raises UserError unless the names and shapes of both are the same."""
    expected = {name: tuple(value.shape) for name, value in expected_state.items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    wrong = [
        name
        for name in sorted(expected.keys() | shapes.keys())
        if expected.get(name) != shapes.get(name)
    ]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{ola}: {len(wrong)} weights are not as Ola's, such as {first}: {shapes.get(first)}, not "
            f"{expected.get(first)}"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("ola_folder", help="THUdyh/Ola-7b of the hub, on this disk")
    parser.add_argument("encoders_folder", help="THUdyh/Ola_speech_encoders, on this disk")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    convert(args.ola_folder, args.encoders_folder, args.out)


if __name__ == "__main__":
    run_main(main, BadRow)
