"""
Ola-7B (Liu et al., arXiv:2502.04328): a row as what it takes, its towers, its layers; only this file
knows it by name. The text model is Qwen2.5's; pictures of any size go through a SigLIP tower, sound in
windows of 30 s through Whisper's encoder and through BEATs, side by side.

    python -m omni.ola convert OLA_FOLDER ENCODERS_FOLDER --out FOLDER

makes one standard folder of the published parts. Frames come first in a prompt, then the sound, and
positions are plain ones.

T frames, h x w patches of a frame, W windows of sound, P prompt tokens, D width of the text model.
"""

import argparse
import math
import re
from itertools import groupby
from pathlib import Path

from run import UserError, folders  # before torch
from run.ending import main_guard
from run.files import empty_part

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from safetensors import safe_open
from transformers import (
    AttentionInterface, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, ProcessorMixin,
    Qwen2Config, Qwen2Model, SiglipVisionConfig, WhisperConfig, WhisperFeatureExtractor,
)  # fmt: skip
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omni.beats import Beats, fbank
from rows.clips import AUDIO_RATE, BadRow

# linear layers that get a LoRA adapter: of the text model, of the towers
TEXT_LAYERS = r"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
TOWER_LAYERS = r"visual\.(.*\.)?([qkv]_proj|out_proj|fc[12]|proj[12]|predictor\.[02])"
TOWER_LAYERS += r"|audio_tower\.projector\.linear[12]"
TEXT_UNITS, TOWER_UNITS = (Qwen2DecoderLayer,), (SiglipEncoderLayer,)  # what FSDP gathers at one time
SIDE = 32  # pixels; of a frame both sides are multiples: patches of 16, pooled 2 x 2
MAX_WINDOWS = 25  # of one sound


# ---- configuration -----------------------------------------------------------------------------


class OlaConfig(PreTrainedConfig):
    model_type = "ola"
    sub_configs_defaults = {
        "text_config": Qwen2Config, "vision_config": SiglipVisionConfig, "speech_config": WhisperConfig,
    }  # fmt: skip

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    speech_config: dict | PreTrainedConfig | None = None
    music_config: dict | None = None  # keywords of Beats
    # tokens of the vocabulary that nothing else uses: they only keep the places of features
    image_token_id: int = 151655
    video_token_id: int = 151656
    audio_token_id: int = 151654
    frames_per_token: int = 10  # of sound: 20 ms each
    projector_size: int = 2048  # of the sound projector, between its layers
    min_frame_pixels: int = 288 * 288  # smaller video frames are enlarged
    low_view_pixels: int = 384 * 384  # of the first of a picture's two views
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02


# ---- pictures ----------------------------------------------------------------------------------


