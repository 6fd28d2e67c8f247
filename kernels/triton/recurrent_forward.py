"""The forward scan of every cell, for `recurrent.py`, which says what the arguments are.

    a = W_hh h_{t-1}        h_t, c_t = cell(gx_t, a, h_{t-1}, c_{t-1})        y_t = h_t

One program has BB rows and HU units of all gates, so that the cell follows on the product's
accumulators. Products take w_hh's dtype and sum in float32; states are float32. REGIME:
    whole     HU covers H: W_hh and the states stay on the SM over all steps first..last
    together  so do a program's states and, if BK covers H, its part of W_hh; h goes through
              `shared` (2, B, H), and a step ends when all programs of the same rows have counted
              themselves in `arrived`
    step      one launch is one step: states pass through memory
Where BK does not cover H every step reads W_hh, in slices of BK.
Cost of a step: 2 B G H^2 FLOP; gx read and y (and kept planes) written once; W_hh if in slices.
"""

import triton
import triton.language as tl
from fastseq.kernels.triton import cells
from fastseq.kernels.triton.launch import program, wide

_SIZES = ["T", "B", "first", "last", "y_t", "y_b", "c_t", "c_b"]


@triton.jit
def tile_rows(order, lengths, B, T, BB: tl.constexpr):
    """This program's rows of the batch: b, which of them exist, and their lengths."""
    i = program(0) * BB + tl.arange(0, BB)
    exists = i < B
    b = i if order is None else tl.load(order + i, mask=exists, other=0)
    if lengths is None:
        length = tl.where(exists, wide(T), 0)
    else:
        length = tl.load(lengths + b, mask=exists, other=0)
    return b, exists, length


@triton.jit
def weight_tile(w_hh, g: tl.constexpr, k, u, H: tl.constexpr, dims: tl.constexpr):
    """(k, u): W_hh of gate g, transposed for h W^T if dims is "ku", else as in dg W."""
    if dims == "ku":
        at, inside = (g * H + u)[None, :] * H + k[:, None], (u < H)[None, :] & (k < H)[:, None]
    else:
        at, inside = (g * H + k)[:, None] * H + u[None, :], (k < H)[:, None] & (u < H)[None, :]
    return tl.load(w_hh + at, mask=inside, other=0.0)


@triton.jit
def weight_tiles(w_hh, k, u, H: tl.constexpr, G: tl.constexpr, dims: tl.constexpr):
    """The tiles of all gates; copies where there are fewer than 4."""
    w0 = weight_tile(w_hh, 0, k, u, H, dims)
    w1, w2, w3 = w0, w0, w0
    if G > 1:
        w1 = weight_tile(w_hh, 1, k, u, H, dims)
        w2 = weight_tile(w_hh, 2, k, u, H, dims)
    if G > 3:
        w3 = weight_tile(w_hh, 3, k, u, H, dims)
    return w0, w1, w2, w3


@triton.jit
def planes(pointer, at, mask, N: tl.constexpr, H: tl.constexpr):
    """N planes of H columns at these offsets, zeros where masked; copies up to 4."""
    p0 = tl.load(pointer + at, mask=mask, other=0.0)
    p1, p2, p3 = p0, p0, p0
    if N > 1:
        p1 = tl.load(pointer + at + H, mask=mask, other=0.0)
        p2 = tl.load(pointer + at + 2 * H, mask=mask, other=0.0)
    if N > 3:
        p3 = tl.load(pointer + at + 3 * H, mask=mask, other=0.0)
    return p0, p1, p2, p3


@triton.jit
def store_planes(pointer, at, mask, p0, p1, p2, p3, N: tl.constexpr, H: tl.constexpr):
    dtype = pointer.dtype.element_ty
    if N > 0:
        tl.store(pointer + at, p0.to(dtype), mask=mask)
    if N > 1:
        tl.store(pointer + at + H, p1.to(dtype), mask=mask)
        tl.store(pointer + at + 2 * H, p2.to(dtype), mask=mask)
    if N > 3:
        tl.store(pointer + at + 3 * H, p3.to(dtype), mask=mask)


