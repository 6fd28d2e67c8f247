"""The forward scan of every cell, for `recurrent.py`, which says what the arguments are.

    a = W_hh h_{t-1}        h_t, c_t = cell(gx_t, a, h_{t-1}, c_{t-1})        y_t = h_t

One program has BB rows and HU units. WHOLE: HU covers H; states and weights stay in registers over
all steps first..last, W_hh is read once. Else one launch is one step: HU units of all gates, so
that the cell follows on the product's accumulators; states pass through `h_state`, read from one
half and written to the other. Products take w_hh's dtype and sum in float32; states are float32.
Cost of a step: 2 B G H^2 FLOP; gx read and y (and kept planes) written once; W_hh if not WHOLE.
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
        return active & (b < 0)
    return tl.load(resets + wide(t) * B + b, mask=active, other=0) != 0


@triton.jit
def _step_inputs(gx, resets, b, u, t, active, B, H: tl.constexpr, G: tl.constexpr):
    """gx_t of all gates, and which rows are reset before this step."""
    row = wide(t) * B + b
    mask = active[:, None] & (u < H)[None, :]
    x0, x1, x2, x3 = planes(gx, (row * (G * H))[:, None] + u[None, :], mask, G, H)
    return x0, x1, x2, x3, reset_rows(resets, b, t, active, B)


@triton.jit(do_not_specialize=_SIZES)
def scan_forward(
    gx, w_hh, b_hn, lengths, order, resets, h_state, c_state, y, c, kept,
    T, B, first, last, y_t, y_b, c_t, c_b,
    CELL: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, H: tl.constexpr,
    BB: tl.constexpr, HU: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = w_hh.dtype.element_ty
    B = wide(B)
    u = tl.program_id(1) * HU + tl.arange(0, HU)
    b, exists, length = tile_rows(order, lengths, B, T, BB)
    inside = exists[:, None] & (u < H)[None, :]
    state = b[:, None] * H + u[None, :]
    source, target = h_state, h_state + B * H
    if WHOLE:
        w0, w1, w2, w3 = weight_tiles(w_hh, u, u, H, G, "ku")
        n = tl.max(length).to(tl.int32)
        first = tl.maximum(first, T - n) if REVERSE else first
        last = last if REVERSE else tl.minimum(last, n)
    elif first % 2 == 1:
        source, target = target, source
    h = tl.load(source + state, mask=inside, other=0.0)
    cell = tl.load(c_state + state, mask=inside, other=0.0) if CELL == "lstm" else h
    bias = h
    if CELL == "gru":
        bias = tl.zeros_like(h)
        if b_hn is not None:
            bias += tl.load(b_hn + u, mask=u < H, other=0.0).to(tl.float32)[None, :]
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
        zero = tl.zeros_like(h)
        a0, a1, a2, a3 = zero, zero, zero, zero
        if WHOLE:
            a0, a1, a2, a3 = products(h_in.to(dtype), w0, w1, w2, w3, a0, a1, a2, a3, G, PRECISION)
        else:
            use = exists & (reset == 0)
            for k0 in range(0, H, BK):
                k = k0 + tl.arange(0, BK)
                seen = use[:, None] & (k < H)[None, :]
                part = tl.load(source + b[:, None] * H + k[None, :], mask=seen, other=0.0)
                v0, v1, v2, v3 = weight_tiles(w_hh, k, u, H, G, "ku")
                a0, a1, a2, a3 = products(
                    part.to(dtype), v0, v1, v2, v3, a0, a1, a2, a3, G, PRECISION
                )
        h_new, c_new, k0_, k1_, k2_, k3_ = cells.forward(
            CELL, x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32),
            a0, a1, a2, a3, bias, h_in, c_in,
        )  # fmt: skip
        mask = active[:, None] & (u < H)[None, :]
        h = tl.where(mask, h_new, h)
        row = wide(t) * B + b
        tl.store(
            y + (wide(t) * y_t + b * y_b)[:, None] + u[None, :],
            h.to(y.dtype.element_ty),
            mask=mask,
        )
        if CELL == "lstm":
            cell = tl.where(mask, c_new, cell)
            if c is not None:
                at = (wide(t) * c_t + b * c_b)[:, None] + u[None, :]
                tl.store(c + at, cell.to(c.dtype.element_ty), mask=mask)
        if kept is not None:
            at = (row * (KEPT * H))[:, None] + u[None, :]
            store_planes(kept, at, mask, k0_, k1_, k2_, k3_, KEPT, H)
        x0, x1, x2, x3, reset, active, t = n0, n1, n2, n3, reset_next, active_next, t_next
    tl.store(target + state, h, mask=inside)
    if CELL == "lstm":
        tl.store(c_state + state, cell, mask=inside)
