"""Linear recurrences of few columns and many steps, in parallel over time: y_t = a_t y_{t-1} + x_t.

Time is cut into chunks. A chunk is folded to its last y from y = 0 and the product of its a, in
parallel; the states before all chunks follow in order; from its own each chunk is scanned, in
parallel. Traffic: 5 arrays (5 FLOP a number). LANES chunks advance side by side, or every step
would wait for the result of the step before; folding keeps twice the numbers, so half of them.

A product that leaves [-1, 1] would magnify rounding errors, and with a state that is not finite it
could give NaN where the plain recurrence has infinity: then the chunk is scanned for its last y.
The gradients are the same scan the other way, a and resets shifted by a step. Bits depend on T and
C alone.
"""

from functools import cache, lru_cache

import numpy as np
from fastseq.kernels.numba import native
from fastseq.kernels.numba.native import OPTIONS, at, barrier, stack, take
from numba import carray, njit

CHUNK = 64  # about so many steps; a group of lanes then reads and writes few pages at once
LANES, FOLD_LANES = 8, 4
FOLDS, CARRIES, SCANS, PHASES = 0, 1, 2, 3

_NUMBERS = ("T", "B", "C", "itemsize", "chunk", "chunks", "ends", "products", "states", "wild")
_SEQUENCES = dict.fromkeys(("a", "x", "y", "h", "da", "resets"), "tb")
JOB = native.record(*_NUMBERS, **_SEQUENCES, initial="b", final="b")
_BYTE = np.uint8(0)


@njit(**OPTIONS)
def _reset(job, t, b):
    return job.resets != 0 and at(job.resets, _BYTE)[t * job.resets_t + b * job.resets_b] != 0


@njit(**OPTIONS)
def _steps(job, k):
    """Of chunk k: all have as many, but where time ends."""
    return min(max(job.T - k * job.chunk, 0), job.chunk)


