"""Tiles of attention's arrays: where rows are, reading and writing them, products.

An array comes as (pointer, strides of b, h, row), consecutive elements last. Offsets of whole rows
are 64-bit, those within a block 32-bit. Rows wider than a block are taken in chunks of columns.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import wide

MAX_INT32 = tl.constexpr(2**31 - 1)


class Head(NamedTuple):
    """The rows of one head, from one row on."""

    base: Any  # pointer
    step: Any  # from row to row


class Rows(NamedTuple):
    """The rows of a tile: at base + at; of those that are not valid (None: all are) 0 is read."""

    base: Any
    at: Any
    valid: Any


@triton.jit
def head_of(t, b, h, first):
    """Batch row b, head h of an array, from row `first` on."""
    return Head(t[0] + b * t[1] + h * t[2] + first * t[3], t[3])


@triton.jit
def rows_of(head, first, local, valid):
    """The rows first + local."""
    return Rows(head.base + wide(first) * head.step, local * head.step, valid)


@triton.jit
def find_sequence(cu_seqlens, t, B, BLOCK: tl.constexpr):
    """The sequence that has block t of packed rows, and which of its blocks t is.

    Sequence b has the blocks from cu_seqlens[b] // BLOCK + b on: enough for its rows, and every
    block is of one sequence.
    """
    low, high = t * 0, t * 0 + B
    while high - low > 1:
        middle = (low + high) // 2
        after = wide(tl.load(cu_seqlens + middle)) // BLOCK + middle > t
        low = tl.where(after, low, middle)
        high = tl.where(after, middle, high)
    return low, t - (wide(tl.load(cu_seqlens + low)) // BLOCK + low)


@triton.jit
def locate(t, blocks, heads, cu_seqlens, B, BLOCK: tl.constexpr):
    """b, head and block of program t; the blocks of a head stand together."""
    block = t % blocks
    head = (t // blocks) % heads
    b = t // blocks // heads
    if cu_seqlens is not None:
        b, block = find_sequence(cu_seqlens, block, B, BLOCK)
    return b, head, block


@triton.jit
def tile(rows, c, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns c * BLOCK .. (c + 1) * BLOCK - 1 of the rows; 0 from column WIDTH on."""
    columns = c * BLOCK + tl.arange(0, BLOCK)
    at = rows.base + rows.at[:, None] + columns[None, :]
    if rows.valid is None:
        if WIDTH == BLOCK:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK:
        x = tl.load(at, mask=rows.valid[:, None], other=0.0)
    else:
        x = tl.load(at, mask=rows.valid[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
def tile_or_none(rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows whole, or None where a block is narrower."""
    if WIDTH <= BLOCK:
        return tile(rows, 0, WIDTH, BLOCK)
    else:
        return None


@triton.jit
def chunk(x, rows, c, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Chunk c of the rows, which is x if that is not None."""
    if x is not None:
        return x
    else:
        return tile(rows, c, WIDTH, BLOCK)


@triton.jit
def put(rows, c, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the chunk of columns to the valid rows, rounded to the array's dtype."""
    columns = c * BLOCK + tl.arange(0, BLOCK)
    mask = rows.valid[:, None] & (columns < WIDTH)[None, :]
    at = rows.base + rows.at[:, None] + columns[None, :]
    tl.store(at, value.to(rows.base.dtype.element_ty), mask=mask)


@triton.jit
def contract(
    x, x_rows, y, y_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """x y^T of two tiles, summed over chunks where x and y are None."""
    if WIDTH <= BLOCK:
        total = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        total = tl.zeros([x_rows.at.shape[0], y_rows.at.shape[0]], tl.float32)
        for c in range(tl.cdiv(WIDTH, BLOCK)):
            x_c, y_c = tile(x_rows, c, WIDTH, BLOCK), tile(y_rows, c, WIDTH, BLOCK)
            total = tl.dot(x_c, tl.trans(y_c), total, input_precision=PRECISION)
    return total


@triton.jit
def add_product(
    total, w, allowed, x, x_rows, c,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + w x, of pairs that are not allowed not even 0 * NaN; w is 0 there.

    x: chunk c of x_rows, which is read again row by row if it holds NaN or infinity.
    """
    if allowed is None:
        total = tl.dot(w.to(x.dtype), x, total, input_precision=PRECISION)
    else:
        finite = tl.abs(x) < float("inf")
        if tl.min(tl.min(finite.to(tl.int32), axis=1), axis=0) == 1:
            total = tl.dot(w.to(x.dtype), x, total, input_precision=PRECISION)
        else:
            total = _add_row_by_row(total, w, allowed, x_rows, c, WIDTH, BLOCK)
    return total


@triton.jit
def _add_row_by_row(total, w, allowed, x_rows, c, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    N: tl.constexpr = x_rows.at.shape[0]
    n_all = tl.arange(0, N)
    columns = c * BLOCK + tl.arange(0, BLOCK)
    for n in range(N):
        here = n_all == n
        w_n = tl.sum(tl.where(here[None, :], w, 0.0), axis=1)
        pair = tl.max((here[None, :] & allowed).to(tl.int32), axis=1) == 1
        at = tl.sum(tl.where(here, x_rows.at, 0), axis=0)
        valid = tl.max((here & x_rows.valid).to(tl.int32), axis=0) == 1
        x_n = tl.load(x_rows.base + at + columns, mask=valid & (columns < WIDTH), other=0.0)
        total += tl.where(pair[:, None], w_n[:, None] * x_n.to(tl.float32)[None, :], 0.0)
    return total
