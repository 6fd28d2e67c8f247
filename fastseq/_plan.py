"""What a recurrent call's shapes and dtypes decide: its checks, every scan's place, all sizes.

A `Plan` is made once per signature and remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import ModuleType

import numpy as np

from fastseq import _check, _dispatch
from fastseq._arrays import contiguous
from fastseq._spec import Spec
from fastseq.kernels.cpu.contract import CompiledCell

Array = np.ndarray
Shape = tuple[int, ...]
Part = tuple[slice, Shape]  # of a flat array, and the shape it has there


@dataclass(frozen=True, slots=True)
class Place:
    """One direction of one layer: what it has of the arrays of the whole stack."""

    index: int  # of its states in (L D, B, .)
    sizes: tuple[int, int, int, int, int]  # T, B, I, H, P
    reverse: bool
    weights: tuple[int | None, ...]  # where they stand in the flat list, in the order of WEIGHTS
    packed: slice  # of the packed weights
    y: slice | None  # columns of its layer's y; None: all
    c: slice | None
    reserve: dict[str, Part]  # gates, c, m, m_c: what is kept of them for backward

    def weights_of(self, weights: Sequence) -> tuple:
        """Its weights in C order, None where absent."""
        return tuple([None if i is None else contiguous(weights[i]) for i in self.weights])

    def kept(self, reserve: Array) -> dict[str, Array]:
        """Its arrays in the reserve."""
        return {name: reserve[at].reshape(shape) for name, (at, shape) in self.reserve.items()}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a spec, shapes and a dtype determine. R = P with a projection (P > 0), else H."""

    T: int
    B: int
    H: int
    P: int
    R: int
    dtype: np.dtype
    kernels: ModuleType
    cell: int | CompiledCell  # what the kernels know it by
    layers: tuple[tuple[Place, ...], ...]
    between: tuple[Part, ...]  # y of every layer but the last in the reserve
    packed_size: int
    reserve_size: int
    y: Shape  # (T, B, D R) of a layer
    c: Shape  # (T, B, D H)
    h_n: Shape  # (L D, B, R)
    c_n: Shape | None  # (L D, B, H)


class _Layout:
    """Deals out consecutive parts of a flat array."""

    def __init__(self):
        self.size = 0

    def part(self, size: int) -> slice:
        self.size += size
        return slice(self.size - size, self.size)

    def array(self, *shape: int) -> Part:
        return self.part(prod(shape)), shape


@lru_cache(maxsize=1024)
def sized(spec: Spec, T: int, B: int, I: int, H: int, P: int, dtype: np.dtype) -> Plan:  # noqa: E741
    """The plan for sizes that have been checked."""
    kernels = _dispatch.kernels("recurrent", dtype)
    cell = spec.kind.cell(kernels, dtype)
    D, R, n = spec.directions, P or H, len(spec.names)
    gate_row = kernels.gate_row(cell, H)
    packed, reserve = _Layout(), _Layout()
    places = []
    for index in range(spec.scans):
        d, inputs = index % D, I if index < D else D * R
        kept = {"gates": reserve.array(T, B, gate_row)} if gate_row else {}
        kept |= {"c": reserve.array(T, B, H)} if spec.kind.has_c else {}
        kept |= {"m": reserve.array(T, B, H)} if P or (spec.zoneout and not gate_row) else {}
        kept |= {"m_c": reserve.array(T, B, H)} if spec.zoneout and spec.kind.has_c else {}
        place = Place(
            index=index,
            sizes=(T, B, inputs, H, P),
            reverse=spec.reverse or d == 1,
            weights=spec.weights_of(range(n * spec.scans), index),
            packed=packed.part(kernels.packed_size(cell, inputs, H, P)),
            y=slice(d * R, (d + 1) * R) if D > 1 else None,
            c=slice(d * H, (d + 1) * H) if D > 1 else None,
            reserve=kept,
        )
        places.append(place)
    return Plan(
        T=T,
        B=B,
        H=H,
        P=P,
        R=R,
        dtype=dtype,
        kernels=kernels,
        cell=cell,
        layers=tuple(tuple(places[i : i + D]) for i in range(0, len(places), D)),
        between=tuple(reserve.array(T, B, D * R) for _ in range(spec.num_layers - 1)),
        packed_size=packed.size,
        reserve_size=reserve.size,
        y=(T, B, D * R),
        c=(T, B, D * H),
        h_n=(spec.scans, B, R),
        c_n=(spec.scans, B, H) if spec.kind.has_c else None,
    )


