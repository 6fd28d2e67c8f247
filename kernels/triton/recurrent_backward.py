"""The backward scan of every cell, for `recurrent.py`, which says what the arguments are.

    dh_t += dy_t        dg_t, dh, dc = cell'(dh_t, dc_t, kept_t)        dh_{t-1} = dh + W_hh^T dg_t

With a limit these dh_{t-1} and dc are brought into [-limit, limit]; dy and dh_n are not.
It emits only the gates' gradients dg; those of weights and inputs are large products after it.
Programs and regimes are those of `recurrent_forward.py`. Together, programs read each other's dg;
by step the product with W_hh^T stands at the start of the launch after it, which reads dg of all
units from memory; first = last = 0 is that of the first step, with no cell to follow.
Cost of a step: 2 B G H^2 FLOP; kept planes, y (GRU, RNN) and dy read, dg written once.
"""

import triton
import triton.language as tl
from fastseq.kernels.triton import cells
from fastseq.kernels.triton.launch import wide
from fastseq.kernels.triton.recurrent_forward import (
    planes,
    reset_rows,
    store_planes,
    tile_rows,
    wait_for_others,
    weight_tile,
    weight_tiles,
)

_SIZES = ["T", "B", "first", "last", "y_t", "y_b", "c_t", "c_b", "dy_t", "dy_b", "dc_t", "dc_b"]


@triton.jit
def _before(sequence, initial, b, u, t, length, active, reset, s_t, s_b, H, REVERSE: tl.constexpr):
    """The state before step t: that of the step before in scan order, or the initial one."""
    start = (t == length - 1) if REVERSE else (length > 0) & (t == 0)
    t_before = t + 1 if REVERSE else t - 1
    use = active & (reset == 0)
    columns = (u < H)[None, :]
    at = (wide(t_before) * s_t + b * s_b)[:, None] + u[None, :]
    state = tl.load(sequence + at, mask=(use & (start == 0))[:, None] & columns, other=0.0)
    state = state.to(tl.float32)
    if initial is not None:
        at = b[:, None] * H + u[None, :]
        state += tl.load(initial + at, mask=(use & start)[:, None] & columns, other=0.0).to(
            tl.float32
        )
    return state


