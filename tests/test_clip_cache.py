"""
Clips read ahead of the loop, and kept.

    python -m pytest tests/test_clip_cache.py
"""

import random
import threading

import pytest
import torch
from conftest import RECIPE, Numbers, rows_of

from data.clip_cache import ClipCache, tensor_bytes
from data.clips import BadRow
from data.rows import Rows
from models.inputs import InputBuilder
from models.loading import load_policy


def test_the_cache_gives_the_same_whatever_the_order():
    rows, rng = rows_of(40), random.Random(0)
    cache = ClipCache(Numbers(), cache_bytes=400)
    for _ in range(300):
        for row in rng.choices(rows, k=3):
            cache.prefetch(row)
        row, hint = rng.choice(rows), rng.choice([None, "hint"])
        prompt = cache.get(row, hint)
        tensor = prompt if hint is None else prompt[0]
        assert tensor.tolist() == [float(row["prompt_id"])] * 25
        assert hint is None or prompt[1] == hint
        assert sum(map(tensor_bytes, cache.cache.values())) == 400 - cache.free_bytes <= 400


def test_the_cache_keeps_the_last_used_within_its_bound():
    a, b, c, d = rows_of(4)
    cache = ClipCache(numbers := Numbers(), cache_bytes=300)
    for row in (a, b, c, a, d, a, b):  # d pushes b out, not a; the second b pushes c out
        cache.get(row)
    assert numbers.loads == ["0", "1", "2", "3", "1"]
    cache.get(a, "a hint")
    assert len(numbers.loads) == 5  # the clip is the same


def test_what_the_towers_made_takes_the_place_of_the_clip(toy_dir):
    rows = Rows(toy_dir / "stage2" / "train.jsonl")
    build = InputBuilder(toy_dir / "model", RECIPE, rows.path.parent, audio_captions=False)
    policy, num_encoded = load_policy(toy_dir / "model", 0, False), []
    policy.thinker.model.visual.register_forward_hook(lambda *_: num_encoded.append(1))
    cache = ClipCache(build, 10**6, policy)
    first, again = cache.get(rows[0]), cache.get(rows[0], "a hint")
    assert first.is_encoded and first.media is again.media and len(num_encoded) == 1
    assert torch.equal(again.input_ids, build(rows[0], "a hint").input_ids)
    assert cache.free_bytes == 10**6 - tensor_bytes(first)
    small = ClipCache(build, 1000, policy)  # larger than the cache: encoded anew each time
    assert small.get(rows[0]).is_encoded and not small.cache and small.free_bytes == 1000


def test_cache_errors_surface_at_get_and_are_not_kept():
    cache = ClipCache(numbers := Numbers("1"), cache_bytes=100)
    for row in (rows := rows_of(3)) + rows:
        cache.prefetch(row)
    for row in (rows[0], rows[2]):
        cache.get(row)
    for _ in range(2):
        with pytest.raises(BadRow, match="row 1: broken"):
            cache.get(rows[1])
    numbers.broken.clear()  # the file has been fetched again
    assert cache.get(rows[1]).shape == (25,) and not cache.in_flight
    assert threading.main_thread() not in numbers.threads


def test_a_row_is_tokenised_once_unless_a_hint_comes(toy_dir):
    rows = Rows(toy_dir / "stage2" / "train.jsonl")
    build = InputBuilder(toy_dir / "model", RECIPE, rows.path.parent, audio_captions=False)
    num_texts, chat = [], build.chat
    build.chat = lambda *given: num_texts.append(1) or chat(*given)
    cache = ClipCache(build, 10**6)
    cache.prefetch(rows[0])
    first, again = cache.get(rows[0]), cache.get(rows[0])
    assert len(num_texts) == 1 and again is first
    other = dict(rows[0], prompt_id="other", question="Why?")
    for row, hint in ((rows[0], "a hint"), (other, None)):
        prompt, expected = cache.get(row, hint), build(row, hint)
        assert torch.equal(prompt.input_ids, expected.input_ids)
        assert torch.equal(prompt.position_ids, expected.position_ids)
        assert prompt.media is first.media


def test_a_row_is_not_blamed_for_another_one_of_its_clip():
    a, b = rows_of(2)
    b["video"] = a["video"]
    cache = ClipCache(Numbers(broken={"0"}), cache_bytes=1000)
    cache.prefetch(a)
    assert cache.get(b).shape == (25,)
