"""Compiled CPU kernels for sequence models: NumPy arrays here, torch tensors in `fastseq.torch`."""

from fastseq._dispatch import get_num_threads, set_num_threads
from fastseq.attention import KVCache, attention, attention_varlen, merge_attention
from fastseq.info import show_config
from fastseq.linear_scan import linear_scan, min_gru, min_lstm
from fastseq.position import alibi_slopes, rotary, sinusoidal_positions
from fastseq.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from fastseq.vjp import vjp

__all__ = [
    "KVCache",
    "alibi_slopes",
    "attention",
    "attention_varlen",
    "get_num_threads",
    "gru",
    "gru_cell",
    "linear_scan",
    "lstm",
    "lstm_cell",
    "merge_attention",
    "min_gru",
    "min_lstm",
    "rnn",
    "rnn_cell",
    "rotary",
    "set_num_threads",
    "show_config",
    "sinusoidal_positions",
    "vjp",
]

__version__ = "0.1.0"
