"""Softmax attention over NumPy arrays: checks, allocation, kernels.

The one path from both APIs to the kernels. `Options` are the arguments beside q, k, v as the public
functions take them; `op` is the public name, for errors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fastseq import _check, _dispatch, score_mods
from fastseq._arrays import elements, rows
from fastseq.kernels.cpu.contract import CAUSAL, NO_LIMIT, Attention

Array = np.ndarray


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


# ---- checks


@lru_cache(maxsize=1024)
def _check_qkv(op: str, packed: bool, *signatures: _check.Signature) -> None:
    """The shapes and dtypes of q, k, v; remembered where they are right."""
    dtype = None
    for name, sign in zip("qkv", signatures, strict=True):
        _check.floats(op, name, sign, dtype, like="q")
        dtype = signatures[0][1]
    check_shapes(op, packed, *(shape for shape, _ in signatures))


def check_shapes(op: str, packed: bool, q: tuple, k: tuple, v: tuple) -> None:
    """The shapes of q, k, v."""
    letters = ("TQ, NH, D", "TK, NK, D", "TK, NK, DV") if packed else (
        "B, NH, L, D", "B, NK, S, D", "B, NK, S, DV")  # fmt: skip
    for name, got, axes in zip("qkv", (q, k, v), letters, strict=True):
        _check.rank(op, name, got, axes)
    heads = 1  # the axis before them is B, or none
    if packed:
        q, k, v, heads = (1, *q), (1, *k), (1, *v), 2
    (B, D), (NH, NK) = (q[0], q[3]), (q[heads], k[heads])
    keys = k[3 - heads]
    expected = (keys, NK) if packed else (B, NK, keys)
    _check.shape(op, "k", k[packed:], letters[1], (*expected, D))
    _check.shape(op, "v", v[packed:], letters[2], (*expected, v[3]))
    if D < 1:
        raise ValueError(f"{op}: q must have D >= 1, got shape {q[packed:]}")
    if NK < 1 or NH % NK:
        raise ValueError(f"{op}: NH must be a multiple of NK, got NH = {NH}, NK = {NK}")


def _window(op: str, window) -> tuple[int, int]:
    if window is None or window == (None, None):
        return NO_LIMIT, NO_LIMIT
    try:
        left, right = (NO_LIMIT if n is None else operator.index(n) for n in window)
    except (TypeError, ValueError):
        expected = "(left, right) of integers or None"
        raise ValueError(f"{op}: window must be {expected}, got {window!r}") from None
    return min(left, NO_LIMIT), min(right, NO_LIMIT)


def _dropout(op: str, p: float, seed) -> tuple[int, int, float]:
    """seed, threshold and 1 / (1 - p)."""
    if not 0 <= _check.number(op, "dropout_p", p) <= 1:
        raise ValueError(f"{op}: dropout_p must be in 0..1, got {p!r}")
    if p == 0:
        return 0, 0, 1.0
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"{op}: dropout needs an integer seed, got {seed!r}")
    if p == 1:  # all are dropped; the largest 32 bits are kept, as zeros
        return 0, 2**32 - 1, 0.0
    return int(seed) % 2**64, int(p * 2**32), 1 / (1 - p)


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


def _positive(op: str, name: str, value) -> float:
    if value is None:
        return 0.0
    if not _check.number(op, name, value) > 0:
        raise ValueError(f"{op}: {name} must be positive or None, got {value!r}")
    return float(value)


def _lengths(op: str, name: str, value, B: int, most: tuple[str, int]) -> Array:
    found = _check.counts(op, name, value, ("B", B), most)
    return _all(B, most[1]) if found is None else found


@lru_cache(maxsize=256)
def _all(B: int, n: int) -> Array:
    return np.full(B, n, np.int64)


# ---- a call


def _call(op: str, q: Array, k: Array, v: Array, given: Options) -> Attention:
    """Checked arguments as the kernels take them, without outputs."""
    if op == "attention_varlen" and not given.packed:
        raise TypeError(f"{op}: cu_seqlens_q must be integers, got NoneType")
    signatures = (_check.signature(a) or _check.NOTHING for a in (q, k, v))
    _check_qkv(op, given.packed, *signatures)
    first: tuple = (None, None)
    if given.packed:
        cu_q = _check.offsets(op, "cu_seqlens_q", given.cu_seqlens_q, ("TQ", len(q)))
        cu_k = _check.offsets(op, "cu_seqlens_k", given.cu_seqlens_k, ("TK", len(k)))
        _check.shape(op, "cu_seqlens_k", cu_k.shape, "B + 1,", cu_q.shape)
        first, lengths = (cu_q[:-1], cu_k[:-1]), (np.diff(cu_q), np.diff(cu_k))
        q, k, v = (a.transpose(1, 0, 2)[None] for a in (q, k, v))
        B, (_, NH, L, D), (_, NK, S, DV) = len(cu_q) - 1, q.shape, v.shape
    else:
        (B, NH, L, D), (_, NK, S, DV) = q.shape, v.shape
        lengths = (
            _lengths(op, "q_lengths", given.q_lengths, B, ("L", L)),
            _lengths(op, "kv_lengths", given.kv_lengths, B, ("S", S)),
        )
    left, right = _window(op, given.window)
    seed, threshold, keep_scale = _dropout(op, given.dropout_p, given.seed)
    score_mod = score_mods.found(op, given.score_mod)
    if not isinstance(given.causal, bool | np.bool_ | str) or given.causal not in CAUSAL:
        expected = "a bool, 'top_left' or 'bottom_right'"
        raise ValueError(f"{op}: causal must be {expected}, got {given.causal!r}")
    return Attention(
        sizes=(B, NH, NK, D, DV),
        q=rows(q),
        k=rows(k),
        v=rows(v),
        o=None,
        lse=None,
        q_lengths=lengths[0],
        kv_lengths=lengths[1],
        q_first=first[0],
        k_first=first[1],
        causal=CAUSAL[given.causal],
        left=left,
        right=right,
        scale=D**-0.5 if given.scale is None else _check.number(op, "scale", given.scale),
        softcap=_positive(op, "softcap", given.softcap),
        alibi_slopes=_slopes(op, given.alibi_slopes, B, NH, q.dtype),
        mask=_pairs(op, "mask", given.mask, (B, NH, L, S), np.bool_),
        bias=_pairs(op, "bias", given.bias, (B, NH, L, S), q.dtype),
        seed=seed,
        threshold=threshold,
        keep_scale=keep_scale,
        score_mod=None if score_mod is None else score_mod.compiled(q.dtype),
    )


def like(a: Array, columns: int, make: Callable[..., Array] = np.empty) -> Array:
    """An array of a's shape and order of axes in memory, but for the size of its last axis."""
    if a.flags.c_contiguous:
        return make((*a.shape[:-1], columns), a.dtype)
    axes = range(a.ndim - 1)
    order = sorted(axes, key=lambda axis: -abs(a.strides[axis]))
    made = make((*(a.shape[axis] for axis in order), columns), a.dtype)
    return made.transpose(*(order.index(axis) for axis in axes), a.ndim - 1)


