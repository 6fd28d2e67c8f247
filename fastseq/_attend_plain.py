"""Attention of q, k, v alone, and lengths of keys, by address: for small calls over tensors.

Layouts and numbers are taken once down the path of all calls, on arrays without contents, and what
they decide is remembered: the addresses alone are left to a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from fastseq import _attend, _dispatch
from fastseq._attend import Options


@dataclass(frozen=True, slots=True)
class Plain:
    """A call but for its addresses."""

    prepared: Any  # of the kernels
    dtype: np.dtype
    B: int
    S: int
    o: tuple[int, ...]  # its shape in memory
    axes: tuple[int, ...] | None  # that transpose it; None: as it is
    lse: tuple[int, int, int]  # B, NH, L

    def forward(self, q: int, k: int, v: int, kv_lengths: int = 0, with_lse: bool = True) -> tuple:
        """o (B, NH, L, DV), lse (B, NH, L) or None; kv_lengths: of (B,) int64 in 0..S, 0: all."""
        o, lse = np.empty(self.o, self.dtype), np.empty(self.lse, self.dtype) if with_lse else None
        self.prepared.forward(q, k, v, o, lse, kv_lengths, _dispatch.get_num_threads())
        return o if self.axes is None else o.transpose(self.axes), lse


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
    memory = np.empty(1, dtype)
    q, k, v = (
        as_strided(memory, shape, [n * dtype.itemsize for n in steps])
        for shape, steps in zip(shapes, strides, strict=True)
    )
    given = Options(causal=causal, window=(left, right), scale=scale, softcap=softcap)
    plan, call = _attend.prepare("attention", q, k, v, given)
    o, lse = _attend.like(q, v.shape[-1]), np.empty(plan.lse, dtype)
    call.o, call.lse = (as_strided(memory, a.shape, a.strides) for a in (o, lse))
    prepared, (B, _, _, S) = plan.kernels.Prepared(call), plan.scores
    return Plain(prepared, dtype, B, S, *_attend.memory_of(q, v.shape[-1]), plan.lse)
