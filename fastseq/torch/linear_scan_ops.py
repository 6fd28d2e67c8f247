"""The operator torch.ops.fastseq.linear_scan, its backward, and `run`.

`run` is what functions and modules call; as in `ops`, it goes past the dispatcher where nothing
listens. Both ways end in `fastseq._linear_scan`, the entry point of the NumPy function, or for CUDA
tensors in `linear_scan_cuda`.
"""

import torch
from torch import _C
from torch.autograd import Function

from fastseq import _linear_scan
from fastseq.torch import linear_scan_cuda
from fastseq.torch._tensors import (
    FLOATS,
    OnceDifferentiable,
    array,
    differentiated,
    heard,
    on_gpu,
    recorded,
    register,
    tensor_of,
    unsupported,
)

_OP = "linear_scan"
_SCHEMA = (
    "(Tensor a, Tensor b, Tensor? h0, Tensor? lengths, Tensor? resets, bool reverse)"
    " -> (Tensor h, Tensor h_n)"
)
_BWD_SCHEMA = (
    "(Tensor a, Tensor? h0, Tensor? lengths, Tensor? resets, Tensor h, Tensor? dh, Tensor? dh_n,"
    " bool reverse) -> (Tensor da, Tensor db, Tensor dh0)"
)


def run(a, b, h0, lengths, resets, reverse):
    """`_linear_scan.forward` over tensors, with gradients for a, b and h0."""
    if not on_gpu(a) and (a.dtype not in FLOATS or not (a.is_cpu or a.is_meta)):
        raise unsupported(_OP, "a", a)
    inputs = (a, b, h0, lengths, resets)
    if heard(inputs):
        return _OPERATOR(*inputs, reverse)
    if differentiated(inputs[:3]):
        return _LinearScan.apply(False, *inputs, reverse)
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"fastseq::{_OP}"):
            return _kernel(*inputs, reverse)
    return _kernel(*inputs, reverse)


def _kernel(*args):
    if on_gpu(args[0]):
        return linear_scan_cuda.forward(_OP, *args)
    *tensors, reverse = args
    return tuple(map(tensor_of, _linear_scan.forward(_OP, *map(array, tensors), reverse)))


def _kernel_bwd(*args):
    if on_gpu(args[0]):
        return linear_scan_cuda.backward(_OP, *args)
    *tensors, reverse = args
    return tuple(map(tensor_of, _linear_scan.backward(_OP, *map(array, tensors), reverse)))


class _LinearScan(Function):
    """Autograd, around the operator if `by_operator`, else around the kernels."""

    @staticmethod
    def forward(ctx, by_operator, a, b, h0, lengths, resets, reverse):
        ctx.reverse = reverse
        ctx.set_materialize_grads(False)
        args = (a, b, h0, lengths, resets, reverse)
        if by_operator:
            with _C._AutoDispatchBelowAutograd():
                h, h_n = _OPERATOR(*args)
        else:
            h, h_n = _kernel(*args)
        ctx.save_for_backward(a, h0, lengths, resets, h)
        return h, h_n

    @staticmethod
    def backward(ctx, dh, dh_n):
        args = (*ctx.saved_tensors, dh, dh_n)
        listened = torch.is_grad_enabled() or heard(args)
        grads = (_BWD_OPERATOR if listened else _kernel_bwd)(*args, ctx.reverse)
        found = (g if n else None for g, n in zip(grads, ctx.needs_input_grad[1:4], strict=True))
        return None, *found, None, None, None


def _fake(a, *_):
    return a.new_empty(a.shape), a.new_empty(a.shape[1:])


def _fake_bwd(a, *_):
    return a.new_empty(a.shape), a.new_empty(a.shape), a.new_empty(a.shape[1:])


def _autograd(*args):
    if recorded(*args[:5]):
        return _LinearScan.apply(True, *args)
    with _C._AutoDispatchBelowAutograd():
        return _OPERATOR(*args)


def _autograd_bwd(*args):
    if recorded(*args[:7]):
        return OnceDifferentiable.apply(_BWD_OPERATOR, args, *args[:7])
    with _C._AutoDispatchBelowAutograd():
        return _BWD_OPERATOR(*args)


_OPERATOR = register(_OP, _SCHEMA, _kernel, _autograd, _fake, _kernel)
_BWD_OPERATOR = register(
    f"{_OP}_bwd", _BWD_SCHEMA, _kernel_bwd, _autograd_bwd, _fake_bwd, _kernel_bwd
)
