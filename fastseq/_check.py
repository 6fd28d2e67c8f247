"""Every argument error: it names the operation, the argument, what was expected, and what came."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


# An array's shape and dtype; for anything that is not an array, () and its type.
Signature = tuple[tuple[int, ...], np.dtype | type]


NOTHING: Signature = ((), type(None))  # that of a None which may not be one


def signature(value) -> Signature | None:
    """All that the checks need to know of an argument."""
    if value is None:
        return None
    return (value.shape, value.dtype) if isinstance(value, np.ndarray) else ((), type(value))


def floats(op: str, name: str, value: Signature | None, dtype=None, like: str = "x") -> None:
    """A native float32 or float64 array, of `dtype` where given, which argument `like` has."""
    got = value[1] if value is not None else type(None)
    if not isinstance(got, np.dtype):
        raise TypeError(f"{op}: {name} must be a NumPy array, got {got.__name__}")
    if dtype is None and got not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32 or float64, got {got!s}")
    if dtype is not None and got != dtype:
        raise TypeError(f"{op}: {name} must be {dtype!s} as {like} is, got {got!s}")


def shape(op: str, name: str, got: tuple, letters: str, expected: Sequence[int]) -> None:
    """The shape, in letters and numbers."""
    if got != tuple(expected):
        numbers = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{op}: {name} must be ({letters}) = ({numbers}), got {got}")


def rank(op: str, name: str, got: tuple, letters: str) -> None:
    """The number of axes, where their sizes are still free."""
    n = letters.count(",") + 1
    if len(got) != n:
        raise ValueError(f"{op}: {name} must be ({letters}), {n} axes, got shape {got}")


def counts(
    op: str, name: str, value, axis: tuple[str, int], most: tuple[str, int]
) -> np.ndarray | None:
    """(B,) integers in 0..most, as int64; axis and most are letters with their sizes."""
    if value is None:
        return None
    value = np.asarray(value)
    if value.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} must be integers, got {value.dtype!s}")
    shape(op, name, value.shape, f"{axis[0]},", (axis[1],))
    value = np.ascontiguousarray(value, np.int64)
    letter, limit = most
    if value.size and value.view(np.uint64).max() > limit:  # without its sign, < 0 is above all
        b = int(np.argmax((value < 0) | (value > limit)))
        expected = f"0..{letter} = 0..{limit}"
        raise ValueError(f"{op}: {name} must be in {expected}, got {name}[{b}] = {value[b]}")
    return value


def offsets(op: str, name: str, value, rows: tuple[str, int]) -> np.ndarray:
    """(B + 1,) ascending integers from 0 to the number of packed rows, as int64."""
    value = np.asarray(value)
    if value.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} must be integers, got {value.dtype!s}")
    rank(op, name, value.shape, "B + 1")
    value = np.ascontiguousarray(value, np.int64)
    letter, n = rows
    if not value.size or value[0] != 0 or value[-1] != n:
        ends = f"{value[0]}..{value[-1]}" if value.size else "nothing"
        raise ValueError(f"{op}: {name} must go from 0 to {letter} = {n}, got {ends}")
    if np.any(np.diff(value) < 0):
        b = int(np.argmax(np.diff(value) < 0))
        steps = f"{name}[{b}:{b + 2}] = {value[b]}, {value[b + 1]}"
        raise ValueError(f"{op}: {name} must not descend, got {steps}")
    return value


def broadcasts(op: str, name: str, got: tuple, letters: str, expected: Sequence[int]) -> None:
    """A shape that broadcasts to the expected one."""
    fits = len(got) <= len(expected) and all(
        n in (1, e) for n, e in zip(got[::-1], expected[::-1], strict=False)
    )
    if not fits:
        numbers = ", ".join(map(str, expected))
        raise ValueError(f"{op}: {name} must broadcast to ({letters}) = ({numbers}), got {got}")


def number(op: str, name: str, value) -> float:
    """A real number, NumPy's included."""
    if not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    return float(value)


def limit(op: str, name: str, value) -> float | None:
    """A number > 0, NumPy's included; None: no limit."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number > 0 or None, got {value!r}")
    if not float(value) > 0:
        raise ValueError(f"{op}: {name} must be > 0, got {value!r}")
    return float(value)


def resets(op: str, value, T: int, B: int) -> np.ndarray | None:
    """(T, B) bool."""
    if value is None:
        return None
    value = np.asarray(value)
    if value.dtype != np.bool_:
        raise TypeError(f"{op}: resets must be bool, got {value.dtype!s}")
    shape(op, "resets", value.shape, "T, B", (T, B))
    return np.ascontiguousarray(value)


def choice(op: str, name: str, value, allowed: Sequence[str]) -> str:
    if value not in allowed:
        expected = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r}")
    return value
