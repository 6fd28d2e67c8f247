/* attention_decode.h: few queries against keys and values as they lie in memory,
 * read once and not packed. */
#ifndef FASTSEQ_ATTENTION_DECODE_H
#define FASTSEQ_ATTENTION_DECODE_H

#include "tile.h"

enum {
    DECODE_ROWS = 4,
    WEIGH_SUMS = VBYTES == 64 ? 24 : 12, /* in registers; the rest holds weights and values */
    TURN_KEYS = 32,                      /* that heads take in turn, and that a chain sums */
    REREAD_KEYS = 16,                    /* whose values stay in L1 until the last rows are done */
    AHEAD = 8192 / sizeof(real)          /* reals from what is read to what is prefetched */
};
/* or the sums of values, and what dots writes past a turn's keys, depended on the turns */
_Static_assert(TURN_KEYS % REREAD_KEYS == 0 && TURN_KEYS % VL == 0, "turns are of whole blocks");

/* Keys and values of a decoding step come from memory once. They are read in the order in which
 * they lie there, then the core's prefetchers keep up: 20 to 35 GB/s on one core, as much as a
 * plain sum, against 10 to 14 with the lines of 8 rows in turn or half a row at a time, whatever
 * was prefetched (Zen 4, D 64 and 128). So the compiler must not interleave what this stands
 * between. The prefetchers look some lines ahead, too few while rows are multiplied: rows without
 * gaps between them are prefetched AHEAD as well. Two threads decode 1.1 to 1.7 times as fast from
 * memory, 0.95 to 1.2 in cache (Zen 5; less with half of AHEAD or twice). */
#define IN_ORDER __asm__ volatile("")

/* s[r][j] = q[r] . k_j for rows r and keys j of [0, n): k_j is k + j * ld. The keys are read
 * once, and not packed; as many at a time as give a whole vector of sums, or what is done for
 * each costs as much as its products. `together` 1 or 2: keys whose sums grow at the same time. */
