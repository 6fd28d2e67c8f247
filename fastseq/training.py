"""Training aids over NumPy arrays: clipped gradients, truncated backpropagation, gradient flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fastseq import _check, _clip, recurrent
from fastseq._cell import Cell
from fastseq.user_cells import scan
from fastseq.vjp import vjp

Array = np.ndarray

_CELLS: dict[Callable, Callable] = {
    recurrent.rnn: recurrent.rnn_cell,
    recurrent.gru: recurrent.gru_cell,
    recurrent.lstm: recurrent.lstm_cell,
}


def clip_grad_norm_(
    arrays: Array | Iterable[Array | None],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> float:
    """Scale all arrays together, in place, so that their common norm is at most max_norm.

        norm = (sum |g|^p)^(1/p) over all elements of all arrays, max |g| for p = inf
        g' = g * min(max_norm / (norm + 1e-6), 1)

    Args:
        arrays: float32 and float64 arrays of any shapes and strides, writeable, in any mix: each
            keeps its dtype. None is skipped. One array is taken as a list of one.
        max_norm: >= 0.
        norm_type: p > 0, or inf.
        error_if_nonfinite: raise if the norm is NaN or infinite, before anything is changed. False:
            an infinite norm scales by 0, a NaN by NaN, as in torch.

    Returns:
        norm before the scaling, rounded to float32 if all arrays are.

    Raises:
        TypeError: an array is none, or neither float32 nor float64; a number is none.
        ValueError: an array is read-only, max_norm < 0, norm_type <= 0.
        RuntimeError: the norm is not finite, with error_if_nonfinite.
        ImportError: Numba is not installed.

    Accuracy: summed in float64 in an order that sizes alone decide: the same bits for any number
        of threads; float32 within twice torch's own error against float64 (tests).
    Cost: 2 FLOP an element and one pass over memory for the norm, one read and write for the
        scaling, which is left out where the factor is 1. An array with gaps is copied for it.
    Equivalent to: torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    Source: Pascanu, Mikolov & Bengio, arXiv:1211.5063.
    """
    batch = _batch("clip_grad_norm_", arrays)
    return _clip.clip_norm(batch, max_norm, norm_type, error_if_nonfinite)[0]


def clip_grad_value_(arrays: Array | Iterable[Array | None], clip_value: float) -> None:
    """Limit every element of all arrays, in place.

        g' = min(max(g, -clip_value), clip_value)        NaN stays NaN

    Args:
        arrays: as in `clip_grad_norm_`.
        clip_value: >= 0.

    Returns:
        None.

    Raises:
        TypeError, ValueError, ImportError: as `clip_grad_norm_`.

    Accuracy: exact; clip_value is rounded to each array's dtype.
    Cost: one read and write of memory.
    Equivalent to: torch.nn.utils.clip_grad_value_(parameters, clip_value)
    Source: Mikolov, Statistical language models based on neural networks, 2012.
    """
    _clip.clip_value(_batch("clip_grad_value_", arrays), clip_value)


def _batch(op: str, arrays) -> _clip.Batch:
    batch = _clip.Batch(op, "arrays")
    for i, a in enumerate([arrays] if isinstance(arrays, np.ndarray) else arrays):
        if a is not None:
            batch.add(i, a)
    return batch


def tbptt(
    fn: Callable,
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    chunk: int,
    grads: Iterable[Array | None] | None = None,
    **options,
) -> Iterator[tuple[Any, Any, Callable]]:
    """Truncated backpropagation through time: a scan chunk by chunk, the state carried on.

        y_k, state_k = fn(x_k, weights, state_{k-1})        d state_{k-1} = 0

    A loop over the chunks may change the weights, in place, between one chunk and the next:

        grads = [np.zeros_like(w) for w in weights]
        for y, state, pullback in tbptt(fastseq.gru, x, *weights, chunk=32, grads=grads):
            pullback(dloss(y))

    Args:
        fn: fastseq.rnn, gru or lstm.
        x: (T, B, I).
        w_ih: (G H, I).
        w_hh: (G H, H).
        b_ih: (G H,), or None with b_hh: no biases.
        b_hh: (G H,).
        h0: (B, H) the first chunk's initial state, zeros if None.
        c0: (B, H), the LSTM's.
        chunk: steps of a chunk, K >= 1; the last one has what is left.
        grads: arrays like w_ih, w_hh, b_ih, b_hh (None is skipped), to which each pullback adds the
            gradients of the weights; None: they are only returned.
        options: those of fn: nonlinearity, lengths, resets, return_cell_states,
            clip_recurrent_grad; not reverse.

    Returns:
        An iterator over the chunks: y (K, B, H), as fn's first output; the state after it, h or
        (h, c), each (B, H); pullback, which takes dy and returns dx, dw_ih, dw_hh, db_ih, db_hh of
        this chunk, None where the argument was None.

    Raises:
        TypeError, ValueError: fn is none of the three, chunk < 1, reverse, an array of grads does
            not fit; what fn raises.

    Accuracy: as fn; the state carried is exact: y has the bits of one call over all steps.
    Cost: as fn over all steps; kept for backward: one chunk, and those whose pullback is alive.
    Equivalent to: y, state = module(x_k, state); state = state.detach(), chunk by chunk.
    Source: Williams & Peng, An efficient gradient-based algorithm for on-line training of
        recurrent network trajectories, 1990.
    """
    _check_scan("tbptt", fn, x, options, c0)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"tbptt: chunk must be an integer >= 1, got {chunk!r}")
    weights = (w_ih, w_hh, b_ih, b_hh)
    sums = None if grads is None else _check_sums(weights, tuple(grads))
    return _chunks(fn, x, weights, (h0, c0), chunk, sums, options)


def _check_scan(op: str, fn: Callable, x, options: dict, c0) -> None:
    if fn not in _CELLS:
        raise TypeError(f"{op}: fn must be one of fastseq's rnn gru lstm, got {fn!r}")
    if options.get("reverse"):
        raise ValueError(f"{op}: reverse must be False: states go forward in time, got True")
    if c0 is not None and fn is not recurrent.lstm:
        raise TypeError(f"{op}: c0 must be None for {fn.__name__}, got {type(c0).__name__}")
    _check.floats(op, "x", _check.signature(x))
    _check.rank(op, "x", x.shape, "T, B, I")


def _check_sums(weights: tuple, sums: tuple) -> tuple:
    """The arrays to add to, one for each weight."""
    if len(sums) not in (2, 4):
        raise ValueError(f"tbptt: grads must be 2 or 4 arrays, as the weights, got {len(sums)}")
    sums += (None,) * (4 - len(sums))
    for i, (w, total) in enumerate(zip(weights, sums, strict=True)):
        if w is not None and total is not None:
            _check.floats("tbptt", f"grads[{i}]", _check.signature(total), w.dtype, "the weight")
            letters = ", ".join(("G H", "I" if i == 0 else "H")[: w.ndim])
            _check.shape("tbptt", f"grads[{i}]", total.shape, letters, w.shape)
    return sums


def _chunks(fn, x, weights, state, chunk, sums, options):
    lstm = fn is recurrent.lstm
    lengths, resets = (options.pop(name, None) for name in ("lengths", "resets"))
    if lengths is not None:
        lengths = _check.counts(fn.__name__, "lengths", lengths, ("B", x.shape[1]), ("T", len(x)))
    resets = _check.resets(fn.__name__, resets, *x.shape[:2])
    for t in range(0, max(len(x), 1), chunk):
        part = slice(t, t + chunk)
        x_k = x[part]
        left = None if lengths is None else np.clip(lengths - t, 0, len(x_k))
        again = None if resets is None else resets[part]
        states = state if lstm else state[:1]
        masks = {"lengths": left, "resets": again}
        (y, last), pull = vjp(fn, x_k, *weights, *states, **masks, **options)
        state = last if lstm else (last, None)
        yield y, last, _adding(pull, sums)


def _adding(pull: Callable, sums: tuple | None) -> Callable:
    def pullback(dy):
        gradients = pull((dy, None))[:5]
        for total, gradient in zip(sums or (), gradients[1:], strict=False):
            if total is not None and gradient is not None:
                total += gradient
        return gradients

    return pullback


def gradient_flow(
    fn: Callable,
    x: Array,
    w_ih: Array,
    w_hh: Array | None = None,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    params: Array | None = None,
    dy: Array | None = None,
    nonlinearity: str | None = None,
    clip_recurrent_grad: float | None = None,
) -> Array:
    """How large the gradient of the loss is at every step: where it vanishes, where it explodes.

        norm_t = ||dL / dh_t||, h_t reaching L through y_t and through every later step

    Args:
        fn: fastseq.rnn, gru or lstm, or what `fastseq.cell` made.
        x: (T, B, I).
        w_ih: (G H, I).
        w_hh: (G H, H), or None for a cell without it.
        b_ih: (G H,), or None with b_hh: no biases.
        b_hh: (G H,).
        h0: (B, H), zeros if None.
        c0: (B, H), of an LSTM or a cell with c.
        params: (N, H), of a cell with parameters per unit.
        dy: (T, B, H) the gradient of L at the outputs; None: L is the sum of the last step's.
        nonlinearity: the RNN's, "tanh" if None.
        clip_recurrent_grad: as fn's: what comes from later steps is limited to it.

    Returns:
        (T,) float64: the Euclidean norm over batch and units. `plot_gradient_flow` draws it.

    Raises:
        TypeError, ValueError: fn is none of these, dy does not fit; what fn raises.

    Accuracy: the gradients as fn's; their norms in float64.
    Cost: forward and backward in single steps, which pack the weights at every step.
    Equivalent to: [torch.autograd.grad(loss, h)[0].norm() for h in states] of a loop over cells
    Source: Pascanu, Mikolov & Bengio, arXiv:1211.5063.
    """
    limit = _check.limit("gradient_flow", "clip_recurrent_grad", clip_recurrent_grad)
    weights = (w_ih, w_hh, b_ih, b_hh)
    if isinstance(fn, Cell):
        _check.rank("gradient_flow", "x", x.shape, "T, B, I")
        step = _cell_steps(fn, (*weights, params))
    else:
        _check_scan("gradient_flow", fn, x, {}, c0)
        options = {} if nonlinearity is None else {"nonlinearity": nonlinearity}
        step = _built_in_steps(fn, weights, options)
    if nonlinearity is not None and fn is not recurrent.rnn:
        name = getattr(fn, "__name__", fn)
        raise TypeError(
            f"gradient_flow: nonlinearity must be None for {name}, got {nonlinearity!r}"
        )
    states: tuple = (h0, c0) if fn is recurrent.lstm or getattr(fn, "has_c", False) else (h0,)
    pullbacks = []
    for x_t in x:
        states, pull = step(x_t, states)
        pullbacks.append(pull)
    return _rewind(pullbacks, states, _loss_gradient(dy, x, states[0]), limit)


def _built_in_steps(fn: Callable, weights: tuple, options: dict) -> Callable:
    """step(x_t, states) -> the next states, and what pulls their gradients back to `states`."""

    def step(x_t, states):
        out, pull = vjp(_CELLS[fn], x_t, *states, *weights, **options)
        n = len(states)
        return (out,) if n == 1 else out, lambda *d: pull(d[0] if n == 1 else d)[1 : 1 + n]

    return step


def _cell_steps(cell: Cell, weights: tuple) -> Callable:
    """The same of a user's cell."""

    def step(x_t, states):
        n = len(states)
        start = dict(zip(("h0", "c0"), states, strict=False))
        (_, out), pull = vjp(scan, cell, x_t[None], *weights, **start)
        return (out,) if n == 1 else out, lambda *d: pull((None, d[0] if n == 1 else d))[6 : 6 + n]

    return step


def _loss_gradient(dy, x: Array, h: Array | None) -> Array:
    if len(x) == 0 or h is None:
        raise ValueError("gradient_flow: x must have at least one step, got T = 0")
    if dy is None:
        dy = np.zeros((len(x), *h.shape), x.dtype)
        dy[-1] = 1
    _check.floats("gradient_flow", "dy", _check.signature(dy), x.dtype)
    _check.shape("gradient_flow", "dy", dy.shape, "T, B, H", (len(x), *h.shape))
    return dy


def _rewind(pullbacks: list, states: tuple, dy: Array, limit: float | None) -> Array:
    """The norms, from the last step to the first."""
    norms = np.empty(len(pullbacks))
    rest: tuple = (None,) * len(states)  # the gradients that come from later steps
    for t in reversed(range(len(pullbacks))):
        dh = dy[t] if rest[0] is None else dy[t] + rest[0]
        norms[t] = np.linalg.norm(dh.astype(np.float64))
        rest = pullbacks[t](dh, *rest[1:])
        if limit is not None:
            rest = tuple(None if d is None else np.clip(d, -limit, limit) for d in rest)
    return norms
