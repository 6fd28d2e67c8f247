"""Linear recurrences, many columns side by side: h_t = a_t * h_{t-1} + b_t, and the gradients.

g_t = dh_t + a_{t+1} g_{t+1}    db_t = g_t    da_t = g_t * h_{t-1}    dh0 = a_0 g_0

A task is a tile of the columns (b, c), streamed over time: a step is a vector loop, and the state
is the row written last, still in L1. Traffic: 3 arrays forward (2 FLOP a number), 5 backward (3).
An ordinary store reads its cache line first. Results of STREAMED bytes and more are stored without
that, and the state is an array on the stack: 1000 x 8 x 512 trains 1.4 to 1.6 times as fast (Zen 4,
32 MiB L3).
Multiplication and addition are not fused: the same bits on every CPU, thread count and tile. Few
columns over many steps go to linear_scan_chunks.py.
"""

from functools import cache

import numpy as np
from fastseq.kernels.numba import native
from fastseq.kernels.numba.lines import LINES_BYTES, fence, load, store, stream
from fastseq.kernels.numba.native import CACHE_LINE, INLINED, OPTIONS, at, size_of, stack, take
from numba import carray, njit

TILE_BYTES = 8192  # of a step's row: state, a, b and h fit into L1
TILE = TILE_BYTES // 4  # its numbers, of float32
STREAMED = 1 << 23  # bytes of a result, of which little is left in cache when it is read
SMALL = 1 << 16  # numbers that one thread has done before a second one is awake
# Bytes of a row that a thread needs for itself. The other core fetches lines ahead of its own, and
# where tiles end within a line, both write it: 1000 x 512 took 3 times as long on two (Zen 5).
OWN, OWN_SHARED = 1024, TILE_BYTES

_SEQUENCES = dict.fromkeys(("a", "b", "h", "dh", "da", "db"), "tb")
_STATES = dict.fromkeys(("h0", "h_n", "dh_n", "dh0"), "b")
_NUMBERS = ("T", "B", "C", "itemsize", "streamed", "reverse", "tile", "lengths", "resets")
JOB = native.record(*_NUMBERS, **_SEQUENCES, **_STATES)
_INT, _BYTE = np.int64(0), np.uint8(0)


@njit(**OPTIONS)
def _steps(job, b):
    """Row b's steps, the time of the first in scan order, and what leads to the next."""
    steps = at(job.lengths, _INT)[b] if job.lengths else job.T
    return (steps, steps - 1, -1) if job.reverse else (steps, 0, 1)


@njit(**INLINED)
def _reset(job, t, b):
    return job.resets != 0 and at(job.resets, _BYTE)[t * job.B + b] != 0


@njit(**OPTIONS)
def _fill(a, n, zero):
    for i in range(n):
        a[i] = zero


@njit(**INLINED)
def _copy(to, a, n):
    for i in range(n):
        to[i] = a[i]


