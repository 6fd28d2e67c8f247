"""What the kernels take, every array with its shape: a `Scan` per direction of a recurrent layer,
an `Attention` per call.

Arrays are NumPy arrays of the module's dtype. Nothing is checked here; the API's `_check` has done
it. The recurrent entries take scans that do not depend on each other and run them side by side.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

CELLS = {
    "rnn_tanh": 0,
    "rnn_relu": 1,
    "gru": 2,
    "lstm": 3,
    "layer_norm_gru": 4,
    "layer_norm_lstm": 5,
}


@dataclass(frozen=True, slots=True)
class CompiledCell:
    """A cell that is not one of CELLS: callbacks `void cell(const Tile *)` of cells.h.

    Forward leaves GATES as they are. Backward gets them, H_PREV if dh_direct, C_PREV and the
    gradients, and writes DGATES (the planes, then the parameters), DH_OUT if dh_direct, DC_OUT.
    """

    gates: int  # 1..4
    split: bool  # the last gate comes in two parts, of x and of h, as a GRU's n
    has_c: bool
    recurrent: bool  # takes w_hh
    dh_direct: bool  # h reaches h' also past the gates
    params: int  # per unit
    forward: int  # addresses
    backward: int


@dataclass(frozen=True, slots=True)
class CompiledScoreMod:
    """A function of the scores: callbacks `void mod(const ScoreTile *)` of attention_scores.h."""

    forward: int  # changes the scores
    backward: int  # and gives the derivative by the score


@dataclass(frozen=True, slots=True)
class Noise:
    """What training changes in a scan: recurrent dropout, zoneout."""

    recurrent_mask: Any  # (B, R), multiplied into h before w_hh; or None
    zoneout_h: Any  # (T, B, H), the share of h that stays; None: 0
    zoneout_c: Any
    m_c: Any  # with zoneout: the cell's c', as m


@dataclass(slots=True)
class Scan:
    """One direction of one layer. R = P with a projection (P > 0), else R = H.

    "any (t, b)" means any strides over time and batch and consecutive elements in the last axis.
    """

    sizes: tuple[int, int, int, int, int]  # T, B, I, H, P
    x: Any  # (T, B, I), any (t, b)
    # w_ih (G H, I), w_hh (G H, R), b_ih, b_hh (G H), w_hr (P, H), params (N, H); None where absent
    weights: tuple
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
    # projection or zoneout: the cell's h' (T, B, H), or (1, B, H) where backward does not follow
    m: Any
    gates: Any  # (T, B, gate_row) kept for backward, or None
    packed: Any = None  # forward: what `pack` wrote, 64-byte aligned
    dy: Any = None  # (T, B, R), any (t, b), or None: zeros
    dc: Any = None  # (T, B, H), any (t, b), or None: zeros
    dx: Any = None  # (T, B, I) or None: not wanted
    dh0: Any = None  # (B, R)
    dc0: Any = None  # (B, H)
    dweights: tuple | None = None  # as weights, or None: not wanted
    limit: float | None = None  # of what flows from one step to the one before, each element
    noise: Noise | None = None


CAUSAL = {False: 0, True: 1, "top_left": 1, "bottom_right": 2}
NO_LIMIT = 2**40  # a side of a window that reaches past every key


@dataclass(slots=True)
class Attention:
    """One call. q, k, v and what is of their shapes: any strides, consecutive elements last.

    Packed rows stand as a batch of one, (1, heads, rows, ·), with q_first and k_first given. Where
    addresses come later, `Prepared`, a tuple of strides in elements stands for such an array.
    """

    sizes: tuple[int, int, int, int, int]  # B, NH, NK, D, DV
    q: Any  # (B, NH, L, D)
    k: Any  # (B, NK, S, D)
    v: Any  # (B, NK, S, DV)
    o: Any  # (B, NH, L, DV); forward writes, backward reads
    lse: Any  # (B, NH, L); forward: None where not wanted
    q_lengths: Any  # (B,) int64
    kv_lengths: Any  # (B,) int64
    q_first: Any  # (B,) int64: where each sequence's packed rows start; None: padded
    k_first: Any
    causal: int  # of CAUSAL
    left: int  # keys on each side of the diagonal, or NO_LIMIT
    right: int
    scale: float
    softcap: float  # 0: none
    alibi_slopes: Any  # (B, NH), any strides, or None
    mask: Any  # (B, NH, L, S) bool, any strides, or None
    bias: Any  # (B, NH, L, S), any strides, or None
    seed: int
    threshold: int  # of dropout: a pair is dropped if its 32 bits are below it
    keep_scale: float
    score_mod: CompiledScoreMod | None = None
    do: Any = None  # backward: as o
    dlse: Any = None  # as lse, or None: zeros
    dq: Any = None
    dk: Any = None
    dv: Any = None
    dbias: Any = None  # (B, NH, L, S) of zeros, stride 0 where the bias is broadcast; or None


_Memory = ctypes.c_char * 0  # a third of the time of __array_interface__


def address(a: Any) -> int:
    """Where an array's first element is, which the Numba kernels take."""
    if a.flags.carray:  # contiguous, aligned, writeable
        return ctypes.addressof(_Memory.from_buffer(a))
    return a.__array_interface__["data"][0]
