"""Attention of q, k, v alone, and lengths of keys, by address, for small calls over tensors.

All but the addresses follows from layouts and numbers; it is made once for them and remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from fastseq import _dispatch
from fastseq._attend import Array, Shape, memory_of
from fastseq._attend_plan import plan_for, window
from fastseq.kernels.cpu.contract import Attention


@dataclass(frozen=True, slots=True)
class Memory:
    """How an array stands in memory, in C order."""

    shape: Shape
    axes: Shape | None  # that transpose it to (B, heads, rows, columns); None: it is that
    steps: Shape  # strides in elements, transposed

    def make(self, dtype: np.dtype, new: Callable[..., Array] = np.empty) -> Array:
        a = new(self.shape, dtype)
        return a if self.axes is None else a.transpose(self.axes)


@lru_cache(maxsize=1024)
def memory_like(shape: Shape, strides: Shape, columns: int) -> Memory:
    """What follows the order of axes of these strides, of `columns` in its last axis."""
    made, axes = memory_of(shape, strides, columns)
    steps = _steps(made)
    in_order = axes == tuple(range(len(axes)))
    return Memory(made, None if in_order else axes, tuple(steps[axis] for axis in axes))


def _steps(shape: Shape) -> Shape:
    """Strides in elements of C order."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True, slots=True)
class Plain:
    """A call but for its addresses: of q, k, v, and of lengths (B,) int64 in 0..S, or 0: all S."""

    prepared: Any  # of the kernels
    dtype: np.dtype
    layouts: tuple[tuple[Shape, Shape], ...]  # shape, and strides in elements, of q, k, v
    B: int
    S: int
    o: Memory
    lse: tuple[int, int, int]  # B, NH, L

    def forward(self, at: tuple[int, int, int, int], with_lse: bool = True) -> tuple:
        """o (B, NH, L, DV) and lse (B, NH, L), or None."""
        o = self.o.make(self.dtype)
        lse = np.empty(self.lse, self.dtype) if with_lse else None
        self.prepared.forward(*at, o, lse, _dispatch.get_num_threads())
        return o, lse

    def backward(self, at: tuple[int, int, int, int], *results: int) -> list[Array]:
        """dq, dk, dv from the addresses of o, lse and do, which have forward's layouts."""
        memory = [memory_like(shape, steps, shape[3]) for shape, steps in self.layouts]
        grads = [each.make(self.dtype, np.zeros) for each in memory]
        self.prepared.backward(*at, *results, *grads, _dispatch.get_num_threads())
        return grads


@lru_cache(maxsize=1024, typed=True)  # a window may have a side of 1, but not of 1.0
def plain(
    dtype: np.dtype,
    causal: bool | str,
    left: int | None,
    right: int | None,
    scale: float | None,
    softcap: float | None,
    *layouts: Shape,
) -> Plain | None:
    """The call for these layouts, which are checked; None where an array has to be copied.

    layouts: shape, and strides in elements, of q, of k, of v.
    """
    shapes, strides = layouts[::2], layouts[1::2]
    if any(steps[-1:] != (1,) for steps in strides):
        return None
    signatures = [(shape, dtype) for shape in shapes]
    plan = plan_for("attention", False, *signatures, causal, scale, softcap, 0.0)
    (B, _, _, S), DV = plan.scores, plan.heads[3]
    o = memory_like(shapes[0], strides[0], DV)
    call = Attention(
        (B, *plan.heads), *strides, o.steps, _steps(plan.lse),
        plan.all_queries, plan.all_keys, None, None,
        plan.causal, *window("attention", (left, right)), plan.scale, plan.softcap,
        None, None, None, 0, plan.threshold, plan.keep_scale, do=o.steps,
    )  # fmt: skip
    prepared = plan.kernels.Prepared(call)
    return Plain(prepared, dtype, tuple(zip(shapes, strides, strict=True)), B, S, o, plan.lse)
