"""Gradients for NumPy users: `vjp` runs a function and returns what pulls gradients back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fastseq import _attend, _stack, recurrent, user_cells
from fastseq._attend import Options
from fastseq._spec import WEIGHTS, Spec
from fastseq.attention import attention, attention_varlen
from fastseq.linear_scan import linear_scan, linear_scan_vjp, min_gru, min_lstm, min_vjp
from fastseq.position import rotary

_signature = cache(inspect.signature)  # 20 us each time (Zen 4)


def _recurrent(fn: Callable, given: dict) -> tuple[tuple, Callable]:
    """Outputs and pullback of a built-in cell's scan or step."""
    op = fn.__name__.removesuffix("_cell")
    weights, bias = recurrent._weights(tuple(given[n] for n in _WEIGHTS), fn.__name__)
    cell = f"rnn_{recurrent._nonlinearity(fn.__name__, given)}" if op == "rnn" else op
    limit = recurrent._limit(op, given.get("clip_recurrent_grad"))
    step, reverse = fn.__name__ != op, bool(given.get("reverse"))
    spec = Spec(cell, reverse=reverse, bias=bias, step=step, limit=limit)
    return _kept(spec, weights, given, _signature(fn).parameters)


def _user_cell(fn: Callable, given: dict) -> tuple[tuple, Callable]:
    """Outputs and pullback of a user's cell."""
    return _kept(*user_cells.spec_of(given), given, _signature(fn).parameters)


def _kept(spec: Spec, weights: tuple, given: dict, parameters) -> tuple[tuple, Callable]:
    """Outputs of a scan or a step with everything kept, and their pullback."""
    op, step, has_c = spec.op, spec.step, spec.kind.has_c
    h, c = ("h", "c") if step else ("h0", "c0")
    x = recurrent._one(op, "x", given["x"], "B, I") if step else given["x"]
    h0, c0 = (recurrent._one(op, n, given.get(n), "B, H") for n in (h, c))
    masks = user_cells.masks_of(spec, given)
    cell_states = bool(given.get("return_cell_states"))
    y, h_n, c_n, states, reserve = _stack.forward(
        spec, x, h0, c0, weights, masks, save=True, cell_states=cell_states
    )

    def pullback(gradients):
        dy, last = (None, gradients) if step else gradients
        dh_n, dc_n = (last if last is not None else (None, None)) if has_c else (last, None)
        dy, dstates = (dy if dy is not None else (None, None)) if cell_states else (dy, None)
        dh_n = recurrent._one(op, "dh_n", dh_n, "B, H")
        dc_n = recurrent._one(op, "dc_n", dc_n, "B, H")
        dx, dh0, dc0, dw = _stack.backward(
            spec, x, h0, c0, weights, masks, y, reserve, dy, dh_n, dc_n, dstates
        )
        found = dict(zip(spec.names, dw, strict=True))
        found |= {"x": dx[0] if step else dx, h: dh0[0], c: None if dc0 is None else dc0[0]}
        names = [n for n in parameters if n in (*WEIGHTS, "x", h, c)]
        return tuple(found[n] if given[n] is not None else None for n in names)

    last = (h_n[0], c_n[0]) if has_c else h_n[0]
    outputs = last if step else ((y, states) if cell_states else y, last)
    return outputs, pullback


def _attention(fn: Callable, given: dict) -> tuple[Any, Callable]:
    """Outputs and pullback of attention, padded or packed."""
    op, (q, k, v) = fn.__name__, (given[n] for n in "qkv")
    with_lse = given["return_lse"]
    options = Options(**{n: a for n, a in given.items() if n not in (*"qkv", "return_lse")})
    o, lse = _attend.forward(op, q, k, v, options)

    def pullback(gradients):
        do, dlse = gradients if with_lse else (gradients, None)
        dq, dk, dv, dbias = _attend.backward(op, q, k, v, options, o, lse, do, dlse)
        return (dq, dk, dv) if options.bias is None else (dq, dk, dv, dbias)

    return (o, lse) if with_lse else o, pullback


def _rotary(fn: Callable, given: dict) -> tuple[Any, Callable]:
    """A turn, and the turn back."""
    back = given | {"inverse": not given["inverse"]}

    def pullback(dy):
        return (fn(**back | {"x": np.zeros_like(given["x"]) if dy is None else dy}),)

    return fn(**given), pullback


def _linear_scan(fn: Callable, given: dict) -> tuple[Any, Callable]:
    """Outputs and pullback of a linear recurrence, or of a cell built on it."""
    return linear_scan_vjp(given) if fn is linear_scan else min_vjp(fn.__name__, given)


_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")
_SCANS = (recurrent.rnn, recurrent.gru, recurrent.lstm)
_STEPS = (recurrent.rnn_cell, recurrent.gru_cell, recurrent.lstm_cell)
_RULES: dict[Callable, Callable] = dict.fromkeys((*_SCANS, *_STEPS), _recurrent)
_RULES |= {
    user_cells.scan: _user_cell,
    attention: _attention,
    attention_varlen: _attention,
    rotary: _rotary,
}
_RULES |= dict.fromkeys((linear_scan, min_gru, min_lstm), _linear_scan)


def vjp(fn: Callable, *args, **kwargs) -> tuple:
    """Run fn and return its outputs and its vector-Jacobian product.

        outputs = fn(*args, **kwargs)        pullback(d outputs) = (d arg for each array argument)

    Truncated backpropagation through time is `vjp` over chunks: carry the state from one chunk to
    the next and give its gradient as None.

    Args:
        fn: one of fastseq's rnn, gru, lstm, rnn_cell, gru_cell, lstm_cell, scan, attention,
            attention_varlen, rotary, linear_scan, min_gru, min_lstm.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        outputs, as fn returns them, and pullback. pullback takes one argument with the structure
        of outputs (None anywhere means zeros) and returns the gradients of the array arguments
        in the order of fn's signature, None for those that were None; attention's are those of q,
        k, v and, if given, bias. It may be called again.

    Raises:
        TypeError: fn has no gradient rule here. Otherwise what fn raises.

    Accuracy: gradients within three times torch's own error against float64 (tests).
    Cost: twice fn's FLOP; keeps what fn's docstring states, until pullback is dropped.
    Equivalent to: jax.vjp(fn, *args)
    Source: Werbos, Backpropagation through time: what it does and how to do it, 1990.
    """
    if not any(fn is known for known in _RULES):
        names = " ".join(known.__name__ for known in _RULES)
        raise TypeError(f"vjp: fn must be one of {names}, got {fn!r}")
    bound = _signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()
    return _RULES[fn](fn, bound.arguments)
