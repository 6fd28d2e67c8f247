# The backward scan of one job, and the products after it.
#
#   dh_t = dy_t + dGATES_{t+1} W_hh + what reached h_t directly
#   dm_t = dh_t W_hr                                            with a projection
#   dGATES_t, dc_{t-1} = cell'(dh_t, dc_t, saved)               tile by tile, as in forward
#   dx = dGATES W_ih    dW_ih = sum dGATES' x    dW_hh = sum dGATES' h_{t-1}    db = sum dGATES
#
# The products follow the scan chunk by chunk, while the chunk's dGATES are in cache, and
# only a ring of them is kept. Step -1 is the initial state. Cost: twice the forward's
# FLOP, two barriers a chunk.

cdef void keep_dh(Backward *g, Py_ssize_t first, Py_ssize_t n, Py_ssize_t col) noexcept nogil:
    """dh = product + dy + dh_in, kept: the initial state's gradient, or what
    a projection passes on."""
    cdef Py_ssize_t valid = imin(4 * VL, g.part.job.shape.R - col), r, k
    cdef const real *dy
    cdef const real *dh_in
    cdef const real *acc
    cdef real *dh
    for r in range(n):
        acc = g.acc_row[first + r]
        dy = g.rows.row[DY][first + r] + col
        dh_in = g.rows.row[DH_IN][first + r] + col
        dh = g.dh_row[first + r] + col
        for k in range(valid):
            dh[k] = acc[k] + dy[k] + dh_in[k]


cdef void limit_flow(Backward *g, Py_ssize_t first, Py_ssize_t n, Py_ssize_t col) noexcept nogil:
    """acc = product + dh_in, limited, where they come from the step after; of
    dh_in nothing is left."""
    cdef Py_ssize_t valid = imin(4 * VL, g.part.job.shape.R - col), r, k
    cdef real *dh_in
    for r in range(first, first + n):
        if g.from_gates[r] != g.part.zero:
            dh_in = g.rows.row[DH_IN][r] + col
            if g.rows.row[DH_IN][r] != g.part.zero:
                for k in range(valid):
                    g.acc_row[r][k] += dh_in[k]
                    dh_in[k] = 0
            limit_row(g.acc_row[r], valid, g.part.job.limit)


cdef void zoneout_split(Backward *g, Py_ssize_t i, Py_ssize_t n, Py_ssize_t unit, Py_ssize_t width,
                        real *product) noexcept nogil:
    """dh and dc of n rows in two: what reaches the cell, and what goes past it."""
    cdef Py_ssize_t H_ = g.part.job.shape.H, valid = imin(width, H_ - unit), r
    cdef real ***row = g.rows.row
    cdef real *dc
    for r in range(i, i + n):
        add_row(product, row[DY][r] + unit, valid)
        add_row(product, row[DH_IN][r] + unit, valid)
        split_row(product, g.past_h + r * H_ + unit, at_unit(g.zoneout_h[r], unit), valid)
        product += width
        if row[DC_IN] != NULL:
            dc = g.dc_in + r * H_ + unit
            memcpy(dc, row[DC_IN][r] + unit, valid * sizeof(real))
            add_row(dc, row[DC_EXTERNAL][r] + unit, valid)
            split_row(dc, g.past_c + r * H_ + unit, at_unit(g.zoneout_c[r], unit), valid)


cdef void zoneout_join(Backward *g, Py_ssize_t i, Py_ssize_t n, Py_ssize_t unit,
                       Py_ssize_t width) noexcept nogil:
    """What went past the cell comes to what it gives the states before."""
    cdef const Shape *s = &g.part.job.shape
    cdef Py_ssize_t valid = imin(width, s.H - unit), r
    for r in range(i, i + n):
        if not s.cell.dh_direct:
            memset(g.dh_row[r] + unit, 0, valid * sizeof(real))
        add_row(g.dh_row[r] + unit, g.past_h + r * s.H + unit, valid)
        if s.cell.has_c:
            add_row(g.rows.row[DC_OUT][r] + unit, g.past_c + r * s.H + unit, valid)


