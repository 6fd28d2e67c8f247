# What training changes in a scan besides its cell, by masks that the caller draws:
#
#   recurrent dropout   GATES += (d * h_{t-1}) W_hh'         one d (B, R) for all steps
#   zoneout             h_t = z * h_{t-1} + (1 - z) * h'     z (T, B, H), and c_t likewise
#
# Source: Gal & Ghahramani 2016; Krueger et al. 2017.
#
# The cell's own h' and c' stand apart from y and c, kept where its backward reads them: its row
# tables lead there, and what follows moves them to y and c, and the gradients back. Cost: a few
# passes over the states of a step, beside the product's G H per element.

cdef void mask_row(real *to, const real *h, const real *mask, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(n):
        to[k] = h[k] * mask[k]


cdef void blend_row(real *to, const real *made, const real *before, const real *z,
                    Py_ssize_t n) noexcept nogil:
    """to = z * before + (1 - z) * made, or made without z; `to` may be `before`."""
    cdef Py_ssize_t k
    if z == NULL:
        memcpy(to, made, n * sizeof(real))
        return
    for k in range(n):
        to[k] = z[k] * before[k] + (1 - z[k]) * made[k]


cdef void split_row(real *made, real *before, const real *z, Py_ssize_t n) noexcept nogil:
    """Backward of blend_row: `made` holds the gradient of `to` and is left with its
    own; that of `before`."""
    cdef Py_ssize_t k
    if z == NULL:
        memset(before, 0, n * sizeof(real))
        return
    for k in range(n):
        before[k] = z[k] * made[k]
        made[k] = (1 - z[k]) * made[k]


cdef inline const real *row_of_step(const real *a, const Job *job, Py_ssize_t t,
                                    Py_ssize_t b) noexcept nogil:
    """Row (t, b) of a (T, B, H) or of none."""
    return NULL if a == NULL else a + (t * job.B + b) * job.shape.H


cdef inline const real *at_unit(const real *row, Py_ssize_t unit) noexcept nogil:
    return NULL if row == NULL else row + unit
