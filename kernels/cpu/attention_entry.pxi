# The Python entries: arrays to pointers, scratch, threads. One parallel region per
# call, without the GIL.

cdef enum:
    SMALL_WORK = 200000             # FLOP of a call that one thread does before a second one wakes


cdef Heads heads_of(object array, bint packed) except *:
    """(B, heads, positions, columns) with consecutive columns; a sequence of packed rows starts at
    its first row. Of a tuple, strides: the address is NULL."""
    cdef Heads x
    if isinstance(array, tuple):
        x.data, x.b, x.h, x.i = NULL, array[0], array[1], array[2]
        return x
    cdef View v = view(array)
    x.data, x.b, x.h, x.i = v.data, 0 if packed else v.stride[0], v.stride[1], v.stride[2]
    return x


cdef Problem problem_of(object a) except *:
    cdef Problem p
    memset(&p, 0, sizeof(Problem))
    p.B, p.NH, p.NK, p.D, p.DV = a.sizes
    p.group = p.NH // p.NK
    p.q_len, p.kv_len = <int64_t *>view(a.q_lengths).data, <int64_t *>view(a.kv_lengths).data
    p.q_first, p.k_first = <int64_t *>view(a.q_first).data, <int64_t *>view(a.k_first).data
    p.causal, p.left, p.right, p.scale, p.softcap = a.causal, a.left, a.right, a.scale, a.softcap
    p.slopes, p.mask, p.bias = view(a.alibi_slopes), view(a.mask), view(a.bias)
    p.seed, p.threshold, p.keep_scale = a.seed, a.threshold, a.keep_scale
    if a.score_mod is not None:
        p.mod.forward = <ScoreFn><size_t>a.score_mod.forward
        p.mod.backward = <ScoreFn><size_t>a.score_mod.backward
    cdef bint packed = a.q_first is not None
    p.q, p.k, p.v = heads_of(a.q, packed), heads_of(a.k, packed), heads_of(a.v, packed)
    p.o, p.lse = heads_of(a.o, packed), heads_of(a.lse, packed)
    p.d_o, p.dlse = heads_of(a.do, packed), heads_of(a.dlse, packed)
    p.dq, p.dk, p.dv, p.dbias = (heads_of(a.dq, packed), heads_of(a.dk, packed),
                                 heads_of(a.dv, packed), view(a.dbias))
    return p


cdef struct Call:
    Problem p
    bint backward, failed           # some thread got no memory
    Barrier *barrier
    int64_t *counters               # one per wave; or one
    # for next_of_share: decoding's counters, then those of whole heads; backward has one set
    int64_t *taken
    Py_ssize_t whole                # heads that forward takes as one task each
    real *packed                    # keys and values of a wave of other heads
    real *parts                     # of decoding; or of dQ, or NULL: every thread has its own heads
    int64_t *part_first


cdef void run_forward(Call *call, int rank, int size) noexcept nogil:
    cdef Forward f
    cdef Decode d
    cdef char *arena = NULL
    cdef char *at
    memset(&f, 0, sizeof(Forward))
    memset(&d, 0, sizeof(Decode))
    f.p = d.p = &call.p
    f.barrier, f.rank, f.size = call.barrier, rank, size
    d.parts, d.part_first = call.parts, call.part_first
    decode_sizes(&d, size)
    forward_layout(&f, &arena)
    decode_layout(&d, &arena)
    if call.whole > 0:
        take(&arena, head_reals(&call.p, f.block_reals) * sizeof(real))
    at = <char *>get_memory(<size_t>arena)
    if at == NULL:
        call.failed = True
    barrier_wait(call.barrier, size)
    if not call.failed:
        arena = at
        forward_layout(&f, &arena)
        decode_layout(&d, &arena)
        f.pack = <real *>arena
        decode_all(&d, call.barrier, rank, size, call.taken)
        panels_begin()
        forward_all(&f, call.whole, call.packed, call.counters,
                    call.taken + size * COUNTER_STRIDE)
        panels_end()
    free(at)


cdef void run_backward(Call *call, int rank, int size) noexcept nogil:
    cdef Backward g
    cdef char *arena = NULL
    cdef char *at
    memset(&g, 0, sizeof(Backward))
    g.p, g.all_parts, g.part_first = &call.p, call.parts, call.part_first
    backward_layout(&g, &arena)
    at = <char *>get_memory(<size_t>arena)
    if at == NULL:
        call.failed = True
    barrier_wait(call.barrier, size)
    if not call.failed:
        arena = at
        backward_layout(&g, &arena)
        panels_begin()
        if call.parts == NULL:
            backward_heads(&g, rank, size, call.taken)
        else:
            backward_slabs(&g, call.barrier, rank, size, call.counters)
        panels_end()
    free(at)


cdef void run_member(Call *call, int rank, int size) noexcept nogil:
    if call.backward:
        run_backward(call, rank, size)
    else:
        run_forward(call, rank, size)


cdef void team_member(void *call) noexcept nogil:
    run_member(<Call *>call, gomp.rank(), gomp.size())


cdef int useful_threads(const Problem *p, int threads) noexcept nogil:
    """One where the work is done before a second thread wakes."""
    cdef double flop = 0
    cdef Py_ssize_t b
    for b in range(p.B):
        flop += 2.0 * p.NH * p.q_len[b] * p.kv_len[b] * (p.D + p.DV)
    return threads if flop >= SMALL_WORK else 1


