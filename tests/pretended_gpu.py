"""
A GPU for a machine that has none. The values lie on the CPU, and what a GPU refuses is refused:

- tensors of two devices in one operation;
- while a CUDA graph is captured: whatever waits for the GPU or copies from the CPU;
- to read in the host's memory what came there without a wait, other than by copying it back.

A captured graph has computed nothing. Its replay runs the kernels of the capture over the memory of
the capture, and refuses if a tensor of it is gone. Speed, memory, rounding, NCCL and FSDP's streams
are beyond it, and inside the backward pass nothing is checked: there, torch sees a CPU.
"""

import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from models import loading, policy
from run import processes
from training import hint_visits, micro_batches

aten, GPU = torch.ops.aten, torch.device("cuda", 0)
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}  # may have tensors of two devices
FLASH = aten._flash_attention_forward.default
FLASH_BACKWARD = aten._flash_attention_backward.default
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
plain_to, plain_module_to = torch.Tensor.to, torch.nn.Module.to


class GpuTensor(torch.Tensor):
    """`plain` holds the values; to Python this one is on a GPU."""

    device, is_cuda = GPU, True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain):
        like = torch.empty_strided(plain.shape, plain.stride(), dtype=plain.dtype, device="meta")
        kwargs = dict(dispatch_device=True, device_for_backend_keys=GPU)
        tensor = torch.Tensor._make_subclass(cls, like, False, **kwargs)
        tensor.plain, tensor.graph = plain, Graph.capturing
        return tensor

    def __init__(self, plain):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return operation(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None):
        return f"on a GPU: {self.plain}"

    def cpu(self):
        assert not Graph.capturing, "a copy to the CPU inside a capture"
        Graph.waits += 1
        return self.plain.clone()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("a tensor on a GPU is no array of numpy")


