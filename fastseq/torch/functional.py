"""The recurrent scans and their single steps over torch tensors, with gradients.

Same names, arguments and results as the NumPy functions of `fastseq`.
"""

from torch import Tensor

from fastseq import _check
from fastseq._spec import Masks, Spec
from fastseq.torch.ops import infer_layer, run, run_step


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    clip_recurrent_grad: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman's recurrent network over T steps.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)        or max(., 0) for "relu"

    Args:
        x: (T, B, I) float32 or float64, on a GPU float32, bfloat16 or float16; any strides.
        w_ih: (H, I).
        w_hh: (H, H).
        b_ih: (H,), given together with b_hh or not at all (zeros).
        b_hh: (H,).
        h0: (B, H) initial state, zeros if None.
        nonlinearity: "tanh" or "relu".
        lengths: (B,) int64 in 0..T, any order; steps past a row's length are not computed.
        resets: (T, B) bool; True: the row's state is zero before that step is computed.
        reverse: time runs backwards, for each row from its own end.
        clip_recurrent_grad: m > 0, or None: no limit. The gradient that flows from a step back into
            the state before it, h0 too, becomes min(max(., -m), m), element by element; what
            comes from outside, to y and h_n, is not limited.

    Returns:
        y (T, B, H), zero past a row's length, and h_n (B, H), each row's own last state.

    Raises:
        TypeError: an argument is no tensor, or x or a weight of another dtype.
        ValueError: a shape, dtype, limit or length (not read on a GPU) does not fit; unknown
            nonlinearity.
        RuntimeError: a second derivative is asked for.

    Accuracy: float32 error within 2x of torch's own (3x for gradients), float64 1e-12 relative.
    Cost: 2 H (I + H) FLOP a step and row, three times that with gradients; y is kept for backward.
    Equivalent to: torch.nn.RNN(I, H, nonlinearity=nonlinearity) with one layer.
    Source: J. L. Elman, Finding structure in time, 1990; clip_recurrent_grad: after A. Graves,
        arXiv:1308.0850, 2.1, who limits the gates' gradients.
    """
    cell = _rnn_cell_name(nonlinearity)
    spec = _spec("rnn", cell, b_ih, b_hh, reverse, clip_recurrent_grad)
    y, h_n, _, _ = _scan(spec, x, (w_ih, w_hh, b_ih, b_hh), h0, None, Masks(lengths, resets))
    return y, h_n


def gru(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    clip_recurrent_grad: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit over T steps, reset after the product.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)    h' = (1 - z) * n + z * h

    Args:
        x: (T, B, I) float32 or float64, on a GPU float32, bfloat16 or float16; any strides.
        w_ih: (3H, I), gates r|z|n.
        w_hh: (3H, H), gates r|z|n.
        b_ih: (3H,), given together with b_hh or not at all (zeros).
        b_hh: (3H,).
        h0: (B, H) initial state, zeros if None.
        lengths: (B,) int64 in 0..T, any order; steps past a row's length are not computed.
        resets: (T, B) bool; True: the row's state is zero before that step is computed.
        reverse: time runs backwards, for each row from its own end.
        clip_recurrent_grad: m > 0, or None: no limit. The gradient that flows from a step back into
            the state before it, h0 too, becomes min(max(., -m), m), element by element; what
            comes from outside, to y and h_n, is not limited.

    Returns:
        y (T, B, H), zero past a row's length, and h_n (B, H), each row's own last state.

    Raises:
        TypeError: an argument is no tensor, or x or a weight of another dtype.
        ValueError: a shape, dtype, limit or length (not read on a GPU) does not fit.
        RuntimeError: a second derivative is asked for.

    Accuracy: float32 error within 2x of torch's own (3x for gradients), float64 1e-12 relative.
    Cost: 6 H (I + H) FLOP a step and row, three times that with gradients; the gates and y are
        kept for backward.
    Equivalent to: torch.nn.GRU(I, H) with one layer.
    Source: K. Cho et al., Learning phrase representations using RNN encoder-decoder, 2014;
        clip_recurrent_grad: as `rnn`.
    """
    spec = _spec("gru", "gru", b_ih, b_hh, reverse, clip_recurrent_grad)
    y, h_n, _, _ = _scan(spec, x, (w_ih, w_hh, b_ih, b_hh), h0, None, Masks(lengths, resets))
    return y, h_n


