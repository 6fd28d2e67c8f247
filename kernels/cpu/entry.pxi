# The Python entries: arrays to pointers, scratch, threads. One parallel region per
# call, without the GIL.

cdef Weights weights_of(object arrays) except *:
    cdef Weights w
    memset(&w, 0, sizeof(Weights))
    if arrays is not None:
        w_ih, w_hh, b_ih, b_hh, w_hr, params = arrays
        w.w_ih, w.w_hh = view(w_ih).data, view(w_hh).data
        w.b_ih, w.b_hh, w.w_hr = view(b_ih).data, view(b_hh).data, view(w_hr).data
        w.params = view(params).data
    return w


cdef Cell cell_from(object which) except *:
    """The cell of a number of cells.h, or of a `contract.CompiledCell`."""
    cdef Cell c
    if isinstance(which, int):
        return cell_of(which)
    c.gates, c.planes, c.has_c = which.gates, which.gates + which.split, which.has_c
    c.dh_direct, c.recurrent, c.params = which.dh_direct, which.recurrent, which.params
    c.saves_gates, c.whole_rows = True, False
    c.forward, c.backward = <CellFn><size_t>which.forward, <CellFn><size_t>which.backward
    return c


cdef Job job_of(object which, object scan) except *:
    cdef Job j
    cdef View v
    cdef Cell cell = cell_from(which)
    T, B, I, hidden, P = scan.sizes
    j.T, j.B = T, B
    j.shape = shape_of(&cell, I, hidden, P)
    j.reverse = scan.reverse
    j.lengths, j.order = <int64_t *>view(scan.lengths).data, <int64_t *>view(scan.order).data
    j.resets = <uint8_t *>view(scan.resets).data
    v = view(scan.x)
    j.x, j.x_t, j.x_b = v.data, v.stride[0], v.stride[1]
    j.h0, j.c0, j.packed = view(scan.h0).data, view(scan.c0).data, view(scan.packed).data
    v = view(scan.y)
    j.y, j.y_t, j.y_b = v.data, v.stride[0], v.stride[1]
    j.h_n, j.c_n = view(scan.h_n).data, view(scan.c_n).data
    v = view(scan.c)
    j.c, j.c_t, j.c_b = v.data, v.stride[0], v.stride[1]
    j.gates = view(scan.gates).data
    v = view(scan.m)
    j.m, j.m_t = v.data, v.stride[0]
    if scan.m is not None and scan.m.shape[0] == 1:
        j.m_t = 0
    j.zoneout, j.recurrent_mask, j.zoneout_h, j.zoneout_c = False, NULL, NULL, NULL
    if scan.noise is not None:
        add_noise(&j, scan.noise)
        j.zoneout = scan.m is not None and P == 0
    return j


cdef int add_noise(Job *j, object noise) except -1:
    cdef View v = view(noise.m_c)
    j.m_c, j.m_c_t = v.data, v.stride[0]
    if noise.m_c is not None and noise.m_c.shape[0] == 1:
        j.m_c_t = 0
    j.recurrent_mask = view(noise.recurrent_mask).data
    j.zoneout_h, j.zoneout_c = view(noise.zoneout_h).data, view(noise.zoneout_c).data
    return 0


cdef int add_gradients(Job *j, object scan) except -1:
    cdef View v
    j.weights, j.d = weights_of(scan.weights), weights_of(scan.dweights)
    v = view(scan.dy)
    j.dy, j.dy_t, j.dy_b = v.data, v.stride[0], v.stride[1]
    v = view(scan.dc)
    j.dc, j.dc_t, j.dc_b = v.data, v.stride[0], v.stride[1]
    j.dx, j.dh0, j.dc0 = view(scan.dx).data, view(scan.dh0).data, view(scan.dc0).data
    j.limit = INFINITY if scan.limit is None else scan.limit
    return 0


# ---- a call: independent jobs over a team

cdef enum:
    MAX_JOBS = 2                    # the directions of a layer
    BARRIER_BYTES = 128             # two cache lines


cdef struct Call:
    Job jobs[MAX_JOBS]
    Barrier *barriers               # one per job
    char *workspace[MAX_JOBS]       # backward: packed weights, dGATES, dh
    int n_jobs
    bint backward
    bint failed[MAX_JOBS]           # some thread of the job got no memory
    Py_ssize_t l2_bytes