def _as_given(a: Array, packed: bool) -> Array:
    """(1, heads, rows, ...) as packed rows (rows, heads, ...)."""
    return a[0].swapaxes(0, 1) if packed else a


def _as_kernel(a: Array | None, packed: bool) -> Array | None:
    return a if a is None or not packed else a.swapaxes(0, 1)[None]


def forward(op: str, q: Array, k: Array, v: Array, given: Options) -> tuple[Array, Array]:
    """o (B, NH, L, DV) in q's order of axes and lse (B, NH, L); packed (TQ, NH, DV), (TQ, NH)."""
    call = _call(op, q, k, v, given)
    B, NH, _, _, DV = call.sizes
    padded = given.q_lengths is not None
    call.o = like(call.q, DV, np.zeros if padded else np.empty)
    shape = (1 if given.packed else B, NH, call.q.shape[2])
    call.lse = np.full(shape, -np.inf, q.dtype) if padded else np.empty(shape, q.dtype)
    _dispatch.kernels("attention", q.dtype).forward(call, _dispatch.get_num_threads())
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
    call = _call(op, q, k, v, given)
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
    _dispatch.kernels("attention", q.dtype).backward(call, _dispatch.get_num_threads())
    dq, dk, dv = (_as_given(a, given.packed) for a in (call.dq, call.dk, call.dv))
    return dq, dk, dv, dbias


def _writable_view(a: Array, shape: tuple) -> Array:
    """`a` broadcast by strides, 0 on every axis that it does not have or has once."""
    wide = a.reshape((1,) * (len(shape) - a.ndim) + a.shape)
    strides = [0 if n == 1 else stride for n, stride in zip(wide.shape, wide.strides, strict=True)]
    return np.lib.stride_tricks.as_strided(wide, shape, strides)
