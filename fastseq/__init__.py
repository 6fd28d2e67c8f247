"""Compiled CPU kernels for sequence models: NumPy arrays here, torch tensors in `fastseq.torch`."""

from fastseq._dispatch import get_num_threads, set_num_threads
from fastseq.info import show_config
from fastseq.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from fastseq.vjp import vjp

__all__ = [
    "get_num_threads",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "set_num_threads",
    "show_config",
    "vjp",
]

__version__ = "0.1.0"
