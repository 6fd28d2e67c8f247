"""What a user's function may do, what it gives, and the errors that show its line."""

import numpy as np
import pytest
from fastseq.kernels.numba.trace import OPS, gradients, needed, trace
from finite_differences import directional_derivative

import fastseq
from fastseq.cells import relu, sigmoid

# Every function of one argument or two, over values where it is defined and smooth.
UNARY = {
    "negative": lambda a: -a,
    "positive": lambda a: +a,
    "absolute": lambda a: abs(a),
    "square": np.square,
    "reciprocal": lambda a: np.reciprocal(a + 3),
    "cube": lambda a: a**3,
    "inverse square": lambda a: (a + 3) ** -2,
    "root": lambda a: (a + 3) ** 0.5,
    "power": lambda a: (a + 3) ** 1.7,
    "exp": np.exp,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "log": lambda a: np.log(a + 3),
    "log1p": lambda a: np.log1p(a + 2),
    "sqrt": lambda a: np.sqrt(a + 3),
    "sin": np.sin,
    "cos": np.cos,
    "arctan": np.arctan,
    "relu": relu,
    "clip": lambda a: np.clip(a, -0.5, 0.7),
    "clip below": lambda a: np.clip(a, min=-0.5),
    "where": lambda a: np.where(a > 0.1, a * a, -a),
    "not": lambda a: np.where(~(a > 0.1), a * a, -a),
    "either": lambda a: np.where((a < -1) | (a >= 0.5), a, a / 4),
    "both": lambda a: np.where((a > -1) & (a <= 0.5), a, a / 4),
    "equal": lambda a: a + (a == a) + (a != a),
    "number as condition": lambda a: np.where(a, a, 7),
    "constants": lambda a: a * 0 + np.zeros_like(a) + 2 * np.ones_like(a) + np.float32(0.5),
}
BINARY = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / (b + 3),
    "maximum": np.maximum,
    "minimum": np.minimum,
    "shared": lambda a, b: np.tanh(a * b) + np.tanh(a * b) * a,
    "both results of where": lambda a, b: np.where(a > b, np.exp(a), b * b),
}
FUNCTIONS = UNARY | BINARY


def evaluate(nodes, inputs):
    """The nodes' values on arrays, by the sources that are compiled, in Python's arithmetic."""
    import math

    scalar = {"exp": math.exp, "tanh": math.tanh, "sigmoid": lambda x: 1 / (1 + math.exp(-x))}
    values = {}
    for node in needed(nodes):
        if node.op == "input":
            values[node] = inputs[node.args[0]]
        elif node.op == "constant":
            values[node] = float(node.args[0])
        elif node.op in scalar:
            values[node] = scalar[node.op](values[node.args[0]])
        else:
            args = [values.get(a, a) if not isinstance(a, (int, float)) else a for a in node.args]
            names = {f"v{k}": a for k, a in enumerate(args)}
            source = OPS[node.op].source.format(*names)
            values[node] = eval(source, {"math": math, "abs": abs} | names)
    return [values[node] for node in nodes]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_trace_gives_the_function_and_its_gradient(name):
    function, rng = FUNCTIONS[name], np.random.default_rng(len(name))
    names = ("a", "b")[: 1 + (name in BINARY)]
    graph, results = trace("test", function, names, 1)
    found = gradients(graph, results, [graph.input("d")], names)
    for _ in range(20):
        point = dict(zip(names, rng.uniform(-1.5, 1.5, len(names)), strict=True))
        value, *slopes = evaluate([*results, *found], point | {"d": 1.0})
        expected = function(*(np.float64(a) for a in point.values()))
        assert value == pytest.approx(float(expected), rel=1e-14, abs=1e-14)
        for k, slope in zip(names, slopes, strict=True):
            numeric = directional_derivative(
                lambda a, k=k, point=point: function(*map(np.float64, (point | {k: a}).values())),
                np.float64(point[k]),
                np.float64(1),
            )
            assert slope == pytest.approx(float(numeric), rel=1e-9, abs=1e-9)


@fastseq.cell(params=("p", "q", "r"))
def everything(a, b, h, c, p, q, r):
    """Every operation at once, as Numba compiles them."""
    one = [f(a) for n, f in UNARY.items() if n != "exp"]
    two = [f(np.sin(b), np.cos(p)) for f in BINARY.values()]
    c_new = np.tanh(sum(one) / 8 + c * q)
    return np.tanh(sum(two)) * c_new + h * sigmoid(r), c_new


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_operation_compiled(dtype):
    rng = np.random.default_rng(1)
    H, I, B = 37, 3, 6  # noqa: E741
    draw = lambda *shape: rng.uniform(-0.3, 0.3, shape).astype(dtype)  # noqa: E731
    x, w_ih, w_hh = draw(1, B, I), draw(2 * H, I), draw(2 * H, H)
    params, h0, c0 = draw(3, H), draw(B, H), draw(B, H)
    y, (_, c_n) = fastseq.scan(everything, x, w_ih, w_hh, None, None, params, h0, c0)
    a = (x[0].astype("f8") @ w_ih.T + h0.astype("f8") @ w_hh.T).astype(dtype)
    states = (s.astype("f8") for s in (h0, c0))
    h, c = everything(*np.split(a.astype("f8"), 2, axis=1), *states, *params.astype("f8"))
    near = abs(a[:, :H, None] - np.array([-0.5, 0.1, 0.0, 0.5, 0.7])) < 1e-4
    ok = ~near.any(axis=2)  # elsewhere than at a step of the function
    assert ok.mean() > 0.9
    room = 2e-5 if dtype == "float32" else 1e-13
    for ours, ref in ((y[0], h), (c_n, c)):
        np.testing.assert_allclose(ours[ok], ref[ok], rtol=room, atol=room)


