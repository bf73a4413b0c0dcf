"""
Clips read ahead of the loop, and kept.

    python -m pytest tests/test_clip_cache.py
"""

import random
import threading
from pathlib import Path

import pytest
import torch
from conftest import RECIPE, Numbers, rows_of

from data.clip_cache import ClipCache, tensor_bytes
from data.clips import BadRow
from data.rows import Rows
from models.inputs import InputBuilder
from models.loading import load_policy

# ---- reader


def test_the_reader_gives_the_same_whatever_the_order():
    rows, rng = rows_of(40), random.Random(0)
    reader = ClipCache(Numbers(), cache_bytes=400)
    for _ in range(300):
        for row in rng.choices(rows, k=3):
            reader.prefetch(row)
        row, hint = rng.choice(rows), rng.choice([None, "hint"])
        tensor, told = reader.get(row, hint)
        assert tensor.tolist() == [float(row["prompt_id"])] * 25 and told == hint
        assert sum(map(tensor_bytes, reader.kept.values())) == 400 - reader.room <= 400


def test_the_cache_keeps_the_last_used_within_its_bound():
    a, b, c, d = rows_of(4)
    reader = ClipCache(numbers := Numbers(), cache_bytes=300)
    for row in (a, b, c, a, d, a, b):  # d pushes b out, not a; the second b pushes c out
        reader.get(row)
    assert numbers.loads == ["0", "1", "2", "3", "1"]
    reader.get(a, "a hint")
    assert len(numbers.loads) == 5  # the clip is the same


def test_what_the_towers_made_takes_the_place_of_the_clip(toy_dir):
    rows = Rows(toy_dir / "stage2" / "train.jsonl")
    build = InputBuilder(toy_dir / "model", RECIPE, rows.path.parent, audio_captions=False)
    policy, encoded = load_policy(toy_dir / "model", 0, False), []
    encode = lambda prompt: encoded.append(1) or policy.encoded(prompt)  # noqa: E731
    reader = ClipCache(build, 10**6, encode)
    first, again = reader.get(rows[0]), reader.get(rows[0], "a hint")
    assert first.encoded and first.media is again.media and len(encoded) == 1
    assert torch.equal(again.input_ids, build(rows[0], "a hint").input_ids)
    assert reader.room == 10**6 - tensor_bytes(first)
    small = ClipCache(build, 1000, encode)  # larger than the cache: encoded anew each time
    assert small.get(rows[0]).encoded and not small.kept and small.room == 1000
    # no other clip's, nor one of a folder that was "." in another place
    assert build.at(".").key(rows[0]) == build.at(Path.cwd()).key(rows[0]) != build.key(rows[0])


def test_reader_errors_surface_at_get_and_are_not_kept():
    reader = ClipCache(numbers := Numbers("1"), cache_bytes=100)
    for row in (rows := rows_of(3)) + rows:
        reader.prefetch(row)
    for row in (rows[0], rows[2]):
        reader.get(row)
    for _ in range(2):
        with pytest.raises(BadRow, match="row 1: broken"):
            reader.get(rows[1])
    numbers.broken.clear()  # the file has been fetched again
    assert reader.get(rows[1])[0].shape == (25,) and not reader.pending
    assert threading.main_thread() not in numbers.threads
