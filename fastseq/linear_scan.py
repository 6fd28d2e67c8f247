"""Linear recurrences over NumPy arrays, and minGRU and minLSTM built on them.

The projections of minGRU and minLSTM are NumPy's products; the scan is `_linear_scan`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastseq import _check, _linear_scan

Array = np.ndarray


def linear_scan(
    a: Array,
    b: Array,
    h0: Array | None = None,
    *,
    reverse: bool = False,
    lengths: Array | None = None,
    resets: Array | None = None,
) -> tuple[Array, Array]:
    """Linear recurrence over T steps, element by element.

        h_t = a_t * h_{t-1} + b_t

    Args:
        a: (T, B, C) float32 or float64, any strides.
        b: (T, B, C).
        h0: (B, C), or None: zeros.
        reverse: run from the last step to the first; h keeps the order of a.
        lengths: (B,) integers in 0..T, any order, or None: all T. Steps past a row's length are
            not computed and give zeros; the reverse direction starts at each row's own end.
        resets: (T, B) bool, or None. True sets row b's state to zero before step t: h_t = b_t.

    Returns:
        h (T, B, C), the state after every step, and h_n (B, C), each row's last state.

    Raises:
        TypeError: a dtype that is not a's, or not float32 or float64.
        ValueError: a shape or length out of range; the message states both sides.
        ImportError: Numba is not installed.

    Accuracy: each step rounded twice, as by NumPy; where T >= 8192 and C <= 4, in chunks of
        time: float32 within twice torch's own error against float64 (tests). The bits do not
        depend on the thread count or on the other rows of the batch.
    Cost: 2 T B C FLOP and 3 T B C numbers of memory traffic; for backward h is kept. The first
        call on a machine compiles for some seconds, and says so on stderr; then Numba's cache
        has the kernels.
    Equivalent to: for t in range(T): h[t] = h_n = a[t] * h_n + b[t]
    Source: Blelloch, Prefix sums and their applications, 1990 (the chunks).
    """
    return _linear_scan.forward("linear_scan", a, b, h0, lengths, resets, bool(reverse))


def linear_scan_vjp(given: dict) -> tuple[tuple, Callable]:
    """Outputs of `linear_scan`, and their pullback."""
    op, options = "linear_scan", (given["lengths"], given["resets"])
    a, b, h0, reverse = (given[n] for n in ("a", "b", "h0", "reverse"))
    h, h_n = _linear_scan.forward(op, a, b, h0, *options, bool(reverse))

    def pullback(gradients):
        dh, dh_n = gradients
        grads = _linear_scan.backward(op, a, h0, *options, h, dh, dh_n, bool(reverse))
        return *grads[:2], None if h0 is None else grads[2]

    return (h, h_n), pullback


# ---- what minGRU and minLSTM share


def _check_projections(op: str, x, letters: str, given: dict) -> None:
    """x (T, B, I), and w_<letter> (H, I) and b_<letter> (H,) of every letter."""
    _check.floats(op, "x", _check.signature(x))
    _check.rank(op, "x", x.shape, "T, B, I")
    H = 0
    for letter in letters:
        name, w = f"w_{letter}", given[f"w_{letter}"]
        _check.floats(op, name, _check.signature(w), x.dtype)
        _check.rank(op, name, w.shape, "H, I")
        H = w.shape[0] if letter == letters[0] else H
        _check.shape(op, name, w.shape, "H, I", (H, x.shape[2]))
        bias = given[f"b_{letter}"]
        if bias is not None:
            _check.floats(op, f"b_{letter}", _check.signature(bias), x.dtype)
            _check.shape(op, f"b_{letter}", bias.shape, "H,", (H,))
    if given["h0"] is not None:
        _check.floats(op, "h0", _check.signature(given["h0"]), x.dtype)
        _check.shape(op, "h0", given["h0"].shape, "B, H", (x.shape[1], H))


def _active(op: str, x: Array, lengths) -> Array:
    """(T B, I): x with zeros past the rows' lengths, so that nothing there is read."""
    T, B, features = x.shape
    lengths = _check.counts(op, "lengths", lengths, ("B", B), ("T", T))
    if lengths is not None:
        x = np.where((np.arange(T)[:, None] < lengths)[..., None], x, x.dtype.type(0))
    return x.reshape(T * B, features)


