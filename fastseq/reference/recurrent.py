"""Recurrent scans RNN, GRU, LSTM: the equations, and backpropagation through time by hand.

    gx_t = W_ih x_t + b_ih                  gh_t = W_hh h_{t-1} + b_hh
    h_t, c_t = cell(gx_t, gh_t, h_{t-1}, c_{t-1})                       y_t = h_t

A cell is the element-wise part, forward and backward; the products, the projection and the loop
over time are the same for all. Letters: T steps, B batch, I input size, H hidden size, G gates
(RNN 1, GRU 3, LSTM 4), P projection size (LSTM), R the size of h: P with a projection, else H.

    x (T, B, I)  w_ih (G*H, I)  w_hh (G*H, R)  b_ih b_hh (G*H,)  w_hr (P, H)  h0 (B, R)  c0 (B, H)
    y (T, B, R)  h_n (B, R)  c_n (B, H)  c (T, B, H)

    lengths (B,)   row b has the steps t < lengths[b]. Past them y and c are zero, x, dy and dc are
                   not read, dx is zero. h_n, c_n are the row's own last state; h0, c0 if length 0.
    resets (T, B)  True: the state of row b is zero before step t is computed, in scan order.
    reverse        t runs downward, for each row from its own end; y stays in the order of x.
    recurrent_mask (B, R)   d: gh_t = W_hh (d * h_{t-1}) + b_hh.
    zoneout_h, zoneout_c (T, B, H)   z: h_t = z * h_{t-1} + (1 - z) * cell's, and c_t likewise.
    clip_recurrent_grad   m: what flows from a step into the state before it, h0 and c0 too, is
                   limited: dh_{t-1}, dc_{t-1} = min(max(., -m), m) (+ what comes from outside).

Biases, h0 and c0 may be None (zeros). Any float dtype; everything is computed in that of x.
`<name>_vjp` takes the arguments of `<name>` and the gradients of its outputs (None: zeros), and
returns {argument: gradient} for the array arguments that were given.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def sigmoid(a):
    """1 / (1 + exp(-a)), to full relative accuracy and without overflow."""
    e = np.exp(-np.abs(a))
    return np.where(a >= 0, 1, e) / (1 + e)


def _rnn_tanh_fwd(gx, gh, h, c):
    """h' = tanh(gx + gh)"""
    h = np.tanh(gx + gh)
    return h, c, h


def _rnn_tanh_bwd(dh, dc, h):
    da = dh * (1 - h**2)
    return da, da, 0, dc


def _rnn_relu_fwd(gx, gh, h, c):
    """h' = max(gx + gh, 0)"""
    h = np.maximum(gx + gh, 0)
    return h, c, h


def _rnn_relu_bwd(dh, dc, h):
    da = np.where(h <= 0, 0, dh)  # a NaN passes its gradient on, as in torch
    return da, da, 0, dc


def _gru_fwd(gx, gh, h, c):
    """Gates r|z|n.

    r = sigmoid(xr + hr)    z = sigmoid(xz + hz)    n = tanh(xn + r * hn)
    h' = (1 - z) * n + z * h
    """
    xr, xz, xn = np.split(gx, 3, axis=-1)
    hr, hz, hn = np.split(gh, 3, axis=-1)
    r = sigmoid(xr + hr)
    z = sigmoid(xz + hz)
    n = np.tanh(xn + r * hn)
    return (1 - z) * n + z * h, c, (r, z, n, hn, h)


def _gru_bwd(dh, dc, saved):
    r, z, n, hn, h = saved
    dn = dh * (1 - z) * (1 - n**2)
    dz = dh * (h - n) * z * (1 - z)
    dr = dn * hn * r * (1 - r)
    dgx = np.concatenate([dr, dz, dn], axis=-1)
    dgh = np.concatenate([dr, dz, dn * r], axis=-1)
    return dgx, dgh, dh * z, dc


