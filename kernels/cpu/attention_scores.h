/* attention_scores.h: one row of scores.
 *
 * A row is s[0 : n] for keys j0 : j0 + n; the pairs that may attend are in [lo, hi), and where the
 * mask is nonzero. What a pair that may not attend holds, NaN included, reaches nothing.
 */
#ifndef FASTSEQ_ATTENTION_SCORES_H
#define FASTSEQ_ATTENTION_SCORES_H

#include "attention_softmax.h"
#include "functions.h"

/* Scores that a user's function gets at once: its copies of them stay in L1. */
enum { MOD_KEYS = 256 };

/* What a user's compiled function of the scores gets; `score_layout` tells it to Python. */
typedef struct {
    real *score;           /* whole vectors, changed in place */
    real *factor;          /* backward: gets d score after / d score before */
    intptr_t blocks;       /* vectors */
    intptr_t b, h, i, j;   /* batch row, query head, query, first key */
    const Functions *functions;
} ScoreTile;

typedef void (*ScoreFn)(const ScoreTile *);

typedef struct {
    ScoreFn forward, backward; /* NULL: none */
} ScoreMod;

typedef struct {
    const ScoreMod *mod;   /* a user's function of the scores; NULL: none */
    intptr_t b, h, i;      /* of the row, for it */
    real softcap;          /* 0: none */
    real slope;            /* ALiBi: - slope * |j - center|; 0: none */
    intptr_t center;
    const real *bias;      /* of key j at bias[j * bias_j]; NULL: none */
    intptr_t bias_j;
    const uint8_t *mask;   /* nonzero: may attend; NULL: all may */
    intptr_t mask_j;
    int masked;            /* whether the mask still matters within the limits at hand,
                            * see narrow */
    uint64_t key;          /* of dropout's generator */
    uint32_t threshold;    /* a pair is dropped if its bits are below; 0: no dropout */
    real keep_scale;       /* 1 / (1 - p) */
} RowOptions;

INLINE ivec lane_indices(void) {
    ivec lane;
    for (int l = 0; l < VL; l++)
        lane[l] = l;
    return lane;
}

INLINE ivec within(intptr_t j, intptr_t lo, intptr_t hi) {
    ivec at = lane_indices() + (bits)j;
    return (at >= (bits)lo) & (at < (bits)hi);
}

/* VL reals, or VL bytes widened, from memory with any stride and without reading past n. */
INLINE vec load_strided(const real *p, intptr_t stride, intptr_t n) {
    if (stride == 1 && n >= VL)
        return load(p);
    vec v = {};
    for (int l = 0; l < VL && l < n; l++)
        v[l] = p[l * stride];
    return v;
}

INLINE ivec load_mask(const uint8_t *p, intptr_t stride, intptr_t n) {
    ivec m = {};
    if (stride == 1 && n >= VL) {
        uint8_t b __attribute__((vector_size(VL)));
        memcpy(&b, p, VL);
        m = __builtin_convertvector(b, ivec);
    } else
        for (int l = 0; l < VL && l < n; l++)
            m[l] = p[l * stride];
    return m != 0;
}

/* Narrow [lo, hi) to the first and last key that the mask lets through (empty: hi = lo), and tell
 * whether it has holes between them. */
INLINE void narrow(RowOptions *o, intptr_t *lo, intptr_t *hi) {
    o->masked = o->mask != 0;
    if (!o->mask)
        return;
    const uint8_t *mask = o->mask;
    if (o->mask_j != 1) {
        while (*lo < *hi && !mask[*lo * o->mask_j])
            ++*lo;
        while (*hi > *lo && !mask[(*hi - 1) * o->mask_j])
            --*hi;
        return;
    }
    const uint8_t *first = *lo < *hi ? memchr(mask + *lo, 1, *hi - *lo) : 0;
    *lo = first ? first - mask : *hi;
    while (*hi - 64 > *lo) {
        uint64_t w[8], any = 0;
        memcpy(w, mask + *hi - 64, 64);
        for (int i = 0; i < 8; i++)
            any |= w[i];
        if (any)
            break;
        *hi -= 64;
    }
    while (*hi > *lo && !mask[*hi - 1])
        --*hi;
    o->masked = *lo < *hi && memchr(mask + *lo, 0, *hi - *lo) != 0;
}

/* A bias of -inf masks a pair out, whatever its score is. */
INLINE vec biased(vec x, vec bias) {
    return choose(bias == NEGATIVE_INFINITY, NEGATIVE_INFINITY, x + bias);
}

/* One vector of scores with everything that is added to them;
 * `edge`: some of its keys are outside [lo, hi). */
