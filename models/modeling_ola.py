"""
The network of Ola-7B (Liu et al., arXiv:2502.04328), which transformers lacks: Qwen2.5's text model; a
SigLIP tower for pictures of any size; Whisper's encoder and BEATs, whose features of the same windows of
30 s stand side by side; and projectors. How a row becomes its input stands in ola.py.

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
    # tokens of the vocabulary that nothing else uses, as placeholders of features
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
    Attention within each frame of one packed row. q, k, v (1, H, L, E) -> (1, L, H, E)

    attention_mask   list of int    the frames' lengths, L in all
    """
    # successive frames of one length are one batch
    runs = [(length, len(list(frames))) for length, frames in groupby(attention_mask)]
    outs = []
    start = 0
    for length, count in runs:
        end = start + length * count
        q, k, v = (
            x[0, :, start:end]
            .unflatten(1, (count, length))
            .transpose(0, 1)  # (count, H, length, E)
            for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(outs)[None], None


AttentionInterface.register("by_frame", by_frame)


class VisionTower(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        config._attn_implementation = "by_frame"
        size = config.hidden_size
        patch = config.patch_size
        num_positions = (config.image_size // patch) ** 2  # of a square of patches
        self.patches = nn.Conv2d(3, size, kernel_size=patch, stride=patch)
        self.positions = nn.Embedding(num_positions, size)
        self.layers = nn.ModuleList(
            SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.projector = VisionProjector(size, width)

    def forward(self, clips):
        """A list of (T, 3, H, W) uint8, each with its own sizes -> a list of (T, h/2, w/2, D)."""
        dtype = self.patches.weight.dtype
        side = math.isqrt(self.positions.num_embeddings)
        table = self.positions.weight.T.unflatten(1, (side, side))[None]  # (1, C, side, side)
        rows = []
        sizes = []  # (T, h, w) of each clip
        frame_lengths = []
        for pixels in clips:
            normalised = (pixels.float() / 255 - 0.5) / 0.5
            x = self.patches(normalised.to(dtype))  # (T, C, h, w)
            x = x + F.interpolate(table, x.shape[2:], mode="bilinear", align_corners=False)
            num_frames, _, height, width = x.shape
            rows.append(x.flatten(2).transpose(1, 2).flatten(0, 1))
            sizes.append((num_frames, height, width))
            frame_lengths += [height * width] * num_frames
        x = torch.cat(rows)[None]
        for layer in self.layers:
            x = layer(x, frame_lengths)
        features = []  # there is no norm at the end
        for part, size in zip(x[0].split([math.prod(size) for size in sizes]), sizes):
            features.append(self.projector(part.unflatten(0, size)))
        return features


class VisionProjector(nn.Module):
    """2 x 2 patches to one feature of the text model: a mean, weighted by a network of patch and mean."""

    def __init__(self, size, width):
        super().__init__()
        self.proj1 = nn.Linear(size, width)
        self.proj2 = nn.Linear(width, width)
        self.predictor = nn.Sequential(
            nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width)
        )
        for name in ("begin", "newline", "sep", "end"):
            setattr(self, name, nn.Parameter(torch.randn(width) / width**0.5))

    def forward(self, x):
        """(T, h, w, C) -> (T, h/2, w/2, D)"""
        cells = self.proj1(x).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (T, h/2, 2, w/2, 2, D)
        cells = cells.transpose(2, 3).flatten(3, 4)  # (T, h/2, w/2, 4, D)
        mean = cells.mean(3, keepdim=True).expand_as(cells)
        weights = self.predictor(torch.cat([cells, mean], dim=-1)).softmax(3)
        return self.proj2(F.gelu((cells * weights).sum(3)))

    def lay_out(self, views, is_video):
        """
        Features in the order of a prompt, with marks: after each row, after each frame of a video or
        between the views of an image, at the begin and the end.  list of (h, w, D) -> (n, D)
        """
        parts = []
        for view in views:
            newline = self.newline.expand(len(view), 1, -1)
            parts.append(torch.cat([view, newline], dim=1).flatten(0, 1))
            parts.append(self.sep[None])
        if not is_video:
            parts.pop()
        return torch.cat([self.begin[None], *parts, self.end[None]])


# ---- sound -------------------------------------------------------------------------------------


def fbank(wave):
    """(S,) at 16 kHz -> (frames of 10 ms, 128 bands), as the encoder takes it"""
    from torchaudio.compliance import kaldi  # only here: all but sound works without

    x = kaldi.fbank(wave[None] * 2**15, num_mel_bins=128, sample_frequency=16000)
    return (x - 15.41663) / (2 * 6.55582)


class BeatsLayer(nn.Module):
    def __init__(self, size, num_heads, intermediate_size, num_layers):
        super().__init__()
        self.num_heads = num_heads
        self.alpha = (2 * num_layers) ** 0.25  # deep-norm
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)
        self.grep_linear = nn.Linear(size // num_heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))
        self.self_attn_layer_norm = nn.LayerNorm(size)
        self.final_layer_norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, size)

    def forward(self, x, bias):
        """x (W, L, C), bias of distances (H, L, L) -> (W, L, C)"""
        heads = (self.num_heads, -1)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)  # (W, H, L, E)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        # gates of each query: how much distances count for it
        gates = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        a, b = gates.chunk(2, dim=-1)
        bias = (a * (b * self.grep_a - 1) + 2) * bias  # (W, H, L, L)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        x = self.self_attn_layer_norm(self.alpha * x + out)
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
        self.hidden_size = hidden_size
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.patches = nn.Conv2d(1, embed_size, patch_size, stride=patch_size, bias=False)
        self.patch_norm = nn.LayerNorm(embed_size)
        self.patch_proj = nn.Linear(embed_size, hidden_size)
        self.pos_conv = nn.Conv1d(
            hidden_size, hidden_size, conv_pos, padding=conv_pos // 2, groups=conv_pos_groups
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.distances = nn.Embedding(num_buckets, num_heads)
        self.layers = nn.ModuleList(
            BeatsLayer(hidden_size, num_heads, intermediate_size, num_layers)
            for _ in range(num_layers)
        )

    def bias(self, length, device):
        """
        A bias for each pair of places, by the bucket of their distance: a bucket for each near distance,
        ever wider ones for far distances, and other ones for keys after the query.  -> (H, L, L)
        """
        num_per_sign = self.num_buckets // 2
        num_near = num_per_sign // 2
        place = torch.arange(length, device=device)
        offset = place[None, :] - place[:, None]
        distance = offset.abs()
        log_ratio = torch.log(distance.clamp(min=1) / num_near)
        far = log_ratio / math.log(self.max_distance / num_near)
        far_bucket = num_near + (far * (num_per_sign - num_near)).long()
        far_bucket = far_bucket.clamp(max=num_per_sign - 1)
        bucket = torch.where(distance < num_near, distance, far_bucket)
        bucket = bucket + num_per_sign * (offset > 0)
        return self.distances(bucket).permute(2, 0, 1)

    def forward(self, fbank):
        """(W, frames of 10 ms, 128) -> (W, L, C), patches in the order of the time"""
        x = self.patches(fbank.float()[:, None]).flatten(2).transpose(1, 2)
        x = self.patch_proj(self.patch_norm(x))
        length = x.shape[1]
        positions = self.pos_conv(x.transpose(1, 2))[..., :length]  # an even width gives one more
        x = self.norm(x + F.gelu(positions).transpose(1, 2))
        bias = self.bias(length, x.device)
        for layer in self.layers:
            x = layer(x, bias)
        return x


class SoundProjector(nn.Module):
    def __init__(self, size, inner, width, frames_per_token):
        super().__init__()
        self.frames_per_token = frames_per_token
        self.linear1 = nn.Linear(size * frames_per_token, inner)
        self.linear2 = nn.Linear(inner, width)
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
        self.speech = WhisperEncoder(config.speech_config)
        self.music = Beats(**(config.music_config or {}))
        self.projector = SoundProjector(
            config.speech_config.d_model + self.music.hidden_size,
            config.projector_size,
            config.text_config.hidden_size,
            config.frames_per_token,
        )

    @torch.no_grad()  # the original never trains its sound encoders either
    def encode(self, mel, fbank):
        """(W, 128, 3000), (W, 2998, 128) -> (W, L, C), both encoders' frames side by side"""
        dtype = self.projector.linear1.weight.dtype
        speech_dtype = self.speech.conv1.weight.dtype
        windows = []
        # one window at a time: the bias of one takes 100 MB
        for mel_one, fbank_one in zip(mel.split(1), fbank.split(1)):
            speech = self.speech(mel_one.to(speech_dtype)).last_hidden_state
            music = self.music(fbank_one)
            length = max(speech.shape[1], music.shape[1])
            speech = F.pad(speech, (0, 0, 0, length - speech.shape[1])).to(dtype)
            music = F.pad(music, (0, 0, 0, length - music.shape[1])).to(dtype)
            windows.append(torch.cat([speech, music], dim=-1))
        return torch.cat(windows)


# ---- the whole ---------------------------------------------------------------------------------


class TextModel(Qwen2Model):
    """Qwen2.5's. Positions come as three rows, as those of every backbone; here all three are equal."""

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
        text = config.text_config
        self.model = Core(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.language_model.embed_tokens


class PublishedConfig(Qwen2Config):
    """Of the published folder, which lacks the sound encoders' sizes: AutoConfig knows it by its name."""

    model_type = "ola_qwen"


AutoConfig.register("ola", OlaConfig)
AutoConfig.register("ola_qwen", PublishedConfig)
