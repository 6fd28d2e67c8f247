"""Operators torch.ops.fastseq.{attention, attention_varlen}, their backwards, and `run`.

The two differ in their tensors beside q, k, v (`TENSORS`); the numbers after them are the same
(`NUMBERS`). `run` is what functions and modules call; as in `ops`, it goes past the dispatcher
where nothing listens. Both ways end in `fastseq._attend`, the entry point of the NumPy functions,
for calls of q, k and v alone in `attention_plain`, or for CUDA tensors in `attention_cuda`.
"""

from functools import partial

import torch
from torch import _C, Tensor, from_numpy
from torch.autograd import Function

from fastseq import _attend
from fastseq._attend import Options
from fastseq.score_mods import SCORE_MODS
from fastseq.torch import attention_cuda, attention_plain
from fastseq.torch._tensors import (
    FLOATS,
    OnceDifferentiable,
    array,
    differentiated,
    heard,
    like,
    listening,
    on_gpu,
    or_empty,
    recorded,
    register,
    tensor_of,
    unsupported,
)

TENSORS = {
    "attention": {
        "bias": "Tensor?",
        "mask": "Tensor?",
        "q_lengths": "Tensor?",
        "kv_lengths": "Tensor?",
        "alibi_slopes": "Tensor?",
        "seed": "Tensor?",
    },
    "attention_varlen": {
        "cu_seqlens_q": "Tensor",
        "cu_seqlens_k": "Tensor",
        "alibi_slopes": "Tensor?",
        "seed": "Tensor?",
    },
}
NUMBERS = {
    "causal": "str?",  # None, "top_left" or "bottom_right"
    "left": "SymInt?",
    "right": "SymInt?",
    "scale": "float?",
    "softcap": "float?",
    "dropout_p": "float",
    "score_mod": "str?",  # a key of SCORE_MODS
}


def run(op, q, k, v, tensors, numbers):
    """`_attend.forward` over tensors, with gradients for q, k, v and bias.

    Args:
        tensors: in the order of TENSORS[op].
        numbers: in the order of NUMBERS.

    Returns:
        o, lse.
    """
    if not on_gpu(q) and (q.dtype not in FLOATS or not (q.is_cpu or q.is_meta)):
        raise unsupported(op, "q", q)
    inputs = (q, k, v, *tensors)
    if heard(inputs):
        return _OPERATORS[op](*inputs, *numbers)
    if differentiated(inputs):
        return _Attention.apply(op, False, numbers, *inputs)
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"fastseq::{op}"):
            return _forward(op, inputs, numbers)
    return _forward(op, inputs, numbers)


def infer(q, k, v, kv_lengths, causal, window, scale, softcap):
    """o of `run`, in two thirds of its time for a small call; None: `run` has to be asked.

    For tensors on the CPU, without gradients, where nothing listens.
    """
    if not (type(q) is type(k) is type(v) is Tensor and type(kv_lengths) in _OPTIONAL):
        return None
    if on_gpu(q) or listening() or differentiated((q, k, v)) or _C._autograd._profiler_enabled():
        return None
    if type(causal) not in (bool, str):
        return None
    if window is not None and (type(window) is not tuple or len(window) != 2):
        return None
    left, right = window or (None, None)
    numbers = (causal, left, right, scale, softcap)
    found = attention_plain.addressed(q, k, v, kv_lengths, *numbers)
    if found is None:
        return None
    call, at = found
    return from_numpy(call.forward(at, with_lse=False)[0])


def _options(op, tensors, numbers):
    causal, left, right, scale, softcap, dropout_p, score_mod = numbers
    given = Options(
        causal=causal or False,
        window=(left, right),
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        score_mod=None if score_mod is None else SCORE_MODS[score_mod],
    )
    for name, tensor in zip(TENSORS[op], tensors, strict=True):
        if tensor is not None:
            setattr(given, name, tensor.item() if name == "seed" else array(tensor))
    return given


def _by_name(op, inputs):
    return dict(zip(("q", "k", "v", *TENSORS[op]), inputs, strict=True))


def _forward(op, inputs, numbers):
    """The kernels on tensors: o, lse."""
    if on_gpu(inputs[0]):
        return attention_cuda.forward(op, _by_name(op, inputs), numbers)
    found = attention_plain.forward(inputs, numbers) if op == "attention" else None
    if found is None:
        q, k, v = map(array, inputs[:3])
        found = _attend.forward(op, q, k, v, _options(op, inputs[3:], numbers))
    o, lse = found
    return from_numpy(o), from_numpy(lse)


