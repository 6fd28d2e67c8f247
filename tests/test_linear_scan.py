"""Linear recurrences, minGRU and minLSTM over NumPy arrays: the reference, then the kernels."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from finite_differences import assert_gradients_are_those_of
from linear_scan_problems import FUNCTIONS, ScanProblem, solve_reference, solve_torch
from problems import Result, cast
from running import assert_same_bits, python
from tolerance import assert_all_close, assert_close

import fastseq
from fastseq import _dispatch, _linear_scan
from fastseq.reference import linear_scan as reference

BOOL = (False, True)
DTYPES = ("float32", "float64")
FLAGS = {
    "plain": {},
    "nobias": {"bias": False},
    "zerostate": {"initial": False},
    "ragged": {"ragged": True},
    "resets": {"resets": 0.25},
    "reverse": {"reverse": True},
    "all": {"ragged": True, "resets": 0.25, "reverse": True},
}
CASES = [
    ScanProblem(function, dtype=dtype, **flags)
    for function, dtype, (name, flags) in product(FUNCTIONS, DTYPES, FLAGS.items())
    if function != "linear_scan" or name != "nobias"
]
SCANS = [
    ScanProblem(C=19, dtype=dtype, ragged=ragged, resets=0.25 * resets, reverse=reverse)
    for dtype, ragged, resets, reverse in product(DTYPES, BOOL, BOOL, BOOL)
]
LONG = _linear_scan.CHUNKED_STEPS
# In chunks of time: states that last over chunks, that die within one, products that leave [-1, 1].
CHUNKED = [
    ScanProblem(T=T, B=B, C=C, dtype=dtype, **flags)
    for dtype in DTYPES
    for T, B, C, flags in [
        (LONG, 2, 1, {"decay": 1e-3}),
        (LONG + 1, 1, 4, {"decay": 0.01, "reverse": True}),
        (LONG, 4, 2, {"decay": 1e-3, "ragged": True, "resets": 1e-3}),
        (LONG, 4, 1, {"decay": 1e-3, "ragged": True, "resets": 1e-3, "reverse": True}),
        (LONG, 2, 1, {"decay": 0.0}),
        (LONG, 1, 2, {"decay": -1e-3, "resets": 0.01}),
    ]
]


def solve(problem):
    """fastseq's Result."""
    (h, h_n), pull = fastseq.vjp(
        getattr(fastseq, problem.function), **problem.inputs, **problem.options
    )
    grads = pull((problem.cotangents.get("dh"), problem.cotangents.get("dh_n")))
    names = [n for n, g in zip(_arguments(problem.function), grads, strict=True) if g is not None]
    return Result(
        {"h": h, "h_n": h_n}, dict(zip(names, (g for g in grads if g is not None), strict=True))
    )


def _arguments(function):
    letters = {"min_gru": "zh", "min_lstm": "fih"}.get(function)
    if letters is None:
        return ["a", "b", "h0"]
    return ["x", *(f"w_{c}" for c in letters), *(f"b_{c}" for c in letters), "h0"]


def results(problem):
    """Outputs and gradients in one dict; `d` before the gradients."""
    solved = solve(problem)
    return solved.outputs | {f"d{name}": a for name, a in solved.grads.items()}


@cache
def judge(problem):
    """Of problems as they are drawn: the reference's Result, for float32 torch's, else None."""
    return solve_reference(problem), solve_torch(problem) if problem.dtype == "float32" else None


def assert_solved(problem, judged=None):
    ours, (ref, peer) = solve(problem), judged or judge(problem)
    assert_all_close(ours.outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)


# The reference


@pytest.mark.parametrize("problem", [p for p in CASES if p.dtype == "float64"], ids=str)
def test_reference_matches_torch(problem):
    ours, peer = solve_reference(problem), solve_torch(problem)
    assert_all_close(ours.outputs, peer.outputs)
    assert_all_close(ours.grads, peer.grads, grad=True)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("reverse", BOOL, ids=["forward", "reverse"])
