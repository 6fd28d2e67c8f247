"""RNN, GRU and LSTM over NumPy arrays: whole sequences and single steps."""

from __future__ import annotations

from functools import lru_cache

from fastseq import _check, _stack
from fastseq._spec import KINDS, NO_MASKS, Masks, Spec
from fastseq._stack import Array


def _weights(weights: tuple, op: str) -> tuple[tuple, bool]:
    """The flat list of weights, and whether it holds biases."""
    w_ih, w_hh, b_ih, b_hh = weights
    if b_ih is None and b_hh is None:
        return (w_ih, w_hh), False
    if b_ih is None or b_hh is None:
        missing = "b_ih" if b_ih is None else "b_hh"
        raise ValueError(f"{op}: b_ih and b_hh must be given together, got {missing} = None")
    return (w_ih, w_hh, b_ih, b_hh), True


def _nonlinearity(op: str, given: dict) -> str:
    return _check.choice(op, "nonlinearity", given["nonlinearity"], ("tanh", "relu"))


@lru_cache(maxsize=256)
def _spec(cell: str, reverse: bool, bias: bool, limit: float | None, step: bool = False) -> Spec:
    return Spec(cell, reverse=reverse, bias=bias, step=step, limit=limit)


def _limit(op: str, value) -> float | None:
    return _check.limit(op, "clip_recurrent_grad", value)


def _one(op: str, name: str, value, letters: str):
    """A state (B, H) as that of a stack of one layer, a step (B, I) as a sequence of one."""
    if value is None and letters == "B, H":
        return None
    _check.floats(op, name, _check.signature(value))
    _check.rank(op, name, value.shape, letters)
    return value[None]


def _run(cell: str, x, w, h0, c0=None, *, lengths, resets, reverse, clip, cell_states=False):
    op = KINDS[cell].op
    weights, bias = _weights(w, op)
    spec = _spec(cell, bool(reverse), bias, None if clip is None else _limit(op, clip))
    h0 = None if h0 is None else _one(op, "h0", h0, "B, H")
    c0 = None if c0 is None else _one(op, "c0", c0, "B, H")
    masks = NO_MASKS if lengths is None and resets is None else Masks(lengths, resets)
    return _stack.forward(spec, x, h0, c0, weights, masks, cell_states=cell_states)


def rnn(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    clip_recurrent_grad: float | None = None,
) -> tuple[Array, Array]:
    """Elman recurrent network over T steps.

        h' = f(W_ih x + b_ih + W_hh h + b_hh)        f = tanh or max(., 0)

    Args:
        x: (T, B, I) float32 or float64, any strides; T >= 1.
        w_ih: (H, I), as torch.nn.RNN.weight_ih_l0.
        w_hh: (H, H).
        b_ih: (H,), or None with b_hh: no biases.
        b_hh: (H,).
        h0: (B, H), or None: zeros.
        nonlinearity: "tanh" or "relu".
        lengths: (B,) integers in 0..T, any order, or None: all T. Steps past a row's length are
            not computed and give zeros; the reverse direction starts at each row's own end.
        resets: (T, B) bool, or None. True sets row b's state to zero before step t.
        reverse: run from the last step to the first; y keeps the order of x.
        clip_recurrent_grad: m > 0, or None: no limit. In `vjp` the gradient that flows from a step
            back into the state before it, h0 too, becomes min(max(., -m), m), element by element;
            what comes from outside, to y and h_n, is not limited.

    Returns:
        y (T, B, H), the state after every step, and h_n (B, H), each row's last state.

    Raises:
        TypeError: a dtype that is not x's, or not float32 or float64.
        ValueError: a shape, length, nonlinearity or limit out of range; the message states both.

    Accuracy: float32 within twice torch's own error against float64 (tests); tanh to 4 ULP.
        The bits do not depend on the thread count or on the other rows of the batch.
    Cost: 2 H (I + H) FLOP per active step and row; for backward only y is kept.
    Equivalent to: torch.nn.RNN(I, H, nonlinearity=nonlinearity)(x, h0[None])
    Source: Elman, Finding structure in time, 1990; ReLU: Le, Jaitly & Hinton, arXiv:1504.00941;
        clip_recurrent_grad: after Graves, arXiv:1308.0850, 2.1, who limits the gates' gradients.
    """
    _check.choice("rnn", "nonlinearity", nonlinearity, ("tanh", "relu"))
    y, h_n, _, _, _ = _run(
        f"rnn_{nonlinearity}", x, (w_ih, w_hh, b_ih, b_hh), h0,
        lengths=lengths, resets=resets, reverse=reverse, clip=clip_recurrent_grad,
    )  # fmt: skip
    return y, h_n[0]