cdef inline void backward_cell(Backward *g, Py_ssize_t i, Py_ssize_t n, Py_ssize_t unit,
                               Py_ssize_t width, real *product) noexcept nogil:
    """The cell of n rows, zoneout around it; what flows back through c is limited."""
    cdef Job *job = g.part.job
    cdef Py_ssize_t r
    if job.zoneout:
        zoneout_split(g, i, n, unit, width, product)
        call_cell(&g.part, &g.cell_rows, i, n, unit, width, product, False)
        zoneout_join(g, i, n, unit, width)
    else:
        call_cell(&g.part, &g.rows, i, n, unit, width, product, False)
    if job.shape.cell.has_c and job.limit < INFINITY:
        for r in range(i, i + n):
            limit_row(g.rows.row[DC_OUT][r] + unit, imin(width, job.shape.H - unit), job.limit)


cdef inline real *acc_at(Backward *g, Py_ssize_t i, Py_ssize_t panel) noexcept nogil:
    """Where row i of a panel is summed: the panels take the same place, unless the
    cell needs whole rows."""
    return g.acc + i * g.acc_stride + (panel * 4 * VL if g.part.job.shape.cell.whole_rows else 0)


cdef inline void finish_panel(Backward *g, Py_ssize_t i, Py_ssize_t n, Py_ssize_t panel,
                              bint to_cell, bint flow) noexcept nogil:
    """n rows of a panel, summed, go to the cell, unless that waits for all panels, or are kept as
    dh. `flow`: they come from the step after."""
    cdef Job *job = g.part.job
    cdef Py_ssize_t width = 4 * VL, col = panel * width, R = job.shape.R, r
    cdef const real *mask
    if flow and job.recurrent_mask != NULL:
        for r in range(i, i + n):
            mask = job.recurrent_mask + row_of(&g.part, r) * R + col
            mask_row(g.acc_row[r], g.acc_row[r], mask, imin(width, R - col))
    if flow and job.limit < INFINITY:
        limit_flow(g, i, n, col)
    if not to_cell:
        keep_dh(g, i, n, col)
    elif not job.shape.cell.whole_rows:
        backward_cell(g, i, n, col, width, g.acc_row[i])


cdef void backward_product(Backward *g, const real **a, Py_ssize_t K, const real *w, Py_ssize_t p0,
                           Py_ssize_t p1, Py_ssize_t active, bint to_cell) noexcept nogil:
    """a W panel by panel. In blocks of k, so that a panel's block stays in L2 for all
    rows. Where nothing flows back, at a row's end and before a reset, the row is zero even
    if a weight is not finite."""
    cdef const Shape *s = &g.part.job.shape
    cdef bint flow = a == g.from_gates
    cdef Py_ssize_t panel, i
    if active == 1:
        backward_row(g, a[0], K, w, p0, p1, to_cell, flow)
    else:
        for panel in range(p0, p1):
            backward_panel(g, a, K, w + panel * K * 4 * VL, panel, active, to_cell, flow)
    if to_cell and s.cell.whole_rows:
        for i in range(active):
            backward_cell(g, i, 1, 0, s.params_plane, acc_at(g, i, 0))


cdef void backward_panel(Backward *g, const real **a, Py_ssize_t K, const real *w, Py_ssize_t panel,
                         Py_ssize_t active, bint to_cell, bint flow) noexcept nogil:
    """One panel of all active rows."""
    cdef Py_ssize_t i = 0, k0 = 0, n, left = ceil_div(active, tile_rows(4))
    for n in range(active):
        g.acc_row[n] = acc_at(g, n, panel)
    while k0 == 0 or k0 < K:
        backward_tiles(g, a, k0, imin(k0 + K_BLOCK, K), w + k0 * 4 * VL, active)
        k0 += K_BLOCK
    while left > 0:
        n = ceil_div(active - i, left)
        finish_panel(g, i, n, panel, to_cell, flow)
        i += n
        left -= 1


