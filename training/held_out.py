"""
Accuracy on held-out rows during training: sampled as in training, on all ranks.
"""

import rewards
from data.clip_cache import ClipCache
from data.clips import BadRow
from data.rows import Rows, answer_spec
from models.rollout import rollout
from run import processes
from run.packing import pack_sizes

# held-out prompts that are read together on each rank, and their tokens that are decoded together
MAX_PROMPTS, MAX_TOKENS = 32, 131072


class HeldOut:
    """
    file            JSONL of held-out rows
    policy          Policy
    builder         InputBuilder
    cache_bytes     int      for their clips
    encoder         as ClipCache has it: Policy or None
    num_samples     int      completions, about: as many of each row
    temperature, max_new_tokens, micro_tokens, prompts_at_once    as rollout has them
    seed            int
    """

    def __init__(
        self,
        file,
        policy,
        builder,
        *,
        cache_bytes,
        encoder,
        num_samples,
        temperature,
        max_new_tokens,
        micro_tokens,
        prompts_at_once,
        seed,
    ):
        self.rows = Rows(file)
        self.policy = policy
        self.builder = builder
        self.clip_cache = ClipCache(builder.at(self.rows.path.parent), cache_bytes, encoder)
        self.num_rows = min(len(self.rows), num_samples)
        self.per_row = max(1, round(num_samples / self.num_rows))
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.micro_tokens = micro_tokens
        self.prompts_at_once = prompts_at_once
        self.seed = seed

    def accuracy(self):
        """
        Share of correct answers among all sampled completions. A row whose clip cannot be read is
        named, and its completions count as wrong.
        """
        num_correct = 0
        problems = {}
        for first in range(0, self.num_rows, MAX_PROMPTS * processes.world_size()):
            end = min(first + MAX_PROMPTS * processes.world_size(), self.num_rows)
            items, failed = [], {}
            for i in range(first + processes.rank(), end, processes.world_size()):
                try:
                    row = self.rows[i]
                    items.append((i, row, self.clip_cache.get(row)))
                except BadRow as problem:
                    failed[i] = str(problem)
            problems |= processes.all_gather_dict(failed)
            sizes = [len(prompt.input_ids) for _, _, prompt in items]
            packs = [[items[k] for k in pack] for pack in pack_sizes(sizes, MAX_TOKENS)]
            dummy = [(0, None, self.builder.filler)]
            for pack, is_real in processes.even_rounds(packs, dummy):
                num_correct += self._count_correct(pack, is_real)
        for problem in problems.values():
            processes.print0(f"held-out, counted as wrong: {problem}")
        total = sum(processes.all_gather_object(num_correct))
        return total / (self.num_rows * self.per_row)

    def _count_correct(self, pack, is_real):
        """pack: list of (index, row, Prompt) -> number of correct answers among its completions"""
        groups = rollout(
            self.policy,
            [prompt for _, _, prompt in pack],
            [self.per_row if is_real else 1 for _ in pack],
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            eos_ids=self.builder.eos_ids,
            micro_tokens=self.micro_tokens,
            prompts_at_once=self.prompts_at_once,
            seeds=[processes.seed(self.seed, 0, i) if is_real else 0 for i, _, _ in pack],
        )
        if not is_real:
            return 0
        num_correct = 0
        for (_, row, _), group in zip(pack, groups):
            for text in self.builder.texts(group):
                answer = rewards.parse_answer(text)
                num_correct += rewards.accuracy_reward(answer, *answer_spec(row)) == 1
        return num_correct
