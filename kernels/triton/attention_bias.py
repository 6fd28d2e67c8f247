"""The gradient of the bias: ds summed over what the bias is broadcast to, in a fixed order.

    dbias_ij = sum over the batch rows and heads that share it of ds_ij

One program a tile (i, j) of a bias; it goes through all who share the tile, so nothing of the size
of the scores of a batch is stored. A bias that is one for all i or j gets a sum per tile, which the
caller adds up. Two products a pair, as for dq and dk.
"""

import triton
import triton.language as tl

from .attention_backward import row_values
from .attention_scores import (
    LOG2E,
    Pairs,
    diagonal,
    extent,
    gradients,
    head_key_of,
    keep,
    pairs_at,
    reach,
    scores,
    slope_of,
)
from .attention_tiles import contract, head_of, rows_of, tile_or_none
from .launch import program, wide


@triton.jit
def _ds_tile(
    q, k, v, do, lse, delta, a, b, h, hk, NH, row, column, L, S, seed,
    BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """ds of one batch row and head; 0 out of reach."""
    _, _, n_q = extent(a.q_lengths, None, b, L)
    _, _, n_k = extent(a.kv_lengths, None, b, S)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offset = diagonal(n_q, n_k, BOTTOM_RIGHT)
    lo, hi = reach(row + m, n_q, n_k, offset, a.left, a.right)
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    reached = (tl.max(hi, axis=0) > column) & (tl.min(lo, axis=0) < column + BLOCK_N)
    if reached:
        i, j = (row + m)[:, None].to(tl.int32), (column + n)[None, :].to(tl.int32)
        pairs = Pairs(
            lo, hi, offset, pairs_at(a.mask, b, h), pairs_at(a.bias, b, h),
            slope_of(a.slopes, b, h), head_key_of(seed, b, h, NH, a),
        )  # fmt: skip
        q_rows = rows_of(head_of(q, b, h, 0), row, m, row + m < n_q)
        do_rows = rows_of(head_of(do, b, h, 0), row, m, row + m < n_q)
        k_rows = rows_of(head_of(k, b, hk, 0), column, n, column + n < n_k)
        v_rows = rows_of(head_of(v, b, hk, 0), column, n, column + n < n_k)
        qk = contract(
            tile_or_none(q_rows, D, BLOCK_D), q_rows, tile_or_none(k_rows, D, BLOCK_D), k_rows,
            D, BLOCK_D, PRECISION,
        )  # fmt: skip
        dp = contract(
            tile_or_none(do_rows, DV, BLOCK_V), do_rows, tile_or_none(v_rows, DV, BLOCK_V), v_rows,
            DV, BLOCK_V, PRECISION,
        )  # fmt: skip
        inside = (j >= lo[:, None]) & (j < hi[:, None])
        of = scores(qk, i, j, inside, pairs, a)
        lse_rows = row_values(head_of(lse, b, h, 0), row, m, row + m < n_q) * LOG2E
        delta_rows = row_values(head_of(delta, b, h, 0), row, m, row + m < n_q)
        kept = keep(i, j, pairs, a)
        _p, ds, _dqk = gradients(of, lse_rows[:, None], dp, delta_rows[:, None], kept)
    return ds


@triton.jit(do_not_specialize=["NH", "GROUP", "L", "S", "bias_heads", "share_b", "share_h", "seed"])
def attention_dbias(
    q, k, v, do, lse, delta, dbias, a, NH, GROUP, L, S, bias_heads, share_b, share_h,
    seed: tl.uint64,
    SUM_I: tl.constexpr, SUM_J: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A tile of one bias. Programs: blocks of j * blocks of i * biases (batch rows * heads).

    dbias: (pointer, strides of b, h, i, j), with SUM_I its i counts blocks, j alike.
    share_b, share_h: how many batch rows and heads one bias serves.
    """
    t, blocks_i, blocks_j = program(0), tl.cdiv(L, BLOCK_M), tl.cdiv(S, BLOCK_N)
    block_i, block_j = t // blocks_j % blocks_i, t % blocks_j
    bias = t // blocks_j // blocks_i
    b, h = bias // bias_heads, bias % bias_heads
    row, column = block_i * BLOCK_M, block_j * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(share_b * share_h):
        at_b, at_h = b * share_b + r // share_h, h * share_h + r % share_h
        total += _ds_tile(
            q, k, v, do, lse, delta, a, at_b, at_h, at_h // GROUP, NH, row, column, L, S, seed,
            BOTTOM_RIGHT, D, DV, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    to = dbias[0] + b * dbias[1] + h * dbias[2]
    i, j = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    if SUM_I and SUM_J:
        at = to + block_i * dbias[3] + block_j * dbias[4]
        tl.store(at, tl.sum(tl.sum(total, axis=1), axis=0).to(to.dtype.element_ty))
    elif SUM_I:
        at = to + block_i * dbias[3] + j * wide(dbias[4])
        tl.store(at, tl.sum(total, axis=0).to(to.dtype.element_ty), mask=j < S)
    elif SUM_J:
        at = to + i * wide(dbias[3]) + block_j * dbias[4]
        tl.store(at, tl.sum(total, axis=1).to(to.dtype.element_ty), mask=i < L)
    else:
        at = to + i[:, None] * dbias[3] + j[None, :] * dbias[4]
        inside = (i < L)[:, None] & (j < S)[None, :]
        tl.store(at, total.to(to.dtype.element_ty), mask=inside)