@triton.jit
def products(h, w0, w1, w2, w3, a0, a1, a2, a3, G: tl.constexpr, PRECISION: tl.constexpr):
    """a_g += h w_g"""
    a0 = tl.dot(h, w0, a0, input_precision=PRECISION)
    if G > 1:
        a1 = tl.dot(h, w1, a1, input_precision=PRECISION)
        a2 = tl.dot(h, w2, a2, input_precision=PRECISION)
    if G > 3:
        a3 = tl.dot(h, w3, a3, input_precision=PRECISION)
    return a0, a1, a2, a3


@triton.jit
def reset_rows(resets, b, t, active, B):
    """Which of the active rows are reset before step t."""
    if resets is None:
        reset = active & (b < 0)
    else:
        at = wide(t) * B + b
        reset = tl.load(resets + at, mask=active, other=0) != 0
    return reset


@triton.jit
def wait_for_others(arrived, times):
    """Return when this has been called `times` times in all, by the programs of these rows.

    What they wrote before is then visible here, to loads that bypass L1. All of them have to be
    on the GPU at once: a cooperative launch sees to that.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")
    while tl.atomic_add(arrived, 0, sem="acquire") < times:
        pass
    tl.debug_barrier()


@triton.jit
def _step_inputs(gx, resets, b, u, t, active, B, H: tl.constexpr, G: tl.constexpr):
    """gx_t of all gates, and which rows are reset before this step."""
    row = wide(t) * B + b
    mask = active[:, None] & (u < H)[None, :]
    x0, x1, x2, x3 = planes(gx, (row * (G * H))[:, None] + u[None, :], mask, G, H)
    return x0, x1, x2, x3, reset_rows(resets, b, t, active, B)


@triton.jit
def _interleaved_weights(w_hh, k, first, H: tl.constexpr, G: tl.constexpr, HU: tl.constexpr):
    """(k, 4 HU): the gates of a unit side by side, for one product of all of them."""
    column = tl.arange(0, 4 * HU)
    unit, gate = first + column // 4, column % 4
    at = (gate * H + unit)[None, :] * H + k[:, None]
    inside = ((unit < H) & (gate < G))[None, :] & (k < H)[:, None]
    return tl.load(w_hh + at, mask=inside, other=0.0)


@triton.jit
def _interleaved_product(h, w, BB: tl.constexpr, HU: tl.constexpr, PRECISION: tl.constexpr):
    """h w, taken apart: the parts of the four gates."""
    both = tl.reshape(tl.dot(h, w, input_precision=PRECISION), (BB, HU, 2, 2))
    even, odd = tl.split(both)
    a0, a2 = tl.split(even)
    a1, a3 = tl.split(odd)
    return a0, a1, a2, a3


@triton.jit
def _product_by_slices(
    source, w_hh, b, u, use, a0, a1, a2, a3,
    H: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_g += h W_g^T with h and W_hh from memory."""
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        seen = use[:, None] & (k < H)[None, :]
        at = source + b[:, None] * H + k[None, :]
        h = tl.load(at, mask=seen, other=0.0, cache_modifier=".cg")
        w0, w1, w2, w3 = weight_tiles(w_hh, k, u, H, G, "ku")
        h = h.to(w_hh.dtype.element_ty)
        a0, a1, a2, a3 = products(h, w0, w1, w2, w3, a0, a1, a2, a3, G, PRECISION)
    return a0, a1, a2, a3


