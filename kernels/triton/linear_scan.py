"""Linear recurrence for CUDA tensors, by chunk and carry: forward and backward.

    h_t = a_t h_{t-1} + b_t         g_t = dh_t + a_{t+1} g_{t+1}    db_t = g_t    da_t = g_t h_{t-1}

A program takes BC of the B C columns and `span` steps one after the other, U of them loaded at
once. Where the columns alone fill the GPU one launch does all steps. Else time is cut into chunks:
`linear_scan_summary` computes every chunk as a whole, state -> A state + b, with A in float64,
which a product of many a_t does not leave so soon; `linear_scan_carry` the state before each chunk;
then each chunk runs from there. Where a row is reset a_t is not read and counts as 0; past its
length its state stays.
Cost: 2 T B C numbers read (4 in chunks) and T B C written; backward 3 (5 in chunks) and 2.
Source: Blelloch, Prefix sums and their applications, 1990.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fastseq.kernels.triton.launch import Row, cdiv, choose, multiprocessors, on, program, wide


@dataclass(slots=True)
class LinearScan:
    """One call. All of one dtype; every array contiguous."""

    sizes: tuple[int, int, int]  # T, B, C
    reverse: bool
    a: Any  # (T, B, C)
    h0: Any  # (B, C) or None: zeros
    lengths: Any  # (B,) int64 or None
    resets: Any  # (T, B) bool as uint8, or None
    h: Any  # (T, B, C); forward writes, backward reads
    h_n: Any  # (B, C); forward writes; backward: dh_n or None
    b: Any = None  # forward: (T, B, C)
    dh: Any = None  # backward: (T, B, C) or None
    da: Any = None  # (T, B, C)
    db: Any = None
    dh0: Any = None  # (B, C)


BLOCKS = [
    Row(float("inf"), 2, 0, {"BC": 256, "U": 8, "num_warps": 4, "num_stages": 1}),
    Row(float("inf"), 4, 0, {"BC": 128, "U": 8, "num_warps": 4, "num_stages": 1}),
]
PROGRAMS = 16  # per SM, which are to run at once: 16 of 4 warps fill it
SHORTEST = 64  # steps of a chunk

_SIZES = ["T", "B", "C", "span", "chunks"]


@triton.jit
def _columns(lengths, T, B, C, BC: tl.constexpr):
    """This program's columns, which of them exist, their rows and these rows' lengths."""
    column = program(0) * BC + tl.arange(0, BC)
    exists = column < wide(B) * C
    row = column // C
    if lengths is None:
        length = tl.where(exists, wide(T), 0)
    else:
        length = tl.load(lengths + row, mask=exists, other=0)
    return column, exists, row, length


@triton.jit
def _step(a, x, resets, t, column, row, length, B, C):
    """t, a_t (0 at a reset), x_t or zeros, whether the row has step t, whether it is no reset."""
    active = (t >= 0) & (t < length)
    kept = active
    if resets is not None:
        kept = active & (tl.load(resets + wide(t) * B + row, mask=active, other=0) == 0)
    at = wide(t) * (wide(B) * C) + column
    factor = tl.load(a + at, mask=kept, other=0.0).to(tl.float32)
    term = tl.zeros_like(factor)
    if x is not None:
        term = tl.load(x + at, mask=active, other=0.0).to(tl.float32)
    return t, factor, term, active, kept


@triton.jit
def _time(s, within, T, span, DOWN: tl.constexpr):
    """The time of step s, which is the chunk's step `within`; -1 if it has none."""
    return tl.where((within < span) & (s < T), T - 1 - s if DOWN else s, -1)


