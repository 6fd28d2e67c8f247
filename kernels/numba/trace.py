"""A user's element-wise function as a graph of operations, and the graph of its gradient.

The function is called once with a `Value` for every argument. NumPy's operators and functions find
them and note what is to be done, so the same function also runs on arrays: it is its own reference.
Equal operations on equal arguments are one node. The gradient is reverse-mode differentiation by
the rules of OPS, noted in the same graph, so that it shares what forward computes.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Untraceable(TypeError):
    """What a function does cannot be done element by element by compiled code."""


@dataclass(frozen=True, eq=False)
class Node:
    """An operation on nodes; `index` says which of two is computed first."""

    index: int
    op: str  # "input", "constant", or one of OPS
    args: tuple  # nodes; of an input its name, of a constant its repr, of a power also a number

    @property
    def operands(self) -> tuple[Node, ...]:
        return tuple(a for a in self.args if isinstance(a, Node))

    @property
    def boolean(self) -> bool:
        return self.op in OPS and OPS[self.op].boolean


class Graph:
    """The operations of one function, each once, in an order in which they can be done."""

    def __init__(self) -> None:
        self._nodes: dict[tuple, Node] = {}

    def input(self, name: str) -> Value:
        return self._note("input", name)

    def constant(self, number: float) -> Value:
        return self._note("constant", repr(float(number)))

    def real(self, a: Any) -> Value:
        """An argument of arithmetic: a value, a number, or what a comparison gave as 0 or 1."""
        if isinstance(a, Value):
            return self.apply("where", a, 1, 0) if a.node.boolean else a
        if isinstance(a, np.ndarray) and a.ndim == 0:
            a = a.item()
        if not isinstance(a, Real):
            raise Untraceable(f"{type(a).__name__} is neither an argument nor a number")
        return self.constant(float(a))

    def boolean(self, a: Any) -> Value:
        """A condition: what a comparison gave, or whether a number is not 0."""
        known = isinstance(a, Value) and a.node.boolean
        return a if known else self.apply("not_equal", a, 0)

    def apply(self, op: str, *args: Any) -> Value:
        """An operation on values and numbers."""
        if op == "where":
            return self._note(op, self.boolean(args[0]), *map(self.real, args[1:]))
        if op.startswith("logical"):
            return self._note(op, *map(self.boolean, args))
        if op == "power":
            return self._power(*args)
        return self._note(op, *map(self.real, args))

    def _power(self, base: Any, exponent: Any) -> Value:
        exponent = self.real(exponent).node
        if exponent.op != "constant":
            raise Untraceable("a power needs a constant exponent: write np.exp(b * np.log(a))")
        number = float(exponent.args[0])
        if number in (0, 1):
            return self.constant(1) if number == 0 else self.real(base)
        if number == 0.5:
            return self.apply("sqrt", base)
        exact = int(number) if number.is_integer() and abs(number) <= 64 else number
        return self._note("power", self.real(base), exact)

    def _note(self, op: str, *args: Any) -> Value:
        key = op, *(a.node if isinstance(a, Value) else a for a in args)
        if key not in self._nodes:
            self._nodes[key] = Node(len(self._nodes), op, key[1:])
        return Value(self, self._nodes[key])


class Value(NDArrayOperatorsMixin):
    """What the function computes with: the same operation for every element."""

    __slots__ = ("graph", "node")

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if method != "__call__":
            raise Untraceable(f"np.{ufunc.__name__}.{method} is not element by element")
        if options:
            raise Untraceable(f"np.{ufunc.__name__} with {', '.join(options)} cannot be compiled")
        return _known(_UFUNCS, ufunc)(self.graph, *inputs)

    def __array_function__(self, function, _types, args, options):
        return _known(_FUNCTIONS, function)(self.graph, *args, **options)

    def __bool__(self):
        raise Untraceable("a condition differs from element to element: write np.where, not if")

    def __float__(self):
        raise Untraceable("no number is known here: use NumPy's functions, not those of math")

    __int__ = __index__ = __float__

    def __getitem__(self, _):
        raise Untraceable("every element is computed alike: none can be picked")

    def __len__(self):
        raise Untraceable("every element is computed alike: there is no length")

    __iter__ = __len__


class Op(NamedTuple):
    """An operation: how it is written in Numba, and the gradients of its arguments.

    `gradients(d, y, *arguments)` gives them from the gradient d of the result y.
    """

    source: str  # "": a function of functions.h
    gradients: Callable | None = None  # None: it has none, as a comparison
    boolean: bool = False


_MAXIMUM = "{0} if ({0} >= {1}) | ({0} != {0}) else {1}"
_MINIMUM = "{0} if ({0} <= {1}) | ({0} != {0}) else {1}"

# Where two arguments tie, the gradient of maximum and minimum goes to the second: ReLU's is 0 at 0.
OPS = {
    "add": Op("{0} + {1}", lambda d, y, a, b: (d, d)),
    "subtract": Op("{0} - {1}", lambda d, y, a, b: (d, -d)),
    "multiply": Op("{0} * {1}", lambda d, y, a, b: (d * b, d * a)),
    "divide": Op("{0} / {1}", lambda d, y, a, b: (d / b, -(d * y / b))),
    "negative": Op("-{0}", lambda d, y, a: (-d,)),
    "power": Op("{0} ** {1}", lambda d, y, a, p: (d * (p * a ** (p - 1)), None)),
    "maximum": Op(_MAXIMUM, lambda d, y, a, b: (np.where(a > b, d, 0), np.where(a > b, 0, d))),
    "minimum": Op(_MINIMUM, lambda d, y, a, b: (np.where(a < b, d, 0), np.where(a < b, 0, d))),
    "where": Op(
        "{1} if {0} else {2}",
        lambda d, y, c, a, b: (None, np.where(c, d, 0), np.where(c, 0, d)),
    ),
    "absolute": Op("abs({0})", lambda d, y, a: (np.where(a < 0, -d, np.where(a > 0, d, 0)),)),
    "exp": Op("", lambda d, y, a: (d * y,)),
    "tanh": Op("", lambda d, y, a: (d * (1 - y * y),)),
    "sigmoid": Op("", lambda d, y, a: (d * (y * (1 - y)),)),
    "expm1": Op("math.expm1({0})", lambda d, y, a: (d * (y + 1),)),
    "log": Op("math.log({0})", lambda d, y, a: (d / a,)),
    "log1p": Op("math.log1p({0})", lambda d, y, a: (d / (1 + a),)),
    "sqrt": Op("math.sqrt({0})", lambda d, y, a: (d / (2 * y),)),
    "sin": Op("math.sin({0})", lambda d, y, a: (d * np.cos(a),)),
    "cos": Op("math.cos({0})", lambda d, y, a: (-(d * np.sin(a)),)),
    "arctan": Op("math.atan({0})", lambda d, y, a: (d / (1 + a * a),)),
    "less": Op("{0} < {1}", boolean=True),
    "less_equal": Op("{0} <= {1}", boolean=True),
    "greater": Op("{0} > {1}", boolean=True),
    "greater_equal": Op("{0} >= {1}", boolean=True),
    "equal": Op("{0} == {1}", boolean=True),
    "not_equal": Op("{0} != {1}", boolean=True),
    "logical_and": Op("{0} & {1}", boolean=True),
    "logical_or": Op("{0} | {1}", boolean=True),
    "logical_not": Op("{0} == False", boolean=True),
}


def _as(op: str) -> Callable:
    return lambda graph, *args: graph.apply(op, *args)


def _where(graph: Graph, condition, *chosen) -> Value:
    if len(chosen) != 2:
        raise Untraceable("np.where needs a condition and two values")
    return graph.apply("where", condition, *chosen)


def _clip(graph: Graph, a, a_min=None, a_max=None, **bounds) -> Value:
    low, high = bounds.get("min", a_min), bounds.get("max", a_max)
    a = a if low is None else graph.apply("maximum", a, low)
    return a if high is None else graph.apply("minimum", a, high)


_UFUNCS = {getattr(np, op): _as(op) for op in OPS if isinstance(getattr(np, op, None), np.ufunc)}
_UFUNCS |= {
    np.positive: lambda graph, a: graph.real(a),
    np.square: lambda graph, a: graph.apply("multiply", a, a),
    np.reciprocal: lambda graph, a: graph.apply("divide", 1, a),
    np.bitwise_and: _as("logical_and"),
    np.bitwise_or: _as("logical_or"),
    np.invert: _as("logical_not"),
}
_FUNCTIONS = {
    np.where: _where,
    np.clip: _clip,
    np.zeros_like: lambda graph, a: graph.constant(0),
    np.ones_like: lambda graph, a: graph.constant(1),
}


def _known(table: dict, function: Callable) -> Callable:
    if function not in table:
        names = " ".join(sorted(known.__name__ for known in (*_UFUNCS, *_FUNCTIONS)))
        raise Untraceable(f"np.{function.__name__} cannot be compiled; what can: {names}")
    return table[function]


def trace(
    what: str, function: Callable, names: Sequence[str], results: int
) -> tuple[Graph, tuple[Node, ...]]:
    """The graph of function(*names), and the nodes of its results.

    Raises:
        TypeError: what the function does is not element-wise, or it fails; the message names
            `what` and shows the function's line.
        ValueError: it returns another number of results.
    """
    graph = Graph()
    try:
        found = function(*map(graph.input, names))
    except Exception as error:
        text = str(error) if isinstance(error, Untraceable) else f"{type(error).__name__}: {error}"
        raise TypeError(f"{what}: {text}\n{_line_of(error.__traceback__)}") from error
    found = found if isinstance(found, (tuple, list)) else (found,)
    if len(found) != results:
        text = f"{what}: it must return {results} values, returned {len(found)}"
        raise ValueError(f"{text}\n{definition(function)}")
    try:
        return graph, tuple(graph.real(a).node for a in found)
    except Untraceable as error:
        text = f"{what}: it must return a value per element: {error}"
        raise TypeError(f"{text}\n{definition(function)}") from error


def _line_of(trail: TracebackType | None) -> str:
    """The last line that was running in the user's function, or in what it calls of theirs."""
    frames = [f for f in traceback.extract_tb(trail)[1:] if f.filename != __file__]
    frames = [f for f in frames if "/numpy/" not in f.filename.replace("\\", "/")]
    return "".join(traceback.format_list(frames[-1:])).rstrip()