def _lstm_fwd(gx, gh, h, c):
    """Gates i|f|g|o.

    i, f, o = sigmoid(xi + hi), sigmoid(xf + hf), sigmoid(xo + ho)    g = tanh(xg + hg)
    c' = f * c + i * g
    h' = o * tanh(c')
    """
    i, f, g, o = np.split(gx + gh, 4, axis=-1)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    c_next = f * c + i * g
    return o * np.tanh(c_next), c_next, (i, f, g, o, c, c_next)


def _lstm_bwd(dh, dc, saved):
    i, f, g, o, c, c_next = saved
    tanh_c = np.tanh(c_next)
    dc = dc + dh * o * (1 - tanh_c**2)
    di = dc * g * i * (1 - i)
    df = dc * c * f * (1 - f)
    dg = dc * i * (1 - g**2)
    do = dh * tanh_c * o * (1 - o)
    da = np.concatenate([di, df, dg, do], axis=-1)
    return da, da, 0, dc * f


class Cell(NamedTuple):
    """The element-wise part of one step.

    fwd: (gx, gh, h, c) -> h', c', saved        bwd: (dh', dc', saved) -> dgx, dgh, dh, dc

    bwd's dh is the direct path; the path through gh is W_hh's. Without a cell state, c has width 0.
    """

    gates: int
    has_c: bool
    fwd: Callable
    bwd: Callable


_RNN = {
    "tanh": Cell(1, False, _rnn_tanh_fwd, _rnn_tanh_bwd),
    "relu": Cell(1, False, _rnn_relu_fwd, _rnn_relu_bwd),
}
_GRU = Cell(3, False, _gru_fwd, _gru_bwd)
_LSTM = Cell(4, True, _lstm_fwd, _lstm_bwd)


class Weights(NamedTuple):
    """The parameters of one layer and direction; None where absent."""

    w_ih: np.ndarray
    w_hh: np.ndarray
    b_ih: np.ndarray | None = None
    b_hh: np.ndarray | None = None
    w_hr: np.ndarray | None = None


def _affine(x, w, b):
    return x @ w.T if b is None else x @ w.T + b


@np.errstate(over="ignore", invalid="ignore")
def _step_fwd(cell, w, x, h, c, d=1):
    """One step of any cell: gx, gh, the cell, and h' = W_hr m with a projection (m the cell's h').

    Returns h', c', saved.
    """
    gx = _affine(x, w.w_ih, w.b_ih)
    gh = _affine(d * h, w.w_hh, w.b_hh)
    m, c_next, gates = cell.fwd(gx, gh, h, c)
    h_next = m if w.w_hr is None else m @ w.w_hr.T
    return h_next, c_next, (x, h, m, gates, d)


@np.errstate(over="ignore", invalid="ignore")
def _step_bwd(cell, w, dw, dh, dc, saved):
    """The gradients of one step: adds those of the weights to dw, returns dx, dh, dc."""
    x, h, m, gates, d = saved
    if w.w_hr is not None:
        dw["w_hr"] += dh.T @ m
        dh = dh @ w.w_hr
    dgx, dgh, dh, dc = cell.bwd(dh, dc, gates)
    dw["w_ih"] += dgx.T @ x
    dw["w_hh"] += dgh.T @ (d * h)
    if w.b_ih is not None:
        dw["b_ih"] += dgx.sum(axis=0)
    if w.b_hh is not None:
        dw["b_hh"] += dgh.sum(axis=0)
    return dgx @ w.w_ih, dh + d * (dgh @ w.w_hh), dc


def _schedule(T, B, lengths, resets, reverse):
    """The scan in order: (t, the rows computed at t, those of them whose state is zeroed first)."""
    lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
    for t in range(T)[::-1] if reverse else range(T):
        active = t < lengths
        reset = active & resets[t] if resets is not None else np.zeros(B, bool)
        yield t, np.flatnonzero(active), np.flatnonzero(reset)


