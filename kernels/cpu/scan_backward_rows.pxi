# What the backward scan works on: one thread's memory, and where a row of a step finds what flows
# into it, what forward saved for it, and where its gradients go. The equations stand in
# scan_backward.pxi.

cdef enum:
    # rows (t, b) of a chunk; LSTM B128 H128 trains in 60 ms, with all T at once 84 (Zen 4)
    PRODUCT_ROWS = 512


cdef struct Backward:
    Part part
    Packed at
    const real *w               # packed_backward, shared by the job's threads
    Py_ssize_t chunk, ring      # steps of a chunk; step s is kept at s % ring, ring = chunk + 1
    real *dgates                # (ring, B, dgates_row), shared
    real *dh                    # (ring, B, P) with a projection, shared
    Py_ssize_t active           # rows the scan has reached
    Py_ssize_t r0, r1           # its panels of the R columns of h
    Py_ssize_t u0, u1           # its panels of the H units; those of R without a projection
    # (n, 4 * VL): one panel of a product, or ROW_PANELS of a single row; or whole rows
    real *acc
    Py_ssize_t acc_stride       # from row to row
    real **acc_row
    Rows rows
    Rows cell_rows              # the same as the cell is to see them, with zoneout
    const real **zoneout_h      # rows, NULL without
    const real **zoneout_c
    real *past_h                # (n, H): the gradient that zoneout leads past the cell
    real *past_c
    real *dc_in                 # (n, H): what it leaves of dc for the cell
    real *masked                # (chunk, B, R) with recurrent dropout
    const real **from_gates     # dGATES rows of the step after
    real **dh_row
    # the products
    Part whole                  # all rows of the job
    bint first                  # the first chunk starts the sums
    Py_ssize_t M                # active rows (s, b) of the chunk
    const real **dgates_row
    const real **b_row
    real **out_row              # max(M, 4 H)
    real *sums                  # (3 H) where b_hh's gradient is not b_ih's
    real *outer_scratch


cdef void backward_layout(Backward *g, char **arena) noexcept nogil:
    cdef const Shape *s = &g.part.job.shape
    cdef Py_ssize_t n = g.part.n, pointer = sizeof(void *), rows = g.chunk * g.part.job.B
    cdef Py_ssize_t width = s.cell.planes * s.H
    cdef int slot
    g.part.tail = <real *>take(arena, tail_bytes(s))
    g.part.zero = <real *>take(arena, (max(width, s.R, s.I) + s.tile_width) * sizeof(real))
    g.acc_stride = ceil_div(s.H, 4 * VL) * 4 * VL if s.cell.whole_rows else 4 * VL
    g.acc = <real *>take(arena, max(n, <Py_ssize_t>ROW_PANELS) * g.acc_stride * sizeof(real))
    g.acc_row = <real **>take(arena, n * pointer)
    for slot in range(SLOTS):
        g.rows.row[slot] = <real **>take(arena, n * pointer)
    backward_regularise_layout(g, arena)
    g.from_gates = <const real **>take(arena, n * pointer)
    g.dh_row = <real **>take(arena, n * pointer)
    g.dgates_row = <const real **>take(arena, rows * pointer)
    g.b_row = <const real **>take(arena, rows * pointer)
    g.out_row = <real **>take(arena, max(rows, width, s.P) * pointer)
    g.sums = <real *>take(arena, width * sizeof(real))
    g.outer_scratch = <real *>take(arena, outer_scratch(max(s.I, s.R, s.H)) * sizeof(real))


cdef void backward_regularise_layout(Backward *g, char **arena) noexcept nogil:
    cdef const Job *job = g.part.job
    cdef Py_ssize_t H = job.shape.H, n = g.part.n if job.zoneout else 0, pointer = sizeof(void *)
    cdef int slot
    for slot in range(SLOTS):
        g.cell_rows.row[slot] = <real **>take(arena, n * pointer)
    g.zoneout_h = <const real **>take(arena, n * pointer)
    g.zoneout_c = <const real **>take(arena, n * pointer)
    g.past_h = <real *>take(arena, n * H * sizeof(real))
    g.past_c = <real *>take(arena, n * H * sizeof(real))
    g.dc_in = <real *>take(arena, n * H * sizeof(real))
    n = g.chunk * job.B * job.shape.R if job.recurrent_mask != NULL else 0
    g.masked = <real *>take(arena, n * sizeof(real))


cdef inline real *dgates_at(const Backward *g, Py_ssize_t s, Py_ssize_t b) noexcept nogil:
    cdef Job *job = g.part.job
    return g.dgates + ((s % g.ring) * job.B + b) * job.shape.dgates_row


cdef inline real *dh_at(const Backward *g, Py_ssize_t s, Py_ssize_t b) noexcept nogil:
    return g.dh + ((s % g.ring) * g.part.job.B + b) * g.part.job.shape.P


