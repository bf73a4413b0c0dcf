"""
Patch embeddings as matrix products. A convolution whose kernel is its stride reads every pixel once:
it is a linear layer on patches. In bfloat16, cuDNN's convolutions of this shape are reported to take
seconds for a clip (pytorch#174051, transformers#45750); the product has no such case. Torch only.

N images or clips, C channels; T, H, W size in pixels (T only for clips), t, h, w in patches.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn


def is_patch_embedding(module):
    return (
        isinstance(module, nn.Conv2d | nn.Conv3d)
        and tuple(module.kernel_size) == tuple(module.stride)
        and set(module.padding) == {0}
        and set(module.dilation) == {1}
        and module.groups == 1
    )


def use_products(tower):
    """Computes the patch embeddings in a tower as matrix products."""
    for module in tower.modules():
        if is_patch_embedding(module):
            module.forward = MethodType(patch_product, module)


def patch_product(conv, pixels):
    """
    As conv(pixels): what is left over at the end of an axis belongs to no patch.

    pixels   (N, C, [T,] H, W)
    returns  (N, D, [t,] h, w)
    """
    if not pixels.is_cuda and pixels.dtype == conv.weight.dtype == torch.float32:
        return type(conv).forward(conv, pixels)  # the CPU's convolution: the same bits as ever
    num_axes = len(conv.kernel_size)
    patches = pixels
    for axis, size in enumerate(conv.kernel_size):
        # (..., H, ...) -> (..., h, kernel, ...)
        place = 2 + 2 * axis
        count = patches.shape[place] // size
        patches = patches.narrow(place, 0, count * size).unflatten(place, (count, size))
    counts = [2 + 2 * axis for axis in range(num_axes)]
    within = [3 + 2 * axis for axis in range(num_axes)]
    patches = patches.permute(0, *counts, 1, *within)  # (N, [t,] h, w, C, kernel...)
    patches = patches.flatten(1 + num_axes)
    embeds = F.linear(patches, conv.weight.flatten(1), conv.bias)  # (N, [t,] h, w, D)
    return embeds.movedim(-1, 1)
