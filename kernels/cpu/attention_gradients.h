/* attention_gradients.h: dropout of a row of weights, and what backward makes of a row. Names are
 * those of attention_scores.h. */
#ifndef FASTSEQ_ATTENTION_GRADIENTS_H
#define FASTSEQ_ATTENTION_GRADIENTS_H

#include "attention_scores.h"

/* ---- dropout: 32 bits for every (seed, batch, head, query, key), from counters alone */

INLINE uint64_t splitmix64(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

INLINE uint64_t dropout_key(uint64_t seed, uint64_t head, uint64_t query) {
    return splitmix64(splitmix64(seed ^ splitmix64(head)) + query);
}

typedef uint32_t uvec __attribute__((vector_size(VL * 4)));

/* Which of keys j : j + VL are kept. It costs two products a vector, each of two instructions' time
 * in AVX2 and AVX-512. With two rounds of mixing, five products, training with dropout took 1.08
 * times as long (Emerald Rapids). */
INLINE ivec kept(const RowOptions *o, intptr_t j) {
    const uint32_t step = 0x9E3779B9u;
    uvec x;
    for (int l = 0; l < VL; l++)
        x[l] = l * step;
    x = (x + (uint32_t)j * step) ^ (uint32_t)o->key;
    x = (x ^ x >> 16) * 0x7FEB352Du ^ (uint32_t)(o->key >> 32);
    x = (x ^ x >> 15) * 0x846CA68Bu;
    typedef int32_t svec __attribute__((vector_size(VL * 4)));
    return __builtin_convertvector((svec)(x >= o->threshold), ivec);
}

/* s *= keep / (1 - p) for keys lo : hi, whole vectors. */
static __attribute__((unused)) void drop(const RowOptions *o, real *s, intptr_t j0, intptr_t lo,
                                         intptr_t hi) {
    for (intptr_t j = lo - (lo - j0) % VL; j < hi; j += VL)
        store(s + j - j0, choose(kept(o, j), load(s + j - j0) * o->keep_scale, (vec){0}));
}

/* ---- backward */

/* Whether a finished score is the product itself, so that backward, which needs no
 * maximum, leaves finish_scores out. */
INLINE int is_product(const RowOptions *o) {
    return o->softcap == 0 && !o->mod && o->slope == 0 && !o->masked && !o->bias;
}

INLINE void gradients_fixed(const int dropout, const RowOptions *o, real *s, real *dp, real lse,
                            real delta, intptr_t j0, intptr_t lo, intptr_t hi, intptr_t z0,
                            intptr_t z1) {
    intptr_t first = lo - (lo - j0) % VL, j = first;
    s -= j0;
    dp -= j0;
    for (; j < hi; j += VL) {
        vec p = exp_nonpositive(load(s + j) - lse), dpj = load(dp + j), weight = p;
        if (j < lo || j + VL > hi)
            weight = p = choose(within(j, lo, hi), p, (vec){0});
        if (dropout) {
            ivec keep = kept(o, j);
            weight = choose(keep, p * o->keep_scale, (vec){0});
            dpj = choose(keep, dpj * o->keep_scale, (vec){0});
        }
        store(s + j, weight);
        store(dp + j, choose(p == 0, (vec){0}, p * (dpj - delta)));
    }
    for (intptr_t i = z0; i < first; i++)
        s[i] = dp[i] = 0;
    for (; j < z1; j++)
        s[j] = dp[j] = 0;
}

/* With P = e^(s - lse) and K' = kept / (1 - p): s = P K' and dp = P (K' dp - delta) for keys
 * lo : hi, 0 in the rest of [z0, z1); lse is no NaN. */
static __attribute__((unused)) void score_gradients(const RowOptions *o, real *s, real *dp,
                                                    real lse, real delta, intptr_t j0, intptr_t lo,
                                                    intptr_t hi, intptr_t z0, intptr_t z1) {
    if (o->threshold)
        gradients_fixed(1, o, s, dp, lse, delta, j0, lo, hi, z0, z1);
    else
        gradients_fixed(0, o, s, dp, lse, delta, j0, lo, hi, z0, z1);
}

/* The same where lse is NaN: both NaN where a pair may attend, s being -inf where not. */
static __attribute__((unused)) void nan_gradients(real *s, real *dp, intptr_t j0, intptr_t lo,
                                                  intptr_t hi, intptr_t z0, intptr_t z1) {
    for (intptr_t j = z0; j < z1; j++)
        s[j - j0] = dp[j - j0] = j < lo || j >= hi || s[j - j0] == -(real)INFINITY ? 0 : (real)NAN;
}

/* a *= b, whole vectors that hold [0, n) */
INLINE void multiply_row(real *a, const real *b, intptr_t n) {
    for (intptr_t j = 0; j < n; j += VL)
        store(a + j, choose(load(a + j) == 0, (vec){0}, load(a + j) * load(b + j)));
}

/* sum[j * stride] += row[j] */
INLINE void add_strided(real *sum, intptr_t stride, const real *row, intptr_t n) {
    if (stride == 1)
        add_row(sum, row, n);
    else
        for (intptr_t j = 0; j < n; j++)
            sum[j * stride] += row[j];
}

#endif
