"""Attention of q, k, v alone, and lengths of keys, by address: for small calls over tensors.

Layouts and numbers are taken once down the path of all calls, on arrays without contents, and what
they decide is remembered: the addresses alone are left to a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from fastseq import _attend, _dispatch
from fastseq._attend import Array, Options


@dataclass(frozen=True, slots=True)
class Memory:
    """How an array stands in memory."""

    shape: tuple[int, ...]
    axes: tuple[int, ...] | None  # that transpose it to (B, heads, rows, columns); None: it is that

    def seen(self, a: Array) -> Array:
        """An array of this shape as (B, heads, rows, columns)."""
        return a if self.axes is None else a.transpose(self.axes)

    def blank(self, dtype: np.dtype) -> Array:
        return self.seen(_blank(dtype, self.shape))


@dataclass(frozen=True, slots=True)
class Plain:
    """A call but for its addresses: of q, k, v, and of lengths (B,) int64 in 0..S, or 0: all S."""

    prepared: Any  # of the kernels
    dtype: np.dtype
    B: int
    S: int
    o: Memory
    steps: tuple[int, ...]  # of o: its strides in elements
    lse: tuple[int, int, int]  # B, NH, L
    gradients: tuple[Memory, ...]  # of q, k, v

    def forward(self, at: tuple[int, int, int, int], with_lse: bool = True) -> tuple:
        """o (B, NH, L, DV) and lse (B, NH, L), or None."""
        o = np.empty(self.o.shape, self.dtype)
        lse = np.empty(self.lse, self.dtype) if with_lse else None
        self.prepared.forward(*at, o, lse, _dispatch.get_num_threads())
        return self.o.seen(o), lse

    def backward(self, at: tuple[int, int, int, int], *results: int) -> list[Array]:
        """dq, dk, dv from the addresses of o, lse and do, which have forward's layouts."""
        grads = [np.zeros(memory.shape, self.dtype) for memory in self.gradients]
        self.prepared.backward(*at, *results, *grads, _dispatch.get_num_threads())
        return [memory.seen(a) for memory, a in zip(self.gradients, grads, strict=True)]


@lru_cache(maxsize=1024, typed=True)  # a window may have a side of 1, but not of 1.0
def plain(
    dtype: np.dtype,
    causal: bool | str,
    left: int | None,
    right: int | None,
    scale: float | None,
    softcap: float | None,
    *layouts: tuple[int, ...],
) -> Plain | None:
    """The call for these layouts, which are checked; None where an array has to be copied.

    layouts: shape, and strides in elements, of q, of k, of v.
    """
    shapes, strides = layouts[::2], layouts[1::2]
    if any(steps[-1:] != (1,) for steps in strides):
        return None
    q, k, v = (_blank(dtype, *layout) for layout in zip(shapes, strides, strict=True))
    given = Options(causal=causal, window=(left, right), scale=scale, softcap=softcap)
    plan, call = _attend.prepare("attention", q, k, v, given)
    (B, _, _, S), (_, _, D, DV) = plan.scores, plan.heads
    wanted = ((q, DV), (q, D), (k, D), (v, DV))
    o, *gradients = (Memory(*_attend.memory_of(a, columns)) for a, columns in wanted)
    call.o = call.do = o.blank(dtype)
    call.lse = _blank(dtype, plan.lse)
    call.dq, call.dk, call.dv = (memory.blank(dtype) for memory in gradients)
    steps = tuple(n // dtype.itemsize for n in call.o.strides)
    return Plain(plan.kernels.Prepared(call), dtype, B, S, o, steps, plan.lse, tuple(gradients))


def _blank(dtype: np.dtype, shape: tuple[int, ...], steps: tuple[int, ...] | None = None) -> Array:
    """An array to be asked for its layout alone; steps: strides in elements, None: in C order."""
    if steps is None:
        steps = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return as_strided(np.empty(1, dtype), shape, [n * dtype.itemsize for n in steps])