def gru(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    *,
    lengths: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    clip_recurrent_grad: float | None = None,
) -> tuple[Array, Array]:
    """Gated recurrent unit over T steps, reset gate after the product.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)    h' = (1 - z) * n + z * h

    Args:
        x: (T, B, I) float32 or float64, any strides; T >= 1.
        w_ih: (3H, I), gates r|z|n, as torch.nn.GRU.weight_ih_l0.
        w_hh: (3H, H), gates r|z|n.
        b_ih: (3H,), or None with b_hh: no biases.
        b_hh: (3H,).
        h0: (B, H), or None: zeros.
        lengths: (B,) integers in 0..T, any order, or None: all T. Steps past a row's length are
            not computed and give zeros; the reverse direction starts at each row's own end.
        resets: (T, B) bool, or None. True sets row b's state to zero before step t.
        reverse: run from the last step to the first; y keeps the order of x.
        clip_recurrent_grad: m > 0, or None: no limit. In `vjp` the gradient that flows from a step
            back into the state before it, h0 too, becomes min(max(., -m), m), element by element;
            what comes from outside, to y and h_n, is not limited.

    Returns:
        y (T, B, H), the state after every step, and h_n (B, H), each row's last state.

    Raises:
        TypeError: a dtype that is not x's, or not float32 or float64.
        ValueError: a shape, length or limit out of range; the message states both sides.

    Accuracy: float32 within twice torch's own error against float64 (tests); tanh to 4 ULP,
        sigmoid to 3. The bits do not depend on the thread count or on the rest of the batch.
    Cost: 6 H (I + H) FLOP per active step and row; for backward 4 H values a step and row.
    Equivalent to: torch.nn.GRU(I, H)(x, h0[None])
    Source: Cho et al., arXiv:1406.1078v1 (this form of the reset gate); clip_recurrent_grad:
        after Graves, arXiv:1308.0850, 2.1, who limits the gates' gradients.
    """
    y, h_n, _, _, _ = _run(
        "gru", x, (w_ih, w_hh, b_ih, b_hh), h0,
        lengths=lengths, resets=resets, reverse=reverse, clip=clip_recurrent_grad,
    )  # fmt: skip
    return y, h_n[0]


def lstm(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    lengths: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
    clip_recurrent_grad: float | None = None,
):
    """Long short-term memory over T steps.

        i, f, o = sigmoid(W_i* x + b_i* + W_h* h + b_h*)    g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        c' = f * c + i * g                                  h' = o * tanh(c')

    Args:
        x: (T, B, I) float32 or float64, any strides; T >= 1.
        w_ih: (4H, I), gates i|f|g|o, as torch.nn.LSTM.weight_ih_l0.
        w_hh: (4H, H), gates i|f|g|o.
        b_ih: (4H,), or None with b_hh: no biases.
        b_hh: (4H,).
        h0: (B, H), or None: zeros.
        c0: (B, H), or None: zeros.
        lengths: (B,) integers in 0..T, any order, or None: all T. Steps past a row's length are
            not computed and give zeros; the reverse direction starts at each row's own end.
        resets: (T, B) bool, or None. True sets row b's states to zero before step t.
        reverse: run from the last step to the first; y keeps the order of x.
        return_cell_states: also return the cell state of every step.
        clip_recurrent_grad: m > 0, or None: no limit. In `vjp` the gradient that flows from a step
            back into the states before it, h0 and c0 too, becomes min(max(., -m), m), element by
            element; what comes from outside, to y, c, h_n and c_n, is not limited.

    Returns:
        y (T, B, H) and (h_n, c_n), each (B, H): each row's last states. With return_cell_states
        (y, c) with c (T, B, H) stands in y's place.

    Raises:
        TypeError: a dtype that is not x's, or not float32 or float64.
        ValueError: a shape, length or limit out of range; the message states both sides.

    Accuracy: float32 within twice torch's own error against float64 (tests); tanh to 4 ULP,
        sigmoid to 3. The bits do not depend on the thread count or on the rest of the batch.
    Cost: 8 H (I + H) FLOP per active step and row; for backward 5 H values a step and row.
    Equivalent to: torch.nn.LSTM(I, H)(x, (h0[None], c0[None]))
    Source: Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000;
        clip_recurrent_grad: after Graves, arXiv:1308.0850, 2.1, who limits the gates' gradients.
    """
    y, h_n, c_n, c, _ = _run(
        "lstm", x, (w_ih, w_hh, b_ih, b_hh), h0, c0,
        lengths=lengths, resets=resets, reverse=reverse, clip=clip_recurrent_grad,
        cell_states=return_cell_states,
    )  # fmt: skip
    return ((y, c) if return_cell_states else y), (h_n[0], c_n[0])


