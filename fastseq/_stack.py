"""Stacked, one- or two-directional recurrent layers over NumPy arrays: checks, allocation, kernels.

The one path from both APIs to the kernels. What follows from shapes and dtypes alone (the checks,
the sizes of packed weights and of the reserve) is a `Plan`, made once per signature and remembered.
`reserve` is what forward keeps for backward, one flat array: per direction the gates, the cell
states and a projection's input, and between layers the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from fastseq import _check, _dispatch
from fastseq._arrays import contiguous, rows
from fastseq._spec import Spec
from fastseq.kernels.cpu.contract import CompiledCell, Scan

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Plan:
    """What a spec, shapes and a dtype determine. R = P with a projection (P > 0), else H."""

    T: int
    B: int
    H: int
    P: int
    R: int
    inputs: tuple[int, ...]  # input size of every scan
    dtype: np.dtype
    kernels: ModuleType
    cell: int | CompiledCell  # what the kernels know it by
    packed: tuple[slice, ...]  # every scan's part of the packed weights
    packed_size: int
    reserve: dict[tuple[str, int], tuple[slice, tuple[int, ...]]]  # (name, scan or layer)
    reserve_size: int

    def kept(self, reserve: Array | None, name: str, index: int) -> Any:
        """An array in the reserve, or None."""
        if reserve is None or (name, index) not in self.reserve:
            return None
        part, shape = self.reserve[name, index]
        return reserve[part].reshape(shape)


def _slices(sizes: Sequence[int]) -> tuple[tuple[slice, ...], int]:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return tuple(slice(a, b) for a, b in pairwise(ends)), ends[-1]


@lru_cache(maxsize=1024)
def _sized(spec: Spec, T: int, B: int, I: int, H: int, P: int, dtype: np.dtype) -> Plan:  # noqa: E741
    kernels = _dispatch.kernels("recurrent", dtype)
    cell = spec.kind.cell(kernels, dtype)
    D, R = spec.directions, P or H
    inputs = tuple(I if index < D else D * R for index in range(spec.scans))
    packed, packed_size = _slices([kernels.packed_size(cell, n, H, P) for n in inputs])
    gate_row = kernels.gate_row(cell, H)
    shapes: dict[tuple[str, int], tuple[int, ...]] = {}
    for index in range(spec.scans):
        if gate_row:
            shapes["gates", index] = (T, B, gate_row)
        if spec.kind.has_c:
            shapes["c", index] = (T, B, H)
        if P:
            shapes["m", index] = (T, B, H)
    for layer in range(spec.num_layers - 1):
        shapes["y", layer] = (T, B, D * R)
    slices, size = _slices([prod(shape) for shape in shapes.values()])
    reserve = dict(zip(shapes, zip(slices, shapes.values(), strict=True), strict=True))
    return Plan(T, B, H, P, R, inputs, dtype, kernels, cell, packed, packed_size, reserve, size)


@lru_cache(maxsize=1024)
def _checked(spec: Spec, x: tuple, h0: tuple | None, c0: tuple | None, weights: tuple) -> Plan:
    """Check signatures (shape, dtype) and plan for them."""
    op, G = spec.op, spec.kind.gates
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
    plan = _sized(spec, T, B, I, H, w_hr[0][0] if w_hr is not None else 0, x[1])
    for index in range(spec.scans):
        _check_weights(spec, plan, spec.weights_of(weights, index), index)
    for name, state, width in (("h0", h0, plan.R), ("c0", c0, H)):
        _check_state(spec, plan, name, state, width)
    return plan


def _check_weights(spec: Spec, plan: Plan, weights: tuple, index: int) -> None:
    kind, H, R, P = spec.kind, plan.H, plan.R, plan.P
    G, N = kind.gates, kind.params
    gates = f"{G}H" if G > 1 else "H"
    layer, direction = divmod(index, spec.directions)
    suffix = "" if spec.scans == 1 else f"_l{layer}" + "_reverse" * direction
    expected = [
        ("w_ih", f"{gates}, I", (G * H, plan.inputs[index])),
        ("w_hh", f"{gates}, {'P' if P else 'H'}", (G * H, R)),
        ("b_ih", f"{gates},", (G * H,)),
        ("b_hh", f"{gates},", (G * H,)),
        ("w_hr", "P, H", (P, H)),
        ("params", "N, H", (N, H)),
    ]
    for value, (name, letters, numbers) in zip(weights, expected, strict=True):
        if name in spec.names:
            _check.floats(spec.op, name + suffix, value, plan.dtype)
            _check.shape(spec.op, name + suffix, value[0], letters, numbers)


def _check_state(spec: Spec, plan: Plan, name: str, state: tuple | None, width: int) -> None:
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


def _plan(spec: Spec, x, h0, c0, weights) -> Plan:
    sign = _check.signature
    return _checked(spec, sign(x), sign(h0), sign(c0), tuple([sign(w) for w in weights]))


def reserve_size(
    spec: Spec, T: int, B: int, input_size: int, hidden_size: int, proj_size: int, dtype
) -> int:
    """Elements of the reserve that `forward(..., save=True)` returns."""
    return _sized(spec, T, B, input_size, hidden_size, proj_size, np.dtype(dtype)).reserve_size


# ---- packed weights


def _pack(plan: Plan, spec: Spec, weights: Sequence) -> Array:
    raw = np.empty(plan.packed_size + 64 // plan.dtype.itemsize, plan.dtype)
    start = plan.kernels.to_cache_line(raw)
    packed, threads = raw[start : start + plan.packed_size], _dispatch.get_num_threads()
    for index in range(spec.scans):
        part = tuple([contiguous(w) for w in spec.weights_of(weights, index)])
        sizes = plan.inputs[index], plan.H, plan.P
        plan.kernels.pack(plan.cell, *sizes, part, packed[plan.packed[index]], threads)
    return packed


def pack(spec: Spec, weights: Sequence) -> Array:
    """The weights of all layers as the forward kernels read them: opaque, for this process."""
    w_ih, _, _, _, w_hr, _ = spec.weights_of(weights, 0)
    sizes = w_ih.shape[1], w_ih.shape[0] // spec.kind.gates, 0 if w_hr is None else len(w_hr)
    return _pack(_sized(spec, 1, 1, *sizes, w_ih.dtype), spec, weights)


def fingerprint(weights: Sequence) -> int:
    """A 64-bit hash of the weights' contents."""
    kernels = _dispatch.kernels("recurrent", weights[0].dtype)
    return kernels.fingerprint([contiguous(w) for w in weights])


