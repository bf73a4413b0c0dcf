"""
Stratified replay buffer, arXiv:2508.03100. Python, numpy and torch only: copy this file freely.

When all fresh rewards of a prompt are equal, their advantages are zero. Its stored completions,
measured against the prompt's own mean reward, still differ: replaying them keeps a signal in every
update. q a prompt, R a reward, R̄(q) the mean reward of q (mean_reward), n the prompts seen.

Which policy old_logprobs belong to after replay: always the one that generated the completion,
however many steps ago. Nothing here rewrites them, so pi_theta / pi_behaviour of a replayed token is
the ratio of two known policies and is not 1, not even before the first update on it. What is drawn
is not distributed as the behaviour policy, though: half comes from each side of R̄(q), farthest
first, and no ratio undoes that choice.

Everything is a function of the calls made and of the generator passed in: ranks that gather the
step's completions, make the same calls and hold the same generator draw the same groups.
"""

import math
from collections import deque, namedtuple
from dataclasses import dataclass

import numpy as np
import torch

# percent of the capacity (the paper) and of the draws (ours); tiers() cuts the prompts alike
SHARES = {"hard": 40, "medium": 35, "easy": 25}


@dataclass(eq=False)  # a generated __eq__ would compare tensors and raise
class Entry:
    """
    One finished completion, and all that is needed to train on it again except the clip, which is
    found again through its row: no pixels in here, so 10 000 entries are tens of MB.

    prompt_id       the dataset's key of the prompt, never its text
    completion_ids  (L,) int32    EOS included; the length is the mask
    old_logprobs    (L,) float32  nats, of the behaviour policy when it sampled; never updated
    reward          raw weighted sum, never normalised; reward_parts: the parts before weighting
    born_step       optimizer step at generation
    hinted          whether the prompt carried its hint when this was sampled
    ref_logprobs    (L,) float32 or None  nats, of the frozen reference: they never change, so they are
                    computed once
    raises          ValueError    lengths differ or are 0; a reward or log-prob is not finite
    """

    prompt_id: str
    completion_ids: torch.Tensor
    old_logprobs: torch.Tensor
    reward: float
    reward_parts: dict
    born_step: int
    hinted: bool
    ref_logprobs: torch.Tensor | None = None

    def __post_init__(self):
        # copies: a row of a padded batch would keep the whole batch, and its graph, in memory
        ids, old = torch.as_tensor(self.completion_ids), torch.as_tensor(self.old_logprobs)
        self.completion_ids = ids.detach().to("cpu", torch.int32, copy=True)
        self.old_logprobs = old.detach().to("cpu", torch.float32, copy=True)
        # plain types: a numpy number would not survive torch.load(weights_only=True)
        self.reward, self.born_step = float(self.reward), int(self.born_step)
        self.hinted = bool(self.hinted)
        self.reward_parts = {part: float(value) for part, value in self.reward_parts.items()}
        if ids.ndim != 1 or ids.shape != old.shape or not len(ids):
            shapes = f"{tuple(ids.shape)} and {tuple(old.shape)}"
            raise ValueError(f"ids and old_logprobs must be (L,), L > 0, got {shapes}")
        if not (math.isfinite(self.reward) and self.old_logprobs.isfinite().all()):
            raise ValueError(f"{self.prompt_id}: reward {self.reward} or a log-prob is not finite")


# (born_step, order) is unique, so items sort by age and never compare two entries
Item = namedtuple("Item", "born_step order entry")


def _gap(entry, mean_reward):
    """R - R̄(q), rounded: rewards that differ by float noise must tie."""
    return round(entry.reward - mean_reward, 6)


def _usefulness(items, mean_reward):
    """The draw weight of a prompt: how far its rewards reach, twice if to both sides.     [DRAW]"""
    gaps = [_gap(item.entry, mean_reward) for item in items]
    above, below = max(max(gaps), 0.0), max(-min(gaps), 0.0)
    return (above + below) * (2 if above and below else 1)


