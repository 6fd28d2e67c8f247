"""torch.nn.RNNCell, GRUCell and LSTMCell on fastseq's kernels."""

from itertools import repeat
from operator import is_not

import torch
from torch import Tensor

from fastseq._spec import Spec
from fastseq.torch._weights import PackedWeights
from fastseq.torch.ops import CELLS, infer_layer, run_step
from fastseq.torch.recurrent_nn import check_same_dtype, check_size

_STEPS = {(cell, bias): Spec(cell, bias=bias) for cell in CELLS for bias in (False, True)}


class _Cell(torch.nn.Module):
    """What RNNCell, GRUCell and LSTMCell share, ahead of torch.nn's class among the bases."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._adopt()

    def _adopt(self):
        """What the module has beside torch.nn's attributes."""
        self._packed = PackedWeights()

    def _step(self, cell, x, h, c=None):
        """h', c' for x (B, I) or (I,) and states (B, H) or (H,), None for zeros."""
        spec, weights = _STEPS[cell, self.bias], self._weights()
        found = infer_layer(spec, x, h, c, weights, self._packed, step=True)
        if found is not None:
            return found[1:]
        name = type(self).__name__
        for t, what in ((x, "input"), (h, "hidden"), (c, "hidden")):
            if t is not None and t.dim() not in (1, 2):
                raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {t.dim()}D instead")
        batched = x.dim() == 2
        if not batched:
            x, h, c = (None if t is None else t.unsqueeze(0) for t in (x, h, c))
        self._check(x, h, c, weights[0])
        states = run_step(spec, x, h, c, weights, self._packed)
        return states if batched else tuple(None if s is None else s.flatten() for s in states)

    def _weights(self):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        if not torch.compiler.is_compiling():
            found = [self._parameters.get(name) for name in names]
            if all(map(is_not, found, repeat(None))):
                return found
        return [getattr(self, name) for name in names]

    def _check(self, x, h, c, weight):
        if x.shape[1] != self.input_size:
            got = f"got {x.shape[1]} expected {self.input_size}"
            raise RuntimeError(f"input has inconsistent input_size: {got}")
        check_same_dtype(x, weight, "weight")
        for state in (h, c):
            if state is not None:
                check_size(state, (x.shape[0], self.hidden_size), "hidden")
                check_same_dtype(x, state, "hidden state")


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell: one step of Elman's network.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)        or max(., 0) for nonlinearity="relu"

    Args, Raises: those of torch.nn.RNNCell.
    Equivalent to: torch.nn.RNNCell(*args, **kwargs). Accuracy, Cost, Source: `fastseq.torch.rnn`.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h' (B, H) or (H,) of input (B, I) or (I,) and hx as h', None for zeros."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._step(f"rnn_{self.nonlinearity}", input, hx)[0]


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell: one step of the gated recurrent unit.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)    h' = (1 - z) * n + z * h

    Args, Raises: those of torch.nn.GRUCell.
    Equivalent to: torch.nn.GRUCell(*args, **kwargs). Accuracy, Cost, Source: `fastseq.torch.gru`.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h' (B, H) or (H,) of input (B, I) or (I,) and hx as h', None for zeros."""
        return self._step("gru", input, hx)[0]


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell: one step of long short-term memory.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)      c' = f * c + i * g
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)      h' = o * tanh(c')

    Args, Raises: those of torch.nn.LSTMCell.
    Equivalent to: torch.nn.LSTMCell(*args, **kwargs). Accuracy, Cost, Source: `fastseq.torch.lstm`.
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """h', c' (B, H) or (H,) of input (B, I) or (I,) and hx = (h, c), None for zeros."""
        h, c = (None, None) if hx is None else hx
        return self._step("lstm", input, h, c)