cdef void backward_slots(Backward *g) noexcept nogil:
    """Leave only the slots that the cell has."""
    cdef const Shape *s = &g.part.job.shape
    if not s.cell.saves_gates:
        g.rows.row[GATES] = NULL
    if not s.cell.dh_direct:
        g.rows.row[DH_OUT] = g.rows.row[H_PREV] = NULL
    if s.cell.saves_gates:
        g.rows.row[H] = NULL
    if not s.cell.has_c:
        g.rows.row[C] = g.rows.row[C_PREV] = g.rows.row[DC_EXTERNAL] = NULL
        g.rows.row[DC_IN] = g.rows.row[DC_OUT] = NULL
    g.rows.row[DH_PRODUCT] = NULL


cdef const real *h_before(const Job *job, const real *zero, Py_ssize_t s, Py_ssize_t t,
                          Py_ssize_t b) noexcept nogil:
    """h_{t-1} as row b read it at step s: of y, the initial state, or zeros after a reset."""
    if is_reset(job, t, b):
        return zero
    if s == 0:
        return zero if job.h0 == NULL else job.h0 + b * job.shape.R
    return job.y + (t + 1 if job.reverse else t - 1) * job.y_t + b * job.y_b


cdef const real *c_before(const Job *job, const real *zero, Py_ssize_t s, Py_ssize_t t,
                          Py_ssize_t b) noexcept nogil:
    """c_{t-1} as row b read it at step s: of c, the initial state, or zeros after a reset."""
    if is_reset(job, t, b):
        return zero
    if s == 0:
        return zero if job.c0 == NULL else job.c0 + b * job.shape.H
    return job.c + (t + 1 if job.reverse else t - 1) * job.c_t + b * job.c_b


cdef void backward_rows(Backward *g, Py_ssize_t s, Py_ssize_t active) noexcept nogil:
    """Point at what flows into step s from the one after it and from
    outside, and at what it keeps."""
    cdef Job *job = g.part.job
    cdef const Shape *shape = &job.shape
    cdef Py_ssize_t i, b, t
    cdef real *zero = g.part.zero
    cdef real ***row = g.rows.row
    cdef bint enters, flows
    cdef real *dh_in
    cdef real *dc_in
    for i in range(active):
        b = row_of(&g.part, i)
        enters = s + 1 == length_of(job, b)
        flows = not enters and not is_reset(job, time_of(job, b, s + 1), b)
        g.from_gates[i] = dgates_at(g, s + 1, b) if flows else zero
        dh_in = dc_in = zero
        if enters and job.h_n != NULL:
            dh_in = job.h_n + b * shape.R
        elif flows and (shape.cell.dh_direct or job.zoneout):
            dh_in = job.dh0 + b * shape.R
        row[DH_IN][i] = dh_in
        if shape.cell.has_c:
            if enters and job.c_n != NULL:
                dc_in = job.c_n + b * shape.H
            elif flows:
                dc_in = job.dc0 + b * shape.H
            row[DC_IN][i] = dc_in
            row[DC_OUT][i] = job.dc0 + b * shape.H
        if row[DH_OUT] != NULL:
            row[DH_OUT][i] = job.dh0 + b * shape.R
        row[DY][i] = zero
        g.dh_row[i] = job.dh0 + b * shape.R
        if s < 0:
            continue
        t = time_of(job, b, s)
        if job.dy != NULL:
            row[DY][i] = <real *>job.dy + t * job.dy_t + b * job.dy_b
        if shape.P > 0:
            g.dh_row[i] = dh_at(g, s, b)
        row[DGATES][i] = dgates_at(g, s, b)
        if row[GATES] != NULL:
            row[GATES][i] = job.gates + (t * job.B + b) * shape.gate_row
        if row[H] != NULL:
            row[H][i] = (job.m + t * job.m_t + b * shape.H if job.zoneout
                         else job.y + t * job.y_t + b * job.y_b)
        if row[H_PREV] != NULL:
            row[H_PREV][i] = <real *>h_before(job, zero, s, t, b)
        if shape.cell.has_c:
            row[C][i] = (job.m_c + t * job.m_c_t + b * shape.H if job.zoneout
                         else job.c + t * job.c_t + b * job.c_b)
            row[C_PREV][i] = <real *>c_before(job, zero, s, t, b)
            row[DC_EXTERNAL][i] = (zero if job.dc == NULL
                                   else <real *>job.dc + t * job.dc_t + b * job.dc_b)
        if job.zoneout:
            zoneout_rows(g, i, t, b)


cdef void zoneout_rows(Backward *g, Py_ssize_t i, Py_ssize_t t, Py_ssize_t b) noexcept nogil:
    """Row i as the cell is to see it: all of dh in the product, all of dc in dc_in."""
    cdef Job *job = g.part.job
    cdef int slot
    for slot in range(SLOTS):
        if g.rows.row[slot] == NULL:
            g.cell_rows.row[slot] = NULL
        else:
            g.cell_rows.row[slot][i] = g.rows.row[slot][i]
    g.cell_rows.row[DY][i] = g.cell_rows.row[DH_IN][i] = g.part.zero
    if job.shape.cell.has_c:
        g.cell_rows.row[DC_EXTERNAL][i] = g.part.zero
        g.cell_rows.row[DC_IN][i] = g.dc_in + i * job.shape.H
    g.zoneout_h[i] = row_of_step(job.zoneout_h, job, t, b)
    g.zoneout_c[i] = row_of_step(job.zoneout_c, job, t, b)
