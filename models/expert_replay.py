"""
The update takes the experts that the rollout took (R3, arXiv:2510.11370).

A rollout decodes a token at a time and the update reads packed rows: in bfloat16 their sums differ in the
last bits, and where two experts are about as likely, so does the choice between them. The log-prob of
such a token then jumps. With --replay-experts the rollout remembers the choice for every token of a
completion, and the update takes it; how much each chosen expert counts is computed anew, with its gradient.
Tokens of prompts, and completions drawn from the buffer, choose freely. Torch only.

T tokens of a completion, J layers with experts, k experts of a token.
"""

from contextlib import contextmanager
from types import MethodType

import torch


class ExpertReplay:
    """
    What the routers of one policy have chosen, or have to choose.

    routers  list of J modules, in the order of the layers
    route    callable(router, hidden, choose) -> what the router's own forward returns, with
             choose(indices) in the place of indices (tokens, k)
    """

    def __init__(self, routers, route):
        self.choices = {}  # (prompt, completion) -> (T - 1, J, k) uint8, of the last rollout
        # list of (tokens, k), one for each layer that ran; None: not recording
        self.recorded = None
        self.imposed = None  # (tokens, J, k) int64 of the last tokens of a packed row; -1: free
        self.is_paused = False
        self.num_layers = len(routers)
        self.num_chosen = routers[0].top_k
        for layer, router in enumerate(routers):
            router.forward = MethodType(self.forward_of(layer, route), router)

    def forward_of(self, layer, route):
        def forward(router, hidden):
            return route(router, hidden, lambda indices: self.choose(layer, indices))

        return forward

    def choose(self, layer, indices):
        """What one layer's router wants, (tokens, k), -> what it takes."""
        if self.imposed is not None:
            imposed = self.imposed[:, layer]
            free = len(indices) - len(imposed)  # tokens of prompts stand first
            taken = torch.where(imposed >= 0, imposed, indices[free:])
            indices = torch.cat([indices[:free], taken])
        if self.recorded is not None:
            self.recorded.append(indices)
        return indices

    # ---- rollout

    @contextmanager
    def recording(self):
        """Collects what the routers take while one token of every row is read -> list of (rows, k)"""
        self.recorded = []
        try:
            yield self.recorded
        finally:
            self.recorded = None

    def remember(self, prompts, groups):
        """Keeps the choices of a rollout's completions, and forgets those of the last one."""
        self.choices = {}
        for prompt, group in zip(prompts, groups):
            for completion in group:
                self.choices[self.key(prompt, completion.ids)] = completion.experts

    def key(self, prompt, ids):
        return prompt.input_ids.numpy().tobytes(), ids.long().numpy().tobytes()

    # ---- update

    @contextmanager
    def paused(self):
        """The reference policy chooses freely: its log-probs are stored, whatever a rollout did."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def release(self):
        """From here on all tokens choose freely."""
        self.imposed = None

    def impose(self, prompts, completions, device):
        """
        From here on, until the next call, the completions' tokens take the rollout's experts: also when
        the backward pass computes a layer once more.

        prompts, completions  as completion_logprobs has them
        """
        self.release()
        if self.is_paused or not self.choices:
            return
        rows = []
        for prompt, group in zip(prompts, completions):
            for ids in group:
                size = max(len(ids) - 1, 1)  # tokens that are read: the last predicts nothing
                free = torch.full((size, self.num_layers, self.num_chosen), -1)
                choice = self.choices.get(self.key(prompt, ids))
                # a completion of one token: the rollout never read that token
                rows.append(free if choice is None or len(ids) < 2 else choice.long())
        self.imposed = torch.cat(rows).to(device)