def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
    clip_recurrent_grad: float | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Long short-term memory over T steps.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)      c' = f * c + i * g
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)      h' = o * tanh(c')

    Args:
        x: (T, B, I) float32 or float64, on a GPU float32, bfloat16 or float16; any strides.
        w_ih: (4H, I), gates i|f|g|o.
        w_hh: (4H, H), gates i|f|g|o.
        b_ih: (4H,), given together with b_hh or not at all (zeros).
        b_hh: (4H,).
        h0: (B, H) initial state, zeros if None.
        c0: (B, H) initial cell state, zeros if None.
        lengths: (B,) int64 in 0..T, any order; steps past a row's length are not computed.
        resets: (T, B) bool; True: the row's states are zero before that step is computed.
        reverse: time runs backwards, for each row from its own end.
        return_cell_states: also return the cell state of every step.
        clip_recurrent_grad: m > 0, or None: no limit. The gradient that flows from a step back into
            the states before it, h0 and c0 too, becomes min(max(., -m), m), element by element;
            what comes from outside, to y, c, h_n and c_n, is not limited.

    Returns:
        y, (h_n, c_n), or (y, c), (h_n, c_n) with return_cell_states: y and c (T, B, H), zero past
        a row's length, h_n and c_n (B, H), each row's own last states.

    Raises:
        TypeError: an argument is no tensor, or x or a weight of another dtype.
        ValueError: a shape, dtype, limit or length (not read on a GPU) does not fit.
        RuntimeError: a second derivative is asked for.

    Accuracy: float32 error within 2x of torch's own (3x for gradients), float64 1e-12 relative.
    Cost: 8 H (I + H) FLOP a step and row, three times that with gradients; the gates, the cell
        states and y are kept for backward.
    Equivalent to: torch.nn.LSTM(I, H) with one layer.
    Source: S. Hochreiter, J. Schmidhuber, Long short-term memory, 1997; F. Gers et al., 2000;
        clip_recurrent_grad: as `rnn`.
    """
    spec = _spec("lstm", "lstm", b_ih, b_hh, reverse, clip_recurrent_grad)
    weights = (w_ih, w_hh, b_ih, b_hh)
    masks = Masks(lengths, resets)
    y, h_n, c_n, c = _scan(spec, x, weights, h0, c0, masks, return_cell_states)
    return (y, c) if return_cell_states else y, (h_n, c_n)


def rnn_cell(
    x: Tensor,
    h: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of `rnn`.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)        or max(., 0) for "relu"

    Args:
        x: (B, I) float32 or float64, on a GPU float32, bfloat16 or float16; any strides.
        h: (B, H), zeros if None.
        w_ih: (H, I).
        w_hh: (H, H).
        b_ih: (H,), given together with b_hh or not at all (zeros).
        b_hh: (H,).
        nonlinearity: "tanh" or "relu".

    Returns:
        h' (B, H).

    Raises, Accuracy, Cost, Source: as `rnn`.
    Equivalent to: torch.rnn_tanh_cell(x, h, w_ih, w_hh, b_ih, b_hh), or torch.rnn_relu_cell.
    """
    spec = _spec("rnn_cell", _rnn_cell_name(nonlinearity), b_ih, b_hh)
    return _step(spec, x, (w_ih, w_hh, b_ih, b_hh), h)[0]


def gru_cell(
    x: Tensor,
    h: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of `gru`.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)    h' = (1 - z) * n + z * h

    Args:
        x: (B, I) float32 or float64, on a GPU float32, bfloat16 or float16; any strides.
        h: (B, H), zeros if None.
        w_ih: (3H, I), gates r|z|n.
        w_hh: (3H, H), gates r|z|n.
        b_ih: (3H,), given together with b_hh or not at all (zeros).
        b_hh: (3H,).

    Returns:
        h' (B, H).

    Raises, Accuracy, Cost, Source: as `gru`.
    Equivalent to: torch.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh).
    """
    return _step(_spec("gru_cell", "gru", b_ih, b_hh), x, (w_ih, w_hh, b_ih, b_hh), h)[0]


def lstm_cell(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lstm`.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)      c' = f * c + i * g
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)      h' = o * tanh(c')

    Args:
        x: (B, I) float32 or float64, on a GPU float32, bfloat16 or float16; any strides.
        h: (B, H), zeros if None.
        c: (B, H), zeros if None.
        w_ih: (4H, I), gates i|f|g|o.
        w_hh: (4H, H), gates i|f|g|o.
        b_ih: (4H,), given together with b_hh or not at all (zeros).
        b_hh: (4H,).

    Returns:
        h', c', each (B, H).

    Raises, Accuracy, Cost, Source: as `lstm`.
    Equivalent to: torch.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh).
    """
    return _step(_spec("lstm_cell", "lstm", b_ih, b_hh), x, (w_ih, w_hh, b_ih, b_hh), h, c)


def _rnn_cell_name(nonlinearity):
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return f"rnn_{nonlinearity}"


def _spec(operation, cell, b_ih, b_hh, reverse=False, clip_recurrent_grad=None):
    if (b_ih is None) != (b_hh is None):
        missing = "b_ih" if b_ih is None else "b_hh"
        raise ValueError(f"{operation}: b_ih and b_hh must be given together, got {missing} = None")
    limit = _check.limit(operation, "clip_recurrent_grad", clip_recurrent_grad)
    return Spec(cell, reverse=reverse, bias=b_ih is not None, limit=limit)


def _require_tensors(spec, *arguments):
    for a in arguments:
        if a is not None and not isinstance(a, Tensor):
            raise TypeError(f"{spec.cell}: expected a torch.Tensor, got {type(a).__name__}")


def _scan(spec, x, weights, h0, c0, masks, cell_states=False):
    """y, h_n, c_n, c, the last two None or empty where the cell or the call has none."""
    _require_tensors(spec, x, *weights, h0, c0, *masks)
    weights = [w for w in weights if w is not None]
    if all(m is None for m in masks) and not cell_states:
        found = infer_layer(spec, x, h0, c0, weights)
        if found is not None:
            return *found, None
    h0, c0 = (None if s is None else s.unsqueeze(0) for s in (h0, c0))
    y, h_n, c_n, c = run(spec, x, h0, c0, weights, masks, cell_states)
    return y, h_n.squeeze(0), c_n.squeeze(0) if spec.kind.has_c else c_n, c


def _step(spec, x, weights, h, c=None):
    """h', c' of one step."""
    _require_tensors(spec, x, *weights, h, c)
    return run_step(spec, x, h, c, weights if spec.bias else weights[:2])
