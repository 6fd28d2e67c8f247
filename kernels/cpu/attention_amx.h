/* attention_amx.h: attention_panels.h's interface on AMX, whose tiles multiply bfloat16 and add
 * float32.
 *
 * A float32 is the exact sum of three bfloat16. Of the nine products of parts the six largest are
 * taken; the others are less than 2^-24 of |a| |b|, the rounding of one float32 product. One core,
 * panels in cache: 360 GFLOP/s, AVX-512 160 (Emerald Rapids). Inputs below 2^-110 lose their last
 * parts, which AMX takes for zero; from 3.39e38 on they are infinite.
 *
 * k runs in steps of STEP_K, in which k and k + 16 stand side by side: lane l of a `split` holds
 * those of two vectors. Packed, in the order of use: [STEPS steps][panel of 32 columns][step][part]
 * [tile of 16 columns][16 pairs][16], and the same for rows on the left.
 */
#ifndef FASTSEQ_ATTENTION_AMX_H
#define FASTSEQ_ATTENTION_AMX_H

#include "tile.h"

enum { PANEL = 32, TILE_ROWS = 32, KEY_BLOCK = 512, QUERY_ROWS = 64 };
enum { STEP_K = 32, PARTS = 3, TILE_BYTES = 1024, SIDE = 16 };
/* Of both sides at once: the left side's parts, 12 KiB, stay in L1 beside what passes through it.
 * With 4 the weighted values took 1.27 times as long. */
enum { STEPS = 2 };
enum { FINITE_ONLY = 1, SUMS_TURNED = 1 };

INLINE intptr_t steps_of(intptr_t k) { return (k + STEP_K - 1) / STEP_K; }

/* Tiles of the panel at `col` of N columns. */
INLINE intptr_t tiles_of(intptr_t N, intptr_t col) { return round_up(N) - col < PANEL ? 1 : 2; }

/* Reals of a packed matrix, K steps of N columns; and of pack_turned. */
INLINE intptr_t panel_reals(intptr_t K, intptr_t N) {
    return steps_of(K) * PARTS * round_up(N) / SIDE * TILE_BYTES / sizeof(real);
}

/* Where the panel at `col` starts in step `step`. */
INLINE char *packed_at(const real *w, intptr_t K, intptr_t N, intptr_t step, intptr_t col) {
    intptr_t first = step / STEPS * STEPS, rest = steps_of(K) - first;
    intptr_t tiles = first * (round_up(N) / SIDE) + col / SIDE * (rest < STEPS ? rest : STEPS);
    return (char *)w + (tiles + (step - first) * tiles_of(N, col)) * PARTS * TILE_BYTES;
}

/* Before and after a thread's products: eight tiles of 16 rows of 64 bytes. */
static __attribute__((unused)) void panels_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++)
        config.row_bytes[i] = 64, config.rows[i] = SIDE;
    /* not _tile_loadconfig: GCC 12 does not see that it reads all of it */
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

INLINE void panels_end(void) { _tile_release(); }

typedef uint32_t word_vec __attribute__((vector_size(VBYTES)));

/* Part p of a lane: the bfloat16 of a below that of b. The first is rounded, so that what follows
 * is half as large and of either sign; the others are what is left, cut off. */
INLINE void split(vec a, vec b, char *to, intptr_t part_bytes) {
    UNROLL
    for (int p = 0; p < PARTS; p++) {
        const uint32_t half = p == 0 ? 0x8000 : 0;
        word_vec high_a = ((word_vec)a + half) & 0xFFFF0000u;
        word_vec high_b = ((word_vec)b + half) & 0xFFFF0000u;
        word_vec both = high_a >> 16 | high_b;
        memcpy(to + p * part_bytes, &both, sizeof both);
        a -= (vec)high_a;
        b -= (vec)high_b;
    }
}

/* row[k : k + VL], zeros outside [k0, k1) */
INLINE vec load_within(const real *row, intptr_t k, intptr_t k0, intptr_t k1) {
    if (k >= k0 && k + VL <= k1)
        return load(row + k);
    uint32_t lanes = k1 <= k ? 0 : k1 - k < VL ? (1u << (k1 - k)) - 1 : 0xFFFFu;
    if (k0 > k)
        lanes &= k0 - k < VL ? ~0u << (k0 - k) : 0;
    return _mm512_maskz_loadu_ps((__mmask16)lanes, row + k);
}

