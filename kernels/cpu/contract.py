"""What the recurrent kernels take: one `Scan` per direction of a layer, every array with its shape.

Arrays are NumPy arrays of the module's dtype. Nothing is checked here; the API's `_check` has done
it. A kernel entry takes scans that do not depend on each other and runs them side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}  # the order of cells.h
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


@dataclass(slots=True)
class Scan:
    """One direction of one layer. R = P with a projection (P > 0), else R = H.

    "any (t, b)" means any strides over time and batch and consecutive elements in the last axis.
    """

    sizes: tuple[int, int, int, int, int]  # T, B, I, H, P
    x: Any  # (T, B, I), any (t, b)
    weights: tuple  # w_ih (G H, I), w_hh (G H, R), b_ih, b_hh (G H) or None, w_hr (P, H) or None
    reverse: bool
    h0: Any  # (B, R) or None: zeros
    c0: Any  # (B, H) or None: zeros
    lengths: Any  # (B,) int64 or None: all T
    order: Any  # (B,) int64: rows by descending length; None with lengths None
    resets: Any  # (T, B) bool or None
    y: Any  # (T, B, R), any (t, b); forward writes, backward reads
    h_n: Any  # (B, R); backward: its gradient or None
    c_n: Any  # (B, H); backward: its gradient or None
    c: Any  # (T, B, H), any (t, b), or None; needed by the LSTM's backward
    m: Any  # projection only: (T, B, H), or (1, B, H) where backward does not follow
    gates: Any  # (T, B, gate_row) kept for backward, or None
    packed: Any = None  # forward: what `pack` wrote, 64-byte aligned
    dy: Any = None  # (T, B, R), any (t, b), or None: zeros
    dc: Any = None  # (T, B, H), any (t, b), or None: zeros
    dx: Any = None  # (T, B, I) or None: not wanted
    dh0: Any = None  # (B, R)
    dc0: Any = None  # (B, H)
    dweights: tuple | None = None  # as weights, or None: not wanted
