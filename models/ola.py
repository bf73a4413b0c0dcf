"""
Ola-7B: a row as what it takes, what its towers make of a clip, which of its layers train and are
sharded, and one standard folder of the published weights:

    python -m models.ola convert OLA_FOLDER ENCODERS_FOLDER --out FOLDER

Only this file and its network (modeling_ola.py) know the backbone by name. In a prompt, frames come
first, then the sound, and positions are plain ones.

T frames, W windows of sound, P prompt tokens, D width of the text model.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
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

# linear layers that get a LoRA adapter: of the text model, of the towers
TEXT_LAYERS = r"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
TOWER_LAYERS = r"visual\.(.*\.)?([qkv]_proj|out_proj|fc[12]|proj[12]|predictor\.[02])"
TOWER_LAYERS += r"|audio_tower\.projector\.linear[12]"
EXPERTS = ()
TEXT_UNITS, TOWER_UNITS = (
    (Qwen2DecoderLayer,),
    (SiglipEncoderLayer,),
)  # what FSDP gathers at one time
# the sound encoders never train, as in the original
FROZEN = ("audio_tower.speech", "audio_tower.music")
SIDE = 32  # pixels; of a frame both sides are multiples: patches of 16, pooled 2 x 2
MAX_WINDOWS = 25  # of one sound


class OlaProcessor(ProcessorMixin):
    def __init__(self, feature_extractor=None, tokenizer=None, chat_template=None):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)


Thinker, Processor, MODEL_TYPES = OlaForConditionalGeneration, OlaProcessor, ("ola",)


# ---- a row as a prompt -------------------------------------------------------------------------


def chat_template(tokens):
    """A chat of Qwen with one token for each medium; tokens: {kind: token}. Media end with a new line."""
    media = "".join(f"{{% elif c['type'] == '{kind}' %}}{token}" for kind, token in tokens.items())
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
    text      the prompt, a token of `media_ends` for each medium; none for the sound of a video, whose
              features follow those of its frames
    returns   input_ids (P,), position_ids (3, P), media
    """
    media, places = {}, {}  # places: token of a medium -> for each of them, the tokens it becomes
    image, video, audio = config.image_token_id, config.video_token_id, config.audio_token_id
    if clip.images:
        pairs = [(resized(x, config.low_view_pixels), checked(x, name)) for x in clip.images]
        media["image"] = dict(views=pairs)
        places[image] = [[image] * (1 + sum(map(num_tokens, pair))) for pair in pairs]
    if clip.frames is not None:
        frames = checked(clip.frames, name)
        if frames.shape[2] * frames.shape[3] < config.min_frame_pixels:
            frames = resized(frames, config.min_frame_pixels)
        media["video"] = dict(pixels=frames)
        places[video] = [[video] * (2 + len(frames) * num_tokens(frames))]
    if clip.sounds:
        media["audio"] = heard(clip.sounds, processor.feature_extractor, name)
        per_window = media["audio"]["mel"].shape[2] // 2 // config.frames_per_token + 1
        places[audio] = [[audio] * (2 + count * per_window) for count in media["audio"]["counts"]]
    if clip.use_audio:
        places[video][0] += places.pop(audio)[0]
    places = {token: iter(runs) for token, runs in places.items()}
    tokens = processor.tokenizer(text).input_ids
    ids = [i for t in tokens for i in (next(places[t]) if t in places else [t])]
    return torch.tensor(ids), torch.arange(len(ids)).expand(3, -1), media


def checked(pixels, name):
    """(..., H, W), as it is, if both sides have an even number of patches."""
    height, width = pixels.shape[-2:]
    if height % SIDE or width % SIDE:
        raise BadRow(f"{name}: a frame of {width} x {height} pixels: Ola takes multiples of {SIDE}")
    return pixels


def resized(pixels, area):
    """(..., 3, H, W) uint8, enlarged or reduced to about `area` pixels, in multiples of SIDE."""
    scale = (area / (pixels.shape[-2] * pixels.shape[-1])) ** 0.5
    size = [max(SIDE, int(side * scale / SIDE) * SIDE) for side in pixels.shape[-2:]]
    x = pixels.float().reshape(-1, *pixels.shape[-3:])
    x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()
    return x.reshape(*pixels.shape[:-2], *size)


