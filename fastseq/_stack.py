"""Stacked, one- or two-directional recurrent layers over NumPy arrays: allocation and kernels.

The one path from both APIs to the kernels; `_plan` has checked the arguments and laid out memory.
`reserve` is what forward keeps for backward, one flat array: per direction the gates, the cell
states and a projection's input, and between layers the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastseq import _check, _dispatch
from fastseq._arrays import LINE, contiguous, rows, to_line
from fastseq._plan import Place, Plan, check_state, plan_for, signatures, sized
from fastseq._spec import NO_MASKS, Masks, Spec
from fastseq.kernels.cpu.contract import Noise, Scan

Array = np.ndarray


def reserve_size(
    spec: Spec, T: int, B: int, input_size: int, hidden_size: int, proj_size: int, dtype
) -> int:
    """Elements of the reserve that `forward(..., save=True)` returns."""
    return sized(spec, T, B, input_size, hidden_size, proj_size, np.dtype(dtype)).reserve_size


# ---- packed weights


def _pack(plan: Plan, weights: Sequence, threads: int) -> Array:
    raw = np.empty(plan.packed_size + LINE // plan.dtype.itemsize, plan.dtype)
    start = to_line(raw)
    packed = raw[start : start + plan.packed_size]
    for places in plan.layers:
        for place in places:
            _, _, *sizes = place.sizes
            part = place.weights_of(weights)
            plan.kernels.pack(plan.cell, *sizes, part, packed[place.packed], threads)
    return packed


class Packed(NamedTuple):
    """The weights of all layers as the forward kernels read them: opaque, for this process."""

    signatures: tuple  # of the weights
    memory: Array


def pack(spec: Spec, weights: Sequence) -> Packed:
    """Pack the weights once, for many calls of `forward`."""
    w_ih, _, _, _, w_hr, _ = spec.weights_of(weights, 0)
    sizes = w_ih.shape[1], w_ih.shape[0] // spec.kind.gates, 0 if w_hr is None else len(w_hr)
    plan = sized(spec, 1, 1, *sizes, w_ih.dtype)
    return Packed(signatures(weights), _pack(plan, weights, _dispatch.get_num_threads()))


def fingerprint(weights: Sequence) -> int:
    """A 64-bit hash of the weights' contents."""
    kernels = _dispatch.kernels("recurrent", weights[0].dtype)
    return kernels.fingerprint([w if w.flags.c_contiguous else contiguous(w) for w in weights])


# ---- forward and backward


@dataclass(slots=True)
class _Call:
    """One call's checked arguments, the same for all layers."""

    plan: Plan
    zoneout: bool
    rows: tuple  # lengths, their order, resets
    noise: tuple | None  # recurrent_mask, zoneout_h, zoneout_c of all scans
    h0: Array | None
    c0: Array | None
    reserve: Array | None
    threads: int

    def scan(self, place: Place, x: Array, y: Array, h_n, c_n, c, packed=None) -> Scan:
        """A scan between a layer's input and its whole output; h_n, c_n and c may be None."""
        gates = m = m_c = None
        if self.reserve is not None:
            kept = place.kept(self.reserve)
            gates, m, c, m_c = kept.get("gates"), kept.get("m"), kept.get("c"), kept.get("m_c")
        elif place.c is not None and c is not None:
            c = c[:, :, place.c]
        if m is None and (self.plan.P or self.zoneout):
            m = np.empty((1, self.plan.B, self.plan.H), self.plan.dtype)
        if m_c is None and self.zoneout and self.plan.c_n is not None:
            m_c = np.empty((1, self.plan.B, self.plan.H), self.plan.dtype)
        y = y if place.y is None else y[:, :, place.y]
        i = place.index
        h0 = None if self.h0 is None else self.h0[i]
        c0 = None if self.c0 is None else self.c0[i]
        h_n = None if h_n is None else h_n[i]
        c_n = None if c_n is None else c_n[i]
        # by place, which takes half the time of by name
        fixed = place.sizes, x, (), place.reverse
        scan = Scan(*fixed, h0, c0, *self.rows, y, h_n, c_n, c, m, gates, packed)
        if self.noise is not None:
            scan.noise = Noise(*(None if a is None else a[i] for a in self.noise), m_c)
        return scan

    def output(self, layer: int) -> Array:
        """Memory for a layer's y: in the reserve, if backward follows and a layer stands above."""
        plan = self.plan
        if self.reserve is None or layer == len(plan.between):
            return np.empty(plan.y, plan.dtype)
        at, shape = plan.between[layer]
        return self.reserve[at].reshape(shape)

    def run(self, kernel: Callable, scans: list[Scan]) -> None:
        kernel(self.plan.cell, scans, self.threads, _dispatch.l2_bytes())


