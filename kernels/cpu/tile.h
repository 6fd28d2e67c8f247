/* tile.h: the register tile and the packing that feeds it.
 *
 *   c[r][:] += sum_k a[r][k] * w[k][:]      r < rows, NV vectors of VL columns
 *
 * `w` is one packed panel [K][NV * VL]; rows of `a` and `c` are given by pointers, so strides,
 * variable lengths and shifted states need no copy. Every element is a sum of chains of SUM_CHUNK
 * multiply-adds, over k in ascending order, whatever the number of rows: a row's bits depend
 * neither on its neighbours nor on the thread count.
 * Cost: 2 rows K NV VL FLOP; reads K NV VL packed reals once for all rows.
 */
#ifndef FASTSEQ_TILE_H
#define FASTSEQ_TILE_H

#include "vec.h"

/* Rows whose accumulators stay in registers: 32 of them with AVX-512, 16 below. Zen 4, one core,
 * K = 512: heights 4 to 8 all reach 112 to 116 GFLOP/s, 2 and 3 rows 88 to 92, one row 53. */
enum {
    MAX_ROWS = 8,
    MAX_NV = 16,    /* of values read as they lie; packed panels have 4 at most */
    ROW_PANELS = 3, /* panels that a single row is multiplied with at once */
    ROWS_NV4 = VBYTES == 64 ? 6 : 3,
    ROWS_NV3 = VBYTES == 64 ? 8 : 4,
    /* k at once, a multiple of SUM_CHUNK: with 16 registers, which read a panel anew for 3 rows,
     * its block stays in L1; else in L2. LSTM and RNN inference 1.02 to 1.04 times as fast as
     * with 512 (Zen 3, AVX2, H 128 to 512). */
    K_BLOCK = VBYTES == 64 ? 512 : 128,
    SUM_CHUNK = 128, /* one chain over K = 1024 had 3 times the rounding error; the sums cost
                      * nothing measurable */
};

INLINE intptr_t tile_rows(int nv) { return nv == 4 ? ROWS_NV4 : ROWS_NV3; }

/* One k of a tile. The side with fewer numbers is held: 3 rows of 4 vectors and 6 of 2 then fit 16
 * registers, also when several steps are unrolled. */
INLINE void step(const int rows, const int nv, const int turned, const real *const *row, intptr_t k,
                 const real *w, vec acc[MAX_ROWS][MAX_NV]) {
    vec held[MAX_ROWS];
    if (rows < nv) {
        UNROLL
        for (int r = 0; r < rows; r++)
            held[r] = broadcast(turned ? row[0][r] : row[r][k]);
        UNROLL
        for (int j = 0; j < nv; j++) {
            vec wj = load(w + j * VL);
            UNROLL
            for (int r = 0; r < rows; r++)
                acc[r][j] += held[r] * wj;
        }
        return;
    }
    UNROLL
    for (int j = 0; j < nv; j++)
        held[j] = load(w + j * VL);
    UNROLL
    for (int r = 0; r < rows; r++) {
        vec ar = broadcast(turned ? row[0][r] : row[r][k]);
        UNROLL
        for (int j = 0; j < nv; j++)
            acc[r][j] += ar * held[j];
    }
}

/* p[0 : n] into L1, before its use. */
INLINE void prefetch(const real *p, intptr_t n) {
    for (intptr_t d = 0; d < n; d += 64 / sizeof(real))
        __builtin_prefetch(p + d, 0, 3);
}

/* a: row r is a[r][k], or if `turned` a[0][k * lda + r], so that a product with a transposed left
 * side needs no copy. Step k of w is ldw reals after step k - 1; it is prefetched `ahead` reals
 * before its use, not at all if 0. init: NULL to add to c, else one row that every row of c starts
 * from. */
