"""torch.nn.RNN, GRU and LSTM on fastseq's kernels, and what every recurrent module shares."""

from operator import is_

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from fastseq import _check
from fastseq._spec import KINDS, NO_MASKS, Masks, Spec
from fastseq.torch._noise import NoiseRates
from fastseq.torch._weights import PackedWeights
from fastseq.torch.ops import infer, run

_States = Tensor | tuple[Tensor, Tensor]


class Layers(torch.nn.RNNBase):
    """What RNN, GRU and LSTM share: torch.nn.RNNBase's parameters, and forward."""

    def __init__(
        self, mode, *args, clip_recurrent_grad=None, recurrent_dropout=0.0, zoneout=0.0, **kwargs
    ):
        super().__init__(mode, *args, **kwargs)
        self._specify(mode.lower(), clip_recurrent_grad, recurrent_dropout, zoneout)

    def _adopt(self):
        """What the module has beside torch.nn's attributes."""
        self._specify(self.mode.lower(), None, 0.0, 0.0)

    def _specify(self, cell, clip_recurrent_grad, recurrent_dropout, zoneout):
        op = type(self).__name__
        limit = _check.limit(op, "clip_recurrent_grad", clip_recurrent_grad)
        self._noise = NoiseRates.checked(op, KINDS[cell], recurrent_dropout, zoneout)
        has_zoneout = self._noise is not None and self._noise.zoneout
        if has_zoneout and self.proj_size:
            raise ValueError(f"{op}: zoneout must be 0 with proj_size, got {zoneout}")
        options = (self.bidirectional, False, self.bias, self.proj_size > 0)
        own = {"limit": limit, "zoneout": has_zoneout}
        self._spec = Spec(cell, self.num_layers, *options, **own)
        self._layer_spec = self._spec._replace(num_layers=1)
        self._packed = PackedWeights()

    @property
    def clip_recurrent_grad(self) -> float | None:
        """The constructor's."""
        return self._spec.limit

    def extra_repr(self) -> str:
        limit = self.clip_recurrent_grad
        text = super().extra_repr() + (f", clip_recurrent_grad={limit}" if limit else "")
        return text + str(self._noise or "")

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
        if not ((self.dropout or self._noise) and (self.training or self._spec.zoneout)):
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
            check_size(state, (S, B, size), name)
            check_same_dtype(x, state, name)

    def _scan(self, x, h0, c0, weights, lengths=None):
        """y, h_n, c_n; one layer at a time where dropout comes in between."""
        masks = NO_MASKS if lengths is None else Masks(lengths)
        if self._noise:
            sizes = x, self.proj_size or self.hidden_size
            masks = self._noise.masks(self._spec, *sizes, self.training)._replace(lengths=lengths)
        if not (self.dropout and self.training and self.num_layers > 1):
            return run(self._spec, x, h0, c0, weights, masks, cache=self._packed)[:3]
        D, n = 1 + self.bidirectional, len(weights) // self.num_layers
        last = []
        for k in range(self.num_layers):
            x = x if k == 0 else dropout(x, self.dropout)
            h, c = (None if s is None else s[k * D : (k + 1) * D] for s in (h0, c0))
            part = masks.of(slice(k * D, (k + 1) * D))
            x, h, c, _ = run(self._layer_spec, x, h, c, weights[k * n : (k + 1) * n], part)
            last.append((h, c))
        h_n, c_n = zip(*last, strict=True)
        return x, torch.cat(h_n), torch.cat(c_n) if self._spec.kind.has_c else None


class RNN(Layers):
    """torch.nn.RNN: Elman's network over T steps, stacked layers, one or two directions.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)        or max(., 0) for nonlinearity="relu"

    Args: those of torch.nn.RNN in its order, nonlinearity the fourth; clip_recurrent_grad, by name,
        as that of `fastseq.torch.rnn`, in every layer; recurrent_dropout, zoneout: `Recurrent`.
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


class GRU(Layers):
    """torch.nn.GRU: gated recurrent unit over T steps, stacked layers, one or two directions.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)    h' = (1 - z) * n + z * h

    Args: those of torch.nn.GRU in its order; clip_recurrent_grad, by name, as that of
        `fastseq.torch.gru`, in every layer; recurrent_dropout, zoneout: `Recurrent`.
    Raises: ValueError, TypeError where torch.nn.GRU raises them.
    Equivalent to: torch.nn.GRU(*args, **kwargs). Accuracy, Cost, Source: `fastseq.torch.gru`.
    """

    def __init__(self, *args, **kwargs):
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


class LSTM(Layers):
    """torch.nn.LSTM: long short-term memory over T steps, stacked layers, one or two directions.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)      c' = f * c + i * g
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)      h' = W_hr (o * tanh(c')), W_hr if proj_size

    Args: those of torch.nn.LSTM in its order; clip_recurrent_grad, by name, as that of
        `fastseq.torch.lstm`, in every layer; with proj_size it limits dh as h has it, projected.
        recurrent_dropout, zoneout: `Recurrent`; the second not with proj_size.
    Raises: ValueError, TypeError where torch.nn.LSTM raises them.
    Equivalent to: torch.nn.LSTM(*args, **kwargs). Accuracy, Cost, Source: `fastseq.torch.lstm`;
        projection: H. Sak et al., Long short-term memory based recurrent neural networks, 2014.
    """

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)


def _refuse_projection(kwargs):
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _check_rank(batched, *states):
    for state in states:
        if state is not None and state.dim() != 2 + batched:
            kind, rank = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
            got = f"got {state.dim()}-D tensor"
            raise RuntimeError(f"For {kind} input, hx should also be {rank}-D but {got}")


def check_size(state, size, name):
    if state.shape != size:
        raise RuntimeError(f"Expected {name} size {size}, got {list(state.shape)}")


def check_same_dtype(x, other, name):
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