def test_a_tie_has_the_gradient_of_the_second():
    graph, results = trace("test", relu, ("x",), 1)
    found = gradients(graph, results, [graph.input("d")], ("x",))
    assert [evaluate(found, {"x": x, "d": 3.0}) for x in (-1.0, 0.0, 1.0)] == [[0], [0], [3]]


def test_maximum_keeps_nan():
    _, results = trace("test", np.maximum, ("a", "b"), 1)
    for a, b in ((np.nan, 1.0), (1.0, np.nan)):
        assert np.isnan(evaluate(results, {"a": a, "b": b})[0])


def branch(a):
    if a > 0:
        return a
    return -a


def number(a):
    import math

    return math.tanh(a)


def total(a):
    return np.sum(a)


def reduced(a):
    return np.add.reduce(a)


def picked(a):
    return a[0]


def unpacked(a):
    first, second = a
    return first + second


def unknown(a):
    return np.arcsinh(a)


def unheard(a):
    return np.fft.fft(a)


def into(a):
    return np.add(a, 1, out=a)


def failing(a):
    return a + missing  # noqa: F821


def powers(a):
    return a**a


def with_array(a):
    return a * np.ones(3)


KNOWN = (
    "absolute add arctan bitwise_and bitwise_or clip cos divide equal exp expm1 greater "
    "greater_equal invert less less_equal log log1p logical_and logical_not logical_or maximum "
    "minimum multiply negative not_equal ones_like positive power reciprocal sin sqrt square "
    "subtract tanh where zeros_like"
)


@pytest.mark.parametrize(
    ("function", "message", "line"),
    [
        (branch, "a condition differs from element to element: write np.where, not if", "if a >"),
        (
            number,
            "no number is known here: use NumPy's functions, not those of math",
            "math.tanh",
        ),
        (total, f"np.sum cannot be compiled; what can: {KNOWN}", "return np.sum(a)"),
        (reduced, "np.add.reduce is not element by element", "return np.add.reduce(a)"),
        (picked, "every element is computed alike: none can be picked", "return a[0]"),
        (unpacked, "every element is computed alike: there is no length", "first, second = a"),
        (unknown, f"np.arcsinh cannot be compiled; what can: {KNOWN}", "return np.arcsinh(a)"),
        (unheard, f"np.fft cannot be compiled; what can: {KNOWN}", "return np.fft.fft(a)"),
        (into, "np.add with out cannot be compiled", "return np.add(a, 1, out=a)"),
        (failing, "NameError: name 'missing' is not defined", "return a + missing"),
        (powers, "a power needs a constant exponent: write np.exp(b * np.log(a))", "return a**a"),
        (with_array, "ndarray is neither an argument nor a number", "return a * np.ones(3)"),
    ],
)
def test_what_is_not_element_wise_is_refused_with_its_line(function, message, line):
    with pytest.raises(TypeError) as caught:
        fastseq.cell(function)
    first, *rest = str(caught.value).split("\n")
    assert first == f"cell {function.__name__}: {message}"
    assert "test_trace.py" in rest[0]
    assert line in rest[1]


def no_c(a, c):
    return a + c


def three(a, h):
    return a, h, h


def an_array(a):
    return np.ones(3)


def nothing(h):
    return h


def five(a, b, c1, d, e):
    return a + b + c1 + d + e


def starred(*gates):
    return gates[0]


def gru(r, xn, hn):
    return r * hn + xn


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        (no_c, {}, ValueError, "it must return 2 values, returned 1"),
        (three, {}, ValueError, "it must return 1 values, returned 3"),
        (an_array, {}, TypeError, "it must return a value per element: ndarray is neither an "
         "argument nor a number"),
        (nothing, {}, ValueError, "it must have 1 to 4 gates, got 0: ()"),
        (five, {}, ValueError, "it must have 1 to 4 gates, got 5: ('a', 'b', 'c1', 'd', 'e')"),
        (starred, {}, TypeError, "its arguments must have names and positions, got *gates"),
        (gru, {"split": ("xn",)}, TypeError, "split must be two names, got ('xn',)"),
        (gru, {"split": ("xn", "n")}, TypeError,
         "params and split must name its arguments other than h and c, got n"),
        (gru, {"params": ("h",)}, TypeError,
         "params and split must name its arguments other than h and c, got h"),
        (gru, {"params": ("xn",), "split": ("xn", "hn")}, TypeError,
         "params and split must be different names, got ('xn',) and ('xn', 'hn')"),
        (gru, {"split": ("xn", "hn"), "recurrent": False}, TypeError,
         "split must be empty where recurrent is False: there is no W_hh h"),
        (gru, {"split": ("xn", "hn")}, ValueError,
         "split must have two gates beside it, got ('r',)"),
        (gru, {"recurrent": False}, TypeError,
         "h must be among its arguments where recurrent is False"),
    ],
)  # fmt: skip
def test_what_is_no_cell_is_refused_with_its_definition(function, options, error, message):
    with pytest.raises(error) as caught:
        fastseq.cell(function, **options)
    first, where, line = str(caught.value).split("\n")
    assert first == f"cell {function.__name__}: {message}"
    assert "test_trace.py" in where
    assert line.strip().startswith(f"def {function.__name__}(")
