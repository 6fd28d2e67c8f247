"""Softmax attention over torch tensors, with gradients.

Same names, arguments and results as the NumPy functions of `fastseq`, and torch's own signature
in `fastseq.torch.attention_sdpa`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastseq import score_mods
from fastseq.score_mods import ScoreMod
from fastseq.torch._tensors import FLOATS
from fastseq.torch.attention_ops import TENSORS, infer, run

_HALVES = (torch.bfloat16, torch.float16)
_CAUSAL = {False: None, True: "top_left", "top_left": "top_left", "bottom_right": "bottom_right"}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
):
    """Softmax attention; the scores never exist as a whole.

        s_ij = scale * q_i . k_j        then softcap * tanh(s_ij / softcap) if there is one
        s_ij = score_mod(s_ij, b, h, i, j) if there is one
        s_ij = s_ij - slope_h * |i + offset - j| + bias_ij
        lse_i = log sum_j exp(s_ij)      o_i = sum_j exp(s_ij - lse_i) v_j      over the allowed j

    offset = kv_lengths[b] - q_lengths[b] for causal="bottom_right", else 0.

    Args:
        q: (B, NH, L, D) float32 or float64, on a GPU float32, bfloat16 or float16, any strides.
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
        alibi_slopes: (NH,) or (B, NH), see `alibi_slopes`, or None; they have no gradient.
        dropout_p: probability in 0..1 with which a weight is dropped, the others are scaled up.
        seed: integer, or an int64 tensor of one; a weight's fate follows from it, b, h, i, j.
            None: drawn from torch's default generator, once per call, if dropout_p > 0.
        return_lse: also return lse.

    Returns:
        o (B, NH, L, DV), axes in memory in q's order; with return_lse o and lse (B, NH, L), the
        natural logarithm. A row without a key has o 0 and lse -inf. Gradients flow to q, k, v and
        bias, from lse too.

    Raises:
        TypeError: an argument is no tensor, q not of these dtypes, a dtype not q's.
        ValueError: a shape, length or option out of range; the message states both sides. On a GPU
            the values of lengths are not checked but clamped.
        RuntimeError: a second derivative is asked for, or a gradient of alibi_slopes.

    Accuracy: float32 error within 2x of torch's own (3x for gradients), float64 1e-12 relative.
    Cost: 2 L S (D + DV) FLOP a head, less all tiles without an allowed pair, 2.5 times that again
        with gradients; o and lse are kept for backward.
    Equivalent to: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    Source: Vaswani et al., arXiv:1706.03762; Dao, arXiv:2307.08691; Press et al., arXiv:2108.12409.
    """
    op = "attention"
    alone = bias is mask is q_lengths is alibi_slopes is score_mod is None
    if alone and dropout_p == 0 and not return_lse:
        o = infer(q, k, v, kv_lengths, causal, window, scale, softcap)
        if o is not None:
            return o
    drawn = _seed(op, dropout_p, seed)
    tensors = (bias, mask, q_lengths, kv_lengths, alibi_slopes, drawn)  # as TENSORS[op]
    _require_tensors(op, q, k, v, tensors)
    numbers = _numbers(op, causal, window, scale, softcap, dropout_p, score_mod)
    o, lse = run(op, q, k, v, tensors, numbers)
    return (o, lse) if return_lse else o


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
):
    """`attention` of each of B sequences by itself, their rows packed without padding.

        o[a:e] = attention(q[a:e], k[c:f], v[c:f])   a, e = cu_seqlens_q[b : b + 2], c, f of k's

    Args:
        q: (TQ, NH, D) of the dtypes of `attention`, the rows of all sequences, any strides.
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
        TypeError, RuntimeError: as `attention`.
        ValueError: a shape or option out of range, offsets that descend or miss an end (on a GPU
            not checked: rows of no sequence have o 0).

    Accuracy: the bits of `attention` of each sequence.
    Cost: as `attention`, the sum over the sequences.
    Equivalent to: torch.nn.attention.varlen.varlen_attn, which needs a GPU
    Source: as `attention`.
    """
    op = "attention_varlen"
    drawn = _seed(op, dropout_p, seed)
    tensors = (cu_seqlens_q, cu_seqlens_k, alibi_slopes, drawn)  # as TENSORS[op]
    _require_tensors(op, q, k, v, tensors)
    numbers = _numbers(op, causal, window, scale, softcap, dropout_p, score_mod)
    o, lse = run(op, q, k, v, tensors, numbers)
    return (o, lse) if return_lse else o


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the results over each.

        lse = log(exp(lse1) + exp(lse2))        o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2

    Args:
        o1: (..., DV) float32 or float64, on a GPU bfloat16 or float16 too; of any leading shape.
        lse1: (...), natural logarithm, float32 for the last two; -inf: no key, o1 is not read.
        o2: (..., DV).
        lse2: (...).

    Returns:
        o (..., DV) and lse (...). Gradients, of any order, flow to all four.

    Raises:
        TypeError: an argument is no tensor, a dtype that is not o1's, or not float32 or float64.
        ValueError: shapes that do not fit.

    Accuracy: float32 error within 2x of torch's own (3x for gradients), float64 1e-12 relative.
    Cost: about 8 reads and writes of o, in torch's operators.
    Equivalent to: o1 * (lse1 - lse).exp()[..., None] + ..., lse = torch.logaddexp(lse1, lse2)
    Source: Milakov & Gimelshein, arXiv:1805.02867.
    """
    op = "merge_attention"
    for name, a in {"o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}.items():
        _require_tensor(op, name, a)
    if o1.dtype not in FLOATS and not (o1.is_cuda and o1.dtype in _HALVES):
        raise TypeError(f"{op}: o1 must be float32 or float64, got {_named(o1.dtype)}")
    rows = o1.shape[:-1]
    for name, a, shape in (("lse1", lse1, rows), ("o2", o2, o1.shape), ("lse2", lse2, rows)):
        dtype = torch.float32 if o1.dtype in _HALVES and name != "o2" else o1.dtype
        if a.dtype != dtype:
            expected = f"{_named(dtype)} {'as o1 is' if dtype == o1.dtype else 'with such an o1'}"
            raise TypeError(f"{op}: {name} must be {expected}, got {_named(a.dtype)}")
        if a.shape != shape:
            letters = "(...)" if name != "o2" else "(..., DV)"
            raise ValueError(f"{op}: {name} must be {letters} = {tuple(shape)}, got {(*a.shape,)}")
    # a row without any key would take inf - inf: it runs with logarithms of 0 and is emptied after
    empty = (lse1 == -torch.inf) & (lse2 == -torch.inf)
    lse1, lse2 = (a.masked_fill(empty, 0) for a in (lse1, lse2))
    ahead = lse1 - lse2  # exp(lse1 - lse) = sigmoid(ahead)
    lse = torch.where(ahead > 0, lse1 - logsigmoid(ahead), lse2 - logsigmoid(-ahead))
    parts = ((o1, ahead, lse1), (o2, -ahead, lse2))
    first, second = (
        (d.sigmoid().unsqueeze(-1) * o).masked_fill((a == -torch.inf).unsqueeze(-1), 0)
        for o, d, a in parts
    )
    o = (first + second).masked_fill(empty.unsqueeze(-1), 0)
    return o.to(o1.dtype), lse.masked_fill(empty, -torch.inf)


def _named(dtype):
    return str(dtype).removeprefix("torch.")


def _require_tensor(op, name, a):
    if not isinstance(a, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(a).__name__}")


def _require_tensors(op, q, k, v, tensors):
    """q, k, v are tensors, the others too where the operator's schema does not allow None."""
    if type(q) is type(k) is type(v) is Tensor and all(a is None for a in tensors):
        return
    for name, a in {"q": q, "k": k, "v": v}.items():
        _require_tensor(op, name, a)
    for (name, kind), a in zip(TENSORS[op].items(), tensors, strict=True):
        if a is not None or kind == "Tensor":
            _require_tensor(op, name, a)


def _numbers(op, causal, window, scale, softcap, dropout_p, score_mod):
    """The operators' numbers, in the order of attention_ops.NUMBERS."""
    if causal not in _CAUSAL:
        expected = "a bool, 'top_left' or 'bottom_right'"
        raise ValueError(f"{op}: causal must be {expected}, got {causal!r}")
    if window is not None and (not isinstance(window, (tuple, list)) or len(window) != 2):
        expected = "(left, right) of integers or None"
        raise ValueError(f"{op}: window must be {expected}, got {window!r}")
    left, right = window or (None, None)
    mod = score_mods.found(op, score_mod)
    key = None if mod is None else mod.key
    return _CAUSAL[causal], left, right, scale, softcap, dropout_p, key


def _seed(op, dropout_p, seed):
    """The seed as a tensor, so that a compiled graph can draw it; None without dropout."""
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), device="cpu")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            got = f"{_named(seed.dtype)} {tuple(seed.shape)}"
            raise ValueError(f"{op}: seed must be an integer or an int64 tensor of one, got {got}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"{op}: dropout needs an integer seed, got {seed!r}")
    seed %= 2**64
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device="cpu")
