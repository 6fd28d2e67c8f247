"""Recurrent cells of the literature beside RNN, GRU and LSTM, and what your own are made of.

`fastseq.scan(peephole_lstm, x, ...)` and `fastseq.torch.nn.Recurrent(peephole_lstm, input_size,
hidden_size)` run them. Those of `fastseq.cell` are patterns for your own. The layer-normalised ones
need whole rows, so the kernels have them; their functions here are the equations.
"""

import numpy as np

from fastseq._cell import of_rows
from fastseq.user_cells import cell, relu, sigmoid

__all__ = [
    "cifg_lstm",
    "ind_rnn",
    "layer_norm_gru",
    "layer_norm_lstm",
    "light_gru",
    "peephole_lstm",
    "relu",
    "sigmoid",
]


@cell(params=("p_i", "p_f", "p_o"))
def peephole_lstm(i, f, g, o, c, p_i, p_f, p_o):
    """An LSTM whose gates see the cell state. Gers & Schmidhuber, 2000; Graves, arXiv:1308.0850."""
    c_new = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)
    return sigmoid(o + p_o * c_new) * np.tanh(c_new), c_new


@cell
def cifg_lstm(f, g, o, c):
    """An LSTM with its input gate coupled to the forget gate. Greff et al., arXiv:1503.04069."""
    f = sigmoid(f)
    c_new = f * c + (1 - f) * np.tanh(g)
    return sigmoid(o) * np.tanh(c_new), c_new


@cell
def light_gru(z, a, h):
    """A GRU without reset gate, its candidate a ReLU. Ravanelli et al., arXiv:1803.10225.

    Their batch normalisation of W_ih x is left to the caller.
    """
    z = sigmoid(z)
    return z * h + (1 - z) * relu(a)


@cell(params=("u",), recurrent=False)
def ind_rnn(a, h, u):
    """Units that see only themselves: h' = relu(W_ih x + b + u h). Li et al., arXiv:1803.04831."""
    return relu(a + u * h)


def _layer_norm(a):
    """(a - mean a) / sqrt(var a + 1e-5), over the last axis."""
    d = a - a.mean(axis=-1, keepdims=True)
    return d / np.sqrt((d * d).mean(axis=-1, keepdims=True) + 1e-5)


@of_rows(gates=4, params=14, gains=9)
def layer_norm_lstm(gx, gh, c, params):
    """An LSTM whose products and cell state are normalised. Ba, Kiros & Hinton, arXiv:1607.06450.

    Gates i|f|g|o of gain_ih * LN(W_ih x) + gain_hh * LN(W_hh h) + bias, and what h' sees of c' is
    gain_c * LN(c') + bias_c; LN over all gates and units.
    params (14, H): gain_ih i|f|g|o, gain_hh i|f|g|o, gain_c, bias i|f|g|o, bias_c.
    """
    gain_ih, gain_hh, bias = (params[k : k + 4].reshape(-1) for k in (0, 4, 9))
    gain_c, bias_c = params[8], params[13]
    gates = gain_ih * _layer_norm(gx) + gain_hh * _layer_norm(gh) + bias
    i, f, g, o = np.split(gates, 4, axis=-1)
    c_new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(gain_c * _layer_norm(c_new) + bias_c), c_new


@of_rows(gates=3, params=10, gains=6)
def layer_norm_gru(gx, gh, h, params):
    """A GRU whose products are normalised. Ba, Kiros & Hinton, arXiv:1607.06450.

    Gates r|z|n of gain_ih * LN(W_ih x) and gain_hh * LN(W_hh h); LN over all gates and units, where
    the paper normalises n by itself.
    params (10, H): gain_ih r|z|n, gain_hh r|z|n, bias r|z|n of the first, bias n of the second.
    """
    gain_ih, gain_hh = params[:6].reshape(2, -1)
    b_r, b_z, b_xn, b_hn = params[6:]
    xr, xz, xn = np.split(gain_ih * _layer_norm(gx), 3, axis=-1)
    hr, hz, hn = np.split(gain_hh * _layer_norm(gh), 3, axis=-1)
    r, z = sigmoid(xr + hr + b_r), sigmoid(xz + hz + b_z)
    n = np.tanh(xn + b_xn + r * (hn + b_hn))
    return (1 - z) * n + z * h