@njit(**OPTIONS)
def _lines_in(address, n, like):
    """Where the Lines in a row of n numbers at the address begin and end, and how many numbers
    each has."""
    size = size_of(like)
    first, step = min((-address & (CACHE_LINE - 1)) // size, n), LINES_BYTES // size
    return first, n - (n - first & step - 1), step


@njit(**INLINED)
def _next(a, h, x):
    return a * h + x


@njit(**INLINED)
def _forward_row(h, a, before, x, n):
    """h = a * before + x"""
    for i in range(n):
        h[i] = _next(a[i], before[i], x[i])


@njit(**OPTIONS)
def _forward_streamed(address, a, kept, x, n, like):
    """kept = a * kept + x, streamed to h at the address."""
    h = at(address, like)
    first, last, step = _lines_in(address, n, like)
    for i in range(first):
        h[i] = kept[i] = _next(a[i], kept[i], x[i])
    for i in range(first, last, step):
        lines = _next(load(a, i), load(kept, i), load(x, i))
        store(kept, i, lines)
        stream(h, i, lines)
    for i in range(last, n):
        h[i] = kept[i] = _next(a[i], kept[i], x[i])


@njit(**OPTIONS)
def _forward_tile(job, b, c, n, like):
    """Columns c to c + n of row b."""
    steps, t, turn = _steps(job, b)
    c *= job.itemsize
    a_b, b_b, h_b = job.a + b * job.a_b + c, job.b + b * job.b_b + c, job.h + b * job.h_b + c
    last, kept = at(job.h0 + b * job.h0_b + c, like), stack(TILE, like)
    if job.streamed:
        _copy(kept, last, n)
        last = kept
    for _ in range(steps):
        a, x = at(a_b + t * job.a_t, like), at(b_b + t * job.b_t, like)
        address = h_b + t * job.h_t
        h = at(address, like)
        reset = _reset(job, t, b)
        if reset:
            _copy(h, x, n)
        if reset and job.streamed:
            _copy(kept, x, n)
        elif job.streamed:
            _forward_streamed(address, a, kept, x, n, like)
        elif not reset:
            _forward_row(h, a, last, x, n)
        last = kept if job.streamed else h
        t += turn
    _copy(at(job.h_n + b * job.h_n_b + c, like), last, n)
    for pad in range(steps, job.T):
        _fill(at(h_b + pad * job.h_t, like), n, like)


@njit(**INLINED)
def _backward_row(db, da, a, g, dh, before, start, n):
    """Numbers start to n of db and da; a and g are a and db of the step after."""
    for i in range(start, n):
        db[i] = _next(a[i], g[i], dh[i])
    for i in range(start, n):
        da[i] = db[i] * before[i]


@njit(**INLINED)
def _backward_lines(db, da, a, g, dh, before, n, like):
    """db and da as _backward_row's, of the Lines from number 0 on; returns where they end."""
    step = LINES_BYTES // size_of(like)
    last = n - (n & step - 1)
    for i in range(0, last, step):
        lines = _next(load(a, i), load(g, i), load(dh, i))
        store(db, i, lines)
        store(da, i, lines * load(before, i))
    return last


@njit(**OPTIONS)
def _backward_streamed(address, da, a, kept, dh, before, n, like):
    """db, streamed to the address, and da; `kept` is db of the step after and becomes this one."""
    db = at(address, like)
    first, last, step = _lines_in(address, n, like)
    for i in range(first, last, step):
        lines = _next(load(a, i), load(kept, i), load(dh, i))
        store(kept, i, lines)
        stream(db, i, lines)
        stream(da, i, lines * load(before, i))
    for start, end in ((0, first), (last, n)):
        _backward_row(kept, da, a, kept, dh, before, start, end)
        for i in range(start, end):
            db[i] = kept[i]


@njit(**OPTIONS)
def _backward_tile(job, b, c, n, like):
    """Columns c to c + n of row b."""
    steps, first, turn = _steps(job, b)
    c *= job.itemsize
    a_b, h_b, dh_b = job.a + b * job.a_b + c, job.h + b * job.h_b + c, job.dh + b * job.dh_b + c
    da_b, db_b = job.da + b * job.da_b + c, job.db + b * job.db_b + c
    h0 = at(job.h0 + b * job.h0_b + c, like)
    g, kept = at(job.dh_n + b * job.dh_n_b + c, like), stack(TILE, like)
    a, last, reset_after = g, True, False  # of the step after
    for s in range(steps - 1, -1, -1):
        t = first + s * turn
        dh = at(dh_b + t * job.dh_t, like)
        before = at(h_b + (t - turn) * job.h_t, like) if s else h0
        address, da = db_b + t * job.db_t, at(da_b + t * job.da_t, like)
        db, reset = at(address, like), _reset(job, t, b)
        if last or reset_after or reset:
            for i in range(n):
                flow = g[i] if last else a[i] * g[i]
                db[i] = dh[i] if reset_after else flow + dh[i]
                da[i] = like if reset else db[i] * before[i]
            if job.streamed:
                _copy(kept, db, n)
        elif job.streamed:
            _backward_streamed(address, da, a, kept, dh, before, n, like)
        else:
            end = _backward_lines(db, da, a, g, dh, before, n, like)
            _backward_row(db, da, a, g, dh, before, end, n)
        a, g = at(a_b + t * job.a_t, like), kept if job.streamed else db
        last, reset_after = False, reset
    dh0 = at(job.dh0 + b * job.dh0_b + c, like)
    for i in range(n):
        dh0[i] = g[i] if last else (like if reset_after else a[i] * g[i])
    for pad in range(steps, job.T):
        _fill(at(da_b + pad * job.da_t, like), n, like)
        _fill(at(db_b + pad * job.db_t, like), n, like)


@njit(**OPTIONS)
def _task(job):
    """The next tile: row, first column, columns; no columns at the end."""
    tiles = (job.C + job.tile - 1) // job.tile
    task = take(job, job.B * tiles, False, 0)
    if task < 0:
        return 0, 0, 0
    c = task % tiles * job.tile
    return task // tiles, c, min(job.tile, job.C - c)


@njit(**OPTIONS)
def _forward(job, like):
    b, c, n = _task(job)
    while n:
        _forward_tile(job, b, c, n, like)
        b, c, n = _task(job)
    fence()


@njit(**OPTIONS)
def _backward(job, like):
    b, c, n = _task(job)
    while n:
        _backward_tile(job, b, c, n, like)
        b, c, n = _task(job)
    fence()


def forward_f32(job):
    _forward(carray(job, 1, JOB)[0], np.float32(0))


def forward_f64(job):
    _forward(carray(job, 1, JOB)[0], np.float64(0))


def backward_f32(job):
    _backward(carray(job, 1, JOB)[0], np.float32(0))


def backward_f64(job):
    _backward(carray(job, 1, JOB)[0], np.float64(0))


@cache
def _kernels(itemsize):
    """The kernels forward and backward."""
    functions = {4: (forward_f32, backward_f32), 8: (forward_f64, backward_f64)}[itemsize]
    return native.compile_all(f"linear_scan for {8 * itemsize}-bit numbers", functions)


def forward(a, b, h, h0, h_n, lengths, resets, reverse, threads):
    """Write h (T, B, C) and h_n (B, C).

    a, b: any strides over t and b, consecutive elements in c; h the same, and aligned. h0, h_n
    (B, C), lengths (B,) int64 or None, resets (T, B) bool or None: in C order.
    """
    sequences = (a, b, h, None, None, None)
    _run(0, sequences, (h0, h_n, None, None), lengths, resets, reverse, threads)


def backward(a, h, dh, da, db, h0, dh_n, dh0, lengths, resets, reverse, threads):
    """Write da, db (T, B, C) and dh0 (B, C) from dh (T, B, C) and dh_n (B, C); as in `forward`."""
    sequences = (a, None, h, dh, da, db)
    _run(1, sequences, (h0, None, dh_n, dh0), lengths, resets, reverse, threads)


def _run(which, sequences, states, lengths, resets, reverse, threads):
    T, B, C = sequences[0].shape
    itemsize = sequences[0].itemsize
    kernel = _kernels(itemsize)[which]
    threads = 1 if T * B * C < SMALL else threads
    if lengths is None and resets is None and all(_joined(s) for s in sequences):
        B, C = 1, B * C  # one long row
    masks = [0 if m is None else native.address(m) for m in (lengths, resets)]
    results = sequences[4:] if which else sequences[2:3]
    own = OWN if threads > 1 and all(map(_in_lines, results)) else OWN_SHARED
    tile = _tile(B, C, itemsize, threads, own)
    large = T * B * C * itemsize >= STREAMED and min(tile, C) * itemsize >= 4 * LINES_BYTES
    streamed = large and _alike(*results)
    numbers = (T, B, C, itemsize, streamed, reverse, tile)
    arrays = [(s, 2) for s in sequences] + [(s, 1) for s in states]
    native.run(kernel, native.job((*numbers, *masks), arrays), threads)


def _alike(*results):
    """Whether cache lines begin at the same places of all."""
    return len({(native.address(a) % CACHE_LINE, a.strides) for a in results}) == 1


def _joined(sequence):
    """Whether the columns (b, c) of a step follow each other in memory."""
    if sequence is None or sequence.shape[1] == 1:
        return True
    return sequence.strides[1] == sequence.shape[2] * sequence.itemsize


def _in_lines(sequence):
    """Whether its rows begin with a cache line."""
    return not any(n % CACHE_LINE for n in (native.address(sequence), *sequence.strides[:2]))


def _tile(B, C, itemsize, threads, own):
    """Columns of a task: whole cache lines, a task for every thread, and not more than fit; but
    `own` bytes at least."""
    line = CACHE_LINE // itemsize
    tasks = max(-(-threads // max(B, 1)), -(-C * itemsize // TILE_BYTES), 1)
    return max(-(-C // (tasks * line)) * line, own // itemsize)
