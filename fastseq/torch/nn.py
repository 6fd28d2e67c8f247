"""torch.nn's modules on fastseq's kernels: the recurrent ones here, and MultiheadAttention.

Constructors, forward signatures, state_dict keys, initial values under a seed, PackedSequence
handling and errors are torch.nn's; they run float32 and float64 on the CPU, float32, bfloat16 and
float16 on a GPU. RNN, GRU and LSTM are torch.nn.RNNBase but not torch.nn.RNN, GRU and LSTM, whose
subclasses torch.compile refuses.
"""

from itertools import repeat
from operator import is_, is_not

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from fastseq import _check
from fastseq._spec import Spec
from fastseq.torch._weights import PackedWeights
from fastseq.torch.attention_nn import MultiheadAttention
from fastseq.torch.linear_scan_nn import MinGRU, MinLSTM
from fastseq.torch.ops import CELLS, infer, infer_layer, run, run_step
from fastseq.user_cells import Cell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "MinGRU",
    "MinLSTM",
    "MultiheadAttention",
    "RNNCell",
    "Recurrent",
]

_States = Tensor | tuple[Tensor, Tensor]


class _Recurrent(torch.nn.RNNBase):
    """What RNN, GRU and LSTM share: torch.nn.RNNBase's parameters, and forward."""

    def __init__(self, mode, *args, clip_recurrent_grad=None, **kwargs):
        super().__init__(mode, *args, **kwargs)
        self._specify(mode.lower(), clip_recurrent_grad)

    def _specify(self, cell, clip_recurrent_grad):
        limit = _check.limit(type(self).__name__, "clip_recurrent_grad", clip_recurrent_grad)
        options = (self.bidirectional, False, self.bias, self.proj_size > 0)
        self._spec = Spec(cell, self.num_layers, *options, limit=limit)
        self._layer_spec = self._spec._replace(num_layers=1)
        self._packed = PackedWeights()

    @property
    def clip_recurrent_grad(self) -> float | None:
        """The constructor's."""
        return self._spec.limit

    def extra_repr(self) -> str:
        limit = self.clip_recurrent_grad
        return super().extra_repr() + (f", clip_recurrent_grad={limit}" if limit else "")

    def forward(
        self, input: Tensor | PackedSequence, hx: _States | None = None
    ) -> tuple[Tensor | PackedSequence, _States]:
        """All layers over all steps.

        Args:
            input: (T, B, I), with batch_first (B, T, I), unbatched (T, I), or a PackedSequence.
            hx: the initial states (layers * directions, B, R), unbatched without B, or None for
                zeros. LSTM: (h_0, c_0), c_0 with H features.

        Returns:
            output, in the form of input with R * directions features, and the last states, as hx.

        Raises:
            ValueError, RuntimeError: where torch.nn raises them.
            TypeError: the parameters are of a dtype that does not run on their device.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        h0, c0 = (None, None) if hx is None else self._split(hx)
        weights, found = self._current_weights(), None
        batch_first = self.batch_first and input.dim() == 3
        x = input.transpose(0, 1) if batch_first else input
        if not (self.dropout and self.training):
            found = infer(self._spec, x, h0, c0, weights, self._packed)
        y, h_n, c_n = found or self._forward_checked(x, h0, c0, weights)
        return y.transpose(0, 1) if batch_first else y, self._join(h_n, c_n)

    def _forward_checked(self, input, h0, c0, weights):
        """y, h_n, c_n of input (T, B, I) or (T, I), with torch.nn's errors."""
        batched = input.dim() == 3
        if not batched and input.dim() != 2:
            name = type(self).__name__
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        _check_rank(batched, h0, c0)
        if not batched:
            input = input.unsqueeze(1)
            h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
        self.check_input(input, None)
        self._check_states(input, input.shape[1], h0, c0)
        if input.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        y, h_n, c_n = self._scan(input, h0, c0, weights)
        if not batched:
            y, h_n, c_n = (None if t is None else t.squeeze(1) for t in (y, h_n, c_n))
        return y, h_n, c_n

    def _forward_packed(self, packed, hx):
        data, batch_sizes, order, inverse = packed
        h0, c0 = (_reordered(s, order) for s in self._split(hx))
        weights = self._current_weights()
        self.check_input(data, batch_sizes)
        self._check_states(data, int(batch_sizes[0]), h0, c0)
        x, lengths, rows = _pad(data, batch_sizes)
        y, h_n, c_n = self._scan(x, h0, c0, weights, lengths)
        y = PackedSequence(y.flatten(0, 1).index_select(0, rows), batch_sizes, order, inverse)
        return y, self._join(*(_reordered(s, inverse) for s in (h_n, c_n)))

    def _split(self, hx):
        """h0 and c0 of forward's argument."""
        if hx is None:
            return None, None
        return (hx[0], hx[1]) if self._spec.kind.has_c else (hx, None)

    def _join(self, h_n, c_n):
        return (h_n, c_n) if self._spec.kind.has_c else h_n

    def _current_weights(self):
        """torch.nn's `_flat_weights`, brought up to date only if a parameter was exchanged."""
        if torch.compiler.is_compiling():
            return [getattr(self, name) for name in self._flat_weights_names]
        current = map(self._parameters.get, self._flat_weights_names)
        if not all(map(is_, self._flat_weights, current)):
            self._update_flat_weights()
        return self._flat_weights

    def _check_states(self, x, B, h0, c0):
        if h0 is None:
            return
        S = self.num_layers * (1 + self.bidirectional)
        names = ("hidden[0]", "hidden[1]") if self._spec.kind.has_c else ("hidden",)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        for state, name, size in zip((h0, c0), names, sizes, strict=False):
            _check_size(state, (S, B, size), name)
            _check_same_dtype(x, state, name)

    def _scan(self, x, h0, c0, weights, lengths=None):
        """y, h_n, c_n; one layer at a time where dropout comes in between."""
        if not (self.dropout and self.training and self.num_layers > 1):
            return run(self._spec, x, h0, c0, weights, lengths, cache=self._packed)[:3]
        D, n = 1 + self.bidirectional, len(weights) // self.num_layers
        last = []
        for k in range(self.num_layers):
            x = x if k == 0 else dropout(x, self.dropout)
            h, c = (None if s is None else s[k * D : (k + 1) * D] for s in (h0, c0))
            x, h, c, _ = run(self._layer_spec, x, h, c, weights[k * n : (k + 1) * n], lengths)
            last.append((h, c))
        h_n, c_n = zip(*last, strict=True)
        return x, torch.cat(h_n), torch.cat(c_n) if self._spec.kind.has_c else None


