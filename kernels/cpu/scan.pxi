# What the forward and the backward scan share: a job (one direction of one layer), who does which
# part of it, and the tile a cell is called on.
#
# A scan step s = 0, 1, ... of row b is at time t = s, or len(b) - 1 - s in the reverse
# direction. Rows are kept by descending length, so the rows that are active at a step come first
# and only they are computed.
#
# Two ways to share one job, chosen by its shapes; neither changes the order of any sum:
#   slab    every thread runs the whole scan of its own rows: no barrier, but each reads all
#           weights every step
#   units   every thread runs all rows of its own units, whose weights stay in its cache: one
#           barrier a step

cdef struct Job:
    Py_ssize_t T, B
    Shape shape
    bint reverse
    const int64_t *lengths      # (B,) or NULL: all T
    const int64_t *order        # (B,) rows by descending length; NULL with lengths NULL
    const uint8_t *resets       # (T, B) or NULL
    const real *x               # x[t * x_t + b * x_b + i]
    Py_ssize_t x_t, x_b
    const real *h0              # (B, R) or NULL: zeros
    const real *c0              # (B, H)
    const real *packed          # forward only
    real *y                     # read by backward
    Py_ssize_t y_t, y_b
    real *h_n                   # (B, R); backward: its gradient, or NULL
    real *c_n                   # (B, H)
    real *c                     # cell states of all steps, or NULL
    Py_ssize_t c_t, c_b
    real *gates                 # (T, B, gate_row) for backward, or NULL
    # m[t * m_t + b * H + u]: the cell's h' before projection or zoneout, or NULL
    real *m
    Py_ssize_t m_t              # 0 where only the step at hand is kept
    real *m_c                   # zoneout: likewise the cell's c'
    Py_ssize_t m_c_t
    bint zoneout
    const real *recurrent_mask  # (B, R) or NULL
    const real *zoneout_h       # (T, B, H) or NULL: 0
    const real *zoneout_c
    # backward only
    Weights weights
    const real *dy              # (T, B, ...) or NULL
    Py_ssize_t dy_t, dy_b
    const real *dc              # gradient of c, or NULL
    Py_ssize_t dc_t, dc_b
    real *dx                    # (T, B, I) or NULL
    real *dh0                   # (B, R)
    real *dc0                   # (B, H)
    Weights d                   # the weights' gradients
    real limit                  # of what flows from one step to the one before; infinite: none


cdef struct Part:               # one thread's part of one job
    Job *job
    Barrier *barrier
    int rank, size              # within the job's threads
    bint by_units
    Py_ssize_t first, step, n   # its rows: order[first + i * step], i < n
    Py_ssize_t steps            # longest of its rows
    Py_ssize_t own, own_step    # of those rows, the ones it finishes: own, own + own_step, ...
    const real *params          # packed
    real *zero                  # a row of zeros
    real *tail                  # a tile of every slot