@triton.jit
def _steps(
    a, x, resets, start, within, column, row, length, T, B, C, span,
    U: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    """U steps loaded at once, before anything is stored: no load could pass a store."""
    steps = ()
    for j in tl.static_range(U):
        t = _time(start + within + j, within + j, T, span, DOWN)
        steps = steps + (_step(a, x, resets, t, column, row, length, B, C),)  # noqa: RUF005
    return steps


@triton.jit(do_not_specialize=_SIZES)
def linear_scan_summary(
    a, x, lengths, resets, products, sums, T, B, C, span, chunks,
    BC: tl.constexpr, U: tl.constexpr, DOWN: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A and b of every chunk; chunks are counted in the order in which they are scanned."""
    column, exists, row, length = _columns(lengths, T, B, C, BC)
    chunk = program(1)
    A = tl.full((BC,), 1.0, tl.float64)
    b = tl.zeros((BC,), tl.float64)
    for i in range(0, span, U):
        steps = _steps(
            a, x, resets, chunk * span, i, column, row, length, T, B, C, span, U, DOWN
        )  # fmt: skip
        for j in tl.static_range(U):
            _, factor, term, active, kept = steps[j]
            factor, term = factor.to(tl.float64), term.to(tl.float64)
            after = factor * (b + term) if BACKWARD else factor * b + term
            reset_to = tl.zeros_like(term) if BACKWARD else term
            A = tl.where(active, tl.where(kept, factor * A, 0.0), A)
            b = tl.where(active, tl.where(kept, after, reset_to), b)
    at = chunk * (wide(B) * C) + column
    tl.store(products + at, A, mask=exists)
    tl.store(sums + at, b, mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def linear_scan_carry(initial, products, sums, states, T, B, C, span, chunks, BC: tl.constexpr):
    """The state before every chunk, float32."""
    column = program(0) * BC + tl.arange(0, BC)
    exists = column < wide(B) * C
    state = tl.zeros((BC,), tl.float64)
    if initial is not None:
        state += tl.load(initial + column, mask=exists, other=0.0).to(tl.float64)
    for chunk in range(0, chunks):
        at = wide(chunk) * (wide(B) * C) + column
        tl.store(states + at, state.to(tl.float32), mask=exists)
        A = tl.load(products + at, mask=exists, other=0.0)
        # after a reset an infinite state is gone
        state = tl.where(A == 0, 0.0, A * state) + tl.load(sums + at, mask=exists, other=0.0)


@triton.jit
def _initial(initial, states, column, exists, B, C, BC: tl.constexpr):
    """The state before this program's chunk."""
    state = tl.zeros((BC,), tl.float32)
    if states is not None:
        at = program(1) * (wide(B) * C) + column
        state += tl.load(states + at, mask=exists, other=0.0)
    elif initial is not None:
        state += tl.load(initial + column, mask=exists, other=0.0).to(tl.float32)
    return state


@triton.jit(do_not_specialize=_SIZES)
def linear_scan_fwd(
    a, b, h0, states, lengths, resets, h, h_n, T, B, C, span, chunks,
    BC: tl.constexpr, U: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    dtype = h.dtype.element_ty
    column, exists, row, length = _columns(lengths, T, B, C, BC)
    state = _initial(h0, states, column, exists, B, C, BC)
    start = program(1) * span
    for i in range(0, span, U):
        steps = _steps(a, b, resets, start, i, column, row, length, T, B, C, span, U, DOWN)
        for j in tl.static_range(U):
            t, factor, term, active, kept = steps[j]
            state = tl.where(active, tl.where(kept, factor * state, 0.0) + term, state)
            at = wide(t) * (wide(B) * C) + column
            tl.store(h + at, tl.where(active, state, 0.0).to(dtype), mask=exists & (t >= 0))
    tl.store(h_n + column, state.to(dtype), mask=exists & (program(1) == chunks - 1))


@triton.jit
def _states_before(h, h0, steps, column, length, B, C, U: tl.constexpr, DOWN: tl.constexpr):
    """h_{t-1} of the steps; scanned downwards, the step before t in the forward scan is t - 1."""
    found = ()
    for j in tl.static_range(U):
        t, _, _, _, kept = steps[j]
        before = t - 1 if DOWN else t + 1
        first = (length > 0) & (before < 0) if DOWN else before >= length
        at = wide(before) * (wide(B) * C) + column
        state = tl.load(h + at, mask=kept & (first == 0), other=0.0).to(tl.float32)
        if h0 is not None:
            state += tl.load(h0 + column, mask=kept & first, other=0.0).to(tl.float32)
        found = found + (state,)  # noqa: RUF005
    return found


@triton.jit(do_not_specialize=_SIZES)
def linear_scan_bwd(
    a, h, dh, h0, dh_n, states, lengths, resets, da, db, dh0, T, B, C, span, chunks,
    BC: tl.constexpr, U: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    dtype = da.dtype.element_ty
    column, exists, row, length = _columns(lengths, T, B, C, BC)
    state = _initial(dh_n, states, column, exists, B, C, BC)
    start = program(1) * span
    for i in range(0, span, U):
        steps = _steps(a, dh, resets, start, i, column, row, length, T, B, C, span, U, DOWN)
        before = _states_before(h, h0, steps, column, length, B, C, U, DOWN)
        for j in tl.static_range(U):
            t, factor, term, active, kept = steps[j]
            g = state + term
            state = tl.where(active, tl.where(kept, factor * g, 0.0), state)
            at = wide(t) * (wide(B) * C) + column
            slope = tl.where(kept, g * before[j], 0.0)
            tl.store(da + at, slope.to(dtype), mask=exists & (t >= 0))
            tl.store(db + at, tl.where(active, g, 0.0).to(dtype), mask=exists & (t >= 0))
    tl.store(dh0 + column, state.to(dtype), mask=exists & (program(1) == chunks - 1))


def _cut(scan: LinearScan, BC: int) -> tuple[int, int]:
    """Steps of a chunk, and chunks: as many as fill the GPU."""
    T, B, C = scan.sizes
    wanted = PROGRAMS * multiprocessors(scan.a) // cdiv(B * C, BC)
    span = max(cdiv(T, max(wanted, 1)), min(T, SHORTEST))
    return span, cdiv(T, span)


def _run(kernel, scan: LinearScan, x, initial, before, after, *, down: bool, backward: bool):
    """Launch `kernel`, after what tells it the state before each chunk."""
    T, B, C = scan.sizes
    meta = choose(BLOCKS, C, scan.a)
    span, chunks = _cut(scan, meta["BC"])
    sizes, grid = (T, B, C, span, chunks), (cdiv(B * C, meta["BC"]), chunks)
    states = None
    with on(scan.a):
        if chunks > 1:
            make = {"device": scan.a.device, "dtype": torch.float64}
            products, sums = torch.empty((2, chunks, B * C), **make)
            states = torch.empty((chunks, B * C), device=scan.a.device)
            masks = (scan.lengths, scan.resets)
            flags = {"DOWN": down, "BACKWARD": backward}
            linear_scan_summary[grid](scan.a, x, *masks, products, sums, *sizes, **meta, **flags)
            only = {"BC": meta["BC"], "num_warps": meta["num_warps"]}
            linear_scan_carry[grid[:1]](initial, products, sums, states, *sizes, **only)
        masks = (states, scan.lengths, scan.resets)
        kernel[grid](*before, *masks, *after, *sizes, **meta, DOWN=down)


def forward(scan: LinearScan) -> None:
    """Fill h and h_n."""
    before, after = (scan.a, scan.b, scan.h0), (scan.h, scan.h_n)
    _run(linear_scan_fwd, scan, scan.b, scan.h0, before, after, down=scan.reverse, backward=False)


def backward(scan: LinearScan) -> None:
    """Fill da, db and dh0."""
    before = (scan.a, scan.h, scan.dh, scan.h0, scan.h_n)
    after, down = (scan.da, scan.db, scan.dh0), not scan.reverse
    _run(linear_scan_bwd, scan, scan.dh, scan.h_n, before, after, down=down, backward=True)