@njit(**OPTIONS)
def _task(job, phase):
    """The next group of LANES chunks: row, column, first chunk, steps of its last; -1: none.

    A thread takes all columns of its time: neighbours of a step are in one cache line.
    """
    columns = job.B * job.C
    task = take(job, columns * (job.chunks // LANES), False, phase)
    if task < 0:
        return -1, 0, 0, 0
    q, first = task % columns, task // columns * LANES
    return q // job.C, q % job.C, first, _steps(job, first + LANES - 1)


@njit(**OPTIONS)
def _fold(job, b, c, first, lanes, start, steps, like):
    """ends, products and wild of `lanes` chunks, from step `start` of each to `steps`."""
    q, c = (b * job.C + c) * job.chunks + first, c * job.itemsize
    ends, products, wild = stack(LANES, like), stack(LANES, like), stack(LANES, _BYTE)
    one = type(like)(1)
    for k in range(lanes):
        ends[k], products[k], wild[k] = like, one, 0
        if start:
            ends[k], products[k] = at(job.ends, like)[q + k], at(job.products, like)[q + k]
            wild[k] = at(job.wild, _BYTE)[q + k]
    t, chunk = first * job.chunk, job.chunk
    a_t, x_t, r_t = job.a_t, job.x_t, job.resets_t
    a_0, x_0 = job.a + b * job.a_b + c + t * a_t, job.x + b * job.x_b + c + t * x_t
    r_0, masked = job.resets + b * job.resets_b + t * r_t, job.resets != 0
    for j in range(start, steps):
        for k in range(lanes):
            t = k * chunk + j
            a, x = at(a_0 + t * a_t, like)[0], at(x_0 + t * x_t, like)[0]
            if masked and at(r_0 + t * r_t, _BYTE)[0]:
                ends[k], products[k] = x, like
            else:
                product = a * products[k]
                ends[k] = a * ends[k] + x
                products[k] = product
                wild[k] |= not abs(product) <= one
    for k in range(lanes):
        at(job.ends, like)[q + k], at(job.products, like)[q + k] = ends[k], products[k]
        at(job.wild, _BYTE)[q + k] = wild[k]


@njit(**OPTIONS)
def _scan(job, b, c, first, lanes, start, steps, like):
    """y, and da where it is wanted, of the same chunks; their states become those after them."""
    q, c = (b * job.C + c) * job.chunks + first, c * job.itemsize
    states, t, chunk = stack(LANES, like), first * job.chunk, job.chunk
    for k in range(lanes):
        states[k] = at(job.states, like)[q + k]
    a_t, x_t, y_t, h_t, da_t, r_t = job.a_t, job.x_t, job.y_t, job.h_t, job.da_t, job.resets_t
    a_0, x_0 = job.a + b * job.a_b + c + t * a_t, job.x + b * job.x_b + c + t * x_t
    y_0, h_0 = job.y + b * job.y_b + c + t * y_t, job.h + b * job.h_b + c + t * h_t
    da_0, r_0 = job.da + b * job.da_b + c + t * da_t, job.resets + b * job.resets_b + t * r_t
    masked, wanted = job.resets != 0, job.da != 0
    for j in range(start, steps):
        for k in range(lanes):
            t, y = k * chunk + j, states[k]
            a, x = at(a_0 + t * a_t, like)[0], at(x_0 + t * x_t, like)[0]
            reset = masked and at(r_0 + t * r_t, _BYTE)[0] != 0
            if wanted:
                h = at(h_0 + t * h_t, like)[0]
                at(da_0 + t * da_t, like)[0] = like if reset else y * h
            y = x if reset else a * y + x
            at(y_0 + t * y_t, like)[0] = y
            states[k] = y
    for k in range(lanes):
        at(job.states, like)[q + k] = states[k]


@njit(**OPTIONS)
def _folds(job, like):
    b, c, first, steps = _task(job, FOLDS)
    while b >= 0:
        for k in range(first, first + LANES, FOLD_LANES):
            _fold(job, b, c, k, FOLD_LANES, 0, steps, like)
        for k in range(first, first + LANES - 1):
            if steps < _steps(job, k):
                _fold(job, b, c, k, 1, steps, _steps(job, k), like)
        b, c, first, steps = _task(job, FOLDS)


@njit(**OPTIONS)
def _scans(job, like):
    b, c, first, steps = _task(job, SCANS)
    while b >= 0:
        _scan(job, b, c, first, LANES, 0, steps, like)
        for k in range(first, first + LANES - 1):
            if steps < _steps(job, k):
                _scan(job, b, c, k, 1, steps, _steps(job, k), like)
        if first + LANES == job.chunks:
            q = (b * job.C + c) * job.chunks
            final = at(job.final + b * job.final_b, like)
            final[c] = at(job.states, like)[q + job.chunks - 1]
        b, c, first, steps = _task(job, SCANS)


@njit(**OPTIONS)
def _carries(job, like):
    """The states before all chunks, column by column."""
    ends, products, states = at(job.ends, like), at(job.products, like), at(job.states, like)
    q = take(job, job.B * job.C, False, CARRIES)
    while q >= 0:
        b, c = q // job.C, q % job.C
        a_b, x_b = job.a + b * job.a_b, job.x + b * job.x_b
        state = at(job.initial + b * job.initial_b, like)[c]
        for k in range(job.chunks):
            i = q * job.chunks + k
            states[i] = state
            if not at(job.wild, _BYTE)[i] and np.isfinite(state):
                state = products[i] * state + ends[i]
                continue
            for t in range(k * job.chunk, k * job.chunk + _steps(job, k)):
                a, x = at(a_b + t * job.a_t, like)[c], at(x_b + t * job.x_t, like)[c]
                state = x if _reset(job, t, b) else a * state + x
        q = take(job, job.B * job.C, False, CARRIES)


@njit(**OPTIONS)
def _run(job, like):
    _folds(job, like)
    barrier(job)
    _carries(job, like)
    barrier(job)
    _scans(job, like)


def scan_f32(job):
    _run(carray(job, 1, JOB)[0], np.float32(0))


def scan_f64(job):
    _run(carray(job, 1, JOB)[0], np.float64(0))


@cache
def _kernel(itemsize):
    what = f"linear_scan in chunks for {8 * itemsize}-bit numbers"
    return native.compile_all(what, ({4: scan_f32, 8: scan_f64}[itemsize],))[0]


@lru_cache(maxsize=256)
def _cut(T):
    """Steps of a chunk, and how many: whole groups of lanes, where time ends they are shorter.

    An even number of groups if one fits, so that two threads get the same. Lanes near a multiple
    of 128 steps apart would share few sets of the L1 cache.
    """
    wanted = T // (LANES * CHUNK)
    near = range(max(wanted - 8, 1), wanted + 9)
    for groups in sorted(near, key=lambda g: (g % 2, abs(g - wanted))):
        chunk = -(-T // (LANES * groups))
        if 16 <= chunk % 128 <= 112:
            return chunk, LANES * groups
    return -(-T // LANES), LANES


def scan(a, x, y, initial, final, resets, threads, h=None, da=None):
    """Write y (T, B, C) and final (B, C): y_t = a_t y_{t-1} + x_t from initial (B, C), T >= 1.

    With h and da (T, B, C) also da_t = y_{t-1} * h_t. Any strides, but that c has consecutive
    elements; resets (T, B) bool or None; initial and final in C order.
    """
    T, B, C = a.shape
    chunk, chunks = _cut(T)
    n = B * C * chunks
    scratch = np.empty(3 * n * a.itemsize + n, np.uint8)
    start = native.address(scratch)
    parts = [start + part * n * a.itemsize for part in range(4)]  # ends, products, states, wild
    arrays = [(s, 2) for s in (a, x, y, h, da, resets)] + [(initial, 1), (final, 1)]
    job = native.job((T, B, C, a.itemsize, chunk, chunks, *parts), arrays)
    native.run(_kernel(a.itemsize), job, threads, PHASES)
