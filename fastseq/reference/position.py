"""Positional encodings: sinusoidal, rotary, and the slopes of attention with linear biases.

    sinusoidal   PE[p, 2i] = sin(p / base^(2i / D))    PE[p, 2i + 1] = cos(p / base^(2i / D))
    rotary       pair t of row i turns by theta = (offset + i) / base^(2t / dim):
                 y1 = x1 * cos(theta) - x2 * sin(theta)    y2 = x2 * cos(theta) + x1 * sin(theta)
    ALiBi        with n = 2^floor(log2 NH), slope_h = 2^(-8 (h + 1) / n) for h < n,
                 and 2^(-4 (2 (h - n) + 1) / n) for the others

Letters: B batch, NH query heads, L length, D head size, dim <= D the part of it that turns.
"""

import numpy as np


def sinusoidal_positions(L, D, base=10000.0):
    """The encodings of the positions 0 to L - 1: (L, D), float64; an odd D ends with a sine."""
    angle = np.arange(L)[:, None] / base ** (np.arange(0, D, 2) / D)
    encoding = np.empty((L, D))
    encoding[:, 0::2] = np.sin(angle)
    encoding[:, 1::2] = np.cos(angle[:, : D // 2])
    return encoding


def rotary(x, *, dim=None, base=10000.0, interleaved=False, offsets=0, inverse=False):
    """x (..., L, D) with its first dim (even, D unless given) features turned by their position.

    x1, x2 are the two halves of those features, or interleaved: the even and the odd ones.
    offsets: an integer, or (B,) with x (B, NH, L, D). inverse: turned by -theta.
    The angles are computed in float64 at least, all else in the dtype of x.
    """
    dim = x.shape[-1] if dim is None else dim
    if interleaved:
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    else:
        first, second = slice(0, dim // 2), slice(dim // 2, dim)
    wide = np.result_type(x.dtype, np.float64)
    start = np.reshape(offsets, (-1, 1, 1, 1)) if np.ndim(offsets) else offsets
    positions = start + np.arange(x.shape[-2])[:, None]
    theta = positions / wide.type(base) ** (np.arange(0, dim, 2).astype(wide) / dim)
    cos, sin = np.cos(theta).astype(x.dtype), np.sin(theta).astype(x.dtype)
    if inverse:
        sin = -sin
    x1, x2 = x[..., first], x[..., second]
    y = x.copy()
    y[..., first] = x1 * cos - x2 * sin
    y[..., second] = x2 * cos + x1 * sin
    return y


def rotary_vjp(x, *, dy, inverse=False, **rotation):
    """The gradient of sum(dy * y) by x, a rotation back: {"x": dx}."""
    return {"x": rotary(np.asarray(dy, x.dtype), inverse=not inverse, **rotation)}


def alibi_slopes(NH):
    """One slope a head: (NH,), float64, for any number of heads."""
    n = 2 ** (NH.bit_length() - 1)
    h = np.arange(NH)
    return np.where(h < n, 2.0 ** (-8 * (h + 1) / n), 2.0 ** (-4 * (2 * (h - n) + 1) / n))
