"""Attention forward: a block of queries over tiles of keys, softmax as it goes.

    m_i = max_j s_ij    z_i = sum_j exp(s_ij - m_i)    o_i = sum_j exp(s_ij - m_i) v_j / z_i
    lse_i = m_i + log z_i; without a key o_i = 0, lse_i = -inf

Tiles out of reach (causal, window, lengths) are skipped, and only those at an edge are masked.
2 (D + DV) FLOP a pair; k and v of a head are read once a block, mostly from L2.
Milakov & Gimelshein, arXiv:1805.02867; Dao, FlashAttention-2, arXiv:2307.08691.
"""

import triton
import triton.language as tl

from .attention_scores import (
    LN2,
    Pairs,
    diagonal,
    extent,
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
def _attend_tiles(
    o, m, z, begin, end, q, q_rows, k_head, v_head, n_k, i, pairs, a, c,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """o, m, z after the keys from begin to end."""
    local = tl.arange(0, BLOCK_N)
    for j0 in range(begin, end, BLOCK_N):
        j = (j0 + local)[None, :]
        valid, inside = None, None
        if EDGE:
            valid = j0 + local < n_k
            inside = (j >= pairs.lo[:, None]) & (j < pairs.hi[:, None])
        k_rows = rows_of(k_head, j0, local, valid)
        k = tile_or_none(k_rows, D, BLOCK_D)
        qk = contract(q, q_rows, k, k_rows, D, BLOCK_D, PRECISION)
        of = scores(qk, i, j, inside, pairs, a)
        m_new = tl.maximum(m, tl.max(of.s, axis=1))
        at = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far: -inf - -inf is NaN
        p = tl.exp2(of.s - at[:, None])
        shrink = tl.exp2(m - at)
        z = z * shrink + tl.sum(p, axis=1)
        kept = keep(i, j, pairs, a)
        if kept is not None:
            p *= kept
        v_rows = rows_of(v_head, j0, local, valid)
        v = tile(v_rows, c, DV, BLOCK_V)
        o = add_product(o * shrink[:, None], p, of.allowed, v, v_rows, c, DV, BLOCK_V, PRECISION)
        m = m_new
    return o, m, z


@triton.jit
def _within(x, first, last):
    return tl.minimum(tl.maximum(x, first), last)


@triton.jit
def attend(
    q_rows, k_head, v_head, first, last, n_k, i, pairs, a, c,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o (chunk c of its columns) and lse of rows over their keys from first to last.

    i (rows, 1); first and last: whole tiles, or past the end.
    """
    BLOCK_M: tl.constexpr = i.shape[0]
    INNER: tl.constexpr = a.mask is None and a.bias is None
    begin, full_begin, full_end, end = ranges(pairs.lo, pairs.hi, BLOCK_N, INNER)
    begin, full_begin = _within(begin, first, last), _within(full_begin, first, last)
    full_end, end = _within(full_end, first, last), _within(end, first, last)
    q = tile_or_none(q_rows, D, BLOCK_D)
    o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    if INNER:
        o, m, z = _attend_tiles(
            o, m, z, begin, full_begin, q, q_rows, k_head, v_head, n_k, i, pairs,
            a, c, D, DV, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION, True,
        )  # fmt: skip
        o, m, z = _attend_tiles(
            o, m, z, full_begin, full_end, q, q_rows, k_head, v_head, n_k, i, pairs,
            a, c, D, DV, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION, False,
        )  # fmt: skip
        begin = full_end
    o, m, z = _attend_tiles(
        o, m, z, begin, end, q, q_rows, k_head, v_head, n_k, i, pairs,
        a, c, D, DV, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION, True,
    )  # fmt: skip
    # a row past the last query has been through whole tiles, too
    empty = (z == 0) | (pairs.lo >= pairs.hi)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(z)) * LN2)
    o = tl.where(empty[:, None], 0.0, o / tl.where(empty, 1.0, z)[:, None])
    return o, lse


@triton.jit(do_not_specialize=["B", "NH", "L", "S", "blocks", "seed"])
def attention_fwd(
    q, k, v, o, lse, a, B, NH, GROUP, L, S, blocks, seed: tl.uint64,
    BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head. Programs: blocks * NH * B (packed: blocks * NH), chunks of
    DV. The blocks of a head with the most keys, if it is causal, are the first."""
    b, h, block = locate(program(0), blocks, NH, a.cu_q, B, BLOCK_M)
    first_q, n, n_q = extent(a.q_lengths, a.cu_q, b, L)
    first_k, _, n_k = extent(a.kv_lengths, a.cu_k, b, S)
    if a.cu_q is None:
        block = blocks - 1 - block
        at = b
    else:
        at = b * 0  # all sequences stand in batch row 0
    if block * BLOCK_M < n:
        local = tl.arange(0, BLOCK_M)
        rows = block * BLOCK_M + local
        offset = diagonal(n_q, n_k, BOTTOM_RIGHT)
        lo, hi = reach(rows, n_q, n_k, offset, a.left, a.right)
        pairs = Pairs(
            lo, hi, offset, pairs_at(a.mask, at, h), pairs_at(a.bias, at, h),
            slope_of(a.slopes, b, h), head_key_of(seed, b, h, NH, a),
        )  # fmt: skip
        value, value_lse = attend(
            rows_of(head_of(q, at, h, first_q), block * BLOCK_M, local, rows < n_q),
            head_of(k, at, h // GROUP, first_k), head_of(v, at, h // GROUP, first_k), 0, S, n_k,
            rows[:, None].to(tl.int32), pairs, a, tl.program_id(1),
            D, DV, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
        to = rows_of(head_of(o, at, h, first_q), block * BLOCK_M, local, rows < n)
        put(to, tl.program_id(1), value, DV, BLOCK_V)
        to = rows_of(head_of(lse, at, h, first_q), block * BLOCK_M, local, rows < n)
        tl.store(to.base + to.at, value_lse, mask=to.valid)
