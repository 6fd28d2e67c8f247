"""Linear recurrences, and minGRU and minLSTM built on them: the equations, gradients by hand.

    h_t = a_t * h_{t-1} + b_t                                            (element by element)

Letters: T steps, B batch, C columns; of minGRU and minLSTM I inputs, H hidden units.

    a b h (T, B, C)  h0 h_n (B, C)      x (T, B, I)  w_z w_h w_f w_i (H, I)  b_z b_h b_f b_i (H,)

    lengths, resets, reverse: as in recurrent.py. a_t is not read where row b is reset: h_t = b_t.

Biases and h0 may be None (zeros). Any float dtype; everything is computed in that of a, or x.
`<name>_vjp` takes the arguments of `<name>` and the gradients of its outputs (None: zeros), and
returns {argument: gradient} for the array arguments that were given.
"""

import numpy as np

from fastseq.reference.recurrent import _or_zeros, _schedule, sigmoid


@np.errstate(over="ignore", invalid="ignore")
def linear_scan(a, b, h0=None, *, reverse=False, lengths=None, resets=None):
    """h_t = a_t * h_{t-1} + b_t. Returns h (T, B, C) and h_n (B, C)."""
    T, B, C = a.shape
    state, h = _or_zeros(h0, (B, C), a.dtype), np.zeros_like(a)
    for t, rows, reset in _schedule(T, B, lengths, resets, reverse):
        state[rows] = a[t, rows] * state[rows] + b[t, rows]
        state[reset] = b[t, reset]
        h[t, rows] = state[rows]
    return h, state


@np.errstate(over="ignore", invalid="ignore")
def linear_scan_vjp(a, b, h0=None, *, reverse=False, lengths=None, resets=None, dh=None, dh_n=None):
    """Gradients of sum(dh * h) + sum(dh_n * h_n).

    g_t = dh_t + a_{t+1} g_{t+1}      db_t = g_t      da_t = g_t * h_{t-1}      dh0 = a_0 g_0
    """
    T, B, C = a.shape
    h, _ = linear_scan(a, b, h0, reverse=reverse, lengths=lengths, resets=resets)
    dh, g = _or_zeros(dh, h.shape, a.dtype), _or_zeros(dh_n, (B, C), a.dtype)
    da, db = np.zeros_like(a), np.zeros_like(a)
    before = _or_zeros(h0, (B, C), a.dtype)  # h_{t-1} of every row, by the steps in scan order
    steps = []
    for t, rows, reset in _schedule(T, B, lengths, resets, reverse):
        steps.append((t, rows, reset, before.copy()))
        before[rows] = h[t, rows]
    for t, rows, reset, before in reversed(steps):
        g[rows] += dh[t, rows]
        db[t, rows] = g[rows]
        da[t, rows] = g[rows] * before[rows]
        g[rows] = a[t, rows] * g[rows]
        da[t, reset] = g[reset] = 0
    return {"a": da, "b": db} | ({} if h0 is None else {"h0": g})


def _linear(x, w, bias):
    """W x + bias"""
    return x @ w.T if bias is None else x @ w.T + bias


def _linear_vjp(x, w, dy):
    """dx, dw, dbias"""
    return dy @ w, np.einsum("tbh,tbi->hi", dy, x), dy.sum(axis=(0, 1))


def _active(x, lengths):
    """x with zeros past the rows' lengths: nothing there is read."""
    if lengths is None:
        return x
    return np.where(np.arange(len(x))[:, None, None] < np.asarray(lengths)[:, None], x, 0)


def _gradients(x, h0, projections, scan):
    """{argument: gradient} of projections {letter: (w, bias, d(W x + bias))} and of the scan."""
    found = {"x": np.zeros_like(x)}
    for letter, (w, bias, dy) in projections.items():
        dx, found[f"w_{letter}"], dbias = _linear_vjp(x, w, dy)
        found["x"] += dx
        if bias is not None:
            found[f"b_{letter}"] = dbias
    return found | ({} if h0 is None else {"h0": scan["h0"]})


def min_gru(x, w_z, w_h, b_z=None, b_h=None, h0=None, *, lengths=None, resets=None, reverse=False):
    """h_t = (1 - z_t) * h_{t-1} + z_t * n_t. Returns h, h_n.

    z = sigmoid(W_z x + b_z)      n = W_h x + b_h
    """
    x = _active(x, lengths)
    k, n = _linear(x, w_z, b_z), _linear(x, w_h, b_h)
    options = {"lengths": lengths, "resets": resets, "reverse": reverse}
    return linear_scan(sigmoid(-k), sigmoid(k) * n, h0, **options)  # 1 - sigmoid(k) = sigmoid(-k)


def min_gru_vjp(x, w_z, w_h, b_z=None, b_h=None, h0=None, **scan):
    """Gradients of sum(dh * h) + sum(dh_n * h_n); scan: lengths, resets, reverse, dh, dh_n."""
    x = _active(x, scan.get("lengths"))
    k, n = _linear(x, w_z, b_z), _linear(x, w_h, b_h)
    z = sigmoid(k)
    d = linear_scan_vjp(sigmoid(-k), z * n, h0, **scan)
    dk = (d["b"] * n - d["a"]) * z * sigmoid(-k)
    return _gradients(x, h0, {"z": (w_z, b_z, dk), "h": (w_h, b_h, d["b"] * z)}, d)


def _softplus(k):
    """log(1 + exp(k))"""
    return np.logaddexp(0, k)


def _min_lstm_gates(f, i):
    """sigmoid(f) / (sigmoid(f) + sigmoid(i)) and the same of i, also where both are 0."""
    u = _softplus(-f) - _softplus(-i)  # log(sigmoid(i) / sigmoid(f))
    return sigmoid(-u), sigmoid(u)


def min_lstm(
    x,
    w_f,
    w_i,
    w_h,
    b_f=None,
    b_i=None,
    b_h=None,
    h0=None,
    *,
    lengths=None,
    resets=None,
    reverse=False,
):
    """h_t = f'_t * h_{t-1} + i'_t * n_t. Returns h, h_n.

    f = sigmoid(W_f x + b_f)    i = sigmoid(W_i x + b_i)    n = W_h x + b_h
    f' = f / (f + i)            i' = i / (f + i)
    """
    x = _active(x, lengths)
    f, i, n = _linear(x, w_f, b_f), _linear(x, w_i, b_i), _linear(x, w_h, b_h)
    forget, enter = _min_lstm_gates(f, i)
    options = {"lengths": lengths, "resets": resets, "reverse": reverse}
    return linear_scan(forget, enter * n, h0, **options)


def min_lstm_vjp(x, w_f, w_i, w_h, b_f=None, b_i=None, b_h=None, h0=None, **scan):
    """Gradients of sum(dh * h) + sum(dh_n * h_n); scan: lengths, resets, reverse, dh, dh_n."""
    x = _active(x, scan.get("lengths"))
    f, i, n = _linear(x, w_f, b_f), _linear(x, w_i, b_i), _linear(x, w_h, b_h)
    forget, enter = _min_lstm_gates(f, i)
    d = linear_scan_vjp(forget, enter * n, h0, **scan)
    du = (d["b"] * n - d["a"]) * forget * enter
    df, di = -du * sigmoid(-f), du * sigmoid(-i)
    projections = {"f": (w_f, b_f, df), "i": (w_i, b_i, di), "h": (w_h, b_h, d["b"] * enter)}
    return _gradients(x, h0, projections, d)
