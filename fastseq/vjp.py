"""Gradients for NumPy users: `vjp` runs a function and returns what pulls gradients back."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

from fastseq import _stack, recurrent
from fastseq._stack import Spec


def _recurrent(fn, arguments: dict) -> tuple[tuple, Callable]:
    """Forward of rnn, gru, lstm with everything kept, and their pullback."""
    op = fn.__name__
    cell = f"rnn_{arguments['nonlinearity']}" if op == "rnn" else op
    names = [n for n in ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0") if n in arguments]
    x = arguments["x"]
    weights, bias = recurrent._weights(*(arguments[n] for n in names[1:5]), op)
    spec = Spec(cell, reverse=bool(arguments["reverse"]), bias=bias)
    h0 = recurrent._one(op, "h0", arguments["h0"], "B, H")
    c0 = recurrent._one(op, "c0", arguments.get("c0"), "B, H")
    options = (arguments["lengths"], arguments["resets"])
    cell_states = arguments.get("return_cell_states", False)
    y, h_n, c_n, c, reserve = _stack.forward(
        spec, x, h0, c0, weights, *options, save=True, cell_states=cell_states
    )

    def pullback(gradients):
        dy, dh_n = gradients
        dh_n, dc_n = dh_n if op == "lstm" and dh_n is not None else (dh_n, None)
        dy, dc = dy if cell_states and dy is not None else (dy, None)
        one = [None if d is None else d[None] for d in (dh_n, dc_n)]
        dx, dh0, dc0, dw = _stack.backward(
            spec, x, h0, c0, weights, *options, y, reserve, dy, *one, dc
        )
        found = dict(zip(names[1:5], dw, strict=False), x=dx, h0=dh0[0])
        found["c0"] = None if dc0 is None else dc0[0]
        return tuple(found.get(n) if arguments[n] is not None else None for n in names)

    last = h_n[0] if op != "lstm" else (h_n[0], c_n[0])
    return ((y, c) if cell_states else y, last), pullback


def _cell(fn, arguments: dict) -> tuple:
    """A cell is its function over one step."""
    op = fn.__name__.removesuffix("_cell")
    whole = getattr(recurrent, op)
    states = {"h0": arguments["h"]} | ({"c0": arguments["c"]} if op == "lstm" else {})
    shared = {n: v for n, v in arguments.items() if n not in ("x", "h", "c")}
    bound = signature(whole).bind(arguments["x"][None], **shared, **states)
    bound.apply_defaults()
    (_, last), pull = _recurrent(whole, bound.arguments)

    def pullback(gradients):
        dx, dw_ih, dw_hh, db_ih, db_hh, *dstates = pull((None, gradients))
        return (dx[0], *dstates, dw_ih, dw_hh, db_ih, db_hh)

    return last, pullback


_RULES = {fn: _recurrent for fn in (recurrent.rnn, recurrent.gru, recurrent.lstm)}
_RULES |= {fn: _cell for fn in (recurrent.rnn_cell, recurrent.gru_cell, recurrent.lstm_cell)}


def vjp(fn: Callable, *args, **kwargs) -> tuple:
    """Run fn and return its outputs and its vector-Jacobian product.

        outputs = fn(*args, **kwargs)        pullback(d outputs) = (d arg for each array argument)

    Truncated backpropagation through time is `vjp` over chunks: carry the state from one chunk to
    the next and give its gradient as None.

    Args:
        fn: one of fastseq's rnn, gru, lstm, rnn_cell, gru_cell, lstm_cell.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        outputs, as fn returns them, and pullback. pullback takes one argument with the structure
        of outputs (None anywhere means zeros) and returns the gradients of the array arguments
        in the order of fn's signature, None for those that were None. It may be called again.

    Raises:
        TypeError: fn has no gradient rule here. Otherwise what fn raises.

    Accuracy: gradients within three times torch's own error against float64 (tests).
    Cost: twice fn's FLOP; keeps what fn's docstring states, until pullback is dropped.
    Equivalent to: jax.vjp(fn, *args)
    Source: Werbos, Backpropagation through time: what it does and how to do it, 1990.
    """
    if fn not in _RULES:
        known = " ".join(f.__name__ for f in _RULES)
        raise TypeError(f"vjp: fn must be one of {known}, got {fn!r}")
    bound = signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()
    return _RULES[fn](fn, bound.arguments)
