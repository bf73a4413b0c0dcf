"""
So that a GPU and Python do not wait for each other: a function of tensors as a CUDA graph, and numbers that
are read late.
"""

import warnings
from collections import deque

import torch

_no_graph = []  # why none could be recorded in this process, if so: it is not tried again


def capture(decode, inputs):
    """
    -> `decode`, on a GPU replayed as one CUDA graph: a token of the 7B model is some thousand small
    kernels, and Python takes longer to ask for them than the GPU to run them.
    """
    if not inputs[0].is_cuda or _no_graph:
        return decode
    inputs, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # back to it also after a failure
            # thread_local: other threads may use the GPU meanwhile (clips read ahead, NCCL)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = decode(*inputs)
    except RuntimeError as error:
        _no_graph.append(error)
        warnings.warn(f"no CUDA graph, so decoding is slower: {error}", stacklevel=2)
        return decode

    def replay(*given):
        for mine, new in zip(inputs, given):
            mine.copy_(new)
        graph.replay()
        return logits  # the next replay writes over them

    return replay


class DelayedScalar:
    """
    later(number, unknown): a number on a GPU as it was two calls ago, when it has long arrived: nobody
    waits. `unknown` before that. On a CPU the number itself.
    """

    def __init__(self):
        self.underway = deque()

    def __call__(self, number, unknown):
        if not number.is_cuda:
            return int(number)
        self.underway.append((number.to("cpu", non_blocking=True), torch.cuda.Event()))
        self.underway[-1][1].record()
        if len(self.underway) <= 2:
            return unknown
        number, arrived = self.underway.popleft()
        arrived.synchronize()
        return int(number)
