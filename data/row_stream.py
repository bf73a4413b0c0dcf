"""
The rows of each training step: their order, their clips read ahead, and what happens to bad ones.

A row that cannot be used is named once, counted, and replaced by the next row of the order, on all
ranks together. Nothing ever stands in for its clip. Too many bad rows end the run.

Rows are known by their prompt_id, so the file may be mended, reordered or extended before a run is
resumed: the epoch continues with the rows that it began with, and bad ones are tried again.
"""

import math

import numpy as np
import torch

from data.clips import BadRow
from data.rows import stable_hash
from run import processes
from run.errors import UserError

MAX_BAD_FRAC = 0.1  # of the rows read so far: with more bad ones, something is wrong with the file
FIRST_ROWS = 64  # rows: before this many are read, a share of them says little


class RowStream:
    """
    rows             data.rows.Rows, the same on every rank
    clip_cache       ClipCache that makes the prompts
    rows_per_step    over all ranks
    seed             of the order: each epoch has a new one, whatever the number of ranks
    required_field   a row without this field is bad: stage 0 needs "reasoning"
    with_hints       whether the prompts of a step carry their rows' hints (stage 0)

    bad_rows         {prompt_id: why the row cannot be used}
    """

    def __init__(
        self, rows, clip_cache, *, rows_per_step, seed, required_field=None, with_hints=False
    ):
        self.rows = rows
        self.clip_cache = clip_cache
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.required_field = required_field
        self.with_hints = with_hints

        # the next row: a place in the order of an epoch
        self.epoch = 0
        self.place = 0
        self.orders = {}  # epoch -> (n,) int64, indices of rows; -1: the row is no longer in the file
        # of an epoch that began with another file: the ids and contents of its rows, in their order
        self.earlier_file = None

        self.bad_rows = {}
        self.bad_indices = set()  # of bad rows, found since the run began or was resumed
        self.num_read = 0  # rows since the run began or was resumed
        self.prefetched = {}  # index -> the row, parsed when its clip was prefetched

    # ---- the order

    def order_of(self, epoch):
        """(n,) int64, the indices of the rows in the order of an epoch; -1 where a row is gone."""
        if epoch not in self.orders:
            generator = np.random.default_rng([self.seed, epoch])
            if self.earlier_file and epoch == self.earlier_file["epoch"]:
                id_hashes = self.earlier_file["id_hashes"]
                order = self.rows.indices(id_hashes)[generator.permutation(len(id_hashes))]
            else:
                order = generator.permutation(len(self.rows))
            # a step may reach into the next epoch and come back: keep the one before, no more
            self.orders = {e: kept for e, kept in self.orders.items() if e == epoch - 1}
            self.orders[epoch] = order
        return self.orders[epoch]

    def upcoming(self):
        """Yields (index, epoch, place after it) for the next rows, without end."""
        epoch, place = self.epoch, self.place
        while True:
            order = self.order_of(epoch)
            if place >= len(order):
                epoch, place = epoch + 1, 0
                continue
            index = int(order[place])
            place += 1
            if index >= 0:
                yield index, epoch, place

    # ---- the rows of a step

    def prefetch_next(self):
        """Threads start to read this rank's clips of the next step."""
        upcoming = self.upcoming()
        indices = [next(upcoming)[0] for _ in range(self.rows_per_step)]
        for index in indices[processes.local_slice(self.rows_per_step)]:
            if index not in self.bad_indices:
                self._prefetch(index)

    def next_rows(self, steps):
        """
        The next step's rows; bad ones are replaced.

        steps    processes.Steps, which prints a line for every row that turns out bad
        returns  list of dict, the same on every rank; list of Prompt, this rank's
        raises   UserError    more than MAX_BAD_FRAC of the rows are bad
        """
        local = range(self.rows_per_step)[processes.local_slice(self.rows_per_step)]
        step_rows, prompts = {}, {}  # slot -> row, Prompt
        missing = list(range(self.rows_per_step))
        while missing:
            indices = self._take(missing)
            failures = {}  # slot -> reason
            for slot, index in indices.items():
                try:
                    step_rows[slot] = self._checked_row(index)
                    if slot in local:
                        prompts[slot] = self._prompt(step_rows[slot])
                except BadRow as problem:
                    failures[slot] = str(problem)

            # a row that one rank cannot use is replaced on all
            failures = processes.all_gather_dict(failures)
            for slot in missing:
                if slot in failures:
                    self._mark_bad(indices[slot], failures[slot], steps)
                else:
                    self._mark_good(step_rows[slot]["prompt_id"], steps)
            missing = sorted(failures)
            self._stop_if_too_many_are_bad()
        return [step_rows[slot] for slot in sorted(step_rows)], [prompts[slot] for slot in local]

    def _take(self, slots):
        """-> {slot: index of the next row}; the stream moves on."""
        indices = {}
        for slot, (index, epoch, place) in zip(slots, self.upcoming()):
            indices[slot] = index
            self.epoch, self.place = epoch, place
        self.num_read += len(slots)
        return indices

    def _prefetch(self, index):
        try:
            row = self.rows[index]
        except BadRow:
            return  # reported when its step comes
        self.prefetched[index] = row
        # else the row is bad, and nobody would take its clip
        if not self.required_field or row.get(self.required_field):
            self.clip_cache.prefetch(row)

    def _row(self, index):
        """A row, parsed once: when its clip was prefetched, or now."""
        return self.prefetched.pop(index, None) or self.rows[index]

    def _checked_row(self, index):
        if index in self.bad_indices:
            raise BadRow(self.bad_rows[self.rows.prompt_id(index)])
        row = self._row(index)
        if self.required_field and not row.get(self.required_field):
            name = self.required_field
            raise BadRow(f"row {row['prompt_id']}: no {name}: this stage learns from it")
        return row

    def _prompt(self, row):
        return self.clip_cache.get(row, row.get("hint") if self.with_hints else None)

    def _mark_bad(self, index, reason, steps):
        prompt_id = self.rows.prompt_id(index)
        if prompt_id not in self.bad_rows:
            steps.tell(f"replaced: {reason}")
        self.bad_rows[prompt_id] = reason
        self.bad_indices.add(index)

    def _mark_good(self, prompt_id, steps):
        if self.bad_rows.pop(prompt_id, None):
            steps.tell(f"row {prompt_id} was bad, and can be used now")

    def _stop_if_too_many_are_bad(self):
        num_read = min(self.num_read, len(self.rows))
        num_counted = min(max(self.num_read, FIRST_ROWS), len(self.rows))
        num_bad = len(self.bad_indices)
        if num_bad > math.ceil(MAX_BAD_FRAC * num_counted) or num_bad == len(self.rows):
            last = list(self.bad_rows.values())[-1]
            raise UserError(
                f"{num_bad} of {num_read} rows read cannot be used, over {MAX_BAD_FRAC:.0%} "
                "(prepare.py check, with the same --model and media flags, lists all): mend or remove "
                f"them, then --resume; the last: {last}"
            )

    # ---- the rows of replayed completions

    def prefetch_replayed(self, groups):
        """Threads start to read the clips of this rank's replayed groups."""
        for group in groups[processes.rank() :: processes.world_size()]:
            if group:
                try:
                    self._prefetch(self.rows.index(group[0].prompt_id))
                except BadRow:
                    pass  # no longer in the file: reported when it is needed

    def read_replayed(self, groups, buffer, steps):
        """
        Reads the prompts of replayed groups. If a clip can no longer be read, or its row is gone, the
        group comes back empty and the prompt leaves the buffer, on all ranks together.

        groups   list of lists of buffer.Entry, one list a prompt
        buffer   buffer.ReplayBuffer
        steps    processes.Steps, which prints a line for each group that is emptied
        returns  {place in `groups`: Prompt}, this rank's; the groups
        """
        groups = list(groups)
        prompts, failures = {}, {}
        for place in range(len(groups))[processes.rank() :: processes.world_size()]:
            if not groups[place]:
                continue
            entry = groups[place][0]
            try:
                row = self._row(self.rows.index(entry.prompt_id))
                prompts[place] = self.clip_cache.get(row, row.get("hint") if entry.hinted else None)
            except BadRow as problem:
                failures[place] = str(problem)
        for place, problem in processes.all_gather_dict(failures).items():
            prompt_id = groups[place][0].prompt_id
            self.bad_rows[prompt_id] = problem
            (index,) = self.rows.indices(id_hashes_of([prompt_id]))
            if index >= 0:
                self.bad_indices.add(int(index))
            buffer.forget(prompt_id)
            steps.tell(f"no longer replayed: {problem}")
            groups[place] = []
        return prompts, groups

    # ---- the state

    def state_dict(self):
        file = self.earlier_file
        if not file or file["epoch"] != self.epoch:
            file = dict(id_hashes=self.rows.id_hashes, content_hashes=self.rows.content_hashes)
        return dict(
            epoch=self.epoch,
            place=self.place,
            bad_rows=dict(self.bad_rows),
            id_hashes=torch.from_numpy(file["id_hashes"]),
            content_hashes=torch.from_numpy(file["content_hashes"]),
        )

    def load_state_dict(self, state):
        """
        Continues where the state was saved, by the rows' ids; says in one line what has changed in the
        file. Bad rows of before are tried again when their turn comes.

        raises   UserError    the file has none of the rows
        """
        self.epoch, self.place = state["epoch"], state["place"]
        self.orders = {}
        self.earlier_file = None
        id_hashes = state["id_hashes"].numpy()
        content_hashes = state["content_hashes"].numpy()
        indices = self.rows.indices(id_hashes)
        is_there = indices >= 0
        if not is_there.any():
            raise UserError(
                f"--data {self.rows.path} has none of the rows of this run: give the file that it began "
                "with, or start a new --out"
            )
        if not np.array_equal(id_hashes, self.rows.id_hashes):
            self.earlier_file = dict(
                epoch=self.epoch,
                id_hashes=id_hashes,
                content_hashes=np.where(
                    is_there, self.rows.content_hashes[indices], content_hashes
                ),
            )
        is_edited = is_there & (self.rows.content_hashes[indices] != content_hashes)
        changes = dict(
            new=len(self.rows) - int(is_there.sum()),
            gone=int((~is_there).sum()),
            edited=int(is_edited.sum()),
            reordered=int((np.diff(indices[is_there]) < 0).any()),
        )
        if any(changes.values()):
            processes.print0(f"  {self.rows.path} has changed: {self._describe(changes)}")

        present = self.rows.indices(id_hashes_of(state["bad_rows"])) >= 0
        self.bad_rows = {
            prompt_id: reason
            for (prompt_id, reason), is_present in zip(state["bad_rows"].items(), present)
            if is_present
        }
        self.bad_indices = set()
        self.num_read = 0

    def _describe(self, changes):
        parts = []
        if changes["new"]:
            parts.append(f"{changes['new']} rows are new, and come from the next epoch on")
        if changes["gone"]:
            parts.append(f"{changes['gone']} rows are gone")
        if changes["edited"]:
            parts.append(f"{changes['edited']} rows are edited")
        if changes["reordered"]:
            parts.append("the rows are in another order")
        return "; ".join(parts) + ": the run continues by prompt_id"


def id_hashes_of(prompt_ids):
    """-> (n,) int64, as Rows.id_hashes"""
    return np.array([stable_hash(prompt_id) for prompt_id in prompt_ids], dtype=np.int64)


def read_on_all_ranks(clip_cache, requests):
    """
    requests   {key: (row, hint or None)}, this rank's; keys differ between ranks
    returns    {key: Prompt}, this rank's; {key: reason} for all that cannot be read, on any rank
    """
    prompts, failures = {}, {}
    for key, (row, hint) in requests.items():
        try:
            prompts[key] = clip_cache.get(row, hint)
        except BadRow as problem:
            failures[key] = str(problem)
    return prompts, processes.all_gather_dict(failures)