def by_frame(module, query, key, value, attention_mask, scaling, **_):
    """
    Frames in one row, each of which sees itself. q, k, v (1, H, L, E) -> (1, L, H, E)

    attention_mask   list of int    the frames' lengths, L in all
    """
    runs = [(n, len(list(run))) for n, run in groupby(attention_mask)]
    pieces = []
    for (n, count), *qkv in zip(runs, *(x.split([n * k for n, k in runs], 2) for x in (query, key, value))):
        qkv = (x[0].unflatten(1, (count, n)).transpose(0, 1) for x in qkv)  # (count, H, n, E)
        pieces.append(F.scaled_dot_product_attention(*qkv, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces)[None], None


AttentionInterface.register("by_frame", by_frame)


class VisionTower(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        config._attn_implementation = "by_frame"
        size, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(3, size, kernel_size=patch, stride=patch)
        self.positions = nn.Embedding((config.image_size // patch) ** 2, size)  # of a square of them
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.projector = VisionProjector(size, width)

    def forward(self, clips):
        """A list of (T, 3, H, W) uint8, each with its own sizes -> a list of (T, h/2, w/2, D)."""
        dtype, side = self.patches.weight.dtype, math.isqrt(self.positions.num_embeddings)
        table = self.positions.weight.T.unflatten(1, (side, side))[None]  # (1, C, side, side)
        rows, sizes = [], []
        for pixels in clips:
            x = self.patches(((pixels.float() / 255 - 0.5) / 0.5).to(dtype))  # (T, C, h, w)
            x = x + F.interpolate(table, x.shape[2:], mode="bilinear", align_corners=False)
            rows.append(x.flatten(2).transpose(1, 2).flatten(0, 1))
            sizes.append((len(x), *x.shape[2:]))
        lengths, x = [h * w for t, h, w in sizes for _ in range(t)], torch.cat(rows)[None]
        for layer in self.layers:
            x = layer(x, lengths)
        pieces = x[0].split([t * h * w for t, h, w in sizes])  # there is no norm at the end
        return [self.projector(x.unflatten(0, size)) for x, size in zip(pieces, sizes)]


class VisionProjector(nn.Module):
    """2 x 2 patches to one feature of the text model, weighed by what they are and their mean."""

    def __init__(self, size, width):
        super().__init__()
        self.proj1, self.proj2 = nn.Linear(size, width), nn.Linear(width, width)
        linears = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.predictor = nn.Sequential(linears[0], nn.GELU(), linears[1])
        for name in ("begin", "newline", "sep", "end"):
            setattr(self, name, nn.Parameter(torch.randn(width) / width**0.5))

    def forward(self, x):
        """(T, h, w, C) -> (T, h/2, w/2, D)"""
        cells = self.proj1(x).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (T, h/2, 2, w/2, 2, D)
        cells = cells.transpose(2, 3).flatten(3, 4)  # (T, h/2, w/2, 4, D)
        mean = cells.mean(3, keepdim=True).expand_as(cells)
        weights = self.predictor(torch.cat([cells, mean], dim=-1)).softmax(3)
        return self.proj2(F.gelu((cells * weights).sum(3)))

    def laid_out(self, views, is_video):
        """A list of (h, w, D) -> (n, D): a mark after each row, and after each frame or between views."""
        parts = []
        for view in views:
            newline = self.newline.expand(len(view), 1, -1)
            parts += [torch.cat([view, newline], dim=1).flatten(0, 1), self.sep[None]]
        return torch.cat([self.begin[None], *parts[: None if is_video else -1], self.end[None]])


# ---- sound -------------------------------------------------------------------------------------


class SoundProjector(nn.Module):
    def __init__(self, size, inner, width, frames_per_token):
        super().__init__()
        self.frames_per_token = frames_per_token
        self.linear1, self.linear2 = nn.Linear(size * frames_per_token, inner), nn.Linear(inner, width)
        for name in ("begin", "newline", "end"):
            setattr(self, name, nn.Parameter(torch.randn(width) / width**0.5))

    def forward(self, x):
        """Windows of one sound (W, L, C) -> (n, D): a mark after each window"""
        count = x.shape[1] // self.frames_per_token
        x = x[:, : count * self.frames_per_token].unflatten(1, (count, -1)).flatten(2)
        x = self.linear2(F.relu(self.linear1(x)))
        x = torch.cat([x, self.newline.expand(len(x), 1, -1)], dim=1).flatten(0, 1)
        return torch.cat([self.begin[None], x, self.end[None]])


class SoundTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        speech, width = config.speech_config, config.text_config.hidden_size
        self.speech, self.music = WhisperEncoder(speech), Beats(**(config.music_config or {}))
        sizes = speech.d_model + self.music.hidden_size, config.projector_size, width
        self.projector = SoundProjector(*sizes, config.frames_per_token)

    @torch.no_grad()  # the original never trains its sound encoders either
    def encode(self, mel, fbank):
        """(W, 128, 3000), (W, 2998, 128) -> (W, L, C), both encoders' frames side by side"""
        dtype, windows = self.projector.linear1.weight.dtype, []
        for m, f in zip(mel.split(1), fbank.split(1)):  # the bias of one window is 100 MB
            speech = self.speech(m.to(self.speech.conv1.weight.dtype)).last_hidden_state
            both = speech, self.music(f)
            length = max(x.shape[1] for x in both)
            both = [F.pad(x, (0, 0, 0, length - x.shape[1])).to(dtype) for x in both]
            windows.append(torch.cat(both, dim=-1))
        return torch.cat(windows)


# ---- the whole ---------------------------------------------------------------------------------


class TextModel(Qwen2Model):
    """Qwen2.5's, its plain positions given as three equal rows: those of every backbone are three."""

    def forward(self, position_ids, **kwargs):
        """position_ids (3, B, L)"""
        return super().forward(position_ids=position_ids[0], **kwargs)


class Core(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.language_model = TextModel(config.text_config)
        self.visual = VisionTower(config.vision_config, config.text_config.hidden_size)
        self.audio_tower = SoundTower(config)


class OlaForConditionalGeneration(PreTrainedModel):
    config_class = OlaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.model, text = Core(config), config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.language_model.embed_tokens


class OlaProcessor(ProcessorMixin):
    def __init__(self, feature_extractor=None, tokenizer=None, chat_template=None):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)


Thinker, Processor, MODEL_TYPES = OlaForConditionalGeneration, OlaProcessor, ("ola",)
AutoConfig.register("ola", OlaConfig)


def towers(core):
    """What --train-towers trains."""
    return [core.visual, core.audio_tower.projector]


def frozen(core):
    """What never trains."""
    return [core.audio_tower.speech, core.audio_tower.music]


# ---- a row as a prompt -------------------------------------------------------------------------


def chat_template(tokens):
    """A chat of Qwen with one token for each medium; tokens: {kind: token}. Media end with a new line."""
    media = "".join(
        f"{{% elif c['type'] == '{kind}' %}}{token}" for kind, token in tokens.items()
    )
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{% if loop.last and loop.previtem and loop.previtem['type'] != 'text' %}"
        "{{ '\n' }}{% endif %}{{ c['text'] }}" + media + "{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


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
    if sounds := clip.sounds:
        waves, counts = windows(sounds, processor.feature_extractor.n_samples, name)
        given = dict(sampling_rate=AUDIO_RATE, return_tensors="pt")
        mel = processor.feature_extractor(list(waves.numpy()), **given).input_features
        media["audio"] = dict(mel=mel, fbank=torch.stack([*map(fbank, waves)]), counts=counts)
        per_window = mel.shape[2] // 2 // config.frames_per_token + 1
        places[audio] = [[audio] * (2 + count * per_window) for count in counts]
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


def windows(sounds, size, name):
    """Sounds (S,) -> (W, size), the last window of each padded with silence; how many each has."""
    counts = [-(-len(sound) // size) for sound in sounds]
    if max(counts) > MAX_WINDOWS:
        told = f"{max(map(len, sounds)) / AUDIO_RATE:.0f} s of sound: Ola takes {MAX_WINDOWS} windows of "
        raise BadRow(f"{name}: {told}{size // AUDIO_RATE} s: set start and end")
    waves = [np.pad(s, (0, n * size - len(s))) for s, n in zip(sounds, counts)]
    return torch.from_numpy(np.concatenate(waves).astype(np.float32)).view(-1, size), counts


# ---- towers ------------------------------------------------------------------------------------


def encode(core, prompts, device, train_towers):
    """
    The towers' outputs; the vision tower is run once for all prompts if it trains, else a prompt at
    a time.

    returns  list, a prompt each, of modality -> (n, D); what was encoded before passes through
    """
    if not train_towers and len(prompts) > 1:
        return [encode(core, [prompt], device, False)[0] for prompt in prompts]
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
        if isinstance(heard := o.get("audio"), dict):
            both = sound.encode(heard["mel"].to(device), heard["fbank"].to(device))
            o["audio"] = torch.cat([sound.projector(x) for x in both.split(heard["counts"])])
    return out
