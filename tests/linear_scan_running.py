"""Run fastseq's linear recurrences: a `ScanProblem` with everything by name, held to its judges."""

from functools import cache

from linear_scan_problems import solve_reference, solve_torch
from problems import Result
from tolerance import assert_all_close

import fastseq
from fastseq import _linear_scan

LONG = _linear_scan.CHUNKED_STEPS


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
