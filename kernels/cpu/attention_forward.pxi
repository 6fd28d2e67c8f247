# The forward pass, for blocks of queries:
#
#   s = scale q K'                   m, l = running maximum and sum of e^(s - m)
#   o = sum e^(s - m) v / l          lse = m + log l
#
# Keys and values are packed once per head, in blocks of KEY_BLOCK; a tile of 6 rows goes from
# scores to weighted values while they are in L1. Only vectors that hold a key which some row of the
# tile may attend are computed.
# Cost: 2 L S (D + DV) FLOP a head, less what is skipped; S (D + DV) reals of packed keys and
# values a head at hand.
# Source: Milakov & Gimelshein, arXiv:1805.02867; Rabe & Staats, arXiv:2112.05682;
# Dao, arXiv:2307.08691.

cdef enum:
    SCORE_ROW = KEY_BLOCK + 16      # off powers of two


cdef struct Forward:                # one thread's
    const Problem *p
    Barrier *barrier
    int rank, size
    # of a packed key block: where its keys and values start, and its end
    Py_ssize_t header, values, block_reals
    real *pack                      # the thread's own head
    real *q                         # (QUERY_ROWS, round_up(D)), scaled
    bint q_finite
    real *acc                       # (QUERY_ROWS, round_up(DV))
    real *s                         # (TILE_ROWS, SCORE_ROW)
    real m[QUERY_ROWS]
    real l[QUERY_ROWS]
    Limits row[QUERY_ROWS]
    RowOptions options[QUERY_ROWS]


cdef void forward_layout(Forward *f, char **arena) noexcept nogil:
    cdef const Problem *p = f.p
    cdef Py_ssize_t real_bytes = sizeof(real)
    f.header = 64 // real_bytes
    f.values = f.header + panel_reals(p.D, KEY_BLOCK)
    f.block_reals = f.values + panel_reals(KEY_BLOCK, p.DV)
    f.q = <real *>take(arena, QUERY_ROWS * round_up(p.D) * real_bytes)
    f.acc = <real *>take(arena, QUERY_ROWS * round_up(p.DV) * real_bytes)
    f.s = <real *>take(arena, TILE_ROWS * SCORE_ROW * real_bytes)


cdef inline Py_ssize_t key_blocks(const Problem *p, Py_ssize_t b) noexcept nogil:
    """Packed blocks of one head; decoding packs none."""
    return 0 if is_decode(p, b) else ceil_div(p.kv_len[b], KEY_BLOCK)


cdef void pack_block(const Forward *f, Py_ssize_t b, Py_ssize_t hk, Py_ssize_t block,
                     real *to) noexcept nogil:
    """header: whether `panels` may have V, K | K' panels [D][keys] | V panels [keys][DV]"""
    cdef const Problem *p = f.p
    cdef Py_ssize_t j0 = block * KEY_BLOCK, n = imin(KEY_BLOCK, p.kv_len[b] - j0)
    to[0] = pack_panels(of_key(p, &p.v, b, hk, j0), p.v.i, n, p.DV, 1, to + f.values)
    to[1] = pack_keys(of_key(p, &p.k, b, hk, j0), p.k.i, n, p.D, to + f.header)


cdef inline void copy_query(const Problem *p, const real *q, real *to) noexcept nogil:
    """q scaled, zeros to whole vectors behind it."""
    if p.D % VL != 0:
        memset(to + round_up(p.D) - VL, 0, VL * sizeof(real))
    copy_scaled(to, q, p.D, p.scale)


cdef void start_block(Forward *f, Py_ssize_t b, Py_ssize_t hk, Py_ssize_t r0,
                      Py_ssize_t n) noexcept nogil:
    cdef const Problem *p = f.p
    cdef Py_ssize_t r, i = r0 // p.group, first = hk * p.group, h = first + r0 % p.group
    f.q_finite = True
    for r in range(n):
        copy_query(p, of_query(p, &p.q, b, h, i), f.q + r * round_up(p.D))
        if FINITE_ONLY and not all_finite(f.q + r * round_up(p.D), p.D):
            f.q_finite = False
        f.m[r], f.l[r] = -INFINITY, 0
        limits(p, b, i, &f.row[r].lo, &f.row[r].hi)
        row_options(p, b, h, i, &f.options[r])
        h += 1
        if h == first + p.group:    # a division for every row shows where rows are short
            i, h = i + 1, first
    memset(f.acc, 0, n * round_up(p.DV) * sizeof(real))


