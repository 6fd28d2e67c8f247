/* attention_panels.h: attention's register tiles, and the packing that feeds them.
 *
 * A panel is PANEL neighbouring columns, [K][PANEL]; the last one of a matrix is as many
 * whole vectors as are left, so that a matrix of N columns takes K * round_up(N) reals
 * and panel p starts at p * PANEL * K.
 */
#ifndef FASTSEQ_ATTENTION_PANELS_H
#define FASTSEQ_ATTENTION_PANELS_H

#include "tile.h"

/* 6 x 2 vectors fill 12 of 16 registers and read 64 bytes of w for 12 FMAs; 6 x 4 fill 24 of 32. */
enum { PANEL_VECTORS = VBYTES == 64 ? 4 : 2, PANEL = PANEL_VECTORS * VL, TILE_ROWS = 6 };

/* Keys of a packed block of the forward pass, which all queries read from L2, and after which each
 * row's maximum is looked for: with 512 instead of 256 forward is 1.02 to 1.04 times as fast
 * (Zen 5, 1 MiB of L2 a core, L 512 to 2048); Zen 3 has half of that. */
enum { KEY_BLOCK = VBYTES == 64 ? 512 : 256 };

/* Queries of a block, forward and backward: whole tiles, and of all panels. */
enum { QUERY_ROWS = 48 };

/* Reals of a packed matrix, K steps of N columns; and of pack_turned. */
INLINE intptr_t panel_reals(intptr_t K, intptr_t N) { return K * round_up(N); }

/* Whether `panels` is for finite numbers only. */
enum { FINITE_ONLY = 0 };

/* Around a thread's products. */
INLINE void panels_begin(void) {}
INLINE void panels_end(void) {}

/* Rows of the next tile of n: tiles of equal height, not full ones and a small rest. */
INLINE intptr_t tile_height(intptr_t n) {
    intptr_t tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
    return (n + tiles - 1) / tiles;
}

#define TILES(R, NV)                                                                               \
    static __attribute__((noinline, unused)) void panel_##R##x##NV(                                \
        const real *const *a, intptr_t lda, intptr_t k0, intptr_t k1, const real *w, intptr_t ldw, \
        const real *init, real *const *c, intptr_t col) {                                          \
        tile_fixed(R, NV, 0, a, lda, k0, k1, w, ldw, 0, init, c, col);                             \
    }                                                                                              \
    static __attribute__((noinline, unused)) void turned_##R##x##NV(                               \
        const real *const *a, intptr_t lda, intptr_t k0, intptr_t k1, const real *w, intptr_t ldw, \
        const real *init, real *const *c, intptr_t col) {                                          \
        tile_fixed(R, NV, 1, a, lda, k0, k1, w, ldw, 0, init, c, col);                             \
    }
#define HEIGHTS(NV) TILES(1, NV) TILES(2, NV) TILES(3, NV) TILES(4, NV) TILES(5, NV) TILES(6, NV)
HEIGHTS(1) HEIGHTS(2)
#if VBYTES == 64
HEIGHTS(3) HEIGHTS(4)
#endif
#undef HEIGHTS
#undef TILES

typedef void (*PanelFn)(const real *const *, intptr_t, intptr_t, intptr_t, const real *, intptr_t,
                        const real *, real *const *, intptr_t);

