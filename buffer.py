"""
Stratified replay buffer, arXiv:2508.03100. Python, numpy and torch only: copy this file freely.

When all fresh rewards of a prompt are equal, their advantages are zero. Its stored completions,
measured against the prompt's own mean reward, still differ: replaying them keeps a signal in every
update. q is a prompt, R a reward, R̄(q) the mean reward of q (mean_reward), n the number of prompts
seen so far.

old_logprobs always belong to the policy that generated the completion, however many steps ago.
Nothing here rewrites them, so pi_theta / pi_behaviour of a replayed token is the ratio of two known
policies, and it is not 1 even before the first update on it. The drawn completions are not a sample
of the behaviour policy, though: half comes from each side of R̄(q), farthest first, and the ratio
does not correct for this selection.

The state depends only on the calls made and the generator passed in. Ranks that gather the step's
completions, make the same calls and hold the same generator draw the same groups.
"""

import math
from collections import deque, namedtuple
from dataclasses import dataclass

import numpy as np
import torch

# percent of the capacity (the paper) and of the draws (ours); tiers() cuts the prompts alike
TIER_PERCENT = {"hard": 40, "medium": 35, "easy": 25}


@dataclass(eq=False)  # a generated __eq__ would compare tensors and raise
class Entry:
    """
    One finished completion, and all that is needed to train on it again except the clip, which is
    found through its row. No pixels are stored, so 10 000 entries take tens of MB.

    prompt_id       the dataset's key of the prompt, never its text
    completion_ids  (L,) int32    EOS included; the length is the mask
    old_logprobs    (L,) float32  nats, of the behaviour policy when it sampled; never updated
    reward          raw weighted sum, never normalised; reward_parts: the parts before weighting
    born_step       optimizer step at generation
    hinted          whether the prompt carried its hint when this was sampled
    ref_logprobs    (L,) float32 or None  nats, of the frozen reference, computed once: they never
                    change
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


# (born_step, order) is unique, so stored entries sort by age and two Entries are never compared
StoredEntry = namedtuple("StoredEntry", "born_step order entry")


def _gap(entry, mean_reward):
    """R - R̄(q), rounded: rewards that differ by float noise must tie."""
    return round(entry.reward - mean_reward, 6)


def _draw_weight(stored, mean_reward):
    """The draw weight of a prompt: how far its rewards reach, twice if to both sides.     [DRAW]"""
    gaps = [_gap(s.entry, mean_reward) for s in stored]
    above = max(max(gaps), 0.0)
    below = max(-min(gaps), 0.0)
    return (above + below) * (2 if above and below else 1)


def _most_informative(stored, mean_reward, num_off):
    """Half from each side of R̄(q), farthest first, then newest; the rest from either.     [DRAW]"""
    ranked = sorted(stored, reverse=True)  # newest first, and the next sort is stable
    ranked.sort(key=lambda s: -abs(_gap(s.entry, mean_reward)))
    below = [s for s in ranked if _gap(s.entry, mean_reward) < 0][: num_off // 2]
    above = [s for s in ranked if _gap(s.entry, mean_reward) > 0][: num_off // 2]
    rest = [s for s in ranked if s not in below + above]  # those at R̄ come last
    return [s.entry for s in (below + above + rest)[:num_off]]


class _Group(namedtuple("_Group", "draw_weight mean_reward stored")):
    """A prompt whose stored entries suffice for a group."""


def _quotas(num_groups, available, rng):
    """
    Groups per tier: the whole parts of 40/35/25 % of num_groups, and the remainder at random in
    proportion to the fractions, so that the expected shares are exact for any num_groups. A tier
    with too few groups passes its quota on to the others, again in proportion 40/35/25.

    available   list of 3 int   groups that each tier can give
    """
    share = np.array(list(TIER_PERCENT.values()))
    quota, rest = np.divmod(num_groups * share, 100)
    if rest.any():
        quota += rng.multinomial(rest.sum() // 100, rest / rest.sum())
    quota = np.minimum(quota, available)
    while quota.sum() < min(num_groups, sum(available)):
        open_share = share * (quota < available)
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
        self.capacity = capacity
        self.window = window
        self.tier_capacity = {
            tier: round(capacity * share / 100) for tier, share in TIER_PERCENT.items()
        }
        # the rounded shares must sum to the capacity
        self.tier_capacity["hard"] = (
            capacity - self.tier_capacity["medium"] - self.tier_capacity["easy"]
        )
        self._rewards = {}  # prompt_id -> deque of its last rewards, in order first seen
        self._means = {}  # prompt_id -> R̄
        self._stored = {}  # prompt_id -> [StoredEntry] in order of arrival
        self._num_arrived = 0
        self._tiers = None  # cache, dropped by observe

    def __len__(self):
        return sum(len(stored) for stored in self._stored.values())

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
            count = {tier: round(share * len(ranked) / 100) for tier, share in TIER_PERCENT.items()}
            count["medium"] = len(ranked) - count["hard"] - count["easy"]
            names = [tier for tier in TIER_PERCENT for _ in range(count[tier])]
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
        by_tier = {tier: [] for tier in TIER_PERCENT}
        for prompt_id, stored in self._stored.items():
            by_tier[self.tier(prompt_id)] += stored
        evicted = {}  # order -> prompt_id
        for tier, stored in by_tier.items():
            num_excess = len(stored) - self.tier_capacity[tier]
            if num_excess <= 0:
                continue
            spared = self._rare_successes(stored) if tier == "hard" else set()
            stored.sort(key=lambda s: (s.order in spared, s))  # the oldest first, the spared last
            evicted |= {s.order: s.entry.prompt_id for s in stored[:num_excess]}
        for prompt_id in set(evicted.values()):
            left = [s for s in self._stored[prompt_id] if s.order not in evicted]
            self._stored[prompt_id] = left
        self._stored = {prompt_id: stored for prompt_id, stored in self._stored.items() if stored}

    def _store(self, entry):
        stored = StoredEntry(entry.born_step, self._num_arrived, entry)
        self._stored.setdefault(entry.prompt_id, []).append(stored)
        self._num_arrived += 1

    def _rare_successes(self, stored):
        """
        [U5] Orders of the entries that eviction spares: for each prompt, hinted and plain apart, the
        best reward (newest of equals) if it beats R̄(q). At most half of the tier is spared, the newest
        first. Otherwise thousands of prompts with one success each would fill it, and none would have
        num_off entries to draw.
        """
        best = {}
        for s in sorted(stored, key=lambda s: (s.entry.reward, s)):
            best[s.entry.prompt_id, s.entry.hinted] = s  # the last one written is the best
        rare = []
        for (prompt_id, _), s in best.items():
            if _gap(s.entry, self._means.get(prompt_id, -math.inf)) > 0:
                rare.append(s)
        newest = sorted(rare, reverse=True)[: self.tier_capacity["hard"] // 2]
        return {s.order for s in newest}

    def forget(self, prompt_id):
        """Drop a prompt's entries: its clip can no longer be read. R̄(q) stays."""
        self._stored.pop(prompt_id, None)

    def entries_of(self, prompt_id, step):
        """The prompt's entries born before step, in order of arrival, hinted and plain alike."""
        return [s.entry for s in self._stored.get(prompt_id, []) if s.born_step < step]

    def draw(self, num_groups, num_off, step, rng):
        """
        40/35/25 % of the groups are of Hard, Medium, Easy prompts. In its tier, q has the weight
        max(s (u + v), 1 % of the largest)                                               [DRAW]
        u, v >= 0: how far the rewards of q reach above and below R̄(q); s = 2 if both do, else 1.
        Groups whose replayed advantages R - R̄(q) are two-sided and rarely zero.

        num_groups  int >= 0      groups wanted
        num_off     int >= 1      completions per group, of one prompt: it is then encoded once
        step        int           nothing born at or after it is drawn
        rng         numpy Generator
        returns     list of lists of num_off entries: no prompt twice; hinted and plain never
                    mixed, as their prompts differ; shorter when too little is stored
        raises      ValueError    num_groups or num_off out of range

        [U2] [U3] Of a drawn prompt, half the entries come from each side of R̄(q): farthest first,
        newest of equals.
        If both its hinted and its plain entries make a group, the more useful do. A prompt without an R̄
        has nothing to be measured against and is not drawn.
        """
        if num_groups < 0 or num_off < 1:
            raise ValueError(f"need num_groups >= 0, num_off >= 1, got {num_groups} and {num_off}")
        pools = {tier: [] for tier in TIER_PERCENT}  # of _Group, in the order of tiers()
        for prompt_id, tier in self.tiers().items():
            group = self._group_of(prompt_id, num_off, step)
            if group:
                pools[tier].append(group)
        drawn = []
        # a flat prompt replays advantages of 0: only in the places that the useful ones leave
        for is_useful in (True, False):
            parts = []
            for pool in pools.values():
                parts.append([group for group in pool if (group.draw_weight > 0) == is_useful])
            available = [len(part) for part in parts]
            quotas = _quotas(num_groups - len(drawn), available, rng)
            for part, quota in zip(parts, quotas):
                if quota == 0:
                    continue
                weights = np.array([group.draw_weight for group in part])
                floor = 0.01 * weights.max() if is_useful else 1.0  # flat: all alike
                weights = np.maximum(weights, floor)
                picks = rng.choice(len(part), quota, replace=False, p=weights / weights.sum())
                for i in picks:
                    drawn.append(_most_informative(part[i].stored, part[i].mean_reward, num_off))
        return drawn

    def _group_of(self, prompt_id, num_off, step):
        """The more useful of a prompt's plain and hinted entries, if num_off are stored, or None."""
        mean_reward = self._means[prompt_id]
        best = None
        for hinted in (False, True):
            stored = [
                s
                for s in self._stored.get(prompt_id, [])
                if s.born_step < step and s.entry.hinted == hinted
            ]
            if len(stored) < num_off:
                continue
            group = _Group(_draw_weight(stored, mean_reward), mean_reward, stored)
            if best is None or group.draw_weight > best.draw_weight:  # plain on a tie
                best = group
        return best

    def stats(self, step):
        """Metrics of the present content; 0 where there is nothing to average."""
        size = len(self)
        num_held = dict.fromkeys(TIER_PERCENT, 0)
        ages = []
        for prompt_id, stored in self._stored.items():
            num_held[self.tier(prompt_id)] += len(stored)
            ages += [step - s.born_step for s in stored]
        return {
            "buffer/size": size,
            "buffer/prompts": len(self._stored),
            **{f"buffer/frac_{tier}": num_held[tier] / max(size, 1) for tier in TIER_PERCENT},
            "buffer/staleness_mean": sum(ages) / max(size, 1),  # steps
            "buffer/mean_reward": sum(self._means.values()) / max(len(self._means), 1),
        }

    def state_dict(self):
        """Plain lists, numbers and four flat tensors: torch.load(weights_only=True) reads it."""
        stored = [s for prompt_stored in self._stored.values() for s in prompt_stored]
        entries = [s.entry for s in sorted(stored, key=lambda s: s.order)]
        ids = [entry.completion_ids for entry in entries]
        old = [entry.old_logprobs for entry in entries]
        ref = []
        for entry in entries:
            missing = torch.full_like(entry.old_logprobs, math.nan)
            ref.append(missing if entry.ref_logprobs is None else entry.ref_logprobs)
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
