/* vec.h: the SIMD vocabulary. One source for every lane count and both float types.
 *
 * Built once per (ISA level, dtype): VBYTES is the register width in bytes (16, 32, 64) and
 * REAL_BITS 32 or 64. `vec` is a GCC/Clang vector of VL reals, so + - * / are element-wise.
 * Intrinsics only where no operator gives the instruction; everything is static. NaN goes through
 * every function; exp, tanh and sigmoid are branch-free with the stated maximum errors.
 */
#ifndef FASTSEQ_VEC_H
#define FASTSEQ_VEC_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if REAL_BITS == 32
typedef float real;
typedef int32_t bits;
#define MANTISSA 23
#define EXP_MAX 87.0f
#define EXP_BIAS 127
#define LOG2E 0x1.715476p+0f
#define LN2_HI 0x1.62e4p-1f /* 15 bits: n * LN2_HI is exact for |n| < 2^9 */
#define LN2_LO 0x1.7f7d1cp-20f
#define ROUND_MAGIC 0x1.8p+23f
#else
typedef double real;
typedef int64_t bits;
#define MANTISSA 52
#define EXP_MAX 708.0
#define EXP_BIAS 1023
#define LOG2E 0x1.71547652b82fep+0
#define LN2_HI 0x1.62e42fefap-1 /* 35 bits: n * LN2_HI is exact for |n| < 2^18 */
#define LN2_LO 0x1.cf79abc9e3b39p-40
#define ROUND_MAGIC 0x1.8p+52
#endif

typedef real vec __attribute__((vector_size(VBYTES)));
typedef bits ivec __attribute__((vector_size(VBYTES)));
enum { VL = VBYTES / sizeof(real) };

#define INLINE static inline __attribute__((always_inline, unused))