def _step(cell: str, x, h, c, w):
    op = f"{KINDS[cell].op}_cell"
    weights, bias = _weights(w, op)
    x, h, c = _one(op, "x", x, "B, I"), _one(op, "h", h, "B, H"), _one(op, "c", c, "B, H")
    _, h_n, c_n, _, _ = _stack.forward(_spec(cell, False, bias, None, True), x, h, c, weights)
    return h_n[0], None if c_n is None else c_n[0]


def rnn_cell(
    x: Array,
    h: Array | None,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Array:
    """One step of `rnn`, for streaming.

        h' = f(W_ih x + b_ih + W_hh h + b_hh)        f = tanh or max(., 0)

    Args:
        x: (B, I) float32 or float64.
        h: (B, H), or None: zeros.
        w_ih: (H, I).
        w_hh: (H, H).
        b_ih: (H,), or None with b_hh: no biases.
        b_hh: (H,).
        nonlinearity: "tanh" or "relu".

    Returns:
        h' (B, H): the same bits as that step of `rnn`.

    Raises:
        TypeError, ValueError: as `rnn`.

    Accuracy: as `rnn`.
    Cost: 2 B H (I + H) FLOP, and the weights are packed at every call.
    Equivalent to: torch.nn.RNNCell(I, H, nonlinearity=nonlinearity)(x, h)
    Source: as `rnn`.
    """
    _check.choice("rnn_cell", "nonlinearity", nonlinearity, ("tanh", "relu"))
    return _step(f"rnn_{nonlinearity}", x, h, None, (w_ih, w_hh, b_ih, b_hh))[0]


def gru_cell(
    x: Array,
    h: Array | None,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> Array:
    """One step of `gru`, for streaming.

        r, z = sigmoid(W_i* x + b_i* + W_h* h + b_h*)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        h' = (1 - z) * n + z * h

    Args:
        x: (B, I) float32 or float64.
        h: (B, H), or None: zeros.
        w_ih: (3H, I), gates r|z|n.
        w_hh: (3H, H).
        b_ih: (3H,), or None with b_hh: no biases.
        b_hh: (3H,).

    Returns:
        h' (B, H): the same bits as that step of `gru`.

    Raises:
        TypeError, ValueError: as `gru`.

    Accuracy: as `gru`.
    Cost: 6 B H (I + H) FLOP, and the weights are packed at every call.
    Equivalent to: torch.nn.GRUCell(I, H)(x, h)
    Source: as `gru`.
    """
    return _step("gru", x, h, None, (w_ih, w_hh, b_ih, b_hh))[0]


def lstm_cell(
    x: Array,
    h: Array | None,
    c: Array | None,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, Array]:
    """One step of `lstm`, for streaming.

        i, f, o = sigmoid(W_i* x + b_i* + W_h* h + b_h*)    g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        c' = f * c + i * g                                  h' = o * tanh(c')

    Args:
        x: (B, I) float32 or float64.
        h: (B, H), or None: zeros.
        c: (B, H), or None: zeros.
        w_ih: (4H, I), gates i|f|g|o.
        w_hh: (4H, H).
        b_ih: (4H,), or None with b_hh: no biases.
        b_hh: (4H,).

    Returns:
        h', c' (B, H): the same bits as that step of `lstm`.

    Raises:
        TypeError, ValueError: as `lstm`.

    Accuracy: as `lstm`.
    Cost: 8 B H (I + H) FLOP, and the weights are packed at every call.
    Equivalent to: torch.nn.LSTMCell(I, H)(x, (h, c))
    Source: as `lstm`.
    """
    return _step("lstm", x, h, c, (w_ih, w_hh, b_ih, b_hh))