def _farthest(items, mean_reward, num_off):
    """Half from each side of R̄(q), farthest first, then newest; the rest from either.     [DRAW]"""
    ranked = sorted(items, reverse=True)  # newest first, and the next sort is stable
    ranked.sort(key=lambda item: -abs(_gap(item.entry, mean_reward)))
    below = [item for item in ranked if _gap(item.entry, mean_reward) < 0][: num_off // 2]
    above = [item for item in ranked if _gap(item.entry, mean_reward) > 0][: num_off // 2]
    fill = [item for item in ranked if item not in below + above]  # those at R̄ come last
    return [item.entry for item in (below + above + fill)[:num_off]]


def _quotas(num_groups, room, rng):
    """
    Groups per tier: the whole parts of 40/35/25 % of num_groups, the remainder at random in
    proportion to the fractions, so that the expected shares are exact for any num_groups. A tier
    with too little room passes its quota on to the others, again in proportion 40/35/25.
    """
    share = np.array(list(SHARES.values()))
    quota, rest = np.divmod(num_groups * share, 100)
    if rest.any():
        quota += rng.multinomial(rest.sum() // 100, rest / rest.sum())
    quota = np.minimum(quota, room)
    while quota.sum() < min(num_groups, sum(room)):
        open_share = share * (quota < room)
        quota[rng.choice(len(share), p=open_share / open_share.sum())] += 1
    return quota


class ReplayBuffer:
    """
    capacity   int   entries held, split over the tiers 40/35/25 %
    window     int   rewards per prompt in R̄(q); the paper's is 20
    raises     ValueError    capacity or window below 1
    """

    def __init__(self, capacity, window):
        if capacity < 1 or window < 1:
            raise ValueError(f"capacity and window must be >= 1, got {capacity} and {window}")
        self.capacity, self.window = capacity, window
        self.room = {tier: round(capacity * share / 100) for tier, share in SHARES.items()}
        self.room["hard"] = capacity - self.room["medium"] - self.room["easy"]  # sums exactly
        self._rewards, self._means = {}, {}  # prompt_id -> window, R̄; in order first seen
        self._items, self._order = {}, 0  # prompt_id -> [Item] in order of arrival; arrivals
        self._tiers = None  # cache, dropped by observe

    def __len__(self):
        return sum(map(len, self._items.values()))

    def observe(self, prompt_id, rewards):
        """
        Append this step's on-policy rewards of a prompt to its window.

        Only fresh completions under the plain prompt belong here. A replayed reward would be
        counted twice, and a hinted one would lift the prompt out of Hard by help it loses there.
        """
        rewards = [float(reward) for reward in rewards]
        if not all(map(math.isfinite, rewards)):
            raise ValueError(f"{prompt_id}: rewards must be finite, got {rewards}")
        if rewards:
            last = self._rewards.setdefault(prompt_id, deque(maxlen=self.window))
            last.extend(rewards)
            self._means[prompt_id] = math.fsum(last) / len(last)
            self._tiers = None

    def mean_reward(self, prompt_id):
        """R̄(q) = plain mean of the last `window` on-policy rewards, None before any.    [R.mean]"""
        return self._means.get(prompt_id)

    def tiers(self):
        """
        rank q by (R̄(q), first seen):  lowest round(.40 n) hard, highest round(.25 n) easy   [TIER]
        prompt_id -> tier of every prompt with an R̄, from the lowest up. Not to be modified.

        [U4] Ties are cut where they fall, so the shares are exact: a cut by value would make one tier
        of all prompts that share a reward. n = 1 medium; n = 2 hard, medium; n = 3 one of each.
        """
        if self._tiers is None:
            # a stable sort; rounded as in _gap: equal up to float noise is a tie
            ranked = sorted(self._means, key=lambda prompt_id: round(self._means[prompt_id], 6))
            count = {tier: round(share * len(ranked) / 100) for tier, share in SHARES.items()}
            count["medium"] = len(ranked) - count["hard"] - count["easy"]
            names = [tier for tier in SHARES for _ in range(count[tier])]
            self._tiers = dict(zip(ranked, names))
        return self._tiers

    def tier(self, prompt_id):
        """The prompt's present tier; Hard without an R̄, as nothing says that it can be solved."""
        return self.tiers().get(prompt_id, "hard")

    def add(self, entries):
        """
        Store completions; each belongs to its prompt's present tier and moves with it.

        [ROOM] When a tier holds more than its share of the capacity its oldest entries go. In Hard
        the best entry of each prompt is kept longer if it beats R̄(q): a rare success must outlive
        the failures after it.
        """
        for entry in entries:
            self._store(entry)
        held = {tier: [] for tier in SHARES}
        for prompt_id, items in self._items.items():
            held[self.tier(prompt_id)] += items
        gone = {}  # order -> prompt_id
        for tier, items in held.items():
            if len(items) > self.room[tier]:
                kept = self._rare_successes(items) if tier == "hard" else set()
                items.sort(key=lambda item: (item.order in kept, item))
                excess = items[: len(items) - self.room[tier]]
                gone |= {item.order: item.entry.prompt_id for item in excess}
        for prompt_id in set(gone.values()):
            self._items[prompt_id] = [i for i in self._items[prompt_id] if i.order not in gone]
        self._items = {prompt_id: items for prompt_id, items in self._items.items() if items}

    def _store(self, entry):
        item = Item(entry.born_step, self._order, entry)
        self._items.setdefault(entry.prompt_id, []).append(item)
        self._order += 1

    def _rare_successes(self, items):
        """
        [U5] Orders of the entries eviction spares: per prompt, hinted and plain apart, the best
        reward (newest of equals) if above R̄(q). They fill at most half of the tier, newest first:
        single successes of thousands of prompts would leave no prompt with a group to draw.
        """
        best = {}
        for item in sorted(items, key=lambda item: (item.entry.reward, item)):
            best[item.entry.prompt_id, item.entry.hinted] = item  # the last one written is best
        rare = [i for (q, _), i in best.items() if _gap(i.entry, self._means.get(q, -math.inf)) > 0]
        return {item.order for item in sorted(rare, reverse=True)[: self.room["hard"] // 2]}

    def forget(self, prompt_id):
        """Drop a prompt's entries: its clip can no longer be read. R̄(q) stays."""
        self._items.pop(prompt_id, None)

    def entries_of(self, prompt_id, step):
        """The prompt's entries born before step, in order of arrival, hinted and plain alike."""
        return [i.entry for i in self._items.get(prompt_id, []) if i.born_step < step]

    def draw(self, num_groups, num_off, step, rng):
        """
        tier: 40/35/25 % of the groups   q in tier: weight max(s (u + v), 1 % of the largest) [DRAW]
        u, v >= 0: how far the rewards of q reach above and below R̄(q); s = 2 if both do, else 1.
        Groups whose replayed advantages R - R̄(q) are two-sided and rarely zero.

        num_groups  int >= 0      groups wanted
        num_off     int >= 1      completions per group, of one prompt: it is then encoded once
        step        int           nothing born at or after it is drawn
        rng         numpy Generator
        returns     list of lists of num_off entries: no prompt twice; hinted and plain never
                    mixed, as their prompts differ; shorter when too little is stored
        raises      ValueError    num_groups or num_off out of range

        [U2] [U3] Of a prompt half come from each side of R̄(q), farthest first, newest of equals.
        If both its hinted and its plain entries make a group, the more useful do. A prompt without an R̄
        has nothing to be measured against and is not drawn.
        """
        if num_groups < 0 or num_off < 1:
            raise ValueError(f"need num_groups >= 0, num_off >= 1, got {num_groups} and {num_off}")
        pools = {tier: [] for tier in SHARES}  # [(usefulness, mean, items)], ordered as tiers()
        for prompt_id, tier in self.tiers().items():
            if prompt_id not in self._items:
                continue
            mean, stored, options = self._means[prompt_id], self._items[prompt_id], []
            recent = [item for item in stored if item.born_step < step]
            for hinted in (False, True):
                items = [item for item in recent if item.entry.hinted == hinted]
                if len(items) >= num_off:
                    options.append((_usefulness(items, mean), mean, items))
            if options:
                pools[tier].append(max(options, key=lambda option: option[0]))  # plain on a tie
        groups = []
        # a flat prompt replays advantages of 0: only in the places that the useful ones leave
        for is_useful in (True, False):
            part = [[o for o in pool if (o[0] > 0) == is_useful] for pool in pools.values()]
            quotas = _quotas(num_groups - len(groups), list(map(len, part)), rng)
            for pool, quota in zip(part, quotas):
                if quota:
                    weights = np.array([useful for useful, _, _ in pool])
                    weights = np.maximum(weights, 0.01 * weights.max() or 1.0)  # flat: all alike
                    picks = rng.choice(len(pool), quota, replace=False, p=weights / weights.sum())
                    groups += [_farthest(pool[i][2], pool[i][1], num_off) for i in picks]
        return groups

    def stats(self, step):
        """Metrics of the present content; 0 where there is nothing to average."""
        size, held = len(self), dict.fromkeys(SHARES, 0)
        for prompt_id, items in self._items.items():
            held[self.tier(prompt_id)] += len(items)
        ages = [step - item.born_step for items in self._items.values() for item in items]
        return {
            "buffer/size": size,
            "buffer/prompts": len(self._items),
            **{f"buffer/frac_{tier}": held[tier] / max(size, 1) for tier in SHARES},
            "buffer/staleness_mean": sum(ages) / max(size, 1),  # steps
            "buffer/mean_reward": sum(self._means.values()) / max(len(self._means), 1),
        }

    def state_dict(self):
        """Plain lists, numbers and four flat tensors: torch.load(weights_only=True) reads it."""
        items = [item for items in self._items.values() for item in items]
        entries = [item.entry for item in sorted(items, key=lambda item: item.order)]
        ids, old = [e.completion_ids for e in entries], [e.old_logprobs for e in entries]
        ref = [
            torch.full_like(e.old_logprobs, math.nan) if e.ref_logprobs is None else e.ref_logprobs
            for e in entries
        ]
        fields = ("prompt_id", "reward", "reward_parts", "born_step", "hinted")
        return {
            "capacity": self.capacity,
            "window": self.window,
            "rewards": [[prompt_id, *rewards] for prompt_id, rewards in self._rewards.items()],
            "entries": {name: [getattr(entry, name) for entry in entries] for name in fields},
            "lengths": torch.tensor(list(map(len, ids)), dtype=torch.int64),
            "completion_ids": torch.cat([torch.zeros(0, dtype=torch.int32), *ids]),
            "old_logprobs": torch.cat([torch.zeros(0), *old]),
            "ref_logprobs": torch.cat([torch.zeros(0), *ref]),
        }

    def load_state_dict(self, state):
        """Continue as the saved buffer would have. ValueError for another capacity or window."""
        for name in ("capacity", "window"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, the state has {state[name]}")
        self.__init__(self.capacity, self.window)
        for prompt_id, *rewards in state["rewards"]:
            self.observe(prompt_id, rewards)
        lengths, fields = state["lengths"].tolist(), state["entries"]
        ids, old = state["completion_ids"].split(lengths), state["old_logprobs"].split(lengths)
        ref = state["ref_logprobs"].split(lengths)
        for i, row in enumerate(zip(*fields.values())):
            entry = Entry(completion_ids=ids[i], old_logprobs=old[i], **dict(zip(fields, row)))
            entry.ref_logprobs = None if ref[i].isnan().any() else ref[i].clone()
            self._store(entry)  # not add: what the saved buffer still held was still to be drawn
