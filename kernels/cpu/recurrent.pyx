# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The recurrent kernels: RNN, GRU and LSTM scans, forward and backward through time.

Built once per ISA level and dtype from this one source (see setup.py). `contract.Scan` lists the arguments.
"""

from cpython.buffer cimport PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **at, size_t alignment, size_t size)


cdef extern from "cells.h" nogil:
    ctypedef double real
    enum:
        VL
        MAX_ROWS
        ROW_PANELS
        SLOTS
    enum:
        GATES, H_PREV, C_PREV, H, C, DH_PRODUCT, DY, DC_EXTERNAL, DH_IN, DC_IN, DGATES, DH_OUT, DC_OUT
    ctypedef struct Tile:
        Py_ssize_t rows, blocks, dgates_plane
        real *row[13][8]
    ctypedef void (*CellFn)(const Tile *) noexcept nogil
    ctypedef struct Cell:
        int gates, planes, has_c, saves_gates, dh_direct
        CellFn forward, backward
    Cell cell_of(int which)
    Py_ssize_t tile_rows(int nv)
    void tile(Py_ssize_t rows, int nv, const real **a, Py_ssize_t k0, Py_ssize_t k1, const real *w,
              const real *init, real **c, Py_ssize_t col)
    void row_tile(Py_ssize_t panels, int nv, const real *a, Py_ssize_t k0, Py_ssize_t k1, const real *w,
                  Py_ssize_t panel, real *c, Py_ssize_t panel_c)
    void pack_transposed(const real **src, Py_ssize_t K, real *dst, Py_ssize_t ld)
    void copy_padded(real *dst, const real *src, Py_ssize_t n, Py_ssize_t width)
    void add_row(real *sum, const real *row, Py_ssize_t n)
    uint64_t hash_words(const uint64_t *word, Py_ssize_t n, uint64_t seed)


cdef extern from "team.h" nogil:
    ctypedef struct Gomp:
        void (*parallel)(void (*)(void *) noexcept nogil, void *, unsigned, unsigned) noexcept nogil
        int (*rank)() noexcept nogil
        int (*size)() noexcept nogil
    Gomp gomp_open()
    ctypedef struct Barrier:
        pass
    void barrier_wait(Barrier *b, int size)


cdef inline Py_ssize_t imin(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a < b else b


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t share(Py_ssize_t n, int rank, int size) noexcept nogil:
    """Start of part `rank` when n items are cut into `size` contiguous parts."""
    return n * rank // size


include "pack.pxi"
include "product.pxi"
include "scan.pxi"
include "scan_forward.pxi"
include "scan_backward.pxi"
include "entry.pxi"