# ---- forward and backward


@dataclass(slots=True)
class _Call:
    """One call's checked arguments, the same for all layers."""

    spec: Spec
    plan: Plan
    lengths: Array | None
    order: Array | None
    resets: Array | None
    h0: Array | None
    c0: Array | None
    reserve: Array | None

    def scan(self, index: int, x: Array, y: Array, h_n, c_n, c) -> Scan:
        """Scan `index` between a layer's input and its whole output; c may be None."""
        plan, d = self.plan, index % self.spec.directions
        m = plan.kept(self.reserve, "m", index)
        if m is None and plan.P:
            m = np.empty((1, plan.B, plan.H), plan.dtype)
        kept_c = plan.kept(self.reserve, "c", index)
        return Scan(
            sizes=(plan.T, plan.B, plan.inputs[index], plan.H, plan.P),
            x=x,
            weights=(),
            reverse=self.spec.reverse or d == 1,
            h0=None if self.h0 is None else self.h0[index],
            c0=None if self.c0 is None else self.c0[index],
            lengths=self.lengths,
            order=self.order,
            resets=self.resets,
            y=self.half(y, d, plan.R),
            h_n=None if h_n is None else h_n[index],
            c_n=None if c_n is None else c_n[index],
            c=self.half(c, d, plan.H) if kept_c is None else kept_c,
            m=m,
            gates=plan.kept(self.reserve, "gates", index),
            limit=self.spec.limit,
        )

    def half(self, a: Array | None, d: int, width: int) -> Any:
        """Direction d's columns of a layer's output."""
        if a is None or self.spec.directions == 1:
            return a
        return a[:, :, d * width : (d + 1) * width]

    def run(self, kernel, scans: list[Scan]) -> None:
        threads = _dispatch.get_num_threads()
        kernel(self.plan.cell, scans, threads, _dispatch.l2_bytes())


def _call(spec, plan, h0, c0, lengths, resets, reserve) -> _Call:
    lengths = _check.counts(spec.op, "lengths", lengths, ("B", plan.B), ("T", plan.T))
    order = None if lengths is None else np.argsort(-lengths, kind="stable")
    resets = _check.resets(spec.op, resets, plan.T, plan.B)
    return _Call(spec, plan, lengths, order, resets, contiguous(h0), contiguous(c0), reserve)


