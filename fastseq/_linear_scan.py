"""Linear recurrences over NumPy arrays: checks, allocation, kernels.

The one path from both APIs to the kernels, which import Numba at the first call. Which of the two
kernels runs follows from T and C alone, so that neither threads nor batch neighbours move a bit.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from math import prod
from types import ModuleType

import numpy as np

from fastseq import _check, _dispatch
from fastseq._arrays import LINE, rows, to_line

Array = np.ndarray

CHUNKED_STEPS, CHUNKED_COLUMNS = 8192, 4  # from so many steps, up to so many columns C


@cache
def _kernels(stem: str) -> ModuleType:
    if importlib.util.find_spec("numba") is None:
        raise ImportError(
            "fastseq: linear_scan, min_gru and min_lstm need Numba: "
            "pip install fastseq-kernels[numba]"
        )
    return importlib.import_module(f"fastseq.kernels.numba.{stem}")


def chunked(T: int, C: int) -> bool:
    """Whether time is cut into chunks."""
    return T >= CHUNKED_STEPS and C <= CHUNKED_COLUMNS


def _check_arguments(op: str, a, b, h0) -> None:
    _check.floats(op, "a", _check.signature(a))
    _check.rank(op, "a", a.shape, "T, B, C")
    _check.floats(op, "b", _check.signature(b), a.dtype, like="a")
    _check.shape(op, "b", b.shape, "T, B, C", a.shape)
    _check_state(op, "h0", h0, a)


def _check_state(op: str, name: str, state, a: Array) -> None:
    if state is not None:
        _check.floats(op, name, _check.signature(state), a.dtype, like="a")
        _check.shape(op, name, state.shape, "B, C", a.shape[1:])


def _masks(op: str, a: Array, lengths, resets) -> tuple[Array | None, Array | None]:
    T, B, _ = a.shape
    lengths = _check.counts(op, "lengths", lengths, ("B", B), ("T", T))
    return lengths, _check.resets(op, resets, T, B)


def _results(count: int, shape: tuple[int, ...], dtype: np.dtype) -> list[Array]:
    """Arrays that begin with a cache line. Both of a pair can be streamed then, and threads that
    write neighbouring columns of a step share no line, which takes 140 ns a step (Zen 5)."""
    n = prod(shape)
    stride = -(-n // LINE) * LINE  # whole lines of numbers of any size
    memory = np.empty(count * stride + LINE, dtype)
    starts = [to_line(memory) + number * stride for number in range(count)]
    return [memory[start : start + n].reshape(shape) for start in starts]


def _state(state: Array | None, a: Array) -> Array:
    return np.zeros(a.shape[1:], a.dtype) if state is None else np.ascontiguousarray(state)


def _pieces(lengths: Array | None, T: int, B: int) -> list[tuple[slice, int]]:
    """The rows that the chunked kernel takes at once, with their steps."""
    if lengths is None:
        return [(slice(0, B), T)]
    return [(slice(b, b + 1), int(n)) for b, n in enumerate(lengths)]


def _views(batch: slice, n: int, backwards: bool, *arrays) -> list:
    """The first n steps of these rows, in scan order."""
    return [None if a is None else a[:n, batch][:: -1 if backwards else 1] for a in arrays]


def forward(op: str, a, b, h0, lengths, resets, reverse: bool) -> tuple[Array, Array]:
    """h (T, B, C) and h_n (B, C)."""
    _check_arguments(op, a, b, h0)
    lengths, resets = _masks(op, a, lengths, resets)
    (h,), h_n = _results(1, a.shape, a.dtype), np.empty(a.shape[1:], a.dtype)
    a, b, h0, threads = rows(a), rows(b), _state(h0, a), _dispatch.get_num_threads()
    T, B, C = a.shape
    if not chunked(T, C):
        _kernels("linear_scan").forward(a, b, h, h0, h_n, lengths, resets, reverse, threads)
        return h, h_n
    for batch, n in _pieces(lengths, T, B):
        h[n:, batch] = 0
        h_n[batch] = h0[batch]
        if n:
            a_s, b_s, h_s, reset = _views(batch, n, reverse, a, b, h, resets)
            _kernels("linear_scan_chunks").scan(
                a_s, b_s, h_s, h0[batch], h_n[batch], reset, threads
            )
    return h, h_n


def backward(
    op: str, a, h0, lengths, resets, h: Array, dh, dh_n, reverse: bool
) -> tuple[Array, Array, Array]:
    """da, db (T, B, C) and dh0 (B, C) of `forward`; dh and dh_n may be None (zeros)."""
    _check_arguments(op, a, h, h0)
    if dh is not None:
        _check.floats(op, "dh", _check.signature(dh), a.dtype, like="a")
        _check.shape(op, "dh", dh.shape, "T, B, C", a.shape)
    _check_state(op, "dh_n", dh_n, a)
    lengths, resets = _masks(op, a, lengths, resets)
    da, db = _results(2, a.shape, a.dtype)
    dh0 = np.empty(a.shape[1:], a.dtype)
    dh = np.broadcast_to(np.zeros(a.shape[1:], a.dtype), a.shape) if dh is None else rows(dh)
    a, h, h0, dh_n = rows(a), rows(h), _state(h0, a), _state(dh_n, a)
    T, B, C = a.shape
    if chunked(T, C):
        for batch, n in _pieces(lengths, T, B):
            sequences = (a, h, dh, da, db, resets)
            _backward_chunks(batch, n, reverse, sequences, (h0, dh_n, dh0))
    else:
        masks = (lengths, resets, reverse, _dispatch.get_num_threads())
        _kernels("linear_scan").backward(a, h, dh, da, db, h0, dh_n, dh0, *masks)
    return da, db, dh0


@np.errstate(over="ignore", invalid="ignore")
def _backward_chunks(batch, n, reverse, sequences, states) -> None:
    """Backward of n steps of these rows: the same scan the other way, from the last step's db."""
    da, db = sequences[3:5]
    da[n:, batch] = db[n:, batch] = 0
    h0, dh_n, dh0 = (s[batch] for s in states)
    if n == 0:
        dh0[:] = dh_n
        return
    a, h, dh, da, db, reset = _views(batch, n, not reverse, *sequences)
    db[0] = dh[0] + dh_n
    g = db[0].copy()  # becomes that of the first step
    if n > 1:
        before = None if reset is None else reset[:-1]
        _kernels("linear_scan_chunks").scan(
            a[:-1], dh[1:], db[1:], db[0].copy(), g, before, _dispatch.get_num_threads(),
            h=h[1:], da=da[:-1],
        )  # fmt: skip
    kept = True if reset is None else ~reset[-1][:, None]
    da[-1], dh0[:] = np.where(kept, g * h0, 0), np.where(kept, a[-1] * g, 0)