cdef void backward_row(Backward *g, const real *a, Py_ssize_t K, const real *w, Py_ssize_t p0,
                       Py_ssize_t p1, bint to_cell, bint flow) noexcept nogil:
    """The same for a single row, a few panels at a time."""
    cdef Py_ssize_t width = 4 * VL, panel = p0, n, p
    cdef real *acc
    while panel < p1:
        n = imin(ROW_PANELS, p1 - panel)
        acc = acc_at(g, 0, panel)
        memset(acc, 0, n * width * sizeof(real))
        if a != g.part.zero:
            row_tile(n, 4, a, 0, K, w + panel * K * width, K * width, acc, width)
        for p in range(n):
            g.acc_row[0] = acc + p * width
            finish_panel(g, 0, 1, panel + p, to_cell, flow)
        panel += n


cdef void backward_tiles(Backward *g, const real **a, Py_ssize_t k0, Py_ssize_t k1, const real *w,
                         Py_ssize_t active) noexcept nogil:
    """acc (+)= a[k0:k1] w for all active rows; the first block of k starts from zero."""
    cdef Py_ssize_t i = 0, r, n, end, left = ceil_div(active, tile_rows(4))
    while left > 0:
        n = ceil_div(active - i, left)
        end = k0
        for r in range(i, i + n):
            if a[r] != g.part.zero:
                end = k1
        tile(n, 4, a + i, k0, end, w, g.part.zero if k0 == 0 else NULL, g.acc_row + i, 0)
        for r in range(i, i + n):
            if a[r] == g.part.zero:
                memset(g.acc_row[r], 0, 4 * VL * sizeof(real))
        i += n
        left -= 1


cdef void backward_steps(Backward *g, Py_ssize_t s0, Py_ssize_t s1) noexcept nogil:
    """The scan of steps s1 - 1 down to s0; step -1 is the initial state's."""
    cdef const Shape *shape = &g.part.job.shape
    cdef Py_ssize_t s, i, K = state_rows(shape)
    cdef bint to_cell
    for s in range(s1 - 1, s0 - 1, -1):
        while g.active < g.part.n and length_of(g.part.job, row_of(&g.part, g.active)) > s:
            g.active += 1
        backward_rows(g, s, g.active)
        to_cell = s >= 0 and shape.P == 0
        backward_product(g, g.from_gates, K, g.w + g.at.w_hh, g.r0, g.r1, g.active, to_cell)
        sync(&g.part)
        if s >= 0 and shape.P > 0:
            for i in range(g.active):
                g.rows.row[DY][i] = g.rows.row[DH_IN][i] = g.part.zero
            backward_product(g, <const real **>g.dh_row, shape.P, g.w + g.at.w_hr, g.u0, g.u1,
                             g.active, True)
            sync(&g.part)


cdef void backward_scan(Backward *g) noexcept nogil:
    cdef Py_ssize_t s0, s1 = g.whole.steps, i
    cdef const Shape *shape = &g.part.job.shape
    g.first = True
    while s1 > 0 or g.first:            # once even where every length is 0: gradients are written
        s0 = max(s1 - g.chunk, 0)
        backward_steps(g, s0, s1)
        barrier_wait(g.part.barrier, g.part.size)
        backward_products(g, s0, s1)
        barrier_wait(g.part.barrier, g.part.size)
        g.first = False
        s1 = s0
    backward_steps(g, -1, 0)
    if shape.cell.has_c:        # dc0 is the carried dc, except where the first step was a reset
        i = g.part.own
        while i < g.part.n:
            if g.rows.row[DC_IN][i] != g.rows.row[DC_OUT][i]:
                memcpy(g.rows.row[DC_OUT][i], g.rows.row[DC_IN][i], shape.H * sizeof(real))
            i += g.part.own_step
    finish_gradients(g)
