"""
Clips that are read in threads ahead of the training loop, and kept in memory.
"""

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from data.rows import clip_of


def num_decoders():
    """Threads that decode clips: this process's share of the machine's cores, at least two."""
    return max(2, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Reading(NamedTuple):
    """A clip that a thread is reading."""

    prompt_id: str  # of the row it is read for, without a hint
    prompt: Future  # of its Prompt


class CachedClip(NamedTuple):
    prompt_id: str  # of the row whose question, without a hint, stands in the prompt
    prompt: tuple  # Prompt


class ClipCache:
    """
    Rows -> Prompts. Clips are decoded in threads (PyAV and torch release the GIL while they work)
    and cached, decoded or as the outputs of frozen towers. A clip is read once for all questions
    about it, and a row's text is tokenised once; it is tokenised again only with a hint, or if the
    clip was read for another row. The methods must be called from one thread.

    builder       models.inputs.InputBuilder
    cache_bytes   int     of tensors kept; the least recently used clip goes first. Clips in flight
                  do not count
    encoder       models.policy.Policy whose frozen towers encode each clip once; None if the towers
                  train: then decoded clips are kept
    """

    def __init__(self, builder, cache_bytes, encoder=None):
        self.builder = builder
        self.encoder = encoder
        self.pool = ThreadPoolExecutor(num_decoders())
        self.in_flight = {}  # clip -> Reading
        self.cache = OrderedDict()  # clip -> CachedClip, the least recently used first
        self.free_bytes = cache_bytes

    def prefetch(self, row):
        """A thread starts to read the row's clip, unless it is cached or being read."""
        clip = clip_of(row)
        if clip not in self.cache and clip not in self.in_flight:
            future = self.pool.submit(self.builder, row)
            self.in_flight[clip] = Reading(row["prompt_id"], future)

    def get(self, row, hint=None):
        """-> the row's Prompt; waits if its clip is not read yet. Raises BadRow."""
        clip = clip_of(row)
        if clip in self.cache:
            self.cache.move_to_end(clip)
            cached = self.cache[clip]
        else:
            cached = self._read(clip, row)
        if self.encoder and not cached.prompt.is_encoded:
            cached = cached._replace(prompt=self.encoder.with_encoded_media(cached.prompt))
            self._keep(clip, cached)

        if hint is None and cached.prompt_id == row["prompt_id"]:
            return cached.prompt
        return self.builder.with_text(cached.prompt, row, hint)

    def _read(self, clip, row):
        """-> CachedClip. An error is not kept: the next call reads the file again."""
        self.prefetch(row)
        reading = self.in_flight.pop(clip)
        if reading.prompt_id != row["prompt_id"] and reading.prompt.exception():
            # its message names the other row: let it name this one
            reading = Reading(row["prompt_id"], self.pool.submit(self.builder, row))
        cached = CachedClip(reading.prompt_id, reading.prompt.result())
        self._keep(clip, cached)
        return cached

    def _keep(self, clip, cached):
        self.free_bytes += tensor_bytes(self.cache.pop(clip, None))
        self.free_bytes -= tensor_bytes(cached)
        self.cache[clip] = cached
        while self.free_bytes < 0:
            _, oldest = self.cache.popitem(last=False)
            self.free_bytes += tensor_bytes(oldest)


def tensor_bytes(tree):
    """Bytes of all tensors and arrays in a nest of tuples, lists and dicts."""
    if isinstance(tree, (torch.Tensor, np.ndarray)):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(tensor_bytes(part) for part in tree.values())
    if isinstance(tree, (tuple, list)):
        return sum(tensor_bytes(part) for part in tree)
    return 0