def num_tokens(pixels):
    """Of a frame or view: pooled patches, a mark after each row of them, and one after it."""
    height, width = (side // SIDE for side in pixels.shape[-2:])
    return height * (width + 1) + 1


def heard(sounds, extractor, name):
    """Sounds (S,) -> what both encoders take of their windows, the last of each padded with silence."""
    size = extractor.n_samples
    counts = [-(-len(sound) // size) for sound in sounds]
    if max(counts) > MAX_WINDOWS:
        told = (
            f"{max(map(len, sounds)) / AUDIO_RATE:.0f} s of sound: Ola takes {MAX_WINDOWS} windows"
        )
        raise BadRow(f"{name}: {told} of {size // AUDIO_RATE} s: set start and end")
    waves = [np.pad(sound, (0, n * size - len(sound))) for sound, n in zip(sounds, counts)]
    waves = torch.from_numpy(np.concatenate(waves)).float().view(-1, size)
    mel = extractor(
        list(waves.numpy()), sampling_rate=AUDIO_RATE, return_tensors="pt"
    ).input_features
    return dict(mel=mel, fbank=torch.stack([fbank(wave) for wave in waves]), counts=counts)


# ---- towers ------------------------------------------------------------------------------------


def encode(core, prompts, device, train_towers):
    """
    The towers' outputs; the vision tower is run once for all prompts.

    returns  list, a prompt each, of modality -> (n, D); what was encoded before passes through
    """
    out = [dict(p.media) for p in prompts]
    sound = core.audio_tower
    if train_towers and dist.is_initialized():
        # sharded towers: a rank that skips one leaves the others waiting in its collectives
        size = sound.projector.linear1.in_features // sound.projector.frames_per_token
        frame = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
        silence = sound.projector.newline.new_zeros(1, sound.projector.frames_per_token, size)
        out.append(dict(video=dict(pixels=frame), audio=sound.projector(silence)))
    seen = []
    for o in out:
        if isinstance(o.get("image"), dict):
            seen += [view[None] for pair in o["image"]["views"] for view in pair]
        if isinstance(o.get("video"), dict):
            seen.append(o["video"]["pixels"])
    views = iter(core.visual([x.to(device) for x in seen]) if seen else ())
    for o in out:
        if isinstance(o.get("image"), dict):
            pairs = [[next(views)[0], next(views)[0]] for _ in o["image"]["views"]]
            o["image"] = torch.cat([core.visual.projector.laid_out(pair, False) for pair in pairs])
        if isinstance(o.get("video"), dict):
            o["video"] = core.visual.projector.laid_out(next(views), True)
        if isinstance(audio := o.get("audio"), dict):
            both = sound.encode(audio["mel"].to(device), audio["fbank"].to(device))
            o["audio"] = torch.cat([sound.projector(x) for x in both.split(audio["counts"])])
    return out


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
    state, ours = {}, {}
    for name, value in published.items():
        if name.endswith("pos_embed"):
            value = value[0]
        if ".attn.qkv." in name:  # one matrix there, three here
            parts = zip(("query", "key", "value"), value.chunk(3))
            state |= {name.replace("qkv", part): rows for part, rows in parts}
        elif not re.match(UNUSED, name):
            state[name] = value
    if "music.encoder.pos_conv.0.weight_v" in state:  # frozen: its norm need not stand apart
        scale, v = (state.pop(f"music.encoder.pos_conv.0.weight_{x}") for x in "gv")
        state["music.encoder.pos_conv.0.weight"] = v * scale / v.norm(dim=(0, 1), keepdim=True)
    for name, value in state.items():
        for pattern, ours_is in RENAMED:
            name = re.sub(pattern, ours_is, name)
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
    ids = (
        {}
        if tokenizer is None
        else {
            f"{kind}_token_id": tokenizer.convert_tokens_to_ids(token)
            for kind, token in PLACES.items()
        }
    )
    return OlaConfig(**configs, frames_per_token=rate, **ids)


def tensors_of(path, keys):
    """What a published encoder's file holds: tensors and plain values; nothing in it is executed."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: it is one of Ola's two sound encoders: fetch it")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of its own kind for each way in which a file can be broken
        told = f"{path} does not load as tensors alone ({type(error).__name__}): fetch it again, or"
        raise UserError(
            f"{told} where you trust it, save its {keys} anew with torch.save"
        ) from None
    if not isinstance(found, dict) or not set(keys) <= set(found):
        raise UserError(f"{path} has no {' and '.join(keys)}: give the encoder as published")
    return [found[key] for key in keys]


def convert(ola_folder, encoders_folder, out):
    """Writes one standard folder of the published weights and the two sound encoders' files."""
    ola, out = Path(ola_folder), Path(out)
    if out.exists():
        raise UserError(f"{out} exists: give another --out")
    if not (ola / "config.json").is_file():
        raise UserError(f"{ola}: no model's folder: it has no config.json")
    published = read_config(ola / "config.json")
    kind = (
        published.get("model_type"),
        published.get("mm_projector_type"),
        published.get("speech_encoder_type"),
    )
    if kind != ("ola_qwen", "ola_mlp", "dual"):
        raise UserError(
            f"{ola}: no Ola as published (ola_qwen, ola_mlp, dual): its config.json says {kind}"
        )
    paths = [
        Path(encoders_folder) / Path(published[f"{x}_encoder"]).name for x in ("speech", "music")
    ]
    dims, whisper = tensors_of(paths[0], ("dims", "model_state_dict"))
    cfg, beats = tensors_of(paths[1], ("cfg", "model"))
    missing = [x for x in (*BEATS_KEYS.values(), "deep_norm", "gru_rel_pos") if not cfg.get(x)]
    if missing or cfg.get("layer_norm_first"):
        raise UserError(f"{paths[1]}: no BEATs of the kind that Ola hears with: {missing} missing")
    sizes = dims["n_audio_state"], cfg["encoder_embed_dim"]
    if sum(sizes) != published["speech_encoder_hidden_size"]:
        told = f"give {sizes[0]} + {sizes[1]} numbers a frame, not {published['speech_encoder_hidden_size']}"
        raise UserError(
            f"{paths[0].name} and {paths[1].name} {told}: give the encoders as published"
        )
    state = {}
    for path in sorted(ola.glob("*.safetensors")):
        state |= load_file(path)
    for prefix, encoder in (("speech", whisper), ("music", beats)):
        state |= {f"{prefix}.{name}": value for name, value in encoder.items()}
    state = renamed(state)
    tokenizer = AutoTokenizer.from_pretrained(ola)
    unknown = None, tokenizer.unk_token_id
    if lost := [
        token for token in PLACES.values() if tokenizer.convert_tokens_to_ids(token) in unknown
    ]:
        raise UserError(f"{ola}: its tokenizer lacks {', '.join(lost)}, as no Qwen2.5's does")
    with torch.device("meta"):
        num_blocks = sum(name.endswith("layer_norm1.bias") for name in state)
        model = OlaForConditionalGeneration(config_of(published, dims, cfg, tokenizer, num_blocks))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wrong := sorted(
        name for name in expected.keys() | found if expected.get(name) != found.get(name)
    ):
        sizes = f"{found.get(wrong[0])}, not {expected.get(wrong[0])}"
        raise UserError(
            f"{ola}: {len(wrong)} weights are not as Ola's, such as {wrong[0]}: {sizes}"
        )
    model.load_state_dict(state, assign=True)
    extractor = WhisperFeatureExtractor(
        feature_size=dims["n_mels"], chunk_length=dims["n_audio_ctx"] // 50
    )
    part = temp_dir(out)
    model.save_pretrained(part)
    OlaProcessor(extractor, tokenizer, chat_template=chat_template(PLACES)).save_pretrained(part)
    part.rename(out)
    print(f"{out}: {sum(value.numel() for value in state.values()) / 1e6:.0f} M weights")


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
