"""Linear recurrences, minGRU and minLSTM over NumPy arrays: the reference, then the kernels.

The promises about bits stand in test_linear_scan_bits.py, compilation in test_linear_scan_numba.py.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from finite_differences import assert_gradients_are_those_of
from linear_scan_problems import FUNCTIONS, ScanProblem, solve_reference, solve_torch
from linear_scan_running import LONG, assert_solved, results, solve
from problems import cast
from running import assert_same_bits
from tolerance import assert_all_close, assert_close

import fastseq
from fastseq import _linear_scan
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
SCANS = [  # rows below and above what is computed as Lines
    ScanProblem(C=C, dtype=dtype, ragged=ragged, resets=0.25 * resets, reverse=reverse)
    for C, dtype, ragged, resets, reverse in product((19, 301), DTYPES, BOOL, BOOL, BOOL)
]
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
