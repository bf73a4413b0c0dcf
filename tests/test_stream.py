"""
The rows of a step: order, reading ahead, bad rows, features on disk.

    python -m pytest tests/test_stream.py -q
"""

import json
import random
import threading
from pathlib import Path

import pytest
import torch
from conftest import RECIPE

from rows import data
from omni import model
import run  # before torch: it sets how torch's threads wait
from rows import stream


class Numbers:
    """Stands for an InputBuilder: a row's clip is ten times its number, and the hint is told."""

    def __init__(self, broken=()):
        self.broken, self.loads, self.threads = set(broken), [], set()

    def __call__(self, row, hint=None):
        self.threads.add(threading.current_thread())
        self.loads.append(row["prompt_id"])
        if row["prompt_id"] in self.broken:
            raise data.BadRow(f"row {row['prompt_id']}: broken")
        return torch.full((25,), float(row["prompt_id"]))  # 100 bytes

    def key(self, row):
        return row["prompt_id"]

    def with_text(self, inputs, row, hint=None):
        return inputs, hint


def rows_of(count):
    return [dict(prompt_id=str(i)) for i in range(count)]


# ---- reader


@pytest.mark.parametrize("workers", [1, 4])
def test_the_reader_gives_the_same_whatever_the_order(workers):
    rows, rng = rows_of(40), random.Random(workers)
    reader = stream.Reader(Numbers(), workers, cache_bytes=400)
    for _ in range(300):
        for row in rng.choices(rows, k=3):
            reader.prefetch(row)
        row, hint = rng.choice(rows), rng.choice([None, "hint"])
        tensor, told = reader.get(row, hint)
        assert tensor.tolist() == [float(row["prompt_id"])] * 25 and told == hint
        assert sum(map(stream.tensor_bytes, reader.kept.values())) == 400 - reader.room <= 400


def test_the_cache_keeps_the_last_used_within_its_bound():
    a, b, c, d = rows_of(4)
    reader = stream.Reader(numbers := Numbers(), 1, cache_bytes=300)
    for row in (a, b, c, a, d, a, b):  # d pushes b out, not a; the second b pushes c out
        reader.get(row)
    assert numbers.loads == ["0", "1", "2", "3", "1"]
    reader.get(a, "a hint")
    assert len(numbers.loads) == 5  # the clip is the same
    reader.put(a, (torch.zeros(40), {"mel": torch.zeros(5)}))  # larger than what it replaces
    assert list(reader.kept) == ["1", "0"] and reader.room == 300 - 100 - 180
    reader.put(d, torch.zeros(1000))  # larger than the cache
    assert not reader.kept and reader.room == 300
    assert reader.get(a)[0].shape == (25,)


def test_reader_errors_surface_at_get_and_are_not_kept():
    reader = stream.Reader(numbers := Numbers("1"), 2, cache_bytes=100)
    for row in (rows := rows_of(3)) + rows:
        reader.prefetch(row)
    for row in (rows[0], rows[2]):
        reader.get(row)
    for _ in range(2):
        with pytest.raises(data.BadRow, match="row 1: broken"):
            reader.get(rows[1])
    numbers.broken.clear()  # the file has been fetched again
    assert reader.get(rows[1])[0].shape == (25,) and not reader.pending
    assert threading.main_thread() not in numbers.threads


# ---- the order, and bad rows in it


def stream_of(rows, count=4, seed=3, max_bad_frac=0.5, broken=()):
    reader = stream.Reader(Numbers(broken), 2, cache_bytes=10**6)
    return stream.Stream(rows, reader.prefetch, reader.get, count, seed, max_bad_frac)


def take_ids(source, steps):
    """-> ids of the steps' rows, what was told of bad ones."""
    ids, told = [], []
    for _ in range(steps):
        source.read_ahead()
        rows, items, problems = source.take()
        assert [float(row["prompt_id"]) for row in rows] == [item[0][0].item() for item in items]
        ids += [int(row["prompt_id"]) for row in rows]
        told += problems
    return ids, told


def test_every_row_comes_once_an_epoch_and_the_order_goes_on_anywhere():
    straight, _ = take_ids(stream_of(rows_of(7), count=5), 7)
    epochs = [tuple(straight[i : i + 7]) for i in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) > 3
    for skip in range(6):
        source = stream_of(rows_of(7), count=5)
        source.load_state_dict(dict(at=5 * skip, bad={}))
        assert take_ids(source, 1)[0] == straight[5 * skip : 5 * skip + 5]
    assert take_ids(stream_of(rows_of(7), count=5, seed=4), 7)[0] != straight
    assert take_ids(stream_of(rows_of(1), count=3), 1)[0] == [0, 0, 0]