def _backward(op, inputs, results, numbers, needs_bias):
    """The kernels on tensors: dq, dk, dv, dbias or None; results: o, lse, do, dlse."""
    if on_gpu(inputs[0]):
        named = _by_name(op, inputs)
        return attention_cuda.backward(op, named, numbers, *results, needs_bias=needs_bias)
    found = attention_plain.backward(inputs, results, numbers) if op == "attention" else None
    if found is not None:
        return *map(from_numpy, found), None
    q, k, v = map(array, inputs[:3])
    options = _options(op, inputs[3:], numbers)
    grads = _attend.backward(op, q, k, v, options, *map(array, results), needs_bias=needs_bias)
    return tuple(map(tensor_of, grads))


class _Attention(Function):
    """Autograd of both, around the operator if `by_operator`, else around the kernels."""

    @staticmethod
    def forward(ctx, op, by_operator, numbers, *inputs):
        _refuse_gradients(op, ctx.needs_input_grad[3:])
        ctx.op, ctx.numbers = op, numbers
        ctx.set_materialize_grads(False)
        if by_operator:
            with _C._AutoDispatchBelowAutograd():
                o, lse = _OPERATORS[op](*inputs, *numbers)
        else:
            o, lse = _forward(op, inputs, numbers)
        ctx.save_for_backward(*inputs, o, lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        *inputs, o, lse = ctx.saved_tensors
        op, needs = ctx.op, ctx.needs_input_grad[3:7]
        results = (o, lse, do, dlse)
        needs_bias = op == "attention" and needs[3]
        if torch.is_grad_enabled() or heard((*inputs, *results)):
            grads = _BWD_OPERATORS[op](*inputs, *results, *ctx.numbers, needs_bias)
        else:
            grads = _backward(op, inputs, results, ctx.numbers, needs_bias)
        found = (g if n else None for g, n in zip(grads, needs, strict=True))
        return None, None, None, *found, *(None,) * (len(inputs) - 4)


def _refuse_gradients(op, needs):
    """The one tensor beside q, k, v and bias that could ask for a gradient is alibi_slopes."""
    wanted = zip(("q", "k", "v", *TENSORS[op]), needs, strict=True)
    if any(need for name, need in wanted if name == "alibi_slopes"):
        raise RuntimeError(f"{op}: alibi_slopes have no gradient; detach them, or give a bias")


def _kernel(op, *args):
    n = 3 + len(TENSORS[op])
    return _forward(op, args[:n], args[n:])


def _kernel_bwd(op, *args):
    n = 3 + len(TENSORS[op])
    grads = _backward(op, args[:n], args[n : n + 4], args[n + 4 : -1], args[-1])
    return tuple(or_empty(g, args[0]) for g in grads)


def _fake(op, q, k, v, *_):
    packed = op != "attention"
    rows = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    lse = q.new_empty(rows, dtype=torch.promote_types(q.dtype, torch.float32))
    return _like(q, v.shape[-1], packed), lse.t() if packed else lse


def _fake_bwd(op, q, k, v, bias, *rest):
    packed, needs_bias = op != "attention", rest[-1]
    dbias = q.new_empty(bias.shape if needs_bias else 0)
    return *(_like(a, a.shape[-1], packed) for a in (q, k, v)), dbias


def _like(a, columns, packed):
    """Rows stand before heads in packed arrays, and after them in the kernels'."""
    return like(a.transpose(0, 1), columns).transpose(0, 1) if packed else like(a, columns)


def _autograd(op, *args):
    n = 3 + len(TENSORS[op])
    if recorded(*args[:n]):
        return _Attention.apply(op, True, args[n:], *args[:n])
    with _C._AutoDispatchBelowAutograd():
        return _OPERATORS[op](*args)


def _autograd_bwd(op, *args):
    operator, n = _BWD_OPERATORS[op], 3 + len(TENSORS[op]) + 4
    if recorded(*args[:n]):
        return OnceDifferentiable.apply(operator, args, *args[:n])
    with _C._AutoDispatchBelowAutograd():
        return operator(*args)


def _schema(op, between="", after="", returns="Tensor o, Tensor lse"):
    def listed(arguments):
        return "".join(f", {kind} {name}" for name, kind in arguments.items())

    given = listed(TENSORS[op]) + between + listed(NUMBERS) + after
    return f"(Tensor q, Tensor k, Tensor v{given}) -> ({returns})"


_RESULTS = ", Tensor o, Tensor lse, Tensor? do, Tensor? dlse"
_GRADS = "Tensor dq, Tensor dk, Tensor dv, Tensor dbias"
_OPTIONAL = (Tensor, type(None))
_OPERATORS = {}
_BWD_OPERATORS = {}

for _op in TENSORS:
    _fwd = (partial(f, _op) for f in (_kernel, _autograd, _fake, _kernel))
    _bwd = (partial(f, _op) for f in (_kernel_bwd, _autograd_bwd, _fake_bwd, _kernel_bwd))
    _bwd_schema = _schema(_op, _RESULTS, ", bool needs_bias", _GRADS)
    _OPERATORS[_op] = register(_op, _schema(_op), *_fwd)
    _BWD_OPERATORS[_op] = register(f"{_op}_bwd", _bwd_schema, *_bwd)
