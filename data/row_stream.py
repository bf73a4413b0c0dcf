"""
The rows of each training step: their order, their clips read ahead, and what happens to bad ones.

A row that cannot be used is named once, counted, and replaced by the next row of the order, on all
ranks together. Nothing ever stands in for its clip. Too many bad rows end the run.
"""

import math

import numpy as np

from data.clips import BadRow
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

    position         rows taken from the order so far, replacements included
    bad_rows         {index of a row: why it cannot be used}
    """

    def __init__(
        self,
        rows,
        clip_cache,
        *,
        rows_per_step,
        seed,
        required_field=None,
        with_hints=False,
    ):
        self.rows = rows
        self.clip_cache = clip_cache
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.required_field = required_field
        self.with_hints = with_hints

        self.position = 0
        self.bad_rows = {}
        self.orders = {}  # epoch -> its permutation of the rows
        self.prefetched = {}  # index -> the row, parsed when its clip was prefetched

    # ---- the order

    def index_at(self, position):
        """The index of the row at a position of the endless order."""
        epoch, place = divmod(position, len(self.rows))
        if epoch not in self.orders:
            self.orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(
                len(self.rows)
            )
            # a step may reach into the next epoch and come back: keep the one before, no more
            for old in [e for e in self.orders if e not in (epoch - 1, epoch)]:
                del self.orders[old]
        return int(self.orders[epoch][place])

    # ---- the rows of a step

    def prefetch_next(self):
        """Threads start to read this rank's clips of the next step."""
        positions = range(self.position, self.position + self.rows_per_step)
        for position in positions[processes.local_slice(self.rows_per_step)]:
            index = self.index_at(position)
            if index not in self.bad_rows:
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
            failures = {}  # slot -> reason
            indices = {}
            for slot in missing:
                indices[slot] = self.index_at(self.position)
                self.position += 1
            for slot, index in indices.items():
                try:
                    step_rows[slot] = self._checked_row(index)
                    if slot in local:
                        prompts[slot] = self._prompt(step_rows[slot])
                except BadRow as problem:
                    failures[slot] = str(problem)

            # a row that one rank cannot use is replaced on all
            failures = processes.all_gather_dict(failures)
            missing = sorted(failures)
            for slot in missing:
                if indices[slot] not in self.bad_rows:
                    self.bad_rows[indices[slot]] = failures[slot]
                    steps.tell(f"replaced: {failures[slot]}")
            self._stop_if_too_many_are_bad()
        return [step_rows[slot] for slot in sorted(step_rows)], [prompts[slot] for slot in local]

    def _prefetch(self, index):
        try:
            row = self.rows[index]
        except BadRow:
            return  # reported when its step comes
        self.prefetched[index] = row
        self.clip_cache.prefetch(row)

    def _row(self, index):
        """A row, parsed once: when its clip was prefetched, or now."""
        return self.prefetched.pop(index, None) or self.rows[index]

    def _checked_row(self, index):
        if index in self.bad_rows:
            raise BadRow(self.bad_rows[index])
        row = self._row(index)
        if self.required_field and not row.get(self.required_field):
            name = self.required_field
            raise BadRow(f"row {row['prompt_id']}: no {name}: this stage learns from it")
        return row

    def _prompt(self, row):
        return self.clip_cache.get(row, row.get("hint") if self.with_hints else None)

    def _stop_if_too_many_are_bad(self):
        num_read = min(self.position, len(self.rows))
        num_counted = min(max(self.position, FIRST_ROWS), len(self.rows))
        num_bad = len(self.bad_rows)
        if num_bad > math.ceil(MAX_BAD_FRAC * num_counted) or num_bad == len(self.rows):
            last = list(self.bad_rows.values())[-1]
            raise UserError(
                f"{num_bad} of {num_read} rows read cannot be used, over {MAX_BAD_FRAC:.0%} "
                "(prepare.py check, with the same --model and media flags, lists all): mend them, "
                f"then --resume; the last: {last}"
            )

    # ---- the rows of replayed completions

    def prefetch_replayed(self, groups):
        """Threads start to read the clips of this rank's replayed groups."""
        for group in groups[processes.rank() :: processes.world_size()]:
            if group:
                self._prefetch(self.rows.index(group[0].prompt_id))

    def replayed_prompts(self, groups, buffer, steps):
        """
        The prompts of replayed groups. If a clip can no longer be read, its group is emptied and its
        prompt leaves the buffer, on all ranks together.

        groups   list of lists of buffer.Entry, one list a prompt; emptied in place
        buffer   buffer.ReplayBuffer
        steps    processes.Steps, which prints a line for each clip that cannot be read
        returns  {place in `groups`: Prompt}, this rank's
        """
        requests = {}
        for place in range(len(groups))[processes.rank() :: processes.world_size()]:
            if groups[place]:
                entry = groups[place][0]
                row = self._row(self.rows.index(entry.prompt_id))
                requests[place] = (row, row.get("hint") if entry.hinted else None)
        prompts, failures = read_on_all_ranks(self.clip_cache, requests)
        for place, problem in failures.items():
            prompt_id = groups[place][0].prompt_id
            self.bad_rows[self.rows.index(prompt_id)] = problem
            buffer.forget(prompt_id)
            steps.tell(f"no longer replayed: {problem}")
            groups[place] = []
        return prompts

    # ---- the state

    def state_dict(self):
        return dict(position=self.position, bad_rows=dict(self.bad_rows))

    def load_state_dict(self, state):
        self.position = state["position"]
        self.bad_rows = dict(state["bad_rows"])


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