INLINE void tile_fixed(const int rows, const int nv, const int turned, const real *const *a,
                       intptr_t lda, intptr_t k0, intptr_t k1, const real *w, intptr_t ldw,
                       intptr_t ahead, const real *init, real *const *c, intptr_t col) {
    const real *row[MAX_ROWS];
    UNROLL
    for (int r = 0; r < rows; r++)
        row[r] = turned ? a[0] + k0 * lda + r : a[r];
    do {
        vec acc[MAX_ROWS][MAX_NV] = {};
        intptr_t end = k1 - k0 < SUM_CHUNK ? k1 : k0 + SUM_CHUNK;
        UNROLL_STEPS /* GRU inference 1.01 to 1.06 times as fast, LSTM and attention 1.01 (Zen 3) */
        for (; k0 < end; k0++, w += ldw) {
            if (ahead)
                prefetch(w + ahead, nv * VL);
            step(rows, nv, turned, row, k0, w, acc);
            row[0] += turned ? lda : 0;
        }
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int j = 0; j < nv; j++)
                store(c[r] + col + j * VL,
                      acc[r][j] + load(init ? init + j * VL : c[r] + col + j * VL));
        init = 0;
    } while (k0 < k1);
}

/* One out-of-line function per tile shape, so that each inner loop has the registers to itself. */
#define TILE(R, NV)                                                                                \
    static __attribute__((noinline, unused)) void tile_##R##x##NV(                                 \
        const real *const *a, intptr_t k0, intptr_t k1, const real *w, const real *init,           \
        real *const *c, intptr_t col) {                                                            \
        tile_fixed(R, NV, 0, a, 0, k0, k1, w, NV * VL, 0, init, c, col);                           \
    }
TILE(1, 3) TILE(2, 3) TILE(3, 3) TILE(4, 3) TILE(1, 4) TILE(2, 4) TILE(3, 4)
#if VBYTES == 64
TILE(5, 3) TILE(6, 3) TILE(7, 3) TILE(8, 3) TILE(4, 4) TILE(5, 4) TILE(6, 4)
#endif
#undef TILE

typedef void (*TileFn)(const real *const *, intptr_t, intptr_t, const real *, const real *,
                       real *const *, intptr_t);

/* rows <= tile_rows(nv), nv is 3 or 4. */
INLINE void tile(intptr_t rows, int nv, const real *const *a, intptr_t k0, intptr_t k1,
                 const real *w, const real *init, real *const *c, intptr_t col) {
#if VBYTES == 64
    static const TileFn nv3[] = {0, tile_1x3, tile_2x3, tile_3x3, tile_4x3,
                                 tile_5x3, tile_6x3, tile_7x3, tile_8x3};
    static const TileFn nv4[] = {0, tile_1x4, tile_2x4, tile_3x4, tile_4x4, tile_5x4, tile_6x4};
#else
    static const TileFn nv3[] = {0, tile_1x3, tile_2x3, tile_3x3, tile_4x3};
    static const TileFn nv4[] = {0, tile_1x4, tile_2x4, tile_3x4};
#endif
    (nv == 4 ? nv4 : nv3)[rows](a, k0, k1, w, init, c, col);
}

/* One row times `panels` neighbouring panels, `panel` reals apart in w and `panel_c` in c:
 * c += a w. A single panel has 3 or 4 chains of additions where the FMA units hold 8, and one
 * stream from memory. Bits as tile's. With B = 1, T 100, forward: GRU 1.23 times as fast as panel
 * by panel, LSTM 1.14, RNN 1.07 to 1.2 (Zen 3, AVX2, H 64 to 1024). */
INLINE void row_fixed(const int panels, const int nv, const real *a, intptr_t k0, intptr_t k1,
                      const real *w, intptr_t panel, real *c, intptr_t panel_c) {
    do {
        vec acc[ROW_PANELS][4] = {};
        intptr_t end = k1 - k0 < SUM_CHUNK ? k1 : k0 + SUM_CHUNK;
        for (; k0 < end; k0++, w += nv * VL) {
            vec ak = broadcast(a[k0]);
            UNROLL
            for (int p = 0; p < panels; p++)
                UNROLL
                for (int j = 0; j < nv; j++)
                    acc[p][j] += ak * load(w + p * panel + j * VL);
        }
        UNROLL
        for (int p = 0; p < panels; p++)
            UNROLL
            for (int j = 0; j < nv; j++)
                store(c + p * panel_c + j * VL, acc[p][j] + load(c + p * panel_c + j * VL));
    } while (k0 < k1);
}

