"""What all Triton kernels share: where they run, how products are rounded, sizes, offsets.

A kernel's block sizes come from a table of `Row`s kept beside it, by size (head dimension, or
hidden units), bytes per element and architecture. Nothing is tuned at run time, and T and B decide
nothing: a new sequence length compiles and tries nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 has to be set before triton is first imported.
    """
    return bool(triton.knobs.runtime.interpret)


def check(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless the kernels take the tensor's dtype and device."""
    if tensor.dtype in DTYPES and (tensor.is_cuda or (interpreted() and tensor.is_cpu)):
        return
    dtype = str(tensor.dtype).removeprefix("torch.")
    raise TypeError(
        f"{op}: {name} must be float32, bfloat16 or float16 on a CUDA device, "
        f"got {dtype} on {tensor.device}"
    )


def on(tensor: torch.Tensor) -> AbstractContextManager:
    """The context in which kernels are launched: the tensor's device is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: float32 products are IEEE unless torch allows tf32.

    Other dtypes have exact products and float32 sums.
    """
    if dtype != torch.float32:
        return "ieee"
    # follows allow_tf32 and set_float32_matmul_precision, and raises nothing where they are mixed
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def architecture(tensor: torch.Tensor) -> int:
    """Compute capability as a number, 90 for Hopper; 0 in the interpreter."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def multiprocessors(tensor: torch.Tensor) -> int:
    """SMs of the tensor's device; 1 in the interpreter."""
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


class Row(NamedTuple):
    """One line of a table of block sizes: it holds for sizes, bytes and architectures from its own.

    Args:
        size: up to this head dimension, or number of hidden units.
        itemsize: bytes per element: 4 float32, 2 bfloat16 and float16.
        arch: from this compute capability on; 0 holds anywhere, the interpreter included.
        meta: the kernel's constants: block sizes, num_warps, num_stages.
    """

    size: float
    itemsize: int
    arch: int
    meta: dict[str, Any]


def choose(table: Sequence[Row], size: int, tensor: torch.Tensor) -> dict[str, Any]:
    """The constants of the first row that holds; rows stand from the most special on."""
    arch = architecture(tensor)
    for row in table:
        if size <= row.size and tensor.itemsize == row.itemsize and arch >= row.arch:
            return row.meta
    raise LookupError(f"no block sizes for size {size}, {tensor.itemsize} bytes, arch {arch}")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def program(axis: tl.constexpr):
    """This program's index along the axis, as 64 bits: offsets made of it do not overflow."""
    return tl.program_id(axis).to(tl.int64)


@triton.jit
def wide(i):
    """An index or a stride as 64 bits."""
    return tl.cast(i, tl.int64)