class Pretend(TorchDispatchMode):
    """Operations without a GpuTensor come here, such as torch.zeros(3, device="cuda")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return operation(func, args, kwargs or {})


def operation(func, args, kwargs):
    if func is torch.ops.prim.device.default:
        return torch.device("cpu")  # what C++ sees: autograd would ask a GPU's driver
    given = tensors(args, kwargs)
    there = any(map(on_gpu, given)) or torch.device(kwargs.get("device") or "cpu").type == "cuda"
    if func in INDEXED:
        there = on_gpu(args[0])
    in_backward = torch._C._current_graph_task_id() != -1
    if func not in COPIES and not in_backward and foreign(func, args, given, there):
        shapes = [(tuple(x.shape), x.device.type) for x in given]
        raise RuntimeError(f"{func}: tensors of two devices: {shapes}")
    if not there and func not in COPIES and any(getattr(x, "on_its_way", False) for x in given):
        raise RuntimeError(f"{func} reads what the GPU may not have written yet")
    values, settings = tree_map(lambda x: x.plain if on_gpu(x) else x, (args, kwargs))
    if settings.pop("pin_memory", False):
        return func(*values, **settings)  # in the host's memory, whatever it is like
    if func is aten.copy_.default and there and not on_gpu(args[0]):
        assert not Graph.capturing, "a copy to the CPU inside a capture"
        args[0].on_its_way = len(args) > 2 and args[2]  # non_blocking
        return func(*values, **settings)
    if there and "device" in settings:
        settings = settings | dict(device=torch.device("cpu"))
    imitated = {
        aten.bmm.dtype: bmm_to,
        aten.mm.dtype: mm_to,
        FLASH: flash,
        FLASH_BACKWARD: flash_backward,
        aten._fused_rms_norm_backward.default: rms_norm_backward,
    }
    kernel = imitated.get(func, func)
    Graph.waits += there and func in WAITS
    if Graph.capturing and there:
        out = Graph.capturing.add(func, kernel, given, values, settings)
    else:
        out = kernel(*values, **settings)
    if not there or func in WAITS and not isinstance(out, torch.Tensor):
        return out
    same = {id(x.plain): x for x in given if on_gpu(x)}  # in place: the tensor that was given
    wrap = lambda x: same[id(x)] if id(x) in same else GpuTensor(x)  # noqa: E731
    return tree_map(lambda x: wrap(x) if isinstance(x, torch.Tensor) else x, out)


def foreign(func, args, given, there):
    """Of the tensors given, those that are on the other device and may not be."""
    if not there:
        return [x for x in given if on_gpu(x)]
    indices = tensors(args[1]) if func in INDEXED else []  # may come from the CPU, as a number may
    return [x for x in given if not on_gpu(x) and x.dim() and not any(x is i for i in indices)]


def on_gpu(x):
    return isinstance(x, GpuTensor)


def tensors(*trees):
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


def bmm_to(a, b, dtype):
    """bmm with another dtype of the result, which the CPU lacks."""
    assert a.dtype == b.dtype != dtype
    return torch.bmm(a.to(dtype), b.to(dtype))


def mm_to(a, b, dtype):
    """mm with another dtype of the result, which the CPU lacks."""
    assert a.dtype == b.dtype != dtype
    return a.to(dtype) @ b.to(dtype)


def rms_norm_backward(grad, x, shape, rstd, weight, mask):
    """Gradients of x and weight of y = x rstd weight, rstd = (mean of x^2 + eps)^-1/2, over one axis."""
    assert len(shape) == 1
    scaled = grad * weight
    grad_x = rstd * scaled - x * rstd**3 * (scaled * x).mean(-1, keepdim=True)
    grad_weight = (grad * x * rstd).flatten(0, -2).sum(0)
    return grad_x if mask[0] else None, grad_weight if mask[1] else None


def flash(
    q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal, debug, scale, seqused_k=None
):
    """FlashAttention of packed sequences, by the CPU's kernel, a sequence at a time."""
    outs, lses = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for i, (own, keys) in enumerate(sequences(ends_q, ends_k, longest_q, longest_k)):
        if seqused_k is not None:
            assert seqused_k.dtype == torch.int32 and 0 < seqused_k[i] <= keys.stop - keys.start
            keys = slice(keys.start, keys.start + int(seqused_k[i]))
        qkv = (heads_first(x) for x in (q[own], k[keys], v[keys]))
        run = aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = run(*qkv, dropout, causal and is_square(own, keys), scale=scale)
        outs[own], lses[:, own] = out[0].transpose(0, 1), lse[0]
    return outs, lses, *(torch.zeros(2) for _ in range(3))


def flash_backward(
    grad,
    q,
    k,
    v,
    out,
    lse,
    ends_q,
    ends_k,
    longest_q,
    longest_k,
    dropout,
    causal,
    seed,
    unused,
    scale,
):
    assert lse.is_contiguous() and grad.stride(-1) == 1
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for own, keys in sequences(ends_q, ends_k, longest_q, longest_k):
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            heads_first(grad[own]),
            heads_first(q[own]),
            heads_first(k[keys]),
            heads_first(v[keys]),
            heads_first(out[own]),
            lse[None, :, own],
            dropout,
            causal and is_square(own, keys),
            scale=scale,
        )
        for x, where, part in zip(grads, (own, keys, keys), parts):
            x[where] += part[0].transpose(0, 1)
    return tuple(grads)


def heads_first(x):
    """(T, H, D) -> (1, H, T, D)"""
    return x[None].transpose(1, 2)


def is_square(own, keys):
    """A GPU's causal mask is aligned at its end: one query sees all keys. Others are not imitated."""
    num_queries, num_keys = own.stop - own.start, keys.stop - keys.start
    assert num_queries in (1, num_keys)
    return num_queries == num_keys


def sequences(ends_q, ends_k, longest_q, longest_k):
    """-> slices of the queries and keys of each sequence."""
    assert ends_q.dtype == ends_k.dtype == torch.int32 and len(ends_q) == len(ends_k)
    for ends, longest in ((ends_q, longest_q), (ends_k, longest_k)):
        assert 0 < ends.diff().min() and ends.diff().max() <= longest
    pairs = [list(map(slice, e.tolist()[:-1], e.tolist()[1:])) for e in (ends_q, ends_k)]
    return list(zip(*pairs))


