"""Recurrent cells that users write: `cell` makes one of a plain function, `scan` runs it."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastseq import _check, _stack
from fastseq._cell import Cell, TracedCell, check
from fastseq._spec import WEIGHTS, Masks, Spec, add
from fastseq._stack import Array
from fastseq.kernels.numba.trace import Node, Value, definition, needed, trace
from fastseq.recurrent import _one

MAX_GATES = 4  # products per unit that the kernels' tiles hold
STATES = ("h", "c")


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), of NumPy arrays, and in functions given to `cell` or as a score_mod."""
    if isinstance(x, Value):
        return x.graph.apply("sigmoid", x)
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def relu(x: Any) -> Any:
    """max(x, 0), with gradient 0 at 0; as `sigmoid`."""
    return np.maximum(x, 0)


def cell(
    function: Callable | None = None,
    *,
    params: Sequence[str] = (),
    split: Sequence[str] = (),
    recurrent: bool = True,
) -> Any:
    """A recurrent cell of your own: write its element-wise part, the library does the rest.

        a = W_ih x + b_ih + W_hh h + b_hh          one argument of the function per gate
        h'[, c'] = function(a_1, ..., a_G, h[, c], params)      element by element

    The function is traced once with symbols and compiled by Numba to a callback of the same scan
    driver as the built-in cells: products, threads, lengths, resets, stacked layers and directions
    are theirs. Its gradient is derived by reverse-mode differentiation of the trace.

    Args:
        function: of one argument per pre-activation, in the order of the rows of w_ih, and of the
            states h and, if it has one, c, and of `params`, all by these names and in any order.
            Arguments with a default keep it. It returns h', or (h', c'). It may use arithmetic and
            comparisons, np.where, np.exp, np.tanh, np.maximum and their like, and `sigmoid` and
            `relu` of fastseq.cells. Without it, `cell` is a decorator with the other arguments.
        params: (N) of the arguments, that are parameters per unit, not gates: the rows of `scan`'s
            params.
        split: two arguments that are the last gate's W_ih x + b_ih and W_hh h + b_hh, apart, as
            in a GRU, whose reset gate multiplies the second only; with two gates or more beside.
        recurrent: False: there is no w_hh; h is read by the function only.

    Returns:
        A cell, for `scan`, `fastseq.torch.scan` and `fastseq.torch.nn.Recurrent`.

    Raises:
        TypeError: the function does what is not element-wise, or fails, or its arguments do not
            fit; ValueError: it returns another number of values, or has more than 4 gates. The
            message shows the line.

    Accuracy: its arithmetic is done as written in the arrays' dtype; exp, tanh and sigmoid are the
        library's own, to 4 ULP.
    Cost: compiled at the first call per dtype, in seconds, and kept in ~/.cache/fastseq. A step
        then costs what a built-in cell with as many gates costs, and its planes again in backward.
    Equivalent to: a Python loop over time around `function`.
    Source: reverse-mode differentiation: Griewank & Walther, Evaluating Derivatives, 2008.
    """
    if function is None:
        return lambda f: cell(f, params=params, split=split, recurrent=recurrent)
    arguments = _arguments(function)
    planes = _planes(function, arguments, tuple(params), tuple(split), recurrent)
    what = f"cell {function.__name__}"
    has_c = "c" in arguments
    graph, results = trace(what, function, arguments, 1 + has_c)
    told = [
        [(n.op, [a.index if isinstance(a, Node) else a for a in n.args]) for n in needed(results)],
        [n.index for n in results],
        [planes, tuple(params), tuple(split), recurrent],
    ]
    name = re.sub(r"\W", "_", function.__name__)  # a lambda's has brackets
    key = f"{name}_{hashlib.sha256(repr(told).encode()).hexdigest()[:8]}"
    made = TracedCell(
        op=function.__name__,
        gates=len(planes) - bool(split),
        has_c=has_c,
        recurrent=recurrent,
        params=len(params),
        function=function,
        key=key,
        arguments=arguments,
        planes=planes,
        parameters=tuple(params),
        graph=graph,
        results=results,
    )
    return add(key, made)


def _arguments(function: Callable) -> tuple[str, ...]:
    """The function's arguments without a default."""
    found = inspect.signature(function).parameters.values()
    given = [p for p in found if p.default is p.empty]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given):
        names = ", ".join(map(str, given))
        text = f"cell {function.__name__}: its arguments must have names and positions, got {names}"
        raise TypeError(f"{text}\n{definition(function)}")
    return tuple(p.name for p in given)


def _planes(function, arguments, params, split, recurrent) -> tuple[str, ...]:
    """The arguments that are pre-activations, in the kernels' order; what cannot be is refused."""
    gates = tuple(n for n in arguments if n not in (*STATES, *params, *split))

    def refuse(kind: type[Exception], text: str) -> None:
        raise kind(f"cell {function.__name__}: {text}\n{definition(function)}")

    for name in (*params, *split):
        if name not in arguments or name in STATES:
            refuse(
                TypeError,
                f"params and split must name its arguments other than h and c, got {name}",
            )
    if len({*params, *split}) != len(params) + len(split):
        refuse(TypeError, f"params and split must be different names, got {params} and {split}")
    if len(split) not in (0, 2):
        refuse(TypeError, f"split must be two names, got {split}")
    if split and not recurrent:
        refuse(TypeError, "split must be empty where recurrent is False: there is no W_hh h")
    if "h" not in arguments and not recurrent:
        refuse(TypeError, "h must be among its arguments where recurrent is False")
    count = len(gates) + bool(split)
    if split and len(gates) < 2:
        refuse(ValueError, f"split must have two gates beside it, got {gates}")
    if not 1 <= count <= MAX_GATES:
        refuse(ValueError, f"it must have 1 to {MAX_GATES} gates, got {count}: {gates + split}")
    return (split[0], *gates, split[1]) if split else gates


