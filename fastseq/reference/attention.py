"""Softmax attention: the equations, the gradients by hand, and the generator of its dropout.

    s_ij = scale * q_i . k_j                              scale: 1 / sqrt(D) unless given
    s_ij = softcap * tanh(s_ij / softcap)                 if softcap is given
    s_ij = score_mod(s_ij, b, h, i, j)                    if there is one; b, h, i, j as numbers
    s_ij = s_ij - slope_h * |i + offset - j|              if alibi_slopes are given
    s_ij = s_ij + bias_ij                                 if a bias is given
    lse_i = log sum_j exp(s_ij)                           natural, over the allowed keys j of i
    p_ij = exp(s_ij - lse_i)                              0 where j is not allowed
    o_i = sum_j p_ij * keep_ij / (1 - dropout_p) * v_j    over the allowed keys; keep: dropout_keep

Letters: B batch, NH query heads, NK key/value heads (query head h reads h // (NH // NK)), L query
length, S key length, D head size, DV value size.

    q (B, NH, L, D)  k (B, NK, S, D)  v (B, NK, S, DV)  o (B, NH, L, DV)  lse (B, NH, L)
    mask bool, True = attend, and bias    broadcast to (B, NH, L, S)
    q_lengths kv_lengths (B,)    alibi_slopes (NH,) or (B, NH)

Key j is allowed for query i of batch row b if all of these hold:

    i < q_lengths[b]    j < kv_lengths[b]    mask_ij    bias_ij > -inf (or NaN)
    causal "top_left" (True means that) or "bottom_right":  j <= i + offset
    window (left, right), None for no limit on a side:  i + offset - left <= j <= i + offset + right

where offset = kv_lengths[b] - q_lengths[b] for "bottom_right", and 0 for everything else.

Pairs that are not allowed take no part: NaN or infinity in their q, k, v or do reaches nothing
through them. A row with no allowed key, or whose scores are all -inf, has o = 0, lse = -inf, and
gives no gradient to anything. Any float dtype; everything is computed in that of q. The derivative
of score_mod is taken by the complex step, see `user_cells.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

STEP = 1e-100  # of the complex step
_CAUSAL = {False: False, True: True, "top_left": True, "bottom_right": True}


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `attention`; sequence: the b that batch row 0 has in dropout."""

    mask: np.ndarray | None = None
    bias: np.ndarray | None = None
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    q_lengths: np.ndarray | None = None
    kv_lengths: np.ndarray | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: np.ndarray | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    score_mod: Callable | None = None
    sequence: int = 0


def _splitmix64(z):
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def dropout_keep(seed, B, NH, L, S, p, *, sequence=0):
    """Which probabilities dropout keeps: bool (B, NH, L, S), True with probability 1 - p.

    head_key = splitmix64(seed ^ splitmix64(b * NH + h))        uint64, all modulo 2^64
    row_key = splitmix64(head_key + i)
    x = (j * 0x9E3779B9) ^ low32(row_key)                       uint32, all modulo 2^32
    x = ((x ^ x >> 16) * 0x7FEB352D) ^ high32(row_key)
    x = (x ^ x >> 15) * 0x846CA68B
    keep = x >= floor(p * 2^32)

    A number depends on seed, b, h, i and j alone (and NH), so that tiles in any order, packed and
    padded rows, forward and backward draw the same. b counts from sequence.
    """
    seed = np.uint64(seed % 2**64)
    heads = np.arange(sequence * NH, (sequence + B) * NH, dtype=np.uint64)
    head_key = _splitmix64(seed ^ _splitmix64(heads))
    row_key = _splitmix64(head_key[:, None] + np.arange(L, dtype=np.uint64))[..., None]
    low, high = row_key.astype(np.uint32), (row_key >> np.uint64(32)).astype(np.uint32)
    x = (np.arange(S, dtype=np.uint32) * np.uint32(0x9E3779B9)) ^ low
    x = ((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)) ^ high
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return (x >= int(p * 2**32)).reshape(B, NH, L, S)


def _pairs(B, L, S, a):
    """distance = j - (i + offset) and, mask and bias aside, allowed: both (B, 1, L, S)."""
    i, j = np.arange(L)[:, None], np.arange(S)
    q_lengths = np.reshape(np.full(B, L) if a.q_lengths is None else a.q_lengths, (B, 1, 1, 1))
    kv_lengths = np.reshape(np.full(B, S) if a.kv_lengths is None else a.kv_lengths, (B, 1, 1, 1))
    offset = kv_lengths - q_lengths if a.causal == "bottom_right" else np.zeros_like(q_lengths)
    distance = j - (i + offset)
    allowed = (i < q_lengths) & (j < kv_lengths)
    if _CAUSAL[a.causal]:
        allowed &= distance <= 0
    left, right = a.window or (None, None)
    if left is not None:
        allowed &= distance >= -left
    if right is not None:
        allowed &= distance <= right
    return distance, allowed


