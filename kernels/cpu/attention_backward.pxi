# The backward pass. With P = e^(S - lse), delta = sum dO O - dlse, and
# K' = dropout's kept / (1 - p):
#
#   dV = (P K')' dO        dP = dO V'        dS = P (K' dP - delta)
#   dQ = scale dS K        dK = scale dS' Q
#
# S and dP are computed anew, tile by tile, a block of queries against a block of keys; which slab
# of keys or which head is whose task stands in attention_backward_tasks.pxi.
# Cost: 2 L S (3 D + 2 DV) FLOP a head, less what is skipped; a thread's head of dQ again, or SLABS
# times dQ's size.
# Source: Dao, arXiv:2307.08691, with the split over keys made fixed.

cdef enum:
    SLABS = 4
    BACK_ROWS = QUERY_ROWS
    BACK_KEYS = 192                 # whole tiles, and of all panels
    BACK_STRIDE = BACK_KEYS + 16    # of a row of scores, off powers of two
    SEGMENT = 2048                  # queries packed at once


cdef struct Backward:               # one thread's
    const Problem *p
    real *all_parts                 # of dQ, all threads'; NULL: tasks are whole heads
    const int64_t *part_first       # (B,) where b's parts start in them
    real *own_part                  # of the thread's head and slab
    real *parts                     # of the task: (slabs, NH, q_len, round_up(D)), or own_part
    Py_ssize_t slab_reals, head_reals   # from a slab's, a head's part to the next; 0: the same
    Py_ssize_t keys                 # of the task
    real *dk                        # sums of (keys, D), of panels_turned
    real *dv                        # and of (keys, DV)
    # of pack_turned, a segment, BACK_ROWS rows at a time; header: whether finite
    Py_ssize_t header, q_block, do_block
    real *q_pack
    real *do_pack
    # (SEGMENT, round_up(D)), scaled as forward's: the same bits of the scores
    real *q_rows
    real *k_pack                    # K' panels [D][keys]
    real *v_pack                    # V' panels [DV][keys]
    real *k_rows                    # panels [keys][D], scaled
    bint k_finite, keys_packed      # whether panels may have k_rows, k_pack
    real *delta                     # SEGMENT
    Limits *limit                   # SEGMENT
    real *weights                   # (BACK_ROWS, BACK_STRIDE): P
    real *ds                        # dP, then dS
    real *factor                    # of the softcap and the user's function of the scores
    Limits at[BACK_ROWS]
    RowOptions options[BACK_ROWS]


cdef inline Py_ssize_t slab_keys(const Problem *p, Py_ssize_t b) noexcept nogil:
    return max(1, ceil_div(p.kv_len[b], SLABS * BACK_KEYS)) * BACK_KEYS


cdef inline Py_ssize_t slabs(const Problem *p, Py_ssize_t b) noexcept nogil:
    return max(1, ceil_div(p.kv_len[b], slab_keys(p, b)))


cdef inline real *dq_part(const Backward *g, Py_ssize_t b, Py_ssize_t slab, Py_ssize_t h,
                          Py_ssize_t i) noexcept nogil:
    return g.parts + slab * g.slab_reals + h * g.head_reals + i * round_up(g.p.D)


cdef inline bint has_factor(const Problem *p) noexcept nogil:
    """Whether a score is more than its product and terms added to it."""
    return p.softcap != 0 or p.mod.forward != NULL


