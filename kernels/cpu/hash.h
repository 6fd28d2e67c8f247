/* hash.h: a hash that detects changed weights. */
#ifndef FASTSEQ_HASH_H
#define FASTSEQ_HASH_H

#include "vec.h"

typedef uint64_t words __attribute__((vector_size(VBYTES)));
/* 128 bytes at once: the same hash at every level. */
enum { WORDS = VBYTES / 8, HASH_CHAINS = 64 / VBYTES * 2 };

/* The low times the high 32 bits of every word: one instruction,
 * which the compiler does not find. */
INLINE words fold(words a) {
#if VBYTES == 64
    return (words)_mm512_mul_epu32((__m512i)a, (__m512i)(a >> 32));
#elif VBYTES == 32
    return (words)_mm256_mul_epu32((__m256i)a, (__m256i)(a >> 32));
#elif defined(__x86_64__)
    return (words)_mm_mul_epu32((__m128i)a, (__m128i)(a >> 32));
#else
    return (a & 0xFFFFFFFFu) * (a >> 32);
#endif
}

/* 64-bit hash of n 64-bit words (the accumulation step of XXH3 with a key that moves with the
 * position): a word changed anywhere changes it. LSTM weights at 19 (H 64) to 46 GB/s (H 256), with
 * keys by multiplication at 7 (Zen 3, AVX2). */
static __attribute__((unused)) uint64_t hash_words(const uint64_t *word, intptr_t n,
                                                   uint64_t seed) {
    const uint64_t odd = 0x9E3779B97F4A7C15u;
    words acc[HASH_CHAINS], key[HASH_CHAINS];
    for (int c = 0; c < HASH_CHAINS; c++)
        for (int l = 0; l < WORDS; l++) {
            acc[c][l] = seed + (c * WORDS + l) * odd;
            key[c][l] = 0xC2B2AE3D27D4EB4Fu + (c * WORDS + l) * odd;
        }
    intptr_t i = 0;
    for (; i + HASH_CHAINS * WORDS <= n; i += HASH_CHAINS * WORDS)
        UNROLL
        for (int c = 0; c < HASH_CHAINS; c++) {
            words w;
            memcpy(&w, word + i + c * WORDS, sizeof w);
            acc[c] += w + fold(w ^ key[c]);
            key[c] += HASH_CHAINS * WORDS * odd;
        }
    uint64_t h = seed ^ (uint64_t)n;
    for (; i < n; i++)
        h = (h ^ word[i]) * 0x9FB21C651E98DF25u, h ^= h >> 29;
    for (int c = 0; c < HASH_CHAINS; c++)
        for (int l = 0; l < WORDS; l++)
            h = (h ^ acc[c][l]) * 0x9FB21C651E98DF25u, h ^= h >> 32;
    return h;
}

#endif
