"""
Eyes and ears for hands_and_voices.py: what its model sees and hears before it learns to answer.

The vision tower learns to name the digits in the photographs of the people to train on. Of the audio
tower, a Whisper, only the projection learns, to name the digits that their voices say. A linear layer
on the mean of a second's features names the digit and is thrown away. So the text model finds both
digits in the features of frozen towers, as in the paper's stages.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FRAME_SIZE = 56  # pixels: what the toy's --max-pixels make of a clip's frames
BATCH_SIZE = 64
EYE_LR = 1e-3
EAR_LR, EAR_STEPS = 2e-3, 400
WEIGHT_DECAY = 0.05
SECONDS_HEARD = 12  # of one sound, as in a long clip
SOUNDS_PER_VOICE = 40


class Namer(nn.Module):
    """Features (N, n, D) of N seconds -> (N, 10) scores of the digits"""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, features):
        return self.layers(features.mean(1))


def descend(params, num_steps, peak_lr, loss_of_batch):
    """AdamW with a warm-up of 50 steps and a cosine down to a tenth of the peak."""
    params = list(params)
    optimizer = torch.optim.AdamW(params, lr=peak_lr, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95))
    for step in range(num_steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / num_steps)
        optimizer.param_groups[0]["lr"] = peak_lr * min(1, (step + 1) / 50) * (0.1 + 0.9 * cosine)
        optimizer.zero_grad()
        loss_of_batch().backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()


# ---- eyes --------------------------------------------------------------------------------------


def see(tower, video_processor, pictures):
    """(N, 3, H, W) uint8, each shown for a second -> features (N, n, D)"""
    # as one clip: the tower looks at each pair of frames on its own
    clip = pictures.repeat_interleave(2, dim=0)
    batch = video_processor(
        videos=[clip], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    features = tower(batch["pixel_values_videos"], batch["video_grid_thw"]).pooler_output
    return features.view(len(pictures), -1, features.shape[-1])


def shrink(pictures):
    size = (FRAME_SIZE, FRAME_SIZE)
    return F.interpolate(pictures.float(), size, mode="bicubic", antialias=True).clamp(0, 255)


def vary(pictures, generator):
    """Turns by up to 20 degrees, scales, shifts, mirrors and lights each picture differently."""
    n = len(pictures)

    def uniform(most):
        return most * (2 * torch.rand(n, generator=generator) - 1)

    angle, scale = uniform(math.pi / 9), uniform(0.2).exp()
    mirror = uniform(1).sign()
    rows = [
        torch.stack([scale * mirror * angle.cos(), -scale * angle.sin(), uniform(0.15)], 1),
        torch.stack([scale * mirror * angle.sin(), scale * angle.cos(), uniform(0.15)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), pictures.shape, align_corners=False)
    turned = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    contrast, brightness = uniform(0.3).exp(), uniform(20)
    lit = turned * contrast.view(n, 1, 1, 1) + brightness.view(n, 1, 1, 1)
    return lit.clamp(0, 255)


def train_eyes(tower, video_processor, train_pictures, test_pictures, num_steps):
    """
    Trains a vision tower of random weights.

    train_pictures, test_pictures    (N, 10, 3, H, W) uint8, of N people
    returns                          share of the test pictures that are named right
    """
    torch.manual_seed(0)
    namer = Namer(tower.config.out_hidden_size)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.cat([shrink(person) for person in train_pictures])
    digits = torch.arange(10).repeat(len(train_pictures))

    def loss_of_batch():
        i = torch.randint(len(pictures), (BATCH_SIZE,), generator=generator)
        varied = vary(pictures[i], generator).byte()
        return F.cross_entropy(namer(see(tower, video_processor, varied)), digits[i])

    descend([*tower.parameters(), *namer.parameters()], num_steps, EYE_LR, loss_of_batch)
    right = []
    with torch.no_grad():
        for person in test_pictures:
            features = see(tower, video_processor, shrink(person).byte())
            right.append(namer(features).argmax(1) == torch.arange(10))
    return torch.cat(right).float().mean().item()


# ---- ears --------------------------------------------------------------------------------------


@torch.no_grad()
def hear(tower, feature_extractor, sounds):
    """
    Whisper's last norm, before the projection.

    sounds    list of (S,) float, whole seconds at 16 kHz
    returns   (all seconds, n, D)
    """
    features = []
    hook = tower.ln_post.register_forward_hook(lambda _, inputs, output: features.append(output))
    for sound in sounds:
        mel = feature_extractor(
            sound.astype(np.float32),
            sampling_rate=16000,
            max_length=len(sound),
            truncation=False,
            return_tensors="pt",
        ).input_features[0]
        lengths = torch.tensor([mel.shape[1]])
        after_conv, _ = tower._get_feat_extract_output_lengths(lengths)
        tower(mel, lengths, after_conv)
    hook.remove()
    num_seconds = sum(len(sound) for sound in sounds) // 16000
    return torch.cat(features).view(num_seconds, -1, features[0].shape[-1])


def train_projection(tower, train_features, train_digits, test_features, test_digits):
    """
    Trains the projection of an audio tower to the text model's width.

    train_features, test_features   (N, n, D) of hear
    train_digits, test_digits       (N,) what is said in each second
    returns                         share of the test seconds that are named right
    """
    torch.manual_seed(0)
    namer = Namer(tower.proj.out_features)
    generator = torch.Generator().manual_seed(0)

    def loss_of_batch():
        i = torch.randint(len(train_features), (BATCH_SIZE * 4,), generator=generator)
        return F.cross_entropy(namer(tower.proj(train_features[i])), train_digits[i])

    descend([*tower.proj.parameters(), *namer.parameters()], EAR_STEPS, EAR_LR, loss_of_batch)
    with torch.no_grad():
        named = namer(tower.proj(test_features)).argmax(1)
    return (named == test_digits).float().mean().item()


# ---- as the text model expects it ----------------------------------------------------------------


@torch.no_grad()
def match(last_layer, features, wanted):
    """
    Shifts and scales what a tower's last linear layer gives: mean and spread become those of `wanted`.

    features   (n, D) of the tower
    wanted     (m, D) of the towers that the text model was trained with. It finds places in time by
               what all features of a kind have in common: from other means it would learn that anew.
    """
    mean, wanted_mean = features.mean(0), wanted.mean(0)
    spread, wanted_spread = (
        (x - x.mean(0)).norm(dim=1).mean() for x in (features, wanted)
    )  # mean distance from the mean
    scale = wanted_spread / spread
    last_layer.weight.mul_(scale)
    last_layer.bias.copy_((last_layer.bias - mean) * scale + wanted_mean)
