# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The attention kernels: fused softmax attention, forward and backward; the scores never exist as
a whole.

Built once per ISA level and dtype from this one source (see setup.py). `contract.Attention` lists
the arguments.
"""

include "base.pxi"


cdef extern from "attention.h" nogil:
    enum:
        TILE_ROWS, KEY_BLOCK, QUERY_ROWS, DECODE_ROWS, TURN_KEYS, FINITE_ONLY, SUMS_TURNED
        SOFTMAX_ROWS, SOFTMAX_LANES
    Py_ssize_t round_up(Py_ssize_t n)
    Py_ssize_t panel_reals(Py_ssize_t K, Py_ssize_t N)
    Py_ssize_t tile_height(Py_ssize_t n)
    void panels_begin()
    void panels_end()
    void panels(int rows, const real **a, Py_ssize_t k0, Py_ssize_t k1, const real *w,
                Py_ssize_t K, Py_ssize_t N, Py_ssize_t n0, Py_ssize_t n1, bint add, real **c)
    void panels_turned(int rows, const real *a, Py_ssize_t lda, Py_ssize_t k0, Py_ssize_t k1,
                       const real *w, Py_ssize_t K, Py_ssize_t N, real *c, Py_ssize_t ldc)
    bint pack_panels(const real *src, Py_ssize_t ld, Py_ssize_t K, Py_ssize_t N, real scale,
                     real *dst)
    bint pack_turned(const real *src, Py_ssize_t ld, Py_ssize_t K, Py_ssize_t N, real scale,
                     real *dst)
    bint pack_keys(const real *src, Py_ssize_t ld, Py_ssize_t keys, Py_ssize_t D, real *dst)
    Py_ssize_t sums_ld(Py_ssize_t rows, Py_ssize_t N)
    Py_ssize_t sums_reals(Py_ssize_t rows, Py_ssize_t N)
    void copy_sums(const real *sums, Py_ssize_t rows, Py_ssize_t N, real *dst, Py_ssize_t ld)
    enum:
        MOD_KEYS
    ctypedef struct ScoreTile:
        pass
    ctypedef void (*ScoreFn)(const ScoreTile *) noexcept nogil
    ctypedef struct ScoreMod:
        ScoreFn forward, backward
    ctypedef struct RowOptions:
        const ScoreMod *mod
        Py_ssize_t b, h, i
        real softcap, slope
        Py_ssize_t center
        const real *bias
        Py_ssize_t bias_j
        const uint8_t *mask
        Py_ssize_t mask_j
        bint masked
        uint64_t key
        uint32_t threshold
        real keep_scale
    void narrow(RowOptions *o, Py_ssize_t *lo, Py_ssize_t *hi)
    void finish_scores(const RowOptions *o, real *s, Py_ssize_t j0, Py_ssize_t lo, Py_ssize_t hi,
                       real *factor, real *lanes)
    void prefetch_keys(const real *row, Py_ssize_t stride, Py_ssize_t lo, Py_ssize_t hi)
    void row_maxima(const real *lanes, real *m)
    void shrinkage(const real *before, const real *after, real *shrink)
    real nan_or_nothing(const real *s, Py_ssize_t n)
    real exponentials(real *s, Py_ssize_t j0, Py_ssize_t lo, Py_ssize_t hi, Py_ssize_t z0,
                      Py_ssize_t z1, real m)
    uint64_t dropout_key(uint64_t seed, uint64_t head, uint64_t query)
    void drop(const RowOptions *o, real *s, Py_ssize_t j0, Py_ssize_t lo, Py_ssize_t hi)
    bint is_product(const RowOptions *o)
    void score_gradients(const RowOptions *o, real *s, real *dp, real lse, real delta,
                         Py_ssize_t j0, Py_ssize_t lo, Py_ssize_t hi, Py_ssize_t z0, Py_ssize_t z1)
    void nan_gradients(real *s, real *dp, Py_ssize_t j0, Py_ssize_t lo, Py_ssize_t hi,
                       Py_ssize_t z0, Py_ssize_t z1)
    void multiply_row(real *a, const real *b, Py_ssize_t n)
    void add_strided(real *sum, Py_ssize_t stride, const real *row, Py_ssize_t n)
    real exp_real(real x)
    real log_real(real x)
    void scale_row(real *c, Py_ssize_t n, real by)
    void copy_scaled(real *to, const real *src, Py_ssize_t n, real by)
    real dot(const real *a, const real *b, Py_ssize_t n)
    void dots(Py_ssize_t rows, const real **q, const real *k, Py_ssize_t ld, Py_ssize_t n,
              Py_ssize_t D, real **s)
    void read_rows(const real *v, Py_ssize_t ld, Py_ssize_t n, Py_ssize_t DV)
    void weigh(Py_ssize_t rows, const real **p, const real *v, Py_ssize_t ld, Py_ssize_t n,
               Py_ssize_t DV, real **o)
    void weigh_sparse(const real *p, Py_ssize_t p_j, const real *v, Py_ssize_t ld, Py_ssize_t n,
                      real scale, Py_ssize_t DV, real *o, Py_ssize_t o_d)
    bint all_finite(const real *c, Py_ssize_t n)


cdef extern from "<math.h>" nogil:
    double INFINITY


include "attention_problem.pxi"
include "attention_softmax.pxi"
include "attention_forward.pxi"
include "attention_forward_tasks.pxi"
include "attention_decode.pxi"
include "attention_backward.pxi"
include "attention_backward_tasks.pxi"
include "attention_entry.pxi"
include "attention_rows.pxi"
