"""What the attention kernels share: which keys a query reaches, its scores, their gradients.

    s_ij = scale * q_i . k_j, then softcap, ALiBi, bias, in this order      kept in units of log 2

Letters and rules are those of fastseq/reference/attention.py. A kernel holds a block of rows x and
runs over tiles of rows y: queries over keys, or keys over queries for dk and dv, where all tiles
are transposed. So i, j and what belongs to a row come ready to broadcast, (BLOCK, 1) or (1, BLOCK).

In a tile away from the edges all pairs are allowed. An absent option is None at compile time.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_tiles import MAX_INT32
from .cells import tanh
from .launch import wide

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Options(NamedTuple):
    """What a call was given, as every kernel takes it; None where absent."""

    mask: Any  # (pointer to bool, strides of b, h, i, j)
    bias: Any  # (pointer, strides of b, h, i, j)
    slopes: Any  # (pointer, strides of b, h)
    q_lengths: Any  # pointer to (B,) integers
    kv_lengths: Any
    cu_q: Any  # pointer to (B + 1,) integers: rows are packed
    cu_k: Any
    left: Any  # keys on each side of the diagonal; causal is right = 0
    right: Any
    scale: Any
    softcap: Any
    dropout: Any  # (threshold, 1 / (1 - p))


class Pairs(NamedTuple):
    """What a block of rows brings to its scores. All but offset: one for all, or one a row."""

    lo: Any  # the rows y that x reaches are lo..hi - 1
    hi: Any
    offset: Any  # of the diagonal: j = i + offset
    mask_at: Any  # pointers to the head's mask and bias
    bias_at: Any
    slope: Any
    head_key: Any  # of dropout


class Scores(NamedTuple):
    """Of a tile. A plain tuple of None does not compile (Triton 3.7)."""

    s: Any  # in units of log 2, -inf where not allowed
    allowed: Any  # None: all
    tanh: Any  # of the softcap


# ---- reach


@triton.jit
def extent(lengths, cu_seqlens, b, rows):
    """Of batch row b: where its rows start, how many there are, how many of them count."""
    if cu_seqlens is not None:
        first = tl.minimum(tl.maximum(wide(tl.load(cu_seqlens + b)), 0), rows)
        end = tl.minimum(wide(tl.load(cu_seqlens + b + 1)), rows)
        n = tl.maximum(end - first, 0)
        count = n
    else:
        first = b * 0
        n = first + rows
        count = n
        if lengths is not None:
            count = tl.minimum(tl.maximum(wide(tl.load(lengths + b)), 0), n)
    return first, n, count


@triton.jit
def diagonal(n_q, n_k, BOTTOM_RIGHT: tl.constexpr):
    """offset"""
    return n_k - n_q if BOTTOM_RIGHT else n_q * 0


@triton.jit
def reach(x, n_x, n_y, offset, left, right):
    """lo, hi: row x meets the rows lo <= y < hi of n_y; none if x >= n_x.

    Of query i: i + offset - left <= j <= i + offset + right. Of key j the same with offset negated
    and left and right exchanged.
    """
    lo, hi = x * 0, x * 0 + n_y
    if left is not None:
        lo = tl.minimum(tl.maximum(x + offset - left, 0), hi)
    if right is not None:
        hi = tl.minimum(tl.maximum(x + offset + right + 1, 0), hi)
    return lo.to(tl.int32), tl.where(x < n_x, hi, 0).to(tl.int32)


@triton.jit
def ranges(lo, hi, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """begin, full_begin, full_end, end of the y's that rows of this reach meet.

    Every row meets all of the middle range, which is whole tiles; without SPLIT it is empty.
    """
    end = tl.max(hi, axis=0)
    begin = tl.min(tl.where(lo < hi, lo, MAX_INT32), axis=0)
    begin = tl.minimum(begin // BLOCK * BLOCK, end)
    full_begin, full_end = end, end
    if SPLIT:
        all_from = tl.maximum(tl.max(lo, axis=0), begin)
        full_begin = tl.minimum(tl.cdiv(all_from, BLOCK) * BLOCK, end)
        full_end = tl.maximum(tl.min(hi, axis=0) // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


# ---- scores


@triton.jit
def pairs_at(t, b, h):
    """The pointer to batch row b, head h of t = (pointer, strides of b, h, i, j), or None."""
    if t is None:
        return None
    else:
        return t[0] + b * t[1] + h * t[2]


@triton.jit
def slope_of(t, b, h):
    """The slope of batch row b, head h of t = (pointer, strides of b, h), or None."""
    if t is None:
        return None
    else:
        return tl.load(t[0] + b * t[1] + h * t[2]).to(tl.float32)


@triton.jit
def scores(qk, i, j, inside, pairs, a):
    """Those of a tile of products; inside: which pairs are in reach, None for all (then without a
    mask or bias)."""
    t = None
    if a.softcap is None:
        s = qk * (a.scale * LOG2E)
    else:
        t = tanh(qk * (a.scale / a.softcap))
        s = t * (a.softcap * LOG2E)
    if a.slopes is not None:
        distance = tl.abs(i + pairs.offset.to(tl.int32) - j)
        s -= (pairs.slope * LOG2E) * distance.to(tl.float32)
    allowed = inside
    if a.bias is not None:
        at = pairs.bias_at + wide(i) * a.bias[3] + wide(j) * a.bias[4]
        values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        s += values * LOG2E
        allowed = allowed & (values != float("-inf"))
    if a.mask is not None:
        at = pairs.mask_at + wide(i) * a.mask[3] + wide(j) * a.mask[4]
        allowed = allowed & (tl.load(at, mask=inside, other=0) != 0)
    if allowed is not None:
        s = tl.where(allowed, s, float("-inf"))
    return Scores(s, allowed, t)


@triton.jit
def gradients(of, lse, dp, delta, kept):
    """p with dropout, ds (the gradient of s), and dqk (that of scale * q . k).

    p = exp(s - lse)    ds = p * (dp - delta)    lse in units of log 2, delta = o . do - dlse
    kept: keep / (1 - dropout_p), or None.
    """
    empty = lse == float("-inf")  # a row without a key
    p = tl.exp2(of.s - tl.where(empty, float("inf"), lse))
    if kept is not None:
        dp *= kept
    ds = p * (dp - delta)
    if of.allowed is not None:
        p = tl.where(of.allowed, p, 0.0)
        ds = tl.where(of.allowed & (lse != float("-inf")), ds, 0.0)
    dqk = ds
    if of.tanh is not None:
        dqk *= 1 - of.tanh * of.tanh
    if kept is not None:
        p *= kept
    return p, ds, dqk


# ---- dropout, dropout_keep of the reference


@triton.jit
def _splitmix64(z):
    z += 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def head_key_of(seed, b, h, heads, a):
    if a.dropout is None:
        return None
    else:
        return _splitmix64(seed.to(tl.uint64) ^ _splitmix64((b * heads + h).to(tl.uint64)))


@triton.jit
def keep(i, j, pairs, a):
    """keep_ij / (1 - p), or None without dropout."""
    if a.dropout is None:
        return None
    else:
        row_key = _splitmix64(pairs.head_key + i.to(tl.uint64))
        x = (j.to(tl.uint32) * 0x9E3779B9) ^ row_key.to(tl.uint32)
        x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ (row_key >> 32).to(tl.uint32)
        x = (x ^ (x >> 15)) * 0x846CA68B
        return tl.where(x >= a.dropout[0].to(tl.uint32), a.dropout[1], 0.0)
