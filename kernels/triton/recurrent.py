"""Recurrent scans for CUDA tensors: RNN, GRU, LSTM, forward and backward.

Two regimes, by the size of W_hh alone:

    whole     W_hh fits in one SM's registers: one launch for the whole sequence, a program per
              tile of rows, which keeps W_hh and the states in registers
    by step   else one launch per step, a program per tile of rows and units: product and cell
              fused; the launches of a call are the same for the same shapes, so that a CUDA graph
              (torch.cuda.graphs, torch.compile's "reduce-overhead") can hold them

Bounds of the first, in units H: `_WHOLE`. Gate order, planes: `cells.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastseq.kernels.triton.cells import GATES, HIDDEN_PLANE, KEPT, PLANES
from fastseq.kernels.triton.launch import Row, cdiv, choose, on, precision
from fastseq.kernels.triton.recurrent_backward import scan_backward
from fastseq.kernels.triton.recurrent_forward import scan_forward


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
    c_state: Any = None  # forward: (B, H) float32, initial to last; backward: its gradient
    dh_state: Any = None  # backward: (B, H) float32, dh_n to dh0
    dy: Any = None  # (T, B, H), any (t, b), or None
    dc: Any = None
    dg: Any = None  # (T, B, PLANES H); past lengths it is not written


_BY_STEP = {"WHOLE": False, "BB": 16, "HU": 16, "BK": 64, "num_warps": 4, "num_stages": 3}


def _whole(up_to: int, itemsize: int, num_warps: int, rows: int = 16) -> Row:
    meta = {"WHOLE": True, "BB": rows, "BK": 16, "num_warps": num_warps, "num_stages": 1}
    return Row(up_to, itemsize, 0, meta)


_WHOLE = {
    "forward": {
        1: [_whole(64, 2, 4), _whole(256, 2, 8), _whole(32, 4, 4), _whole(128, 4, 8)],
        3: [_whole(32, 2, 4), _whole(128, 2, 8), _whole(32, 4, 4), _whole(64, 4, 8)],
        4: [_whole(32, 2, 4), _whole(128, 2, 8), _whole(32, 4, 4), _whole(64, 4, 8)],
    },
    "backward": {
        1: [_whole(64, 2, 4), _whole(256, 2, 8), _whole(32, 4, 4), _whole(128, 4, 8)],
        3: [_whole(32, 2, 4), _whole(128, 2, 8), _whole(32, 4, 4), _whole(64, 4, 8)],
        4: [_whole(32, 2, 4), _whole(128, 2, 8), _whole(32, 4, 4), _whole(64, 4, 8)],
    },
}
_ANY_SIZE = [Row(float("inf"), itemsize, 0, _BY_STEP) for itemsize in (2, 4)]


def plan(scan: Scan, way: str) -> dict[str, Any]:
    """The kernel's constants; way: forward or backward."""
    _, _, H = scan.sizes
    G = GATES[scan.cell]
    meta = dict(choose(_WHOLE[way][G] + _ANY_SIZE, H, scan.w_hh))
    if meta["WHOLE"]:
        meta["HU"] = max(16, 1 << (H - 1).bit_length())
    fixed = {"CELL": scan.cell, "G": G, "KEPT": KEPT[scan.cell], "H": H}
    fixed |= {"REVERSE": scan.reverse, "PRECISION": precision(scan.w_hh.dtype)}
    return meta | fixed


def _strides(a) -> tuple[int, int]:
    return (0, 0) if a is None else a.stride()[:2]


def _steps(meta, T: int) -> list[tuple[int, int]]:
    return [(0, T)] if meta["WHOLE"] else [(s, s + 1) for s in range(T)]


def _grid(scan: Scan, meta) -> tuple[int, int]:
    _, B, H = scan.sizes
    return cdiv(B, meta["BB"]), cdiv(H, meta["HU"])


def forward(scan: Scan) -> Any:
    """Fill y, c, kept and c_state; returns the part of h_state that holds the last states."""
    T, B, _ = scan.sizes
    meta = plan(scan, "forward")
    arrays = (scan.gx, scan.w_hh, scan.b_hn, scan.lengths, scan.order, scan.resets)
    arrays += (scan.h_state, scan.c_state, scan.y, scan.c, scan.kept)
    strides = (*_strides(scan.y), *_strides(scan.c))
    with on(scan.y):
        for first, last in _steps(meta, T):
            scan_forward[_grid(scan, meta)](*arrays, T, B, first, last, *strides, **meta)
    return scan.h_state[1 if meta["WHOLE"] else T % 2]


def backward(scan: Scan) -> None:
    """Fill dg; dh_state and c_state become the gradients of the initial states."""
    T, B, _ = scan.sizes
    cell = scan.cell
    meta = plan(scan, "backward") | {"PLANES": PLANES[cell], "HIDDEN": HIDDEN_PLANE[cell]}
    arrays = (scan.w_hh, scan.lengths, scan.order, scan.resets, scan.h0, scan.c0)
    arrays += (scan.dh_state, scan.c_state, scan.y, scan.c, scan.kept, scan.dy, scan.dc, scan.dg)
    strides = [n for a in (scan.y, scan.c, scan.dy, scan.dc) for n in _strides(a)]
    steps = _steps(meta, T)[::-1] + [(0, 0)] * (not meta["WHOLE"])
    with on(scan.y):
        for first, last in steps:
            scan_backward[_grid(scan, meta)](*arrays, T, B, first, last, *strides, **meta)
