"""Passes over many arrays at once, for gradient clipping: norms, scaling, limiting.

    squares  sum x^2      absolutes  sum |x|      powers  sum |x|^p      largest  max |x|
    scale    x <- c x     limit      x <- min(max(x, -c), c)

Arrays are cut into blocks of BLOCK elements; a task is one block, and threads take tasks. A block's
sum is float64 and goes to partials[task], so the order of summation follows from sizes alone.
In `scale` each thread takes its share from the last to the first: those read last are in its cache.
1 read of memory for a norm (2 FLOP an element), 1 read and 1 write for scaling and limiting.
Source: Pascanu, Mikolov & Bengio, arXiv:1211.5063.
"""

from functools import cache

import numpy as np
from fastseq.kernels.numba import native
from fastseq.kernels.numba.native import OPTIONS, at, take
from numba import carray, njit

BLOCK = 1 << 16  # elements
STREAMS = 4  # places of a block read at once: past L2 1.4 times as fast as one (Zen 3, 2 cores)
# Elements that one thread passes over: at 1.6e6 two take 0.6 of the time (Zen 4), 0.8 on Zen 3.
# There, waiting for a core that others kept busy took up to 30 times as long, as in every kernel.
SMALL = 1 << 20
SQUARES, ABSOLUTES, POWERS, LARGEST, SCALE, LIMIT = range(6)

# blocks, firsts: those of a Table; partials: (tasks,) and c: (1,) float64.
JOB = native.record("kind", "itemsize", "arrays", "tasks", blocks="", firsts="", partials="", c="")
_INT, _SUM = np.int64(0), np.float64(0)

# The additions of a block may be vectorised; nothing is assumed of NaN and infinity.
_SUMS = OPTIONS | {"fastmath": {"reassoc"}}


@njit(**_SUMS)
def _squares(x, n):
    a = b = c = d = 0.0
    q = n // STREAMS
    for i in range(q):
        a += np.float64(x[i]) * np.float64(x[i])
        b += np.float64(x[q + i]) * np.float64(x[q + i])
        c += np.float64(x[2 * q + i]) * np.float64(x[2 * q + i])
        d += np.float64(x[3 * q + i]) * np.float64(x[3 * q + i])
    for i in range(STREAMS * q, n):
        a += np.float64(x[i]) * np.float64(x[i])
    return (a + b) + (c + d)


@njit(**_SUMS)
def _absolutes(x, n):
    total = 0.0
    for i in range(n):
        total += abs(np.float64(x[i]))
    return total


@njit(**_SUMS)
def _powers(x, n, p):
    total = 0.0
    for i in range(n):
        total += abs(np.float64(x[i])) ** p
    return total


@njit(**OPTIONS)
def _largest(x, n):
    """NaN if there is one."""
    found, nan = abs(x[0]), False
    for i in range(n):
        a = abs(x[i])
        found = a if a > found else found
        nan |= a != a
    return np.nan if nan else np.float64(found)


@njit(**OPTIONS)
def _scale(x, n, c):
    q = n // STREAMS
    for i in range(q):
        x[i] *= c
        x[q + i] *= c
        x[2 * q + i] *= c
        x[3 * q + i] *= c
    for i in range(STREAMS * q, n):
        x[i] *= c


@njit(**OPTIONS)
def _limited(x, c):
    """A NaN stays."""
    low = -c if x < -c else x
    return c if low > c else low


@njit(**OPTIONS)
def _limit(x, n, c):
    q = n // STREAMS
    for i in range(q):
        x[i] = _limited(x[i], c)
        x[q + i] = _limited(x[q + i], c)
        x[2 * q + i] = _limited(x[2 * q + i], c)
        x[3 * q + i] = _limited(x[3 * q + i], c)
    for i in range(STREAMS * q, n):
        x[i] = _limited(x[i], c)


@njit(**OPTIONS)
def _block(job, task):
    """The array of a task, by bisection, and which of its elements are the task's."""
    firsts, low, high = at(job.firsts, _INT), 0, job.arrays
    while high - low > 1:
        middle = (low + high) // 2
        if firsts[middle] <= task:
            low = middle
        else:
            high = middle
    start = (task - firsts[low]) * BLOCK
    return low, start, min(BLOCK, at(job.blocks + 8 * job.arrays, _INT)[low] - start)


@njit(**OPTIONS)
def _pass(job, like):
    kind, partials = job.kind, at(job.partials, _SUM)
    exact_c = at(job.c, _SUM)[0]
    c = type(like)(exact_c)
    task = take(job, job.tasks, kind == SCALE, 0)
    while task >= 0:
        array, start, n = _block(job, task)
        x = at(at(job.blocks, _INT)[array] + start * job.itemsize, like)
        if kind == SQUARES:
            partials[task] = _squares(x, n)
        elif kind == ABSOLUTES:
            partials[task] = _absolutes(x, n)
        elif kind == POWERS:
            partials[task] = _powers(x, n, exact_c)
        elif kind == LARGEST:
            partials[task] = _largest(x, n)
        elif kind == SCALE:
            _scale(x, n, c)
        else:
            _limit(x, n, c)
        task = take(job, job.tasks, kind == SCALE, 0)


def pass_f32(job):
    """All tasks of a job over float32 arrays."""
    _pass(carray(job, 1, JOB)[0], np.float32(0))


def pass_f64(job):
    """The same over float64 arrays."""
    _pass(carray(job, 1, JOB)[0], np.float64(0))


@cache
def _kernel(itemsize):
    function = {4: pass_f32, 8: pass_f64}[itemsize]
    what = f"gradient clipping for {8 * itemsize}-bit numbers"
    return native.compile_all(what, (function,))[0]


class Table:
    """Arrays as the passes take them.

    blocks: (2, arrays) int64, of each array the address of its first element and how many follow
    each other from there; firsts: (arrays + 1,) int64, its first task, and at the end all tasks.
    """

    def __init__(self, itemsize, addresses, sizes):
        self.itemsize, self.blocks = itemsize, np.array((addresses, sizes), np.int64)
        self.firsts = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(-(self.blocks[1] // -BLOCK), out=self.firsts[1:])
        self.small = sum(sizes) < SMALL

    def overlaps(self):
        """Whether any share memory, as an array given twice: to be scaled by one thread."""
        starts, sizes = self.blocks[:, self.blocks[0].argsort()]
        return bool((starts[:-1] + self.itemsize * sizes[:-1] > starts[1:]).any())


def run(kind, table, c, threads):
    """Pass over the arrays once; the results of a norm's blocks, in order.

    c: p of POWERS, the factor of SCALE, the limit of LIMIT.
    """
    tasks = int(table.firsts[-1])
    partials = np.empty(tasks)
    numbers = (kind, table.itemsize, table.blocks.shape[1], tasks)
    arrays = (table.blocks, table.firsts, partials, np.array([c]))
    job = native.job(numbers, [(a, 0) for a in arrays])
    native.run(_kernel(table.itemsize), job, 1 if table.small else threads)
    return partials
