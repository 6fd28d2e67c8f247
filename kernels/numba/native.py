"""What Numba kernels share: memory by address, compiling once, and threads.

A kernel is a C callback `void kernel(void *job)`, job a record of sizes, addresses and strides. It
runs on libgomp's pool like the Cython kernels (team.h), through ctypes, which releases the GIL.
Numba's own parallel layers are not used: its OpenMP layer ends the child of a fork, its workqueue
layer ends the process when two Python threads call at once.

Numba caches by the kernel's own file: after a change here, touch that file.
"""

import ctypes
import sys
import time
from array import array
from contextlib import suppress

import numpy as np
from fastseq.kernels.cpu.contract import address
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
OPTIONS = {"error_model": "numpy", "nogil": True}
INLINED = OPTIONS | {"forceinline": True}
CACHE_LINE = 64


@intrinsic
def at(typingctx, address, like):
    """The address as a pointer to numbers of like's type; indices are not checked."""
    kind = types.CPointer(like)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, like), codegen


@intrinsic(prefer_literal=True)
def stack(typingctx, n, like):
    """Memory for n (a constant) numbers of like's type, until the calling function returns."""
    kind = types.CPointer(types.unliteral(like))

    def codegen(context, builder, signature, args):
        memory = cgutils.alloca_once(builder, context.get_value_type(like), n.literal_value)
        memory.align = CACHE_LINE
        return memory

    return kind(n, like), codegen


@intrinsic
def size_of(typingctx, like):
    """Bytes of a number of like's type, a constant."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.intp, like.bitwidth // 8)

    return types.intp(like), codegen


@intrinsic
def _count(typingctx, counter):
    """The number at the address, 1 added to it behind."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def _rank(typingctx, function):
    """What omp_get_thread_num, at the address, returns."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        rank = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return builder.zext(rank, ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def _meet(typingctx, function):
    """GOMP_barrier, at the address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])

    return types.void(types.int64), codegen


@njit(**OPTIONS)
def barrier(job):
    """All threads wait here for each other."""
    if job.threads > 1:
        _meet(job.barrier)


@njit(**OPTIONS)
def take(job, tasks, backwards, phase):
    """The next of `tasks` tasks for this thread, -1 if there is none. Every phase has its own.

    Each thread has a share of its own, the same in every pass over the same tasks, so that what it
    has read and written is in its cache: on a virtual machine another core's may be 300 ns away.
    Then it takes what the others have not begun. `backwards`: a share from its end.
    """
    rank = _rank(job.rank_of) if job.threads > 1 else 0
    for k in range(job.threads):
        r = (rank + k) % job.threads
        first, end = r * tasks // job.threads, (r + 1) * tasks // job.threads
        taken = job.taken + (phase * job.threads + r) * CACHE_LINE
        if at(taken, 0)[0] >= end - first:
            continue
        task = first + _count(taken)
        if task < end:
            return first + end - 1 - task if backwards else task
    return -1


def record(*numbers, **axes):
    """The type of a job: numbers by name; per array its address and strides, named by its axes.

    record("T", a="tb") has the fields of `take` and `barrier`, T, a, a_t, a_b; all int64.
    """
    names = ["taken", "threads", "rank_of", "barrier", *numbers]
    for name, letters in axes.items():
        names += [name, *(f"{name}_{letter}" for letter in letters)]
    return np.dtype([(name, np.int64) for name in names])


def job(numbers, arrays):
    """The job of numbers and (array, how many axes have strides), in the order of its record.

    An array None gets zeros. Not a NumPy record, which takes 40 us to fill (Zen 3); this takes 3.
    """
    values = [0, 0, 0, 0, *numbers]
    for a, axes in arrays:
        values += [0] * (axes + 1) if a is None else [address(a), *a.strides[:axes]]
    return array("q", values)


def compiled(function):
    """The kernel `function(job)`, and whether it came from Numba's cache.

    Numba's cache is __pycache__ beside the source, where that cannot be written the user's cache
    folder (or NUMBA_CACHE_DIR), and where neither can, none: then every process compiles.
    """
    signature = types.void(types.voidptr)
    try:
        found = cfunc(signature, cache=True, **OPTIONS)(function)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        found = cfunc(signature, **OPTIONS)(function)
    return _KERNEL(found.address), found.cache_hits > 0


def compile_all(what, functions):
    """The kernels of all; the first time on a machine this takes seconds, and says so."""
    start = time.perf_counter()
    kernels, cached = zip(*map(compiled, functions), strict=True)
    if not all(cached):
        seconds = time.perf_counter() - start
        sys.stderr.write(f"fastseq: Numba compiled {what} in {seconds:.1f} s, once\n")
    return kernels


def address_of(function):
    """Where a function's code is."""
    return ctypes.cast(function, ctypes.c_void_p).value


def _openmp():
    """libgomp's GOMP_parallel(kernel, job, threads, flags), and the addresses of omp_get_thread_num
    and GOMP_barrier; or None."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libgomp.so.1")
        parallel, inside = library.GOMP_parallel, (library.omp_get_thread_num, library.GOMP_barrier)
        parallel.argtypes = [_KERNEL, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel, *map(address_of, inside)
    return None


_OPENMP = _openmp()


def run(kernel, job, threads, phases=1):
    """Call kernel(job) once on each of the threads, and wait."""
    threads = threads if _OPENMP is not None else 1
    taken, where = array("q", bytes(CACHE_LINE * threads * phases)), job.buffer_info()[0]
    job[0], job[1] = taken.buffer_info()[0], threads
    if threads > 1:
        parallel, job[2], job[3] = _OPENMP
        parallel(kernel, where, threads, 0)
    else:
        kernel(where)
