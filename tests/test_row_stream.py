"""
The rows of a step: order, bad rows in it.

    python -m pytest tests/test_row_stream.py -q
"""

import json

import pytest
from conftest import Numbers, rows_of

from data import row_stream
from data.clip_cache import ClipCache
from run import processes
from run.errors import UserError

# ---- the order, and bad rows in it


def stream_of(rows, count=4, seed=3, max_bad_frac=0.5, broken=()):
    reader = ClipCache(Numbers(broken), cache_bytes=10**6)
    return row_stream.RowStream(rows, reader.prefetch, reader.get, count, seed, max_bad_frac)


def take_ids(source, steps):
    """-> ids of the steps' rows, what was told of bad ones."""
    ids, told = [], []
    for _ in range(steps):
        source.read_ahead()
        rows, items = source.take(told.append)
        assert [float(row["prompt_id"]) for row in rows] == [item[0][0].item() for item in items]
        ids += [int(row["prompt_id"]) for row in rows]
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
    monkeypatch.setattr(processes, "share", lambda count: slice(count // 2, count))  # rank 1 of 2
    for at in (0, 96):  # few rows; a resumed run that begins where an epoch ends
        source = stream_of(rows_of(100 if at else 3), count=8)
        source.load_state_dict(dict(at=at, bad={}))
        source.read_ahead()
        asked = [source.index(at + i) for i in range(8)]
        rows, items = source.take(print)
        assert [int(row["prompt_id"]) for row in rows] == asked and len(items) == 4


def test_a_bad_row_is_told_once_and_the_next_of_the_order_takes_its_place():
    order, _ = take_ids(stream_of(rows_of(10), count=1), 20)
    source = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    ids, told = take_ids(source, 2)
    # step 1: places 0 1 2 3, of which 1 is bad: 4 is next, bad as well, then 5
    assert ids == [order[i] for i in (0, 5, 2, 3, 6, 7, 8, 9)]
    assert told == [f"replaced: row {q}: broken" for q in (order[1], order[4])]
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
    [
        (100, 7, 0.1, False),
        (100, 8, 0.1, True),
        (10, 1, 0.1, False),
        (10, 1, 0, True),
        (10, 10, 1, True),
    ],
)
def test_too_many_bad_rows_end_the_run(count, bad, max_bad_frac, stops):
    """Of the first 64 rows, while fewer are read: ceil(6.4) = 7 may be bad."""
    order, _ = take_ids(stream_of(rows_of(count), count=1), count)
    broken = {str(i) for i in order[:bad]}
    source = stream_of(rows_of(count), max_bad_frac=max_bad_frac, broken=broken)
    if stops:
        with pytest.raises(UserError, match=f"^{bad} of .* over {max_bad_frac:.0%} .*: broken$"):
            take_ids(source, 3)
    else:
        assert len(take_ids(source, 3)[1]) == bad
