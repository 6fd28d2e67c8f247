# Who does which part of the backward pass, and how the parts of dQ are joined.
#
# A task is one slab of keys of one key/value head: it owns those rows of dK and dV, and leaves its
# part of dQ, of the queries that may attend its keys. Parts are added in the order of the slabs.
# There are at most SLABS of them and they depend on the number of keys alone: neither threads nor
# the batch change a sum, and one head keeps SLABS threads busy.
# Where there are heads enough, a task is a whole head: q and dO are packed once for all its slabs.

cdef bint backward_by_heads(const Problem *p, int threads) noexcept nogil:
    """Whether a task is a whole head: as many for every thread, or so many that one more
    counts little, short enough that a thread's parts and sums stay near, and none that
    shares a bias gradient."""
    cdef Py_ssize_t heads = p.B * p.NK
    if p.dbias.data != NULL and (p.dbias.stride[0] == 0 or p.dbias.stride[1] == 0):
        return False
    if max(most_of(p.q_len, p.B), most_of(p.kv_len, p.B)) > SEGMENT:
        return False
    return heads % threads == 0 or heads >= 8 * threads


cdef void find_parts(Backward *g, Py_ssize_t b) noexcept nogil:
    """Where the parts of dQ of sequence b are."""
    g.parts, g.slab_reals, g.head_reals = g.own_part, 0, 0
    if g.all_parts != NULL:
        g.parts, g.head_reals = g.all_parts + g.part_first[b], g.p.q_len[b] * round_up(g.p.D)
        g.slab_reals = g.p.NH * g.head_reals


cdef inline bint may_attend(const Problem *p, Py_ssize_t b, Py_ssize_t i, Py_ssize_t j0,
                            Py_ssize_t j1) noexcept nogil:
    cdef Limits keys
    limits(p, b, i, &keys.lo, &keys.hi)
    return attends(&keys, j0, j1)


cdef Limits slab_queries(const Problem *p, Py_ssize_t b, Py_ssize_t slab) noexcept nogil:
    """Queries lo : hi hold every block with a query that may attend a key of the slab."""
    cdef Py_ssize_t k0 = slab * slab_keys(p, b), k1 = k0 + slab_keys(p, b)
    cdef Limits at
    at.lo, at.hi = 0, p.q_len[b]
    while at.lo < at.hi and not may_attend(p, b, at.lo, k0, k1):
        at.lo += 1
    while at.lo < at.hi and not may_attend(p, b, at.hi - 1, k0, k1):
        at.hi -= 1
    at.lo, at.hi = max(0, at.lo - BACK_ROWS + 1), imin(p.q_len[b], at.hi + BACK_ROWS - 1)
    return at


cdef void start_slab(const Backward *g, Py_ssize_t b, Py_ssize_t h,
                     Py_ssize_t slab) noexcept nogil:
    """Zeros where a block of the slab will add."""
    cdef Limits at = slab_queries(g.p, b, slab)
    memset(dq_part(g, b, slab, h, at.lo), 0, (at.hi - at.lo) * round_up(g.p.D) * sizeof(real))


cdef void add_slab(const Backward *g, Py_ssize_t b, Py_ssize_t h, Py_ssize_t slab) noexcept nogil:
    """A slab's part onto dQ of one head, which slab 0 starts; called in the order of the slabs."""
    cdef const Problem *p = g.p
    cdef Limits at = slab_queries(p, b, slab)
    cdef Py_ssize_t i
    for i in range(at.lo, at.hi):
        if slab > 0:
            add_row(of_query(p, &p.dq, b, h, i), dq_part(g, b, slab, h, i), p.D)
        else:
            copy_row(of_query(p, &p.dq, b, h, i), dq_part(g, b, slab, h, i), p.D)
    if slab == 0:
        for i in range(p.q_len[b]):
            if not at.lo <= i < at.hi:
                memset(of_query(p, &p.dq, b, h, i), 0, p.D * sizeof(real))


cdef void backward_task(Backward *g, Py_ssize_t b, Py_ssize_t hk, Py_ssize_t slab0,
                        Py_ssize_t slab1) noexcept nogil:
    """Slabs slab0 : slab1 of a head."""
    cdef const Problem *p = g.p
    cdef Py_ssize_t k0 = slab0 * slab_keys(p, b), k1 = imin(slab1 * slab_keys(p, b), p.kv_len[b])
    cdef Py_ssize_t L = p.q_len[b], h, i, slab
    find_parts(g, b)
    g.keys = k1 - k0
    memset(g.dk, 0, sums_reals(g.keys, p.D) * sizeof(real))
    memset(g.dv, 0, sums_reals(g.keys, p.DV) * sizeof(real))
    for h in range(hk * p.group, (hk + 1) * p.group):
        i = 0
        while i < L:
            pack_segment(g, b, h, i, imin(SEGMENT, L - i))
            for slab in range(slab0, slab1):
                if i == 0:
                    start_slab(g, b, h, slab)
                backward_segment(g, b, h, i, imin(SEGMENT, L - i), slab, k0)
                if g.all_parts == NULL:
                    add_slab(g, b, h, slab)
            i += SEGMENT
    copy_sums(g.dk, g.keys, p.D, of_key(p, &p.dk, b, hk, k0), p.dk.i)
    copy_sums(g.dv, g.keys, p.DV, of_key(p, &p.dv, b, hk, k0), p.dv.i)


# what a task spans: bias gradients that several would add to are one task's
cdef struct Split:
    Py_ssize_t batches, heads, slabs


cdef Split split_of(const Problem *p) noexcept nogil:
    """Tasks are slabs x batches x heads of the split; each runs what the split leaves
    out, in ascending order."""
    cdef Split s
    cdef const View *d = &p.dbias
    s.batches, s.heads, s.slabs = p.B, p.NK, SLABS
    if d.data != NULL:
        if d.stride[0] == 0:
            s.batches = 1
        if d.stride[1] == 0:
            s.heads = 1
        if d.stride[3] == 0:
            s.slabs = 1
    return s


cdef void backward_slabs(Backward *g, Barrier *barrier, int rank, int size,
                         int64_t *counter) noexcept nogil:
    """A slab of all heads before the next one: under a causal mask the
    first slab is the longest."""
    cdef const Problem *p = g.p
    cdef Split s = split_of(p)
    cdef Py_ssize_t b, hk, h, slab, b0, h0, s0, n
    cdef int64_t task = next_task(counter)
    while task < s.batches * s.heads * s.slabs:
        s0, b0, h0 = task // (s.batches * s.heads), task // s.heads % s.batches, task % s.heads
        b = b0
        while b < p.B:
            hk = h0
            while hk < p.NK:
                slab = s0
                while slab < slabs(p, b):
                    backward_task(g, b, hk, slab, slab + 1)
                    slab += s.slabs
                hk += s.heads
            b += s.batches
        task = next_task(counter)
    barrier_wait(barrier, size)
    n = rank
    while n < p.B * p.NH:
        b, h = n // p.NH, n % p.NH
        find_parts(g, b)
        for slab in range(slabs(p, b)):
            add_slab(g, b, h, slab)
        n += size


cdef void backward_heads(Backward *g, int rank, int size, int64_t *taken) noexcept nogil:
    cdef const Problem *p = g.p
    cdef Py_ssize_t b
    cdef int64_t task = next_of_share(taken, p.B * p.NK, rank, size)
    while task >= 0:
        b = task // p.NK
        backward_task(g, b, task % p.NK, 0, slabs(p, b))
        task = next_of_share(taken, p.B * p.NK, rank, size)
