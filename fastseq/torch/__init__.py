"""fastseq for torch: functions over tensors with gradients, torch.nn's modules, and operators.

fastseq.torch.lstm(x, w_ih, w_hh, b_ih, b_hh)       the functions of fastseq, over tensors
fastseq.torch.nn.LSTM(input_size, hidden_size)      torch.nn's recurrent modules
torch.ops.fastseq.lstm                              registered by this import
"""

from fastseq.torch import nn
from fastseq.torch.functional import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "nn", "rnn", "rnn_cell"]
