"""Softmax attention over NumPy arrays: allocation and kernels.

The path from both APIs to the kernels; `_attend_plan` checks what shapes, dtypes, numbers decide.
`Options` are the arguments beside q, k, v as the public functions take them; `op` is the public
name, for errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq import _check, _dispatch, score_mods
from fastseq._arrays import elements, rows
from fastseq._attend_plan import Plan, plan_for, seed, window
from fastseq.kernels.cpu.contract import Attention

Array = np.ndarray
Shape = tuple[int, ...]


@dataclass(slots=True)
class Options:
    """The arguments of `attention` and `attention_varlen` beside q, k, v and return_lse."""

    mask: Any = None
    bias: Any = None
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    q_lengths: Any = None
    kv_lengths: Any = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Any = None
    dropout_p: float = 0.0
    seed: int | None = None
    score_mod: score_mods.ScoreMod | None = None
    cu_seqlens_q: Any = None  # both: rows are packed
    cu_seqlens_k: Any = None

    @property
    def packed(self) -> bool:
        """Whether q, k, v are rows of all sequences, (rows, heads, ·)."""
        return self.cu_seqlens_q is not None


def _pairs(op: str, name: str, value, sizes: tuple, dtype) -> Array | None:
    """A mask or bias as (B, NH, L, S), broadcast by strides."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{op}: {name} must be an array of {np.dtype(dtype)!s}, got {got!s}")
    _check.broadcasts(op, name, value.shape, "B, NH, L, S", sizes)
    return np.broadcast_to(elements(value), sizes)


def _slopes(op: str, value, B: int, NH: int, dtype) -> Array | None:
    if value is None:
        return None
    _check.floats(op, "alibi_slopes", _check.signature(value), dtype, like="q")
    if value.shape not in ((NH,), (B, NH)):
        expected = f"(NH,) = ({NH},) or (B, NH) = ({B}, {NH})"
        raise ValueError(f"{op}: alibi_slopes must be {expected}, got {value.shape}")
    return np.broadcast_to(elements(value), (B, NH))


def _lengths(op: str, name: str, value, most: tuple[str, int], default: Array) -> Array:
    found = _check.counts(op, name, value, ("B", len(default)), most)
    return default if found is None else found


def _call(op: str, q: Array, k: Array, v: Array, given: Options) -> tuple[Plan, Attention]:
    """Checked arguments as the kernels take them, without outputs."""
    if op == "attention_varlen" and not given.packed:
        raise TypeError(f"{op}: cu_seqlens_q must be integers, got NoneType")
    sign, nothing, packed = _check.signature, _check.NOTHING, given.packed
    signatures = sign(q) or nothing, sign(k) or nothing, sign(v) or nothing
    numbers = given.causal, given.scale, given.softcap, given.dropout_p
    plan = plan_for(op, packed, *signatures, *numbers)
    B, NH, L, S = plan.scores
    q_first = k_first = None
    if packed:
        cu_q = _check.offsets(op, "cu_seqlens_q", given.cu_seqlens_q, ("TQ", L))
        cu_k = _check.offsets(op, "cu_seqlens_k", given.cu_seqlens_k, ("TK", S))
        _check.shape(op, "cu_seqlens_k", cu_k.shape, "B + 1,", cu_q.shape)
        q_first, k_first, q_lengths, k_lengths = cu_q[:-1], cu_k[:-1], np.diff(cu_q), np.diff(cu_k)
        B = len(q_lengths)
        q, k, v = (a.transpose(1, 0, 2)[None] for a in (q, k, v))
    else:
        q_most, k_most = ("L", L), ("S", S)
        q_lengths = _lengths(op, "q_lengths", given.q_lengths, q_most, plan.all_queries)
        k_lengths = _lengths(op, "kv_lengths", given.kv_lengths, k_most, plan.all_keys)
    score_mod = score_mods.found(op, given.score_mod)
    # by place, which takes half the time of by name
    return plan, Attention(
        (B, *plan.heads),
        rows(q), rows(k), rows(v), None, None,
        q_lengths, k_lengths, q_first, k_first,
        plan.causal, *window(op, given.window),
        plan.scale, plan.softcap,
        _slopes(op, given.alibi_slopes, B, NH, q.dtype),
        _pairs(op, "mask", given.mask, (B, NH, L, S), np.bool_),
        _pairs(op, "bias", given.bias, (B, NH, L, S), q.dtype),
        seed(op, given.dropout_p, given.seed), plan.threshold, plan.keep_scale,
        None if score_mod is None else score_mod.compiled(q.dtype),
    )  # fmt: skip


