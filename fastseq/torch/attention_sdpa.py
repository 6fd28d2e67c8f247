"""torch.nn.functional.scaled_dot_product_attention on fastseq's kernels."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastseq.torch._tensors import FLOATS
from fastseq.torch.attention import attention

_OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: the same contract, fused in every case.

        o = dropout(softmax(scale * query key^T + attn_mask)) value

    Args:
        query: (..., NH, L, E) float32 or float64, on a GPU float32, bfloat16 or float16, any
            strides, at least (L, E).
        key: (..., NK, S, E), NK = NH or 1 without enable_gqa; leading axes broadcast.
        value: (..., NK, S, Ev).
        attn_mask: (..., NH, L, S) or what broadcasts to it. bool: True = attend. Of query's dtype
            or float32: added, with a gradient; -inf: do not attend.
        dropout_p: probability in 0..1 with which a weight is dropped, the others are scaled up; in
            evaluation too. torch's default generator is read once per call; as it draws a seed and
            not every weight, the numbers are not those of torch's own function.
        is_causal: j <= i, the diagonal from the top left also where L != S; not with attn_mask.
        scale: of the products; None: 1 / sqrt(E).
        enable_gqa: NH may be a multiple of NK; query head h reads head h // (NH // NK).

    Returns:
        (..., NH, L, Ev), axes in memory in query's order, also where torch returns a contiguous
        tensor: with dropout, a mask with gradient or of other than 2 or 4 axes, Ev != E. A row
        without a key is 0 and gives no gradient.

    Raises:
        RuntimeError: shapes, dtypes or options that torch refuses, a second derivative.
        IndexError: enable_gqa without an axis of heads.
        TypeError: an argument of another type; bfloat16 or float16 on the CPU, float64 on a GPU,
            which torch takes.

    Accuracy, Cost, Source: as `fastseq.torch.attention`.
    Equivalent to: torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask)
    """
    if (
        attn_mask is None
        and dropout_p == 0
        and _alike(query, key, value, enable_gqa)
        and isinstance(is_causal, bool)
    ):
        return attention(query, key, value, causal=is_causal, scale=scale)
    _check(query, key, value, attn_mask, dropout_p, is_causal)
    rank = max(query.dim(), key.dim(), value.dim())
    if enable_gqa:
        key, value = _grouped(query, key, value)
    q, k, v = (_with_axes(a, rank) for a in (query, key, value))
    q, k, v, lead, heads = _broadcast(q, k, v, enable_gqa)
    L, S, Ev = query.shape[-2], key.shape[-2], value.shape[-1]
    scores = (*lead, heads, L, S)[-rank:]
    mask, bias = (None, None) if attn_mask is None else _mask(attn_mask, scores, query.dtype)
    if query.shape[-1] == 0:  # scores are 0: one feature of zeros says the same
        q, k, scale = pad(q, (0, 1)), pad(k, (0, 1)), 1.0
    o = attention(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        causal=is_causal,
        scale=None if scale is None else float(scale),
        dropout_p=dropout_p,
    )
    return o if rank == 4 else o.view((*scores[:-1], Ev))


def _alike(query, key, value, grouped):
    """Whether nothing is to broadcast: (B, NH, L, E) and twice (B, NK, S, E), of one dtype."""
    if not (type(query) is type(key) is type(value) is Tensor and query.dim() == 4):
        return False
    q, k = query.shape, key.shape
    return (
        k == value.shape
        and len(k) == 4
        and q[0] == k[0]
        and (q[1] == k[1] or (grouped and k[1] > 0 and q[1] % k[1] == 0))
        and q[3] == k[3] != 0
        and query.dtype is key.dtype is value.dtype
        and 0 not in query.stride()  # the output follows its strides, but not to 0
        and _taken(query, key, value)
    )


def _taken(query, key, value):
    """Whether there are kernels for them, or an error of their own that names what they take."""
    if query.is_cpu:
        return key.is_cpu and value.is_cpu and query.dtype in FLOATS
    return query.is_cuda and query.device == key.device == value.device


