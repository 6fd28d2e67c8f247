"""torch.nn's modules on fastseq's kernels: recurrent layers, cells, MultiheadAttention.

Constructors, forward signatures, state_dict keys, initial values under a seed, PackedSequence
handling and errors are torch.nn's; they run float32 and float64 on the CPU, float32, bfloat16 and
float16 on a GPU. RNN, GRU and LSTM are torch.nn.RNNBase but not torch.nn.RNN, GRU and LSTM, whose
subclasses torch.compile refuses.
"""

from fastseq.torch.attention_nn import MultiheadAttention
from fastseq.torch.cells_nn import GRUCell, LSTMCell, RNNCell
from fastseq.torch.layer_norm_nn import LayerNormGRU, LayerNormLSTM
from fastseq.torch.linear_scan_nn import MinGRU, MinLSTM
from fastseq.torch.recurrent_nn import GRU, LSTM, RNN
from fastseq.torch.user_cells_nn import Recurrent

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormLSTM",
    "MinGRU",
    "MinLSTM",
    "MultiheadAttention",
    "RNNCell",
    "Recurrent",
]