cdef inline Py_ssize_t row_of(const Part *p, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t position = p.first + i * p.step
    return position if p.job.order == NULL else p.job.order[position]


cdef inline Py_ssize_t length_of(const Job *job, Py_ssize_t b) noexcept nogil:
    return job.T if job.lengths == NULL else job.lengths[b]


cdef inline Py_ssize_t time_of(const Job *job, Py_ssize_t b, Py_ssize_t s) noexcept nogil:
    return length_of(job, b) - 1 - s if job.reverse else s


cdef inline Py_ssize_t active_rows(const Part *p, Py_ssize_t s, Py_ssize_t most) noexcept nogil:
    """How many of the part's first `most` rows are longer than s."""
    if p.job.lengths != NULL:
        while most > 0 and p.job.lengths[row_of(p, most - 1)] <= s:
            most -= 1
    return most


cdef inline bint is_reset(const Job *job, Py_ssize_t t, Py_ssize_t b) noexcept nogil:
    return job.resets != NULL and job.resets[t * job.B + b] != 0


cdef inline void sync(const Part *p) noexcept nogil:
    if p.by_units:
        barrier_wait(p.barrier, p.size)


cdef bint split_by_units(const Job *job, int size, Py_ssize_t l2_bytes) noexcept nogil:
    """Slabs need a few rows for every thread and recurrent weights that stay in its L2. Whole
    rows need slabs; and so do as many rows as threads where all columns of h are one panel, which
    in backward one thread would compute."""
    cdef const Shape *s = &job.shape
    if s.cell.whole_rows:
        return False
    cdef Py_ssize_t weights = s.R * s.cell.gates * s.H * sizeof(real)
    cdef Py_ssize_t rows = 1 if s.R <= 4 * VL else SLAB_ROWS
    return s.panels >= size and (job.B < size * rows or 2 * weights > l2_bytes)


cdef int useful_threads(const Job *job, int threads, int n_jobs) noexcept nogil:
    """Threads for n_jobs such jobs, given `threads` for each: one where waking a second thread, or
    a barrier a step, costs more than it gains."""
    cdef const Shape *s = &job.shape
    cdef Py_ssize_t step_flop = 2 * s.R * s.cell.gates * s.H * job.B
    if n_jobs * (step_flop + 2 * s.I * s.cell.gates * s.H * job.B) * job.T < SMALL_JOB:
        return 1
    if threads > 1 and job.B < 2 * threads and step_flop < SMALL_STEP:
        return n_jobs
    return threads * n_jobs


cdef enum:
    # a thread's rows from which slabs beat a barrier a step: with 4 instead of 6, at B 8 to 11,
    # H 128 and 256, training is 1.07 to 1.2 times as fast, forward 0.97 to 1.2 (Emerald Rapids)
    SLAB_ROWS = 4
    SMALL_STEP = 100000         # FLOP; one core does it in about 2 us
    SMALL_JOB = 1000000


cdef Part part_of(Job *job, Barrier *barrier, int rank, int size,
                  Py_ssize_t l2_bytes) noexcept nogil:
    cdef Part p
    p.job, p.barrier, p.rank, p.size = job, barrier, rank, size
    p.by_units = size > 1 and split_by_units(job, size, l2_bytes)
    p.first, p.step, p.n = 0, 1, job.B
    if size > 1 and not p.by_units:
        if job.lengths == NULL:
            p.first = share(job.B, rank, size)
            p.n = share(job.B, rank + 1, size) - p.first
        else:                   # dealt out in turn: every thread gets the same share of long rows
            p.first, p.step = rank, size
            p.n = ceil_div(job.B - rank, size)
    p.own, p.own_step = 0, 1
    if p.by_units:
        p.own, p.own_step = rank, size
    p.steps = length_of(job, row_of(&p, 0)) if p.n > 0 else 0
    return p


# ---- tiles: row[SLOT] is a table of row pointers, one per row of the step; NULL where the cell
# has no such slot

cdef struct Rows:
    real **row[SLOTS]


cdef inline Py_ssize_t tail_planes(const Shape *s) noexcept nogil:
    return s.cell.planes + s.cell.params


cdef inline Py_ssize_t tail_bytes(const Shape *s) noexcept nogil:
    """Room for a tile of every slot, and for one of a product."""
    cdef Py_ssize_t tile = (SLOTS + tail_planes(s)) * s.tail_rows * s.tile_width
    return max(tile, <Py_ssize_t>MAX_ROWS * 4 * VL) * sizeof(real)


cdef inline real *tail_row(const Part *p, int slot, Py_ssize_t r) noexcept nogil:
    """Row r of a slot in `tail`: [SLOTS][tail_rows][tile_width], and behind them
    [tail_rows][planes][tile_width]."""
    cdef const Shape *s = &p.job.shape
    if slot == DGATES:
        return p.tail + (SLOTS * s.tail_rows + r * tail_planes(s)) * s.tile_width
    return p.tail + (slot * s.tail_rows + r) * s.tile_width


cdef inline bint is_input(int slot, bint forward) noexcept nogil:
    return slot == H_PREV or slot == C_PREV or (not forward and H <= slot and slot <= DC_IN)


cdef inline bint is_output(int slot, bint forward) noexcept nogil:
    return slot == H or slot == C if forward else slot >= DGATES


cdef inline void limit_row(real *x, Py_ssize_t n, real limit) noexcept nogil:
    """x into [-limit, limit]; NaN stays."""
    cdef Py_ssize_t k
    for k in range(n):
        x[k] = limit if x[k] > limit else -limit if x[k] < -limit else x[k]


cdef void call_cell(const Part *p, const Rows *rows, Py_ssize_t first, Py_ssize_t n,
                    Py_ssize_t unit, Py_ssize_t width, real *product, bint forward) noexcept nogil:
    """Run the cell on rows first : first + n and units unit : unit + width. Where fewer units are
    left, whole vectors are computed in `tail` and the valid ones copied in and out."""
    cdef const Shape *shape = &p.job.shape
    cdef Py_ssize_t valid = imin(width, shape.H - unit), offset, r, plane, planes
    cdef bint redirect = valid < width
    cdef int slot
    cdef Tile t
    cdef real *at
    t.rows = n
    t.blocks = ceil_div(valid, VL)
    t.dgates_plane = shape.tile_width if redirect else shape.H
    t.units = valid
    t.params, t.params_plane, t.functions = p.params + unit, shape.params_plane, &functions
    for slot in range(SLOTS):
        if slot == DH_PRODUCT:
            for r in range(n):
                t.row[slot][r] = product + r * width
        elif rows.row[slot] != NULL:
            offset = unit * shape.cell.planes if slot == GATES else unit
            for r in range(n):
                at = rows.row[slot][first + r] + offset
                if redirect and slot != GATES:
                    t.row[slot][r] = tail_row(p, slot, r)
                    if is_input(slot, forward):
                        copy_padded(t.row[slot][r], at, valid, width)
                else:
                    t.row[slot][r] = at
    if forward:
        shape.cell.forward(&t)
    else:
        shape.cell.backward(&t)
    if redirect:
        for slot in range(SLOTS):
            if rows.row[slot] != NULL and is_output(slot, forward):
                planes = shape.cell.planes + shape.cell.params if slot == DGATES else 1
                for r in range(n):
                    at = rows.row[slot][first + r] + unit
                    for plane in range(planes):
                        memcpy(at + plane * shape.H, t.row[slot][r] + plane * t.dgates_plane,
                               valid * sizeof(real))