def _limited(d, limit):
    """min(max(d, -limit), limit); NaN stays NaN."""
    return d if limit is None else np.clip(d, -limit, limit)


def _or_zeros(given, shape, dtype):
    return np.zeros(shape, dtype) if given is None else np.array(given, dtype)


def _scan_fwd(
    cell, w, x, h0=None, c0=None, lengths=None, resets=None, reverse=False,
    recurrent_mask=None, zoneout_h=None, zoneout_c=None,
):  # fmt: skip
    """Returns y, c, h_n, c_n and the tape [(t, rows, reset, saved)] that _scan_bwd rewinds."""
    T, B, _ = x.shape
    R = w.w_hh.shape[1]  # = P with a projection
    C = w.w_hh.shape[0] // cell.gates if cell.has_c else 0
    h, c = _or_zeros(h0, (B, R), x.dtype), _or_zeros(c0, (B, C), x.dtype)
    y, cs = np.zeros((T, B, R), x.dtype), np.zeros((T, B, C), x.dtype)
    tape = []
    for t, rows, reset in _schedule(T, B, lengths, resets, reverse):
        h[reset] = c[reset] = 0
        d = 1 if recurrent_mask is None else recurrent_mask[rows]
        *made, saved = _step_fwd(cell, w, x[t, rows], h[rows], c[rows], d)
        z_h, z_c = (None if z is None else z[t, rows] for z in (zoneout_h, zoneout_c))
        h[rows] = made[0] if z_h is None else z_h * h[rows] + (1 - z_h) * made[0]
        c[rows] = made[1] if z_c is None else z_c * c[rows] + (1 - z_c) * made[1]
        y[t, rows], cs[t, rows] = h[rows], c[rows]
        tape.append((t, rows, reset, saved))
    return y, cs, h, c, tape


@np.errstate(over="ignore", invalid="ignore")
def _scan_bwd(
    cell, w, x, h0=None, c0=None, *,
    dy=None, dc=None, dh_n=None, dc_n=None, clip_recurrent_grad=None, **scan,
):  # fmt: skip
    """Backpropagation through time: {argument: gradient} of the arrays that are not None."""
    y, cs, h_n, c_n, tape = _scan_fwd(cell, w, x, h0, c0, **scan)
    zoneout = scan.get("zoneout_h"), scan.get("zoneout_c")
    dy, dcs = _or_zeros(dy, y.shape, x.dtype), _or_zeros(dc, cs.shape, x.dtype)
    dh, dc = _or_zeros(dh_n, h_n.shape, x.dtype), _or_zeros(dc_n, c_n.shape, x.dtype)
    dx = np.zeros_like(x)
    dw = {name: np.zeros_like(a) for name, a in w._asdict().items() if a is not None}
    for t, rows, reset, saved in reversed(tape):
        dh[rows] += dy[t, rows]
        dc[rows] += dcs[t, rows]
        past = [
            0 if z is None else z[t, rows] * d[rows] for z, d in zip(zoneout, (dh, dc), strict=True)
        ]
        dx[t, rows], *flow = _step_bwd(cell, w, dw, dh[rows] - past[0], dc[rows] - past[1], saved)
        flow = [d + p for d, p in zip(flow, past, strict=True)]
        dh[rows], dc[rows] = (_limited(d, clip_recurrent_grad) for d in flow)
        dh[reset] = dc[reset] = 0
    initial = {"h0": (h0, dh), "c0": (c0, dc)}
    return {"x": dx} | dw | {name: d for name, (a, d) in initial.items() if a is not None}


