"""Arrays as the kernels take them, copied only where they have to be."""

from __future__ import annotations

import numpy as np

from fastseq.kernels.cpu.contract import address

LINE = 64  # bytes of a cache line


def to_line(a) -> int:
    """Elements between the start of `a`, in C order, and the next cache line."""
    return -address(a) % LINE // a.itemsize


def contiguous(a):
    """`a`, or None, in C order."""
    return a if a is None or a.flags.c_contiguous else np.ascontiguousarray(a)


def rows(a):
    """`a`, or None, with consecutive elements in its last axis and whole elements between rows."""
    if a is None or a.flags.c_contiguous:
        return a
    return a if whole(a) and a.strides[-1] == a.itemsize else np.ascontiguousarray(a)


def elements(a):
    """`a`, or None, with whole elements between neighbours on every axis."""
    return a if a is None or whole(a) else np.ascontiguousarray(a)


def whole(a) -> bool:
    """Whether every stride is a whole number of elements."""
    return a.flags.aligned and not any(stride % a.itemsize for stride in a.strides)
