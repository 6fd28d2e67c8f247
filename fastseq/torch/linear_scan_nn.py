"""Modules MinGRU and MinLSTM: whole sequences by the scan, single steps for streaming."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from fastseq.torch.linear_scan import active, min_gru_gates, min_lstm_gates
from fastseq.torch.linear_scan_ops import run


class _MinRecurrent(torch.nn.Module):
    """What MinGRU and MinLSTM share; a cell is its gates."""

    parts: int  # projections of x
    gates: Callable[..., tuple[Tensor, Tensor]]  # from them, a and b of h' = a h + b

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("num_layers", num_layers)):
            if size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be >= 1, got {size}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_layers, self.bias, self.batch_first = num_layers, bias, batch_first
        made = {"device": device, "dtype": dtype}
        rows = self.parts * hidden_size
        for layer in range(num_layers):
            columns = hidden_size if layer else input_size
            setattr(self, f"weight_ih_l{layer}", Parameter(torch.empty(rows, columns, **made)))
            if bias:
                setattr(self, f"bias_ih_l{layer}", Parameter(torch.empty(rows, **made)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All parameters U(-1/sqrt(H), 1/sqrt(H)), as torch.nn.GRU's."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """The constructor's arguments that are not the default."""
        found = f"{self.input_size}, {self.hidden_size}"
        found += f", num_layers={self.num_layers}" if self.num_layers > 1 else ""
        found += "" if self.bias else ", bias=False"
        return found + (", batch_first=True" if self.batch_first else "")

    def _gates(self, x, layer):
        weight = getattr(self, f"weight_ih_l{layer}")
        bias = getattr(self, f"bias_ih_l{layer}") if self.bias else None
        return self.gates(*linear(x, weight, bias).chunk(self.parts, dim=-1))

    def forward(
        self,
        input: Tensor,
        h0: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All layers over all steps.

        Args:
            input: (T, B, I), with batch_first (B, T, I).
            h0: (num_layers, B, H), zeros if None.
            lengths: (B,) int64 in 0..T; output is zero past a row's length.
            resets: bool, as input without I; True: the row's state is zero before that step.

        Returns:
            output (T, B, H), with batch_first (B, T, H), and h_n (num_layers, B, H).

        Raises:
            TypeError: input is of a dtype that does not run on its device.
            ValueError: a shape or length does not fit.
        """
        self._check(input, 3, h0)
        x = input.transpose(0, 1) if self.batch_first else input
        if resets is not None and self.batch_first:
            resets = resets.t()
        self._check_state(h0, x.shape[1])
        if lengths is not None:
            x = active(x, lengths)
        last = []
        for layer in range(self.num_layers):
            a, b = self._gates(x, layer)
            x, h = run(a, b, None if h0 is None else h0[layer], lengths, resets, False)
            last.append(h)
        return x.transpose(0, 1) if self.batch_first else x, torch.stack(last)

    def step(self, input: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of all layers, for streaming: what forward gives at that step.

        Args:
            input: (B, I).
            h: (num_layers, B, H) as this returned it before, zeros if None.

        Returns:
            output (B, H) and h' (num_layers, B, H).

        Raises:
            ValueError: a shape does not fit.
        """
        self._check(input, 2, h)
        self._check_state(h, input.shape[0])
        x, states = input, []
        for layer in range(self.num_layers):
            a, b = self._gates(x, layer)
            x = b if h is None else a * h[layer] + b
            states.append(x)
        return x, torch.stack(states)

    def _check(self, x, rank, h):
        name = type(self).__name__
        if x.dim() != rank:
            raise ValueError(f"{name}: input must have {rank} axes, got shape {tuple(x.shape)}")
        if x.shape[-1] != self.input_size:
            raise ValueError(f"{name}: input must have I = {self.input_size}, got {x.shape[-1]}")

    def _check_state(self, h, B):
        expected = (self.num_layers, B, self.hidden_size)
        if h is not None and h.shape != expected:
            letters, got = "(layers, B, H)", tuple(h.shape)
            name = type(self).__name__
            raise ValueError(f"{name}: the state must be {letters} = {expected}, got {got}")


class MinGRU(_MinRecurrent):
    """Minimal gated recurrent unit over T steps, stacked layers: gates of the input alone.

        z = sigmoid(W_z x + b_z)        n = W_h x + b_h        h' = (1 - z) * h + z * n

    Parameters weight_ih_l<k> (2H, I or H) and bias_ih_l<k> (2H,), gates z|h.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: each layer reads the one below.
        bias: whether there are biases.
        batch_first: input and output are (B, T, ·).
        device: of the parameters.
        dtype: of the parameters.

    Raises: ValueError: a size below 1.
    Equivalent to: `fastseq.torch.min_gru`, layer by layer. Accuracy, Cost, Source: there.
    """

    parts = 2
    gates = staticmethod(min_gru_gates)


class MinLSTM(_MinRecurrent):
    """Minimal long short-term memory over T steps, stacked layers: gates of the input alone.

        f = sigmoid(W_f x + b_f)    i = sigmoid(W_i x + b_i)    n = W_h x + b_h
        h' = f / (f + i) * h + i / (f + i) * n

    Parameters weight_ih_l<k> (3H, I or H) and bias_ih_l<k> (3H,), gates f|i|h.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: each layer reads the one below.
        bias: whether there are biases.
        batch_first: input and output are (B, T, ·).
        device: of the parameters.
        dtype: of the parameters.

    Raises: ValueError: a size below 1.
    Equivalent to: `fastseq.torch.min_lstm`, layer by layer. Accuracy, Cost, Source: there.
    """

    parts = 3
    gates = staticmethod(min_lstm_gates)