def test_gradients_of_the_reference_are_those_of_its_forward(function, reverse, rng):
    problem = ScanProblem(function, ragged=True, resets=0.25, reverse=reverse)
    inputs = cast(problem.inputs, "longdouble")
    cotangents = cast(problem.cotangents, "longdouble")

    def loss(**inputs):
        h, h_n = getattr(reference, function)(**inputs, **problem.options)
        return (cotangents["dh"] * h).sum() + (cotangents["dh_n"] * h_n).sum()

    grads = solve_reference(problem, "longdouble").grads
    assert_gradients_are_those_of(loss, inputs, grads, rng)


def test_min_lstm_does_not_underflow():
    """f and i are 0 in float64 at -800, their shares are a half; at -800 and -700 one is all."""
    one, x = np.ones((1, 1)), np.ones((1, 1, 1))
    for api in (reference, fastseq):
        h, _ = api.min_lstm(x, -800 * one, -800 * one, one, h0=3 * one)
        assert_close(h, np.full((1, 1, 1), 2.0))
        h, _ = api.min_lstm(x, -800 * one, -700 * one, one, h0=3 * one)
        assert_close(h, np.ones((1, 1, 1)))


# Error of the outputs, and of the gradient of every input


@pytest.mark.parametrize("problem", CASES + SCANS, ids=str)
def test_outputs_and_gradients(problem):
    assert_solved(problem)
    assert_same_bits(problem.inputs, replace(problem).inputs)  # drawn anew: nothing wrote to them


@pytest.mark.parametrize("problem", CHUNKED, ids=str)
def test_outputs_and_gradients_in_chunks(problem):
    assert _linear_scan.chunked(problem.T, problem.C)
    assert_solved(problem)