def _scores(q, k, a, scale):
    """s, allowed, and the derivative of softcap and score_mod, 1 without them: (B, NH, L, S)."""
    s = scale * (q @ k.swapaxes(-1, -2))
    distance, allowed = _pairs(*s.shape[::2], s.shape[3], a)
    cap_slope = np.ones_like(s)
    if a.softcap is not None:
        softcap = s.dtype.type(a.softcap)
        t = np.tanh(s / softcap)
        s, cap_slope = softcap * t, 1 - t**2
    if a.score_mod is not None:
        s, mod_slope = _modified(s, a)
        cap_slope = cap_slope * mod_slope
    if a.alibi_slopes is not None:
        slopes = np.asarray(a.alibi_slopes, s.dtype)[..., None, None]
        s = s - slopes * np.abs(distance).astype(s.dtype)
    if a.bias is not None:
        bias = np.asarray(a.bias, s.dtype)
        s, allowed = s + bias, allowed & (bias != -np.inf)
    if a.mask is not None:
        allowed = allowed & a.mask
    return s, np.broadcast_to(allowed, s.shape), cap_slope


def _modified(s, a):
    """score_mod of the scores, and its derivative by them."""
    B, NH, L, S = (np.arange(n, dtype=s.dtype) for n in s.shape)
    at = (B[:, None, None, None] + a.sequence, NH[:, None, None], L[:, None], S)
    slope = np.imag(a.score_mod(s + 1j * STEP, *at)) / STEP
    return tuple(
        np.broadcast_to(np.asarray(r, s.dtype), s.shape) for r in (a.score_mod(s, *at), slope)
    )


def _softmax(s, allowed):
    """p and lse over the allowed keys, and allowed without the rows that have no score > -inf."""
    m = np.max(s, axis=-1, keepdims=True, initial=-np.inf, where=allowed)
    allowed = allowed & (m != -np.inf)
    e = np.where(allowed, np.exp(s - m), 0)
    total = e.sum(axis=-1, keepdims=True)
    return np.where(allowed, e / total, 0), (m + np.log(total))[..., 0], allowed


def _sum_over(pairs, w, x):
    """w @ x with the terms of `pairs` only: of the others not even 0 * NaN is added."""
    finite = np.isfinite(x).all(axis=-1)
    total = np.where(pairs, w, 0) @ np.where(finite[..., None], x, 0)
    for j in np.flatnonzero(~finite.all(axis=(0, 1))):
        terms = w[..., j, None] * x[..., None, j, :]
        added = pairs[..., j] & ~finite[..., j, None]
        total += np.where(added[..., None], terms, 0)
    return total


def _keep_weights(p, a):
    """keep / (1 - dropout_p), 0 where nothing is kept."""
    if a.dropout_p == 0:
        return np.ones_like(p)
    keep = dropout_keep(a.seed, *p.shape, a.dropout_p, sequence=a.sequence)
    return np.where(keep, np.divide(1, 1 - a.dropout_p), 0).astype(p.dtype)


