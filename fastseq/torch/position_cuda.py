"""Rotary embedding of CUDA tensors: checks, allocation, the Triton kernel."""

import torch

from fastseq import _check
from fastseq.kernels.triton import kernels
from fastseq.torch._tensors import like

_OP = "rotary"


def rotary(x, starts, dim, base, interleaved, first, inverse):
    """y; the values of starts are not checked, which would wait for the GPU."""
    kernels(_OP, "launch").check(_OP, "x", x)
    if not 2 <= x.dim() <= 4:
        got = tuple(x.shape)
        raise ValueError(f"{_OP}: x must be (B, NH, L, D), (NH, L, D) or (L, D), got {got}")
    D = x.shape[-1]
    dim = D if dim is None else dim
    if dim % 2 or not 0 <= dim <= D:
        raise ValueError(f"{_OP}: dim must be even and in 0..D = 0..{D}, got {dim}")
    whole = x[(None,) * (4 - x.dim())]
    if first < 0:
        raise ValueError(f"{_OP}: offsets must be >= 0, got {first}")
    if starts is not None:
        if starts.dtype not in (torch.int32, torch.int64):
            dtype = str(starts.dtype).removeprefix("torch.")
            raise TypeError(f"{_OP}: offsets must be int32 or int64, got {dtype}")
        if starts.device != x.device:
            raise ValueError(f"{_OP}: offsets must be on {x.device} as x is, got {starts.device}")
        if starts.dim():
            _check.shape(_OP, "offsets", tuple(starts.shape), "B,", (whole.shape[0],))
        starts = starts.expand(whole.shape[0]).contiguous()
    whole = whole if whole.stride(-1) == 1 or whole.is_contiguous() else whole.contiguous()
    y = like(whole, D)
    rotate = kernels(_OP, "position").rotate
    rotate(whole, y, dim, base, starts, first, bool(interleaved), bool(inverse))
    return y[(0,) * (4 - x.dim())]