cdef void plain_scores(const Problem *p, Py_ssize_t b, Py_ssize_t hk, const real **q, int rows,
                       const Limits *tile, Py_ssize_t j0, real **w) noexcept nogil:
    """Scores summed as decoding does, from keys that are not packed."""
    cdef int r = 0, n
    cdef real *s[DECODE_ROWS]
    cdef int i
    while r < rows:
        n = <int>imin(rows - r, DECODE_ROWS)
        for i in range(n):
            s[i] = w[r + i] + (tile.lo - j0)
        dots(n, q + r, of_key(p, &p.k, b, hk, tile.lo), p.k.i, tile.hi - tile.lo, p.D, s)
        r += n


cdef void forward_tile(Forward *f, Py_ssize_t b, Py_ssize_t hk, Py_ssize_t first, int rows,
                       Py_ssize_t j0, Py_ssize_t n, const real *packed) noexcept nogil:
    """Rows first : first + rows of the block against one packed block of n keys."""
    cdef const Problem *p = f.p
    cdef Limits at[TILE_ROWS]
    cdef Limits tile
    cdef const real *q[TILE_ROWS]
    cdef real *s[TILE_ROWS]
    cdef real *acc[TILE_ROWS]
    cdef const real *v
    cdef int r
    tile.lo, tile.hi = j0 + n, j0
    for r in range(rows):
        if clip(&f.options[first + r], f.row[first + r].lo, f.row[first + r].hi, j0, j0 + n,
                &at[r]):
            tile.lo, tile.hi = imin(tile.lo, at[r].lo), max(tile.hi, at[r].hi)
            prefetch_keys(f.options[first + r].bias, f.options[first + r].bias_j, at[r].lo,
                          at[r].hi)
        q[r] = f.q + (first + r) * round_up(p.D)
        s[r] = f.s + r * SCORE_ROW
        acc[r] = f.acc + (first + r) * round_up(p.DV)
    if tile.lo >= tile.hi:
        return
    if packed[1] != 0 and f.q_finite:
        panels(rows, q, 0, p.D, packed + f.header, p.D, n, tile.lo - j0, tile.hi - j0, False, s)
    else:
        plain_scores(p, b, hk, q, rows, &tile, j0, s)
    r = 0
    while r < rows:
        softmax_rows(<int>imin(SOFTMAX_ROWS, rows - r), &f.options[first + r], s + r, j0, at + r,
                     &tile, f.m + first + r, f.l + first + r, acc + r, p.DV)
        r += SOFTMAX_ROWS
    if packed[0] != 0:
        panels(rows, <const real **>s, tile.lo - j0, tile.hi - j0, packed + f.values, n, p.DV, 0,
               p.DV, True, acc)
        return
    v = of_key(p, &p.v, b, hk, tile.lo)
    for r in range(rows):
        weigh_sparse(s[r] + (tile.lo - j0), 1, v, p.v.i, tile.hi - tile.lo, 1, p.DV, acc[r], 1)


cdef void finish_row(const Problem *p, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i, const real *acc,
                     real m, real l) noexcept nogil:
    """o = acc / l, lse = m + log l; 0 and -inf where no key was attended."""
    copy_scaled(of_query(p, &p.o, b, h, i), acc, p.DV, 0 if l == 0 else 1 / l)
    if p.lse.data != NULL:
        of_query(p, &p.lse, b, h, i)[0] = -INFINITY if l == 0 else m + log_real(l)


cdef void forward_block(Forward *f, Py_ssize_t b, Py_ssize_t hk, Py_ssize_t r0,
                        const real *packed) noexcept nogil:
    cdef const Problem *p = f.p
    cdef Py_ssize_t n = imin(QUERY_ROWS, p.q_len[b] * p.group - r0)
    cdef Py_ssize_t r, rows
    cdef Py_ssize_t block, first = p.kv_len[b], end = 0, j0
    start_block(f, b, hk, r0, n)
    for r in range(n):
        if f.row[r].lo < f.row[r].hi:
            first, end = imin(first, f.row[r].lo), max(end, f.row[r].hi)
    for block in range(first // KEY_BLOCK, ceil_div(end, KEY_BLOCK)):
        j0, r = block * KEY_BLOCK, 0
        while r < n:
            rows = tile_height(n - r)
            forward_tile(f, b, hk, r, <int>rows, j0, imin(KEY_BLOCK, p.kv_len[b] - j0),
                         packed + block * f.block_reals)
            r += rows
    for r in range(n):
        finish_row(p, b, hk * p.group + (r0 + r) % p.group, (r0 + r) // p.group,
                   f.acc + r * round_up(p.DV), f.m[r], f.l[r])