def _projected(x: Array, w: Array, bias: Array | None) -> Array:
    y = x @ w.T
    if bias is not None:
        y += bias
    return y


def _sigmoid(k: Array) -> Array:
    """1 / (1 + exp(-k)) without overflow."""
    e = np.exp(-np.abs(k))
    return np.where(k >= 0, 1, e) / (1 + e)


def _log_sigmoid(k: Array) -> Array:
    return np.minimum(k, 0) - np.log1p(np.exp(-np.abs(k)))


class _Cell(NamedTuple):
    """What makes a cell a cell: h' = keep * h + enter * n, n = W_h x + b_h.

    gates(*pre) -> keep, enter, saved                from the other projections of x
    dgates(dlog, saved) -> their gradients           dlog: that of log(enter / keep)
    """

    letters: str  # of the projections, h the last
    gates: Callable
    dgates: Callable


def _min_gru_gates(k: Array) -> tuple:
    return _sigmoid(-k), _sigmoid(k), ()


def _min_gru_dgates(dlog: Array, _) -> tuple:
    return (dlog,)


def _min_lstm_gates(f: Array, i: Array) -> tuple:
    log = _log_sigmoid(i) - _log_sigmoid(f)  # finite where f and i themselves would be 0
    return _sigmoid(-log), _sigmoid(log), (f, i)


def _min_lstm_dgates(dlog: Array, saved: tuple) -> tuple:
    f, i = saved
    return -dlog * _sigmoid(-f), dlog * _sigmoid(-i)


_CELLS = {
    "min_gru": _Cell("zh", _min_gru_gates, _min_gru_dgates),
    "min_lstm": _Cell("fih", _min_lstm_gates, _min_lstm_dgates),
}


@np.errstate(over="ignore", invalid="ignore")
def _run(op: str, given: dict) -> tuple[tuple, tuple]:
    """h and h_n, and what the gradient needs."""
    cell = _CELLS[op]
    _check_projections(op, given["x"], cell.letters, given)
    options = (given["lengths"], given["resets"])
    x = _active(op, given["x"], options[0])
    *pre, n = (_projected(x, given[f"w_{c}"], given[f"b_{c}"]) for c in cell.letters)
    keep, enter, saved = cell.gates(*pre)
    shape = (*given["x"].shape[:2], n.shape[1])
    a, b = keep.reshape(shape), (enter * n).reshape(shape)
    h, h_n = _linear_scan.forward(op, a, b, given["h0"], *options, bool(given["reverse"]))
    return (h, h_n), (x, n, keep, enter, saved)


def min_vjp(op: str, given: dict) -> tuple[tuple, Callable]:
    """Outputs of `min_gru` or `min_lstm`, and their pullback."""
    (h, h_n), (x, n, keep, enter, saved) = _run(op, given)
    cell, h0 = _CELLS[op], given["h0"]
    options = (given["lengths"], given["resets"])

    @np.errstate(over="ignore", invalid="ignore")
    def pullback(gradients):
        dh, dh_n = gradients
        a, reverse = keep.reshape(h.shape), bool(given["reverse"])
        da, db, dh0 = _linear_scan.backward(op, a, h0, *options, h, dh, dh_n, reverse)
        da, db = da.reshape(n.shape), db.reshape(n.shape)
        dlog = (db * n - da) * keep * enter
        dprojections = dict(zip(cell.letters, (*cell.dgates(dlog, saved), db * enter), strict=True))
        found = {"x": np.zeros_like(x), "h0": dh0}
        for c, d in dprojections.items():
            found["x"] += d @ given[f"w_{c}"]
            found[f"w_{c}"] = d.T @ x
            found[f"b_{c}"] = d.sum(axis=0, dtype=np.float64).astype(d.dtype)
        found["x"] = found["x"].reshape(given["x"].shape)
        names = ["x", *(f"w_{c}" for c in cell.letters), *(f"b_{c}" for c in cell.letters), "h0"]
        return tuple(None if given[name] is None else found[name] for name in names)

    return (h, h_n), pullback