cdef bint allocate(Call *call, int threads) noexcept nogil:
    """Everything that threads share; False without memory."""
    cdef const Problem *p = &call.p
    cdef Forward f
    cdef Decode d
    cdef char *none = NULL
    cdef Py_ssize_t reals = 0, b, waves = p.B * p.NK, counted
    counted = 128 + (2 * COUNTER_STRIDE * threads + max(waves, 1)) * sizeof(int64_t)
    call.barrier = <Barrier *>get_memory(counted)
    if call.barrier == NULL:
        return False
    memset(call.barrier, 0, counted)
    call.taken = <int64_t *>(<char *>call.barrier + 128)
    call.counters = call.taken + 2 * COUNTER_STRIDE * threads
    if call.backward and backward_by_heads(p, threads):
        return True
    call.part_first = <int64_t *>get_memory((p.B + 1) * sizeof(int64_t))
    if call.part_first == NULL:
        return False
    if call.backward:
        for b in range(p.B):
            call.part_first[b] = reals
            reals += slabs(p, b) * p.NH * p.q_len[b] * round_up(p.D)
        call.parts = <real *>get_memory(max(reals, 1) * sizeof(real))
        return call.parts != NULL
    memset(&f, 0, sizeof(Forward))
    f.p = d.p = p
    forward_layout(&f, &none)
    decode_sizes(&d, threads)
    for b in range(p.B):
        call.part_first[b] = reals
        if is_decode(p, b):
            reals += p.NK * decode_chunks(&d, b) * decode_rows(p, b) * d.part_row
    call.parts = <real *>get_memory(max(reals, 1) * sizeof(real))
    if call.parts == NULL:
        return False
    call.whole = whole_heads(p, f.block_reals, threads)
    reals = wave_reals(p, call.whole, f.block_reals)
    call.packed = <real *>get_memory(max(reals, 1) * sizeof(real))
    return call.packed != NULL


cdef int run(Call *call, int threads) except -1:
    cdef bint failed
    if call.p.B == 0 or call.p.NH == 0:
        return 0
    with nogil:
        threads = useful_threads(&call.p, threads) if gomp.parallel != NULL else 1
        failed = not allocate(call, threads)
        if not failed:
            if threads == 1:
                run_member(call, 0, 1)
            else:
                gomp.parallel(team_member, call, threads, 0)
        failed = failed or call.failed
        free(call.barrier)
        free(call.packed)
        free(call.parts)
        free(call.part_first)
    if failed:
        raise MemoryError("fastseq: no memory for attention's scratch")
    return 0


cdef int run_arrays(object arrays, int threads, bint backward) except -1:
    cdef Call call
    memset(&call, 0, sizeof(Call))
    call.p, call.backward = problem_of(arrays), backward
    return run(&call, threads)


def forward(arrays, int threads):
    """Fill o and lse of a `contract.Attention`. `threads` is the most to use."""
    run_arrays(arrays, threads, False)


def backward(arrays, int threads):
    """Fill dq, dk and dv, and add to dbias, from o, lse, do and dlse."""
    run_arrays(arrays, threads, True)


cdef class Prepared:
    """A `contract.Attention` of strides, for many calls that give the addresses."""
    cdef Problem p
    cdef object arrays              # they own the lengths

    def __init__(self, arrays):
        self.p, self.arrays = problem_of(arrays), arrays

    cdef Call call(self, size_t q, size_t k, size_t v, size_t kv_lengths):
        cdef Call call
        memset(&call, 0, sizeof(Call))
        call.p = self.p
        call.p.q.data, call.p.k.data, call.p.v.data = <real *>q, <real *>k, <real *>v
        if kv_lengths:
            call.p.kv_len = <int64_t *>kv_lengths
        return call

    def forward(self, size_t q, size_t k, size_t v, size_t kv_lengths, o, lse, int threads):
        """Fill the arrays o and lse, which may be None; kv_lengths 0: those of the arrays."""
        cdef Call call = self.call(q, k, v, kv_lengths)
        call.p.o, call.p.lse = heads_of(o, False), heads_of(lse, False)
        run(&call, threads)

    def backward(self, size_t q, size_t k, size_t v, size_t kv_lengths, size_t o, size_t lse,
                 size_t do, dq, dk, dv, int threads):
        """Fill the arrays dq, dk and dv, which hold zeros."""
        cdef Call call = self.call(q, k, v, kv_lengths)
        call.backward = True
        call.p.o.data, call.p.lse.data, call.p.d_o.data = <real *>o, <real *>lse, <real *>do
        call.p.dq, call.p.dk, call.p.dv = (heads_of(dq, False), heads_of(dk, False),
                                           heads_of(dv, False))
        run(&call, threads)


def score_layout():
    """How compiled code finds its way in a ScoreTile of attention_scores.h: words of 8
    bytes, functions by name."""
    return {
        "lanes": VL,
        "max_keys": MOD_KEYS,
        "words": {
            name: k for k, name in enumerate("score factor blocks b h i j functions".split())
        },
        "functions": {name: k for k, name in enumerate(("exp", "tanh", "sigmoid"))},
    }