def plan_for(spec: Spec, x, h0, c0, weights: tuple) -> Plan:
    """The plan for these arguments, which are checked; weights are those of `signatures`."""
    sign = _check.signature
    return _checked(spec, sign(x), sign(h0), sign(c0), weights)


def signatures(weights: Sequence) -> tuple:
    """`_check.signature` of each; written out for arrays, as this is a part of every small call."""
    sign = _check.signature
    return tuple([(w.shape, w.dtype) if type(w) is Array else sign(w) for w in weights])


@lru_cache(maxsize=1024)
def _checked(spec: Spec, x: tuple, h0: tuple | None, c0: tuple | None, weights: tuple) -> Plan:
    """Check signatures (shape, dtype) and plan for them."""
    op, G = spec.op, spec.kind.gates
    if spec.proj and not spec.kind.projects:
        raise ValueError(f"{op}: weights must not hold w_hr: the cell has no projection")
    letters = f"{G}H, I" if G > 1 else "H, I"
    name = "w_ih" if spec.scans == 1 else "w_ih_l0"
    w_ih, w_hr = weights[0], spec.weights_of(weights, 0)[4]
    _check.floats(op, "x", x)
    _check.rank(op, "x", x[0], "T, B, I")
    _check.floats(op, name, w_ih, x[1])
    _check.rank(op, name, w_ih[0], letters)
    T, B, I = x[0]  # noqa: E741
    H = w_ih[0][0] // G
    if H < 1 or w_ih[0][0] % G:
        raise ValueError(f"{op}: w_ih must be ({letters}) with H >= 1, got {w_ih[0]}")
    if T < 1:
        raise ValueError(f"{op}: x must have at least one step, got T = 0")
    plan = sized(spec, T, B, I, H, w_hr[0][0] if w_hr is not None else 0, x[1])
    for places in plan.layers:
        for place in places:
            _check_weights(spec, place, spec.weights_of(weights, place.index), x[1])
    for name, state, width in (("h0", h0, plan.R), ("c0", c0, H)):
        check_state(spec, plan, name, state, width)
    return plan


def _check_weights(spec: Spec, place: Place, weights: tuple, dtype: np.dtype) -> None:
    _, _, inputs, H, P = place.sizes
    G, N, R = spec.kind.gates, spec.kind.params, P or H
    gates = f"{G}H" if G > 1 else "H"
    layer, direction = divmod(place.index, spec.directions)
    suffix = "" if spec.scans == 1 else f"_l{layer}" + "_reverse" * direction
    expected = [
        ("w_ih", f"{gates}, I", (G * H, inputs)),
        ("w_hh", f"{gates}, {'P' if P else 'H'}", (G * H, R)),
        ("b_ih", f"{gates},", (G * H,)),
        ("b_hh", f"{gates},", (G * H,)),
        ("w_hr", "P, H", (P, H)),
        ("params", "N, H", (N, H)),
    ]
    for value, (name, letters, numbers) in zip(weights, expected, strict=True):
        if name in spec.names:
            _check.floats(spec.op, name + suffix, value, dtype)
            _check.shape(spec.op, name + suffix, value[0], letters, numbers)


def check_state(spec: Spec, plan: Plan, name: str, state: tuple | None, width: int) -> None:
    """An initial state or its gradient: (D layers, B, width); one scan's is named as (B, width)."""
    if state is None:
        return
    if spec.step:
        name = name.removesuffix("0")
    _check.floats(spec.op, name, state, plan.dtype)
    letter = "P" if plan.P and "h" in name else "H"
    if spec.scans == 1 and len(state[0]) == 3 and state[0][0] == 1:
        _check.shape(spec.op, name, state[0][1:], f"B, {letter}", (plan.B, width))
    else:
        expected = (spec.scans, plan.B, width)
        _check.shape(spec.op, name, state[0], f"LD, B, {letter}", expected)
