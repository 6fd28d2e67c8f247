"""Every error of the NumPy API: its type, and a message with operation, argument, expected, got."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from problems import CELLS, Problem, forward, solve_reference
from running import BIG_ENDIAN, INPUTS, ODD_DTYPES, assert_refused, assert_same_bits, solve, zeros
from tolerance import assert_all_close

import fastseq

T, B, I, H = 5, 2, 3, 4  # noqa: E741
FUNCTIONS = {"rnn": 1, "gru": 3, "lstm": 4}  # gates


def arguments(function):
    """Good arguments of a scan or, for `<name>_cell`, of one step."""
    G = FUNCTIONS[function.removesuffix("_cell")]
    weights = {"w_ih": zeros(G * H, I), "w_hh": zeros(G * H, H)}
    weights |= {"b_ih": zeros(G * H), "b_hh": zeros(G * H)}
    states = {"h0": zeros(B, H)} | ({"c0": zeros(B, H)} if "lstm" in function else {})
    if not function.endswith("_cell"):
        return {"x": zeros(T, B, I)} | weights | states
    return {"x": zeros(B, I)} | {k[0]: a for k, a in states.items()} | weights


# Argument, value, error, message; {G}H and {GH} stand for the gates in letters and numbers.
SCAN_ERRORS = [
    ("x", zeros(B, I), ValueError, "x must be (T, B, I), 3 axes, got shape (2, 3)"),
    ("x", zeros(T, B, I, 1), ValueError, "x must be (T, B, I), 3 axes, got shape (5, 2, 3, 1)"),
    ("x", zeros(), ValueError, "x must be (T, B, I), 3 axes, got shape ()"),
    ("x", zeros(0, B, I), ValueError, "x must have at least one step, got T = 0"),
    ("x", zeros(T, B, I + 1), ValueError, "w_ih must be ({G}H, I) = ({GH}, 4), got ({GH}, 3)"),
    ("x", [[[0.0] * I] * B] * T, TypeError, "x must be a NumPy array, got list"),
    ("x", None, TypeError, "x must be a NumPy array, got NoneType"),
    ("x", 1.0, TypeError, "x must be a NumPy array, got float"),
    ("h0", zeros(B, H + 1), ValueError, "h0 must be (B, H) = (2, 4), got (2, 5)"),
    ("h0", zeros(B + 1, H), ValueError, "h0 must be (B, H) = (2, 4), got (3, 4)"),
    ("h0", zeros(1, B, H), ValueError, "h0 must be (B, H), 2 axes, got shape (1, 2, 4)"),
    ("h0", zeros(H), ValueError, "h0 must be (B, H), 2 axes, got shape (4,)"),
    ("h0", zeros(B, H, dtype=float), TypeError, "h0 must be float32 as x is, got float64"),
    ("h0", [[0.0] * H] * B, TypeError, "h0 must be a NumPy array, got list"),
    (
        "lengths",
        np.array([1, -1]),
        ValueError,
        "lengths must be in 0..T = 0..5, got lengths[1] = -1",
    ),
    ("lengths", np.array([6, 5]), ValueError, "lengths must be in 0..T = 0..5, got lengths[0] = 6"),
    ("lengths", np.array([5]), ValueError, "lengths must be (B,) = (2,), got (1,)"),
    ("lengths", np.array(5), ValueError, "lengths must be (B,) = (2,), got ()"),
    ("lengths", np.array([[5, 5]]), ValueError, "lengths must be (B,) = (2,), got (1, 2)"),
    ("lengths", np.array([5.0, 5.0]), TypeError, "lengths must be integers, got float64"),
    ("lengths", np.array([True, False]), TypeError, "lengths must be integers, got bool"),
    ("lengths", np.array(["5", "5"]), TypeError, "lengths must be integers, got <U1"),
    ("resets", zeros(T, B), TypeError, "resets must be bool, got float32"),
    ("resets", zeros(T, B, dtype=np.uint8), TypeError, "resets must be bool, got uint8"),
    ("resets", zeros(B, T, dtype=bool), ValueError, "resets must be (T, B) = (5, 2), got (2, 5)"),
    ("resets", zeros(T, dtype=bool), ValueError, "resets must be (T, B) = (5, 2), got (5,)"),
]
SCAN_ERRORS += [
    ("clip_recurrent_grad", limit, ValueError, f"clip_recurrent_grad must be > 0, got {limit!r}")
    for limit in (0, 0.0, -1.5, np.nan, -np.inf)
]
SCAN_ERRORS += [
    (
        "clip_recurrent_grad",
        limit,
        TypeError,
        f"clip_recurrent_grad must be a number > 0 or None, got {limit!r}",
    )
    for limit in ("1", [1.0], True, 1j, np.ones(1))
]
CELL_ERRORS = [
    ("x", zeros(I), ValueError, "x must be (B, I), 2 axes, got shape (3,)"),
    ("x", zeros(T, B, I), ValueError, "x must be (B, I), 2 axes, got shape (5, 2, 3)"),
    ("x", [[0.0] * I] * B, TypeError, "x must be a NumPy array, got list"),
    ("h", zeros(H), ValueError, "h must be (B, H), 2 axes, got shape (4,)"),
    ("h", [[0.0] * H] * B, TypeError, "h must be a NumPy array, got list"),
    ("h", zeros(B + 1, H), ValueError, "h must be (B, H) = (2, 4), got (3, 4)"),
    ("h", zeros(B, H, dtype=float), TypeError, "h must be float32 as x is, got float64"),
]
ERRORS = [
    ("x", zeros(1, 1, 1, dtype=np.float16), TypeError, "x must be float32 or float64, got float16"),
    ("x", zeros(1, 1, 1, dtype=int), TypeError, "x must be float32 or float64, got int64"),
    ("x", zeros(1, 1, 1, dtype=BIG_ENDIAN), TypeError, "x must be float32 or float64, got >f4"),
    ("w_ih", zeros(H), ValueError, "w_ih must be ({G}H, I), 2 axes, got shape (4,)"),
    ("w_ih", zeros(0, I), ValueError, "w_ih must be ({G}H, I) with H >= 1, got (0, 3)"),
    ("w_ih", None, TypeError, "w_ih must be a NumPy array, got NoneType"),
    ("w_ih", zeros(1, 1, dtype=float), TypeError, "w_ih must be float32 as x is, got float64"),
    ("w_hh", None, TypeError, "w_hh must be a NumPy array, got NoneType"),
    ("w_hh", [[0.0]], TypeError, "w_hh must be a NumPy array, got list"),
    ("w_hh", zeros(7, H), ValueError, "w_hh must be ({G}H, H) = ({GH}, 4), got (7, 4)"),
    ("w_hh", zeros(H), ValueError, "w_hh must be ({G}H, H) = ({GH}, 4), got (4,)"),
    ("w_hh", zeros(1, 1, dtype=BIG_ENDIAN), TypeError, "w_hh must be float32 as x is, got >f4"),
    ("b_ih", zeros(5), ValueError, "b_ih must be ({G}H,) = ({GH},), got (5,)"),
    ("b_hh", zeros(5), ValueError, "b_hh must be ({G}H,) = ({GH},), got (5,)"),
    ("b_hh", zeros(1, dtype=int), TypeError, "b_hh must be float32 as x is, got int64"),
    ("b_ih", None, ValueError, "b_ih and b_hh must be given together, got b_ih = None"),
    ("b_hh", None, ValueError, "b_ih and b_hh must be given together, got b_hh = None"),
]


def table():
    """The rows above for every function they hold for: a case's id is its message."""
    for name, G in FUNCTIONS.items():
        for function, rows in ((name, SCAN_ERRORS), (f"{name}_cell", CELL_ERRORS)):
            for argument, value, error, message in rows + ERRORS:
                if function.endswith("_cell") and argument == "x" and value is not None:
                    value = value[0] if np.ndim(value) == 3 and len(value) == 1 else value
                letters = {"{G}": str(G) if G > 1 else "", "{GH}": str(G * H)}
                for key, text in letters.items():
                    message = message.replace(key, text)
                case = (function, argument, value, error, f"{function}: {message}")
                yield pytest.param(*case, id=f"{function}-{message.replace(' ', '_')}")


