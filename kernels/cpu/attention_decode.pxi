# Few queries, many keys: a decoding step. Query heads of a group are the rows of a few tiles, so
# keys and values are read once and not packed; threads share chunks of them, cut whatever their
# count. Each leaves m, l and the weighted values of its rows; they are joined in order. Up to
# MOST_DECODE_ROWS, packed keys are one task a head: 12 to 32 rows against 4096 keys and more took
# 1.0 to 2.7 times as long on one thread, 1.5 to 3.6 on two (Zen 5). Long chunks are long streams,
# 1.01 to 1.16 times as fast (Zen 4), but tasks for half as many; MANY_HEADS heads have some left.
# Neighbouring heads of a key are one task, if enough tasks are left, in turns of TURN_KEYS keys. If
# it has all heads, a turn's rows are read first, as they lie: 1.4 to 2 times as fast from memory,
# 0.75 to 1.1 from L3 (Zen 4).
# Cost: S (D + DV) reals read a head. Source: Dao et al., Flash-Decoding, 2023.

cdef enum:
    FEW_ROWS = 8                    # against any number of keys; R rows against R R or more
    MOST_DECODE_ROWS = QUERY_ROWS   # of one head, or of all heads of a task
    CHUNK_KEYS = 1024
    LONG_CHUNK_KEYS = 2048
    MANY_HEADS = 4
    TOGETHER = 1 << 22              # bytes of keys and values that are rarely in cache


cdef struct DecodeTile:             # rows of one key/value head, against a chunk of its keys
    Py_ssize_t rows
    const real *k                   # of key keys.lo
    const real *v
    Limits keys                     # that one of the rows attends
    Limits at[DECODE_ROWS]
    RowOptions options[DECODE_ROWS]
    const real *q[DECODE_ROWS]
    real *s[DECODE_ROWS]
    real *acc[DECODE_ROWS]


cdef struct Decode:                 # one thread's
    const Problem *p
    Py_ssize_t task_heads           # key/value heads of a task
    # of a task's rows
    DecodeTile *tiles
    real *q                         # (rows, round_up(D)), scaled
    real *s                         # (rows, chunk_keys + 16)
    real *parts                     # all threads': per b (NK, chunks, rows, part_row)
    const int64_t *part_first       # (B,) where b's parts start in them
    Py_ssize_t chunk_keys
    Py_ssize_t rows, chunks         # of a head, the most
    Py_ssize_t part_row             # acc (DV) | m | l


cdef inline Py_ssize_t decode_rows(const Problem *p, Py_ssize_t b) noexcept nogil:
    return p.q_len[b] * p.group


cdef inline Py_ssize_t decode_chunks(const Decode *d, Py_ssize_t b) noexcept nogil:
    return max(1, ceil_div(d.p.kv_len[b], d.chunk_keys))


cdef inline bint is_decode(const Problem *p, Py_ssize_t b) noexcept nogil:
    cdef Py_ssize_t rows = decode_rows(p, b)
    return rows <= FEW_ROWS or (rows <= MOST_DECODE_ROWS and rows * rows <= p.kv_len[b])


cdef void decode_layout(Decode *d, char **arena) noexcept nogil:
    cdef Py_ssize_t rows = d.rows * d.task_heads
    d.tiles = <DecodeTile *>take(arena, rows * sizeof(DecodeTile))
    d.q = <real *>take(arena, rows * round_up(d.p.D) * sizeof(real))
    d.s = <real *>take(arena, rows * (d.chunk_keys + 16) * sizeof(real))


cdef inline bint are_neighbours(const Problem *p, const Heads *x, Py_ssize_t width) noexcept nogil:
    """Whether the heads of a key lie one behind the other."""
    return x.h == width and x.i >= p.NK * width


