# What works row by row beside attention: joining two results, and rotary
# positions. Bound by memory.
#
#   merge    lse = log(e^lse1 + e^lse2)      o = e^(lse1 - lse) o1 + e^(lse2 - lse) o2
#   rotary   y1 = x1 cos - x2 sin            y2 = x2 cos + x1 sin
#
# Source of rotary: Su et al., arXiv:2104.09864.

cdef struct RowsCall:
    Py_ssize_t rows
    # merge: (rows, n) and (rows,), C order
    Py_ssize_t n
    const real *o1
    const real *o2
    const real *lse1
    const real *lse2
    real *o
    real *lse
    # rotary: rows are (B, heads, L)
    Heads x, y
    Py_ssize_t NH, L, D, dim
    const real *cos                 # (positions, dim / 2)
    const real *sin
    const int64_t *first            # (B,) a batch row's first position
    bint interleaved
    real direction                  # 1, or -1 for the inverse


cdef void merge_row(const RowsCall *c, Py_ssize_t r) noexcept nogil:
    """A part without keys (lse -inf) adds nothing, whatever its o holds."""
    cdef real a = c.lse1[r], b = c.lse2[r], m = a if a > b else b, wa, wb
    cdef Py_ssize_t i, at = r * c.n
    if a != a or b != b:
        m = a + b
    if m == -INFINITY:
        memset(c.o + at, 0, c.n * sizeof(real))
        c.lse[r] = -INFINITY
        return
    wa, wb = exp_real(a - m), exp_real(b - m)
    c.lse[r] = m + log_real(wa + wb)
    wa, wb = wa / (wa + wb), wb / (wa + wb)
    for i in range(c.n):
        c.o[at + i] = ((wa * c.o1[at + i] if a != -INFINITY else 0)
                       + (wb * c.o2[at + i] if b != -INFINITY else 0))


cdef void rotate_row(const RowsCall *c, Py_ssize_t r) noexcept nogil:
    cdef Py_ssize_t b = r // (c.NH * c.L), h = r // c.L % c.NH, i = r % c.L, half = c.dim // 2, d
    cdef const real *x = c.x.data + b * c.x.b + h * c.x.h + i * c.x.i
    cdef real *y = c.y.data + b * c.y.b + h * c.y.h + i * c.y.i
    cdef const real *cos = c.cos + (c.first[b] + i) * half
    cdef const real *sin = c.sin + (c.first[b] + i) * half
    cdef real sign = c.direction
    if c.interleaved:
        for d in range(half):
            y[2 * d] = x[2 * d] * cos[d] - x[2 * d + 1] * (sin[d] * sign)
            y[2 * d + 1] = x[2 * d + 1] * cos[d] + x[2 * d] * (sin[d] * sign)
    else:
        for d in range(half):
            y[d] = x[d] * cos[d] - x[half + d] * (sin[d] * sign)
            y[half + d] = x[half + d] * cos[d] + x[d] * (sin[d] * sign)
    memcpy(y + c.dim, x + c.dim, (c.D - c.dim) * sizeof(real))


cdef void rows_share(const RowsCall *c, int rank, int size) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(share(c.rows, rank, size), share(c.rows, rank + 1, size)):
        if c.cos != NULL:
            rotate_row(c, r)
        else:
            merge_row(c, r)


cdef void rows_member(void *call) noexcept nogil:
    rows_share(<RowsCall *>call, gomp.rank(), gomp.size())


cdef enum:
    SMALL_ROWS = 65536              # reals; below, one thread is done before a second one wakes


cdef void run_rows(RowsCall *c, Py_ssize_t reals, int threads) noexcept nogil:
    if threads > 1 and gomp.parallel != NULL and reals > SMALL_ROWS:
        gomp.parallel(rows_member, c, threads, 0)
    else:
        rows_share(c, 0, 1)


def merge(o1, lse1, o2, lse2, o, lse, int threads):
    """Join two results over different keys: o (rows, DV), lse (rows,), all in C order."""
    cdef RowsCall c
    memset(&c, 0, sizeof(RowsCall))
    c.rows, c.n = o.shape
    c.o1, c.o2, c.o = view(o1).data, view(o2).data, view(o).data
    c.lse1, c.lse2, c.lse = view(lse1).data, view(lse2).data, view(lse).data
    with nogil:
        run_rows(&c, c.rows * c.n, threads)


def rotate(x, y, Py_ssize_t dim, cos, sin, first, bint interleaved, bint inverse, int threads):
    """y = x (B, heads, L, D) with its first dim columns turned; cos and
    sin (positions, dim / 2)."""
    cdef RowsCall c
    memset(&c, 0, sizeof(RowsCall))
    B, c.NH, c.L, c.D = x.shape
    c.rows, c.dim, c.interleaved, c.direction = (B * c.NH * c.L, dim, interleaved,
                                                 -1 if inverse else 1)
    c.x, c.y = heads_of(x, False), heads_of(y, False)
    c.cos, c.sin, c.first = view(cos).data, view(sin).data, <int64_t *>view(first).data
    with nogil:
        run_rows(&c, c.rows * c.D, threads)
