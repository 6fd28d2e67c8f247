"""Attention backward in three kernels without atomics: delta, then dq, then dk and dv.

    delta_i = o_i . do_i - dlse_i            p_ij = exp(s_ij - lse_i)
    ds_ij = p_ij * (keep_ij / (1 - p) * (do_i . v_j) - delta_i)      dqk = ds * softcap's derivative
    dq_i = scale * sum_j dqk_ij k_j          dk_j = scale * sum_i dqk_ij q_i
    dv_j = sum_i p_ij * keep_ij / (1 - p) * do_i

dq: a block of queries over its keys. dk, dv: a block of keys over the queries of every head of its
group, one after the other, tiles transposed. (6 D + 4 DV) + (2 DV for dv) FLOP a pair, 7 products.
Dao, FlashAttention-2, arXiv:2307.08691.
"""

import triton
import triton.language as tl

from .attention_scores import (
    LOG2E,
    Pairs,
    diagonal,
    extent,
    gradients,
    head_key_of,
    keep,
    pairs_at,
    ranges,
    reach,
    scores,
    slope_of,
)
from .attention_tiles import (
    add_product,
    chunk,
    contract,
    head_of,
    locate,
    put,
    rows_of,
    tile,
    tile_or_none,
)
from .launch import program


@triton.jit
def row_values(head, first, local, valid):
    """One value a row: of lse or delta."""
    rows = rows_of(head, first, local, valid)
    return tl.load(rows.base + rows.at, mask=valid, other=0.0)