@pytest.mark.parametrize("given", ["dh", "dh_n"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_cotangent_alone(function, given):
    """The other None, which means zeros."""
    problem = ScanProblem(function, ragged=True, resets=0.25)
    alone = {k: a if k == given else np.zeros_like(a) for k, a in problem.cotangents.items()}
    ref = solve_reference(problem.having(cotangents=alone))
    other = {k: None for k in problem.cotangents if k != given}
    assert_all_close(solve(problem.having(cotangents=other)).grads, ref.grads, grad=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pullback_may_be_called_again(function):
    problem = ScanProblem(function)
    _, pull = fastseq.vjp(getattr(fastseq, function), **problem.inputs, **problem.options)
    d = tuple(problem.cotangents.values())
    first = pull(d)
    pull(tuple(-a for a in d))
    for a, b in zip(first, pull(d), strict=True):
        np.testing.assert_array_equal(a, b)


# Time split


@pytest.mark.parametrize("masks", [{}, {"ragged": True, "resets": 0.25}], ids=["full", "masks"])
@pytest.mark.parametrize("reverse", BOOL, ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_time_split_carries_the_state_and_its_gradient(dtype, reverse, masks):
    """To the bit, gradients too: none of them is a sum over time."""
    problem = ScanProblem(C=19, dtype=dtype, reverse=reverse, **masks)
    early, late = (slice(4, 9), slice(0, 4)) if reverse else (slice(0, 4), slice(4, 9))

    def chunk(steps, h0, dh_n):
        options = {}
        if masks:
            lengths = np.clip(problem.options["lengths"] - steps.start, 0, steps.stop - steps.start)
            options = {"lengths": lengths, "resets": problem.options["resets"][steps]}
        cut = {k: problem.inputs[k][steps] for k in "ab"} | {"h0": h0}
        cotangents = {"dh": problem.cotangents["dh"][steps], "dh_n": dh_n}
        return results(problem.having(inputs=cut, options=options, cotangents=cotangents))

    zeros = np.zeros_like(problem.inputs["h0"])
    first = chunk(early, problem.inputs["h0"], zeros)
    second = chunk(late, first["h_n"], problem.cotangents["dh_n"])
    first = chunk(early, problem.inputs["h0"], second["dh0"])
    joined = {"h_n": second["h_n"], "dh0": first["dh0"]}
    for k in ("h", "da", "db"):
        joined[k] = np.concatenate([first[k], second[k]][:: -1 if reverse else 1])
    assert_same_bits(joined, results(problem))


# Edges


def edges():
    for dtype, (T, B, C) in product(DTYPES, [(1, 3, 7), (7, 1, 1), (13, 5, 3), (5, 2, 64)]):
        yield ScanProblem(T=T, B=B, C=C, dtype=dtype)
        yield ScanProblem(T=T, B=B, C=C, dtype=dtype, ragged=True, resets=0.25, reverse=True)
    for dtype, C in product(DTYPES, (3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 1023, 5003)):
        yield ScanProblem(T=3, B=2, C=C, dtype=dtype)
        yield ScanProblem(T=3, B=3, C=C, dtype=dtype, ragged=True)
    yield ScanProblem(T=1, B=1, C=1)


@pytest.mark.parametrize("problem", [*edges()], ids=str)
def test_edge_shapes(problem):
    assert_solved(problem)


@pytest.mark.parametrize(
    "sizes", [{"T": 0}, {"B": 0}, {"C": 0}, {"T": LONG, "B": 0, "C": 2}], ids=str
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_to_do(function, sizes):
    """Results of the right shape; of no steps the state is the one before them."""
    problem = ScanProblem(function, **sizes)
    ours, ref = solve(problem), solve_reference(problem)
    assert_all_close(ours.outputs, ref.outputs)
    assert_all_close(ours.grads, ref.grads, grad=True)
    if not problem.T:
        assert_same_bits({"h_n": ours.outputs["h_n"]}, {"h_n": problem.inputs["h0"]})


def test_one_long_column():
    assert_solved(ScanProblem(T=65536, B=1, C=1, decay=1e-4))


@pytest.mark.parametrize("T", [9, LONG])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_padding_is_not_read(function, T):
    problem = ScanProblem(function, T=T, C=2, ragged=True, resets=0.25)
    past = np.arange(T)[:, None, None] >= problem.options["lengths"][:, None]

    def poison(arrays):
        return {k: np.where(past, np.nan, a) for k, a in arrays.items() if a.ndim == 3}

    poisoned = problem.having(inputs=poison(problem.inputs), cotangents=poison(problem.cotangents))
    assert_same_bits(results(poisoned), results(problem))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("name", ["a", "b", "h0"])
@pytest.mark.parametrize("T", [9, LONG])
@pytest.mark.parametrize("masks", [{}, {"resets": 0.01, "ragged": True}], ids=["plain", "masks"])
@np.errstate(invalid="ignore", over="ignore")
def test_nan_and_inf_come_out_where_the_reference_has_them(name, T, masks, value):
    """In the middle of row 1, whose state before it may be 0 and whose resets end it."""
    problem = ScanProblem(T=T, C=2, decay=1e-3, **masks)
    a = problem.inputs[name].copy()
    a[..., 1, 0].flat[a.shape[0] // 3 if name != "h0" else 0] = value
    problem = problem.having(inputs={name: a})
    assert_solved(problem, (solve_reference(problem), None))


@pytest.mark.parametrize("growth", [1.05, -1.05, 1e-30, 0.0])
def test_products_out_of_range(growth):
    """Products of a chunk overflow or vanish while the states stay in range."""
    T = LONG
    a = np.full((T, 1, 1), growth)
    a[::64] = 1e-3 / growth if growth > 1 else 0.5
    problem = ScanProblem(T=T, B=1, C=1).having(inputs={"a": a})
    assert_solved(problem, (solve_reference(problem), None))


# What holds to the bit


BITS = [
    ScanProblem(T=40, B=13, C=33, ragged=True, resets=0.25),
    ScanProblem(T=40, B=13, C=33),
    ScanProblem(T=300, B=3, C=1000),
    ScanProblem(T=LONG + 77, B=3, C=2, decay=1e-3),
    ScanProblem(T=LONG, B=3, C=3, decay=1e-3, ragged=True, resets=0.01, reverse=True),
]
BITS = [replace(problem, dtype=dtype) for problem in BITS for dtype in DTYPES]


@pytest.mark.parametrize("problem", BITS, ids=str)
def test_threads_agree(problem, monkeypatch):
    monkeypatch.setattr("fastseq.kernels.numba.linear_scan.SMALL", 0)
    monkeypatch.setattr(_dispatch._Threads, "forced", 1)
    alone = results(problem)
    for threads in (2, 3):
        monkeypatch.setattr(_dispatch._Threads, "forced", threads)
        assert_same_bits(results(problem), alone)


@pytest.mark.parametrize("problem", BITS, ids=str)
def test_batch_neighbours_do_not_matter(problem):
    """A row alone and among others; alone its columns may be cut into other tiles."""
    together = results(problem)
    per_row = ("h0", "h_n", "dh_n", "dh0", "lengths")

    def of_row(arrays, b):
        row = slice(b, b + 1)
        arrays = {k: a for k, a in arrays.items() if isinstance(a, np.ndarray)}
        return {k: a[row] if k in per_row else a[:, row] for k, a in arrays.items()}

    for b in range(problem.B):
        alone = problem.having(
            inputs=of_row(problem.inputs, b),
            options=of_row(problem.options, b),
            cotangents=of_row(problem.cotangents, b),
        )
        assert_same_bits(results(alone), of_row(together, b))


def test_many_columns_are_numpys_loop_to_the_bit():
    problem = ScanProblem(T=50, B=3, C=70, dtype="float32")
    a, b, h = problem.inputs["a"], problem.inputs["b"], problem.inputs["h0"]
    expected = [h := a_t * h + b_t for a_t, b_t in zip(a, b, strict=True)]
    assert_same_bits(solve(problem).outputs, {"h": np.stack(expected), "h_n": expected[-1]})


LAYOUTS = {
    "batch-major": lambda a: a.swapaxes(0, -2).copy().swapaxes(0, -2) if a.ndim == 3 else a,
    "fortran": np.asfortranarray,
    "negative": lambda a: np.flip(np.flip(a).copy()),
    "sliced": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "part-of-rows": lambda a: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(2, 3)])[..., 2:-3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(9, 4, 5), (LONG, 2, 2)], ids=["channels", "chunks"])
@pytest.mark.parametrize("masks", [{}, {"ragged": True, "resets": 0.25}], ids=["full", "masks"])
def test_any_layout(layout, size, masks):
    problem, change = ScanProblem("linear_scan", *size, **masks), LAYOUTS[layout]

    def moved(arrays):
        return {k: change(a) if isinstance(a, np.ndarray) else a for k, a in arrays.items()}

    elsewhere = problem.having(
        inputs=moved(problem.inputs),
        options=moved(problem.options),
        cotangents=moved(problem.cotangents),
    )
    assert_same_bits(results(elsewhere), results(problem))


@pytest.mark.parametrize("size", [(9, 4, 5), (LONG, 2, 2)], ids=["channels", "chunks"])
def test_broadcast_input(size):
    """One decay for all steps, one for all columns: strides of zero."""
    problem = ScanProblem("linear_scan", *size)
    for part in (np.s_[:1], np.s_[..., :1], np.s_[:, :1]):
        a = np.broadcast_to(problem.inputs["a"][part], problem.inputs["a"].shape)
        copied = results(problem.having(inputs={"a": a.copy()}))
        assert_same_bits(results(problem.having(inputs={"a": a})), copied)


class _Poisoned:
    """numpy whose `empty` is full of NaN."""

    made = 0

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype):
        self.made += 1
        return np.full(shape, np.nan, dtype)


@pytest.mark.parametrize("size", [(9, 4, 5), (LONG, 4, 2)], ids=["channels", "chunks"])
@pytest.mark.parametrize("masks", [{}, {"ragged": True, "resets": 0.25}], ids=["full", "masks"])
@pytest.mark.parametrize("reverse", BOOL, ids=["forward", "reverse"])
def test_outputs_are_written_whole(size, masks, reverse, monkeypatch):
    problem = ScanProblem("linear_scan", *size, reverse=reverse, **masks)
    clean, poisoned = results(problem), _Poisoned()
    monkeypatch.setattr(_linear_scan, "np", poisoned)
    assert_same_bits(results(problem), clean)
    assert poisoned.made >= 4


# Paths, threads, processes


@pytest.mark.parametrize(
    ("T", "C", "stem"), [(LONG, 4, "_chunks"), (LONG, 5, ""), (LONG - 1, 1, "")]
)
def test_the_path_follows_from_the_shape(T, C, stem, monkeypatch):
    used, kernels = [], _linear_scan._kernels
    monkeypatch.setattr(_linear_scan, "_kernels", lambda name: used.append(name) or kernels(name))
    solve(ScanProblem(T=T, B=3, C=C))
    assert used == [f"linear_scan{stem}"] * 2


@pytest.mark.parametrize("reverse", BOOL, ids=["forward", "reverse"])
def test_both_paths_solve_the_same_problem(reverse, monkeypatch):
    """The path forced is the path taken; each alone meets the reference."""
    problem = ScanProblem(T=3000, B=3, C=6, decay=1e-3, ragged=True, resets=0.01, reverse=reverse)
    for steps in (0, 10**9):
        monkeypatch.setattr(_linear_scan, "CHUNKED_STEPS", steps)
        monkeypatch.setattr(_linear_scan, "CHUNKED_COLUMNS", 10**9)
        assert_solved(problem)


FORK = """
import os, signal, warnings
from fastseq import _dispatch
from test_linear_scan import BITS, results
from running import assert_same_bits
warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
problems = [BITS[4], BITS[6]]
_dispatch._Threads.forced = 2
before = [results(problem) for problem in problems]
_dispatch._Threads.forced = None
child = os.fork()
if child == 0:
    signal.alarm(60)
    for problem, expected in zip(problems, before):
        assert_same_bits(results(problem), expected)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_child_computes_after_fork():
    assert python(FORK).strip() == "0"


def test_concurrent_callers_get_the_same_bits(monkeypatch):
    monkeypatch.setattr(_dispatch._Threads, "forced", 2)
    alone = [results(problem) for problem in BITS[:8]]

    def caller(first):
        for i in range(8):
            i = (i + first) % 8
            assert_same_bits(results(BITS[i]), alone[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(caller, range(4)))


# Numba: imported late, compiled once, missed by name

COMPILES = """
import sys
import fastseq
assert "numba" not in sys.modules
from test_linear_scan import ScanProblem, solve
for dtype in ("float32", "float64"):
    solve(ScanProblem(dtype=dtype))
assert "numba" in sys.modules
"""


def test_compiles_once_on_a_machine_and_says_so(tmp_path):
    """NUMBA_CACHE_DIR stands for the user's cache folder, used where the package is read-only."""

    def told(folder):
        env = {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", COMPILES]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    first = told(tmp_path).splitlines()
    assert [re.sub(r"\d+\.\d", "S", line) for line in first] == [
        f"fastseq: Numba compiled linear_scan for {bits}-bit numbers in S s, once"
        for bits in (32, 64)
    ]
    assert told(tmp_path) == ""


def test_nowhere_to_keep_what_is_compiled(monkeypatch):
    """Every process compiles for itself then."""
    from fastseq.kernels.numba import linear_scan, native
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    kernel, cached = native.compiled(linear_scan.forward_f32)
    assert callable(kernel) and not cached


def test_without_numba_the_error_names_the_extra():
    code = """
import sys
sys.modules["numba"] = None
import numpy as np, fastseq
try:
    fastseq.linear_scan(*np.zeros((2, 3, 2, 1)))
except ImportError as error:
    print(error)
"""
    assert "pip install fastseq-kernels[numba]" in python(code)


# Errors


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GIVEN = {
    "linear_scan": {"a": zeros(5, 2, 3), "b": zeros(5, 2, 3)},
    "min_gru": {"x": zeros(5, 2, 3), "w_z": zeros(4, 3), "w_h": zeros(4, 3)},
    "min_lstm": {"x": zeros(5, 2, 3), "w_f": zeros(4, 3), "w_i": zeros(4, 3), "w_h": zeros(4, 3)},
}
ERRORS = [
    ("linear_scan", "a", zeros(5, 3), ValueError, "a must be (T, B, C), 3 axes, got shape (5, 3)"),
    ("linear_scan", "a", [1.0], TypeError, "a must be a NumPy array, got list"),
    (
        "linear_scan",
        "a",
        zeros(5, 2, 3, dtype=int),
        TypeError,
        "a must be float32 or float64, got int64",
    ),
    (
        "linear_scan",
        "b",
        zeros(5, 2, 4),
        ValueError,
        "b must be (T, B, C) = (5, 2, 3), got (5, 2, 4)",
    ),
    (
        "linear_scan",
        "b",
        zeros(5, 2, 3, dtype=float),
        TypeError,
        "b must be float32 as a is, got float64",
    ),
    ("linear_scan", "h0", zeros(3), ValueError, "h0 must be (B, C) = (2, 3), got (3,)"),
    (
        "linear_scan",
        "lengths",
        np.array([6, 5]),
        ValueError,
        "lengths must be in 0..T = 0..5, got lengths[0] = 6",
    ),
    (
        "linear_scan",
        "lengths",
        np.array([1.0, 5]),
        TypeError,
        "lengths must be integers, got float64",
    ),
    ("linear_scan", "resets", zeros(5, 2), TypeError, "resets must be bool, got float32"),
    ("min_gru", "x", zeros(2, 3), ValueError, "x must be (T, B, I), 3 axes, got shape (2, 3)"),
    ("min_gru", "w_z", zeros(4, 2), ValueError, "w_z must be (H, I) = (4, 3), got (4, 2)"),
    ("min_gru", "w_h", zeros(5, 3), ValueError, "w_h must be (H, I) = (4, 3), got (5, 3)"),
    (
        "min_gru",
        "w_h",
        zeros(4, 3, dtype=float),
        TypeError,
        "w_h must be float32 as x is, got float64",
    ),
    ("min_gru", "b_z", zeros(3), ValueError, "b_z must be (H,) = (4,), got (3,)"),
    ("min_gru", "h0", zeros(2, 3), ValueError, "h0 must be (B, H) = (2, 4), got (2, 3)"),
    ("min_gru", "lengths", np.array([5]), ValueError, "lengths must be (B,) = (2,), got (1,)"),
    ("min_lstm", "w_i", None, TypeError, "w_i must be a NumPy array, got NoneType"),
    (
        "min_lstm",
        "resets",
        zeros(2, 5, dtype=bool),
        ValueError,
        "resets must be (T, B) = (5, 2), got (2, 5)",
    ),
]


@pytest.mark.parametrize(
    ("function", "name", "value", "error", "message"), ERRORS, ids=[e[-1] for e in ERRORS]
)
def test_errors(function, name, value, error, message):
    call, given = getattr(fastseq, function), GIVEN[function] | {name: value}
    for run in (
        lambda: call(**given),
        lambda: fastseq.vjp(call, **given),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'{function}: {message}')}$"):
            run()


@pytest.mark.parametrize(("name", "shape"), [("dh", (5, 2, 4)), ("dh_n", (2, 4))])
def test_errors_of_the_pullback(name, shape):
    _, pull = fastseq.vjp(fastseq.linear_scan, **GIVEN["linear_scan"])
    gradients = (zeros(*shape), None) if name == "dh" else (None, zeros(*shape))
    with pytest.raises(ValueError, match=rf"^linear_scan: {name} must be "):
        pull(gradients)