errors = pytest.mark.parametrize(("function", "argument", "value", "error", "message"), [*table()])


@errors
def test_errors(function, argument, value, error, message):
    given = arguments(function) | {argument: value}
    assert_refused(lambda: getattr(fastseq, function)(**given), error, message)


@errors
def test_vjp_raises_what_the_function_raises(function, argument, value, error, message):
    given = arguments(function) | {argument: value}
    assert_refused(lambda: fastseq.vjp(getattr(fastseq, function), **given), error, message)


@pytest.mark.parametrize("function", ["lstm", "lstm_cell"])
def test_cell_state_errors(function):
    name = "c" if function == "lstm_cell" else "c0"
    call = getattr(fastseq, function)
    for value, error, message in (
        (zeros(B, H + 1), ValueError, f"{name} must be (B, H) = (2, 4), got (2, 5)"),
        (zeros(B, H, dtype=float), TypeError, f"{name} must be float32 as x is, got float64"),
        ([[0.0] * H] * B, TypeError, f"{name} must be a NumPy array, got list"),
    ):
        given = arguments(function) | {name: value}
        assert_refused(lambda given=given: call(**given), error, f"{function}: {message}")


@pytest.mark.parametrize("function", ["rnn", "rnn_cell"])
def test_nonlinearity(function):
    given = arguments(function) | {"nonlinearity": "gelu"}
    message = f"{function}: nonlinearity must be 'tanh' or 'relu', got 'gelu'"
    assert_refused(lambda: getattr(fastseq, function)(**given), ValueError, message)


@pytest.mark.parametrize("function", ["gru", "lstm"])
def test_gates_do_not_divide(function):
    G = FUNCTIONS[function]
    given = arguments(function) | {"w_ih": zeros(G * H + 1, I)}
    message = f"{function}: w_ih must be ({G}H, I) with H >= 1, got ({G * H + 1}, 3)"
    assert_refused(lambda: getattr(fastseq, function)(**given), ValueError, message)


