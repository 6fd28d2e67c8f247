# What every CPU kernel stands on: the vocabulary of tile.h, threads, memory, arrays as pointers.

from cpython.buffer cimport PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset


cdef extern from "memory.h" nogil:
    void *get_memory(size_t n)


cdef extern from "tile.h" nogil:
    ctypedef double real
    enum:
        VL
        MAX_ROWS
        K_BLOCK
        ROW_PANELS
    Py_ssize_t tile_rows(int nv)
    void tile(Py_ssize_t rows, int nv, const real **a, Py_ssize_t k0, Py_ssize_t k1, const real *w,
              const real *init, real **c, Py_ssize_t col)
    void row_tile(Py_ssize_t panels, int nv, const real *a, Py_ssize_t k0, Py_ssize_t k1,
                  const real *w, Py_ssize_t panel, real *c, Py_ssize_t panel_c)
    void pack_transposed(const real **src, Py_ssize_t K, real *dst, Py_ssize_t ld)
    void copy_padded(real *dst, const real *src, Py_ssize_t n, Py_ssize_t width)
    void add_row(real *sum, const real *row, Py_ssize_t n)
    void copy_row(real *dst, const real *src, Py_ssize_t n)


cdef extern from "hash.h" nogil:
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
    int64_t fetch_add(int64_t *counter, int64_t n)


cdef Gomp gomp = gomp_open()        # written at import only


cdef inline Py_ssize_t imin(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a < b else b


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t share(Py_ssize_t n, int rank, int size) noexcept nogil:
    """Start of part `rank` when n items are cut into `size` contiguous parts."""
    return n * rank // size


cdef void *take(char **arena, Py_ssize_t n_bytes) noexcept nogil:
    """Cut n bytes, in whole cache lines, off an arena. With a NULL base it only counts."""
    cdef char *at = arena[0]
    arena[0] = at + ceil_div(n_bytes, 64) * 64
    return at


cdef struct View:
    real *data
    Py_ssize_t stride[4]            # in elements


cdef View view(object array) except *:
    """Address and leading strides of an array of up to four axes; None gives NULL."""
    cdef Py_buffer buffer
    cdef View v
    cdef int i
    memset(&v, 0, sizeof(View))
    if array is not None:
        PyObject_GetBuffer(array, &buffer, PyBUF_STRIDED_RO)
        v.data = <real *>buffer.buf
        for i in range(min(buffer.ndim, 4)):
            v.stride[i] = buffer.strides[i] // buffer.itemsize
        PyBuffer_Release(&buffer)   # the caller's reference keeps the memory alive
    return v


def description():
    """(lanes, bytes of a real, whether a thread pool was found)."""
    return VL, sizeof(real), gomp.parallel != NULL
