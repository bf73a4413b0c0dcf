"""
The network of Ola-7B (Liu et al., arXiv:2502.04328), which transformers lacks: Qwen2.5's text model; a
SigLIP tower for pictures of any size; Whisper's encoder and BEATs, which hear the same windows of
30 s, side by side; and projectors. What is a row to it stands in ola.py.

T frames, h x w patches of a frame, W windows of sound, L places in them, C width of a tower, D of the
text model, H heads, E head width.
"""

import math
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    SiglipVisionConfig,
    WhisperConfig,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.models.whisper.modeling_whisper import WhisperEncoder

# ---- configuration -----------------------------------------------------------------------------


class OlaConfig(PreTrainedConfig):
    model_type = "ola"
    sub_configs_defaults = {
        "text_config": Qwen2Config,
        "vision_config": SiglipVisionConfig,
        "speech_config": WhisperConfig,
    }

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
    for (n, count), *qkv in zip(
        runs, *(x.split([n * k for n, k in runs], 2) for x in (query, key, value))
    ):
        qkv = (x[0].unflatten(1, (count, n)).transpose(0, 1) for x in qkv)  # (count, H, n, E)
        pieces.append(
            F.scaled_dot_product_attention(*qkv, scale=scaling).transpose(1, 2).flatten(0, 1)
        )
    return torch.cat(pieces)[None], None


AttentionInterface.register("by_frame", by_frame)


class VisionTower(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        config._attn_implementation = "by_frame"
        size, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(3, size, kernel_size=patch, stride=patch)
        self.positions = nn.Embedding(
            (config.image_size // patch) ** 2, size
        )  # of a square of them
        self.layers = nn.ModuleList(
            SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
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


def fbank(wave):
    """(S,) at 16 kHz -> (frames of 10 ms, 128 bands), as the encoder takes it"""
    from torchaudio.compliance import kaldi  # only here: all but sound works without

    x = kaldi.fbank(wave[None] * 2**15, num_mel_bins=128, sample_frequency=16000)
    return (x - 15.41663) / (2 * 6.55582)


class BeatsLayer(nn.Module):
    def __init__(self, size, num_heads, intermediate_size, num_layers):
        super().__init__()
        self.num_heads, self.alpha = num_heads, (2 * num_layers) ** 0.25  # deep-norm
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(size, size) for _ in range(4)
        )
        self.grep_linear = nn.Linear(size // num_heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.fc1, self.fc2 = nn.Linear(size, intermediate_size), nn.Linear(intermediate_size, size)

    def forward(self, x, bias):
        """x (W, L, C), bias of distances (H, L, L) -> (W, L, C)"""
        projected = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in projected)
        # each query says how much distances count for it
        a, b = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)
        bias = (a * (b * self.grep_a - 1) + 2) * bias  # (W, H, L, L)
        heard = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        x = self.self_attn_layer_norm(self.alpha * x + self.out_proj(heard))
        return self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x))))


class Beats(nn.Module):
    """
    The encoder of BEATs (Chen et al., arXiv:2212.09058), which hears music and noises too, in patches of
    160 ms by 16 bands. Its weights stay in float32, whatever dtype the rest has.
    """

    def __init__(
        self,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        embed_size=512,
        patch_size=16,
        conv_pos=128,
        conv_pos_groups=16,
        num_buckets=320,
        max_distance=800,
    ):
        super().__init__()
        self.hidden_size, self.num_buckets, self.max_distance = (
            hidden_size,
            num_buckets,
            max_distance,
        )
        self.patches = nn.Conv2d(1, embed_size, patch_size, stride=patch_size, bias=False)
        self.patch_norm, self.patch_proj = (
            nn.LayerNorm(embed_size),
            nn.Linear(embed_size, hidden_size),
        )
        sizes = hidden_size, hidden_size, conv_pos
        self.pos_conv = nn.Conv1d(*sizes, padding=conv_pos // 2, groups=conv_pos_groups)
        self.norm, self.distances = nn.LayerNorm(hidden_size), nn.Embedding(num_buckets, num_heads)
        sizes = hidden_size, num_heads, intermediate_size, num_layers
        self.layers = nn.ModuleList(BeatsLayer(*sizes) for _ in range(num_layers))

    def bias(self, length, device):
        """Of each pair of places by their distance, far ones in ever wider buckets: (H, L, L)."""
        place, half = torch.arange(length, device=device), self.num_buckets // 2
        away, near = place[None, :] - place[:, None], half // 2  # near: a bucket for each distance
        wide = torch.log(away.abs().clamp(min=1) / near) / math.log(self.max_distance / near)
        wide = (near + (wide * (half - near)).long()).clamp(max=half - 1)
        bucket = torch.where(away.abs() < near, away.abs(), wide) + half * (away > 0)
        return self.distances(bucket).permute(2, 0, 1)

    def forward(self, fbank):
        """(W, frames of 10 ms, 128) -> (W, L, C), patches in the order of the time"""
        x = self.patches(fbank.float()[:, None]).flatten(2).transpose(1, 2)
        x = self.patch_proj(self.patch_norm(x))
        around = self.pos_conv(x.transpose(1, 2))[..., : x.shape[1]]  # an even width gives one more
        x, bias = self.norm(x + F.gelu(around).transpose(1, 2)), self.bias(x.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, bias)
        return x


class SoundProjector(nn.Module):
    def __init__(self, size, inner, width, frames_per_token):
        super().__init__()
        self.frames_per_token = frames_per_token
        self.linear1, self.linear2 = (
            nn.Linear(size * frames_per_token, inner),
            nn.Linear(inner, width),
        )
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
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["music"]  # BEATs: its weights are published in float32

    def __init__(self, config):
        super().__init__(config)
        self.model, text = Core(config), config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.language_model.embed_tokens


class PublishedConfig(Qwen2Config):
    """Of the published folder, which lacks the sound encoders' sizes: so that it is told by its name."""

    model_type = "ola_qwen"


AutoConfig.register("ola", OlaConfig)
AutoConfig.register("ola_qwen", PublishedConfig)
