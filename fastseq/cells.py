"""Recurrent cells of the literature written with `fastseq.cell`, and what such cells are made of.

Each is a few lines, for use and as a pattern for your own: `fastseq.scan(peephole_lstm, x, ...)`,
`fastseq.torch.nn.Recurrent(peephole_lstm, input_size, hidden_size)`.
"""

import numpy as np

from fastseq.user_cells import cell, relu, sigmoid

__all__ = ["cifg_lstm", "ind_rnn", "light_gru", "peephole_lstm", "relu", "sigmoid"]


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
