"""
The head of the model: logits and log-probs in float32 from weights in any dtype, without the logits of
all tokens at one time. Torch only: copy this file freely.

n tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # tokens whose logits exist at one time: 0.6 GB in float32 at V = 152,064


class MatmulToFloat32(torch.autograd.Function):
    """hidden (n, D) @ weight (V, D).T -> (n, V) float32, on a GPU in bfloat16, in one kernel."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        grad_hidden = None
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = grad @ weight
        if ctx.needs_input_grad[1]:
            grad_weight = grad.T @ hidden
        return grad_hidden, grad_weight


def float32_logits(lm_head, hidden):
    """
    Logits of a linear layer without a bias, never rounded to less than float32: at logits of 16 or more
    the step of bfloat16 is 0.125, so that rollout and update would differ by whole steps.

    hidden   (n, D)
    returns  (n, V) float32, or float64
    """
    weight = lm_head.weight
    if weight.dtype in (torch.float32, torch.float64):
        return lm_head(hidden)
    if hidden.is_cuda:
        return MatmulToFloat32.apply(hidden, weight)
    return F.linear(hidden.float(), weight.float())  # a CPU has no such kernel


def head_logprobs(lm_head, hidden, targets, temperature):
    """
    hidden (n, D), targets (n,) -> log-probs (n,), entropy (n,) without gradient; both float32

    Computed in chunks, each again in the backward pass: (n, V) logits never exist as a whole.
    """

    def chunk_logprobs(hidden, targets):
        logits = float32_logits(lm_head, hidden)
        if temperature != 1:
            logits = logits / temperature
        logprobs = logits.log_softmax(-1)
        target_logprobs = logprobs.gather(-1, targets[:, None])[:, 0]
        # last, so that the backward pass stops before it and does not compute it again
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
        return target_logprobs, entropy

    if len(hidden) <= CHUNK:
        return chunk_logprobs(hidden, targets)
    logprobs = []
    entropies = []
    for hidden_chunk, target_chunk in zip(hidden.split(CHUNK), targets.split(CHUNK)):
        chunk, entropy = checkpoint(chunk_logprobs, hidden_chunk, target_chunk, use_reentrant=False)
        logprobs.append(chunk)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies)
