"""
A function of tensors as a CUDA graph.
"""

import warnings

import torch

_no_graph = []  # why none could be recorded in this process, if so: it is not tried again


def record(decode, inputs):
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
