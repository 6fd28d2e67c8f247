"""The one path from both APIs to the clipping kernels: a `Batch` of arrays, clipped at once."""

from __future__ import annotations

import importlib
import importlib.util
import math
from functools import cache
from types import ModuleType

import numpy as np

from fastseq import _check, _dispatch
from fastseq.kernels.cpu.contract import address

EPS = 1e-6  # torch's, in the denominator of the coefficient
F32: np.dtype
F64: np.dtype
F32, F64 = _check.FLOATS


class Batch:
    """Arrays by memory: addresses and sizes of those without gaps, and the others as they are."""

    def __init__(self, op: str, name: str):
        self.op, self.name = op, name
        self.blocks: dict[np.dtype, tuple[list[int], list[int]]] = {F32: ([], []), F64: ([], [])}
        self.strided: list[np.ndarray] = []
        self._tables: list | None = None  # of the blocks, from the first pass on

    def add(self, i: int, a: np.ndarray) -> None:
        """Array i of the caller's."""
        if not isinstance(a, np.ndarray) or a.dtype not in self.blocks:
            _check.floats(self.op, f"{self.name}[{i}]", _check.signature(a))
        flags = a.flags
        if not flags.writeable:
            name = f"{self.name}[{i}]"
            raise ValueError(f"{self.op}: {name} must be writeable, got a read-only array")
        if flags.forc and flags.aligned:
            addresses, sizes = self.blocks[a.dtype]
            addresses.append(address(a if flags.c_contiguous else a.T))
            sizes.append(a.size)
        else:
            self.strided.append(a)

    @property
    def dtype(self) -> np.dtype:
        """The widest."""
        wide = self.blocks[F64][0] or any(a.dtype == F64 for a in self.strided)
        return F64 if wide else F32

    def norm(self, p: float) -> float:
        """(sum |x|^p)^(1/p), max |x| for p = inf, rounded to the widest dtype."""
        clip = _kernels(self.op)
        kind = {2.0: clip.SQUARES, 1.0: clip.ABSOLUTES, math.inf: clip.LARGEST}.get(p, clip.POWERS)
        parts = self._pass(kind, p)
        if self.strided:
            copies, gathered = [], Batch(self.op, self.name)
            for i, a in enumerate(self.strided):
                copies.append(np.array(a, order="C"))  # alive until it is read
                gathered.add(i, copies[-1])
            parts += gathered._pass(kind, p)
        found = np.concatenate(parts)
        with np.errstate(over="ignore"):
            total = found.max() if kind == clip.LARGEST else found.sum() ** (1 / p)
            return float(self.dtype.type(total))

    def scale(self, c: float) -> None:
        """x <- c x"""
        self._pass(_kernels(self.op).SCALE, c)
        with np.errstate(invalid="ignore"):
            for a in self.strided:
                a *= a.dtype.type(c)

    def limit(self, c: float) -> None:
        """x <- min(max(x, -c), c)"""
        self._pass(_kernels(self.op).LIMIT, c)
        for a in self.strided:
            np.clip(a, a.dtype.type(-c), a.dtype.type(c), out=a)

    def _pass(self, kind: int, c: float) -> list[np.ndarray]:
        """One pass over the blocks; the partial results of a norm."""
        clip, parts = _kernels(self.op), [np.zeros(1)]
        if self._tables is None:
            found = [(dtype.itemsize, *blocks) for dtype, blocks in self.blocks.items()]
            self._tables = [clip.Table(*table) for table in found if table[1]]
        for table in self._tables:
            alone = kind == clip.SCALE and table.overlaps()
            parts.append(clip.run(kind, table, c, 1 if alone else _dispatch.get_num_threads()))
        return parts


def clip_norm(batch: Batch, max_norm, norm_type, error_if_nonfinite: bool) -> tuple[float, bool]:
    """Scale by min(max_norm / (norm + EPS), 1), torch's rule: the norm before, whether scaled."""
    most = _limit(batch.op, "max_norm", max_norm)
    p = _number(batch.op, "norm_type", norm_type)
    if not p > 0:
        raise ValueError(f"{batch.op}: norm_type must be > 0, got {norm_type!r}")
    norm = batch.norm(p)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"{batch.op}: the norm of order {p:g} must be finite, got {norm}")
    with np.errstate(invalid="ignore"):
        c = float(np.minimum(np.divide(most, norm + EPS), 1))
    if c != 1:
        batch.scale(c)
    return norm, c != 1


def clip_value(batch: Batch, value) -> None:
    """Limit every element to -value..value."""
    batch.limit(_limit(batch.op, "clip_value", value))


def _number(op: str, name: str, value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}") from None


def _limit(op: str, name: str, value) -> float:
    found = _number(op, name, value)
    if not found >= 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value!r}")
    return found


@cache
def _kernels(op: str) -> ModuleType:
    if importlib.util.find_spec("numba") is None:
        raise ImportError(f"fastseq: {op} needs Numba: pip install fastseq-kernels[numba]")
    return importlib.import_module("fastseq.kernels.numba.clip")
