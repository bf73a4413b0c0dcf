"""
Keeps the host and the GPU from waiting for each other: a function of tensors as a CUDA graph, and
numbers that are read late.
"""

import warnings
from collections import deque

import torch

_capture_errors = []  # why no graph could be recorded in this process: it is not tried again


def capture(decode, inputs):
    """
    `decode`, on a GPU as a CUDA graph that is replayed: a token of the 7B model is some thousand small
    kernels, and Python takes longer to launch them than the GPU takes to run them.

    decode   callable(*inputs) -> tensor; all it reads beside inputs must keep its address
    inputs   tuple of tensors
    returns  callable(*inputs) -> tensor, overwritten by the next call; `decode` itself on a CPU
    """
    if not inputs[0].is_cuda or _capture_errors:
        return decode
    graph_inputs = [x.clone() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    try:
        # brings the current stream back also after a failed capture
        with torch.cuda.stream(torch.cuda.current_stream()):
            # thread_local: other threads may use the GPU meanwhile (clips read ahead, NCCL)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = decode(*graph_inputs)
    except torch.OutOfMemoryError:
        return decode  # no room for this one; after the next growth or removal of rows there may be
    except RuntimeError as error:
        _capture_errors.append(error)
        warnings.warn(f"no CUDA graph, so decoding is slower: {error}", stacklevel=2)
        return decode

    def replay(*new_inputs):
        for old, new in zip(graph_inputs, new_inputs):
            old.copy_(new)
        graph.replay()
        return output

    return replay


class DelayedScalar:
    """
    scalar(number, default): reads numbers from a GPU two calls late, when they have long arrived, so
    that the host does not wait. Before that, `default`. On a CPU the number itself.
    """

    def __init__(self):
        self.in_flight = deque()  # (number in the host's memory, event after its copy)

    def __call__(self, number, default):
        if not number.is_cuda:
            return int(number)
        arrived = torch.cuda.Event()
        self.in_flight.append((number.to("cpu", non_blocking=True), arrived))
        arrived.record()
        if len(self.in_flight) <= 2:
            return default
        number, arrived = self.in_flight.popleft()
        arrived.synchronize()
        return int(number)
