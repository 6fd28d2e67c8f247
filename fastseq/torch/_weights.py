"""Weights as NumPy arrays without copies, and packed weights kept between calls."""

import numpy as np
import torch

from fastseq import _stack

FLOATS = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


def unsupported(operation, name, tensor):
    """The error for a tensor that the CPU kernels do not take."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TypeError(
        f"{operation}: {name} must be float32 or float64 on the CPU, got {dtype} on {tensor.device}"
    )


class _Memory:
    """Describes a tensor's memory to NumPy."""

    __slots__ = ("__array_interface__",)

    def __init__(self, tensor):
        dtype = FLOATS[tensor.dtype]
        self.__array_interface__ = {
            "version": 3,
            "typestr": dtype.str,
            "shape": tuple(tensor.shape),
            "strides": None if tensor.is_contiguous() else _byte_strides(tensor),
            "data": (tensor.data_ptr(), True),
        }


def _byte_strides(tensor):
    return tuple(stride * tensor.itemsize for stride in tensor.stride())


def borrow(cell, weights):
    """Read-only views of the weights' memory, valid until a weight is moved or freed.

    `Tensor.numpy` would forbid the storage to be resized, which is how FSDP frees parameters.
    """
    for w in weights:
        if w.dtype not in FLOATS or not w.is_cpu:
            raise unsupported(cell, "every weight", w)
    return [np.asarray(_Memory(w)) for w in weights]


class PackedWeights:
    """A module's weights as views and in the kernels' layout, kept while they stay the same.

    A change in place through `.data` leaves no trace on a tensor, hence `packed` compares contents,
    by a hash at the speed of memory. Copies and pickles of a module start with an empty one.
    """

    __slots__ = ("_packed", "_views")

    def __init__(self):
        self._views = None, None
        self._packed = None, None, None

    def __reduce__(self):
        return PackedWeights, ()

    def views(self, spec, weights):
        """The weights as NumPy arrays."""
        where = [(w.data_ptr(), w.dtype, w.shape, w.stride()) for w in weights]
        known, views = self._views  # one reference: a concurrent caller cannot mix two states
        if known != where:
            views = borrow(spec.cell, weights)
            self._views = where, views
        return views

    def packed(self, spec, views):
        """The packed form of `views`."""
        known, contents, packed = self._packed
        hashed = _stack.fingerprint(views)
        if known is not views or contents != hashed:
            packed = _stack.pack(spec, views)
            self._packed = views, hashed, packed
        return packed