@triton.jit(do_not_specialize=["NH", "L", "blocks"])
def attention_delta(
    o, do, lse, dlse, delta, NH, L, blocks,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """delta of a block of rows, packed or not; 0 without a key, whatever do is."""
    b, h, block = locate(program(0), blocks, NH, None, 0, BLOCK_M)
    local = tl.arange(0, BLOCK_M)
    valid = block * BLOCK_M + local < L
    total = tl.zeros([BLOCK_M], tl.float32)
    o_rows = rows_of(head_of(o, b, h, 0), block * BLOCK_M, local, valid)
    do_rows = rows_of(head_of(do, b, h, 0), block * BLOCK_M, local, valid)
    for c in range(tl.cdiv(DV, BLOCK_V)):
        part = tile(o_rows, c, DV, BLOCK_V).to(tl.float32)
        total += tl.sum(part * tile(do_rows, c, DV, BLOCK_V).to(tl.float32), axis=1)
    if dlse is not None:
        total -= row_values(head_of(dlse, b, h, 0), block * BLOCK_M, local, valid)
    lse_rows = row_values(head_of(lse, b, h, 0), block * BLOCK_M, local, valid)
    total = tl.where(lse_rows == float("-inf"), 0.0, total)
    to = rows_of(head_of(delta, b, h, 0), block * BLOCK_M, local, valid)
    tl.store(to.base + to.at, total, mask=valid)


@triton.jit
def _dq_tiles(
    dq, begin, end, q, q_rows, do, do_rows, k_head, v_head, lse, delta, n_k, i, pairs, a, c,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, BLOCK_N)
    for j0 in range(begin, end, BLOCK_N):
        j = (j0 + local)[None, :]
        valid, inside = None, None
        if EDGE:
            valid = j0 + local < n_k
            inside = (j >= pairs.lo[:, None]) & (j < pairs.hi[:, None])
        k_rows, v_rows = rows_of(k_head, j0, local, valid), rows_of(v_head, j0, local, valid)
        k, v = tile_or_none(k_rows, D, BLOCK_D), tile_or_none(v_rows, DV, BLOCK_V)
        qk = contract(q, q_rows, k, k_rows, D, BLOCK_D, PRECISION)
        of = scores(qk, i, j, inside, pairs, a)
        dp = contract(do, do_rows, v, v_rows, DV, BLOCK_V, PRECISION)
        kept = keep(i, j, pairs, a)
        _, _, dqk = gradients(of, lse[:, None], dp, delta[:, None], kept)
        k_c = chunk(k, k_rows, c, D, BLOCK_D)
        dq = add_product(dq, dqk, of.allowed, k_c, k_rows, c, D, BLOCK_D, PRECISION)
    return dq


@triton.jit(do_not_specialize=["B", "NH", "L", "S", "blocks", "seed"])
def attention_dq(
    q, k, v, do, lse, delta, dq, a, B, NH, GROUP, L, S, blocks, seed: tl.uint64,
    BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head. Programs: as `attention_fwd`, chunks of D."""
    b, h, block = locate(program(0), blocks, NH, a.cu_q, B, BLOCK_M)
    first_q, n, n_q = extent(a.q_lengths, a.cu_q, b, L)
    first_k, _, n_k = extent(a.kv_lengths, a.cu_k, b, S)
    if a.cu_q is None:
        block = blocks - 1 - block
        at = b
    else:
        at = b * 0
    if block * BLOCK_M < n:
        c = tl.program_id(1)
        row = block * BLOCK_M
        local = tl.arange(0, BLOCK_M)
        valid = row + local < n_q
        i = (row + local)[:, None].to(tl.int32)
        offset = diagonal(n_q, n_k, BOTTOM_RIGHT)
        lo, hi = reach(row + local, n_q, n_k, offset, a.left, a.right)
        pairs = Pairs(
            lo, hi, offset, pairs_at(a.mask, at, h), pairs_at(a.bias, at, h),
            slope_of(a.slopes, b, h), head_key_of(seed, b, h, NH, a),
        )  # fmt: skip
        q_rows = rows_of(head_of(q, at, h, first_q), row, local, valid)
        do_rows = rows_of(head_of(do, at, h, first_q), row, local, valid)
        q_tile, do_tile = tile_or_none(q_rows, D, BLOCK_D), tile_or_none(do_rows, DV, BLOCK_V)
        lse_rows = row_values(head_of(lse, at, h, first_q), row, local, valid)
        delta_rows = row_values(head_of(delta, at, h, first_q), row, local, valid)
        k_head, v_head = head_of(k, at, h // GROUP, first_k), head_of(v, at, h // GROUP, first_k)
        INNER: tl.constexpr = a.mask is None and a.bias is None
        begin, full_begin, full_end, end = ranges(lo, hi, BLOCK_N, INNER)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if INNER:
            total = _dq_tiles(
                total, begin, full_begin, q_tile, q_rows, do_tile, do_rows, k_head, v_head,
                lse_rows * LOG2E, delta_rows, n_k, i, pairs, a, c,
                D, DV, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION, True,
            )  # fmt: skip
            total = _dq_tiles(
                total, full_begin, full_end, q_tile, q_rows, do_tile, do_rows, k_head, v_head,
                lse_rows * LOG2E, delta_rows, n_k, i, pairs, a, c,
                D, DV, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION, False,
            )  # fmt: skip
            begin = full_end
        total = _dq_tiles(
            total, begin, end, q_tile, q_rows, do_tile, do_rows, k_head, v_head,
            lse_rows * LOG2E, delta_rows, n_k, i, pairs, a, c,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION, True,
        )  # fmt: skip
        has_key = (lo < hi) & (lse_rows != float("-inf"))
        total = tl.where(has_key[:, None], total * a.scale, 0.0)
        to = rows_of(head_of(dq, at, h, first_q), row, local, row + local < n)
        put(to, c, total, D, BLOCK_D)


@triton.jit
def _dkv_tiles(
    dk, dv, begin, end, k, k_rows, v, v_rows, q_head, do_head, lse_head, delta_head, n_q, j,
    pairs, a, c,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk, dv after the queries from begin to end of one head; tiles are (keys, queries)."""
    local = tl.arange(0, BLOCK_M)
    for i0 in range(begin, end, BLOCK_M):
        i = (i0 + local)[None, :]
        valid, inside = None, None
        if EDGE:
            valid = i0 + local < n_q
            inside = (i >= pairs.lo[:, None]) & (i < pairs.hi[:, None])
        q_rows, do_rows = rows_of(q_head, i0, local, valid), rows_of(do_head, i0, local, valid)
        q, do = tile_or_none(q_rows, D, BLOCK_D), tile_or_none(do_rows, DV, BLOCK_V)
        kq = contract(k, k_rows, q, q_rows, D, BLOCK_D, PRECISION)
        of = scores(kq, i, j, inside, pairs, a)
        lse = row_values(lse_head, i0, local, i0 + local < n_q) * LOG2E
        delta = row_values(delta_head, i0, local, i0 + local < n_q)
        dp = contract(v, v_rows, do, do_rows, DV, BLOCK_V, PRECISION)
        kept = keep(i, j, pairs, a)
        p, _, dqk = gradients(of, lse[None, :], dp, delta[None, :], kept)
        do_c, q_c = chunk(do, do_rows, c, DV, BLOCK_V), chunk(q, q_rows, c, D, BLOCK_D)
        dv = add_product(dv, p, of.allowed, do_c, do_rows, c, DV, BLOCK_V, PRECISION)
        dk = add_product(dk, dqk, of.allowed, q_c, q_rows, c, D, BLOCK_D, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["B", "NK", "GROUP", "L", "S", "blocks", "seed"])
def attention_dkv(
    q, k, v, do, lse, delta, dk, dv, a, B, NK, GROUP, L, S, blocks, seed: tl.uint64,
    BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A block of keys of one head. Programs: blocks * NK * B (packed: * 1), chunks of D and DV."""
    b, hk, block = locate(program(0), blocks, NK, a.cu_k, B, BLOCK_N)
    first_q, _, n_q = extent(a.q_lengths, a.cu_q, b, L)
    first_k, n, n_k = extent(a.kv_lengths, a.cu_k, b, S)
    at = b
    if a.cu_k is not None:
        at = b * 0
    if block * BLOCK_N < n:
        c = tl.program_id(1)
        row = block * BLOCK_N
        local = tl.arange(0, BLOCK_N)
        j = (row + local)[:, None].to(tl.int32)
        offset = diagonal(n_q, n_k, BOTTOM_RIGHT)
        lo, hi = reach(row + local, n_k, n_q, -offset, a.right, a.left)
        k_rows = rows_of(head_of(k, at, hk, first_k), row, local, row + local < n_k)
        v_rows = rows_of(head_of(v, at, hk, first_k), row, local, row + local < n_k)
        k_tile, v_tile = tile_or_none(k_rows, D, BLOCK_D), tile_or_none(v_rows, DV, BLOCK_V)
        INNER: tl.constexpr = a.mask is None and a.bias is None
        begin, full_begin, full_end, end = ranges(lo, hi, BLOCK_M, INNER)
        dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_tile = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for h in range(hk * GROUP, (hk + 1) * GROUP):
            pairs = Pairs(
                lo, hi, offset, pairs_at(a.mask, at, h), pairs_at(a.bias, at, h),
                slope_of(a.slopes, b, h), head_key_of(seed, b, h, NK * GROUP, a),
            )  # fmt: skip
            q_head, do_head = head_of(q, at, h, first_q), head_of(do, at, h, first_q)
            lse_head, delta_head = head_of(lse, at, h, first_q), head_of(delta, at, h, first_q)
            if INNER:
                dk_tile, dv_tile = _dkv_tiles(
                    dk_tile, dv_tile, begin, full_begin, k_tile, k_rows, v_tile, v_rows,
                    q_head, do_head, lse_head, delta_head, n_q, j, pairs, a, c,
                    D, DV, BLOCK_M, BLOCK_D, BLOCK_V, PRECISION, True,
                )  # fmt: skip
                dk_tile, dv_tile = _dkv_tiles(
                    dk_tile, dv_tile, full_begin, full_end, k_tile, k_rows, v_tile, v_rows,
                    q_head, do_head, lse_head, delta_head, n_q, j, pairs, a, c,
                    D, DV, BLOCK_M, BLOCK_D, BLOCK_V, PRECISION, False,
                )  # fmt: skip
            dk_tile, dv_tile = _dkv_tiles(
                dk_tile, dv_tile, full_end if INNER else begin, end, k_tile, k_rows, v_tile, v_rows,
                q_head, do_head, lse_head, delta_head, n_q, j, pairs, a, c,
                D, DV, BLOCK_M, BLOCK_D, BLOCK_V, PRECISION, True,
            )  # fmt: skip
        to = rows_of(head_of(dk, at, hk, first_k), row, local, row + local < n)
        put(to, c, dk_tile * a.scale, D, BLOCK_D)
        to = rows_of(head_of(dv, at, hk, first_k), row, local, row + local < n)
        put(to, c, dv_tile, DV, BLOCK_V)
