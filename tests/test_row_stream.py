"""
The rows of a step: order, bad rows in it.

    python -m pytest tests/test_row_stream.py -q
"""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import Numbers, rows_of

from buffer import Entry
from data import row_stream
from data.clip_cache import ClipCache
from data.clips import BadRow
from run import processes
from run.errors import UserError

# ---- the order, and bad rows in it


class StepLines:
    """Stands for processes.Steps: keeps the lines that it is to print."""

    def __init__(self):
        self.lines = []

    def tell(self, line):
        self.lines.append(line)


class RowList:
    """Stands for data.rows.Rows, over a list of rows; counts how often each is parsed."""

    path = "rows.jsonl"

    def __init__(self, rows):
        self.rows = rows
        self.parsed = []
        self.id_hashes = row_stream.id_hashes_of([row["prompt_id"] for row in rows])
        self.content_hashes = row_stream.id_hashes_of([json.dumps(row) for row in rows])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.parsed.append(i)
        return self.rows[i]

    def prompt_id(self, i):
        return self.rows[i]["prompt_id"]

    def indices(self, id_hashes):
        places = {id_hash: i for i, id_hash in enumerate(self.id_hashes.tolist())}
        return np.array([places.get(id_hash, -1) for id_hash in id_hashes.tolist()], dtype=int)

    def index(self, prompt_id):
        (index,) = self.indices(row_stream.id_hashes_of([prompt_id]))
        if index < 0:
            raise BadRow(f"no row {prompt_id}")
        return int(index)


def stream_of(rows, count=4, seed=3, broken=()):
    clip_cache = ClipCache(Numbers(broken), cache_bytes=10**6)
    rows = rows if isinstance(rows, RowList) else RowList(rows)
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
        take_ids(source, skip)
        resumed = stream_of(rows_of(7), count=5)
        resumed.load_state_dict(source.state_dict())
        assert take_ids(resumed, 1)[0] == straight[5 * skip : 5 * skip + 5]
    assert take_ids(stream_of(rows_of(7), count=5, seed=4), 7)[0] != straight
    assert take_ids(stream_of(rows_of(1), count=3), 1)[0] == [0, 0, 0]


def test_a_later_rank_may_ask_for_the_next_epoch_first(monkeypatch):
    rank_1_of_2 = lambda count: slice(count // 2, count)  # noqa: E731
    monkeypatch.setattr(processes, "local_slice", rank_1_of_2)
    for place in (0, 96):  # few rows; a resumed run that begins where an epoch ends
        source = stream_of(rows_of(100 if place else 3), count=8)
        source.place = place
        source.prefetch_next()
        expected = [index for index, _, _ in itertools.islice(source.upcoming(), 8)]
        rows, prompts = source.next_rows(StepLines())
        assert [int(row["prompt_id"]) for row in rows] == expected and len(prompts) == 4


def test_a_bad_row_is_named_once_and_the_next_of_the_order_takes_its_place(half_may_be_bad):
    order, _ = take_ids(stream_of(rows_of(10), count=1), 20)
    source = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    ids, lines = take_ids(source, 2)
    # step 1: places 0 1 2 3, of which 1 is bad: 4 is next, bad as well, then 5
    assert ids == [order[i] for i in (0, 5, 2, 3, 6, 7, 8, 9)]
    assert lines == [f"replaced: row {q}: broken" for q in (order[1], order[4])]
    assert (source.epoch, source.place) == (0, 10)
    assert sorted(source.bad_rows) == sorted([str(order[1]), str(order[4])])
    more, lines = take_ids(source, 4)  # the second epoch and more
    assert lines == [] and not {order[1], order[4]} & set(more)
    again = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    assert take_ids(again, 6)[0] == ids + more
    half = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    take_ids(half, 3)
    resumed = stream_of(rows_of(10), broken={str(order[1]), str(order[4])})
    resumed.load_state_dict(half.state_dict())
    assert take_ids(resumed, 3) == ((ids + more)[12:], [])  # not named again
    assert resumed.bad_rows == half.bad_rows


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
        RowList(rows),
        clip_cache,
        rows_per_step=4,
        seed=0,
        required_field="reasoning",
        with_hints=True,
    )
    steps = StepLines()
    step_rows, prompts = source.next_rows(steps)
    assert all(row["reasoning"] for row in step_rows) and len(step_rows) == 4
    assert [hint for _, hint in prompts] == [row["hint"] for row in step_rows]
    assert steps.lines and all("no reasoning" in line for line in steps.lines)


def test_a_row_is_parsed_once(half_may_be_bad):
    """Whether it is a step's or a replayed one."""
    rows = RowList(rows_of(12))
    source = stream_of(rows)
    take_ids(source, 2)
    assert len(rows.parsed) == len(set(rows.parsed)) == 8
    rows.parsed.clear()
    ids, logprobs = torch.ones(2, dtype=torch.long), torch.zeros(2)
    groups = [[Entry(str(i), ids, logprobs, 0.0, {}, 0, False)] for i in range(3)] + [[]]
    source.prefetch_replayed(groups)
    prompts, _ = source.read_replayed(groups, None, StepLines())
    assert rows.parsed == [0, 1, 2] and sorted(prompts) == [0, 1, 2]
    assert not source.prefetched