INLINE void dots_fixed(const int rows, const real *const *q, const real *k, intptr_t ld, intptr_t n,
                       intptr_t D, int together, intptr_t ahead, real *const *s) {
    const int places = rows == 3 ? 4 : rows; /* rows in a vector of sums */
    const int keys = VL > places ? VL / places : 1;
    together = keys > 1 ? together : 1;
    for (intptr_t j = 0; j < n; j += keys) {
        vec lanes[VL > DECODE_ROWS ? VL : DECODE_ROWS] = {};
        real sums[VL > DECODE_ROWS ? VL : DECODE_ROWS];
        UNROLL
        for (int l = 0; l < keys; l += together) {
            IN_ORDER;
            vec acc[2][DECODE_ROWS] = {};
            const real *key[2];
            intptr_t d = 0;
            UNROLL
            for (int i = 0; i < together; i++)
                key[i] = k + (j + l + i < n ? j + l + i : n - 1) * ld;
            for (; d + VL <= D; d += VL)
                UNROLL
                for (int i = 0; i < together; i++) {
                    if (ahead && d * sizeof(real) % 64 == 0)
                        prefetch(key[i] + d + ahead, VL);
                    vec kd = load(key[i] + d);
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

/* With a usual D known to the compiler q stays in registers: a step of 4 rows with keys in cache
 * takes 0.89 to 0.94 of the time (Zen 4). Two keys of 64 are near enough to a stream, and 4 rows
 * with AVX2 then have 8 chains of additions: 42 GB/s in cache against 29. */
#define DOTS(R)                                                                                    \
    static __attribute__((noinline, unused)) void dots_##R(const real *const *q, const real *k,    \
                                                           intptr_t ld, intptr_t n, intptr_t D,    \
                                                           real *const *s) {                       \
        if (D == 64 && ld == D)                                                                    \
            dots_fixed(R, q, k, 64, n, 64, 2, AHEAD, s);                                           \
        else if (D == 128 && ld == D)                                                              \
            dots_fixed(R, q, k, 128, n, 128, 1, AHEAD, s);                                         \
        else if (D == 64)                                                                          \
            dots_fixed(R, q, k, ld, n, 64, 2, 0, s);                                               \
        else if (D == 128)                                                                         \
            dots_fixed(R, q, k, ld, n, 128, 1, 0, s);                                              \
        else                                                                                       \
            dots_fixed(R, q, k, ld, n, D, 1, ld == D ? AHEAD : 0, s);                              \
    }
DOTS(1) DOTS(2) DOTS(3) DOTS(4)
#undef DOTS

/* o[r][d] += sum_j p[r][j] v_j[d] for columns [d, d + nv VL), keys [0, n); v_j is v + j * ld,
 * prefetched or not. */
#define WEIGH(R, NV)                                                                               \
    static __attribute__((noinline, unused)) void weigh_##R##x##NV(                                \
        const real *const *p, const real *v, intptr_t ld, intptr_t n, real *const *o, intptr_t d,  \
        int prefetched) {                                                                          \
        if (prefetched)                                                                            \
            tile_fixed(R, NV, 0, p, 0, 0, n, v + d, ld, AHEAD, 0, o, d);                           \
        else                                                                                       \
            tile_fixed(R, NV, 0, p, 0, 0, n, v + d, ld, 0, 0, o, d);                               \
    }
#define WIDTHS(R)                                                                                  \
    WEIGH(R, 1) WEIGH(R, 2) WEIGH(R, 3) WEIGH(R, 4) WEIGH(R, 5) WEIGH(R, 6) WEIGH(R, 7)            \
    WEIGH(R, 8) WEIGH(R, 9) WEIGH(R, 10) WEIGH(R, 11) WEIGH(R, 12) WEIGH(R, 13) WEIGH(R, 14)       \
    WEIGH(R, 15) WEIGH(R, 16)
WIDTHS(1) WIDTHS(2) WIDTHS(3) WIDTHS(4)
#undef WIDTHS
#undef WEIGH
typedef void (*DotsFn)(const real *const *, const real *, intptr_t, intptr_t, intptr_t,
                       real *const *);
typedef void (*WeighFn)(const real *const *, const real *, intptr_t, intptr_t, real *const *,
                        intptr_t, int);

INLINE void dots(intptr_t rows, const real *const *q, const real *k, intptr_t ld, intptr_t n,
                 intptr_t D, real *const *s) {
    static const DotsFn fn[] = {0, dots_1, dots_2, dots_3, dots_4};
    fn[rows](q, k, ld, n, D, s);
}

/* n rows of DV reals into L1, in the order in which they lie. */
INLINE void read_rows(const real *v, intptr_t ld, intptr_t n, intptr_t DV) {
    for (intptr_t j = 0; j < n; j++)
        for (intptr_t d = 0; d < DV; d += 64 / sizeof(real))
            (void)*(const volatile real *)(v + j * ld + d);
}

/* o[r] += sum_j p[r][j] v_j for keys [0, n). Where registers hold sums of two rows' whole values
 * or of all rows, values are read in whole rows of them. Else a few keys' values are multiplied by
 * columns; where they are not prefetched, they are read into L1 first, in their order. */
static __attribute__((unused)) void weigh(intptr_t rows, const real *const *p, const real *v,
                                          intptr_t ld, intptr_t n, intptr_t DV, real *const *o) {
#define AT(R, NV) ((R) * (NV) <= WEIGH_SUMS ? weigh_##R##x##NV : 0)
#define WIDTHS(R)                                                                                  \
    {0, AT(R, 1), AT(R, 2), AT(R, 3), AT(R, 4), AT(R, 5), AT(R, 6), AT(R, 7), AT(R, 8), AT(R, 9),  \
     AT(R, 10), AT(R, 11), AT(R, 12), AT(R, 13), AT(R, 14), AT(R, 15), AT(R, 16)}
    static const WeighFn fn[][MAX_NV + 1] = {{0}, WIDTHS(1), WIDTHS(2), WIDTHS(3), WIDTHS(4)};
#undef WIDTHS
#undef AT
    intptr_t vectors = DV / VL, height = rows;
    int in_rows = vectors <= MAX_NV && vectors * (rows < 2 ? rows : 2) <= WEIGH_SUMS;
    while (in_rows && height * vectors > WEIGH_SUMS)
        height = (height + 1) / 2;
    intptr_t most = in_rows || rows * MAX_NV <= WEIGH_SUMS ? MAX_NV : WEIGH_SUMS / rows;
    intptr_t parts = vectors > most ? (vectors + most - 1) / most : 1;
    most = (vectors + parts - 1) / parts; /* of equal width */
    int prefetched = ld == DV && parts <= 6; /* the first of more reads them too soon */
    intptr_t block = in_rows && height == rows && DV == vectors * VL ? TURN_KEYS : REREAD_KEYS;
    const real *pj[DECODE_ROWS];
    for (intptr_t j = 0; j < n; j += block) {
        intptr_t keys = n - j < block ? n - j : block, d = 0;
        for (int r = 0; r < rows; r++)
            pj[r] = p[r] + j;
        if (!in_rows && !prefetched)
            read_rows(v + j * ld, ld, keys, DV);
        while (d + VL <= DV) {
            intptr_t nv = (DV - d) / VL < most ? (DV - d) / VL : most;
            for (intptr_t r = 0; r < rows; r += height)
                fn[rows - r < height ? rows - r : height][nv](pj + r, v + j * ld, ld, keys, o + r,
                                                              d, prefetched);
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