def scan(
    cell: Cell,
    x: Array,
    w_ih: Array,
    w_hh: Array | None = None,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    params: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    lengths: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
    clip_recurrent_grad: float | None = None,
    recurrent_mask: Array | None = None,
    zoneout_h: Array | None = None,
    zoneout_c: Array | None = None,
) -> tuple:
    """A cell of your own, or one of `fastseq.cells`, over T steps.

        a = W_ih x + b_ih + W_hh (d * h) + b_hh        d: recurrent_mask, else 1
        m, m_c = cell(a_1, ..., a_G, h, c, params)
        h' = z * h + (1 - z) * m                       z: zoneout_h, else 0; c' likewise

    Args:
        cell: what `fastseq.cell` made, or one of `fastseq.cells`, with G gates.
        x: (T, B, I) float32 or float64, any strides; T >= 1.
        w_ih: (G H, I), gates in the order of the cell's arguments.
        w_hh: (G H, H), or None for a cell without it.
        b_ih: (G H,), or None with b_hh: no biases. Layer-normalised cells have theirs in params;
            what is given here is added before the normalisation.
        b_hh: (G H,), or None for a cell without w_hh.
        params: (N, H), the parameters per unit in the order of the cell's; None if it has none.
        h0: (B, H), or None: zeros.
        c0: (B, H), or None: zeros; only of a cell with c.
        lengths: (B,) integers in 0..T, any order, or None: all T. Steps past a row's length are
            not computed and give zeros; the reverse direction starts at each row's own end.
        resets: (T, B) bool, or None. True sets row b's states to zero before step t.
        reverse: run from the last step to the first; y keeps the order of x.
        return_cell_states: give c of every step too.
        clip_recurrent_grad: of `vjp`: what flows back from one step to the one before is limited
            to [-clip_recurrent_grad, clip_recurrent_grad], element by element; None: it is not.
        recurrent_mask: (B, H), or None. Recurrent dropout: one for the whole sequence, its numbers
            0 with probability p and 1 / (1 - p) else; ones, or None, in inference.
        zoneout_h: (T, B, H), or None. Zoneout: 1 with probability p, where h keeps its value, and
            0 else; all p in inference.
        zoneout_c: (T, B, H), or None: the same for c; only of a cell with c.

    Returns:
        y (T, B, H), or (y, c) with return_cell_states, and h_n (B, H), or (h_n, c_n).

    Raises:
        TypeError: cell is no such cell; a dtype that is not x's, or not float32 or float64.
        ValueError: a shape or length out of range; the message states both sides.
        ImportError: Numba is not installed, and the cell is one of `fastseq.cell`.

    Accuracy: `cell`. The bits do not depend on the thread count or on the rest of the batch.
    Cost: 2 G H (I + H) FLOP per active step and row; for backward G H values a step and row (2 G H
        of a layer-normalised cell), H more with c, and H more with c and zoneout.
    Equivalent to: `for t in range(T): h, c = cell(*(w_ih @ x[t] + ...), h, c, *params)`
    Source: Graves, arXiv:1308.0850 (clip_recurrent_grad); Gal & Ghahramani, arXiv:1512.05287
        (recurrent dropout); Krueger et al., arXiv:1606.01305 (zoneout).
    """
    spec, weights = spec_of(locals())
    h0, c0 = _one(spec.op, "h0", h0, "B, H"), _one(spec.op, "c0", c0, "B, H")
    masks = masks_of(spec, locals())
    y, h_n, c_n, c, _ = _stack.forward(
        spec, x, h0, c0, weights, masks, cell_states=return_cell_states
    )
    return ((y, c) if return_cell_states else y), (h_n[0], c_n[0]) if cell.has_c else h_n[0]


def spec_of(given: dict) -> tuple[Spec, tuple]:
    """The spec and the flat list of weights of `scan` with these arguments."""
    cell = given["cell"]
    check("scan", cell)
    for name in ("c0", "return_cell_states"):
        if not cell.has_c and given[name] is not None and given[name] is not False:
            raise ValueError(f"{cell.op}: {name} must not be given: the cell has no c")
    limit = _check.limit(cell.op, "clip_recurrent_grad", given["clip_recurrent_grad"])
    bias, reverse = given["b_ih"] is not None, bool(given["reverse"])
    zoneout = given["zoneout_h"] is not None or given["zoneout_c"] is not None
    spec = Spec(cell.key, reverse=reverse, bias=bias, limit=limit, zoneout=zoneout)
    for name in WEIGHTS:
        found = given.get(name) is not None
        if found != (name in spec.names):
            wanted = "an array" if not found else "None"
            with_bias = "with b_ih" if bias else "without b_ih"
            raise ValueError(f"{cell.op}: {name} must be {wanted} for {cell} {with_bias}")
    return spec, tuple(given[name] for name in spec.names)


def masks_of(spec: Spec, given: dict) -> Masks:
    """The masks among the arguments of a scan of one layer, with the axis of the scans."""
    found: dict[str, Any] = {name: given.get(name) for name in Masks._fields}
    for name, letters in (("recurrent_mask", "B, H"), *((f"zoneout_{s}", "T, B, H") for s in "hc")):
        if hasattr(found[name], "shape"):  # what is no array is refused later
            _check.rank(spec.op, name, found[name].shape, letters)
            found[name] = found[name][None]
    return Masks(**found)
