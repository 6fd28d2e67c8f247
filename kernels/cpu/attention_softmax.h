/* attention_softmax.h: the parts of the running softmax, for SOFTMAX_ROWS rows at once.
 *
 *   m' = max(m, max_j s_j)      p_j = e^(s_j - m')      l' = e^(m - m') l + sum_j p_j
 *
 * Rows leave the maxima of their lanes, (SOFTMAX_ROWS, VL), which are joined together: one by one,
 * each waits for log2(VL) steps of its own, and a branch on whether its maximum rose is guessed
 * wrong. Forward takes 0.99 of the time (Emerald Rapids).
 */
#ifndef FASTSEQ_ATTENTION_SOFTMAX_H
#define FASTSEQ_ATTENTION_SOFTMAX_H

#include "tile.h"
#include <math.h>

enum {
    SOFTMAX_ROWS = 8,
    SOFTMAX_LANES = VL > SOFTMAX_ROWS ? VL : SOFTMAX_ROWS /* in whole vectors */
};

#define NEGATIVE_INFINITY ((vec){} - (real)INFINITY)

/* libm's, of the dtype */
INLINE real exp_real(real x) { return sizeof(real) == 4 ? (real)expf(x) : (real)exp(x); }
INLINE real log_real(real x) { return sizeof(real) == 4 ? (real)logf(x) : (real)log(x); }

/* m[r] = the largest lane of row r; a NaN may be passed over. */
INLINE void row_maxima(const real *lanes, real *m) {
    for (int r = 0; r < SOFTMAX_ROWS; r += VL) {
        vec v[VL];
        UNROLL
        for (int l = 0; l < VL && l < SOFTMAX_ROWS; l++)
            v[l] = load(lanes + (r + l) * VL);
        store(m + r, max_rows(v, SOFTMAX_ROWS));
    }
}

/* What is left of a row's sums when its maximum rises from `before` to `after`: e^(before - after),
 * 1 also for two equal infinities. */
INLINE void shrinkage(const real *before, const real *after, real *shrink) {
    for (int r = 0; r < SOFTMAX_ROWS; r += VL) {
        vec a = load(before + r), b = load(after + r);
        store(shrink + r, choose(a == b, broadcast(1), exp_nonpositive(a - b)));
    }
}

/* A NaN of s, or -inf: for rows whose maximum passed over it. */
INLINE real nan_or_nothing(const real *s, intptr_t n) {
    real found = -(real)INFINITY;
    for (intptr_t j = 0; j < n && found == found; j++)
        found = s[j] != s[j] ? s[j] : found;
    return found;
}

/* e^(s - m) for the vector at s, in its place */
INLINE vec exponential(real *s, real m) {
    vec p = exp_nonpositive(load(s) - m);
    store(s, p);
    return p;
}

/* s = e^(s - m) for keys lo : hi, 0 in the rest of [z0, z1); m is finite. Returns the sum. */
static __attribute__((unused)) real exponentials(real *s, intptr_t j0, intptr_t lo, intptr_t hi,
                                                 intptr_t z0, intptr_t z1, real m) {
    vec sum[2] = {};
    intptr_t first = lo - (lo - j0) % VL, j = first;
    s -= j0;
    for (; j + VL < hi; j += 2 * VL) {
        sum[0] += exponential(s + j, m);
        sum[1] += exponential(s + j + VL, m);
    }
    if (j < hi) {
        sum[0] += exponential(s + j, m);
        j += VL;
    }
    for (intptr_t i = z0; i < first; i++)
        s[i] = 0;
    for (; j < z1; j++)
        s[j] = 0;
    return sum_lanes(sum[0] + sum[1]);
}

INLINE void scale_row(real *c, intptr_t n, real by) {
    for (intptr_t j = 0; j < n; j++)
        c[j] *= by;
}

#endif