#define ROW_TILE(P, NV)                                                                            \
    static __attribute__((noinline, unused)) void row_tile_##P##x##NV(                             \
        const real *a, intptr_t k0, intptr_t k1, const real *w, intptr_t panel, real *c,           \
        intptr_t panel_c) {                                                                        \
        row_fixed(P, NV, a, k0, k1, w, panel, c, panel_c);                                         \
    }
ROW_TILE(1, 3) ROW_TILE(2, 3) ROW_TILE(3, 3) ROW_TILE(1, 4) ROW_TILE(2, 4) ROW_TILE(3, 4)
#undef ROW_TILE

typedef void (*RowTileFn)(const real *, intptr_t, intptr_t, const real *, intptr_t, real *,
                          intptr_t);

/* panels <= ROW_PANELS, nv is 3 or 4. */
INLINE void row_tile(intptr_t panels, int nv, const real *a, intptr_t k0, intptr_t k1,
                     const real *w, intptr_t panel, real *c, intptr_t panel_c) {
    static const RowTileFn nv3[] = {0, row_tile_1x3, row_tile_2x3, row_tile_3x3};
    static const RowTileFn nv4[] = {0, row_tile_1x4, row_tile_2x4, row_tile_3x4};
    (nv == 4 ? nv4 : nv3)[panels](a, k0, k1, w, panel, c, panel_c);
}

/* Transposes VL x VL in registers by log2(VL) steps of two-register shuffles: packing takes
 * 0.18 ns an element (Zen 3, AVX2, 64 columns), against 0.98 with shuffles that are no single
 * instruction and a branch for every row. */
#define LOWER(l, d) ((l) & (d) ? VL + ((l) ^ (d)) : (l))
#define UPPER(l, d) ((l) & (d) ? VL + (l) : (l) ^ (d))
#define BUTTERFLY(d)                                                                               \
    for (int i = 0; i < VL && d < VL; i++)                                                         \
        if (!(i & (d))) {                                                                          \
            vec a = v[i], b = v[i + (d) % VL];                                                     \
            v[i] = __builtin_shufflevector(a, b, LANES(LOWER, (d) % VL));                          \
            v[i + (d) % VL] = __builtin_shufflevector(a, b, LANES(UPPER, (d) % VL));               \
        }

/* The butterfly of neighbouring lanes is no single instruction for float32, unpacking in 128-bit
 * lanes is; it leaves the middle two of every four vectors swapped. */
#define UNPACK_LOW(l, d) (((l) & ~3) + (((l) & 3) >> 1) + ((l) & (d) ? VL : 0))
#define UNPACK_HIGH(l, d) (UNPACK_LOW(l, d) + 2)

INLINE void transpose(vec v[VL]) {
#if REAL_BITS == 32
    for (int i = 0; i < VL; i += 2) {
        vec a = v[i], b = v[i + 1];
        v[i] = __builtin_shufflevector(a, b, LANES(UNPACK_LOW, 1));
        v[i + 1] = __builtin_shufflevector(a, b, LANES(UNPACK_HIGH, 1));
    }
    BUTTERFLY(2)
    for (int i = 0; i < VL; i += 4) {
        vec a = v[i + 1];
        v[i + 1] = v[i + 2];
        v[i + 2] = a;
    }
#else
    BUTTERFLY(1)
    BUTTERFLY(2)
#endif
    BUTTERFLY(4)
    BUTTERFLY(8)
}

/* Half of the vectors: their lanes join two neighbouring groups of d lanes of two neighbouring
 * vectors, of those that hold lanes of the first n rows. */
