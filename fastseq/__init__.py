"""Compiled CPU kernels for sequence models: NumPy arrays here, torch tensors in `fastseq.torch`."""

from fastseq import cells, init
from fastseq._dispatch import get_num_threads, set_num_threads
from fastseq._plot import plot_gradient_flow
from fastseq.attention import KVCache, attention, attention_varlen, merge_attention
from fastseq.info import show_config
from fastseq.linear_scan import linear_scan, min_gru, min_lstm
from fastseq.position import alibi_slopes, rotary, sinusoidal_positions
from fastseq.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from fastseq.score_mods import score_mod
from fastseq.training import clip_grad_norm_, clip_grad_value_, gradient_flow, tbptt
from fastseq.user_cells import cell, scan
from fastseq.vjp import vjp

__all__ = [
    "KVCache",
    "alibi_slopes",
    "attention",
    "attention_varlen",
    "cell",
    "cells",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_num_threads",
    "gradient_flow",
    "gru",
    "gru_cell",
    "init",
    "linear_scan",
    "lstm",
    "lstm_cell",
    "merge_attention",
    "min_gru",
    "min_lstm",
    "plot_gradient_flow",
    "rnn",
    "rnn_cell",
    "rotary",
    "scan",
    "score_mod",
    "set_num_threads",
    "show_config",
    "sinusoidal_positions",
    "tbptt",
    "vjp",
]

__version__ = "0.1.0"
