"""Run fastseq: a `Problem` with everything by name, bits against bits, code in its own process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from problems import Result, solve_reference, solve_torch

import fastseq

INPUTS = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")
BIG_ENDIAN = np.dtype(">f4")
ODD_DTYPES = ["f2", "i4", "i8", "u1", "c8", "c16", "?", ">f4", ">f8", "O", "U3", "M8[s]"]


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def assert_refused(call, error, message):
    import pytest

    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def vjp(problem):
    """The outputs {y, h_n, ...} and the pullback {dy, dh_n, ...} -> {x, w_ih, ...}.

    A cotangent may be None or missing; absent arguments have no gradient.
    """
    lstm = problem.cell == "lstm"
    options = problem.options | ({"return_cell_states": True} if lstm else {})
    results, pull = fastseq.vjp(getattr(fastseq, problem.function), **problem.inputs, **options)
    if lstm:
        (y, c), (h_n, c_n) = results
        outputs = {"y": y, "h_n": h_n, "c_n": c_n, "c": c}
    else:
        outputs = dict(zip(("y", "h_n"), results, strict=True))

    def pullback(cotangents):
        dy, dh_n, dc_n, dc = (cotangents.get(k) for k in ("dy", "dh_n", "dc_n", "dc"))
        grads = pull(((dy, dc), (dh_n, dc_n)) if lstm else (dy, dh_n))
        return {k: a for k, a in zip(INPUTS, grads, strict=False) if a is not None}

    return outputs, pullback


def solve(problem):
    """fastseq's Result, as `solve_reference` and `solve_torch` give theirs."""
    outputs, pullback = vjp(problem)
    return Result(outputs, pullback(problem.cotangents))


def on_one_thread(solve, problem):
    """torch's Result on one thread: problems of this size a second one only slows."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return solve(problem)
    finally:
        torch.set_num_threads(threads)


def peer_of(problem):
    return on_one_thread(solve_torch, problem)


def judge(problem):
    """The reference's Result, and for float32 torch's beside it, else None."""
    return solve_reference(problem), peer_of(problem) if problem.dtype == "float32" else None


def assert_same_bits(ours, expected):
    """{name: array}: the same names, shapes, dtypes and bits; zeros have signs here."""
    assert ours.keys() == expected.keys()
    for name, a in expected.items():
        got = ours[name]
        assert (got.shape, got.dtype) == (a.shape, a.dtype), name
        bits = f"u{a.itemsize}"
        differ = np.argwhere(np.ascontiguousarray(got).view(bits) != a.copy().view(bits))
        assert not len(differ), f"{name}{list(a.shape)}: {len(differ)} differ, at {differ[0]}"


def assert_same_bits_in_order(ours, expected):
    """Arrays in order, as assert_same_bits holds them by name."""
    assert_same_bits(dict(enumerate(ours)), dict(enumerate(expected)))


LAYOUTS = {  # of time-major arrays
    "batch-major": lambda a: a.swapaxes(0, -2).copy().swapaxes(0, -2) if a.ndim == 3 else a,
    "fortran": np.asfortranarray,
    "negative": lambda a: np.flip(np.flip(a).copy()),
    "sliced": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "part-of-rows": lambda a: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(2, 3)])[..., 2:-3],
}


def moved(problem, change):
    """The problem with `change` made to all of its arrays: inputs, options, cotangents."""
    parts = {part: getattr(problem, part) for part in ("inputs", "options", "cotangents")}
    return problem.having(
        **{
            part: {k: change(a) if isinstance(a, np.ndarray) else a for k, a in arrays.items()}
            for part, arrays in parts.items()
        }
    )


class PoisonedNumpy:
    """numpy whose `empty` is full of NaN and stands between guards that must stay as they are."""

    GUARD, GUARD_VALUE = 64, 12345.0

    def __init__(self):
        self.blocks = []

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype):
        n = int(np.prod(shape))
        block = np.full(n + 2 * self.GUARD, self.GUARD_VALUE, dtype)
        block[self.GUARD : self.GUARD + n] = np.nan
        self.blocks.append((block, n))
        return block[self.GUARD : self.GUARD + n].reshape(shape)

    def assert_guards(self):
        for block, n in self.blocks:
            assert (np.delete(block, slice(self.GUARD, self.GUARD + n)) == self.GUARD_VALUE).all()


def python(code, *arguments, env=None, timeout=120):
    """What `code` prints in a process of its own, which has to succeed; env adds variables."""
    unset = {"FASTSEQ_CPU", "FASTSEQ_NUM_THREADS", "OMP_NUM_THREADS"}
    env = {k: v for k, v in os.environ.items() if k not in unset} | (env or {})
    env["PYTHONPATH"] = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env=env,
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