/* Rows of the left side for k in [k0, k1), the first step's start being a multiple of STEP_K. */
INLINE void split_rows(int rows, const real *const *a, intptr_t k0, intptr_t k1, char *to) {
    intptr_t tiles = rows > SIDE ? 2 : 1, part_bytes = tiles * TILE_BYTES;
    for (intptr_t k = k0 / STEP_K * STEP_K; k < k1; k += STEP_K, to += PARTS * part_bytes)
        for (intptr_t r = 0; r < tiles * SIDE; r++) {
            vec low = {}, high = {};
            if (r < rows) {
                low = load_within(a[r], k, k0, k1);
                high = load_within(a[r], k + VL, k0, k1);
            }
            split(low, high, to + r * VBYTES, part_bytes);
        }
}

#define LOAD_A(part)                                                                               \
    _tile_loadd(4, a + (part) * m * TILE_BYTES, VBYTES);                                           \
    if (m > 1)                                                                                     \
        _tile_loadd(5, a + ((part) * m + 1) * TILE_BYTES, VBYTES);
#define LOAD_B(part)                                                                               \
    _tile_loadd(6, b + (part) * n * TILE_BYTES, VBYTES);                                           \
    if (n > 1)                                                                                     \
        _tile_loadd(7, b + ((part) * n + 1) * TILE_BYTES, VBYTES);
#define MULTIPLY                                                                                   \
    _tile_dpbf16ps(0, 4, 6);                                                                       \
    if (n > 1)                                                                                     \
        _tile_dpbf16ps(1, 4, 7);                                                                   \
    if (m > 1)                                                                                     \
        _tile_dpbf16ps(2, 5, 6);                                                                   \
    if (m > 1 && n > 1)                                                                            \
        _tile_dpbf16ps(3, 5, 7);
#define ALL_C(DO)                                                                                  \
    DO(0, c);                                                                                      \
    if (n > 1)                                                                                     \
        DO(1, c + SIDE);                                                                           \
    if (m > 1)                                                                                     \
        DO(2, c + SIDE * ldc);                                                                     \
    if (m > 1 && n > 1)                                                                            \
        DO(3, c + SIDE * ldc + SIDE);
#define ZERO_C(t, at) _tile_zero(t)
#define LOAD_C(t, at) _tile_loadd(t, at, ldc * sizeof(real))
#define STORE_C(t, at) _tile_stored(t, at, ldc * sizeof(real))

/* c (+)= a b, m x n tiles, the small products first; each load serves all products it is in. */
INLINE void amx_fixed(const int m, const int n, const char *a, const char *b, intptr_t steps,
                      int add, real *c, intptr_t ldc) {
    if (add) {
        ALL_C(LOAD_C)
    } else {
        ALL_C(ZERO_C)
    }
    for (; steps > 0; steps--, a += PARTS * m * TILE_BYTES, b += PARTS * n * TILE_BYTES) {
        LOAD_A(0) LOAD_B(2) MULTIPLY
        LOAD_B(1) MULTIPLY
        LOAD_A(1) MULTIPLY
        LOAD_B(0) MULTIPLY
        LOAD_A(2) MULTIPLY
        LOAD_A(0) MULTIPLY
    }
    ALL_C(STORE_C)
}
#undef LOAD_A
#undef LOAD_B
#undef MULTIPLY
#undef ALL_C
#undef ZERO_C
#undef LOAD_C
#undef STORE_C

#define AMX(M, N)                                                                                  \
    static __attribute__((noinline, unused)) void amx_##M##x##N(                                   \
        const char *a, const char *b, intptr_t steps, int add, real *c, intptr_t ldc) {            \
        amx_fixed(M, N, a, b, steps, add, c, ldc);                                                 \
    }
AMX(1, 1) AMX(1, 2) AMX(2, 1) AMX(2, 2)
#undef AMX

/* Rows of the next tile of n: AMX computes 16 whether there are or not. */
INLINE intptr_t tile_height(intptr_t n) { return n < TILE_ROWS ? n : TILE_ROWS; }

INLINE void multiply(intptr_t m, intptr_t n, const char *a, const char *b, intptr_t steps, int add,
                     real *c, intptr_t ldc) {
    if (m > 1)
        (n > 1 ? amx_2x2 : amx_2x1)(a, b, steps, add, c, ldc);
    else
        (n > 1 ? amx_1x2 : amx_1x1)(a, b, steps, add, c, ldc);
}