def _columns(a: Array | None, part: slice | None) -> Any:
    """One direction's columns of a layer's output."""
    return a if a is None or part is None else a[:, :, part]


def _call(spec: Spec, plan: Plan, h0, c0, masks: Masks, reserve) -> _Call:
    rows, noise = (None, None, None), None
    if masks is not NO_MASKS:
        rows, noise = _rows(spec, plan, masks), _noise(spec, plan, masks)
    states = contiguous(h0), contiguous(c0)
    return _Call(plan, spec.zoneout, rows, noise, *states, reserve, _dispatch.get_num_threads())


def _rows(spec: Spec, plan: Plan, masks: Masks) -> tuple:
    """lengths, the rows by descending length, resets; None where absent."""
    lengths, resets, *_ = masks
    order = None
    if lengths is not None:
        lengths = _check.counts(spec.op, "lengths", lengths, ("B", plan.B), ("T", plan.T))
        order = np.argsort(-np.asarray(lengths), kind="stable")
    if resets is not None:
        resets = _check.resets(spec.op, resets, plan.T, plan.B)
    return lengths, order, resets


def _noise(spec: Spec, plan: Plan, masks: Masks) -> tuple | None:
    """recurrent_mask, zoneout_h, zoneout_c as the kernels take them, None without any."""
    S, T, B = spec.scans, plan.T, plan.B
    noise = masks[2:]
    if all(a is None for a in noise):
        return None
    _refuse_noise(spec, masks)
    for name, letters, expected in (
        ("recurrent_mask", f"B, {'P' if plan.P else 'H'}", (B, plan.R)),
        ("zoneout_h", "T, B, H", (T, B, plan.H)),
        ("zoneout_c", "T, B, H", (T, B, plan.H)),
    ):
        mask = getattr(masks, name)
        if mask is not None:
            _check.floats(spec.op, name, _check.signature(mask), plan.dtype)
            if S == 1 and mask.shape[:1] == (1,):  # a scan of one layer was given it without LD
                _check.shape(spec.op, name, mask.shape[1:], letters, expected)
            else:
                _check.shape(spec.op, name, mask.shape, f"LD, {letters}", (S, *expected))
    return tuple(map(contiguous, noise))


def _refuse_noise(spec: Spec, masks: Masks) -> None:
    """What a cell or a projection leaves no place for."""
    if masks.zoneout_c is not None and not spec.kind.has_c:
        raise ValueError(f"{spec.op}: zoneout_c must not be given: the cell has no c")
    if masks.recurrent_mask is not None and not spec.kind.recurrent:
        raise ValueError(f"{spec.op}: recurrent_mask must not be given: the cell has no w_hh")
    if masks.zoneout and spec.proj:
        raise ValueError(f"{spec.op}: zoneout must not be given with a projection")


