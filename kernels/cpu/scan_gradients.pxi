# The products after a chunk of the backward scan: dx, and the weights' gradients, over its M active
# rows, step by step and in each step by descending length.

cdef enum Source:
    INPUT, STATE, PROJECTED


cdef void gather(Backward *g, Py_ssize_t s0, Py_ssize_t s1, Source source) noexcept nogil:
    """dgates_row and b_row for one weight gradient, out_row for dx."""
    cdef Job *job = g.part.job
    cdef const Shape *shape = &job.shape
    cdef Py_ssize_t s, i, b, t, active = job.B
    cdef Py_ssize_t input_planes = (shape.cell.planes - shape.cell.gates) * shape.H
    g.M = 0
    for s in range(s0, s1):
        active = active_rows(&g.whole, s, active)
        for i in range(active):
            b = row_of(&g.whole, i)
            t = time_of(job, b, s)
            if source == INPUT:
                g.dgates_row[g.M] = dgates_at(g, s, b) + input_planes
                g.b_row[g.M] = job.x + t * job.x_t + b * job.x_b
                if job.dx != NULL:
                    g.out_row[g.M] = job.dx + (t * job.B + b) * shape.I
            elif source == STATE:
                g.dgates_row[g.M] = dgates_at(g, s, b)
                g.b_row[g.M] = h_before(job, g.part.zero, s, t, b)
                if job.recurrent_mask != NULL:
                    mask_row(g.masked + g.M * shape.R, g.b_row[g.M],
                             job.recurrent_mask + b * shape.R, shape.R)
                    g.b_row[g.M] = g.masked + g.M * shape.R
            else:
                g.dgates_row[g.M] = dh_at(g, s, b)
                g.b_row[g.M] = job.m + t * job.m_t + b * shape.H
            g.M += 1


cdef void weight_gradient(Backward *g, real *dw, Py_ssize_t rows, Py_ssize_t columns,
                          bint state_planes, real *sums) noexcept nogil:
    """Add the gathered rows' part to this thread's rows of dw (rows, columns)."""
    cdef const Shape *shape = &g.part.job.shape
    cdef Py_ssize_t m, row
    cdef Outer o
    for m in range(rows):
        row = m
        if state_planes:
            row = plane_gate(shape, <int>(m // shape.H), True) * shape.H + m % shape.H
        g.out_row[m] = dw + row * columns
    o.K, o.N, o.first = g.M, columns, g.first
    o.m0, o.m1 = share(rows, g.part.rank, g.part.size), share(rows, g.part.rank + 1, g.part.size)
    o.a, o.b, o.c, o.sums = g.dgates_row, g.b_row, g.out_row, sums
    outer(&o, g.outer_scratch)


cdef void params_gradient(Backward *g) noexcept nogil:
    """The sums over the gathered rows of what stands behind the planes, for this
    thread's share of them."""
    cdef const Shape *shape = &g.part.job.shape
    cdef Py_ssize_t planes = shape.cell.planes * shape.H, n = shape.cell.params * shape.H
    cdef Py_ssize_t m = share(n, g.part.rank, g.part.size)
    cdef Py_ssize_t end = share(n, g.part.rank + 1, g.part.size)
    cdef real *sums = <real *>g.part.job.d.params
    if g.first and n > 0:
        memset(sums + m, 0, (end - m) * sizeof(real))
    while m < end:
        sum_rows(g.dgates_row, g.M, planes + m, imin(OUTER_ROWS, end - m), sums + m)
        m += OUTER_ROWS


cdef void input_gradient(Backward *g) noexcept nogil:
    """dx = dGATES W_ih for this thread's share of the gathered rows."""
    cdef const Shape *shape = &g.part.job.shape
    cdef Py_ssize_t m0 = share(g.M, g.part.rank, g.part.size)
    cdef Py_ssize_t m1 = share(g.M, g.part.rank + 1, g.part.size)
    cdef Product p
    p.K, p.nv, p.w = shape.cell.gates * shape.H, 4, g.w + g.at.w_ih
    p.p0, p.p1, p.init = 0, ceil_div(shape.I, 4 * VL), g.part.zero
    p.panel_stride, p.columns, p.tail = 4 * VL, shape.I, g.part.tail
    product(&p, g.dgates_row + m0, g.out_row + m0, m1 - m0)


cdef void backward_products(Backward *g, Py_ssize_t s0, Py_ssize_t s1) noexcept nogil:
    cdef Job *job = g.part.job
    cdef const Shape *shape = &job.shape
    cdef Py_ssize_t rows = shape.cell.gates * shape.H
    cdef real *sums = NULL
    gather(g, s0, s1, INPUT)
    if job.dx != NULL:
        input_gradient(g)
    if job.d.w_ih == NULL:
        return
    weight_gradient(g, <real *>job.d.w_ih, rows, shape.I, False, <real *>job.d.b_ih)
    if job.d.b_ih != NULL and shape.cell.planes > shape.cell.gates:
        sums = g.sums
    gather(g, s0, s1, STATE)
    params_gradient(g)
    if shape.cell.recurrent:
        weight_gradient(g, <real *>job.d.w_hh, rows, shape.R, True, sums)
    if shape.P > 0:
        gather(g, s0, s1, PROJECTED)
        weight_gradient(g, <real *>job.d.w_hr, shape.P, shape.H, False, NULL)


cdef void finish_gradients(Backward *g) noexcept nogil:
    """db_hh: b_ih's, or where hn stays apart the sums over the state's planes.
    dx past the ends: zeros."""
    cdef Job *job = g.part.job
    cdef const Shape *shape = &job.shape
    cdef Py_ssize_t m, b, t, rows = shape.cell.gates * shape.H
    cdef real *db = <real *>job.d.b_hh
    if job.d.w_ih != NULL and db != NULL:
        for m in range(share(rows, g.part.rank, g.part.size),
                       share(rows, g.part.rank + 1, g.part.size)):
            if shape.cell.planes > shape.cell.gates:
                db[plane_gate(shape, <int>(m // shape.H), True) * shape.H + m % shape.H] = g.sums[m]
            else:
                db[m] = job.d.b_ih[m]
    b = g.part.rank
    while b < job.B and job.dx != NULL:
        for t in range(length_of(job, b), job.T):
            memset(job.dx + (t * job.B + b) * shape.I, 0, shape.I * sizeof(real))
        b += g.part.size
