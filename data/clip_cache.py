"""
Clips read ahead of the loop, and kept.
"""

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def num_decoders():
    """Threads that decode clips: this process's share of the machine's cores, at least two."""
    return max(2, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class ClipCache:
    """
    Reads clips in threads ahead of the loop (PyAV and torch let other threads run while they work)
    and keeps what it read, or what the towers made of it, up to a bound. A clip is read once for
    all questions about it, with a hint or without. Its methods are for one thread. What was asked
    for ahead and not yet fetched does not count towards the bound.

    build         InputBuilder
    cache_bytes   int     of tensors kept, least recently used out first
    encode        callable(Prompt) -> Prompt with what frozen towers made of its media, which is kept
                  in their place; None: the towers train
    """

    def __init__(self, build, cache_bytes, encode=None):
        self.build, self.encode = build, encode
        self.pool = ThreadPoolExecutor(num_decoders())
        self.pending, self.kept, self.room = {}, OrderedDict(), cache_bytes

    def prefetch(self, row):
        key = self.build.key(row)
        if key not in self.pending and key not in self.kept:
            self.pending[key] = self.pool.submit(self.build, row)

    def get(self, row, hint=None):
        """The inputs of a row, waiting only if they are not ready; raises BadRow."""
        key = self.build.key(row)
        if key in self.kept:
            self.kept.move_to_end(key)
            inputs = self.kept[key]
        else:
            self.prefetch(row)
            inputs = self.pending.pop(key).result()  # an error is told once: next time it is read
            self._keep(key, inputs)
        prompt = self.build.with_text(inputs, row, hint)
        if self.encode and not prompt.encoded:
            prompt = self.encode(prompt)
            self._keep(key, prompt)
        return prompt

    def _keep(self, key, inputs):
        self.room += tensor_bytes(self.kept.pop(key, None)) - tensor_bytes(inputs)
        self.kept[key] = inputs
        while self.room < 0:
            self.room += tensor_bytes(self.kept.popitem(last=False)[1])


def tensor_bytes(tree):
    """Bytes of all tensors and arrays in a nest of tuples, lists and dicts."""
    if isinstance(tree, (torch.Tensor, np.ndarray)):
        return tree.nbytes
    parts = list(tree.values()) if isinstance(tree, dict) else tree
    return sum(map(tensor_bytes, parts)) if isinstance(parts, (tuple, list)) else 0