cdef void backward_layout(Backward *g, char **arena) noexcept nogil:
    cdef const Problem *p = g.p
    cdef Py_ssize_t real_bytes = sizeof(real), D = round_up(p.D)
    cdef Py_ssize_t keys = 0, part = 0, rows, b
    for b in range(p.B):
        keys = max(keys, imin(p.kv_len[b], SEGMENT if g.all_parts == NULL else slab_keys(p, b)))
        if g.all_parts == NULL:
            part = max(part, p.q_len[b] * D)
    g.own_part = <real *>take(arena, part * real_bytes)
    rows = ceil_div(imin(SEGMENT, most_of(p.q_len, p.B)), BACK_ROWS) * BACK_ROWS
    g.dk = <real *>take(arena, sums_reals(keys, p.D) * real_bytes)
    g.dv = <real *>take(arena, sums_reals(keys, p.DV) * real_bytes)
    g.header = 64 // real_bytes
    g.q_block = g.header + panel_reals(BACK_ROWS, p.D)
    g.do_block = g.header + panel_reals(BACK_ROWS, p.DV)
    g.q_pack = <real *>take(arena, rows // BACK_ROWS * g.q_block * real_bytes)
    g.do_pack = <real *>take(arena, rows // BACK_ROWS * g.do_block * real_bytes)
    g.q_rows = <real *>take(arena, rows * D * real_bytes)
    g.k_pack = <real *>take(arena, panel_reals(p.D, BACK_KEYS) * real_bytes)
    g.v_pack = <real *>take(arena, panel_reals(p.DV, BACK_KEYS) * real_bytes)
    g.k_rows = <real *>take(arena, panel_reals(BACK_KEYS, p.D) * real_bytes)
    g.delta = <real *>take(arena, rows * real_bytes)
    g.limit = <Limits *>take(arena, rows * sizeof(Limits))
    g.weights = <real *>take(arena, BACK_ROWS * BACK_STRIDE * real_bytes)
    g.ds = <real *>take(arena, BACK_ROWS * BACK_STRIDE * real_bytes)
    g.factor = <real *>take(arena, (BACK_ROWS * BACK_STRIDE if has_factor(p) else 0) * real_bytes)


cdef void pack_segment(Backward *g, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i0,
                       Py_ssize_t n) noexcept nogil:
    """q and dO of queries i0 : i0 + n packed, their delta and limits."""
    cdef const Problem *p = g.p
    cdef Py_ssize_t block, i, r, rows
    cdef real *to
    for block in range(ceil_div(n, BACK_ROWS)):
        i = block * BACK_ROWS
        rows = imin(BACK_ROWS, n - i)
        to = g.q_pack + block * g.q_block
        to[0] = pack_turned(of_query(p, &p.q, b, h, i0 + i), p.q.i, rows, p.D, p.scale,
                            to + g.header)
        to = g.do_pack + block * g.do_block
        to[0] = pack_turned(of_query(p, &p.d_o, b, h, i0 + i), p.d_o.i, rows, p.DV, 1,
                            to + g.header)
    for r in range(n):
        copy_query(p, of_query(p, &p.q, b, h, i0 + r), g.q_rows + r * round_up(p.D))
        g.delta[r] = dot(of_query(p, &p.d_o, b, h, i0 + r), of_query(p, &p.o, b, h, i0 + r), p.DV)
        if p.dlse.data != NULL:
            g.delta[r] -= of_query(p, &p.dlse, b, h, i0 + r)[0]
        limits(p, b, i0 + r, &g.limit[r].lo, &g.limit[r].hi)


cdef void pack_slab_block(Backward *g, Py_ssize_t b, Py_ssize_t hk, Py_ssize_t j0,
                          Py_ssize_t n) noexcept nogil:
    cdef const Problem *p = g.p
    g.keys_packed = pack_keys(of_key(p, &p.k, b, hk, j0), p.k.i, n, p.D, g.k_pack)
    pack_keys(of_key(p, &p.v, b, hk, j0), p.v.i, n, p.DV, g.v_pack)
    g.k_finite = pack_panels(of_key(p, &p.k, b, hk, j0), p.k.i, n, p.D, p.scale, g.k_rows)


cdef inline real *bias_gradient(const Problem *p, Py_ssize_t b, Py_ssize_t h,
                                Py_ssize_t i) noexcept nogil:
    """Key 0 of a row of dbias, NULL without one."""
    if p.dbias.data == NULL:
        return NULL
    return p.dbias.data + b * p.dbias.stride[0] + h * p.dbias.stride[1] + i * p.dbias.stride[2]


cdef void gradient_row(Backward *g, Py_ssize_t r, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i,
                       real delta, Py_ssize_t j0, Py_ssize_t n) noexcept nogil:
    """One row's scores and dP to the dropped P and dS, zeros outside its keys."""
    cdef const Problem *p = g.p
    cdef const RowOptions *o = &g.options[r]
    cdef const Limits *at = &g.at[r]
    cdef real *w = g.weights + r * BACK_STRIDE
    cdef real *ds = g.ds + r * BACK_STRIDE
    cdef real *factor = g.factor + r * BACK_STRIDE if has_factor(p) else NULL
    cdef real lse = of_query(p, &p.lse, b, h, i)[0]
    cdef real *db = bias_gradient(p, b, h, i)
    if at.lo >= at.hi or lse == -INFINITY:
        memset(w, 0, n * sizeof(real))
        memset(ds, 0, n * sizeof(real))
        return
    if not is_product(o):
        finish_scores(o, w, j0, at.lo, at.hi, factor, NULL)
    if lse == lse:
        score_gradients(o, w, ds, lse, delta, j0, at.lo, at.hi, j0, j0 + n)
    else:
        nan_gradients(w, ds, j0, at.lo, at.hi, j0, j0 + n)
    if db != NULL:
        add_strided(db + at.lo * p.dbias.stride[3], p.dbias.stride[3], ds + (at.lo - j0),
                    at.hi - at.lo)
    if factor != NULL:
        multiply_row(ds, factor, n)


cdef void gradient_tile(Backward *g, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i0, Py_ssize_t first,
                        int rows, Py_ssize_t segment, Py_ssize_t slab, Py_ssize_t j0,
                        Py_ssize_t n) noexcept nogil:
    """P, dS and dQ of rows first : first + rows of the block at query i0; `segment` is
    the block's place in it."""
    cdef const Problem *p = g.p
    cdef const real *q[TILE_ROWS]
    cdef const real *d_o[TILE_ROWS]
    cdef real *w[TILE_ROWS]
    cdef real *ds[TILE_ROWS]
    cdef real *dq[TILE_ROWS]
    cdef Limits tile
    cdef int r
    cdef Py_ssize_t i
    cdef bint plain
    tile.lo, tile.hi = j0 + n, j0
    for r in range(rows):
        i = i0 + first + r
        row_options(p, b, h, i, &g.options[first + r])
        if clip(&g.options[first + r], g.limit[segment + first + r].lo,
                g.limit[segment + first + r].hi, j0, j0 + n, &g.at[first + r]):
            tile.lo, tile.hi = imin(tile.lo, g.at[first + r].lo), max(tile.hi, g.at[first + r].hi)
            prefetch_keys(g.options[first + r].bias, g.options[first + r].bias_j,
                          g.at[first + r].lo, g.at[first + r].hi)
            prefetch_keys(bias_gradient(p, b, h, i), p.dbias.stride[3], g.at[first + r].lo,
                          g.at[first + r].hi)
        q[r], d_o[r] = (g.q_rows + (segment + first + r) * round_up(p.D),
                        of_query(p, &p.d_o, b, h, i))
        w[r], ds[r] = g.weights + (first + r) * BACK_STRIDE, g.ds + (first + r) * BACK_STRIDE
        dq[r] = dq_part(g, b, slab, h, i)
    if tile.lo < tile.hi:
        # as forward had them: weights from other sums would not add up to 1 under its lse
        plain = is_decode(p, b) or not g.keys_packed
        if FINITE_ONLY and g.q_pack[segment // BACK_ROWS * g.q_block] == 0:
            plain = True
        if plain:
            plain_scores(p, b, h // p.group, q, rows, &tile, j0, w)
        else:
            panels(rows, q, 0, p.D, g.k_pack, p.D, n, tile.lo - j0, tile.hi - j0, False, w)
        panels(rows, d_o, 0, p.DV, g.v_pack, p.DV, n, tile.lo - j0, tile.hi - j0, False, ds)
    for r in range(rows):
        gradient_row(g, first + r, b, h, i0 + first + r, g.delta[segment + first + r], j0, n)
    if tile.lo >= tile.hi:
        return
    if g.k_finite:
        panels(rows, <const real **>ds, tile.lo - j0, tile.hi - j0, g.k_rows, n, p.D, 0, p.D, True,
               dq)
        return
    for r in range(rows):
        weigh_sparse(ds[r] + (tile.lo - j0), 1, of_key(p, &p.k, b, h // p.group, tile.lo), p.k.i,
                     tile.hi - tile.lo, p.scale, p.D, dq[r], 1)


cdef inline bint attends(const Limits *at, Py_ssize_t j0, Py_ssize_t j1) noexcept nogil:
    return max(at.lo, j0) < imin(at.hi, j1)


cdef inline Py_ssize_t key_step(const Backward *g, Py_ssize_t N) noexcept nogil:
    """From one key's sums to the next one's."""
    return 1 if SUMS_TURNED else sums_ld(g.keys, N)


cdef void add_turned(const Backward *g, int keys, const real *a, Py_ssize_t first, Py_ssize_t end,
                     const real *packed, const real *rows_at, Py_ssize_t ld, real scale,
                     Py_ssize_t rows, Py_ssize_t N, real *sums) noexcept nogil:
    """The sums of `keys` keys += a' times rows first : end, which stand packed and at rows_at."""
    cdef Py_ssize_t to_key = key_step(g, N), r
    if packed[0] != 0:
        panels_turned(keys, a, BACK_STRIDE, first, end, packed + g.header, rows, N, sums,
                      sums_ld(g.keys, N))
        return
    for r in range(keys):
        weigh_sparse(a + first * BACK_STRIDE + r, BACK_STRIDE, rows_at + first * ld, ld,
                     end - first, scale, N, sums + r * to_key,
                     sums_ld(g.keys, N) if SUMS_TURNED else 1)


cdef void key_gradients(Backward *g, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i0, Py_ssize_t rows,
                        Py_ssize_t segment, Py_ssize_t slab_key, Py_ssize_t j0,
                        Py_ssize_t n) noexcept nogil:
    """dV += P' dO and dK += dS' Q for the block of keys j0 : j0 + n, which starts at
    `slab_key` in the slab."""
    cdef const Problem *p = g.p
    cdef Py_ssize_t j = 0, keys, first, end, block = segment // BACK_ROWS, key
    while j < n:
        keys = tile_height(n - j)
        first, end = 0, rows        # the rows that attend a key of the tile
        while first < end and not attends(&g.at[first], j0 + j, j0 + j + keys):
            first += 1
        while first < end and not attends(&g.at[end - 1], j0 + j, j0 + j + keys):
            end -= 1
        key = slab_key + j
        if first < end:
            add_turned(g, <int>keys, g.weights + j, first, end, g.do_pack + block * g.do_block,
                       of_query(p, &p.d_o, b, h, i0), p.d_o.i, 1, rows, p.DV,
                       g.dv + key * key_step(g, p.DV))
            add_turned(g, <int>keys, g.ds + j, first, end, g.q_pack + block * g.q_block,
                       of_query(p, &p.q, b, h, i0), p.q.i, p.scale, rows, p.D,
                       g.dk + key * key_step(g, p.D))
        j += keys


cdef inline bint meets(const Backward *g, Py_ssize_t segment, Py_ssize_t rows, Py_ssize_t j0,
                       Py_ssize_t j1) noexcept nogil:
    """Whether a row of the block attends a key of j0 : j1, as far as limits tell, which never
    fall."""
    return g.limit[segment].lo < j1 and g.limit[segment + rows - 1].hi > j0


cdef void gradient_block(Backward *g, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i0, Py_ssize_t rows,
                         Py_ssize_t segment, Py_ssize_t slab, Py_ssize_t slab_key, Py_ssize_t j0,
                         Py_ssize_t n) noexcept nogil:
    """Queries i0 : i0 + rows of head h against keys j0 : j0 + n."""
    cdef Py_ssize_t r = 0, height
    if not meets(g, segment, rows, j0, j0 + n):
        return
    while r < rows:
        height = tile_height(rows - r)
        gradient_tile(g, b, h, i0, r, <int>height, segment, slab, j0, n)
        r += height
    key_gradients(g, b, h, i0, rows, segment, slab_key, j0, n)


cdef void backward_segment(Backward *g, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i0, Py_ssize_t n,
                           Py_ssize_t slab, Py_ssize_t first_key) noexcept nogil:
    """Packed queries i0 : i0 + n of head h against the slab's keys; the
    task's start at first_key."""
    cdef Py_ssize_t j0 = slab * slab_keys(g.p, b)
    cdef Py_ssize_t k1 = imin(j0 + slab_keys(g.p, b), g.p.kv_len[b]), keys, i
    while j0 < k1:
        keys, i = imin(BACK_KEYS, k1 - j0), 0
        pack_slab_block(g, b, h // g.p.group, j0, keys)
        while i < n:
            gradient_block(g, b, h, i0 + i, imin(BACK_ROWS, n - i), i, slab, j0 - first_key, j0,
                           keys)
            i += BACK_ROWS
        j0 += keys
