"""Recurrent scans for CUDA tensors: RNN, GRU, LSTM, forward and backward.

Three regimes, by the size of W_hh and, between the last two, whether the GPU holds all programs at
once (`recurrent_forward.py` says what they do):

    whole     one launch, a program per tile of rows: W_hh fits one SM. Up to H =
                            RNN    GRU    LSTM
              2 bytes       256    128    128
              float32       128    128     64
    together  one cooperative launch, a program per tile of rows and of units: W_hh is spread over
              the SMs, and stays there up to H = 512 (RNN 1024) of 2 bytes. Up to H = 2048, while
              rows and units make no more programs than the GPU has SMs
    step      one launch per step. The launches of a call are the same for the same shapes, so that
              a CUDA graph (torch.cuda.graphs, torch.compile's "reduce-overhead") can hold them
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from fastseq.kernels.triton.cells import GATES, HIDDEN_PLANE, KEPT, PLANES
from fastseq.kernels.triton.launch import Row, cdiv, choose, multiprocessors, on, precision
from fastseq.kernels.triton.recurrent_backward import recurrent_bwd
from fastseq.kernels.triton.recurrent_forward import recurrent_fwd


@dataclass(slots=True)
class Scan:
    """One direction of one layer. "any (t, b)": any strides but for consecutive last elements.

    The dtype is that of w_hh, but for the float32 states. R = H: a projection is the caller's.
    """

    cell: str
    sizes: tuple[int, int, int]  # T, B, H
    reverse: bool
    w_hh: Any  # (G H, H), contiguous, as all that follows
    b_hn: Any  # (H,) or None: the GRU's bias inside r * (...); other biases are in gx
    lengths: Any  # (B,) int64 or None
    order: Any  # (B,) int64: rows by descending length; None with lengths None
    resets: Any  # (T, B) bool as uint8, or None
    h0: Any  # (B, H) or None: backward
    c0: Any
    y: Any  # (T, B, H), any (t, b); past lengths it is not written
    c: Any  # (T, B, H), any (t, b), or None; needed by the LSTM's backward
    kept: Any  # (T, B, KEPT H), or None
    gx: Any = None  # forward: (T, B, G H); an LSTM's may be `kept` itself
    h_state: Any = None  # forward: (2, B, H) float32, initial states in [0]
    shared: Any = None  # forward: (2, B, H), scratch
    arrived: Any = None  # (B,) int32, zeros
    c_state: Any = None  # forward: (B, H) float32, initial to last; backward: its gradient
    dh_state: Any = None  # backward: (B, H) float32, dh_n to dh0
    dy: Any = None  # (T, B, H), any (t, b), or None
    dc: Any = None
    dg: Any = None  # (T, B, PLANES H); past lengths it is not written
    limit: float | None = None  # of what flows from one step to the one before, each element


def _whole(up_to: int, itemsize: int, num_warps: int) -> Row:
    # float32 products have no tensor core to fill with 16 rows: fewer rows, more programs
    meta = {"REGIME": "whole", "BB": 16 if itemsize == 2 else 4, "num_warps": num_warps}
    return Row(up_to, itemsize, 0, meta | {"num_stages": 1})


def _together(up_to: int, itemsize: int, **blocks: int) -> Row:
    meta = {"REGIME": "together", "BB": 16, "num_warps": 4, "launch_cooperative_grid": True}
    return Row(up_to, itemsize, 90, meta | blocks)


_STEP = {"REGIME": "step", "BB": 16, "HU": 16, "BK": 64, "num_warps": 4, "num_stages": 3}

# By gates. Registers and shared memory hold these without spilling, says ptxas for sm_90.
_SMALL = [_whole(32, 2, 4), _whole(128, 2, 8), _whole(32, 4, 4), _whole(64, 4, 8)]
WHOLE = {
    1: [_whole(64, 2, 4), _whole(256, 2, 8), *_SMALL, _whole(128, 4, 16)],
    3: [*_SMALL, _whole(128, 4, 16)],
    4: _SMALL,
}
_KEPT = {"HU": 16, "num_stages": 1}
_SLICED = {2: {"HU": 16, "BK": 128, "num_stages": 3}, 4: {"HU": 8, "BK": 64, "num_stages": 3}}
_LARGE = [_together(2048, itemsize, **blocks) for itemsize, blocks in _SLICED.items()]
TOGETHER = {
    1: [_together(1024, 2, **_KEPT), *_LARGE],
    3: [_together(512, 2, **_KEPT), *_LARGE],
    4: [_together(512, 2, **_KEPT), *_LARGE],
}
STEP = [Row(float("inf"), itemsize, 0, _STEP) for itemsize in (2, 4)]


def plan(scan: Scan) -> dict[str, Any]:
    """The kernels' constants."""
    _, _, H = scan.sizes
    G = GATES[scan.cell]
    padded = max(16, 1 << (H - 1).bit_length())
    meta = {"BK": padded, "HU": padded} | choose(WHOLE[G] + TOGETHER[G] + STEP, H, scan.w_hh)
    if meta["REGIME"] == "together" and prod(_grid(scan, meta)) > multiprocessors(scan.w_hh):
        meta = choose(STEP, H, scan.w_hh)
    fixed = {"CELL": scan.cell, "G": G, "KEPT": KEPT[scan.cell], "H": H}
    fixed |= {"REVERSE": scan.reverse, "PRECISION": precision(scan.w_hh.dtype)}
    return meta | fixed


def _strides(a) -> tuple[int, int]:
    return (0, 0) if a is None else a.stride()[:2]


def _grid(scan: Scan, meta) -> tuple[int, int]:
    _, B, H = scan.sizes
    return cdiv(B, meta["BB"]), cdiv(H, meta["HU"])


def forward(scan: Scan) -> Any:
    """Fill y, c, kept and c_state; returns the part of h_state that holds the last states."""
    T, B, _ = scan.sizes
    meta, h = plan(scan), scan.h_state
    steps = [(s, s + 1) for s in range(T)] if meta["REGIME"] == "step" else [(0, T)]
    before = (scan.gx, scan.w_hh, scan.b_hn, scan.lengths, scan.order, scan.resets)
    after = (scan.c_state, scan.shared, scan.arrived, scan.y, scan.c, scan.kept)
    strides = (*_strides(scan.y), *_strides(scan.c))
    with on(scan.y):
        for i, (first, last) in enumerate(steps):
            arrays = (*before, h[i % 2], h[(i + 1) % 2], *after)
            recurrent_fwd[_grid(scan, meta)](*arrays, T, B, first, last, *strides, **meta)
    return h[len(steps) % 2]


def backward(scan: Scan) -> None:
    """Fill dg; dh_state and c_state become the gradients of the initial states."""
    T, B, _ = scan.sizes
    cell = scan.cell
    meta = plan(scan) | {"PLANES": PLANES[cell], "HIDDEN": HIDDEN_PLANE[cell]}
    steps = [(s, s + 1) for s in reversed(range(T))] + [(0, 0)]
    steps = steps if meta["REGIME"] == "step" else [(0, T)]
    arrays = (scan.w_hh, scan.lengths, scan.order, scan.resets, scan.h0, scan.c0, scan.dh_state)
    arrays += (scan.c_state, scan.arrived, scan.y, scan.c, scan.kept, scan.dy, scan.dc, scan.dg)
    strides = [n for a in (scan.y, scan.c, scan.dy, scan.dc) for n in _strides(a)]
    with on(scan.y):
        for first, last in steps:
            sizes = (T, B, first, last, *strides)
            recurrent_bwd[_grid(scan, meta)](*arrays, scan.limit, *sizes, **meta)
