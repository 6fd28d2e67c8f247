"""What all operators share: tensors as NumPy arrays, questions about a call, registration.

Functions and modules call a family's `run`. It goes through the operator where something listens to
operators (`heard`: a compiler, a tracer, a mode), and else past the dispatcher.
"""

from ctypes import c_char

import numpy as np
import torch
from torch import _C, Tensor
from torch.autograd import Function, forward_ad

from fastseq._attend import memory_of

FLOATS = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def unsupported(operation, name, tensor):
    """The error for a tensor that the CPU kernels do not take."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TypeError(
        f"{operation}: {name} must be float32 or float64 on the CPU, got {dtype} on {tensor.device}"
    )


def array(tensor):
    """A NumPy view of the tensor, or None."""
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise ValueError(f"fastseq: expected all tensors on the CPU, got one on {tensor.device}")
    return tensor.numpy(force=True) if tensor.requires_grad else tensor.numpy()


def on_gpu(tensor):
    """Whether the GPU kernels take the tensor."""
    return tensor.is_cuda


def tensor_of(found):
    """A tensor over the array's memory, or None."""
    return None if found is None else torch.from_numpy(found)


def borrow(cell, weights):
    """Views of the weights' memory, valid until a weight is moved or freed.

    `Tensor.numpy` would forbid the storage to be resized, which is how FSDP frees parameters.
    """
    for w in weights:
        if w.dtype not in FLOATS or not w.is_cpu:
            raise unsupported(cell, "every weight", w)
    return [_memory(w) for w in weights]


def _memory(tensor):
    strides, n_bytes = None, tensor.nbytes
    if not tensor.is_contiguous():
        strides = [stride * tensor.itemsize for stride in tensor.stride()]
        last = sum(s * (n - 1) for s, n in zip(strides, tensor.shape, strict=True))
        n_bytes = last + tensor.itemsize if n_bytes else 0
    block = (c_char * n_bytes).from_address(tensor.data_ptr())
    return np.ndarray(tensor.shape, FLOATS[tensor.dtype], block, 0, strides)


def or_empty(tensor, like):
    """The tensor, or for None one of no elements: operators return no None."""
    return like.new_empty(0) if tensor is None else tensor


def differentiated(tensors):
    """Whether autograd would record a function of these tensors, any of them None."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def heard(tensors):
    """Whether a compiler, tracer, mode, transform or tensor subclass would see an operator."""
    return listening() or not _PLAIN.issuperset(map(type, tensors)) or tensors[0].is_meta


def listening():
    """Whether a compiler, tracer, mode or transform would see one, whatever its tensors."""
    return (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack() > 0
        or _C._functorch.peek_interpreter_stack() is not None
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def recorded(*args):
    """Whether autograd has to see the call. In forward mode it has to, in order to refuse it."""
    in_reverse_mode = torch.is_grad_enabled() and _C._any_requires_grad(*args)
    return in_reverse_mode or forward_ad._current_level >= 0


def like(a, columns):
    """What `_attend.like` makes of the array: its shape and order of axes, but for the last."""
    copied = a.stride(-1) != 1 and not a.is_contiguous()
    if copied:
        return a.new_empty((*a.shape[:-1], columns))
    made, axes = memory_of(a.shape, a.stride(), columns)
    return a.new_empty(made).permute(axes)


class OnceDifferentiable(Function):
    """A backward operator under autograd: it runs, and refuses to be differentiated.

    Returns the operator's tensors, those of a list one by one.
    """

    @staticmethod
    def forward(ctx, operator, args, *tensors):
        ctx.name = operator.name()
        with _C._AutoDispatchBelowAutograd():
            found = operator(*args)
        return tuple(t for part in found for t in (part if isinstance(part, list) else (part,)))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name}: second derivatives are not implemented")


_LIBRARY = torch.library.Library("fastseq", "DEF")  # the operators live as long as it does


def register(name, schema, cpu, autograd, fake, cuda=None):
    """Define torch.ops.fastseq.<name> and return it."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"fastseq::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastseq, name).default
