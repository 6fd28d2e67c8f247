"""Rotary position embedding on the GPU: pairs of features turned by an angle.

    theta = (start_b + i) * frequency_t        y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

The angle is reduced to half a turn in float64, its sine and cosine are float32, and so is the rest.
x1, x2 are halves of the first DIM features, or the even and odd ones. A read and a write of x; the
angles of a block of rows serve several heads. Su et al., RoFormer, arXiv:2104.09864.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import cdiv, on, program

TURN = tl.constexpr(2 * math.pi)
ROWS = 16
HEADS = 4  # of a program


@triton.jit(do_not_specialize=["NH", "L", "first", "blocks", "groups"])
def rotary_fwd(
    x, y, starts, turns, NH, L, first, blocks, groups,
    D: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A block of rows of HEADS heads; x, y: (pointer, strides of b, h, row).

    turns (DIM / 2,) float64: frequencies in turns a position. Programs: blocks * groups * B.
    """
    t = program(0)
    block, group, b = t % blocks, t // blocks % groups, t // blocks // groups
    i = block * BLOCK_L + tl.arange(0, BLOCK_L)
    start = first + b * 0
    if starts is not None:
        start += tl.load(starts + b).to(tl.int64)
    pair = tl.arange(0, BLOCK_T)
    here = pair < DIM // 2
    turned = (start + i).to(tl.float64)[:, None] * tl.load(turns + pair, mask=here, other=0.0)
    theta = ((turned - tl.floor(turned + 0.5)) * TURN).to(tl.float32)
    cos, sin = tl.cos(theta), tl.sin(theta)
    if INVERSE:
        sin = -sin
    rows = (i < L)[:, None]
    for h in range(group * HEADS, tl.minimum((group + 1) * HEADS, NH)):
        x_at = x[0] + b * x[1] + h * x[2] + (i * x[3])[:, None]
        y_at = y[0] + b * y[1] + h * y[2] + (i * y[3])[:, None]
        if INTERLEAVED:
            columns = tl.arange(0, 2 * BLOCK_T)[None, :]
            inside = rows & (columns < DIM)
            both = tl.load(x_at + columns, mask=inside, other=0.0).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(both, [BLOCK_L, BLOCK_T, 2]))
            both = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
            both = tl.reshape(both, [BLOCK_L, 2 * BLOCK_T])
            tl.store(y_at + columns, both.to(y[0].dtype.element_ty), mask=inside)
        else:
            inside, columns = rows & here[None, :], pair[None, :]
            x1 = tl.load(x_at + columns, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(x_at + columns + DIM // 2, mask=inside, other=0.0).to(tl.float32)
            y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            tl.store(y_at + columns, y1.to(y[0].dtype.element_ty), mask=inside)
            tl.store(y_at + columns + DIM // 2, y2.to(y[0].dtype.element_ty), mask=inside)
        if DIM < D:
            columns = DIM + tl.arange(0, BLOCK_REST)[None, :]
            inside = rows & (columns < D)
            tl.store(y_at + columns, tl.load(x_at + columns, mask=inside), mask=inside)


@lru_cache(maxsize=16)
def _turns(dim: int, base: float, device: torch.device) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1)
    return (base**-exponents / (2 * math.pi)).to(device)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def rotate(
    x: torch.Tensor,
    y: torch.Tensor,
    dim: int,
    base: float,
    starts: torch.Tensor | None,
    first: int,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Write y, both (B, NH, L, D) with consecutive features; starts (B,) integers or None."""
    B, NH, L, D = x.shape
    if not x.numel():
        return
    blocks, groups = cdiv(L, ROWS), cdiv(NH, HEADS)
    with on(x):
        rotary_fwd[(blocks * groups * B,)](
            (x, *x.stride()[:3]), (y, *y.stride()[:3]), starts, _turns(dim, base, x.device),
            NH, L, first, blocks, groups,
            D=D, DIM=dim, INTERLEAVED=interleaved, INVERSE=inverse,
            BLOCK_L=ROWS, BLOCK_T=_power(dim // 2), BLOCK_REST=_power(D - dim), HEADS=HEADS,
        )  # fmt: skip
