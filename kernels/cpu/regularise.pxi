# What training changes in a scan besides its cell, by masks that the caller draws:
#
#   recurrent dropout   GATES += (d * h_{t-1}) W_hh'                one d (B, R) for all steps; Gal & Ghahramani 2016
#   zoneout             h_t = k * h_{t-1} + (1 - k) * h'            k (T, B, H), and c_t likewise; Krueger et al. 2017
#
# h', c' are the cell's and kept for backward. Its row tables lead there; what follows moves them to y and c, and the
# gradients back. Cost: a few passes over the states of a step, beside the product's G H per element.

cdef void mask_row(real *to, const real *h, const real *mask, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(n):
        to[k] = h[k] * mask[k]


cdef void blend_row(real *to, const real *made, const real *before, const real *keep, Py_ssize_t n) noexcept nogil:
    """to = keep * before + (1 - keep) * made; `to` may be `before`."""
    cdef Py_ssize_t k
    for k in range(n):
        to[k] = keep[k] * before[k] + (1 - keep[k]) * made[k]


cdef void split_row(real *made, real *before, const real *keep, Py_ssize_t n) noexcept nogil:
    """Backward of blend_row: `made` holds the gradient of `to` and is left with its own; that of `before`."""
    cdef Py_ssize_t k
    for k in range(n):
        before[k] = keep[k] * made[k]
        made[k] = (1 - keep[k]) * made[k]


cdef void add_real_row(real *to, const real *a, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(n):
        to[k] += a[k]


cdef inline real *row_of_step(const real *a, const Job *job, Py_ssize_t t, Py_ssize_t b, real *absent) noexcept nogil:
    """Row (t, b) of a (T, B, H), or `absent` where there is none."""
    return absent if a == NULL else <real *>a + (t * job.B + b) * job.shape.H