class RNN(_Recurrent):
    """torch.nn.RNN: Elman's network over T steps, stacked layers, one or two directions.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)        or max(., 0) for nonlinearity="relu"

    Args: those of torch.nn.RNN in its order, nonlinearity the fourth; clip_recurrent_grad, by name,
        as that of `fastseq.torch.rnn`, in every layer.
    Raises: ValueError, TypeError where torch.nn.RNN raises them.
    Equivalent to: torch.nn.RNN(*args, **kwargs). Accuracy, Cost, Source: `fastseq.torch.rnn`.
    """

    def __init__(self, *args, **kwargs):
        _refuse_projection(kwargs)
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)
        self.nonlinearity = nonlinearity


class GRU(_Recurrent):
    """torch.nn.GRU: gated recurrent unit over T steps, stacked layers, one or two directions.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)    h' = (1 - z) * n + z * h

    Args: those of torch.nn.GRU in its order; clip_recurrent_grad, by name, as that of
        `fastseq.torch.gru`, in every layer.
    Raises: ValueError, TypeError where torch.nn.GRU raises them.
    Equivalent to: torch.nn.GRU(*args, **kwargs). Accuracy, Cost, Source: `fastseq.torch.gru`.
    """

    def __init__(self, *args, **kwargs):
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


class LSTM(_Recurrent):
    """torch.nn.LSTM: long short-term memory over T steps, stacked layers, one or two directions.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)      c' = f * c + i * g
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)      h' = W_hr (o * tanh(c')), W_hr if proj_size

    Args: those of torch.nn.LSTM in its order; clip_recurrent_grad, by name, as that of
        `fastseq.torch.lstm`, in every layer; with proj_size it limits dh as h has it, projected.
    Raises: ValueError, TypeError where torch.nn.LSTM raises them.
    Equivalent to: torch.nn.LSTM(*args, **kwargs). Accuracy, Cost, Source: `fastseq.torch.lstm`;
        projection: H. Sak et al., Long short-term memory based recurrent neural networks, 2014.
    """

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)


