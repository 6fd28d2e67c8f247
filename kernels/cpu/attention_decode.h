/* attention_decode.h: few queries against keys and values as they lie in memory,
 * read once and not packed. */
#ifndef FASTSEQ_ATTENTION_DECODE_H
#define FASTSEQ_ATTENTION_DECODE_H

#include "tile.h"

/* Keys and values of a decoding step come from memory once; without being asked for ahead a core
 * waits for each row: decoding took 1.2 to 1.4 times as long (Zen 3, D 64 and 128, S 1k to 64k). */
enum { AHEAD_BYTES = 4096, DECODE_ROWS = 4, WEIGH_KEYS = 32 };

/* s[r][j] = q[r] . k_j for rows r and keys j of [0, n): k_j is k + j * ld. The keys are read
 * once, and not packed; as many at a time as give a whole vector of sums, or what is done for
 * each costs as much as its products. */
INLINE void dots_fixed(const int rows, const real *const *q, const real *k, intptr_t ld, intptr_t n,
                       intptr_t D, real *const *s) {
    const int places = rows == 3 ? 4 : rows; /* rows in a vector of sums */
    const int keys = VL > places ? VL / places : 1;
    /* whose sums are in registers: 8 chains hide an addition's latency, AVX-512 holds 16 */
    const int together = rows == 1 && keys > 4 ? 8 : keys < 4 ? keys : 4;
    intptr_t ahead = (AHEAD_BYTES / (D * sizeof(real)) + 1) * ld;
    for (intptr_t j = 0; j < n; j += keys) {
        vec lanes[VL > DECODE_ROWS ? VL : DECODE_ROWS] = {};
        real sums[VL > DECODE_ROWS ? VL : DECODE_ROWS];
        UNROLL
        for (int l = 0; l < keys; l += together) {
            vec acc[8][DECODE_ROWS] = {};
            const real *key[8];
            intptr_t d = 0;
            UNROLL
            for (int i = 0; i < together; i++)
                key[i] = k + (j + l + i < n ? j + l + i : n - 1) * ld;
            for (; d + VL <= D; d += VL)
                UNROLL
                for (int i = 0; i < together; i++) {
                    vec kd = load(key[i] + d);
                    if (VBYTES == 64 || d * sizeof(real) % 64 == 0)
                        __builtin_prefetch(key[i] + ahead + d, 0, 3);
                    UNROLL
                    for (int r = 0; r < rows; r++)
                        acc[i][r] += kd * load(q[r] + d);
                }
            if (d < D)
                UNROLL
                for (int i = 0; i < together; i++) {
                    vec kd = {};
                    memcpy(&kd, key[i] + d, (D - d) * sizeof(real));
                    UNROLL
                    for (int r = 0; r < rows; r++)
                        acc[i][r] += kd * load(q[r] + d);
                }
            UNROLL
            for (int i = 0; i < together; i++)
                UNROLL
                for (int r = 0; r < rows; r++)
                    lanes[r * keys + l + i] = acc[i][r];
        }
        UNROLL
        for (int v = 0; v < places * keys; v += VL)
            store(sums + v, sum_rows(lanes + v));
        UNROLL
        for (int r = 0; r < rows; r++)
            memcpy(s[r] + j, sums + r * keys, keys * sizeof(real));
    }
}

#define DOTS(R)                                                                                    \
    static __attribute__((noinline, unused)) void dots_##R(const real *const *q, const real *k,    \
                                                           intptr_t ld, intptr_t n, intptr_t D,    \
                                                           real *const *s) {                       \
        dots_fixed(R, q, k, ld, n, D, s);                                                          \
    }
DOTS(1) DOTS(2) DOTS(3) DOTS(4)
#undef DOTS

/* o[r][d] += sum_j p[r][j] v_j[d] for columns [d, d + nv VL), keys [0, n); v_j is v + j * ld. */
#define WEIGH(R, NV)                                                                               \
    static __attribute__((noinline, unused)) void weigh_##R##x##NV(                                \
        const real *const *p, const real *v, intptr_t ld, intptr_t n, real *const *o,              \
        intptr_t d) {                                                                              \
        tile_fixed(R, NV, 0, p, 0, 0, n, v + d, ld, WEIGH_KEYS * ld, 0, o, d);                     \
    }
#define WIDTHS(R) WEIGH(R, 1) WEIGH(R, 2) WEIGH(R, 3) WEIGH(R, 4)
WIDTHS(1) WIDTHS(2) WIDTHS(3) WIDTHS(4)
#undef WIDTHS
#undef WEIGH
typedef void (*DotsFn)(const real *const *, const real *, intptr_t, intptr_t, intptr_t,
                       real *const *);
typedef void (*WeighFn)(const real *const *, const real *, intptr_t, intptr_t, real *const *,
                        intptr_t);

INLINE void dots(intptr_t rows, const real *const *q, const real *k, intptr_t ld, intptr_t n,
                 intptr_t D, real *const *s) {
    static const DotsFn fn[] = {0, dots_1, dots_2, dots_3, dots_4};
    fn[rows](q, k, ld, n, D, s);
}

/* o[r] += sum_j p[r][j] v_j for keys [0, n), a few at a time so that their rows stay in L1. */
static __attribute__((unused)) void weigh(intptr_t rows, const real *const *p, const real *v,
                                          intptr_t ld, intptr_t n, intptr_t DV, real *const *o) {
#define WIDTHS(R) {0, weigh_##R##x1, weigh_##R##x2, weigh_##R##x3, weigh_##R##x4}
    static const WeighFn fn[][5] = {{0}, WIDTHS(1), WIDTHS(2), WIDTHS(3), WIDTHS(4)};
#undef WIDTHS
    intptr_t most = VBYTES == 64 || rows < 4 ? 4 : 3;
    intptr_t block = DV <= most * VL && DV % VL == 0 ? n : WEIGH_KEYS; /* read once, or again */
    const real *pj[DECODE_ROWS];
    for (intptr_t j = 0; j < n; j += block) {
        intptr_t keys = n - j < block ? n - j : block, d = 0;
        for (int r = 0; r < rows; r++)
            pj[r] = p[r] + j;
        while (d + VL <= DV) {
            intptr_t nv = (DV - d) / VL < most ? (DV - d) / VL : most;
            fn[rows][nv](pj, v + j * ld, ld, keys, o, d);
            d += nv * VL;
        }
        for (; d < DV; d++)
            for (int r = 0; r < rows; r++) {
                real sum = 0;
                for (intptr_t i = 0; i < keys; i++)
                    sum += pj[r][i] * v[(j + i) * ld + d];
                o[r][d] += sum;
            }
    }
}

/* o[d * o_d] += sum_j p[j * p_j] (v[j * ld + d] * scale), leaving out what has weight zero: a value
 * that may not be attended can hold NaN. */
static __attribute__((unused)) void weigh_sparse(const real *p, intptr_t p_j, const real *v,
                                                 intptr_t ld, intptr_t n, real scale, intptr_t DV,
                                                 real *o, intptr_t o_d) {
    for (intptr_t j = 0; j < n; j++)
        for (intptr_t d = 0; d < DV && p[j * p_j] != 0; d++)
            o[d * o_d] += p[j * p_j] * (v[j * ld + d] * scale);
}

INLINE int all_finite(const real *c, intptr_t n) {
    real sum = 0;
    for (intptr_t j = 0; j < n; j++)
        sum += c[j] * 0;
    return sum == 0;
}

#endif
