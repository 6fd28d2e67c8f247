"""A module's weights as NumPy arrays and packed, kept between calls."""

from fastseq import _stack
from fastseq.torch._tensors import borrow


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

    def packed(self, spec, weights):
        """The weights as NumPy arrays, and `_stack.pack` of them."""
        views = self.views(spec, weights)
        known, contents, packed = self._packed
        hashed = _stack.fingerprint(views)
        if known is not views or contents != hashed:
            packed = _stack.pack(spec, views)
            self._packed = views, hashed, packed
        return views, packed