def _check(query, key, value, attn_mask, dropout_p, is_causal):
    given = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    for name, a in given.items():
        if not (isinstance(a, Tensor) or (name == "attn_mask" and a is None)):
            raise TypeError(f"{_OP}: {name} must be a torch.Tensor, got {type(a).__name__}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"{_OP}: is_causal must be bool, got {type(is_causal).__name__}")
    tensors = (query, key, value)
    if min(a.dim() for a in tensors) < 2:
        got = ", ".join(f"{a.dim()}" for a in tensors)
        raise RuntimeError(f"{_OP}: query, key, value must have at least 2 axes, got {got}")
    for what in ("dtype", "device"):
        found = [getattr(a, what) for a in tensors]
        if not found[0] == found[1] == found[2]:
            got = ", ".join(map(str, found))
            raise RuntimeError(f"{_OP}: query, key, value must have one {what}, got {got}")
    if not query.is_floating_point():
        raise RuntimeError(f"{_OP}: query must be of a floating dtype, got {query.dtype}")
    E, S = query.shape[-1], key.shape[-2]
    if key.shape[-1] != E:
        raise RuntimeError(f"{_OP}: key must be (..., S, E), E = {E}, got {_s(key)}")
    if value.shape[-2] != S:
        raise RuntimeError(f"{_OP}: value must be (..., S, Ev), S = {S}, got {_s(value)}")
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"{_OP}: dropout_p must be in 0..1, got {dropout_p}")
    if is_causal and attn_mask is not None:
        raise RuntimeError(f"{_OP}: attn_mask must be None where is_causal=True")


def _s(tensor):
    return tuple(tensor.shape)


def _grouped(query, key, value):
    """key and value, repeated to query's heads only where their numbers of heads differ."""
    NH, NK, NV = (a.size(-3) for a in (query, key, value))
    if any(not n or NH % n for n in (NK, NV)):
        got = f"NH = {NH}, NK = {NK}, {NV}"
        raise RuntimeError(f"{_OP}: heads of key and value must divide those of query, got {got}")
    if NK == NV:
        return key, value
    return (a.repeat_interleave(NH // a.size(-3), dim=-3) for a in (key, value))


def _with_axes(a, rank):
    """With at least 4 axes, and `rank` if that is more."""
    return a if a.dim() >= max(rank, 4) else a.view((1,) * (max(rank, 4) - a.dim()) + a.shape)


def _broadcast(q, k, v, grouped):
    """q, k, v as (B, heads, rows, features), the leading axes that B stands for, and the heads."""
    lead = _common(*(a.shape[:-3] for a in (q, k, v)))
    if grouped or k.shape[-3] == v.shape[-3] == 1:
        heads, own = q.shape[-3], k.shape[-3]
    else:
        heads = own = _common(*(a.shape[-3:-2] for a in (q, k, v)))[0]
    q = _expanded(q, (*lead, heads, *q.shape[-2:]))
    if 0 in q.stride() and q.numel():  # the output follows its strides, but not to 0
        q = q.contiguous()
    k, v = (_expanded(a, (*lead, own, *a.shape[-2:])) for a in (k, v))
    return q, k, v, lead, heads


def _common(a, b, c):
    """The shape to which the three broadcast; torch's function takes 20 us to find them equal."""
    return a if a == b == c else torch.broadcast_shapes(a, b, c)


def _expanded(a, shape):
    a = a if a.shape == shape else a.expand(shape)
    return a if a.dim() == 4 else a.flatten(0, -4)


def _mask(attn_mask, scores, dtype):
    """attn_mask as mask or bias (B, NH, L, S), any of them 1."""
    fits = attn_mask.dim() <= len(scores) and all(
        m in (1, n) for m, n in zip(attn_mask.shape[::-1], scores[::-1], strict=False)
    )
    if not fits:
        expected = f"(..., NH, L, S) = {tuple(scores)}"
        raise RuntimeError(f"{_OP}: attn_mask must broadcast to {expected}, got {_s(attn_mask)}")
    if attn_mask.dtype not in (torch.bool, torch.float32, dtype):
        expected = f"bool, float32 or query's {dtype}"
        raise RuntimeError(f"{_OP}: attn_mask must be {expected}, got {attn_mask.dtype}")
    if len(scores) > 4:  # B stands for several axes
        attn_mask = _with_axes(attn_mask, len(scores))
        alike = all(n == 1 for n in attn_mask.shape[:-3])
        lead = attn_mask.shape[:-3] if alike else scores[:-3]
        attn_mask = _expanded(attn_mask, (*lead, *attn_mask.shape[-3:]))
    return (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask.to(dtype))
