"""What a process that uses fastseq for long can rely on: memory, threads, forks, floating point."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import attention_running
import numpy as np
import pytest
import running
from attention_problems import ALL_OPTIONS, AttentionProblem
from problems import CELLS, Problem, forward
from running import assert_same_bits, python

import fastseq
from fastseq import _dispatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc, fork and mprotect")

MASKS = {"ragged": True, "resets": True, "reverse": True}
# Prints a digest of many solved problems: bits that depend on more than the problem differ.
DIGEST = """
from hashlib import sha256
from test_reliability import MIXED, solve
def digest():
    found = sha256()
    for problem in MIXED:
        for arrays in solve(problem):
            for a in arrays.values():
                found.update(a.tobytes())
    return found.hexdigest()
"""
MIXED = [
    Problem(cell, *size, dtype=dtype, **flags)
    for cell in CELLS
    for dtype in ("float32", "float64")
    for size in ((4, 2, 3, 5), (9, 26, 7, 70), (5, 3, 33, 37))
    for flags in ({}, MASKS)
]
MIXED += [
    AttentionProblem(**{"NH": 4, "NK": 2, **options, **size}, dtype=dtype)
    for dtype in ("float32", "float64")
    for size in (
        {"L": 2, "S": 37, "D": 3, "DV": 5},
        {"L": 2, "S": 1030, "D": 17, "DV": 9},
        {"L": 53, "S": 270, "D": 9, "DV": 35},
    )
    for options in ({}, ALL_OPTIONS)
]


def solve(problem):
    """The Result of a problem of any family."""
    family = attention_running if isinstance(problem, AttentionProblem) else running
    return family.solve(problem)


# Memory

# Prints by how many bytes the process grows in 20,000 rounds over the problems of one cell.
GROWTH = """
import os, sys
import attention_running, fastseq
from attention_problems import AttentionProblem
from problems import Problem, forward
from test_reliability import solve
cell, what = sys.argv[1:]
shapes = [(4, 2, 3, 5)]
if what == "shapes":
    shapes = [(1 + i % 5, 1 + i % 3, 3, 1 + i) for i in range(40)]
if cell == "attention":
    problems = [AttentionProblem(L=1 + t * h, S=h, dtype="float32", ragged="kv", dropout_p=0.5)
                for t, _, _, h in shapes]
else:
    problems = [Problem(cell, *shape, dtype="float32", ragged=True) for shape in shapes]
def run(problem):
    if cell == "attention":
        attention_running.forward(problem)
    else:
        forward(fastseq, problem)
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
def rounds(n):
    for i in range(n):
        problem = problems[i % len(problems)]
        solve(problem) if what == "vjp" else run(problem)