def memory_of(shape: Shape, strides: Shape, columns: int) -> tuple[Shape, Shape]:
    """The shape in memory of an array that follows the order of axes of these strides, its last
    axis of `columns`, and the transposition that makes it `shape` but for that axis."""
    axes = range(len(shape) - 1)
    order = sorted(axes, key=lambda axis: -abs(strides[axis]))
    made = (*(shape[axis] for axis in order), columns)
    return made, (*(order.index(axis) for axis in axes), len(shape) - 1)


def like(a: Array, columns: int, make: Callable[..., Array] = np.empty) -> Array:
    """An array of a's shape and order of axes in memory, but for the size of its last axis."""
    if a.flags.c_contiguous:
        return make((*a.shape[:-1], columns), a.dtype)
    shape, axes = memory_of(a.shape, a.strides, columns)
    return make(shape, a.dtype).transpose(axes)


def _as_given(a: Array, packed: bool) -> Array:
    """(1, heads, rows, ...) as packed rows (rows, heads, ...)."""
    return a[0].swapaxes(0, 1) if packed else a


def _as_kernel(a: Array | None, packed: bool) -> Array | None:
    return a if a is None or not packed else a.swapaxes(0, 1)[None]


def forward(op: str, q: Array, k: Array, v: Array, given: Options) -> tuple[Array, Array]:
    """o (B, NH, L, DV) in q's order of axes and lse (B, NH, L); packed (TQ, NH, DV), (TQ, NH)."""
    plan, call = _call(op, q, k, v, given)
    padded = given.q_lengths is not None
    call.o = like(call.q, call.sizes[4], np.zeros if padded else np.empty)
    call.lse = np.full(plan.lse, -np.inf, q.dtype) if padded else np.empty(plan.lse, q.dtype)
    plan.kernels.forward(call, _dispatch.get_num_threads())
    return _as_given(call.o, given.packed), _as_given(call.lse, given.packed)


def backward(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    given: Options,
    o: Array,
    lse: Array,
    do: Array | None,
    dlse: Array | None,
    *,
    needs_bias: bool = True,
) -> tuple[Array, Array, Array, Array | None]:
    """dq, dk, dv, dbias (None without a bias or where not needed) of `forward`.

    do and dlse may be None (zeros), but for the shape of o and lse, which is checked.
    """
    plan, call = _call(op, q, k, v, given)
    for name, value, output in (("do", do, o), ("dlse", dlse, lse)):
        if value is not None:
            letters = ("TQ, NH" if given.packed else "B, NH, L") + ", DV" * (name == "do")
            _check.floats(op, name, _check.signature(value), q.dtype, like="q")
            _check.shape(op, name, value.shape, letters, output.shape)
    do = np.broadcast_to(np.zeros((), q.dtype), o.shape) if do is None else do
    call.o, call.lse, call.do, call.dlse = (
        rows(_as_kernel(a, given.packed)) for a in (o, lse, do, dlse)
    )
    call.dq, call.dk, call.dv = (like(a, a.shape[-1], np.zeros) for a in (call.q, call.k, call.v))
    dbias = None
    if needs_bias and given.bias is not None:
        dbias = np.zeros(given.bias.shape, q.dtype)
        call.dbias = _writable_view(dbias, call.bias.shape)
    plan.kernels.backward(call, _dispatch.get_num_threads())
    dq, dk, dv = (_as_given(a, given.packed) for a in (call.dq, call.dk, call.dv))
    return dq, dk, dv, dbias


def _writable_view(a: Array, shape: tuple) -> Array:
    """`a` broadcast by strides, 0 on every axis that it does not have or has once."""
    wide = a.reshape((1,) * (len(shape) - a.ndim) + a.shape)
    strides = [0 if n == 1 else stride for n, stride in zip(wide.shape, wide.strides, strict=True)]
    return np.lib.stride_tricks.as_strided(wide, shape, strides)