class Recurrent(_Recurrent):
    """A cell of your own over T steps: stacked layers, one or two directions, as torch.nn's.

        a = W_ih x + b_ih + W_hh h + b_hh        h', c' = cell(a_1, ..., a_G, h, c, params)

    Its parameters are named as torch.nn.LSTM's; those per unit are params_l0 (N, H) and so on. All
    are drawn from U(-1/sqrt(H), 1/sqrt(H)).

    Args:
        cell: what `fastseq.cell` made.
        input_size: I.
        hidden_size: H.
        num_layers: how many, each the input of the next.
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are (B, T, .), not (T, B, .).
        dropout: probability in training, between layers.
        bidirectional: a second direction, whose output is appended.
        clip_recurrent_grad: `fastseq.torch.scan`.
        device: of the parameters: the cell runs on the CPU only.
        dtype: float32 or float64.

    Raises:
        TypeError: cell was not made by `fastseq.cell`. ValueError: a size or probability is out of
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
        device=None,
        dtype=None,
    ):
        if not isinstance(cell, Cell):
            raise TypeError(f"Recurrent: cell must be made by fastseq.cell, got {cell!r}")
        # torch.nn's constructor knows its own cells only: the plain one checks and sets the rest
        options = num_layers, bias, batch_first, dropout, bidirectional
        super().__init__("RNN_TANH", input_size, hidden_size, *options, device="meta")
        self._specify(cell.key, clip_recurrent_grad)
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


_STEPS = {(cell, bias): Spec(cell, bias=bias) for cell in CELLS for bias in (False, True)}


class _Cell(torch.nn.Module):
    """What RNNCell, GRUCell and LSTMCell share, ahead of torch.nn's class among the bases."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
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
        _check_same_dtype(x, weight, "weight")
        for state in (h, c):
            if state is not None:
                _check_size(state, (x.shape[0], self.hidden_size), "hidden")
                _check_same_dtype(x, state, "hidden state")


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


def _refuse_projection(kwargs):
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _check_rank(batched, *states):
    for state in states:
        if state is not None and state.dim() != 2 + batched:
            kind, rank = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
            got = f"got {state.dim()}-D tensor"
            raise RuntimeError(f"For {kind} input, hx should also be {rank}-D but {got}")


def _check_size(state, size, name):
    if state.shape != size:
        raise RuntimeError(f"Expected {name} size {size}, got {list(state.shape)}")


def _check_same_dtype(x, other, name):
    if x.dtype != other.dtype and not torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(
            f"input and {name} must have the same dtype, got {x.dtype} and {other.dtype}"
        )


def _reordered(state, order):
    return state if state is None or order is None else state.index_select(1, order)


def _pad(data, batch_sizes):
    """A PackedSequence's data as (T, B, I), its lengths, and the rows of T * B that it fills.

    Both directions are one copy of rows (forward and backward), not one operation a step.
    """
    T, B = len(batch_sizes), int(batch_sizes[0])
    active = torch.arange(B) < batch_sizes.unsqueeze(1)  # on the CPU, as batch_sizes are
    rows = active.flatten().nonzero().squeeze(1).to(data.device, non_blocking=True)
    x = data.new_zeros(T * B, data.shape[1]).index_add_(0, rows, data)
    return x.view(T, B, -1), active.sum(0), rows