INLINE vec finished(const RowOptions *o, vec x, intptr_t j, intptr_t lo, intptr_t hi, int edge,
                    real *factor) {
    if (o->softcap != 0 && !o->mod) {
        vec t = tanh_(x / o->softcap);
        x = t * o->softcap;
        if (factor)
            store(factor, 1 - t * t);
    }
    if (o->slope != 0) {
        vec distance = __builtin_convertvector(lane_indices() + (bits)(j - o->center), vec);
        x -= o->slope * choose(distance < 0, -distance, distance);
    }
    if (o->bias)
        x = biased(x, load_strided(o->bias + j * o->bias_j, o->bias_j, hi - j));
    if (o->masked)
        x = choose(load_mask(o->mask + j * o->mask_j, o->mask_j, hi - j), x, NEGATIVE_INFINITY);
    return edge ? choose(within(j, lo, hi), x, NEGATIVE_INFINITY) : x;
}

/* The whole vectors of [j, hi) where at most a bias is added, its keys side by side.
 * Returns where it stopped. */
INLINE intptr_t whole_vectors(const RowOptions *o, real *s, intptr_t j, intptr_t hi, vec most[2]) {
    const real *bias = o->bias;
    if (!bias)
        for (; j + 2 * VL <= hi; j += 2 * VL) {
            most[0] = max_(most[0], load(s + j));
            most[1] = max_(most[1], load(s + j + VL));
        }
    else
        for (; j + 2 * VL <= hi; j += 2 * VL) {
            vec a = biased(load(s + j), load(bias + j));
            vec b = biased(load(s + j + VL), load(bias + j + VL));
            store(s + j, a);
            store(s + j + VL, b);
            most[0] = max_(most[0], a);
            most[1] = max_(most[1], b);
        }
    return j;
}

/* The softcap and the user's function on the whole vectors that hold keys lo : hi. */
static __attribute__((noinline, unused)) void modify_scores(const RowOptions *o, real *s,
                                                            intptr_t j0, intptr_t lo, intptr_t hi,
                                                            real *factor) {
    real slope[MOD_KEYS];
    for (intptr_t j = lo - (lo - j0) % VL; j < hi; j += MOD_KEYS) {
        intptr_t vectors = (hi - j + VL - 1) / VL, n;
        ScoreTile t = {s + (j - j0), slope, vectors < MOD_KEYS / VL ? vectors : MOD_KEYS / VL,
                       o->b, o->h, o->i, j, &functions};
        n = t.blocks * VL;
        if (factor)
            for (intptr_t k = 0; k < n; k += VL)
                store(factor + (j - j0) + k, broadcast(1));
        for (intptr_t k = 0; k < n && o->softcap != 0; k += VL) {
            vec c = tanh_(load(t.score + k) / o->softcap);
            store(t.score + k, c * o->softcap);
            if (factor)
                store(factor + (j - j0) + k, 1 - c * c);
        }
        (factor ? o->mod->backward : o->mod->forward)(&t);
        for (intptr_t k = 0; k < n && factor; k += VL)
            store(factor + (j - j0) + k, load(factor + (j - j0) + k) * load(slope + k));
    }
}

/* Scores of keys lo : hi to their final values, -inf where a pair may not attend; s is key j0's
 * place. Only whole vectors that hold a key of [lo, hi) are written. `factor`: NULL, or gets
 * d score / d product of the softcap and the user's function. `lanes`: NULL, or gets the largest
 * score of every lane; a NaN may be passed over. */
static __attribute__((unused)) void finish_scores(const RowOptions *o, real *s, intptr_t j0,
                                                  intptr_t lo, intptr_t hi, real *factor,
                                                  real *lanes) {
    vec most[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
    if (o->mod)
        modify_scores(o, s, j0, lo, hi, factor);
    int simple =
        (o->softcap == 0 || o->mod) && o->slope == 0 && !o->masked && (!o->bias || o->bias_j == 1);
    intptr_t j = lo - (lo - j0) % VL;
    s -= j0;
    if (factor)
        factor -= j0;
    while (j < hi) {
        if (simple && j >= lo)
            j = whole_vectors(o, s, j, hi, most);
        if (j >= hi)
            break;
        vec x = finished(o, load(s + j), j, lo, hi, j < lo || j + VL > hi, factor ? factor + j : 0);
        store(s + j, x);
        most[0] = max_(most[0], x);
        j += VL;
    }
    if (lanes)
        store(lanes, max_(most[0], most[1]));
}

/* Keys [lo, hi) of a row of the bias or its gradient, NULL without, asked for while the products
 * that meet them are computed. */
INLINE void prefetch_keys(const real *row, intptr_t stride, intptr_t lo, intptr_t hi) {
    if (row && stride == 1)
        prefetch(row + lo, hi - lo);
}

INLINE void copy_scaled(real *restrict to, const real *restrict from, intptr_t n, real by) {
    for (intptr_t j = 0; j < n; j++)
        to[j] = from[j] * by;
}

/* sum_d a[d] b[d], in VL chains */
INLINE real dot(const real *a, const real *b, intptr_t n) {
    vec sum = {};
    real rest = 0;
    intptr_t d = 0;
    for (; d + VL <= n; d += VL)
        sum += load(a + d) * load(b + d);
    for (; d < n; d++)
        rest += a[d] * b[d];
    return sum_lanes(sum) + rest;
}

#endif