/* Loops whose arrays are registers, in every build; and over a tile's steps. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_STEPS _Pragma("clang loop unroll_count(4)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_STEPS _Pragma("GCC unroll 4")
#endif

INLINE vec load(const real *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(real *p, vec v) { memcpy(p, &v, sizeof v); }

/* a - 0 is a for every a (a + 0 is not: -0), so it folds into one broadcast from memory. */
INLINE vec broadcast(real a) { return a - (vec){0}; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* F(lane, d) of every lane: the list that a shuffle takes. */
#define LANES2(F, d, at) F(at, d), F(at + 1, d)
#define LANES4(F, d, at) LANES2(F, d, at), LANES2(F, d, at + 2)
#define LANES8(F, d, at) LANES4(F, d, at), LANES4(F, d, at + 4)
#define LANES16(F, d, at) LANES8(F, d, at), LANES8(F, d, at + 8)
#if VBYTES * 8 / REAL_BITS == 16
#define LANES(F, d) LANES16(F, d, 0)
#elif VBYTES * 8 / REAL_BITS == 8
#define LANES(F, d) LANES8(F, d, 0)
#elif VBYTES * 8 / REAL_BITS == 4
#define LANES(F, d) LANES4(F, d, 0)
#else
#define LANES(F, d) LANES2(F, d, 0)
#endif

#define FAR(l, d) ((l) ^ (d))
#define FAR_LANES(v, d) __builtin_shufflevector(v, v, LANES(FAR, (d) % VL))

/* The lanes' sum by halves: one lane after the other, VL additions would wait for each other. */
INLINE real sum_lanes(vec v) {
    v = VL > 8 ? v + FAR_LANES(v, 8) : v;
    v = VL > 4 ? v + FAR_LANES(v, 4) : v;
    v = VL > 2 ? v + FAR_LANES(v, 2) : v;
    v += FAR_LANES(v, 1);
    return v[0];
}

#if defined(__x86_64__)
#define PASTE(a, b, c) a##b##c
#define INTRINSIC_(prefix, op, suffix) PASTE(prefix, op, suffix)
#define INTRINSIC(op) INTRINSIC_(MM_PREFIX, op, MM_SUFFIX)
#if VBYTES == 64
#define MM_PREFIX _mm512_
#elif VBYTES == 32
#define MM_PREFIX _mm256_
#else
#define MM_PREFIX _mm_
#endif
#if REAL_BITS == 32
#define MM_SUFFIX _ps
#else
#define MM_SUFFIX _pd
#endif
#endif

/* b where one of them is NaN */
INLINE vec max_(vec a, vec b) {
#if defined(__x86_64__)
    return INTRINSIC(max)(a, b);
#else
    return choose(a > b, a, b);
#endif
}

/* x limited to [-limit, limit]; NaN stays NaN: min and max return their second operand then. */
INLINE vec clamp(vec x, real limit) {
    vec hi = broadcast(limit), lo = broadcast(-limit);
#if defined(__x86_64__)
    return INTRINSIC(max)(lo, INTRINSIC(min)(hi, x));
#else
    x = choose(x > hi, hi, x);
    return choose(x < lo, lo, x);
#endif
}

/* 1 / d for finite d. float32 with AVX-512: an estimate of 14 bits and one Newton step, 2 ULP.
 * A zmm division keeps Zen 4's divider busy for 10 cycles and an LSTM cell has five: the cell
 * took 33 ns a vector, without them 27. */
INLINE vec reciprocal(vec d) {
#if VBYTES == 64 && REAL_BITS == 32
    vec y = _mm512_rcp14_ps(d);
    return y + y * (1 - d * y);
#else
    return 1 / d;
#endif
}

/* n / d for finite d, corrected by the remainder, so that 1 comes out where the
 * true quotient rounds to 1. */
INLINE vec divide(vec n, vec d) {
#if VBYTES == 64 && REAL_BITS == 32
    vec y = reciprocal(d), q = n * y;
    return q + y * (n - q * d);
#else
    return n / d;
#endif
}

/* 2^n and expm1(r) with x = n ln2 + r, |r| <= ln2 / 2 (Cody & Waite 1980); |x| <= EXP_MAX or NaN.
 * expm1(r) = r + r^2 q(r); q interpolates at the Chebyshev points:
 * relative error 7.8e-9 / 1.3e-17. */
INLINE vec expm1_reduced(vec x, vec *scale) {
    vec shifted = x * LOG2E + ROUND_MAGIC;
    vec n = shifted - ROUND_MAGIC;
    vec r = (x - n * LN2_HI) - n * LN2_LO;
    *scale = (vec)(((ivec)shifted << MANTISSA) + (ivec)broadcast(1));
#if REAL_BITS == 32
    vec q = r * 1.3926183587713494542e-3f + 8.3631790527225773704e-3f;
    q = q * r + 4.1666554617204574203e-2f;
    q = q * r + 1.6666576989698775683e-1f;
    q = q * r + 0.5f;
#else
    vec q = r * 2.5100385495510319078e-8 + 2.7620088445409748161e-7;
    q = q * r + 2.7557268459997064772e-6;
    q = q * r + 2.4801521295954375131e-5;
    q = q * r + 1.9841269863053616878e-4;
    q = q * r + 1.3888888917213716901e-3;
    q = q * r + 8.3333333333300618325e-3;
    q = q * r + 4.1666666666624127873e-2;
    q = q * r + 1.6666666666666667453e-1;
    q = q * r + 0.5;
#endif
    return q * (r * r) + r;
}

/* e^x for x <= 0, a weight of the softmax: 1 at 0, exactly 0 below -EXP_MAX - 1, NaN stays. With
 * x log2 e = n + r, |r| <= 1/2, it is 2^n (1 + r q(r)), and n = -EXP_BIAS makes 2^n zero. Error
 * 1.3e-7 (float64 1.3e-16) of the largest weight, which is 1, and 2.5 ULP down to x = -1; log2 e is
 * in one piece, so that small weights have more ULP. With expm1_reduced, which spares them that,
 * attention forward took 1.03 times as long (Zen 3, AVX2). */
INLINE vec exp_nonpositive(vec x) {
    const real magic = ROUND_MAGIC + EXP_BIAS;
    x = max_(broadcast(-EXP_MAX - 1), x);
    vec shifted = x * LOG2E + magic, r = x * LOG2E - (shifted - magic);
    vec scale = (vec)((ivec)shifted << MANTISSA);
#if REAL_BITS == 32
    vec q = r * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
    q = q * r + 0x1.c6b752p-5f;
    q = q * r + 0x1.ebf9bcp-3f;
    q = q * r + 0x1.62e42ap-1f;
#else
    vec q = r * 4.45496059818651839e-10 + 7.07258594926922370e-9;
    q = q * r + 1.01780624458457735e-7;
    q = q * r + 1.32154425878916897e-6;
    q = q * r + 1.52527338298361831e-5;
    q = q * r + 1.54035304417360502e-4;
    q = q * r + 1.33335581464169353e-3;
    q = q * r + 9.61812910760688853e-3;
    q = q * r + 5.55041086648215943e-2;
    q = q * r + 2.40226506959100982e-1;
    q = q * r + 6.93147180559945309e-1;
#endif
    return (q * r + 1) * scale;
}

/* 1 / (1 + e^-x). Max error 3 ULP; exactly 0 below -EXP_MAX, where a denormal would follow, and
 * exactly 1 when saturated above: the derivative s (1 - s) is then 0 as in the reference. */
INLINE vec sigmoid(vec x) {
    vec scale, p = expm1_reduced(clamp(-x, EXP_MAX), &scale);
    return choose(x < -EXP_MAX, (vec){0}, reciprocal(1 + (p * scale + scale)));
}

/* e^x = (e^(x/2))^2, so that overflow to infinity and underflow to 0 come by themselves.
 * Max error 4 ULP. */
INLINE vec exp_(vec x) {
    vec scale, p = expm1_reduced(clamp(x * (real)0.5, EXP_MAX), &scale);
    vec root = p * scale + scale;
    return root * root;
}

/* tanh x = e / (e + 2), e = expm1(2x), so small x keep their relative accuracy. Max error 4 ULP. */
INLINE vec tanh_(vec x) {
    vec scale, p = expm1_reduced(clamp(x + x, 40), &scale);
    vec e = p * scale + (scale - 1);
    return divide(e, e + 2);
}

INLINE vec relu(vec x) { return choose(x < 0, (vec){0}, x); }

#endif