@pytest.mark.parametrize(
    "fn", [np.tanh, len, None, "gru", [fastseq.gru]], ids=["ufunc", "len", "None", "name", "list"]
)
def test_vjp_of_an_unknown_function(fn):
    message = "vjp: fn must be one of rnn gru lstm rnn_cell gru_cell lstm_cell [a-z_ ]+, got "
    with pytest.raises(TypeError, match=f"^{message}"):
        fastseq.vjp(fn, zeros(T, B, I))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pullback_errors(function):
    _, pullback = fastseq.vjp(getattr(fastseq, function), **arguments(function))

    def last(dh_n):
        return (dh_n, None) if function == "lstm" else dh_n

    for cotangents, error, message in (
        ((zeros(T, B, H + 1), None), ValueError, "dy must be (T, B, H) = (5, 2, 4), got (5, 2, 5)"),
        ((zeros(T, B), None), ValueError, "dy must be (T, B, H) = (5, 2, 4), got (5, 2)"),
        ((zeros(T, B, H, dtype=float), None), TypeError, "dy must be float32 as x is, got float64"),
        (([0.0], None), TypeError, "dy must be a NumPy array, got list"),
        ((None, last(zeros(B, H + 1))), ValueError, "dh_n must be (B, H) = (2, 4), got (2, 5)"),
        ((None, last([0.0])), TypeError, "dh_n must be a NumPy array, got list"),
    ):
        assert_refused(lambda d=cotangents: pullback(d), error, f"{function}: {message}")


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"], ids=repr)
def test_set_num_threads(n):
    message = f"set_num_threads: n must be a positive integer or None, got {n!r}"
    assert_refused(lambda: fastseq.set_num_threads(n), ValueError, message)


# Anything at all: the reference's result, or an error; never a crash, never another result

CHANGES = ["shape", "dtype", "strides", "value"]


@st.composite
def calls(draw):
    """A problem, and up to two of its arguments changed; `spoilt` if any change may be an error."""
    problem = Problem(
        draw(st.sampled_from(CELLS)),
        *(draw(st.integers(1, n)) for n in (4, 3, 4, 6)),
        dtype=draw(st.sampled_from(["float32", "float64"])),
        bias=draw(st.booleans()),
        initial=draw(st.booleans()),
        ragged=draw(st.booleans()),
        resets=draw(st.booleans()),
        reverse=draw(st.booleans()),
    )
    everything = problem.inputs | problem.options
    changed, spoilt = {}, False
    names = [k for k, a in everything.items() if isinstance(a, np.ndarray)]
    for name in draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
        a, change = everything[name], draw(st.sampled_from(CHANGES))
        if change == "strides":
            steps = draw(st.tuples(*(st.sampled_from([-2, -1, 1, 3]) for _ in a.shape)))
            big = np.zeros([n * abs(s) for n, s in zip(a.shape, steps, strict=True)], a.dtype)
            view = big[tuple(slice(None, None, s) for s in steps)]
            view[...] = a
            changed[name] = view
            continue
        spoilt = True
        if change == "shape":
            shape = draw(arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
            changed[name] = np.zeros(shape, a.dtype)
        elif change == "dtype":
            changed[name] = np.ones(a.shape).astype(draw(st.sampled_from(ODD_DTYPES)))
        elif name == "lengths":
            value = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 6)
            changed[name] = draw(arrays.arrays(np.int64, a.shape, elements=value))
        else:
            odd = [None, 0.5, "x", [1.0], {}, object, np.float32(1), bytes(a)]
            changed[name] = draw(st.sampled_from(odd))
    return problem, changed, spoilt


@settings(
    max_examples=600, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(calls())
@example((Problem("gru"), {"lengths": np.array([2**62, 0, 1])}, True))
@example((Problem("gru"), {"lengths": np.array([2**64 - 1, 0, 1], np.uint64)}, True))
def test_random_arguments_never_crash(call):
    problem, changed, spoilt = call
    ours = problem.having(
        inputs={k: a for k, a in changed.items() if k in INPUTS},
        options={k: a for k, a in changed.items() if k not in INPUTS},
    )
    try:
        outputs = forward(fastseq, ours)
        solved = solve(ours)
    except (TypeError, ValueError) as error:
        assert spoilt, error  # good arguments in any layout are accepted
        assert str(error).startswith(f"{problem.function}: "), error
        return
    if not spoilt:
        assert_same_bits(outputs, forward(fastseq, problem))
    given = {k: a for k, a in ours.inputs.items() if a is not None}  # a state left out
    accepted = ours.having()
    accepted.__dict__["inputs"] = given
    ref = solve_reference(accepted)
    assert {k: a.shape for k, a in outputs.items()} == {k: a.shape for k, a in ref.outputs.items()}
    if problem.dtype == "float64":
        assert_all_close(outputs, ref.outputs)
        assert_all_close(solved.grads, ref.grads, grad=True)
