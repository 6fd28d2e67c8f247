"""Positional encodings over NumPy arrays: sinusoidal, rotary, and the slopes of ALiBi."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fastseq import _check, _dispatch
from fastseq._arrays import rows
from fastseq._attend import Array, like


def sinusoidal_positions(L: int, D: int, base: float = 10000.0, dtype=np.float32) -> Array:
    """The sinusoidal encodings of positions 0 to L - 1.

        PE[p, 2i] = sin(p / base^(2i / D))        PE[p, 2i + 1] = cos(p / base^(2i / D))

    Args:
        L: positions.
        D: features; an odd D ends with a sine.
        base: of the wave lengths.
        dtype: of the result.

    Returns:
        (L, D).

    Raises:
        ValueError: a negative size.

    Accuracy: computed in float64, rounded once.
    Cost: L D sines and cosines.
    Equivalent to: its equation; torch has no such function.
    Source: Vaswani et al., arXiv:1706.03762, section 3.5.
    """
    if L < 0 or D < 0:
        raise ValueError(f"sinusoidal_positions: L and D must be >= 0, got L = {L}, D = {D}")
    angle = np.arange(L)[:, None] / base ** (np.arange(0, D, 2) / max(D, 1))
    encoding = np.empty((L, D), dtype)
    encoding[:, 0::2] = np.sin(angle)
    encoding[:, 1::2] = np.cos(angle[:, : D // 2])
    return encoding


@lru_cache(maxsize=16)
def _turns(positions: int, dim: int, base: float, dtype: np.dtype) -> tuple[Array, Array]:
    """cos and sin (positions, dim / 2) of the angles, computed in float64."""
    theta = np.arange(positions)[:, None] / base ** (np.arange(0, dim, 2) / dim)
    return np.cos(theta).astype(dtype), np.sin(theta).astype(dtype)


def rotary(
    x: Array,
    *,
    dim: int | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
    offsets: int | Array = 0,
    inverse: bool = False,
) -> Array:
    """Rotary position embedding: pairs of features turned by an angle that grows with position.

        theta = (offset + i) / base^(2t / dim) for pair t of row i
        y1 = x1 cos(theta) - x2 sin(theta)        y2 = x2 cos(theta) + x1 sin(theta)

    Args:
        x: (B, NH, L, D), (NH, L, D) or (L, D) float32 or float64, any strides.
        dim: how many features turn, the first ones; even; None: D.
        base: of the angles.
        interleaved: x1, x2 are the even and odd features; False: the two halves.
        offsets: the position of row 0, >= 0: one integer, or (B,) with x (B, NH, L, D).
        inverse: turn by -theta, which is also the gradient.

    Returns:
        y of x's shape, axes in memory in x's order.

    Raises:
        TypeError: x is not float32 or float64, offsets are no integers.
        ValueError: a shape, dim or offset out of range.

    Accuracy: angles in float64; float32 within twice torch's own error against float64 (tests).
    Cost: a read and a write of x; the cosines of all positions are kept from call to call.
    Equivalent to: x * cos + torch.cat((-x2, x1), -1) * sin
    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    op = "rotary"
    _check.floats(op, "x", _check.signature(x))
    if not 2 <= x.ndim <= 4:
        raise ValueError(f"{op}: x must be (B, NH, L, D), (NH, L, D) or (L, D), got {x.shape}")
    D = x.shape[-1]
    dim = D if dim is None else dim
    if dim % 2 or not 0 <= dim <= D:
        raise ValueError(f"{op}: dim must be even and in 0..D = 0..{D}, got {dim}")
    whole = rows(x[(None,) * (4 - x.ndim)])
    first = _first_positions(op, offsets, whole.shape[0])
    end = int(first.max(initial=0)) + whole.shape[2]
    length = 1 << max(end - 1, 0).bit_length()  # a decoding step finds the last step's angles
    cos, sin = _turns(length, dim, float(base), x.dtype)
    y = like(whole, D)
    threads = _dispatch.get_num_threads()
    kernels = _dispatch.kernels("attention", x.dtype)
    kernels.rotate(whole, y, dim, cos, sin, first, bool(interleaved), bool(inverse), threads)
    return y[(0,) * (4 - x.ndim)]


def _first_positions(op: str, offsets, B: int) -> Array:
    given = np.asarray(offsets)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{op}: offsets must be integers, got {given.dtype!s}")
    if given.ndim:
        _check.shape(op, "offsets", given.shape, "B,", (B,))
    if given.size and given.min() < 0:
        raise ValueError(f"{op}: offsets must be >= 0, got {given.min()}")
    return np.ascontiguousarray(np.broadcast_to(given, (B,)), np.int64)


def alibi_slopes(NH: int, dtype=np.float32) -> Array:
    """The slopes of attention with linear biases, one a head, for any number of heads.

        n = 2^floor(log2 NH)
        slope_h = 2^(-8 (h + 1) / n) for h < n, and 2^(-4 (2 (h - n) + 1) / n) for the others

    Args:
        NH: heads.
        dtype: of the result; attention takes that of q.

    Returns:
        (NH,).

    Raises:
        ValueError: NH < 1.

    Accuracy: computed in float64, rounded once.
    Cost: NH powers.
    Equivalent to: its equation; torch has no such function.
    Source: Press, Smith & Lewis, arXiv:2108.12409.
    """
    if NH < 1:
        raise ValueError(f"alibi_slopes: NH must be >= 1, got {NH}")
    n = 1 << (NH.bit_length() - 1)
    h = np.arange(NH)
    slopes = np.where(h < n, 2.0 ** (-8 * (h + 1) / n), 2.0 ** (-4 * (2 * (h - n) + 1) / n))
    return slopes.astype(dtype)
