"""What the linear recurrences promise to the bit: the same arithmetic is done whatever the threads,
the batch, the memory's layout and former contents; which path is taken, and in which process."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from fastseq.kernels.numba import linear_scan, native
from fastseq.kernels.numba.native import CACHE_LINE
from linear_scan_problems import ScanProblem
from linear_scan_running import LONG, assert_solved, results, solve
from running import LAYOUTS, assert_same_bits, moved, python

from fastseq import _dispatch, _linear_scan

BOOL = (False, True)
DTYPES = ("float32", "float64")
BITS = [
    ScanProblem(T=40, B=13, C=33, ragged=True, resets=0.25),
    ScanProblem(T=40, B=13, C=33),
    ScanProblem(T=300, B=3, C=1000),
    ScanProblem(T=30, B=5, C=301, ragged=True, resets=0.25),
    ScanProblem(T=30, B=5, C=301, ragged=True, resets=0.25, reverse=True),
    ScanProblem(T=LONG + 77, B=3, C=2, decay=1e-3),
    ScanProblem(T=LONG, B=3, C=3, decay=1e-3, ragged=True, resets=0.01, reverse=True),
]
BITS = [replace(problem, dtype=dtype) for problem in BITS for dtype in DTYPES]


@pytest.mark.parametrize("problem", BITS, ids=str)
def test_threads_agree(problem, monkeypatch):
    for name, least in (("SMALL", 0), ("OWN", CACHE_LINE), ("OWN_SHARED", CACHE_LINE)):
        monkeypatch.setattr(linear_scan, name, least)
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


@pytest.mark.parametrize("problem", [p for p in BITS if p.C > 300], ids=str)
def test_results_past_the_caches(problem, monkeypatch):
    """As if they did not fit; rows of every alignment, next to rows after a reset."""
    stored, paths, job = results(problem), [], native.job
    monkeypatch.setattr(linear_scan, "STREAMED", 0)
    streamed = linear_scan._NUMBERS.index("streamed")
    monkeypatch.setattr(native, "job", lambda *args: paths.append(args[0][streamed]) or job(*args))
    assert_same_bits(results(problem), stored)
    assert set(paths) == {True}


@pytest.mark.parametrize("size", [(50, 3, 7), (LONG, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_begin_with_a_cache_line(size, dtype):
    T, B, C = size
    solved = solve(ScanProblem(T=T, B=B, C=C, dtype=dtype))
    arrays = solved.outputs["h"], solved.grads["a"], solved.grads["b"]
    assert [a.ctypes.data % CACHE_LINE for a in arrays] == [0, 0, 0]


def test_many_columns_are_numpys_loop_to_the_bit():
    problem = ScanProblem(T=50, B=3, C=70, dtype="float32")
    a, b, h = problem.inputs["a"], problem.inputs["b"], problem.inputs["h0"]
    expected = [h := a_t * h + b_t for a_t, b_t in zip(a, b, strict=True)]
    assert_same_bits(solve(problem).outputs, {"h": np.stack(expected), "h_n": expected[-1]})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(9, 4, 5), (LONG, 2, 2)], ids=["channels", "chunks"])
@pytest.mark.parametrize("masks", [{}, {"ragged": True, "resets": 0.25}], ids=["full", "masks"])
def test_any_layout(layout, size, masks):
    problem = ScanProblem("linear_scan", *size, **masks)
    assert_same_bits(results(moved(problem, LAYOUTS[layout])), results(problem))


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
from linear_scan_running import results
from running import assert_same_bits
from test_linear_scan_bits import BITS
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