def min_gru(
    x: Array,
    w_z: Array,
    w_h: Array,
    b_z: Array | None = None,
    b_h: Array | None = None,
    h0: Array | None = None,
    *,
    lengths: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """Minimal gated recurrent unit over T steps: gates and candidate of x alone.

        z = sigmoid(W_z x + b_z)        n = W_h x + b_h        h' = (1 - z) * h + z * n

    Args:
        x: (T, B, I) float32 or float64, any strides.
        w_z: (H, I).
        w_h: (H, I).
        b_z: (H,), or None: zeros.
        b_h: (H,), or None: zeros.
        h0: (B, H), or None: zeros.
        lengths: (B,) integers in 0..T, any order, or None: all T. Steps past a row's length are
            not read and give zeros; the reverse direction starts at each row's own end.
        resets: (T, B) bool, or None. True sets row b's state to zero before step t.
        reverse: run from the last step to the first; h keeps the order of x.

    Returns:
        h (T, B, H), the state after every step, and h_n (B, H), each row's last state.

    Raises:
        TypeError: a dtype that is not x's, or not float32 or float64.
        ValueError: a shape or length out of range; the message states both sides.
        ImportError: Numba is not installed.

    Accuracy: float32 within twice torch's own error against float64 (tests). The projections are
        NumPy's products, whose last bits may depend on threads and batch size; the scan's do not.
    Cost: 4 H I FLOP per step and row, and `linear_scan`; for backward 4 H values a step and row.
    Equivalent to: linear_scan(1 - z, z * n, h0)
    Source: Feng et al., Were RNNs all we needed?, arXiv:2410.01201, section 3.1.
    """
    return _run("min_gru", locals())[0]


def min_lstm(
    x: Array,
    w_f: Array,
    w_i: Array,
    w_h: Array,
    b_f: Array | None = None,
    b_i: Array | None = None,
    b_h: Array | None = None,
    h0: Array | None = None,
    *,
    lengths: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """Minimal long short-term memory over T steps: gates and candidate of x alone, f + i = 1.

        f = sigmoid(W_f x + b_f)    i = sigmoid(W_i x + b_i)    n = W_h x + b_h
        h' = f / (f + i) * h + i / (f + i) * n

    Args:
        x: (T, B, I) float32 or float64, any strides.
        w_f: (H, I).
        w_i: (H, I).
        w_h: (H, I).
        b_f: (H,), or None: zeros.
        b_i: (H,), or None: zeros.
        b_h: (H,), or None: zeros.
        h0: (B, H), or None: zeros.
        lengths: (B,) integers in 0..T, any order, or None: all T. Steps past a row's length are
            not read and give zeros; the reverse direction starts at each row's own end.
        resets: (T, B) bool, or None. True sets row b's state to zero before step t.
        reverse: run from the last step to the first; h keeps the order of x.

    Returns:
        h (T, B, H), the state after every step, and h_n (B, H), each row's last state.

    Raises:
        TypeError: a dtype that is not x's, or not float32 or float64.
        ValueError: a shape or length out of range; the message states both sides.
        ImportError: Numba is not installed.

    Accuracy: as `min_gru`; f / (f + i) is computed from logarithms and does not underflow.
    Cost: 6 H I FLOP per step and row, and `linear_scan`; for backward 6 H values a step and row.
    Equivalent to: linear_scan(f / (f + i), i / (f + i) * n, h0)
    Source: Feng et al., Were RNNs all we needed?, arXiv:2410.01201, section 3.2.
    """
    return _run("min_lstm", locals())[0]
