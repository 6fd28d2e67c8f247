"""A cell of `scan` over time: its function called at every step, derivatives by the complex step.

    df/da = Im f(a + i e) / e        e = 1e-100: no difference is taken, so it is exact to rounding

Squire & Trapp, Using complex variables to estimate derivatives of real functions, 1998. It needs a
function without absolute values; np.maximum, np.where and comparisons look at the real part. The
products, the loop over time and its options are those of `recurrent.py`; letters as there, params
(N, H) the parameters per unit, one row for each of the cell's. A cell whose units see each other
takes whole rows, and every number of a row is moved by itself.
"""

import numpy as np

from fastseq._cell import RowCell
from fastseq.reference.recurrent import Cell, Weights, _scan_bwd, _scan_fwd

STEP = 1e-100


def _arguments(cell, gx, gh, h, c, params):
    """The function's arguments by name: a gate in two parts has its row of W_ih x and of W_hh h."""
    gx, gh = np.split(gx, cell.gates, axis=-1), np.split(gh, cell.gates, axis=-1)
    found = {"h": h, "c": c} | dict(zip(cell.parameters, params, strict=True))
    planes = cell.planes
    if len(planes) > cell.gates:
        found |= {planes[0]: gx[-1], planes[-1]: gh[-1]}
        planes = planes[1:-1]
    return found | {name: gx[k] + gh[k] for k, name in enumerate(planes)}


def _results(cell, found):
    """h', and c' or nothing."""
    shape = np.broadcast_shapes(*(a.shape for n, a in found.items() if n in cell.planes))
    results = cell.function(*(found[name] for name in cell.arguments))
    results = results if isinstance(results, tuple) else (results,)
    return [np.broadcast_to(r, shape) for r in results]


def _derivatives(cell, found, name):
    """Those of the results by one argument."""
    moved = found | {name: found[name] + 1j * STEP}
    return [np.imag(r) / STEP for r in _results(cell, moved)]


def _bound(cell, params):
    """The cell with these parameters, and the gradients of them that its backward adds up."""
    if isinstance(cell, RowCell):
        return _bound_rows(cell, params)
    params = np.zeros((0, 0)) if params is None else params
    dparams = np.zeros_like(params)

    def fwd(gx, gh, h, c):
        found = _arguments(cell, gx, gh, h, c, params)
        h_next, *c_next = _results(cell, found)
        return h_next, c_next[0] if c_next else c, found

    def bwd(dh, dc, found):
        def pulled(name):
            derivatives = _derivatives(cell, found, name)
            return sum(d * by for d, by in zip((dh, dc), derivatives, strict=False))

        for k, name in enumerate(cell.parameters):
            dparams[k] += pulled(name).sum(axis=0)
        planes = [pulled(name) for name in cell.planes]
        split = len(planes) > cell.gates
        dgx = np.concatenate([*planes[1:-1], planes[0]] if split else planes, axis=-1)
        dgh = np.concatenate(planes[1:] if split else planes, axis=-1)
        dh_direct = pulled("h") if "h" in cell.arguments else 0
        return dgx, dgh, dh_direct, pulled("c") if cell.has_c else dc

    return Cell(cell.gates, cell.has_c, fwd, bwd), dparams


def _bound_rows(cell, params):
    """The same for a cell of whole rows."""
    dparams = np.zeros_like(params)

    def fwd(gx, gh, h, c):
        found = dict(zip(cell.arguments, (gx, gh, c if cell.has_c else h, params), strict=True))
        results = cell.function(*found.values())
        h_next, c_next = results if cell.has_c else (results, c)
        return h_next, c_next, found

    def bwd(dh, dc, found):
        def pulled(name, *at):
            """Of each row's dh h' + dc c' by one number of an argument."""
            moved = found | {name: found[name].astype(complex)}
            moved[name][at] += 1j * STEP
            results = cell.function(*moved.values())
            results = results if cell.has_c else (results,)
            flow = zip((dh, dc), results, strict=False)
            return sum((d * np.imag(r) / STEP).sum(axis=-1) for d, r in flow)

        def pulled_rows(name):
            columns = range(found[name].shape[-1])
            return np.stack([pulled(name, ..., k) for k in columns], axis=-1)

        for at in np.ndindex(params.shape):
            dparams[at] += pulled("params", *at).sum()
        dgx, dgh = pulled_rows("gx"), pulled_rows("gh")
        return (dgx, dgh, 0, pulled_rows("c")) if cell.has_c else (dgx, dgh, pulled_rows("h"), dc)

    return Cell(cell.gates, cell.has_c, fwd, bwd), dparams


def _weights(cell, w_ih, w_hh, b_ih, b_hh):
    """Without w_hh, one of zeros."""
    H = w_ih.shape[0] // cell.gates
    w_hh = np.zeros((cell.gates * H, H), w_ih.dtype) if w_hh is None else w_hh
    return Weights(w_ih, w_hh, b_ih, b_hh)


def scan(
    cell,
    x,
    w_ih,
    w_hh=None,
    b_ih=None,
    b_hh=None,
    params=None,
    h0=None,
    c0=None,
    *,
    lengths=None,
    resets=None,
    reverse=False,
    return_cell_states=False,
    clip_recurrent_grad=None,
    **noise,
):
    """h', c' = cell(W_ih x + b_ih + W_hh h + b_hh, h, c, params); returns as `fastseq.scan`.

    noise: recurrent_mask, zoneout_h, zoneout_c.
    """
    bound, _ = _bound(cell, params)
    w = _weights(cell, w_ih, w_hh, b_ih, b_hh)
    y, c, h_n, c_n, _ = _scan_fwd(bound, w, x, h0, c0, lengths, resets, reverse, **noise)
    last = (h_n, c_n) if cell.has_c else h_n
    return ((y, c) if return_cell_states else y), last


def scan_vjp(
    cell, x, w_ih, w_hh=None, b_ih=None, b_hh=None, params=None, h0=None, c0=None, **options
):
    """Gradients of sum(dy * y) + sum(dc * c) + sum(dh_n * h_n) + sum(dc_n * c_n).

    options: lengths, resets, reverse, clip_recurrent_grad, noise as in `scan`, dy, dc, dh_n, dc_n.
    """
    bound, dparams = _bound(cell, params)
    w = _weights(cell, w_ih, w_hh, b_ih, b_hh)
    found = _scan_bwd(bound, w, x, h0, c0, **options)
    if w_hh is None:
        del found["w_hh"]
    return found | ({} if params is None else {"params": dparams})