def rnn(
    x,
    w_ih,
    w_hh,
    b_ih=None,
    b_hh=None,
    h0=None,
    *,
    nonlinearity="tanh",
    lengths=None,
    resets=None,
    reverse=False,
    clip_recurrent_grad=None,
):
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or max(., 0) for "relu". Returns y, h_n."""
    w = Weights(w_ih, w_hh, b_ih, b_hh)
    y, _, h_n, _, _ = _scan_fwd(_RNN[nonlinearity], w, x, h0, None, lengths, resets, reverse)
    return y, h_n


def rnn_vjp(x, w_ih, w_hh, b_ih=None, b_hh=None, h0=None, *, nonlinearity="tanh", **scan):
    """Gradients of sum(dy * y) + sum(dh_n * h_n); scan: `rnn`'s options, dy, dh_n."""
    return _scan_bwd(_RNN[nonlinearity], Weights(w_ih, w_hh, b_ih, b_hh), x, h0, **scan)


def gru(
    x,
    w_ih,
    w_hh,
    b_ih=None,
    b_hh=None,
    h0=None,
    *,
    lengths=None,
    resets=None,
    reverse=False,
    clip_recurrent_grad=None,
):
    """The gated recurrent unit, reset after the product; gates r|z|n. Returns y, h_n.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)    h' = (1 - z) * n + z * h
    """
    w = Weights(w_ih, w_hh, b_ih, b_hh)
    y, _, h_n, _, _ = _scan_fwd(_GRU, w, x, h0, None, lengths, resets, reverse)
    return y, h_n


def gru_vjp(x, w_ih, w_hh, b_ih=None, b_hh=None, h0=None, **scan):
    """Gradients of sum(dy * y) + sum(dh_n * h_n); scan: `rnn`'s options, dy, dh_n."""
    return _scan_bwd(_GRU, Weights(w_ih, w_hh, b_ih, b_hh), x, h0, **scan)


def lstm(
    x,
    w_ih,
    w_hh,
    b_ih=None,
    b_hh=None,
    h0=None,
    c0=None,
    *,
    w_hr=None,
    lengths=None,
    resets=None,
    reverse=False,
    return_cell_states=False,
    clip_recurrent_grad=None,
):
    """Long short-term memory; gates i|f|g|o. Returns y, (h_n, c_n) or (y, c), (h_n, c_n).

    i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)    g = tanh(W_ig x + b_ig + W_hg h + b_hg)
    f = sigmoid(W_if x + b_if + W_hf h + b_hf)    c' = f * c + i * g
    o = sigmoid(W_io x + b_io + W_ho h + b_ho)    h' = o * tanh(c'), or W_hr (o * tanh(c'))
    """
    w = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
    y, c, h_n, c_n, _ = _scan_fwd(_LSTM, w, x, h0, c0, lengths, resets, reverse)
    return ((y, c) if return_cell_states else y), (h_n, c_n)


def lstm_vjp(x, w_ih, w_hh, b_ih=None, b_hh=None, h0=None, c0=None, *, w_hr=None, **scan):
    """Gradients of sum(dy * y) + sum(dc * c) + sum(dh_n * h_n) + sum(dc_n * c_n).

    scan: lengths, resets, reverse, clip_recurrent_grad, dy, dc, dh_n, dc_n.
    """
    return _scan_bwd(_LSTM, Weights(w_ih, w_hh, b_ih, b_hh, w_hr), x, h0, c0, **scan)


def rnn_cell(x, h, w_ih, w_hh, b_ih=None, b_hh=None, *, nonlinearity="tanh"):
    """One step of `rnn`: x (B, I), h (B, H) -> h'."""
    h, _, _ = _step_fwd(_RNN[nonlinearity], Weights(w_ih, w_hh, b_ih, b_hh), x, h, None)
    return h


def gru_cell(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
    """One step of `gru`: x (B, I), h (B, H) -> h'."""
    h, _, _ = _step_fwd(_GRU, Weights(w_ih, w_hh, b_ih, b_hh), x, h, None)
    return h


def lstm_cell(x, h, c, w_ih, w_hh, b_ih=None, b_hh=None, *, w_hr=None):
    """One step of `lstm`: x (B, I), h (B, R), c (B, H) -> h', c'."""
    h, c, _ = _step_fwd(_LSTM, Weights(w_ih, w_hh, b_ih, b_hh, w_hr), x, h, c)
    return h, c
