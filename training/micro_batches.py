"""
Packs the completions of an update into micro-batches that fit into --micro-tokens, and reads the
frozen reference's log-probs once per completion. Not in the paper: memory, ranks, and no repeated work.

B prompts, N completions, G completions of one prompt, L tokens of one completion, T of the longest.
"""

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from buffer import Entry
from models.policy import completion_logprobs
from run.packing import pack_sizes
from run.processes import all_gather_object


class WeightedGroup(NamedTuple):
    """Completions of one prompt, each with its advantage, and the weight that each has in J."""

    prompt: object  # models.inputs.Prompt
    entries: list  # of G buffer.Entry
    advantages: torch.Tensor  # (G,)
    weight: float

    def num_tokens(self):
        return len(self.prompt.input_ids) + sum(len(e.completion_ids) for e in self.entries)

    def part(self, indices):
        """The same group with only some of its completions."""
        entries = [self.entries[i] for i in indices]
        return self._replace(entries=entries, advantages=self.advantages[indices])


class MicroBatch(NamedTuple):
    """What one forward and backward pass reads."""

    prompts: list  # of B Prompt
    completions: list  # of B lists of (L,) int64
    entries: list  # of N Entry, in reading order
    advantages: torch.Tensor  # (N,)
    weights: torch.Tensor  # (N,) of each completion in J
    is_dummy: bool

    def padded(self, field, like):
        """old_logprobs or ref_logprobs of the entries -> (N, T), on the device of `like`."""
        rows = [getattr(entry, field) for entry in self.entries]
        return pad_sequence(rows, batch_first=True).to(like)


def dummy_group(prompt):
    """
    A group of weight 0 for ranks that run out of micro-batches: all ranks must make the same
    number of forward passes, or FSDP would hang.

    prompt   models.inputs.Prompt without media
    """
    zeros = torch.zeros(len(prompt.input_ids))
    entry = Entry(
        prompt_id="",
        completion_ids=prompt.input_ids,
        old_logprobs=zeros,
        reward=0.0,
        reward_parts={},
        born_step=0,
        hinted=False,
        ref_logprobs=zeros,
    )
    return WeightedGroup(prompt, [entry], advantages=torch.zeros(1), weight=0.0)


def split_group(group, micro_tokens):
    """A group that is larger than micro_tokens, in parts that each read the prompt again."""
    # At least half of the tokens are completions. Otherwise a long prompt would be read again for
    # every single completion.
    room = max(micro_tokens - len(group.prompt.input_ids), micro_tokens // 2)
    lengths = [len(entry.completion_ids) for entry in group.entries]
    return [group.part(indices) for indices in pack_sizes(lengths, room)]


def collate(groups, is_dummy=False):
    """WeightedGroups -> one MicroBatch."""
    weights = [torch.full((len(group.entries),), group.weight) for group in groups]
    return MicroBatch(
        prompts=[group.prompt for group in groups],
        completions=[[e.completion_ids.long() for e in group.entries] for group in groups],
        entries=[entry for group in groups for entry in group.entries],
        advantages=torch.cat([group.advantages for group in groups]),
        weights=torch.cat(weights),
        is_dummy=is_dummy,
    )


def pack(groups, micro_tokens, dummy):
    """
    This rank's groups -> its micro-batches, as many on every rank.

    groups        list of WeightedGroup; each prompt is read once for all its completions
    micro_tokens  int      tokens of prompts and completions in a micro-batch; a larger piece is
                           alone in its own
    dummy         WeightedGroup of weight 0, from dummy_group
    returns       list of MicroBatch
    """
    pieces = [part for group in groups for part in split_group(group, micro_tokens)]
    sizes = [piece.num_tokens() for piece in pieces]
    batches = []
    for indices in pack_sizes(sizes, micro_tokens):
        batches.append(collate([pieces[i] for i in indices]))
    most = max(all_gather_object(len(batches)))
    while len(batches) < most:
        batches.append(collate([dummy], is_dummy=True))
    return batches


def add_ref_logprobs(policy, reference, batches, groups, temperature):
    """
    Fills Entry.ref_logprobs where they are missing: log pi_ref of each token.          [KL] [U15]
    The reference never changes, so each completion is read by it once and then stored.

    reference  the frozen policy, or None: the policy without its adapter
    batches    this rank's micro-batches of `groups`
    groups     list of lists of Entry, of all ranks: all of them end with the same ref_logprobs
    """
    is_complete = all(e.ref_logprobs is not None for group in groups for e in group)
    if all(all_gather_object(is_complete)):
        return
    for batch in batches:
        with torch.no_grad(), policy.reference():
            ref_logprobs, _, _ = completion_logprobs(
                reference or policy, batch.prompts, batch.completions, temperature
            )
        for entry, row in zip(batch.entries, ref_logprobs.cpu()):
            entry.ref_logprobs = row[: len(entry.completion_ids)].clone()

    # every rank stores the same buffer, so every rank needs what the others have read
    entries = [entry for group in groups for entry in group]
    read_here = {i: e.ref_logprobs for i, e in enumerate(entries) if e.ref_logprobs is not None}
    for part in all_gather_object(read_here):
        for i, ref_logprobs in part.items():
            entries[i].ref_logprobs = ref_logprobs