def forward(
    spec: Spec,
    x: Array,
    h0: Array | None,
    c0: Array | None,
    weights: Sequence,
    lengths=None,
    resets=None,
    *,
    packed: Array | None = None,
    save: bool = False,
    cell_states: bool = False,
) -> tuple:
    """Run all layers.

    Returns:
        y (T, B, D R), h_n (L D, B, R), c_n (L D, B, H) or None, c (T, B, D H) of the last layer
        with cell_states, else None, reserve with save, else None.
    """
    plan = _plan(spec, x, h0, c0, weights)
    T, B, D, dtype = plan.T, plan.B, spec.directions, plan.dtype
    reserve = np.empty(plan.reserve_size, dtype) if save else None
    call = _call(spec, plan, h0, c0, lengths, resets, reserve)
    packed = _pack(plan, spec, weights) if packed is None else packed
    h_n = np.empty((spec.scans, B, plan.R), dtype)
    c_n = np.empty((spec.scans, B, plan.H), dtype) if spec.kind.has_c else None
    c = np.empty((T, B, D * plan.H), dtype) if cell_states else None
    y = rows(x)
    for layer in range(spec.num_layers):
        layer_x, layer_c = y, c if layer == spec.num_layers - 1 else None
        y = plan.kept(reserve, "y", layer)
        if y is None:
            y = np.empty((T, B, D * plan.R), dtype)
        scans = []
        for index in range(layer * D, (layer + 1) * D):
            scan = call.scan(index, layer_x, y, h_n, c_n, layer_c)
            scan.packed = packed[plan.packed[index]]
            scans.append(scan)
        call.run(plan.kernels.forward, scans)
    if c is not None and save:
        for d in range(D):
            np.copyto(call.half(c, d, plan.H), plan.kept(reserve, "c", spec.scans - D + d))
    return y, h_n, c_n, c, reserve


def backward(
    spec: Spec,
    x: Array,
    h0: Array | None,
    c0: Array | None,
    weights: Sequence,
    lengths,
    resets,
    y: Array,
    reserve: Array,
    dy: Array | None,
    dh_n: Array | None,
    dc_n: Array | None,
    dc: Array | None,
    *,
    needs_x: bool = True,
    needs_weights: bool = True,
) -> tuple:
    """Backpropagation through time of `forward`; dy, dh_n, dc_n, dc may be None (zeros).

    Returns:
        dx or None, dh0 (L D, B, R), dc0 (L D, B, H) or None, one gradient per weight or None.
    """
    plan = _plan(spec, x, h0, c0, weights)
    call = _call(spec, plan, h0, c0, lengths, resets, reserve)
    _check_cotangents(spec, plan, dy, dh_n, dc_n, dc)
    dh_n, dc_n, dc = contiguous(dh_n), contiguous(dc_n), rows(dc)
    dh0 = np.empty((spec.scans, plan.B, plan.R), plan.dtype)
    dc0 = np.empty((spec.scans, plan.B, plan.H), plan.dtype) if spec.kind.has_c else None
    dweights: list = []
    for layer in reversed(range(spec.num_layers)):
        top = layer == spec.num_layers - 1
        layer_x = rows(x) if layer == 0 else plan.kept(reserve, "y", layer - 1)
        layer_y = y if top else plan.kept(reserve, "y", layer)
        first = layer * spec.directions
        scans = [
            _backward_scan(call, first + d, layer_x, layer_y, weights, (dh_n, dc_n), (dh0, dc0))
            for d in range(spec.directions)
        ]
        for d, scan in enumerate(scans):
            scan.dy = call.half(rows(dy), d, plan.R)
            scan.dc = call.half(dc, d, plan.H) if top else None
            if layer > 0 or needs_x:
                scan.dx = np.empty(layer_x.shape, plan.dtype)
            if needs_weights:
                scan.dweights = tuple(
                    None if w is None else np.empty(w.shape, w.dtype) for w in scan.weights
                )
        call.run(plan.kernels.backward, scans)
        if needs_weights:
            found = [d for scan in scans for d in scan.dweights if d is not None]
            dweights = found + dweights
        dy = scans[0].dx
        if spec.bidirectional and dy is not None:
            dy += scans[1].dx
    return dy, dh0, dc0, dweights if needs_weights else None


def _backward_scan(call: _Call, index, x, y, weights, dlast, dfirst) -> Scan:
    (dh_n, dc_n), (dh0, dc0) = dlast, dfirst
    scan = call.scan(index, x, y, dh_n, dc_n, None)
    return replace(
        scan,
        weights=tuple([contiguous(w) for w in call.spec.weights_of(weights, index)]),
        dh0=dh0[index],
        dc0=None if dc0 is None else dc0[index],
    )


def _check_cotangents(spec: Spec, plan: Plan, dy, dh_n, dc_n, dc) -> None:
    D = spec.directions
    for name, value, width in (("dy", dy, D * plan.R), ("dc", dc, D * plan.H)):
        if value is not None:
            _check.floats(spec.op, name, _check.signature(value), plan.dtype)
            letters = "T, B, H" if D == 1 else "T, B, 2H"
            _check.shape(spec.op, name, value.shape, letters, (plan.T, plan.B, width))
    for name, value, width in (("dh_n", dh_n, plan.R), ("dc_n", dc_n, plan.H)):
        _check_state(spec, plan, name, _check.signature(value), width)
