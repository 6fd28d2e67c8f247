"""LSTM and GRU with layer normalisation as modules."""

from fastseq import cells
from fastseq._cell import RowCell
from fastseq.torch.user_cells_nn import Recurrent


class _LayerNorm(Recurrent):
    """What both share: a Recurrent whose biases are behind the normalisation, in its params."""

    _cell: RowCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        clip_recurrent_grad: float | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(
            self._cell,
            input_size,
            hidden_size,
            num_layers,
            bias=False,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            clip_recurrent_grad=clip_recurrent_grad,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return super().extra_repr().replace(", bias=False", "")  # it has no such argument


class LayerNormLSTM(_LayerNorm):
    """torch.nn.LSTM with normalised products and cell state: stacked, one or two directions.

        i, f, g, o = gain_ih * LN(W_ih x) + gain_hh * LN(W_hh h) + bias
        c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h' = sigmoid(o) * tanh(gain_c * LN(c') + bias_c)

        LN(a) = (a - mean a) / sqrt(var a + 1e-5), over all gates and units of a row

    Weights are named and drawn as torch.nn.LSTM's, which has biases too; here they are in params_l0
    (14, H) and so on: gain_ih i|f|g|o, gain_hh i|f|g|o, gain_c (ones), bias i|f|g|o, bias_c (0).

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: how many, each the input of the next.
        batch_first: input and output are (B, T, .), not (T, B, .).
        dropout: probability in training, between layers.
        bidirectional: a second direction, whose output is appended.
        clip_recurrent_grad: `fastseq.torch.scan`.
        recurrent_dropout: `Recurrent`.
        zoneout: `Recurrent`.
        device: of the parameters: the cell runs on the CPU only.
        dtype: float32 or float64.

    Raises:
        ValueError: a size or probability is out of range. forward: as torch.nn.LSTM.

    Accuracy: within three times torch's own error against float64 (tests).
    Cost: torch.nn.LSTM's FLOP; for backward (8 + 1) H values a step and row.
    Equivalent to: a loop over time around `fastseq.cells.layer_norm_lstm`.
    Source: Ba, Kiros & Hinton, arXiv:1607.06450.
    """

    _cell = cells.layer_norm_lstm


class LayerNormGRU(_LayerNorm):
    """torch.nn.GRU with normalised products: stacked, one or two directions.

        xr, xz, xn = gain_ih * LN(W_ih x)       hr, hz, hn = gain_hh * LN(W_hh h)
        r, z = sigmoid(xr + hr + b_r), sigmoid(xz + hz + b_z)
        n = tanh(xn + b_xn + r * (hn + b_hn))        h' = (1 - z) * n + z * h

        LN(a) = (a - mean a) / sqrt(var a + 1e-5), over all gates and units of a row (the paper
        normalises n by itself)

    Weights are named and drawn as torch.nn.GRU's, which has biases too; here they are in params_l0
    (10, H) and so on: gain_ih r|z|n, gain_hh r|z|n (ones), b_r, b_z, b_xn, b_hn (zeros).

    Args, Raises, Accuracy, Source: `LayerNormLSTM`.
    Cost: torch.nn.GRU's FLOP; for backward 6 H values a step and row.
    Equivalent to: a loop over time around `fastseq.cells.layer_norm_gru`.
    """

    _cell = cells.layer_norm_gru
