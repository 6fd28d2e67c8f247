# The running softmax of a few rows, forward and decoding (attention_softmax.h has the equations).

cdef void softmax_rows(int rows, const RowOptions *o, real **s, Py_ssize_t j0, const Limits *at,
                       const Limits *tile, real *m, real *l, real **acc,
                       Py_ssize_t DV) noexcept nogil:
    """Scores of at most SOFTMAX_ROWS rows to weights e^(s - m), 0 for keys of the tile that a row
    may not attend. m and l go on, and what acc has summed before shrinks."""
    cdef real lanes[SOFTMAX_ROWS * VL]
    cdef real most[SOFTMAX_LANES]
    cdef real before[SOFTMAX_LANES]
    cdef real shrink[SOFTMAX_LANES]
    cdef int r
    memset(before, 0, sizeof(before))
    memset(shrink, 0, sizeof(shrink))
    for r in range(SOFTMAX_ROWS):
        memset(lanes + r * VL, 0, VL * sizeof(real))
        if r < rows and at[r].lo < at[r].hi:
            finish_scores(&o[r], s[r], j0, at[r].lo, at[r].hi, NULL, lanes + r * VL)
    row_maxima(lanes, most)
    for r in range(rows):
        if at[r].lo >= at[r].hi:
            most[r] = -INFINITY
        elif most[r] == -INFINITY:
            most[r] = nan_or_nothing(s[r] + (at[r].lo - j0), at[r].hi - at[r].lo)
        before[r] = m[r]
        if not most[r] <= m[r]:     # NaN becomes the maximum and stays
            m[r] = most[r]
        shrink[r] = m[r]
    shrinkage(before, shrink, shrink)
    for r in range(rows):
        if most[r] == -INFINITY:
            memset(s[r] + (tile.lo - j0), 0, (tile.hi - tile.lo) * sizeof(real))
            continue
        if l[r] != 0:
            l[r] *= shrink[r]
            scale_row(acc[r], round_up(DV), shrink[r])
        l[r] += exponentials(s[r], j0, at[r].lo, at[r].hi, tile.lo, tile.hi, m[r])
        if o[r].threshold:
            drop(&o[r], s[r], j0, at[r].lo, at[r].hi)