def definition(function: Callable) -> str:
    """Where a function stands, as a traceback shows it."""
    code = getattr(function, "__code__", None)
    if code is None:
        return f"  {function!r}"
    number = code.co_firstlineno
    while (line := linecache.getline(code.co_filename, number).strip()).startswith(("@", ")")):
        number += 1
    where = f'  File "{code.co_filename}", line {number}, in {function.__name__}'
    return f"{where}\n    {line}" if line else where


def needed(results: Iterable[Node]) -> list[Node]:
    """The nodes that results are computed from, themselves included, in order."""
    found: dict[int, Node] = {}
    left = list(results)
    while left:
        node = left.pop()
        if node.index not in found:
            found[node.index] = node
            left += node.operands
    return [found[index] for index in sorted(found)]


def gradients(
    graph: Graph, results: Sequence[Node], cotangents: Sequence[Value], wanted: Sequence[str]
) -> list[Node]:
    """The gradient of each input named: the sum over results of cotangent times derivative."""
    found: dict[Node, Value] = {}

    def add(node: Node, d: Value) -> None:
        found[node] = found[node] + d if node in found else d

    order = needed(results)
    for result, cotangent in zip(results, cotangents, strict=True):
        add(result, cotangent)
    for node in reversed(order):
        rule = OPS[node.op].gradients if node.op in OPS else None
        if rule is None or node not in found:
            continue
        args = [Value(graph, a) if isinstance(a, Node) else a for a in node.args]
        for a, d in zip(node.args, rule(found[node], Value(graph, node), *args), strict=True):
            if d is not None and a.op != "constant":
                add(a, d)
    zero = graph.constant(0)
    return [found.get(graph.input(name).node, zero).node for name in wanted]