class Event:
    """In the place of torch.cuda.Event."""

    def record(self):
        pass

    synchronize = record


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    capturing, made, replays, waits = None, 0, 0, 0

    def __init__(self):
        self.kernels, self.needed = [], []

    def add(self, func, kernel, given, values, settings):
        """-> what the kernel will write; NaN for now, as the memory of a capture is anything."""
        if func in WAITS or any(x.dtype == torch.bool for x in given) and func in INDEXED:
            raise RuntimeError(f"{func} waits for the GPU inside a capture")
        if not all(map(on_gpu, given)) or not given and func in COPIES:
            raise RuntimeError(f"{func} copies from the CPU inside a capture")
        self.needed += [weakref.ref(x) for x in given if x.graph is not self]
        if func not in (aten.bmm.dtype, aten.mm.dtype) and func._schema.is_mutable:
            self.kernels.append((kernel, values, settings, []))
            return settings.get("out", values[0])
        out = kernel(*values, **settings)
        old = {x.untyped_storage().data_ptr() for x in tensors(values, settings)}
        if not any(x.untyped_storage().data_ptr() in old for x in tensors(out)):  # else a view
            self.kernels.append((kernel, values, settings, tensors(out)))
            for x in tensors(out):
                x.fill_(torch.nan if x.is_floating_point() else 0)
        return out

    def replay(self):
        assert all(ref() is not None for ref in self.needed), "the graph reads what has been freed"
        Graph.replays += 1
        for kernel, values, settings, out in self.kernels:
            for x, new in zip(out, tensors(kernel(*values, **settings))):
                x.copy_(new)


@contextmanager
def capture(graph, **_):
    """In the place of torch.cuda.graph."""
    Graph.capturing, Graph.made = graph, Graph.made + 1
    try:
        yield
    finally:
        Graph.capturing = None


def to(self, *args, **kwargs):
    if args and on_gpu(args[0]):
        args = GPU, args[0].dtype, *args[1:]
    target = kwargs.pop("device", None)
    if args and isinstance(args[0], str | torch.device):
        target, *args = args
    if on_gpu(self):
        if target and torch.device(target).type == "cpu":  # non_blocking: nobody waits
            self = self.plain.clone() if kwargs.pop("non_blocking", False) else self.cpu()
    elif target:
        args = target, *args
    return plain_to(self, *args, **kwargs) if args or kwargs else self


def module_to(self, device):
    if torch.device(device).type != "cuda":
        return plain_module_to(self, device)
    there = {}  # one tensor may have two names
    for module in self.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in there:
                there[p] = torch.nn.Parameter(GpuTensor(p.detach().clone()), p.requires_grad)
            module._parameters[name] = there.get(p)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else GpuTensor(buffer.clone())
    return self


def pad_sequence(sequences, batch_first=False, padding_value=0.0):
    """The one function that asks a tensor for its device in C++."""
    assert batch_first and padding_value == 0
    room = max(map(len, sequences))
    ends = [[0, 0] * (x.dim() - 1) + [0, room - len(x)] for x in sequences]
    return torch.stack([F.pad(x, end) for x, end in zip(sequences, ends)])


@contextmanager
def pretended_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "pretended GPU")
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", nullcontext)
        patch.setattr(torch.cuda, "current_stream", lambda: None)
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.nn.Module, "to", module_to)
        for place in (policy, micro_batches, hint_visits, torch.nn.utils.rnn):
            patch.setattr(place, "pad_sequence", pad_sequence)
        patch.setattr(processes, "init", lambda device: GPU)
        # computes in float32, so that results compare with a CPU's, with the kernels of bfloat16
        patch.setattr(processes, "compute_dtype", lambda device, dtype: torch.float32)
        patch.setattr(loading, "set_attention_kernel", lambda name, device, dtype: "flash")
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([1], device="cuda"): by a copy
        Graph.made = Graph.replays = Graph.waits = 0
        try:
            with Pretend():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
