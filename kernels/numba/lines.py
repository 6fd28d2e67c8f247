"""Four cache lines of numbers as one value, for what LLVM's vectoriser does not make of a loop.

    load(pointer, i)             numbers i and on
    store(pointer, i, lines)
    stream(pointer, i, lines)    past the caches, where a cache line begins; a `fence` must follow

`+` and `*` work element by element. Four at once, or the loads of several arrays take turns line by
line, which prefetchers follow less well (two outputs in L2: 1.2 times the time, Zen 4).
Numba caches by the kernel's own file: after a change here, touch that file.
"""

import operator

from fastseq.kernels.numba.native import CACHE_LINE
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LINES_BYTES = 4 * CACHE_LINE


class Lines(types.Type):
    """As many numbers of a type as four cache lines have."""

    def __init__(self, real):
        self.real = real
        super().__init__(name=f"Lines({real})")


@register_model(Lines)
class _LinesModel(models.PrimitiveModel):
    def __init__(self, manager, lines):
        real = manager.lookup(lines.real).get_value_type()
        count = LINES_BYTES * 8 // lines.real.bitwidth
        super().__init__(manager, lines, ir.VectorType(real, count))


def _place(context, builder, pointer, i, lines):
    return builder.bitcast(builder.gep(pointer, [i]), context.get_value_type(lines).as_pointer())


@intrinsic
def load(typingctx, pointer, i):
    """Numbers i and on."""
    lines = Lines(pointer.dtype)

    def codegen(context, builder, signature, args):
        return builder.load(_place(context, builder, *args, lines), align=lines.real.bitwidth // 8)

    return lines(pointer, types.intp), codegen


@intrinsic
def store(typingctx, pointer, i, lines):
    """To numbers i and on."""

    def codegen(context, builder, signature, args):
        at = _place(context, builder, *args[:2], lines)
        builder.store(args[2], at, align=lines.real.bitwidth // 8)

    return types.void(pointer, types.intp, lines), codegen


@intrinsic
def stream(typingctx, pointer, i, lines):
    """The same past the caches; number i begins a cache line."""

    def codegen(context, builder, signature, args):
        at = _place(context, builder, *args[:2], lines)
        one = ir.Constant(ir.IntType(32), 1)
        stored = builder.store(args[2], at, align=CACHE_LINE)
        stored.set_metadata("nontemporal", builder.module.add_metadata([one]))

    return types.void(pointer, types.intp, lines), codegen


@intrinsic
def fence(typingctx):
    """What was streamed is seen by all threads before what is written after."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")

    return types.void(), codegen


def _elementwise(name):
    @intrinsic
    def function(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return getattr(builder, name)(*args)

        return a(a, b), codegen

    return function


def _overload(function, name):
    computed = _elementwise(name)

    @overload(function)
    def of_lines(a, b):
        if isinstance(a, Lines) and a == b:
            return lambda a, b: computed(a, b)
        return None


_overload(operator.add, "fadd")
_overload(operator.mul, "fmul")
