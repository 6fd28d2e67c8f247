# The Python entries beside the scans: sizes, packing, and what the Python side asks of layouts and
# arrays.

def packed_size(cell, Py_ssize_t I, Py_ssize_t H, Py_ssize_t P):
    """Reals of one direction's packed weights."""
    cdef Cell c = cell_from(cell)
    cdef Shape s = shape_of(&c, I, H, P)
    return packed_forward(&s).total


def gate_row(cell, Py_ssize_t H):
    """Reals kept per (t, b) of one direction for backward; 0 where the cell needs only y."""
    cdef Cell c = cell_from(cell)
    cdef Shape s = shape_of(&c, 1, H, 0)
    return s.gate_row if s.cell.saves_gates else 0


cdef struct PackCall:
    Shape shape
    Weights weights
    real *out


cdef void pack_member(void *call) noexcept nogil:
    cdef PackCall *p = <PackCall *>call
    pack_forward(&p.shape, &p.weights, p.out, gomp.rank(), gomp.size())


def pack(cell, Py_ssize_t I, Py_ssize_t H, Py_ssize_t P, tuple weights, out, int threads):
    """Pack one direction's weights (w_ih, w_hh, b_ih, b_hh, w_hr, params)
    for `forward` into `out`."""
    cdef PackCall p
    cdef Cell c = cell_from(cell)
    p.shape = shape_of(&c, I, H, P)
    p.weights = weights_of(weights)
    p.out = view(out).data
    with nogil:
        if threads > 1 and gomp.parallel != NULL and packed_forward(&p.shape).total > SMALL_PACK:
            gomp.parallel(pack_member, &p, threads, 0)
        else:
            pack_forward(&p.shape, &p.weights, p.out, 0, 1)


cdef enum:
    SMALL_PACK = 65536              # reals; below, one thread is done before a second one wakes


def tile_layout():
    """How compiled code finds its way in a Tile of cells.h: words of 8 bytes, slots
    and functions by name."""
    names = "GATES H_PREV C_PREV H C DH_PRODUCT DY DC_EXTERNAL DH_IN DC_IN DGATES DH_OUT DC_OUT"
    words = "rows blocks dgates_plane params_plane params functions"
    return {
        "lanes": VL,
        "max_rows": MAX_ROWS,
        "words": {name: k for k, name in enumerate(words.split())},
        "slots": {name: 6 + k * MAX_ROWS for k, name in enumerate(names.split())},
        "functions": {name: k for k, name in enumerate(("exp", "tanh", "sigmoid"))},
    }


def fingerprint(list arrays):
    """A 64-bit hash of contiguous arrays' bytes, at the speed of memory."""
    cdef Py_buffer buffer
    cdef uint64_t h = 0, rest
    for array in arrays:
        PyObject_GetBuffer(array, &buffer, PyBUF_STRIDED_RO)
        with nogil:
            h = hash_words(<uint64_t *>buffer.buf, buffer.len // 8, h)
            if buffer.len % 8:
                rest = 0
                memcpy(&rest, <char *>buffer.buf + buffer.len // 8 * 8, buffer.len % 8)
                h = hash_words(&rest, 1, h)
        PyBuffer_Release(&buffer)
    return h