def forward(
    spec: Spec,
    x: Array,
    h0: Array | None,
    c0: Array | None,
    weights: Sequence,
    masks: Masks = NO_MASKS,
    *,
    packed: Packed | None = None,
    save: bool = False,
    cell_states: bool = False,
) -> tuple:
    """Run all layers; with `packed`, what `pack` made of the weights, these are not read.

    Returns:
        y (T, B, D R), h_n (L D, B, R), c_n (L D, B, H) or None, c (T, B, D H) of the last layer
        with cell_states, else None, reserve with save, else None.
    """
    plan = plan_for(spec, x, h0, c0, signatures(weights) if packed is None else packed.signatures)
    dtype = plan.dtype
    reserve = np.empty(plan.reserve_size, dtype) if save else None
    call = _call(spec, plan, h0, c0, masks, reserve)
    memory = _pack(plan, weights, call.threads) if packed is None else packed.memory
    h_n = np.empty(plan.h_n, dtype)
    c_n = None if plan.c_n is None else np.empty(plan.c_n, dtype)
    c = np.empty(plan.c, dtype) if cell_states else None
    y, top = rows(x), plan.layers[-1]
    for layer, places in enumerate(plan.layers):
        below, y, scans = y, call.output(layer), []
        for place in places:
            layer_c = c if places is top else None
            scans.append(call.scan(place, below, y, h_n, c_n, layer_c, memory[place.packed]))
        call.run(plan.kernels.forward, scans)
    if c is not None and reserve is not None:
        for place in top:
            np.copyto(_columns(c, place.c), place.kept(reserve)["c"])
    return y, h_n, c_n, c, reserve


def backward(
    spec: Spec,
    x: Array,
    h0: Array | None,
    c0: Array | None,
    weights: Sequence,
    masks: Masks,
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
    plan = plan_for(spec, x, h0, c0, signatures(weights))
    call = _call(spec, plan, h0, c0, masks, reserve)
    _check_cotangents(spec, plan, dy, dh_n, dc_n, dc)
    dh_n, dc_n, dc = contiguous(dh_n), contiguous(dc_n), rows(dc)
    dh0 = np.empty(plan.h_n, plan.dtype)
    dc0 = None if plan.c_n is None else np.empty(plan.c_n, plan.dtype)
    dweights: list = []
    for layer in reversed(range(spec.num_layers)):
        top = layer == spec.num_layers - 1
        layer_x = rows(x) if layer == 0 else call.output(layer - 1)
        layer_y = y if top else call.output(layer)
        scans = []
        for place in plan.layers[layer]:
            scan = call.scan(place, layer_x, layer_y, dh_n, dc_n, None)
            scan.weights, scan.limit = place.weights_of(weights), spec.limit
            scan.dh0, scan.dc0 = dh0[place.index], None if dc0 is None else dc0[place.index]
            scan.dy, scan.dc = _columns(rows(dy), place.y), _columns(dc, place.c) if top else None
            if layer > 0 or needs_x:
                scan.dx = np.empty(layer_x.shape, plan.dtype)
            if needs_weights:
                scan.dweights = _like(scan.weights)
            scans.append(scan)
        call.run(plan.kernels.backward, scans)
        if needs_weights:
            found = [d for scan in scans for d in scan.dweights if d is not None]
            dweights = found + dweights
        dy = scans[0].dx
        if spec.bidirectional and dy is not None:
            dy += scans[1].dx
    return dy, dh0, dc0, dweights if needs_weights else None


def _like(weights: tuple) -> tuple:
    """Memory for their gradients."""
    return tuple([None if w is None else np.empty(w.shape, w.dtype) for w in weights])


def _check_cotangents(spec: Spec, plan: Plan, dy, dh_n, dc_n, dc) -> None:
    D = spec.directions
    for name, value, width in (("dy", dy, D * plan.R), ("dc", dc, D * plan.H)):
        if value is not None:
            _check.floats(spec.op, name, _check.signature(value), plan.dtype)
            letters = "T, B, H" if D == 1 else "T, B, 2H"
            _check.shape(spec.op, name, value.shape, letters, (plan.T, plan.B, width))
    for name, value, width in (("dh_n", dh_n, plan.R), ("dc_n", dc_n, plan.H)):
        check_state(spec, plan, name, _check.signature(value), width)
