"""Positional encodings over torch tensors, and the operator torch.ops.fastseq.rotary.

Same names, arguments and results as the NumPy functions of `fastseq`.
"""

import torch
from torch import _C, Tensor
from torch.autograd import Function

import fastseq
from fastseq.torch import position_cuda
from fastseq.torch._tensors import (
    FLOATS,
    array,
    differentiated,
    heard,
    like,
    on_gpu,
    recorded,
    register,
    tensor_of,
    unsupported,
)


def sinusoidal_positions(
    L: int, D: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The sinusoidal encodings of positions 0 to L - 1.

        PE[p, 2i] = sin(p / base^(2i / D))        PE[p, 2i + 1] = cos(p / base^(2i / D))

    Args:
        L: positions.
        D: features; an odd D ends with a sine.
        base: of the wave lengths.
        dtype: of the result.

    Returns:
        (L, D), on the CPU.

    Raises:
        ValueError: a negative size.

    Accuracy: computed in float64, rounded once.
    Cost: L D sines and cosines.
    Equivalent to: its equation; torch has no such function.
    Source: Vaswani et al., arXiv:1706.03762, section 3.5.
    """
    if L < 0 or D < 0:
        raise ValueError(f"sinusoidal_positions: L and D must be >= 0, got L = {L}, D = {D}")
    exponent = torch.arange(0, D, 2, dtype=torch.float64, device="cpu") / max(D, 1)
    angle = torch.arange(L, dtype=torch.float64, device="cpu").unsqueeze(1) / base**exponent
    encoding = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
    return encoding[:, :D].to(dtype).contiguous()


def alibi_slopes(NH: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The slopes of attention with linear biases, one a head, for any number of heads.

        n = 2^floor(log2 NH)
        slope_h = 2^(-8 (h + 1) / n) for h < n, and 2^(-4 (2 (h - n) + 1) / n) for the others

    Args:
        NH: heads.
        dtype: of the result; attention takes that of q.

    Returns:
        (NH,), on the CPU.

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
    exponents = [8 * (h + 1) / n if h < n else 4 * (2 * (h - n) + 1) / n for h in range(NH)]
    return torch.tensor([2.0**-e for e in exponents], dtype=dtype, device="cpu")


def rotary(
    x: Tensor,
    *,
    dim: int | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
    offsets: int | Tensor = 0,
    inverse: bool = False,
) -> Tensor:
    """Rotary position embedding: pairs of features turned by an angle that grows with position.

        theta = (offset + i) / base^(2t / dim) for pair t of row i
        y1 = x1 cos(theta) - x2 sin(theta)        y2 = x2 cos(theta) + x1 sin(theta)

    Args:
        x: (B, NH, L, D), (NH, L, D) or (L, D) float32 or float64, on a GPU float32, bfloat16 or
            float16, any strides.
        dim: how many features turn, the first ones; even; None: D.
        base: of the angles.
        interleaved: x1, x2 are the even and odd features; False: the two halves.
        offsets: the position of row 0, >= 0: one integer, or (B,) with x (B, NH, L, D).
        inverse: turn by -theta, which is also the gradient.

    Returns:
        y of x's shape, axes in memory in x's order. Gradients, of any order, flow to x.

    Raises:
        TypeError: x is no tensor of these dtypes, offsets are no integers.
        ValueError: a shape, dim or offset out of range (a tensor of offsets on a GPU is not read).

    Accuracy: angles in float64; float32 within 2x of torch's own error (3x for gradients).
    Cost: a read and a write of x; the cosines of all positions are kept from call to call.
    Equivalent to: x * cos + torch.cat((-x2, x1), -1) * sin
    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"rotary: x must be a torch.Tensor, got {type(x).__name__}")
    if not on_gpu(x) and (x.dtype not in FLOATS or not (x.is_cpu or x.is_meta)):
        raise unsupported("rotary", "x", x)
    first, starts = (0, offsets) if isinstance(offsets, Tensor) else (offsets, None)
    if isinstance(first, bool) or not isinstance(first, (int, torch.SymInt)):
        raise TypeError(f"rotary: offsets must be integers, got {type(first).__name__}")
    numbers = (dim, float(base), interleaved, first, inverse)
    direct = not heard((x, starts)) and not differentiated((x,))
    return (_kernel if direct else _OPERATOR)(x, starts, *numbers)


class _Rotary(Function):
    """Autograd around the operator: the gradient turns back."""

    @staticmethod
    def forward(ctx, x, starts, *numbers):
        ctx.numbers = numbers
        ctx.save_for_backward(starts)
        with _C._AutoDispatchBelowAutograd():
            return _OPERATOR(x, starts, *numbers)

    @staticmethod
    def backward(ctx, dy):
        (starts,) = ctx.saved_tensors
        *same, inverse = ctx.numbers
        return _OPERATOR(dy, starts, *same, not inverse), *(None,) * (len(ctx.numbers) + 1)


def _kernel(x, starts, dim, base, interleaved, first, inverse):
    if on_gpu(x):
        return position_cuda.rotary(x, starts, dim, base, interleaved, first, inverse)
    offsets = first if starts is None else array(starts)
    options = {"dim": dim, "base": base, "interleaved": interleaved}
    return tensor_of(fastseq.rotary(array(x), **options, offsets=offsets, inverse=inverse))


def _autograd(x, starts, *numbers):
    if recorded(x):
        return _Rotary.apply(x, starts, *numbers)
    with _C._AutoDispatchBelowAutograd():
        return _OPERATOR(x, starts, *numbers)


def _fake(x, *_):
    return like(x, x.shape[-1])


_OPERATOR = register(
    "rotary",
    "(Tensor x, Tensor? starts, SymInt? dim, float base, bool interleaved, SymInt first,"
    " bool inverse) -> Tensor",
    _kernel,
    _autograd,
    _fake,
    _kernel,
)