def test_a_later_rank_may_ask_for_the_next_epoch_first(monkeypatch):
    monkeypatch.setattr(run, "share", lambda count: slice(count // 2, count))  # rank 1 of 2
    for at in (0, 96):  # few rows; a resumed run that begins where an epoch ends
        source = stream_of(rows_of(100 if at else 3), count=8)
        source.load_state_dict(dict(at=at, bad={}))
        source.read_ahead()
        asked = [source.index(at + i) for i in range(8)]
        rows, items, _ = source.take()
        assert [int(row["prompt_id"]) for row in rows] == asked and len(items) == 4


def test_a_bad_row_is_told_once_and_the_next_of_the_order_takes_its_place():
    order, _ = take_ids(stream_of(rows_of(10), count=1), 20)
    source = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    ids, told = take_ids(source, 2)
    # step 1: places 0 1 2 3, of which 1 is bad: 4 is next, bad as well, then 5
    assert ids == [order[i] for i in (0, 5, 2, 3, 6, 7, 8, 9)]
    assert told == [f"row {order[1]}: broken", f"row {order[4]}: broken"]
    assert source.at == 10 and sorted(source.bad) == sorted([order[1], order[4]])
    more, told = take_ids(source, 4)  # the second epoch and more
    assert told == [] and not {order[1], order[4]} & set(more)
    again = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    assert take_ids(again, 6)[0] == ids + more
    half = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    take_ids(half, 3)
    resumed = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict()), object_hook=int_keys))
    assert take_ids(resumed, 3)[0] == (ids + more)[12:]


def int_keys(item):
    return {int(k) if k.isdecimal() else k: v for k, v in item.items()}


@pytest.mark.parametrize(
    "count, bad, max_bad_frac, stops",
    [(100, 7, 0.1, False), (100, 8, 0.1, True), (10, 1, 0.1, False), (10, 1, 0, True), (10, 10, 1, True)],
)  # fmt: skip
def test_too_many_bad_rows_end_the_run(count, bad, max_bad_frac, stops):
    """Of the first 64 rows, while fewer are read: ceil(6.4) = 7 may be bad."""
    order, _ = take_ids(stream_of(rows_of(count), count=1), count)
    broken = {str(i) for i in order[:bad]}
    source = stream_of(rows_of(count), max_bad_frac=max_bad_frac, broken=broken)
    if stops:
        with pytest.raises(run.UserError, match=f"^{bad} of .* over --max-bad-frac .*: broken$"):
            take_ids(source, 3)
    else:
        assert len(take_ids(source, 3)[1]) == bad


# ---- features on disk


def test_features_on_disk_are_those_of_the_same_clip_recipe_and_towers(toy_dir, tmp_path):
    rows = data.Rows(toy_dir / "stage2" / "train.jsonl")
    build = model.InputBuilder(toy_dir / "model", RECIPE, rows.path.parent, audio_captions=False)
    policy = model.load(toy_dir / "model", 0, False, False)
    store = stream.FeatureFolder(tmp_path, build, policy.towers)
    row, prompt = rows[0], build(rows[0])
    assert store.load(row) is None
    with torch.no_grad():
        features = policy.encode([prompt])[0]
    store.save(row, prompt._replace(media=features))
    assert len(list(tmp_path.iterdir())) == 1
    # another run finds them, and decodes nothing
    again = stream.Reader(build, 1, 10**6, stream.FeatureFolder(tmp_path, build, policy.towers))
    build.__class__.__call__, called = (lambda *_: pytest.fail("decoded")), build.__class__.__call__
    try:
        found = again.get(row, "a hint")
    finally:
        build.__class__.__call__ = called
    assert found.encoded and all(torch.equal(found.media[k], features[k]) for k in features)
    assert torch.equal(found.input_ids, build(row, "a hint").input_ids)
    # not for another clip, recipe, file or tower; nor for a folder that was "." in another place
    assert build.at(".").key(row) == build.at(Path.cwd()).key(row) != build.key(row)
    assert store.load(rows[1]) is None
    other = build.at(build.root)
    other.recipe = RECIPE._replace(fps=1.0)
    assert stream.FeatureFolder(tmp_path, other, policy.towers).load(row) is None
    with torch.no_grad():
        next(policy.towers[0].parameters()).add_(1)
    assert stream.FeatureFolder(tmp_path, build, policy.towers).load(row) is None
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-10])  # torn by a power cut
    assert store.load(row) is None
