# The forward scan of one job.
#
#   GATES_t  = bias + x_t W_ih'          a chunk of steps at once, still in cache when read
#   GATES_t += h_{t-1} W_hh'
#   h_t, c_t = cell(GATES_t, ...)        both tile by tile
#   h_t      = m_t W_hr'                 with a projection, m_t being the cell's output
#
# Cost: 2 T B G H (I + R) FLOP, plus 2 T B H P; every step reads the packed W_hh once per slab.

cdef enum:
    # rows (t, b) projected at once, so that they are still in L2 when the scan reads them
    CHUNK_ROWS = 256


cdef struct Forward:
    Part part
    Packed at
    Py_ssize_t p0, p1           # its panels of units
    Py_ssize_t q0, q1           # its panels of the projection
    Py_ssize_t chunk            # steps projected at once
    real *scratch               # (chunk, n, gate_row) where the gates are not kept
    const real **x_row          # chunk * n
    real **gate_row
    Rows rows
    real **h_out                # y's rows: where the next state goes
    real **c_out
    real **h_in                 # what W_hh is applied to
    real *masked                # (n, R) with recurrent dropout
    const real **zoneout_h      # rows, NULL without
    const real **zoneout_c


cdef void forward_layout(Forward *f, char **arena) noexcept nogil:
    cdef Job *job = f.part.job
    cdef const Shape *s = &job.shape
    cdef Py_ssize_t n = f.part.n, pointer = sizeof(void *)
    f.chunk = imin(job.T, 1 + (CHUNK_ROWS - 1) // (n if n > 0 else 1))
    f.part.tail = <real *>take(arena, tail_bytes(s))
    f.part.zero = <real *>take(arena, (s.H + s.R + s.tile_width) * sizeof(real))
    f.scratch = <real *>take(arena, 0 if job.gates != NULL
                             else f.chunk * n * s.gate_row * sizeof(real))
    f.x_row = <const real **>take(arena, f.chunk * n * pointer)
    f.gate_row = <real **>take(arena, f.chunk * n * pointer)
    f.rows.row[H_PREV] = <real **>take(arena, n * pointer)
    f.rows.row[H] = <real **>take(arena, n * pointer)
    f.rows.row[C_PREV] = <real **>take(arena, n * pointer) if s.cell.has_c else NULL
    f.rows.row[C] = <real **>take(arena, n * pointer) if s.cell.has_c else NULL
    f.h_out = <real **>take(arena, n * pointer) if s.P > 0 or job.zoneout else f.rows.row[H]
    f.c_out = <real **>take(arena, n * pointer) if job.zoneout else f.rows.row[C]
    f.zoneout_h = <const real **>take(arena, n * pointer)
    f.zoneout_c = <const real **>take(arena, n * pointer)
    f.h_in = <real **>take(arena, n * pointer) if job.recurrent_mask != NULL else f.rows.row[H_PREV]
    f.masked = <real *>take(arena, n * s.R * sizeof(real) if job.recurrent_mask != NULL else 0)


cdef void forward_project(Forward *f, Py_ssize_t s0, Py_ssize_t s1,
                          Py_ssize_t active) noexcept nogil:
    """GATES = bias + x W_ih' for the rows of steps s0:s1."""
    cdef Job *job = f.part.job
    cdef const Shape *shape = &job.shape
    cdef Py_ssize_t s, i, b, t, k, M = 0, unit
    cdef Py_ssize_t apart = (shape.cell.planes - shape.cell.gates) * VL
    cdef Product p
    for s in range(s0, s1):
        active = active_rows(&f.part, s, active)
        for i in range(active):
            b = row_of(&f.part, i)
            t = time_of(job, b, s)
            f.x_row[M] = job.x + t * job.x_t + b * job.x_b
            if job.gates != NULL:
                f.gate_row[M] = job.gates + (t * job.B + b) * shape.gate_row
            else:
                f.gate_row[M] = f.scratch + M * shape.gate_row
            M += 1
    p.K, p.nv, p.w, p.p0, p.p1 = shape.I, shape.nv, job.packed + f.at.w_ih, f.p0, f.p1
    p.init = job.packed + f.at.bias
    p.panel_stride = shape.units * shape.cell.planes * VL
    p.columns = shape.gate_row
    p.tail = f.part.tail
    product(&p, f.x_row, f.gate_row, M)
    if shape.cell.planes > shape.cell.gates:    # what stays apart from x starts from its own bias
        for i in range(M):
            for k in range(f.p0, f.p1):
                unit = (k * shape.cell.planes + shape.cell.gates) * VL
                memcpy(f.gate_row[i] + unit, p.init + unit, apart * sizeof(real))


cdef void forward_rows(Forward *f, Py_ssize_t s, Py_ssize_t active) noexcept nogil:
    """Point at every active row's states before and after step s."""
    cdef Job *job = f.part.job
    cdef const Shape *shape = &job.shape
    cdef Py_ssize_t i, b, t, before
    cdef real *h_prev
    cdef real *c_prev
    cdef real *c_out
    for i in range(active):
        b = row_of(&f.part, i)
        t = time_of(job, b, s)
        before = t + 1 if job.reverse else t - 1
        f.h_out[i] = job.y + t * job.y_t + b * job.y_b
        if shape.P > 0 or job.zoneout:
            f.rows.row[H][i] = job.m + t * job.m_t + b * shape.H
        h_prev = job.y + before * job.y_t + b * job.y_b
        if s == 0:
            h_prev = f.part.zero if job.h0 == NULL else <real *>job.h0 + b * shape.R
        if is_reset(job, t, b):
            h_prev = f.part.zero
        f.rows.row[H_PREV][i] = h_prev
        if job.recurrent_mask != NULL:
            f.h_in[i] = f.masked + i * shape.R
            mask_row(f.h_in[i], h_prev, job.recurrent_mask + b * shape.R, shape.R)
        if job.zoneout:
            f.zoneout_h[i] = row_of_step(job.zoneout_h, job, t, b)
            f.zoneout_c[i] = row_of_step(job.zoneout_c, job, t, b)
        if shape.cell.has_c:
            c_prev = c_out = job.c_n + b * shape.H
            if job.c != NULL:
                c_out = job.c + t * job.c_t + b * job.c_b
                c_prev = job.c + before * job.c_t + b * job.c_b
            if s == 0:
                c_prev = f.part.zero if job.c0 == NULL else <real *>job.c0 + b * shape.H
            if is_reset(job, t, b):
                c_prev = f.part.zero
            f.rows.row[C_PREV][i] = c_prev
            f.c_out[i] = c_out
            if job.zoneout:
                f.rows.row[C][i] = job.m_c + t * job.m_c_t + b * shape.H


cdef void zoneout_blend(Forward *f, Py_ssize_t i, Py_ssize_t n, Py_ssize_t unit,
                        Py_ssize_t width) noexcept nogil:
    """The states of n rows from what the cell made of them and those before."""
    cdef Py_ssize_t valid = imin(width, f.part.job.shape.H - unit), r
    cdef real ***row = f.rows.row
    for r in range(i, i + n):
        blend_row(f.h_out[r] + unit, row[H][r] + unit, row[H_PREV][r] + unit,
                  at_unit(f.zoneout_h[r], unit), valid)
        if row[C] != NULL:
            blend_row(f.c_out[r] + unit, row[C][r] + unit, row[C_PREV][r] + unit,
                      at_unit(f.zoneout_c[r], unit), valid)


cdef inline void forward_cell(Forward *f, Py_ssize_t i, Py_ssize_t n, Py_ssize_t unit,
                              Py_ssize_t width) noexcept nogil:
    call_cell(&f.part, &f.rows, i, n, unit, width, NULL, True)
    if f.part.job.zoneout:
        zoneout_blend(f, i, n, unit, width)


cdef inline void forward_panels(Forward *f, Py_ssize_t panel, Py_ssize_t panels, Py_ssize_t i,
                                Py_ssize_t n) noexcept nogil:
    """The cell of some panels of n rows, together at most 4 vectors of units, unless
    it waits for all panels."""
    cdef const Shape *s = &f.part.job.shape
    if not s.cell.whole_rows:
        forward_cell(f, i, n, panel * s.units * VL, panels * s.units * VL)


cdef void forward_whole_rows(Forward *f, Py_ssize_t active) noexcept nogil:
    """The cell that waits for all panels."""
    cdef const Shape *s = &f.part.job.shape
    cdef Py_ssize_t i
    if s.cell.whole_rows:
        for i in range(active):
            forward_cell(f, i, 1, 0, s.params_plane)


cdef void forward_row(Forward *f, real *gates) noexcept nogil:
    """A step with one active row."""
    cdef Job *job = f.part.job
    cdef const Shape *s = &job.shape
    cdef Py_ssize_t K = state_columns(s), reals = K * s.nv * VL
    cdef Py_ssize_t stride = s.units * s.cell.planes * VL
    cdef Py_ssize_t panel = f.p0, n, p, together = max(1, 4 // s.units)
    cdef Py_ssize_t first_plane = (s.cell.planes - s.cell.gates) * VL
    while panel < f.p1:
        n = imin(ROW_PANELS, f.p1 - panel)
        row_tile(n, s.nv, f.h_in[0], 0, K, job.packed + f.at.w_hh + panel * reals, reals,
                 gates + panel * stride + first_plane, stride)
        p = panel
        panel += n
        while p < panel:
            forward_panels(f, p, imin(together, panel - p), 0, 1)
            p += together


cdef void forward_tiles(Forward *f, Py_ssize_t panel, Py_ssize_t k0, Py_ssize_t k1, Py_ssize_t i,
                        Py_ssize_t end) noexcept nogil:
    """GATES += h_{t-1} W_hh' of rows i : end, one panel, columns k0:k1 of the state."""
    cdef const Shape *s = &f.part.job.shape
    cdef Py_ssize_t width = s.nv * VL, left = ceil_div(end - i, tile_rows(s.nv)), n
    cdef Py_ssize_t col = (panel * s.units * s.cell.planes + s.cell.planes - s.cell.gates) * VL
    cdef const real *w = f.part.job.packed + f.at.w_hh + (panel * state_columns(s) + k0) * width
    while left > 0:
        n = ceil_div(end - i, left)
        tile(n, s.nv, <const real **>f.h_in + i, k0, k1, w, NULL, f.rows.row[GATES] + i, col)
        i += n
        left -= 1


cdef void forward_step(Forward *f, real **gates, Py_ssize_t active) noexcept nogil:
    """All of a step, panel by panel. The cell follows the last block of k a few tiles at a time,
    while they are in L1; a call for every tile would cost more than the cell of 3 vectors."""
    cdef const Shape *s = &f.part.job.shape
    cdef Py_ssize_t K = state_columns(s), most = tile_rows(s.nv)
    cdef Py_ssize_t group = MAX_ROWS // most * most, panel, k0, i, end
    f.rows.row[GATES] = gates
    if active == 1:
        forward_row(f, gates[0])
        forward_whole_rows(f, 1)
        return
    for panel in range(f.p0, f.p1):
        k0 = 0
        while k0 + K_BLOCK < K:
            forward_tiles(f, panel, k0, k0 + K_BLOCK, 0, active)
            k0 += K_BLOCK
        i = 0
        while i < active:
            end = imin(i + group, active)
            forward_tiles(f, panel, k0, K, i, end)
            forward_panels(f, panel, 1, i, end - i)
            i = end
    forward_whole_rows(f, active)


cdef void forward_projection(Forward *f, Py_ssize_t active) noexcept nogil:
    """h = m W_hr' for the active rows."""
    cdef Product p
    p.K, p.nv, p.w, p.p0, p.p1 = f.part.job.shape.H, 4, f.part.job.packed + f.at.w_hr, f.q0, f.q1
    p.init = f.part.zero
    p.panel_stride = 4 * VL
    p.columns = f.part.job.shape.P
    p.tail = f.part.tail
    product(&p, <const real **>f.rows.row[H], f.h_out, active)


cdef void forward_finish(Forward *f) noexcept nogil:
    """Final states, and zeros past every sequence's end, for this thread's share of the rows."""
    cdef Job *job = f.part.job
    cdef const Shape *s = &job.shape
    cdef Py_ssize_t i = f.part.own, b, t, last, n
    cdef const real *h
    cdef const real *c
    while i < f.part.n:
        b = row_of(&f.part, i)
        n = length_of(job, b)
        last = time_of(job, b, n - 1)
        h = f.part.zero if job.h0 == NULL else <real *>job.h0 + b * s.R
        if n > 0:
            h = job.y + last * job.y_t + b * job.y_b
        memcpy(job.h_n + b * s.R, h, s.R * sizeof(real))
        if s.cell.has_c and (n == 0 or job.c != NULL):
            c = f.part.zero if job.c0 == NULL else <real *>job.c0 + b * s.H
            if n > 0:
                c = job.c + last * job.c_t + b * job.c_b
            memcpy(job.c_n + b * s.H, c, s.H * sizeof(real))
        for t in range(n, job.T):
            memset(job.y + t * job.y_t + b * job.y_b, 0, s.R * sizeof(real))
            if job.c != NULL:
                memset(job.c + t * job.c_t + b * job.c_b, 0, s.H * sizeof(real))
        i += f.part.own_step


cdef void forward_scan(Forward *f) noexcept nogil:
    cdef Py_ssize_t s0 = 0, s1, s, active = f.part.n, row
    while s0 < f.part.steps:
        s1 = imin(s0 + f.chunk, f.part.steps)
        forward_project(f, s0, s1, active)
        row = 0
        for s in range(s0, s1):
            active = active_rows(&f.part, s, active)
            forward_rows(f, s, active)
            forward_step(f, f.gate_row + row, active)
            row += active
            sync(&f.part)
            if f.part.job.shape.P > 0:
                forward_projection(f, active)
                sync(&f.part)
        s0 = s1
    forward_finish(f)
