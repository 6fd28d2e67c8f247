# Who does which part of the forward pass.
#
# Where there are heads enough, a task is a whole head: the thread that packs its keys and values
# reads them, from its own L2. Other heads go in waves: all threads pack a few together, and then
# take blocks of queries.

cdef enum:
    # packed, a head that is one task: L 2048, D 64, and the headers of its blocks. From 8 heads on,
    # L 256 to 1024 is 1.06 to 1.2 times as fast as in waves, L 2048 1.05, heads of 2 and 4 MiB are
    # no faster (two threads, Emerald Rapids)
    WHOLE_BYTES = 1 << 20 | 1 << 12
    # packed, the heads of a wave: two of L 2048, D 128. With 4 MiB, one, they took 1.02 to 1.05
    # times as long; with 8 MiB, which a young process has anew at every call, a window at L 2048
    # 1.1 times (Zen 3)
    PACK_BYTES = 4718592


cdef Py_ssize_t head_reals(const Problem *p, Py_ssize_t block_reals) noexcept nogil:
    """The longest head's packed reals."""
    cdef Py_ssize_t b, blocks = 0
    for b in range(p.B):
        blocks = max(blocks, key_blocks(p, b))
    return blocks * block_reals


cdef Py_ssize_t whole_heads(const Problem *p, Py_ssize_t block_reals, int threads) noexcept nogil:
    """How many heads are one task each, the first ones: as many for every thread, or all where one
    more counts little."""
    cdef Py_ssize_t heads = p.B * p.NK
    if heads < 4 * threads or head_reals(p, block_reals) * <Py_ssize_t>sizeof(real) > WHOLE_BYTES:
        return 0
    return heads if heads >= 8 * threads else heads - heads % threads


cdef inline Py_ssize_t query_blocks(const Problem *p, Py_ssize_t b) noexcept nogil:
    """Blocks of one head; 0 where decode has done it."""
    return 0 if is_decode(p, b) else ceil_div(p.q_len[b] * p.group, QUERY_ROWS)


cdef void forward_heads(Forward *f, Py_ssize_t heads, int64_t *taken) noexcept nogil:
    cdef const Problem *p = f.p
    cdef Py_ssize_t b, hk, block
    cdef int64_t n = next_of_share(taken, heads, f.rank, f.size)
    while n >= 0:
        b, hk = n // p.NK, n % p.NK
        for block in range(key_blocks(p, b)):
            pack_block(f, b, hk, block, f.pack + block * f.block_reals)
        for block in range(query_blocks(p, b)):
            forward_block(f, b, hk, block * QUERY_ROWS, f.pack)
        n = next_of_share(taken, heads, f.rank, f.size)


cdef void forward_wave(Forward *f, Py_ssize_t n0, Py_ssize_t n1, real *packed,
                       int64_t *counter) noexcept nogil:
    """Heads n0 : n1 (n = b * NK + hk): all threads pack, then take blocks of queries,
    a head's longest first."""
    cdef const Problem *p = f.p
    cdef Py_ssize_t n, b, block, items = 0, blocks
    cdef real *at = packed
    cdef int64_t task, done = 0
    for n in range(n0, n1):
        b = n // p.NK
        for block in range(key_blocks(p, b)):
            if items % f.size == f.rank:
                pack_block(f, b, n % p.NK, block, at + block * f.block_reals)
            items += 1
        at += key_blocks(p, b) * f.block_reals
    barrier_wait(f.barrier, f.size)
    task = next_task(counter)
    at = packed
    for n in range(n0, n1):
        b = n // p.NK
        blocks = query_blocks(p, b)
        while task < done + blocks:
            forward_block(f, b, n % p.NK, (done + blocks - 1 - task) * QUERY_ROWS, at)
            task = next_task(counter)
        done += blocks
        at += key_blocks(p, b) * f.block_reals
    barrier_wait(f.barrier, f.size)


cdef Py_ssize_t wave_end(const Problem *p, Py_ssize_t n0, Py_ssize_t block_reals) noexcept nogil:
    """Heads n0 : end fit PACK_BYTES together, or end = n0 + 1."""
    cdef Py_ssize_t n = n0, reals = 0
    while n < p.B * p.NK:
        reals += key_blocks(p, n // p.NK) * block_reals
        if n > n0 and reals * <Py_ssize_t>sizeof(real) > PACK_BYTES:
            break
        n += 1
    return n


cdef Py_ssize_t wave_reals(const Problem *p, Py_ssize_t n0, Py_ssize_t block_reals) noexcept nogil:
    """The packed reals of the largest wave from head n0 on."""
    cdef Py_ssize_t n, most = 0, reals
    while n0 < p.B * p.NK:
        reals = 0
        for n in range(n0, wave_end(p, n0, block_reals)):
            reals += key_blocks(p, n // p.NK) * block_reals
        most = max(most, reals)
        n0 = wave_end(p, n0, block_reals)
    return most


cdef void forward_all(Forward *f, Py_ssize_t whole, real *packed, int64_t *counters,
                      int64_t *taken) noexcept nogil:
    """The first `whole` heads one by one, the others in waves, by way of `packed`."""
    cdef const Problem *p = f.p
    cdef Py_ssize_t n0 = whole, n1, wave = 0
    forward_heads(f, whole, taken)
    while n0 < p.B * p.NK:
        n1 = wave_end(p, n0, f.block_reals)
        forward_wave(f, n0, n1, packed, counters + wave)
        n0 = n1
        wave += 1
