"""
BEATs (Chen et al., arXiv:2212.09058), its encoder: what is heard, music and noises too, in patches of a
spectrogram of 160 ms by 16 bands. It computes in float32 whatever the rest computes in. Torch and
torchaudio only: copy this file freely.

W windows of sound, L patches of each, H heads, C width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchaudio.compliance import kaldi


def fbank(wave):
    """(S,) at 16 kHz -> (frames of 10 ms, 128 bands), as the encoder takes it"""
    x = kaldi.fbank(wave[None] * 2**15, num_mel_bins=128, sample_frequency=16000)
    return (x - 15.41663) / (2 * 6.55582)


class Layer(nn.Module):
    def __init__(self, size, num_heads, intermediate_size, num_layers):
        super().__init__()
        self.num_heads, self.alpha = num_heads, (2 * num_layers) ** 0.25  # deep-norm
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))
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
    def __init__(
        self, hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072, embed_size=512,
        patch_size=16, conv_pos=128, conv_pos_groups=16, num_buckets=320, max_distance=800,
    ):  # fmt: skip
        super().__init__()
        self.hidden_size, self.num_buckets, self.max_distance = hidden_size, num_buckets, max_distance
        self.patches = nn.Conv2d(1, embed_size, patch_size, stride=patch_size, bias=False)
        self.patch_norm, self.patch_proj = nn.LayerNorm(embed_size), nn.Linear(embed_size, hidden_size)
        sizes = hidden_size, hidden_size, conv_pos
        self.pos_conv = nn.Conv1d(*sizes, padding=conv_pos // 2, groups=conv_pos_groups)
        self.norm, self.distances = nn.LayerNorm(hidden_size), nn.Embedding(num_buckets, num_heads)
        sizes = hidden_size, num_heads, intermediate_size, num_layers
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(num_layers))

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
        self.float()
        x = self.patches(fbank.float()[:, None]).flatten(2).transpose(1, 2)
        x = self.patch_proj(self.patch_norm(x))
        around = self.pos_conv(x.transpose(1, 2))[..., : x.shape[1]]  # an even width gives one more
        x, bias = self.norm(x + F.gelu(around).transpose(1, 2)), self.bias(x.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, bias)
        return x