cdef void decode_sizes(Decode *d, int threads) noexcept nogil:
    cdef const Problem *p = d.p
    cdef Py_ssize_t b, keys = 0
    d.part_row = round_up(p.DV) + 16
    d.chunk_keys = LONG_CHUNK_KEYS if p.NK >= MANY_HEADS else CHUNK_KEYS
    d.chunks, d.rows = 0, 1
    for b in range(p.B):
        if is_decode(p, b):
            d.chunks = max(d.chunks, decode_chunks(d, b))
            d.rows = max(d.rows, decode_rows(p, b))
            keys += p.kv_len[b]
    d.task_heads = 1
    if (are_neighbours(p, &p.k, p.D) and are_neighbours(p, &p.v, p.DV)
            and keys * p.NK * (p.D + p.DV) * <Py_ssize_t>sizeof(real) >= TOGETHER):
        d.task_heads = imin(p.NK, MOST_DECODE_ROWS // d.rows)
    while d.task_heads > 1 and p.B * d.chunks * ceil_div(p.NK, d.task_heads) < threads:
        d.task_heads = ceil_div(d.task_heads, 2)


cdef inline real *decode_part(const Decode *d, Py_ssize_t n, Py_ssize_t chunk,
                              Py_ssize_t r) noexcept nogil:
    cdef Py_ssize_t b = n // d.p.NK, hk = n % d.p.NK
    cdef Py_ssize_t row = (hk * decode_chunks(d, b) + chunk) * decode_rows(d.p, b) + r
    return d.parts + d.part_first[b] + row * d.part_row


cdef void open_tile(Decode *d, DecodeTile *t, Py_ssize_t place, Py_ssize_t n, Py_ssize_t chunk,
                    Py_ssize_t first, Py_ssize_t rows) noexcept nogil:
    """Rows first : first + rows of head n = b * NK + hk against one chunk. `place` is the first
    one's among the task's rows."""
    cdef const Problem *p = d.p
    cdef Py_ssize_t b = n // p.NK, hk = n % p.NK, j0 = chunk * d.chunk_keys, j1, r, i, h, lo, hi
    cdef real *q
    j1 = imin(j0 + d.chunk_keys, p.kv_len[b])
    t.rows, t.keys.lo, t.keys.hi = rows, j1, j0
    for r in range(rows):
        i, h = (first + r) // p.group, hk * p.group + (first + r) % p.group
        limits(p, b, i, &lo, &hi)
        row_options(p, b, h, i, &t.options[r])
        if clip(&t.options[r], lo, hi, j0, j1, &t.at[r]):
            t.keys.lo, t.keys.hi = imin(t.keys.lo, t.at[r].lo), max(t.keys.hi, t.at[r].hi)
        q = d.q + (place + r) * round_up(p.D)
        memset(q, 0, round_up(p.D) * sizeof(real))
        copy_scaled(q, of_query(p, &p.q, b, h, i), p.D, p.scale)
        t.q[r], t.s[r] = q, d.s + (place + r) * (d.chunk_keys + 16)
        t.acc[r] = decode_part(d, n, chunk, first + r)
        memset(t.acc[r], 0, d.part_row * sizeof(real))
        t.acc[r][round_up(p.DV)] = -INFINITY
    t.keys.hi = max(t.keys.lo, t.keys.hi)
    t.k, t.v = of_key(p, &p.k, b, hk, t.keys.lo), of_key(p, &p.v, b, hk, t.keys.lo)


cdef void decode_turn(const Decode *d, DecodeTile *t, Py_ssize_t at, Py_ssize_t keys, bint values,
                      bint read_first) noexcept nogil:
    """Scores of a tile's keys from its key `at` on, or with `values` what their weights make of the
    values. `read_first`: the rows of all heads, of which the tile's is the first."""
    cdef const Problem *p = d.p
    cdef const real *x = t.v + at * p.v.i if values else t.k + at * p.k.i
    cdef real *s[DECODE_ROWS]
    cdef Py_ssize_t r
    for r in range(t.rows):
        s[r] = t.s[r] + at
    if read_first:
        read_rows(x, p.v.i if values else p.k.i, keys, p.NK * (p.DV if values else p.D))
    if values:
        weigh(t.rows, <const real **>s, x, p.v.i, keys, p.DV, t.acc)
    else:
        dots(t.rows, t.q, x, p.k.i, keys, p.D, s)


cdef void decode_turns(const Decode *d, Py_ssize_t tiles, bint values) noexcept nogil:
    """`decode_turn` of all keys of all tiles; several heads take turns, and more tiles than two."""
    cdef bint all_heads = d.task_heads > 1 and d.task_heads == d.p.NK
    cdef bint together = d.task_heads > 1 or tiles > 2
    cdef Py_ssize_t at = 0, most = TURN_KEYS if together else d.chunk_keys, end = 0, keys, number
    cdef DecodeTile *t
    for number in range(tiles):
        t = &d.tiles[number]
        end = max(end, t.keys.hi - t.keys.lo)
    while at < end:
        for number in range(tiles):
            t = &d.tiles[number]
            keys = imin(most, t.keys.hi - t.keys.lo - at)
            if keys > 0:
                decode_turn(d, t, at, keys, values, all_heads and number == 0)
        at += most


cdef void decode_task(Decode *d, Py_ssize_t b, Py_ssize_t first_head, Py_ssize_t end,
                      Py_ssize_t chunk) noexcept nogil:
    """Heads first_head : end of sequence b against one chunk."""
    cdef const Problem *p = d.p
    cdef Py_ssize_t rows = decode_rows(p, b), tiles = 0, place = 0, first, height, hk, number, r
    cdef DecodeTile *t
    for hk in range(first_head, end):
        first = 0
        while first < rows:
            height = ceil_div(rows - first, ceil_div(rows - first, DECODE_ROWS))
            open_tile(d, &d.tiles[tiles], place, b * p.NK + hk, chunk, first, height)
            first += height
            place += height
            tiles += 1
    decode_turns(d, tiles, False)
    for number in range(tiles):
        t = &d.tiles[number]
        if t.keys.lo < t.keys.hi:
            decode_softmax(t, p.DV)
    decode_turns(d, tiles, True)
    for number in range(tiles):
        t = &d.tiles[number]
        for r in range(t.rows):
            if not all_finite(t.acc[r], p.DV):
                memset(t.acc[r], 0, p.DV * sizeof(real))
                weigh_sparse(t.s[r], 1, t.v, p.v.i, t.keys.hi - t.keys.lo, 1, p.DV, t.acc[r], 1)


cdef void decode_softmax(DecodeTile *t, Py_ssize_t DV) noexcept nogil:
    """Scores to weights e^(s - m); m and l are kept behind a row's part."""
    cdef real m[DECODE_ROWS]
    cdef real l[DECODE_ROWS]
    cdef Py_ssize_t r
    for r in range(t.rows):
        m[r], l[r] = -INFINITY, 0
    softmax_rows(<int>t.rows, t.options, t.s, t.keys.lo, t.at, &t.keys, m, l, t.acc, DV)
    for r in range(t.rows):
        t.acc[r][round_up(DV)], t.acc[r][round_up(DV) + 1] = m[r], l[r]


cdef void decode_join(const Decode *d, Py_ssize_t n) noexcept nogil:
    """The chunks of head n into its first one, and that into o and lse."""
    cdef const Problem *p = d.p
    cdef Py_ssize_t b = n // p.NK, hk = n % p.NK
    cdef Py_ssize_t chunks = decode_chunks(d, b), r, c, j
    cdef Py_ssize_t at = round_up(p.DV)
    cdef real *sum
    cdef real *part
    cdef real m, mine, its
    for r in range(decode_rows(p, b)):
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
                     int64_t *taken) noexcept nogil:
    cdef const Problem *p = d.p
    cdef Py_ssize_t n, b, chunk, hk, groups
    cdef int64_t task, tasks
    if d.chunks == 0:
        return
    groups = ceil_div(p.NK, d.task_heads)
    tasks = p.B * groups * d.chunks
    task = next_of_share(taken, tasks, rank, size)
    while task >= 0:
        n, chunk = task // d.chunks, task % d.chunks
        b, hk = n // groups, n % groups * d.task_heads
        if is_decode(p, b) and (chunk == 0 or chunk * d.chunk_keys < p.kv_len[b]):
            decode_task(d, b, hk, imin(hk + d.task_heads, p.NK), chunk)
        task = next_of_share(taken, tasks, rank, size)
    barrier_wait(barrier, size)
    n = rank
    while n < p.B * p.NK:
        if is_decode(p, n // p.NK):
            decode_join(d, n)
        n += size
