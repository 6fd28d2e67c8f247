"""Softmax attention over NumPy arrays: padded and packed rows, joined results, a cache of keys."""

from __future__ import annotations

import numpy as np

from fastseq import _attend, _check, _dispatch
from fastseq._arrays import contiguous
from fastseq._attend import Array, Options
from fastseq.score_mods import ScoreMod


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    q_lengths: Array | None = None,
    kv_lengths: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    alibi_slopes: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
):
    """Softmax attention; the scores never exist as a whole.

        s_ij = scale * q_i . k_j        then softcap * tanh(s_ij / softcap) if there is one
        s_ij = score_mod(s_ij, b, h, i, j) if there is one
        s_ij = s_ij - slope_h * |i + offset - j| + bias_ij
        lse_i = log sum_j exp(s_ij)      o_i = sum_j exp(s_ij - lse_i) v_j      over the allowed j

    offset = kv_lengths[b] - q_lengths[b] for causal="bottom_right", else 0.

    Args:
        q: (B, NH, L, D) float32 or float64, any strides.
        k: (B, NK, S, D); query head h reads head h // (NH // NK).
        v: (B, NK, S, DV).
        mask: (B, NH, L, S) bool or what broadcasts to it: True = attend.
        bias: (B, NH, L, S) or what broadcasts to it, added to the scores; -inf: do not attend.
        causal: "top_left" (True): j <= i. "bottom_right": j <= i + offset. False: all.
        window: (left, right) keys on each side of the diagonal, inclusive; None: no limit.
        q_lengths: (B,) integers in 0..L, or None: all L. Rows past it: o 0, lse -inf.
        kv_lengths: (B,) integers in 0..S, or None: all S. Keys past it are not read.
        scale: of the products; None: 1 / sqrt(D).
        softcap: a bound on the scores, or None.
        score_mod: a function of the scores made by `fastseq.score_mod`, or None.
        alibi_slopes: (NH,) or (B, NH), see `alibi_slopes`, or None.
        dropout_p: probability in 0..1 with which a weight is dropped, the others are scaled up.
        seed: integer, required if dropout_p > 0; a weight's fate follows from it, b, h, i, j.
        return_lse: also return lse.

    Returns:
        o (B, NH, L, DV), axes in memory in q's order; with return_lse o and lse (B, NH, L), the
        natural logarithm. A row without a key has o 0 and lse -inf.

    Raises:
        TypeError: a dtype that is not q's, or not float32 or float64.
        ValueError: a shape, length or option out of range; the message states both sides.

    Accuracy: float32 within twice torch's own error against float64 (tests). The bits do not
        depend on the thread count or on the other rows of the batch. NaN and infinity in pairs
        that are not allowed reach nothing, nor does a value whose weight is exactly 0.
    Cost: 2 L S (D + DV) FLOP a head, less all tiles without an allowed pair; for backward o and
        lse are kept; memory beside inputs and outputs linear in L and S.
    Equivalent to: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    Source: Vaswani et al., arXiv:1706.03762; Dao, arXiv:2307.08691; Press et al., arXiv:2108.12409.
    """
    given = Options(
        mask, bias, causal, window, q_lengths, kv_lengths,
        scale, softcap, alibi_slopes, dropout_p, seed, score_mod,
    )  # fmt: skip
    o, lse = _attend.forward("attention", q, k, v, given)
    return (o, lse) if return_lse else o


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    alibi_slopes: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
):
    """`attention` of each of B sequences by itself, their rows packed without padding.

        o[a:e] = attention(q[a:e], k[c:f], v[c:f])   a, e = cu_seqlens_q[b : b + 2], c, f of k's

    Args:
        q: (TQ, NH, D) float32 or float64, the rows of all sequences, any strides.
        k: (TK, NK, D).
        v: (TK, NK, DV).
        cu_seqlens_q: (B + 1,) integers from 0 to TQ that do not descend.
        cu_seqlens_k: (B + 1,) integers from 0 to TK that do not descend.
        causal: as `attention`, within each sequence.
        window: as `attention`.
        scale: as `attention`.
        softcap: as `attention`.
        score_mod: as `attention`.
        alibi_slopes: (NH,) or (B, NH), or None.
        dropout_p: as `attention`; the same weights are dropped as in the padded form.
        seed: as `attention`.
        return_lse: also return lse.

    Returns:
        o (TQ, NH, DV), and with return_lse lse (TQ, NH).

    Raises:
        TypeError: a dtype that is not q's, or not float32 or float64.
        ValueError: a shape or option out of range, offsets that descend or miss an end.

    Accuracy: the bits of `attention` of each sequence.
    Cost: as `attention`, the sum over the sequences.
    Equivalent to: torch.nn.attention.varlen.varlen_attn, which needs a GPU
    Source: as `attention`.
    """
    given = Options(
        causal=causal, window=window, scale=scale, softcap=softcap, score_mod=score_mod,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, seed=seed,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    o, lse = _attend.forward("attention_varlen", q, k, v, given)
    return (o, lse) if return_lse else o


def merge_attention(o1: Array, lse1: Array, o2: Array, lse2: Array) -> tuple[Array, Array]:
    """Attention over two disjoint sets of keys, from the results over each.

        lse = log(exp(lse1) + exp(lse2))        o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2

    Args:
        o1: (..., DV) float32 or float64, of any leading shape.
        lse1: (...), natural logarithm; -inf: no key, o1 is not read.
        o2: (..., DV).
        lse2: (...).

    Returns:
        o (..., DV) and lse (...).

    Raises:
        TypeError: a dtype that is not o1's, or not float32 or float64.
        ValueError: shapes that do not fit.

    Accuracy: float32 within twice torch's own error against float64 (tests).
    Cost: 3 reads and writes of o.
    Equivalent to: o1 * (lse1 - lse).exp()[..., None] + ..., lse = torch.logaddexp(lse1, lse2)
    Source: Milakov & Gimelshein, arXiv:1805.02867.
    """
    op = "merge_attention"
    _check.floats(op, "o1", _check.signature(o1))
    if o1.ndim < 1:
        raise ValueError(f"{op}: o1 must be (..., DV), got shape ()")
    rows = o1.shape[:-1]
    for name, value, letters, shape in (
        ("lse1", lse1, "...", rows),
        ("o2", o2, "..., DV", o1.shape),
        ("lse2", lse2, "...", rows),
    ):
        _check.floats(op, name, _check.signature(value), o1.dtype, like="o1")
        _check.shape(op, name, value.shape, letters, shape)
    o, lse = np.empty(o1.shape, o1.dtype), np.empty(rows, o1.dtype)
    flat = [contiguous(a).reshape(-1, o1.shape[-1]) for a in (o1, o2, o)]
    line = [contiguous(a).reshape(-1) for a in (lse1, lse2, lse)]
    kernels, threads = _dispatch.kernels("attention", o1.dtype), _dispatch.get_num_threads()
    kernels.merge(flat[0], line[0], flat[1], line[1], flat[2], line[2], threads)
    return o, lse


class KVCache:
    """Keys and values of decoding, in memory allocated once; every batch row has its own length.

        attention(q, cache.k, cache.v, kv_lengths=cache.lengths, causal="bottom_right")

    Args:
        B: batch rows.
        NK: key/value heads.
        capacity: the most keys of a row.
        D: head dim of keys.
        DV: head dim of values; None: D.
        dtype: float32 or float64.

    Attributes:
        k (B, NK, capacity, D), v (B, NK, capacity, DV).
        lengths (B,) int64: what each row holds.
    """

    def __init__(
        self, B: int, NK: int, capacity: int, D: int, DV: int | None = None, dtype=np.float32
    ):
        if np.dtype(dtype) not in _check.FLOATS:
            raise TypeError(f"KVCache: dtype must be float32 or float64, got {np.dtype(dtype)!s}")
        self.k = np.zeros((B, NK, capacity, D), dtype)
        self.v = np.zeros((B, NK, capacity, D if DV is None else DV), dtype)
        self.lengths = np.zeros(B, np.int64)

    def append(self, k: Array, v: Array, counts: Array | None = None) -> None:
        """Write k (B, NK, n, D) and v (B, NK, n, DV) behind what each batch row holds.

        counts (B,): how many of the n each row takes, None for all. Writes nothing and raises
        TypeError for another dtype than the cache's, ValueError if a shape does not fit or a row
        would exceed the capacity.
        """
        B, NK, capacity, D = self.k.shape
        for name, value in (("k", k), ("v", v)):
            sign = _check.signature(value) or _check.NOTHING
            _check.floats("KVCache.append", name, sign, self.k.dtype, like="the cache")
        n = k.shape[2] if k.ndim == 4 else 0
        _check.shape("KVCache.append", "k", k.shape, "B, NK, n, D", (B, NK, n, D))
        _check.shape("KVCache.append", "v", v.shape, "B, NK, n, DV", (B, NK, n, self.v.shape[3]))
        taken = _check.counts("KVCache.append", "counts", counts, ("B", B), ("n", n))
        taken = np.full(B, n) if taken is None else taken
        after = self.lengths + taken
        if np.any(after > capacity):
            b = int(np.argmax(after > capacity))
            raise ValueError(
                f"KVCache.append: capacity = {capacity}, row {b} holds {self.lengths[b]} "
                f"and was given {taken[b]}"
            )
        for b in range(B):
            held = slice(self.lengths[b], after[b])
            self.k[b, :, held], self.v[b, :, held] = k[b, :, : taken[b]], v[b, :, : taken[b]]
        self.lengths = after

    def truncate(self, lengths: Array) -> None:
        """Forget what lies past lengths (B,), of which none exceeds what the row holds."""
        most = int(self.lengths.max(initial=0))
        kept = _check.counts(
            "KVCache.truncate", "lengths", lengths, ("B", len(self.lengths)), ("held", most)
        )
        if kept is None or np.any(kept > self.lengths):
            raise ValueError(
                f"KVCache.truncate: lengths must not exceed {self.lengths.tolist()}, got {lengths}"
            )
        self.lengths = kept
