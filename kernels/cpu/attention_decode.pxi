# Few queries, many keys: a decoding step. The query heads of a group are the rows of one tile, so
# keys and values are read once and not packed; they are cut into chunks of CHUNK_KEYS, whatever the
# thread count, which threads share.
# Each chunk leaves m, l and the weighted values of its rows; they are joined in
# the order of the chunks.
# Cost: S (D + DV) reals read a head. Source: Dao et al., Flash-Decoding, 2023.

cdef enum:
    MOST_DECODE_ROWS = 8            # more rows gain from packed keys
    CHUNK_KEYS = 1024


cdef struct Decode:                 # one thread's
    const Problem *p
    real *q                         # (DECODE_ROWS, round_up(D)), scaled
    real *s                         # (DECODE_ROWS, CHUNK_KEYS + 16)
    real *parts                     # all threads': (heads, chunks, MOST_DECODE_ROWS, part_row)
    Py_ssize_t chunks, part_row     # of the longest sequence; acc (DV) | m | l


cdef inline bint is_decode(const Problem *p, Py_ssize_t b) noexcept nogil:
    return p.q_len[b] * p.group <= MOST_DECODE_ROWS


cdef void decode_layout(Decode *d, char **arena) noexcept nogil:
    d.q = <real *>take(arena, DECODE_ROWS * round_up(d.p.D) * sizeof(real))
    d.s = <real *>take(arena, DECODE_ROWS * (CHUNK_KEYS + 16) * sizeof(real))


cdef void decode_sizes(Decode *d) noexcept nogil:
    cdef Py_ssize_t b
    d.part_row = round_up(d.p.DV) + 16
    d.chunks = 0
    for b in range(d.p.B):
        if is_decode(d.p, b):
            d.chunks = max(d.chunks, max(1, ceil_div(d.p.kv_len[b], CHUNK_KEYS)))


cdef inline real *decode_part(const Decode *d, Py_ssize_t n, Py_ssize_t chunk,
                              Py_ssize_t r) noexcept nogil:
    return d.parts + ((n * d.chunks + chunk) * MOST_DECODE_ROWS + r) * d.part_row


cdef void decode_tile(Decode *d, Py_ssize_t n, Py_ssize_t chunk, Py_ssize_t first,
                      Py_ssize_t rows) noexcept nogil:
    """Rows first : first + rows of head n = b * NK + hk against one chunk."""
    cdef const Problem *p = d.p
    cdef Py_ssize_t b = n // p.NK, hk = n % p.NK, j0 = chunk * CHUNK_KEYS, j1, r, i, h, lo, hi
    cdef Limits at[DECODE_ROWS]
    cdef Limits tile
    cdef RowOptions options[DECODE_ROWS]
    cdef const real *q[DECODE_ROWS]
    cdef real *s[DECODE_ROWS]
    cdef real *acc[DECODE_ROWS]
    cdef const real *query
    cdef const real *v
    j1 = imin(j0 + CHUNK_KEYS, p.kv_len[b])
    tile.lo, tile.hi = j1, j0
    for r in range(rows):
        i, h = (first + r) // p.group, hk * p.group + (first + r) % p.group
        limits(p, b, i, &lo, &hi)
        row_options(p, b, h, i, &options[r])
        if clip(&options[r], lo, hi, j0, j1, &at[r]):
            tile.lo, tile.hi = imin(tile.lo, at[r].lo), max(tile.hi, at[r].hi)
        query = of_query(p, &p.q, b, h, i)
        memset(d.q + r * round_up(p.D), 0, round_up(p.D) * sizeof(real))
        copy_scaled(d.q + r * round_up(p.D), query, p.D, p.scale)
        q[r], s[r] = d.q + r * round_up(p.D), d.s + r * (CHUNK_KEYS + 16)
        acc[r] = decode_part(d, n, chunk, first + r)
        memset(acc[r], 0, d.part_row * sizeof(real))
        acc[r][round_up(p.DV)] = -INFINITY
    if tile.lo >= tile.hi:
        return
    dots(rows, q, of_key(p, &p.k, b, hk, tile.lo), p.k.i, tile.hi - tile.lo, p.D, s)
    for r in range(rows):
        decode_row(&options[r], s[r], &at[r], &tile, acc[r] + round_up(p.DV))
    v = of_key(p, &p.v, b, hk, tile.lo)
    weigh(rows, <const real **>s, v, p.v.i, tile.hi - tile.lo, p.DV, acc)
    for r in range(rows):
        if not all_finite(acc[r], p.DV):
            memset(acc[r], 0, p.DV * sizeof(real))
            weigh_sparse(s[r], 1, v, p.v.i, tile.hi - tile.lo, 1, p.DV, acc[r], 1)


cdef void decode_row(const RowOptions *o, real *s, const Limits *at, const Limits *tile,
                     real *m_l) noexcept nogil:
    """Scores to weights e^(s - m); m and l are kept."""
    cdef real m = -INFINITY
    if at.lo < at.hi:
        m = finish_scores(o, s, tile.lo, at.lo, at.hi, NULL)
    if m == -INFINITY:
        memset(s, 0, (tile.hi - tile.lo) * sizeof(real))
        return
    m_l[0] = m
    m_l[1] = exponentials(s, tile.lo, at.lo, at.hi, tile.lo, tile.hi, m)
    if o.threshold:
        drop(o, s, tile.lo, at.lo, at.hi)


cdef void decode_join(const Decode *d, Py_ssize_t n) noexcept nogil:
    """The chunks of head n into its first one, and that into o and lse."""
    cdef const Problem *p = d.p
    cdef Py_ssize_t b = n // p.NK, hk = n % p.NK
    cdef Py_ssize_t chunks = max(1, ceil_div(p.kv_len[b], CHUNK_KEYS)), r, c, j
    cdef Py_ssize_t at = round_up(p.DV)
    cdef real *sum
    cdef real *part
    cdef real m, mine, its
    for r in range(p.q_len[b] * p.group):
        sum = decode_part(d, n, 0, r)
        for c in range(1, chunks):
            part = decode_part(d, n, c, r)
            if part[at + 1] == 0:
                continue
            m = sum[at] if sum[at] > part[at] else part[at]
            if part[at] != part[at]:
                m = part[at]
            mine = 0 if sum[at + 1] == 0 else exp_real(sum[at] - m)
            its = exp_real(part[at] - m)
            for j in range(p.DV):
                sum[j] = sum[j] * mine + part[j] * its
            sum[at], sum[at + 1] = m, sum[at + 1] * mine + part[at + 1] * its
        finish_row(p, b, hk * p.group + r % p.group, r // p.group, sum, sum[at], sum[at + 1])


cdef void decode_all(Decode *d, Barrier *barrier, int rank, int size,
                     int64_t *counter) noexcept nogil:
    cdef const Problem *p = d.p
    cdef Py_ssize_t n, chunk, rows, first, height
    cdef int64_t task
    if d.chunks == 0:
        return
    task = next_task(counter)
    while task < p.B * p.NK * d.chunks:
        n, chunk = task // d.chunks, task % d.chunks
        if is_decode(p, n // p.NK) and (chunk == 0 or chunk * CHUNK_KEYS < p.kv_len[n // p.NK]):
            rows, first = p.q_len[n // p.NK] * p.group, 0
            while first < rows:
                height = ceil_div(rows - first, ceil_div(rows - first, DECODE_ROWS))
                decode_tile(d, n, chunk, first, height)
                first += height
        task = next_task(counter)
    barrier_wait(barrier, size)
    n = rank
    while n < p.B * p.NK:
        if is_decode(p, n // p.NK):
            decode_join(d, n)
        n += size
