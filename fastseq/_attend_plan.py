"""What an attention call's shapes, dtypes and numbers decide: their checks, sizes, kernels.

A `Plan` is made once per signature and remembered.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from fastseq import _check, _dispatch
from fastseq.kernels.cpu.contract import CAUSAL, NO_LIMIT

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Plan:
    """Names are those of `contract.Attention`. Packed rows are a batch of one, of L and S rows."""

    kernels: ModuleType
    heads: tuple[int, int, int, int]  # NH, NK, D, DV
    scores: tuple[int, int, int, int]  # B, NH, L, S
    lse: tuple[int, int, int]  # B, NH, L
    all_queries: Array  # (B,) of L: the lengths where none are given; read-only
    all_keys: Array  # (B,) of S
    causal: int
    scale: float
    softcap: float
    threshold: int
    keep_scale: float


def plan_for(op: str, packed: bool, *given) -> Plan:
    """The plan for signatures of q, k, v and for causal, scale, softcap, dropout_p, all checked."""
    try:
        return _checked(op, packed, *given)
    except TypeError:  # also for what cannot be remembered
        pass
    return _checked.__wrapped__(op, packed, *given)


@lru_cache(maxsize=1024, typed=True)  # causal may be True, but not 1
def _checked(
    op: str,
    packed: bool,
    q: _check.Signature,
    k: _check.Signature,
    v: _check.Signature,
    causal: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
) -> Plan:
    """Check signatures (shape, dtype) and numbers, and plan for them."""
    dtype = None
    for name, sign in (("q", q), ("k", k), ("v", v)):
        _check.floats(op, name, sign, dtype, like="q")
        dtype = q[1]
    shapes = [sign[0] for sign in (q, k, v)]
    check_shapes(op, packed, *shapes)
    if not isinstance(causal, bool | np.bool_ | str) or causal not in CAUSAL:
        expected = "a bool, 'top_left' or 'bottom_right'"
        raise ValueError(f"{op}: causal must be {expected}, got {causal!r}")
    if packed:
        shapes = [(1, shape[1], shape[0], shape[2]) for shape in shapes]
    (B, NH, L, D), (_, NK, S, DV) = shapes[0], shapes[2]
    threshold, keep_scale = dropout(op, dropout_p)
    return Plan(
        kernels=_dispatch.kernels("attention", dtype),
        heads=(NH, NK, D, DV),
        scores=(B, NH, L, S),
        lse=(B, NH, L),
        all_queries=_constant(B, L),
        all_keys=_constant(B, S),
        causal=CAUSAL[causal],
        scale=D**-0.5 if scale is None else _check.number(op, "scale", scale),
        softcap=positive(op, "softcap", softcap),
        threshold=threshold,
        keep_scale=keep_scale,
    )


def _constant(n: int, value: int) -> Array:
    made = np.full(n, value, np.int64)
    made.flags.writeable = False
    return made


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


def window(op: str, value) -> tuple[int, int]:
    """left and right, NO_LIMIT where there is none."""
    if value is None or value == (None, None):
        return NO_LIMIT, NO_LIMIT
    try:
        left, right = (NO_LIMIT if n is None else operator.index(n) for n in value)
    except (TypeError, ValueError):
        expected = "(left, right) of integers or None"
        raise ValueError(f"{op}: window must be {expected}, got {value!r}") from None
    return min(left, NO_LIMIT), min(right, NO_LIMIT)


def dropout(op: str, p: Any) -> tuple[int, float]:
    """threshold and 1 / (1 - p)."""
    if not 0 <= _check.number(op, "dropout_p", p) <= 1:
        raise ValueError(f"{op}: dropout_p must be in 0..1, got {p!r}")
    if p == 1:  # all are dropped; the largest 32 bits are kept, as zeros
        return 2**32 - 1, 0.0
    return int(p * 2**32), 1 / (1 - p)


def seed(op: str, p: float, value: Any) -> int:
    """The seed of a call that drops weights with probability p."""
    if p == 0:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{op}: dropout needs an integer seed, got {value!r}")
    return int(value) % 2**64


def positive(op: str, name: str, value) -> float:
    """The number, 0 for None."""
    if value is None:
        return 0.0
    if not _check.number(op, name, value) > 0:
        raise ValueError(f"{op}: {name} must be positive or None, got {value!r}")
    return float(value)
