"""
The rows of every step: their order, their clips read ahead, and what happens when one is bad.

A row that cannot be used is named once, counted, and replaced by the next one of the order, on all
ranks together; nothing ever stands in for its clip. Too many of them end the run.
"""

import math

import numpy as np

from data.clips import BadRow
from run import processes
from run.errors import UserError

MAX_BAD_FRAC = 0.1  # of the rows read so far: with more of them, something is wrong with the file
FIRST_ROWS = 64  # rows: before as many are read, a share of them says little


class RowStream:
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
        for at in range(self.at, self.at + self.count)[processes.local_slice(self.count)]:
            if (index := self.index(at)) not in self.bad:
                try:
                    self.prefetch(self.rows[index])
                except BadRow:
                    pass  # told when its step comes

    def take(self, tell):
        """
        The next step's rows -> list of dict, the same on every rank; what `read` made of this
        rank's.

        tell     callable(str): is told of every row that turned out bad, with the reason
        raises   UserError    more than max_bad_frac of the rows are bad
        """
        mine = range(self.count)[processes.local_slice(self.count)]
        step, missing = {}, list(range(self.count))  # step: slot -> row, what `read` made of it

        def look(slot, index):
            if index in self.bad:
                raise BadRow(self.bad[index])
            return (row := self.rows[index]), slot in mine and self.read(row)

        while missing:
            indices = {slot: self.index(self.at + i) for i, slot in enumerate(missing)}
            self.at += len(missing)
            found, failed = read_on_all_ranks(
                look, {slot: (slot, i) for slot, i in indices.items()}
            )
            step |= found
            missing = sorted(failed)
            for slot in missing:
                if indices[slot] not in self.bad:
                    self.bad[indices[slot]] = failed[slot]
                    tell(f"replaced: {failed[slot]}")
            self.check()
        rows, items = zip(*(step[slot] for slot in range(self.count)))
        return list(rows), list(items[mine.start : mine.stop])

    def check(self):
        seen = min(max(self.at, FIRST_ROWS), len(self.rows))
        if len(self.bad) > math.ceil(self.max_bad_frac * seen) or len(self.bad) == len(self.rows):
            last = list(self.bad.values())[-1]
            raise UserError(
                f"{len(self.bad)} of {min(self.at, len(self.rows))} rows read cannot be used, over "
                f"{self.max_bad_frac:.0%} (prepare.py check, with the same --model and media flags, "
                f"lists all): mend them, then --resume; the last: {last}"
            )

    def read_stored_ahead(self, groups):
        """Threads begin to read the clips of this rank's stored groups."""
        for group in filter(None, groups[processes.rank() :: processes.world_size()]):
            self.prefetch(self.rows[self.rows.index(group[0].prompt_id)])

    def read_stored(self, groups, forget, tell):
        """
        Prompts of stored groups, this rank's -> {place in `groups`: Prompt}. A clip that can no longer
        be read is told, and empties its group, on all ranks together.

        groups   list of lists of buffer.Entry, a prompt each
        forget   callable(prompt_id)
        """
        own = {}
        for i in range(len(groups))[processes.rank() :: processes.world_size()]:
            for e in groups[i][:1]:
                row = self.rows[self.rows.index(e.prompt_id)]
                own[i] = (row, row.get("hint") if e.hinted else None)
        prompts, gone = read_on_all_ranks(self.read, own)
        for i, problem in gone.items():
            prompt_id = groups[i][0].prompt_id
            self.bad[self.rows.index(prompt_id)] = problem
            forget(prompt_id)
            tell(f"no longer replayed: {problem}")
            groups[i] = []
        return prompts

    def state_dict(self):
        return dict(at=self.at, bad=dict(self.bad))

    def load_state_dict(self, state):
        self.at, self.bad = state["at"], dict(state["bad"])


def read_on_all_ranks(read, wanted):
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
    return found, {
        key: why for part in processes.all_gather_object(failed) for key, why in part.items()
    }