@triton.jit
def _step_saved(
    kept, y, c, h0, c0, dy, dc, resets, b, u, t, length, active, B,
    y_t, y_b, c_t, c_b, dy_t, dy_b, dc_t, dc_b,
    CELL: tl.constexpr, KEPT: tl.constexpr, H: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What step t needs: kept planes, h before and after, c before and after, dy, dc, reset."""
    mask = active[:, None] & (u < H)[None, :]
    reset = reset_rows(resets, b, t, active, B)
    gy = tl.zeros(mask.shape, tl.float32)
    gc = gy
    if dy is not None:
        at = (wide(t) * dy_t + b * dy_b)[:, None] + u[None, :]
        gy = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    h, h_next, c_before, c_next = gy, gy, gy, gy
    k0, k1, k2, k3 = gy, gy, gy, gy
    if KEPT > 0:
        row = wide(t) * B + b
        k0, k1, k2, k3 = planes(kept, (row * (KEPT * H))[:, None] + u[None, :], mask, KEPT, H)
    if CELL == "lstm":
        at = (wide(t) * c_t + b * c_b)[:, None] + u[None, :]
        c_next = tl.load(c + at, mask=mask, other=0.0).to(tl.float32)
        c_before = _before(c, c0, b, u, t, length, active, reset, c_t, c_b, H, REVERSE)
        if dc is not None:
            at = (wide(t) * dc_t + b * dc_b)[:, None] + u[None, :]
            gc = tl.load(dc + at, mask=mask, other=0.0).to(tl.float32)
        else:
            gc = tl.zeros_like(gy)
    elif CELL == "gru":
        h = _before(y, h0, b, u, t, length, active, reset, y_t, y_b, H, REVERSE)
    else:
        at = (wide(t) * y_t + b * y_b)[:, None] + u[None, :]
        h_next = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    return k0, k1, k2, k3, h, h_next, c_before, c_next, gy, gc, reset


@triton.jit
def _pending(
    dg, w_hh, resets, b, u, t, length, exists, T, B,
    G: tl.constexpr, PLANES: tl.constexpr, HIDDEN: tl.constexpr, H: tl.constexpr,
    BB: tl.constexpr, HU: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_hh^T dg_t for these units, zero for rows that step t does not compute or that it resets."""
    active = exists & (t < length) & (t >= 0)
    use = active & (reset_rows(resets, b, t, active, B) == 0)
    row = (wide(t) * B + b) * (PLANES * H) + HIDDEN * H
    dh = tl.zeros((BB, HU), tl.float32)
    for k0 in range(0, G * H, BK):
        k = k0 + tl.arange(0, BK)
        seen = use[:, None] & (k < G * H)[None, :]
        at = dg + row[:, None] + k[None, :]
        part = tl.load(at, mask=seen, other=0.0, cache_modifier=".cg")
        inside = (k < G * H)[:, None] & (u < H)[None, :]
        w = tl.load(w_hh + k[:, None] * H + u[None, :], mask=inside, other=0.0)
        dh = tl.dot(part, w, dh, input_precision=PRECISION)
    return dh


@triton.jit
def _back_through(dh, e0, e1, e2, e3, w0, w1, w2, w3, G: tl.constexpr, PRECISION: tl.constexpr):
    """dh + sum_g e_g W_g"""
    dh = tl.dot(e0, w0, dh, input_precision=PRECISION)
    if G > 1:
        dh = tl.dot(e1, w1, dh, input_precision=PRECISION)
        dh = tl.dot(e2, w2, dh, input_precision=PRECISION)
    if G > 3:
        dh = tl.dot(e3, w3, dh, input_precision=PRECISION)
    return dh


@triton.jit
def _limited(d, limit):
    """min(max(d, -limit), limit) if there is a limit; NaN stays."""
    if limit is not None:
        d = tl.where(d > limit, limit, tl.where(d < -limit, -limit, d))
    return d


@triton.jit
def _own_gates(mask, d0, d1, d2, d3, G: tl.constexpr, HIDDEN: tl.constexpr, dtype: tl.constexpr):
    """The planes that W_hh^T takes; padded units hold garbage, which must not reach others."""
    e0 = tl.where(mask, d0, 0.0).to(dtype)
    e1, e2, e3 = e0, e0, e0
    if G > 1:
        e1 = tl.where(mask, d1, 0.0).to(dtype)
        e2 = tl.where(mask, d2, 0.0).to(dtype)
        e3 = tl.where(mask, d3, 0.0).to(dtype)
    if HIDDEN == 1:
        e0, e1, e2 = e1, e2, e3
    return e0, e1, e2, e3


@triton.jit
def _stacked_weights(w_hh, k, u, H: tl.constexpr, G: tl.constexpr):
    """(gates up to 4, k, u) of W_hh."""
    gate = tl.arange(0, 4)[:, None, None]
    at = (gate * H + k[None, :, None]) * H + u[None, None, :]
    inside = (gate < G) & (k < H)[None, :, None] & (u < H)[None, None, :]
    return tl.load(w_hh + at, mask=inside, other=0.0)


@triton.jit
def _stacked_product(
    dg, row, seen, k, w, H: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr
):
    """sum_g dg_g w_g of all units, as other programs have just written them: a product a gate."""
    gate = tl.arange(0, 4)[:, None, None]
    at = row[None, :, None] + gate * H + k[None, None, :]
    mask = (gate < G) & seen[None, :, None] & (k < H)[None, None, :]
    e = tl.load(dg + at, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(tl.dot(e, w, input_precision=PRECISION), 0)


@triton.jit(do_not_specialize=_SIZES)
def recurrent_bwd(
    w_hh, lengths, order, resets, h0, c0, dh_state, dc_state, arrived, y, c, kept, dy, dc, dg,
    limit, T, B, first, last, y_t, y_b, c_t, c_b, dy_t, dy_b, dc_t, dc_b,
    CELL: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, PLANES: tl.constexpr,
    HIDDEN: tl.constexpr, H: tl.constexpr,
    BB: tl.constexpr, HU: tl.constexpr, BK: tl.constexpr, REGIME: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = dg.dtype.element_ty
    B = wide(B)
    u = tl.program_id(1) * HU + tl.arange(0, HU)
    b, exists, length = tile_rows(order, lengths, B, T, BB)
    inside = exists[:, None] & (u < H)[None, :]
    state = b[:, None] * H + u[None, :]
    dh = tl.load(dh_state + state, mask=inside, other=0.0)
    dcell = tl.load(dc_state + state, mask=inside, other=0.0) if CELL == "lstm" else dh
    k = tl.arange(0, BK)
    if REGIME != "step":
        n = tl.max(length).to(tl.int32)
        first = tl.maximum(first, T - n) if REVERSE else first
        last = last if REVERSE else tl.minimum(last, n)
        if REGIME == "whole":
            w0, w1, w2, w3 = weight_tiles(w_hh, k, u, H, G, "uk")
        else:
            arrived += tl.program_id(0)
            if BK >= H:
                w = (
                    _stacked_weights(w_hh, k, u, H, G)
                    if G > 1
                    else weight_tile(w_hh, 0, k, u, H, "uk")
                )
    elif last < T:
        t = T - 1 - last if REVERSE else last
        dh += _pending(
            dg, w_hh, resets, b, u, t, length, exists, T, B, G, PLANES, HIDDEN, H, BB, HU, BK,
            PRECISION,
        )  # fmt: skip
        dh = tl.where((exists & (t < length))[:, None], _limited(dh, limit), dh)
    t = T - last if REVERSE else last - 1
    active = exists & (t < length) & (t >= 0) & (last > 0)
    k0, k1, k2, k3, h, h_next, c_before, c_next, gy, gc, reset = _step_saved(
        kept, y, c, h0, c0, dy, dc, resets, b, u, t, length, active, B,
        y_t, y_b, c_t, c_b, dy_t, dy_b, dc_t, dc_b, CELL, KEPT, H, REVERSE,
    )  # fmt: skip
    for i in range(0, last - first):
        # the step before it in scan order is on its way while this one is computed
        t_next = t + 1 if REVERSE else t - 1
        active_next = exists & (t_next < length) & (t_next >= 0) & (i + 1 < last - first)
        n0, n1, n2, n3, h_n, h_next_n, c_before_n, c_next_n, gy_n, gc_n, reset_n = _step_saved(
            kept, y, c, h0, c0, dy, dc, resets, b, u, t_next, length, active_next, B,
            y_t, y_b, c_t, c_b, dy_t, dy_b, dc_t, dc_b, CELL, KEPT, H, REVERSE,
        )  # fmt: skip
        dh_new, dc_new, d0, d1, d2, d3 = cells.backward(
            CELL, dh + gy, dcell + gc, k0.to(tl.float32), k1.to(tl.float32), k2.to(tl.float32),
            k3.to(tl.float32), h, h_next, c_before, c_next,
        )  # fmt: skip
        mask = active[:, None] & (u < H)[None, :]
        at = ((wide(t) * B + b) * (PLANES * H))[:, None] + u[None, :]
        store_planes(dg, at, mask, d0, d1, d2, d3, PLANES, H)
        if REGIME == "whole":
            e0, e1, e2, e3 = _own_gates(mask, d0, d1, d2, d3, G, HIDDEN, dtype)
            dh_new = _back_through(dh_new, e0, e1, e2, e3, w0, w1, w2, w3, G, PRECISION)
        if REGIME == "together":
            wait_for_others(arrived, (i + 1) * tl.num_programs(1))
            row = (wide(t) * B + b) * (PLANES * H) + HIDDEN * H
            if BK < H:
                dh_new += _pending(
                    dg, w_hh, resets, b, u, t, length, exists, T, B, G, PLANES, HIDDEN, H, BB,
                    HU, BK, PRECISION,
                )  # fmt: skip
            elif G > 1:
                dh_new += _stacked_product(dg, row, active, k, w, H, G, PRECISION)
            else:
                seen = active[:, None] & (k < H)[None, :]
                at = dg + row[:, None] + k[None, :]
                e = tl.load(at, mask=seen, other=0.0, cache_modifier=".cg")
                dh_new = tl.dot(e, w, dh_new, input_precision=PRECISION)
        if REGIME != "step":
            dh_new = _limited(dh_new, limit)
        dc_new = _limited(dc_new, limit)
        kept_path = mask & (reset == 0)[:, None]
        dh = tl.where(mask, tl.where(kept_path, dh_new, 0.0), dh)
        if CELL == "lstm":
            dcell = tl.where(mask, tl.where(kept_path, dc_new, 0.0), dcell)
        k0, k1, k2, k3, h, h_next = n0, n1, n2, n3, h_n, h_next_n
        c_before, c_next, gy, gc = c_before_n, c_next_n, gy_n, gc_n
        reset, active, t = reset_n, active_next, t_next
    tl.store(dh_state + state, dh, mask=inside)
    if CELL == "lstm":
        tl.store(dc_state + state, dcell, mask=inside)
