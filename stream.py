"""
The rows of every step: their order, their clips read ahead, and what happens when one is bad.

A row that cannot be used is named once, counted, and replaced by the next one of the order, on all
ranks together; nothing ever stands in for its clip. Too many of them end the run.
"""

import copy
import hashlib
import json
import math
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import run
from clips import BadRow
from data import media_paths
from inputs import Prompt

FEW = 64  # rows: before as many are read, a share of them says little


class Stream:
    """
    rows           data.Rows, the same on every rank
    prefetch       callable(row): a thread begins to read a row that this rank will ask for
    read           callable(row) -> anything; raises BadRow
    count          rows a step, over all ranks
    seed           of the order: each epoch a new one, whatever the number of ranks
    max_bad_frac   of the rows read so far that may be bad (of the first 64, while they are fewer)

    at    rows taken from the order so far, replacements included
    bad   {index of a row: why it cannot be used}
    """

    def __init__(self, rows, prefetch, read, count, seed, max_bad_frac):
        self.rows, self.prefetch, self.read = rows, prefetch, read
        self.count, self.seed, self.max_bad_frac = count, seed, max_bad_frac
        self.at, self.bad, self.orders = 0, {}, {}

    def index(self, at):
        """The row at a place of the endless order."""
        epoch, place = divmod(at, len(self.rows))
        if epoch not in self.orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            before = {e: kept for e, kept in self.orders.items() if e == epoch - 1}
            self.orders = before | {epoch: order}
        return int(self.orders[epoch][place])

    def read_ahead(self):
        """Threads begin to read this rank's rows of the next step."""
        for at in range(self.at, self.at + self.count)[run.share(self.count)]:
            if (index := self.index(at)) not in self.bad:
                try:
                    self.prefetch(self.rows[index])
                except BadRow:
                    pass  # told when its step comes

    def take(self):
        """
        The next step's rows -> list of dict, the same on every rank; what `read` made of this
        rank's; names of the rows that turned out bad, with the reasons.

        raises   run.UserError    more than max_bad_frac of the rows are bad
        """
        mine, told = range(self.count)[run.share(self.count)], []
        step, missing = {}, list(range(self.count))  # step: slot -> row, what `read` made of it

        def look(slot, index):
            if index in self.bad:
                raise BadRow(self.bad[index])
            return (row := self.rows[index]), slot in mine and self.read(row)

        while missing:
            indices = {slot: self.index(self.at + i) for i, slot in enumerate(missing)}
            self.at += len(missing)
            found, failed = read_all(look, {slot: (slot, i) for slot, i in indices.items()})
            step |= found
            missing = sorted(failed)
            for slot in missing:
                if indices[slot] not in self.bad:
                    self.bad[indices[slot]] = failed[slot]
                    told.append(failed[slot])
            self.check()
        rows, items = zip(*(step[slot] for slot in range(self.count)))
        return list(rows), list(items[mine.start : mine.stop]), told

    def check(self):
        seen = min(max(self.at, FEW), len(self.rows))
        if len(self.bad) > math.ceil(self.max_bad_frac * seen) or len(self.bad) == len(self.rows):
            last = list(self.bad.values())[-1]
            raise run.UserError(
                f"{len(self.bad)} of {min(self.at, len(self.rows))} rows read cannot be used, over "
                f"--max-bad-frac {self.max_bad_frac:g} (data.py check, with the same --model and media "
                f"flags, lists all): mend them, then --resume; the last: {last}"
            )

    def state_dict(self):
        return dict(at=self.at, bad=dict(self.bad))

    def load_state_dict(self, state):
        self.at, self.bad = state["at"], dict(state["bad"])


def read_all(read, wanted):
    """
    wanted    {key: arguments of `read`}, this rank's
    returns   {key: what `read` gave}; {key: reason} of all that could not be read, on any rank
    """
    found, failed = {}, {}
    for key, arguments in wanted.items():
        try:
            found[key] = read(*arguments)
        except BadRow as problem:
            failed[key] = str(problem)
    return found, {key: why for part in run.gather(failed) for key, why in part.items()}


class Reader:
    """
    Reads clips in threads ahead of the loop (PyAV and torch let other threads run while they work)
    and keeps what it read, or what the towers made of it, up to a bound. A clip is read once for
    all questions about it, with a hint or without. Its methods are for one thread. What was asked
    for ahead and not yet fetched does not count towards the bound.

    build         InputBuilder
    cache_bytes   int     of tensors kept, least recently used out first
    store         FeatureFolder or None
    """

    def __init__(self, build, workers, cache_bytes, store=None):
        self.build, self.store = build, store
        self.pool = ThreadPoolExecutor(max(workers, 1))
        self.pending, self.kept, self.room = {}, OrderedDict(), cache_bytes

    def _read(self, row):
        return (self.store and self.store.load(row)) or self.build(row)

    def prefetch(self, row):
        key = self.build.key(row)
        if key not in self.pending and key not in self.kept:
            self.pending[key] = self.pool.submit(self._read, row)

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
        return self.build.with_text(inputs, row, hint)

    def put(self, row, inputs):
        """Keeps the towers' outputs in the place of what was kept of the clip."""
        self._keep(self.build.key(row), inputs)
        if self.store:
            self.store.save(row, inputs)

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


class FeatureFolder:
    """
    What frozen towers made of a clip, on disk: a file a clip, named by everything that it depends
    on: the media files with size and time of change, the span, the recipe, the words around it, the
    towers' weights.
    """

    def __init__(self, folder, build, towers):
        self.folder, self.build = Path(folder), build
        weights = hashlib.sha256()
        for tower in towers:
            for value in tower.state_dict().values():
                weights.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        # and by what stands before the clip: its tokens are kept with it
        words = build.chat(build.processor, [], dict(question="", answer_type="text"), None, None)
        weights.update(f"{words} {len(build.tokenizer)}".encode())
        self.weights = weights.hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise run.UserError(
                f"--feature-dir {folder}: {error.strerror}: give a folder"
            ) from None

    def at(self, build):
        """The same for rows whose media lie under another folder; the towers are not read again."""
        other = copy.copy(self)
        other.build = build
        return other

    def path(self, row):
        key = [str(part) for part in self.build.key(row)]
        for file in media_paths(row):
            about = (self.build.root / file).stat()
            key += [str(about.st_size), str(about.st_mtime_ns)]
        key += [str(self.build.recipe), self.weights]
        return self.folder / (hashlib.sha256(json.dumps(key).encode()).hexdigest() + ".safetensors")

    def load(self, row):
        """-> Prompt, or None where there is none yet."""
        try:
            tensors = load_file(self.path(row))
        except (OSError, SafetensorError):  # none yet, or torn; a medium that is gone is told later
            return None
        return Prompt(tensors.pop("input_ids"), tensors.pop("position_ids"), tensors)

    def save(self, row, prompt):
        path = self.path(row)
        part = path.with_suffix(f".{os.getpid()}.part")
        tensors = dict(prompt.media, input_ids=prompt.input_ids, position_ids=prompt.position_ids)
        save_file({name: value.contiguous() for name, value in tensors.items()}, part)
        os.replace(part, path)