INLINE void all_panels(int rows, int turned, const real *const *a, intptr_t lda, intptr_t k0,
                       intptr_t k1, const real *w, intptr_t K, intptr_t N, intptr_t n0, intptr_t n1,
                       int add, real *const *c) {
    static const real zero[PANEL];
#define ROW_OF(KIND, NV)                                                                           \
    {0, KIND##_1x##NV, KIND##_2x##NV, KIND##_3x##NV, KIND##_4x##NV, KIND##_5x##NV, KIND##_6x##NV}
    static const PanelFn fn[2][PANEL_VECTORS + 1][TILE_ROWS + 1] = {
        {{0}, ROW_OF(panel, 1), ROW_OF(panel, 2),
#if VBYTES == 64
         ROW_OF(panel, 3), ROW_OF(panel, 4)
#endif
        },
        {{0}, ROW_OF(turned, 1), ROW_OF(turned, 2),
#if VBYTES == 64
         ROW_OF(turned, 3), ROW_OF(turned, 4)
#endif
        }};
#undef ROW_OF
    for (intptr_t col = n0 / PANEL * PANEL; col < n1; col += PANEL) {
        intptr_t width = round_up(N) - col < PANEL ? round_up(N) - col : PANEL;
        intptr_t skip = col < n0 ? (n0 - col) / VL : 0;
        intptr_t nv = (n1 - col < width ? round_up(n1 - col) : width) / VL - skip;
        fn[turned][nv][rows](a, lda, k0, k1, w + col * K + k0 * width + skip * VL, width,
                             add ? 0 : zero, c, col + skip * VL);
    }
}

/* Rows of a times the vectors of w that hold columns [n0, n1), for k in [k0, k1). w holds K steps
 * of N columns. c = or, if `add`, c += */
static __attribute__((unused)) void panels(int rows, const real *const *a, intptr_t k0, intptr_t k1,
                                           const real *w, intptr_t K, intptr_t N, intptr_t n0,
                                           intptr_t n1, int add, real *const *c) {
    all_panels(rows, 0, a, 0, k0, k1, w, K, N, n0, n1, add, c);
}

/* c[r * ldc + n] += sum_k a[k * lda + r] w[k][n] for k in [k0, k1), w of pack_turned. */
static __attribute__((unused)) void panels_turned(int rows, const real *a, intptr_t lda,
                                                  intptr_t k0, intptr_t k1, const real *w,
                                                  intptr_t K, intptr_t N, real *c, intptr_t ldc) {
    real *row[TILE_ROWS];
    for (int r = 0; r < rows; r++)
        row[r] = c + r * ldc;
    all_panels(rows, 1, &a, lda, k0, k1, w, K, N, 0, N, 1, row);
}

/* Sums of panels_turned: `rows` of N columns, `ld` apart. */
enum { SUMS_TURNED = 0 };
INLINE intptr_t sums_ld(intptr_t rows, intptr_t N) { return round_up(N); }
INLINE intptr_t sums_reals(intptr_t rows, intptr_t N) { return rows * round_up(N); }
static __attribute__((unused)) void copy_sums(const real *sums, intptr_t rows, intptr_t N,
                                              real *dst, intptr_t ld) {
    for (intptr_t r = 0; r < rows; r++)
        copy_row(dst + r * ld, sums + r * round_up(N), N);
}

/* The first n reals at p, zeros in the other lanes. */
INLINE vec load_part(const real *p, intptr_t n) {
    if (n >= VL)
        return load(p);
    vec v = {};
    memcpy(&v, p, n * sizeof(real));
    return v;
}

/* dst panels [K][N] of rows src + k * ld, times `scale`. Returns whether everything is finite. */
static __attribute__((unused)) int pack_panels(const real *src, intptr_t ld, intptr_t K, intptr_t N,
                                               real scale, real *dst) {
    vec bad = {};
    for (intptr_t col = 0; col < N; col += PANEL) {
        intptr_t width = round_up(N) - col < PANEL ? round_up(N) - col : PANEL;
        for (intptr_t k = 0; k < K; k++)
            for (intptr_t j = 0; j < width; j += VL) {
                vec v = load_part(src + k * ld + col + j, N - col - j) * scale;
                bad += v * 0;
                store(dst + col * K + k * width + j, v);
            }
    }
    return sum_lanes(bad) == 0;
}

INLINE int pack_turned(const real *src, intptr_t ld, intptr_t K, intptr_t N, real scale,
                       real *dst) {
    return pack_panels(src, ld, K, N, scale, dst);
}

/* dst panels [D][keys] of the transposed rows src + j * ld. Columns past the last key are zeros.
 * Returns whether `panels` may have them: always. */
static __attribute__((unused)) int pack_keys(const real *src, intptr_t ld, intptr_t keys,
                                              intptr_t D, real *dst) {
    const real *row[VL];
    for (intptr_t j = 0; j < keys; j += VL) {
        intptr_t col = j / PANEL * PANEL;
        intptr_t width = round_up(keys) - col < PANEL ? round_up(keys) - col : PANEL;
        for (int l = 0; l < VL; l++)
            row[l] = j + l < keys ? src + (j + l) * ld : 0;
        pack_transposed(row, D, dst + col * D + (j - col), width);
    }
    return 1;
}

#endif