cdef int team_size(Call *call, int threads) noexcept nogil:
    """Threads for all jobs together: whole threads per job, one for all where the work is small."""
    cdef int each, most = 1, i
    for i in range(call.n_jobs):
        each = useful_threads(&call.jobs[i], max(1, threads // call.n_jobs), call.n_jobs)
        most = max(most, each)
    return min(threads, most)


cdef void own_panels(const Part *p, Py_ssize_t columns, Py_ssize_t width, Py_ssize_t *first,
                     Py_ssize_t *end) noexcept nogil:
    """The panels of `width` columns that this thread computes: all, or its share
    where units are split."""
    cdef Py_ssize_t panels = ceil_div(columns, width)
    first[0] = share(panels, p.rank, p.size) if p.by_units else 0
    end[0] = share(panels, p.rank + 1, p.size) if p.by_units else panels


cdef void run_forward(Part part, bint *failed) noexcept nogil:
    cdef Forward f
    cdef const Shape *s = &part.job.shape
    cdef char *arena = NULL
    cdef char *at
    memset(&f, 0, sizeof(Forward))
    f.part = part
    f.at = packed_forward(s)
    f.part.params = part.job.packed + f.at.params
    own_panels(&part, s.H, s.units * VL, &f.p0, &f.p1)
    own_panels(&part, s.P, 4 * VL, &f.q0, &f.q1)
    forward_layout(&f, &arena)
    at = <char *>get_memory(<size_t>arena)
    if at == NULL:
        failed[0] = True
    barrier_wait(part.barrier, part.size)
    if not failed[0]:
        arena = at
        forward_layout(&f, &arena)
        memset(f.part.zero, 0, <char *>f.scratch - <char *>f.part.zero)
        forward_scan(&f)
    free(at)


cdef void run_backward(Part part, char *workspace, bint *failed) noexcept nogil:
    cdef Backward g
    cdef const Shape *s = &part.job.shape
    cdef char *arena = NULL
    cdef char *at
    memset(&g, 0, sizeof(Backward))
    g.part = part
    g.whole = part_of(part.job, NULL, 0, 1, 0)
    backward_shared(&g, &workspace)
    g.part.params = g.w + g.at.params
    own_panels(&part, s.R, 4 * VL, &g.r0, &g.r1)
    own_panels(&part, s.H, 4 * VL, &g.u0, &g.u1)
    backward_layout(&g, &arena)
    at = <char *>get_memory(<size_t>arena)
    if at == NULL:
        failed[0] = True
    barrier_wait(part.barrier, part.size)
    if not failed[0]:
        arena = at
        backward_layout(&g, &arena)
        backward_slots(&g)
        memset(g.part.zero, 0, <char *>g.acc - <char *>g.part.zero)
        pack_backward(s, &part.job.weights, <real *>g.w, <const real **>g.out_row, part.rank,
                      part.size)
        barrier_wait(part.barrier, part.size)
        backward_scan(&g)
    free(at)


cdef void backward_shared(Backward *g, char **arena) noexcept nogil:
    """The job's workspace: the same layout for every thread."""
    cdef Job *job = g.part.job
    cdef const Shape *s = &job.shape
    g.at = packed_backward(s)
    g.chunk = min(job.T, 1 + (PRODUCT_ROWS - 1) // max(job.B, 1))
    g.ring = g.chunk + 1
    g.w = <real *>take(arena, g.at.total * sizeof(real))
    g.dgates = <real *>take(arena, g.ring * job.B * s.dgates_row * sizeof(real))
    g.dh = <real *>take(arena, g.ring * job.B * s.P * sizeof(real))


cdef void run_job(Call *call, int job, int rank, int size) noexcept nogil:
    cdef Barrier *barrier = <Barrier *>(<char *>call.barriers + job * BARRIER_BYTES)
    cdef Part part = part_of(&call.jobs[job], barrier, rank, size, call.l2_bytes)
    if call.backward:
        run_backward(part, call.workspace[job], &call.failed[job])
    else:
        run_forward(part, &call.failed[job])


cdef void run_member(Call *call, int rank, int size) noexcept nogil:
    """Threads are dealt out to the jobs in turn; fewer threads than jobs run
    one job after the other."""
    cdef int n = call.n_jobs, job
    if size >= n:
        job = rank % n
        run_job(call, job, rank // n, (size - job + n - 1) // n)
    else:
        for job in range(n):
            if job % size == rank:
                run_job(call, job, 0, 1)


cdef void team_member(void *call) noexcept nogil:
    run_member(<Call *>call, gomp.rank(), gomp.size())


cdef int run(Call *call, int threads) except -1:
    cdef int i
    cdef bint failed = False
    cdef Backward g
    cdef char *arena
    with nogil:
        threads = team_size(call, threads) if gomp.parallel != NULL else 1
        call.barriers = <Barrier *>get_memory(BARRIER_BYTES * MAX_JOBS)
        failed = call.barriers == NULL
        if not failed:
            memset(call.barriers, 0, BARRIER_BYTES * MAX_JOBS)
        for i in range(call.n_jobs):
            call.workspace[i] = NULL
            if call.backward and not failed:
                g.part.job, arena = &call.jobs[i], NULL
                backward_shared(&g, &arena)
                call.workspace[i] = <char *>get_memory(<size_t>arena)
                failed = call.workspace[i] == NULL
        if not failed:
            if threads == 1:
                run_member(call, 0, 1)
            else:
                gomp.parallel(team_member, call, threads, 0)
        for i in range(call.n_jobs):
            failed = failed or call.failed[i]
            free(call.workspace[i])
        free(call.barriers)
    if failed:
        raise MemoryError("fastseq: no memory for the scan's scratch")
    return 0


cdef int run_scans(object cell, list scans, int threads, Py_ssize_t l2_bytes,
                   bint backward) except -1:
    cdef Call call
    cdef int i
    call.n_jobs, call.backward, call.l2_bytes = len(scans), backward, l2_bytes
    call.barriers = NULL
    for i in range(call.n_jobs):
        call.jobs[i], call.failed[i] = job_of(cell, scans[i]), False
        if backward:
            add_gradients(&call.jobs[i], scans[i])
    return run(&call, threads)


def forward(cell, list scans, int threads, Py_ssize_t l2_bytes):
    """Run one or two independent scans forward. `threads` is the most to use, `l2_bytes` a core's
    L2; the cell is a number of cells.h or a CompiledCell, here and below."""
    run_scans(cell, scans, threads, l2_bytes, False)


def backward(cell, list scans, int threads, Py_ssize_t l2_bytes):
    """Backpropagation through time of the same scans: dx, dh0, dc0 and the weights' gradients."""
    run_scans(cell, scans, threads, l2_bytes, True)
