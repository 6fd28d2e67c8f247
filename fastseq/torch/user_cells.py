"""Users' recurrent cells over torch tensors, with gradients: `scan` of `fastseq`, for tensors."""

from torch import Tensor

from fastseq._cell import Cell
from fastseq.torch.functional import _scan
from fastseq.user_cells import masks_of, spec_of


def scan(
    cell: Cell,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor | None = None,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    params: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
    clip_recurrent_grad: float | None = None,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
) -> tuple:
    """A cell of your own, or one of `fastseq.cells`, over T steps.

        a = W_ih x + b_ih + W_hh (d * h) + b_hh        d: recurrent_mask, else 1
        m, m_c = cell(a_1, ..., a_G, h, c, params)
        h' = z * h + (1 - z) * m                       z: zoneout_h, else 0; c' likewise

    Args:
        cell: what `fastseq.cell` made, or one of `fastseq.cells`, with G gates.
        x: (T, B, I) float32 or float64 on the CPU; any strides.
        w_ih: (G H, I), gates in the order of the cell's arguments.
        w_hh: (G H, H), or None for a cell without it.
        b_ih: (G H,), or None with b_hh: no biases.
        b_hh: (G H,), or None for a cell without w_hh.
        params: (N, H), the parameters per unit in the order of the cell's; None if it has none.
        h0: (B, H) initial state, zeros if None.
        c0: (B, H), zeros if None; only of a cell with c.
        lengths: (B,) int64 in 0..T, any order; steps past a row's length are not computed.
        resets: (T, B) bool; True: the row's states are zero before that step is computed.
        reverse: time runs backwards, for each row from its own end.
        return_cell_states: give c of every step too.
        clip_recurrent_grad: m > 0, or None: no limit. The gradient that flows from a step back into
            the states before it becomes min(max(., -m), m), element by element.
        recurrent_mask: (B, H), or None. Recurrent dropout, as in `fastseq.scan`; not
            differentiable, as those below.
        zoneout_h: (T, B, H), or None. Zoneout: 1 where h keeps its value.
        zoneout_c: (T, B, H), or None: the same for c; only of a cell with c.

    Returns:
        y (T, B, H), or (y, c) with return_cell_states, and h_n (B, H), or (h_n, c_n).

    Raises:
        TypeError: cell is no such cell, an argument is no tensor, or of another dtype.
        ValueError: a shape, limit or length does not fit.
        NotImplementedError: x is on a GPU. ImportError: Numba is not installed.
        RuntimeError: a second derivative is asked for, or one by a mask.

    Accuracy, Cost, Source: `fastseq.scan`, three times its FLOP with gradients.
    Equivalent to: a loop over time around `cell`.
    """
    given = {
        "cell": cell, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "params": params,
        "c0": c0, "reverse": reverse, "return_cell_states": return_cell_states,
        "clip_recurrent_grad": clip_recurrent_grad, "lengths": lengths, "resets": resets,
        "recurrent_mask": recurrent_mask, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c,
    }  # fmt: skip
    spec, weights = spec_of(given)
    masks = masks_of(spec, given)
    y, h_n, c_n, c = _scan(spec, x, weights, h0, c0, masks, return_cell_states)
    last = (h_n, c_n) if cell.has_c else h_n
    return ((y, c) if return_cell_states else y), last
