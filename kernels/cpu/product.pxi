# Matrix products on packed panels: the projections before a scan, and the weight and
# input gradients after it.
#
#   c[m][:] (+)= sum_k a[m][k] * w[k][:]        w packed as [panel][K][nv * VL]
#
# Blocks: K_BLOCK of k (tile.h), and ROW_BLOCK rows so that their part of `a` stays in L2.
# Both are constants, so the order of summation depends on the shapes alone.

cdef enum:
    ROW_BLOCK = 96


cdef struct Product:
    Py_ssize_t K
    int nv
    const real *w               # panels of all columns
    Py_ssize_t p0, p1           # the panels to compute
    const real *init            # one row that every row of c starts from; NULL: add to c
    Py_ssize_t panel_stride     # distance of two panels in c and init
    Py_ssize_t columns          # valid columns of c; past them a tile goes through `tail`
    real *tail                  # [MAX_ROWS][nv * VL]


cdef void tile_into_tail(Product *p, Py_ssize_t rows, const real **a, Py_ssize_t k0, Py_ssize_t k1,
                         const real *w, const real *init, real **c, Py_ssize_t col) noexcept nogil:
    """The last panel: whole vectors are computed in `tail`, the valid columns copied."""
    cdef Py_ssize_t width = p.nv * VL, valid = p.columns - col, r
    cdef real *row[MAX_ROWS]
    for r in range(rows):
        row[r] = p.tail + r * width
        if init == NULL:
            copy_padded(row[r], c[r] + col, valid, width)
    tile(rows, p.nv, a, k0, k1, w, init, row, 0)
    for r in range(rows):
        memcpy(c[r] + col, row[r], valid * sizeof(real))


cdef void product(Product *p, const real **a, real **c, Py_ssize_t M) noexcept nogil:
    """Rows a[0:M] times the panels p0:p1 into rows c[0:M]."""
    cdef Py_ssize_t width = p.nv * VL, most = tile_rows(p.nv)
    cdef Py_ssize_t block, m0, m1, m, k0, k1, panel, col, rows, left
    cdef const real *w
    cdef const real *init
    for block in range(ceil_div(M, ROW_BLOCK)):
        m0 = block * ROW_BLOCK
        m1 = imin(m0 + ROW_BLOCK, M)
        k0 = 0
        while k0 == 0 or k0 < p.K:
            k1 = imin(k0 + K_BLOCK, p.K)
            for panel in range(p.p0, p.p1):
                col = panel * p.panel_stride
                w = p.w + (panel * p.K + k0) * width
                init = NULL
                if k0 == 0 and p.init != NULL:
                    init = p.init + col
                m = m0
                left = ceil_div(m1 - m0, most)
                while left > 0:             # tiles of equal height, not full ones and a small rest
                    rows = ceil_div(m1 - m, left)
                    if col + width <= p.columns:
                        tile(rows, p.nv, a + m, k0, k1, w, init, c + m, col)
                    else:
                        tile_into_tail(p, rows, a + m, k0, k1, w, init, c + m, col)
                    m += rows
                    left -= 1
            k0 += K_BLOCK


cdef struct Outer:
    # c[m][:] (+)= sum_k a[k][m] * b[k][:], the form of a weight gradient: k runs over rows (t, b).
    Py_ssize_t K, m0, m1, N
    bint first                  # c and sums start from zero
    const real **a              # K rows of at least m1 reals
    const real **b              # K rows of N reals
    real **c                    # m1 rows of N reals; rows m0:m1 are written
    real *sums                  # NULL, or m1 reals: (+)= sum_k a[k][m], a bias gradient


cdef enum:
    OUTER_K = 256
    OUTER_ROWS = 96
    SUM_ROWS = 32


cdef Py_ssize_t outer_scratch(Py_ssize_t N) noexcept nogil:
    """Reals that `outer` needs: packed b, a row of zeros, turned a, one tail tile."""
    cdef Py_ssize_t width = 4 * VL
    return (ceil_div(N, width) * width * (OUTER_K + 1) + OUTER_ROWS * (OUTER_K + VL)
            + MAX_ROWS * width)


cdef void sum_rows(const real **row, Py_ssize_t K, Py_ssize_t m0, Py_ssize_t n,
                   real *sums) noexcept nogil:
    """sums[m] += sum_k row[k][m0 + m], in chains of SUM_ROWS: one over thousands of rows
    lost to torch's error."""
    cdef real part[OUTER_ROWS]
    cdef Py_ssize_t block, k
    for block in range(ceil_div(K, SUM_ROWS)):
        memset(part, 0, n * sizeof(real))
        for k in range(block * SUM_ROWS, imin((block + 1) * SUM_ROWS, K)):
            add_row(part, row[k] + m0, n)
        add_row(sums, part, n)


cdef void outer(Outer *o, real *scratch) noexcept nogil:
    cdef Py_ssize_t width = 4 * VL, panels = ceil_div(o.N, width)
    cdef Py_ssize_t k0 = 0, n, k, block, m0, rows, r, lane
    cdef real *packed = scratch
    cdef real *zero = packed + panels * width * OUTER_K
    cdef real *tail = zero + panels * width
    cdef real *turned = tail + MAX_ROWS * width
    cdef const real *source[VL]
    cdef const real *a_rows[OUTER_ROWS]
    cdef Product p
    memset(zero, 0, panels * width * sizeof(real))
    p.nv = 4
    p.w = packed
    p.p0 = 0
    p.p1 = panels
    p.panel_stride = width
    p.columns = o.N
    p.tail = tail
    if o.sums != NULL and o.first:
        memset(o.sums + o.m0, 0, (o.m1 - o.m0) * sizeof(real))
    while k0 == 0 or k0 < o.K:
        n = ceil_div(o.K - k0, max(1, ceil_div(o.K - k0, OUTER_K)))     # blocks of equal size
        p.K = n
        p.init = zero if o.first and k0 == 0 else NULL
        pack_rows(o.b + k0, n, o.N, 0, panels, packed)
        for block in range(ceil_div(o.m1 - o.m0, OUTER_ROWS)):
            m0 = o.m0 + block * OUTER_ROWS
            rows = imin(OUTER_ROWS, o.m1 - m0)
            for k in range(ceil_div(n, VL)):    # turned[r][k] = a[k0 + k][m0 + r]
                for lane in range(VL):
                    source[lane] = o.a[k0 + k * VL + lane] + m0 if k * VL + lane < n else NULL
                pack_transposed(source, rows, turned + k * VL, OUTER_K + VL)
            for r in range(rows):
                a_rows[r] = turned + r * (OUTER_K + VL)
            if o.sums != NULL:
                sum_rows(o.a + k0, n, m0, rows, o.sums + m0)
            product(&p, a_rows, o.c + m0, rows)
        k0 += max(1, n)