/* m x n tiles of c, of which `rows` rows are ours: what lies behind them is not touched. */
INLINE void multiply_rows(int rows, intptr_t m, intptr_t n, const char *a, const char *b,
                          intptr_t steps, int add, real *const *c, intptr_t col) {
    real whole[TILE_ROWS * PANEL] __attribute__((aligned(64)));
    intptr_t row_bytes = n * SIDE * sizeof(real);
    if (rows == m * SIDE) {
        multiply(m, n, a, b, steps, add, c[0] + col, c[1] - c[0]);
        return;
    }
    for (int r = 0; add && r < rows; r++)
        memcpy(whole + r * PANEL, c[r] + col, row_bytes);
    multiply(m, n, a, b, steps, add, whole, PANEL);
    for (int r = 0; r < rows; r++)
        memcpy(c[r] + col, whole + r * PANEL, row_bytes);
}

/* Rows of a times the panels of w that hold columns [n0, n1), for k in [k0, k1). w holds K steps of
 * N columns; the rows of c have one distance. c = or, if `add`, c += */
static __attribute__((unused)) void panels(int rows, const real *const *a, intptr_t k0, intptr_t k1,
                                           const real *w, intptr_t K, intptr_t N, intptr_t n0,
                                           intptr_t n1, int add, real *const *c) {
    char left[STEPS * PARTS * 2 * TILE_BYTES] __attribute__((aligned(64)));
    intptr_t first = k0 / STEP_K, m = rows > SIDE ? 2 : 1;
    for (intptr_t end; first < steps_of(k1); first = end, add = 1) {
        end = (first / STEPS + 1) * STEPS;
        intptr_t from = first * STEP_K > k0 ? first * STEP_K : k0, to = end * STEP_K;
        intptr_t steps = (steps_of(k1) < end ? steps_of(k1) : end) - first;
        split_rows(rows, a, from, to < k1 ? to : k1, left);
        for (intptr_t col = n0 / PANEL * PANEL; col < n1; col += PANEL) {
            const char *b = packed_at(w, K, N, first, col);
            multiply_rows(rows, m, tiles_of(N, col), left, b, steps, add, c, col);
        }
    }
}

/* c[n * ldc + r] += sum_k a[k * lda + r] w[k][n] for k in [k0, k1), w of pack_turned, at most
 * QUERY_ROWS of them: w on the left, so that a is split as it stands. Whole tiles of c are
 * written. */
static __attribute__((unused)) void panels_turned(int rows, const real *a, intptr_t lda,
                                                  intptr_t k0, intptr_t k1, const real *w,
                                                  intptr_t K, intptr_t N, real *c, intptr_t ldc) {
    char right[QUERY_ROWS / STEP_K * PARTS * 2 * TILE_BYTES] __attribute__((aligned(64)));
    intptr_t n = rows > SIDE ? 2 : 1, first = k0 / STEP_K, steps = steps_of(k1) - first;
    char *to = right;
    for (intptr_t k = first * STEP_K; k < k1; k += STEP_K, to += PARTS * n * TILE_BYTES)
        for (intptr_t pair = k; pair < k + SIDE; pair++)
            for (intptr_t t = 0; t < n; t++) {
                vec v[2] = {};
                for (int i = 0; i < 2; i++)
                    if (pair + i * SIDE >= k0 && pair + i * SIDE < k1)
                        v[i] = load_within(a + (pair + i * SIDE) * lda, t * SIDE, 0, rows);
                split(v[0], v[1], to + t * TILE_BYTES + (pair - k) * VBYTES, n * TILE_BYTES);
            }
    for (intptr_t col = 0; col < N; col += PANEL) {
        intptr_t m = tiles_of(N, col);
        multiply(m, n, packed_at(w, K, N, first, col), right, steps, 1, c + col * ldc, ldc);
    }
}

/* Sums of panels_turned: for each of N columns a line of `rows`, `ld` apart. */
INLINE intptr_t sums_ld(intptr_t rows, intptr_t N) { return (rows + PANEL - 1) / PANEL * PANEL; }
INLINE intptr_t sums_reals(intptr_t rows, intptr_t N) { return sums_ld(rows, N) * round_up(N); }
static __attribute__((unused)) void copy_sums(const real *sums, intptr_t rows, intptr_t N,
                                              real *dst, intptr_t ld) {
    const real *line[VL];
    real turned[PANEL * VL];
    for (intptr_t col = 0; col < N; col += VL)
        for (intptr_t r = 0; r < rows; r += PANEL) {
            intptr_t n = rows - r < PANEL ? rows - r : PANEL;
            for (int l = 0; l < VL; l++)
                line[l] = sums + (col + l) * sums_ld(rows, N) + r;
            pack_transposed(line, n, turned, VL);
            for (intptr_t i = 0; i < n; i++)
                memcpy(dst + (r + i) * ld + col, turned + i * VL,
                       (N - col < VL ? N - col : VL) * sizeof(real));
        }
}