#define JOIN_GROUPS(JOIN, LOW, HIGH, d)                                                            \
    for (int i = 0; i < VL / (2 * (d)) && 2 * i * (d) < n; i++) {                                  \
        vec a = v[2 * i], b = (2 * i + 1) * (d) < n ? v[2 * i + 1] : a;                            \
        v[i] = JOIN(__builtin_shufflevector(a, b, LANES(LOW, (d) % VL)),                           \
                    __builtin_shufflevector(a, b, LANES(HIGH, (d) % VL)));                         \
    }
#define EVEN(l, d) (((l) & ~3) + ((l) & 1) * 2 + ((l) & 2 ? VL : 0))
#define ODD(l, d) (EVEN(l, d) + 1)

#if REAL_BITS == 32
#define JOIN_ROWS(JOIN)                                                                            \
    JOIN_GROUPS(JOIN, EVEN, ODD, 1)                                                                \
    JOIN_GROUPS(JOIN, EVEN, ODD, 2)                                                                \
    JOIN_GROUPS(JOIN, LOWER, UPPER, 4)                                                             \
    JOIN_GROUPS(JOIN, LOWER, UPPER, 8)
#else
#define JOIN_ROWS(JOIN)                                                                            \
    JOIN_GROUPS(JOIN, LOWER, UPPER, 1)                                                             \
    JOIN_GROUPS(JOIN, LOWER, UPPER, 2)                                                             \
    JOIN_GROUPS(JOIN, LOWER, UPPER, 4)
#endif
#define SUM(a, b) ((a) + (b))

/* Lane l is the sum of v[l]'s lanes. VL - 1 additions and twice as many shuffles;
 * a transposition has VL log2(VL). */
INLINE vec sum_rows(vec v[VL]) {
    const int n = VL;
    JOIN_ROWS(SUM)
    return v[0];
}

/* Lane l < n is the largest of v[l]'s lanes; a NaN may be passed over. */
INLINE vec max_rows(vec v[VL], int n) {
    JOIN_ROWS(max_)
    return v[0];
}

/* dst[k][lane] = src[lane][k] for VL source rows (NULL reads as zeros);
 * consecutive k are `ld` apart in dst. */
static __attribute__((unused)) void pack_transposed(const real *const *src, intptr_t K, real *dst,
                                                    intptr_t ld) {
    int all = 1;
    for (int l = 0; l < VL; l++)
        all &= src[l] != 0;
    for (intptr_t k0 = 0; k0 < K; k0 += VL) {
        intptr_t n = K - k0 < VL ? K - k0 : VL;
        vec v[VL];
        if (n == VL && all) {
            for (int l = 0; l < VL; l++)
                v[l] = load(src[l] + k0);
            transpose(v);
            for (int k = 0; k < VL; k++)
                store(dst + (k0 + k) * ld, v[k]);
            continue;
        }
        for (int l = 0; l < VL; l++) {
            v[l] = (vec){0};
            if (src[l])
                memcpy(&v[l], src[l] + k0, n * sizeof(real));
        }
        transpose(v);
        for (intptr_t k = 0; k < n; k++)
            store(dst + (k0 + k) * ld, v[k]);
    }
}

/* Reals of n in whole vectors. */
INLINE intptr_t round_up(intptr_t n) { return (n + VL - 1) / VL * VL; }

/* dst[0 : width] = src[0 : n], then zeros. */
INLINE void copy_padded(real *dst, const real *src, intptr_t n, intptr_t width) {
    memcpy(dst, src, n * sizeof(real));
    memset(dst + n, 0, (width - n) * sizeof(real));
}

/* Short rows: no call of memcpy for each. */
INLINE void copy_row(real *dst, const real *src, intptr_t n) {
    intptr_t j = 0;
    for (; j + VL <= n; j += VL)
        store(dst + j, load(src + j));
    for (; j < n; j++)
        dst[j] = src[j];
}

/* sum[m] += row[m] */
INLINE void add_row(real *sum, const real *row, intptr_t n) {
    for (intptr_t m = 0; m < n; m++)
        sum[m] += row[m];
}

#endif
