"""Attention of few queries over many keys: the keys of a head are split over programs, then merged.

    lse = log sum_s exp(lse_s)        o = sum_s exp(lse_s - lse) o_s        over the splits s

The query heads that share a key/value head stand in one tile, row r = g * L + i being query i of
head hk * GROUP + g, so that k and v are read once: the cost is their bytes. The splits follow from
S alone: a row's bits do not depend on its batch, nor on the device. Flash-Decoding (Dao et al.,
2023).
"""

import triton
import triton.language as tl

from .attention_forward import attend
from .attention_scores import (
    LN2,
    LOG2E,
    Pairs,
    diagonal,
    extent,
    head_key_of,
    pairs_at,
    reach,
    slope_of,
)
from .attention_tiles import Rows, head_of, put
from .launch import program, wide


@triton.jit
def _columns(value):
    """A value a row, ready to broadcast, or None."""
    if value is None:
        return None
    else:
        return value[:, None]


@triton.jit(do_not_specialize=["B", "NH", "L", "S", "splits", "span", "blocks", "seed"])
def attention_decode(
    q, k, v, o, lse, a, B, NH, GROUP, L, S, splits, span, blocks, seed: tl.uint64,
    BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Split s of one key/value head: keys s * span .. (s + 1) * span - 1, span whole tiles.

    o, lse: (pointer, strides of b, h, row, split). Programs: splits * blocks of rows * NK * B,
    chunks of DV.
    """
    t, NK = program(0), NH // GROUP
    split, block = t % splits, t // splits % blocks
    hk, b = t // splits // blocks % NK, t // splits // blocks // NK
    c = tl.program_id(1)
    _, _, n_q = extent(a.q_lengths, None, b, L)
    _, _, n_k = extent(a.kv_lengths, None, b, S)
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    there = r < GROUP * L
    h, i = hk * GROUP + tl.where(there, r // L, 0), r % L
    offset = diagonal(n_q, n_k, BOTTOM_RIGHT)
    lo, hi = reach(i, n_q, n_k, offset, a.left, a.right)
    hi = tl.where(there, hi, 0)
    pairs = Pairs(
        lo, hi, offset, _columns(pairs_at(a.mask, b, h)), _columns(pairs_at(a.bias, b, h)),
        _columns(slope_of(a.slopes, b, h)), _columns(head_key_of(seed, b, h, NH, a)),
    )  # fmt: skip
    first = (split * span).to(tl.int32)
    value, value_lse = attend(
        Rows(q[0] + b * q[1], h * q[2] + i * q[3], there & (i < n_q)),
        head_of(k, b, hk, 0), head_of(v, b, hk, 0), first, tl.minimum(first + span, S), n_k,
        i[:, None].to(tl.int32), pairs, a, c,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
    )  # fmt: skip
    put(
        Rows(o[0] + b * o[1] + split * o[4], h * o[2] + i * wide(o[3]), there),
        c, value, DV, BLOCK_V,
    )  # fmt: skip
    at = lse[0] + b * lse[1] + split * lse[4] + h * lse[2] + i * wide(lse[3])
    tl.store(at, value_lse, mask=there)


@triton.jit(do_not_specialize=["NH", "L", "splits"])
def attention_merge(
    part, part_lse, o, lse, NH, L, splits,
    DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row from its splits, BLOCK_S >= splits. Programs: L * NH * B, chunks of DV."""
    t, c = program(0), tl.program_id(1)
    i, h, b = t % L, t // L % NH, t // L // NH
    s = tl.arange(0, BLOCK_S)
    at = part_lse[0] + b * part_lse[1] + h * part_lse[2] + i * part_lse[3] + s * part_lse[4]
    lses = tl.load(at, mask=s < splits, other=float("-inf")) * LOG2E
    m = tl.max(lses, axis=0)
    w = tl.exp2(lses - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(w, axis=0)
    columns = c * BLOCK_V + tl.arange(0, BLOCK_V)
    at = part[0] + b * part[1] + h * part[2] + i * part[3]
    at = at + s[:, None] * part[4] + columns[None, :]
    inside = (s < splits)[:, None] & (columns < DV)[None, :]
    # a split without a key has o 0
    value = tl.sum(w[:, None] * tl.load(at, mask=inside, other=0.0), axis=0)
    value = value / tl.where(total == 0, 1.0, total)
    to = o[0] + b * o[1] + h * o[2] + i * o[3]
    tl.store(to + columns, value.to(to.dtype.element_ty), mask=columns < DV)
    value_lse = tl.where(total == 0, float("-inf"), (m + tl.log2(total)) * LN2)
    tl.store(lse[0] + b * lse[1] + h * lse[2] + i * lse[3], value_lse)
