"""
The rows of a step: order, bad rows in it.

    python -m pytest tests/test_row_stream.py -q
"""

import json

import pytest
import torch
from conftest import Numbers, rows_of

from buffer import Entry
from data import row_stream
from data.clip_cache import ClipCache
from run import processes
from run.errors import UserError

# ---- the order, and bad rows in it


class StepLines:
    """Stands for processes.Steps: keeps the lines that it is to print."""

    def __init__(self):
        self.lines = []

    def tell(self, line):
        self.lines.append(line)


def stream_of(rows, count=4, seed=3, broken=()):
    clip_cache = ClipCache(Numbers(broken), cache_bytes=10**6)
    return row_stream.RowStream(rows, clip_cache, rows_per_step=count, seed=seed)


def take_ids(source, num_steps):
    """-> ids of the steps' rows; the lines printed about bad ones."""
    ids, steps = [], StepLines()
    for _ in range(num_steps):
        source.prefetch_next()
        rows, prompts = source.next_rows(steps)
        assert [float(row["prompt_id"]) for row in rows] == [x[0].item() for x in prompts]
        ids += [int(row["prompt_id"]) for row in rows]
    return ids, steps.lines


@pytest.fixture
def half_may_be_bad(monkeypatch):
    monkeypatch.setattr(row_stream, "MAX_BAD_FRAC", 0.5)


def test_every_row_comes_once_an_epoch_and_the_order_goes_on_anywhere():
    straight, _ = take_ids(stream_of(rows_of(7), count=5), 7)
    epochs = [tuple(straight[i : i + 7]) for i in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) > 3
    for skip in range(6):
        source = stream_of(rows_of(7), count=5)
        source.load_state_dict(dict(position=5 * skip, bad_rows={}))
        assert take_ids(source, 1)[0] == straight[5 * skip : 5 * skip + 5]
    assert take_ids(stream_of(rows_of(7), count=5, seed=4), 7)[0] != straight
    assert take_ids(stream_of(rows_of(1), count=3), 1)[0] == [0, 0, 0]


def test_a_later_rank_may_ask_for_the_next_epoch_first(monkeypatch):
    rank_1_of_2 = lambda count: slice(count // 2, count)  # noqa: E731
    monkeypatch.setattr(processes, "local_slice", rank_1_of_2)
    for at in (0, 96):  # few rows; a resumed run that begins where an epoch ends
        source = stream_of(rows_of(100 if at else 3), count=8)
        source.load_state_dict(dict(position=at, bad_rows={}))
        source.prefetch_next()
        expected = [source.index_at(at + i) for i in range(8)]
        rows, prompts = source.next_rows(StepLines())
        assert [int(row["prompt_id"]) for row in rows] == expected and len(prompts) == 4


def test_a_bad_row_is_named_once_and_the_next_of_the_order_takes_its_place(half_may_be_bad):
    order, _ = take_ids(stream_of(rows_of(10), count=1), 20)
    source = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    ids, lines = take_ids(source, 2)
    # step 1: places 0 1 2 3, of which 1 is bad: 4 is next, bad as well, then 5
    assert ids == [order[i] for i in (0, 5, 2, 3, 6, 7, 8, 9)]
    assert lines == [f"replaced: row {q}: broken" for q in (order[1], order[4])]
    assert source.position == 10 and sorted(source.bad_rows) == sorted([order[1], order[4]])
    more, lines = take_ids(source, 4)  # the second epoch and more
    assert lines == [] and not {order[1], order[4]} & set(more)
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
def test_too_many_bad_rows_end_the_run(monkeypatch, count, bad, max_bad_frac, stops):
    """Of the first 64 rows, while fewer are read: ceil(6.4) = 7 may be bad."""
    monkeypatch.setattr(row_stream, "MAX_BAD_FRAC", max_bad_frac)
    order, _ = take_ids(stream_of(rows_of(count), count=1), count)
    source = stream_of(rows_of(count), broken={str(i) for i in order[:bad]})
    if stops:
        with pytest.raises(UserError, match=f"^{bad} of .* over {max_bad_frac:.0%} .*: broken$"):
            take_ids(source, 3)
    else:
        assert len(take_ids(source, 3)[1]) == bad


def test_a_row_without_the_required_field_is_bad(half_may_be_bad):
    """Stage 0: rows without a reasoning; and prompts carry their hints."""
    rows = [
        dict(row, reasoning="why" * (i % 3), hint=f"hint {i}") for i, row in enumerate(rows_of(6))
    ]
    clip_cache = ClipCache(Numbers(), cache_bytes=10**6)
    source = row_stream.RowStream(
        rows, clip_cache, rows_per_step=4, seed=0, required_field="reasoning", with_hints=True
    )
    steps = StepLines()
    step_rows, prompts = source.next_rows(steps)
    assert all(row["reasoning"] for row in step_rows) and len(step_rows) == 4
    assert [hint for _, hint in prompts] == [row["hint"] for row in step_rows]
    assert steps.lines and all("no reasoning" in line for line in steps.lines)


class CountingRows(list):
    """Rows that count how often each is parsed."""

    def __init__(self, rows):
        super().__init__(rows)
        self.parsed = []

    def __getitem__(self, i):
        self.parsed.append(i)
        return super().__getitem__(i)

    def index(self, prompt_id):
        return int(prompt_id)


def test_a_row_is_parsed_once(half_may_be_bad):
    """Whether it is a step's or a replayed one."""
    rows = CountingRows(rows_of(12))
    source = stream_of(rows)
    take_ids(source, 2)
    assert len(rows.parsed) == len(set(rows.parsed)) == 8
    rows.parsed.clear()
    ids, logprobs = torch.ones(2, dtype=torch.long), torch.zeros(2)
    groups = [[Entry(str(i), ids, logprobs, 0.0, {}, 0, False)] for i in range(3)] + [[]]
    source.prefetch_replayed(groups)
    prompts = source.replayed_prompts(groups, None, StepLines())
    assert rows.parsed == [0, 1, 2] and sorted(prompts) == [0, 1, 2]
    assert not source.prefetched
