"""fastseq for torch: functions over tensors with gradients, torch.nn's modules, and operators.

fastseq.torch.lstm(x, w_ih, w_hh, b_ih, b_hh)       the functions of fastseq, over tensors
fastseq.torch.scaled_dot_product_attention(q, k, v) torch.nn.functional's, fused in every case
fastseq.torch.nn.LSTM(input_size, hidden_size)      torch.nn's modules
fastseq.torch.replace(model)                        the modules of an existing model, in place
torch.ops.fastseq.lstm                              registered by this import
"""

from fastseq.torch import init, nn
from fastseq.torch._replace import replace
from fastseq.torch.attention import attention, attention_varlen, merge_attention
from fastseq.torch.attention_cache import KVCache
from fastseq.torch.attention_sdpa import scaled_dot_product_attention
from fastseq.torch.functional import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from fastseq.torch.linear_scan import linear_scan, min_gru, min_lstm
from fastseq.torch.position import alibi_slopes, rotary, sinusoidal_positions
from fastseq.torch.training import clip_grad_norm_, clip_grad_value_, gradient_flow, tbptt
from fastseq.torch.user_cells import scan

__all__ = [
    "KVCache",
    "alibi_slopes",
    "attention",
    "attention_varlen",
    "clip_grad_norm_",
    "clip_grad_value_",
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
    "nn",
    "replace",
    "rnn",
    "rnn_cell",
    "rotary",
    "scaled_dot_product_attention",
    "scan",
    "sinusoidal_positions",
    "tbptt",
]