/* Rows k and k + SIDE of a packed matrix, columns col : col + VL, times `scale`. */
INLINE void load_pair(const real *src, intptr_t ld, intptr_t K, intptr_t N, intptr_t k,
                      intptr_t col, real scale, vec v[2], vec *bad) {
    for (int i = 0; i < 2; i++) {
        intptr_t row = k + i * SIDE;
        v[i] = row < K ? load_within(src + row * ld, col, 0, N) * scale : (vec){};
        *bad += v[i] * 0;
    }
}

/* dst panels [K][N] of rows src + k * ld, times `scale`. Returns whether everything is finite. */
static __attribute__((unused)) int pack_panels(const real *src, intptr_t ld, intptr_t K, intptr_t N,
                                               real scale, real *dst) {
    vec bad = {}, v[2];
    for (intptr_t col = 0; col < N; col += PANEL) {
        intptr_t tiles = tiles_of(N, col);
        for (intptr_t k = 0; k < K; k += STEP_K)
            for (intptr_t t = 0; t < tiles; t++)
                for (intptr_t pair = 0; pair < SIDE; pair++) {
                    load_pair(src, ld, K, N, k + pair, col + t * SIDE, scale, v, &bad);
                    split(v[0], v[1],
                          packed_at(dst, K, N, k / STEP_K, col) + t * TILE_BYTES + pair * VBYTES,
                          tiles * TILE_BYTES);
                }
    }
    return sum_lanes(bad) == 0;
}

/* The same as the left side of panels_turned: tiles of 16 columns, their pairs side by side. */
static __attribute__((unused)) int pack_turned(const real *src, intptr_t ld, intptr_t K, intptr_t N,
                                               real scale, real *dst) {
    vec bad = {}, v[2], part[PARTS][SIDE], pairs[SIDE];
    for (intptr_t col = 0; col < N; col += PANEL) {
        intptr_t tiles = tiles_of(N, col);
        for (intptr_t k = 0; k < K; k += STEP_K)
            for (intptr_t t = 0; t < tiles; t++) {
                char *to = packed_at(dst, K, N, k / STEP_K, col) + t * TILE_BYTES;
                for (int pair = 0; pair < SIDE; pair++) {
                    load_pair(src, ld, K, N, k + pair, col + t * SIDE, scale, v, &bad);
                    split(v[0], v[1], (char *)&part[0][pair], sizeof part[0]);
                }
                for (int p = 0; p < PARTS; p++) {
                    memcpy(pairs, part[p], sizeof pairs);
                    transpose(pairs);
                    memcpy(to + p * tiles * TILE_BYTES, pairs, sizeof pairs);
                }
            }
    }
    return sum_lanes(bad) == 0;
}

/* dst panels [D][keys] of the transposed rows src + j * ld. Columns past the last key are zeros.
 * Returns whether everything is finite. */
static __attribute__((unused)) int pack_keys(const real *src, intptr_t ld, intptr_t keys,
                                             intptr_t D, real *dst) {
    const real *row[VL];
    real turned[STEP_K * VL] __attribute__((aligned(64)));
    vec bad = {};
    for (intptr_t j = 0; j < keys; j += VL) {
        intptr_t panel = j / PANEL * PANEL, tiles = tiles_of(keys, panel);
        for (intptr_t d = 0; d < D; d += STEP_K) {
            char *to = packed_at(dst, D, keys, d / STEP_K, panel) + (j - panel) / SIDE * TILE_BYTES;
            for (int l = 0; l < VL; l++)
                row[l] = j + l < keys ? src + (j + l) * ld + d : 0;
            if (D - d < STEP_K)
                memset(turned, 0, sizeof turned);
            pack_transposed(row, D - d < STEP_K ? D - d : STEP_K, turned, VL);
            for (int pair = 0; pair < SIDE; pair++) {
                vec low = load(turned + pair * VL), high = load(turned + (pair + SIDE) * VL);
                bad += low * 0 + high * 0;
                split(low, high, to + pair * VBYTES, tiles * TILE_BYTES);
            }
        }
    }
    return sum_lanes(bad) == 0;
}

#endif