@triton.jit(do_not_specialize=_SIZES)
def recurrent_fwd(
    gx, w_hh, b_hn, lengths, order, resets, h_first, h_last, c_state, shared, arrived, y, c, kept,
    T, B, first, last, y_t, y_b, c_t, c_b,
    CELL: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, H: tl.constexpr,
    BB: tl.constexpr, HU: tl.constexpr, BK: tl.constexpr, REGIME: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = w_hh.dtype.element_ty
    B = wide(B)
    u = tl.program_id(1) * HU + tl.arange(0, HU)
    b, exists, length = tile_rows(order, lengths, B, T, BB)
    inside = exists[:, None] & (u < H)[None, :]
    state = b[:, None] * H + u[None, :]
    h = tl.load(h_first + state, mask=inside, other=0.0)
    cell = tl.load(c_state + state, mask=inside, other=0.0) if CELL == "lstm" else h
    bias = h
    if CELL == "gru":
        bias = tl.zeros_like(h)
        if b_hn is not None:
            bias += tl.load(b_hn + u, mask=u < H, other=0.0).to(tl.float32)[None, :]
    if REGIME != "step":
        n = tl.max(length).to(tl.int32)
        first = tl.maximum(first, T - n) if REVERSE else first
        last = last if REVERSE else tl.minimum(last, n)
    k = tl.arange(0, BK)
    if REGIME == "whole":
        w0, w1, w2, w3 = weight_tiles(w_hh, k, u, H, G, "ku")
    if REGIME == "together":
        arrived += tl.program_id(0)
        if BK >= H:
            here = (b * H)[:, None] + k[None, :]
            if G > 1:
                w = _interleaved_weights(w_hh, k, tl.program_id(1) * HU, H, G, HU)
            else:
                w = weight_tile(w_hh, 0, k, u, H, "ku")
        tl.store(shared + (first % 2) * B * H + state, h.to(dtype), mask=inside)
        wait_for_others(arrived, tl.num_programs(1))
    t = T - 1 - first if REVERSE else first
    active = exists & (t < length) & (t >= 0)
    x0, x1, x2, x3, reset = _step_inputs(gx, resets, b, u, t, active, B, H, G)
    for s in range(first, last):
        # the next step's inputs are on their way while this one is computed
        t_next = T - 2 - s if REVERSE else s + 1
        active_next = exists & (t_next < length) & (t_next >= 0) & (s + 1 < last)
        n0, n1, n2, n3, reset_next = _step_inputs(gx, resets, b, u, t_next, active_next, B, H, G)
        h_in = tl.where(reset[:, None], 0.0, h)
        c_in = tl.where(reset[:, None], 0.0, cell)
        a0 = tl.zeros_like(h)
        a1, a2, a3 = a0, a0, a0
        use = exists & (reset == 0)
        if REGIME == "whole":
            a0, a1, a2, a3 = products(h_in.to(dtype), w0, w1, w2, w3, a0, a1, a2, a3, G, PRECISION)
        elif REGIME == "together" and BK >= H:
            at = shared + (s % 2) * B * H + here
            seen = use[:, None] & (k < H)[None, :]
            h_all = tl.load(at, mask=seen, other=0.0, cache_modifier=".cg")
            if G > 1:
                a0, a1, a2, a3 = _interleaved_product(h_all, w, BB, HU, PRECISION)
            else:
                a0 = tl.dot(h_all, w, input_precision=PRECISION)
        else:
            source = h_first if REGIME == "step" else shared + (s % 2) * B * H
            a0, a1, a2, a3 = _product_by_slices(
                source, w_hh, b, u, use, a0, a1, a2, a3, H, G, BK, PRECISION
            )
        h_new, c_new, p0, p1, p2, p3 = cells.forward(
            CELL, x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32),
            a0, a1, a2, a3, bias, h_in, c_in,
        )  # fmt: skip
        mask = active[:, None] & (u < H)[None, :]
        h = tl.where(mask, h_new, h)
        at = (wide(t) * y_t + b * y_b)[:, None] + u[None, :]
        tl.store(y + at, h.to(y.dtype.element_ty), mask=mask)
        if CELL == "lstm":
            cell = tl.where(mask, c_new, cell)
            if c is not None:
                at = (wide(t) * c_t + b * c_b)[:, None] + u[None, :]
                tl.store(c + at, cell.to(c.dtype.element_ty), mask=mask)
        if kept is not None:
            at = ((wide(t) * B + b) * (KEPT * H))[:, None] + u[None, :]
            store_planes(kept, at, mask, p0, p1, p2, p3, KEPT, H)
        if REGIME == "together":
            tl.store(shared + ((s + 1) % 2) * B * H + state, h.to(dtype), mask=inside)
            wait_for_others(arrived, (s - first + 2) * tl.num_programs(1))
        x0, x1, x2, x3, reset, active, t = n0, n1, n2, n3, reset_next, active_next, t_next
    tl.store(h_last + state, h, mask=inside)
    if CELL == "lstm":
        tl.store(c_state + state, cell, mask=inside)