def _per_query_head(x, NH, dtype):
    return np.repeat(np.asarray(x, dtype), NH // x.shape[1], axis=1)


@np.errstate(divide="ignore", over="ignore", invalid="ignore")
def _attention_fwd(q, k, v, a):
    """Returns o, lse and what the backward pass needs."""
    k, v = (_per_query_head(x, q.shape[1], q.dtype) for x in (k, v))
    scale = q.dtype.type(q.shape[-1] ** -0.5 if a.scale is None else a.scale)
    s, allowed, cap_slope = _scores(q, k, a, scale)
    p, lse, allowed = _softmax(s, allowed)
    kept = _keep_weights(p, a)
    o = _sum_over(allowed, p * kept, v)
    return o, lse, (k, v, p, kept, allowed, scale * cap_slope)


def _sum_to(gradient, shape):
    """The gradient of an array of this shape that was broadcast."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    ones = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return gradient.sum(axis=ones, keepdims=True)


@np.errstate(divide="ignore", over="ignore", invalid="ignore")
def _attention_bwd(q, k, v, a, do=None, dlse=None):
    """The textbook gradients, {argument: gradient}; do and dlse: None is zeros."""
    NK = k.shape[1]
    o, lse, (k, v, p, kept, allowed, slope) = _attention_fwd(q, k, v, a)
    do = np.zeros_like(o) if do is None else np.asarray(do, q.dtype)
    dlse = np.zeros_like(lse) if dlse is None else np.asarray(dlse, q.dtype)

    dv = _sum_over(allowed.swapaxes(-1, -2), (p * kept).swapaxes(-1, -2), do)
    dp = np.where(allowed, (do @ v.swapaxes(-1, -2)) * kept, 0)
    mean = (p * dp).sum(axis=-1, keepdims=True)
    ds = np.where(allowed, p * (dp - mean + dlse[..., None]), 0)
    dqk = ds * slope  # the gradient of q_i . k_j
    dq = _sum_over(allowed, dqk, k)
    dk = _sum_over(allowed.swapaxes(-1, -2), dqk.swapaxes(-1, -2), q)

    def per_key_head(x):
        B, NH, S, width = x.shape
        return x.reshape(B, NK, NH // NK, S, width).sum(axis=2)

    grads = {"q": dq, "k": per_key_head(dk), "v": per_key_head(dv)}
    return grads if a.bias is None else grads | {"bias": _sum_to(ds, np.shape(a.bias))}


def attention(
    q,
    k,
    v,
    *,
    mask=None,
    bias=None,
    causal=False,
    window=None,
    q_lengths=None,
    kv_lengths=None,
    scale=None,
    softcap=None,
    alibi_slopes=None,
    dropout_p=0.0,
    seed=None,
    score_mod=None,
):
    """o_i = sum_j p_ij v_j, p = softmax(scale * q k^T ...): the module's equations. Returns o, lse.

    seed: an integer, read modulo 2^64; needed only if dropout_p > 0.
    """
    a = Options(
        mask,
        bias,
        causal,
        window,
        q_lengths,
        kv_lengths,
        scale,
        softcap,
        alibi_slopes,
        dropout_p,
        seed,
        score_mod,
    )
    o, lse, _ = _attention_fwd(q, k, v, a)
    return o, lse


def attention_vjp(q, k, v, *, do=None, dlse=None, **options):
    """Gradients of sum(do * o) + sum(dlse * lse) by q, k, v and, if given, bias in its shape.

    The sum runs over the rows that have a key. options: those of `attention`.
    """
    return _attention_bwd(q, k, v, Options(**options), do, dlse)


def _sequences(cu_seqlens_q, cu_seqlens_k, options):
    """Of each packed sequence: the slice of its queries, that of its keys, its Options."""
    slopes = options.get("alibi_slopes")
    spans = zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    for b, (queries, keys) in enumerate(spans):
        own = {"alibi_slopes": slopes[b]} if np.ndim(slopes) == 2 else {}
        yield slice(*queries), slice(*keys), Options(**options | own, sequence=b)


def _unpack(x):
    """(rows, heads, width) -> (1, heads, rows, width)"""
    return x.swapaxes(0, 1)[None]


def _pack(x):
    return x[0].swapaxes(0, 1)


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """`attention` of each sequence b by itself, all packed without padding. Returns o, lse.

    q (TQ, NH, D)  k (TK, NK, D)  v (TK, NK, DV)  o (TQ, NH, DV)  lse (TQ, NH)
    Sequence b is the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1], keys alike; i, j count within.
    options: those of `attention` without mask, bias and lengths.
    """
    o = np.zeros((*q.shape[:2], v.shape[2]), q.dtype)
    lse = np.full(q.shape[:2], -np.inf, q.dtype)
    for rows, keys, a in _sequences(cu_seqlens_q, cu_seqlens_k, options):
        o_b, lse_b, _ = _attention_fwd(_unpack(q[rows]), _unpack(k[keys]), _unpack(v[keys]), a)
        o[rows], lse[rows] = _pack(o_b), _pack(lse_b)
    return o, lse


def attention_varlen_vjp(q, k, v, cu_seqlens_q, cu_seqlens_k, *, do=None, dlse=None, **options):
    """Gradients of sum(do * o) + sum(dlse * lse) by q, k and v, packed as they are."""
    grads = {name: np.zeros(x.shape, q.dtype) for name, x in {"q": q, "k": k, "v": v}.items()}
    for rows, keys, a in _sequences(cu_seqlens_q, cu_seqlens_k, options):
        do_b = None if do is None else _unpack(do[rows])
        dlse_b = None if dlse is None else dlse[rows].T[None]
        of_b = _attention_bwd(_unpack(q[rows]), _unpack(k[keys]), _unpack(v[keys]), a, do_b, dlse_b)
        for name, span in {"q": rows, "k": keys, "v": keys}.items():
            grads[name][span] = _pack(of_b[name])
    return grads


@np.errstate(invalid="ignore")
def merge_attention(o1, lse1, o2, lse2):
    """Attention over two disjoint sets of keys from that over each. Returns o, lse.

    lse = log(exp(lse1) + exp(lse2))    o = exp(lse1 - lse) * o1 + exp(lse2 - lse) * o2
    o (..., DV)  lse (...), of any leading shape. A row without a key (lse -inf) adds nothing.
    """
    lse = np.logaddexp(lse1, lse2)
    o = np.zeros_like(o1)
    for o_part, lse_part in ((o1, lse1), (o2, lse2)):
        weight = np.exp(lse_part - lse)[..., None]
        o += np.where(lse_part[..., None] != -np.inf, weight * o_part, 0)
    return o, lse