rounds(2000)
before = rss()
rounds(20000)
print(rss() - before)
"""


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        *product([*CELLS, "attention"], ["forward", "vjp"]),
        *product(["lstm", "attention"], ["shapes"]),
    ],
)
def test_small_calls_leak_nothing(cell, what):
    assert int(python(GROWTH, cell, what)) < 1 << 20


# Puts every array that fastseq takes or makes against a page that may not be touched, at its end or
# its start: reading or writing one element too many ends the process.
GUARDED = """
import ctypes, mmap, sys
import numpy as np
from fastseq import _attend, _stack
from test_reliability import MIXED, solve
at_end, libc, page = sys.argv[1] == "end", ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
maps = []
def empty(shape, dtype):
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    pages = -(-size // page)
    block = mmap.mmap(-1, (pages + 1) * page)
    address = np.frombuffer(block, np.uint8).ctypes.data
    guard = address + pages * page if at_end else address
    assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
    maps.append((block, guard))
    start = pages * page - size if at_end else page
    return np.frombuffer(block, dtype, size // dtype.itemsize, start).reshape(shape)
def guarded(a):
    if not isinstance(a, np.ndarray):
        return a
    copy = empty(a.shape, a.dtype)
    copy[...] = a
    return copy
def full(shape, value, dtype):
    a = empty(shape, dtype)
    a[...] = value
    return a
class Guarded:
    empty, full = staticmethod(empty), staticmethod(full)
    zeros = staticmethod(lambda shape, dtype: full(shape, 0, dtype))
    def __getattr__(self, name):
        return getattr(np, name)
_attend.np = _stack.np = Guarded()
for problem in MIXED:
    solve(problem.having(**{part: {k: guarded(a) for k, a in getattr(problem, part).items()}
                            for part in ("inputs", "options", "cotangents")}))
    while maps:
        block, guard = maps.pop()
        libc.mprotect(ctypes.c_void_p(guard), page, 3)
print("done")
"""


@pytest.mark.parametrize("side", ["end", "start"])
def test_nothing_is_touched_outside_of_the_arrays(side):
    assert python(GUARDED, side).strip() == "done"


def test_former_contents_of_memory_do_not_matter():
    """glibc fills what malloc gives with a byte: no scratch is read before it is written."""
    code = DIGEST + "print(digest())"
    assert python(code, env={"MALLOC_PERTURB_": "1"}) == python(code)
    assert python(code, env={"MALLOC_PERTURB_": "128"}) == python(code)


# Threads and processes


def test_concurrent_callers_get_the_same_bits(monkeypatch):
    """8 Python threads, all in different problems at a time, each call itself on two threads."""
    monkeypatch.setattr(_dispatch._Threads, "forced", 2)
    alone = [solve(problem) for problem in MIXED]

    def caller(first):
        for i in range(len(MIXED)):
            i = (i + first) % len(MIXED)
            found = solve(MIXED[i])
            assert_same_bits(found.outputs, alone[i].outputs)
            assert_same_bits(found.grads, alone[i].grads)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(caller, range(0, 8 * 5, 5)))


FORK = (
    DIGEST
    + """
import os, signal, warnings
from fastseq import _dispatch
warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
_dispatch._Threads.forced = 2
before = digest()
assert len(os.listdir("/proc/self/task")) > 1
_dispatch._Threads.forced = None
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if digest() == before else 1)
_dispatch._Threads.forced = 2
assert digest() == before
print(os.waitpid(child, 0)[1])
"""
)


def test_child_computes_after_fork():
    """Where the parent has used two threads: a pool that the child has not."""
    assert python(FORK).strip() == "0"


LONG = [
    (Problem("lstm", T=200, B=32, I=256, H=256, dtype="float64"), partial(forward, fastseq)),
    (AttentionProblem(B=1, NH=4, NK=1, L=2000, S=2000, D=64, DV=64), attention_running.forward),
]


@pytest.mark.parametrize(("problem", "run"), LONG, ids=["lstm", "attention"])
def test_gil_is_released(problem, run):
    """Another Python thread goes on while a kernel runs."""
    problem.inputs  # noqa: B018  drawn here, not while the ticks are counted
    done, ticks = threading.Event(), 0

    def tick():
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.0005)

    threads = _dispatch._Threads.forced
    _dispatch._Threads.forced = 1
    other = threading.Thread(target=tick)
    try:
        run(problem)
        other.start()
        before, start = ticks, time.perf_counter()
        run(problem)
        during, seconds = ticks - before, time.perf_counter() - start
    finally:
        _dispatch._Threads.forced = threads
        done.set()
        other.join()
    # held, it would tick only around the kernel; free, at least every tenth time on a busy machine
    assert during > 5 + seconds / 0.0005 / 100, (during, seconds)


# Floating point

FLOATING_POINT = """
import ctypes
import numpy as np
libm = ctypes.CDLL("libm.so.6")
def state():
    tiny, one = np.float32(2**-126), np.float32(1)
    halved = np.full(64, tiny) * np.float32(0.5)
    assert np.finfo(np.float32).smallest_subnormal > 0
    assert (halved > 0).all() and (halved * np.float32(2) == tiny).all()
    assert (np.full(64, np.float64(2**-1022)) / 2 > 0).all()
    ulp = np.float32(2**-23)
    assert one + ulp / 2 == one and one + ulp + ulp / 2 == one + 2 * ulp
    return libm.fegetround()
before = state()
from fastseq import _dispatch
from test_reliability import DIGEST
after_import = state()
_dispatch._Threads.forced = 2
exec(DIGEST)
digest()
print(before, after_import, state())
"""


def test_denormals_and_rounding_are_left_alone():
    """A library linked with -ffast-math flushes denormals to zero in every one of the process."""
    assert python(FLOATING_POINT).split() == ["0", "0", "0"]


def test_denormal_inputs_count():
    """x of 2^-140: a kernel that took denormals for zeros would give 0."""
    x = np.full((1, 1, 1), 2.0**-140, np.float32)
    one = np.ones((1, 1), np.float32)
    y, _ = fastseq.rnn(x, one, one, nonlinearity="relu")
    assert y.item() == 2.0**-140


def test_no_warnings():
    """Import and calls under -W error, which `python` sets, print nothing."""
    assert python(DIGEST + "digest()") == ""
