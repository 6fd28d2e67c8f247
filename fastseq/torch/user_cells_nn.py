"""A cell of the user's own as a module."""

import torch

from fastseq._cell import Cell, RowCell, check
from fastseq.torch.recurrent_nn import Layers


class Recurrent(Layers):
    """A cell of your own, or one of `fastseq.cells`: layers and directions as torch.nn's.

        a = W_ih x + b_ih + W_hh h + b_hh        h', c' = cell(a_1, ..., a_G, h, c, params)

    Its parameters are named as torch.nn.LSTM's; those per unit are params_l0 (N, H) and so on. All
    are drawn from U(-1/sqrt(H), 1/sqrt(H)), but gains of a normalisation are 1 and its biases 0.

    Args:
        cell: what `fastseq.cell` made, or one of `fastseq.cells`.
        input_size: I.
        hidden_size: H.
        num_layers: how many, each the input of the next.
        bias: whether there are b_ih and b_hh; `fastseq.scan` says what a layer-normalised cell does
            with them.
        batch_first: input and output are (B, T, .), not (T, B, .).
        dropout: probability in training, between layers.
        bidirectional: a second direction, whose output is appended.
        clip_recurrent_grad: `fastseq.torch.scan`.
        recurrent_dropout: probability in training that a unit's h is not seen by W_hh, drawn once
            for a sequence.
        zoneout: probability in training that a unit keeps its states for a step, the same for h
            and c, or (of h, of c); in inference h and c are the mean of kept and new.
        device: of the parameters: the cell runs on the CPU only.
        dtype: float32 or float64.

    Raises:
        TypeError: cell is no such cell. ValueError: a size or probability is out of
            range. forward: as torch.nn.LSTM.

    Equivalent to: a loop over time around `cell`. Accuracy, Cost, Source: `fastseq.cell`.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
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
        check("Recurrent", cell)
        # torch.nn's constructor knows its own cells only: the plain one checks and sets the rest
        options = num_layers, bias, batch_first, dropout, bidirectional
        super().__init__("RNN_TANH", input_size, hidden_size, *options, device="meta")
        self._specify(cell.key, clip_recurrent_grad, recurrent_dropout, zoneout)
        self.mode, self.cell, shapes = cell.op, cell, self._shapes(cell)
        for name in list(self._parameters):
            delattr(self, name)
        layers, names = range(num_layers), self._spec.names
        suffixes = [f"_l{k}{d}" for k in layers for d in ("", "_reverse")[: 1 + bidirectional]]
        rename = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}
        self._all_weights = [[rename.get(n, n) + suffix for n in names] for suffix in suffixes]
        self._flat_weights_names = [name for part in self._all_weights for name in part]
        for index, part in enumerate(self._all_weights):
            for name, parameter in zip(names, part, strict=True):
                made = torch.empty(shapes(name, index), device=device, dtype=dtype)
                self.register_parameter(parameter, torch.nn.Parameter(made))
        self._init_flat_weights()
        self.reset_parameters()

    def _shapes(self, cell):
        def shape(name, index):
            G, H, D = cell.gates, self.hidden_size, 1 + self.bidirectional
            below = self.input_size if index < D else D * H
            weights = {"w_ih": (G * H, below), "w_hh": (G * H, H), "params": (cell.params, H)}
            return weights.get(name, (G * H,))

        return shape

    def reset_parameters(self) -> None:
        super().reset_parameters()
        cell = getattr(self, "cell", None)  # torch.nn's constructor asks before there is one
        if isinstance(cell, RowCell):
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if name.startswith("params"):
                        parameter[: cell.gains], parameter[cell.gains :] = 1, 0
