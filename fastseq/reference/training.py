"""Training aids: clipping, initial values, truncated backpropagation and gradient flow.

Everything here returns new arrays; letters as in `recurrent.py`.
"""

import numpy as np

from fastseq.reference import recurrent

SCANS = {
    "rnn": (recurrent.rnn, recurrent.rnn_vjp),
    "gru": (recurrent.gru, recurrent.gru_vjp),
    "lstm": (recurrent.lstm, recurrent.lstm_vjp),
}


@np.errstate(over="ignore")
def total_norm(arrays, norm_type=2.0):
    """(sum |g|^p)^(1/p) over all elements of all arrays; max |g| for p = inf; 0 of nothing."""
    g = np.abs(np.concatenate([np.zeros(1), *(np.ravel(a) for a in arrays)]))
    return g.max() if norm_type == np.inf else (g**norm_type).sum() ** (1 / norm_type)


@np.errstate(invalid="ignore")
def clip_grad_norm(arrays, max_norm, norm_type=2.0):
    """norm, and every g * min(max_norm / (norm + 1e-6), 1)."""
    norm = total_norm(arrays, norm_type)
    c = np.minimum(max_norm / (norm + 1e-6), 1)
    return norm, [c * g if c != 1 else g.copy() for g in arrays]


def clip_grad_value(arrays, clip_value):
    """Every min(max(g, -clip_value), clip_value)."""
    return [np.minimum(np.maximum(g, -clip_value), clip_value) for g in arrays]


def identity(H, scale=1.0):
    """W_hh = scale I, b_ih = b_hh = 0."""
    return scale * np.eye(H), np.zeros(H), np.zeros(H)


def orthogonal(normal, gates, gain=1.0):
    """(G R, C) normal numbers -> for each gate gain Q sign(diag R),.

    Q R = Z, Gram and Schmidt's: each column of Z less its projections on those before, normalised.
    """
    blocks = []
    for z in np.split(normal, gates):
        wide = z.shape[0] < z.shape[1]
        columns = []
        for v in z if wide else z.T:
            for _ in range(2):  # a second time takes away what rounding left
                for q in columns:
                    v = v - (q @ v) * q
            columns.append(v / np.linalg.norm(v))
        q = np.array(columns)
        blocks.append(gain * (q if wide else q.T))
    return np.concatenate(blocks)


def forget_bias(b_ih, b_hh, value=1.0):
    """Gates i|f|g|o: b_ih[f] = value, b_hh[f] = 0."""
    (i, _, g, o), (k, f, m, n) = np.split(b_ih, 4), np.split(b_hh, 4)
    opened, zero = np.full_like(f, value), np.zeros_like(f)
    return np.concatenate([i, opened, g, o]), np.concatenate([k, zero, m, n])


def tbptt(cell, x, weights, states, dy, chunk, **options):
    """y, the last state and the weights' gradients of sum(dy * y), the state between chunks a
    constant.

    weights: {"w_ih": ..., ...}; states: {"h0": ..., "c0": ...} or {}.
    """
    scan, scan_vjp = SCANS[cell]
    ys, sums = [], {name: np.zeros_like(w) for name, w in weights.items()}
    for t in range(0, len(x), chunk):
        part = slice(t, t + chunk)
        grads = scan_vjp(x[part], **weights, **states, dy=dy[part], **options)
        y, last = scan(x[part], **weights, **states, **options)
        states = dict(zip(("h0", "c0"), last if cell == "lstm" else (last,), strict=False))
        sums = {name: total + grads[name] for name, total in sums.items()}
        ys.append(y)
    return np.concatenate(ys), tuple(states.values()), sums


def gradient_flow(cell, x, weights, states, dy, **options):
    """norm_t = ||dL / dh_t||, L = sum(dy * y): dL / dh_t = dy_t + the gradient of h0 of the scan
    over the steps after t."""
    scan, scan_vjp = SCANS[cell]
    norms = []
    for t in range(len(x)):
        dh = dy[t]
        if t + 1 < len(x):
            _, last = scan(x[: t + 1], **weights, **states, **options)
            after = dict(zip(("h0", "c0"), last if cell == "lstm" else (last,), strict=False))
            rest = scan_vjp(x[t + 1 :], **weights, **after, dy=dy[t + 1 :], **options)
            dh = dh + rest["h0"]
        norms.append(np.linalg.norm(dh))
    return np.array(norms)