# ---- a file that changed before the run is resumed


def resumed_with(rows, state, broken=()):
    source = stream_of(rows, count=2, broken=broken)
    source.load_state_dict(state)
    return source


def test_mended_rows_are_tried_again_and_removed_ones_forgotten(half_may_be_bad, capsys):
    rows = rows_of(10)
    broken = {"2", "5"}
    source = stream_of(rows, count=2, broken=broken)
    take_ids(source, 4)
    assert set(source.bad_rows) == broken
    state = source.state_dict()

    resumed = resumed_with(rows, state)  # their clips have been fetched again
    ids, lines = take_ids(resumed, 10)
    assert not resumed.bad_rows and {2, 5} <= set(ids)
    assert sum("can be used now" in line for line in lines) == 2
    assert "has changed" not in capsys.readouterr().out

    rest = [row for row in rows if row["prompt_id"] not in broken]
    resumed = resumed_with(rest, state)
    assert "2 rows are gone" in capsys.readouterr().out and not resumed.bad_rows
    ids, lines = take_ids(resumed, 8)
    assert sorted(set(ids)) == [0, 1, 3, 4, 6, 7, 8, 9] and not lines  # no good row is left out


def test_too_many_bad_rows_are_counted_anew_after_they_are_mended():
    rows = rows_of(30)
    order, _ = take_ids(stream_of(rows, count=2), 15)
    broken = {str(i) for i in order[:6]}
    source = stream_of(rows, count=2, broken=broken)
    state = source.state_dict()
    with pytest.raises(UserError, match="mend or remove them, then --resume"):
        take_ids(source, 9)
    resumed = resumed_with(rows, source.state_dict())  # mended
    assert len(take_ids(resumed, 9)[0]) == 18
    assert resumed_with(rows, state).bad_rows == {}


def test_a_reordered_file_gives_the_same_rows(capsys):
    rows = rows_of(12)
    source = stream_of(rows, count=2)
    take_ids(source, 2)
    state = source.state_dict()
    straight, _ = take_ids(source, 4)
    resumed = resumed_with(rows[::-1], state)
    assert take_ids(resumed, 4)[0] == straight  # to the end of the epoch
    assert "another order" in capsys.readouterr().out
    again = resumed_with(rows, resumed.state_dict())  # twice, and in a later epoch
    assert sorted(take_ids(again, 6)[0]) == list(range(12))


def test_a_file_that_grew_gives_its_new_rows_from_the_next_epoch_on(capsys):
    rows = rows_of(15)
    source = stream_of(rows[:12], count=2)
    take_ids(source, 2)
    state = source.state_dict()
    straight, _ = take_ids(source, 4)
    resumed = resumed_with(rows, state)
    assert "3 rows are new" in capsys.readouterr().out
    ids, _ = take_ids(resumed, 2)
    twice = resumed_with(rows, resumed.state_dict())  # resumed again in the same epoch
    ids += take_ids(twice, 2)[0]
    assert ids == straight
    ids, _ = take_ids(twice, 8)
    assert sorted(ids[:15]) == list(range(15))


def test_edited_rows_are_counted_and_another_file_is_refused(capsys):
    rows = rows_of(6)
    source = stream_of(rows, count=2)
    take_ids(source, 1)
    edited = [dict(row, question="Why?") if i == 3 else row for i, row in enumerate(rows)]
    resumed_with(edited, source.state_dict())
    assert "1 rows are edited" in capsys.readouterr().out
    others = [dict(row, prompt_id=f"other-{i}") for i, row in enumerate(rows)]
    with pytest.raises(UserError, match="--data rows.jsonl has none of the rows"):
        resumed_with(others, source.state_dict())


def test_a_replayed_row_that_is_gone_leaves_the_buffer():
    source = stream_of(rows_of(4))
    ids, logprobs = torch.ones(2, dtype=torch.long), torch.zeros(2)
    groups = [[Entry(name, ids, logprobs, 0.0, {}, 0, False)] for name in ("1", "gone")]
    buffer, steps = ForgetfulBuffer(), StepLines()
    source.prefetch_replayed(groups)
    prompts, groups = source.read_replayed(groups, buffer, steps)
    assert sorted(prompts) == [0] and groups[1] == [] and buffer.forgotten == ["gone"]
    assert len(steps.lines) == 1 and "no row gone" in steps.lines[0]


class ForgetfulBuffer:
    def __init__(self):
        self.forgotten = []

    def forget(self, prompt_id):
        self.forgotten.append(prompt_id)


def test_the_clip_of_a_row_that_lacks_the_required_field_is_not_read():
    """Nobody would take it, and a clip in flight does not count towards the cache."""
    rows = [dict(row, reasoning="because") for row in rows_of(8)]
    del rows[3]["reasoning"]
    source = stream_of(rows, count=8)
    source.required_field = "reasoning"
    source.prefetch_next()
    assert len(source.clip_cache.in_flight) == 7
    source.next_rows(StepLines())
    assert not source.clip_cache.in_flight
