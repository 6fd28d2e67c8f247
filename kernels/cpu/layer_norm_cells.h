/* layer_norm_cells.h: LSTM and GRU with layer normalisation,
 * on tiles of whole rows (Cell.whole_rows).
 *
 *     LN(a) = (a - mean a) / sqrt(var a + 1e-5)    over all gates and units of one row;
 *                                                  1 / sqrt(.) is rstd
 *     gx = gain_ih * LN(W_ih x)        gh = gain_hh * LN(W_hh h)
 *
 * GATES holds W_ih x and W_hh h apart and keeps them: backward takes their moments anew, three
 * passes over a row in cache, where to store the normalised values would double what is kept. The
 * bias stands in the parameters, behind the gains; in DGATES its planes are the gradients of the
 * pre-activations, from which the others follow.
 *
 *     planes       x's gates | h's gates
 *     parameters   lstm  gain_ih 4 | gain_hh 4 | gain_c | bias i f g o | bias_c
 *                  gru   gain_ih 3 | gain_hh 3 | bias r z xn hn
 */
#ifndef FASTSEQ_LAYER_NORM_CELLS_H
#define FASTSEQ_LAYER_NORM_CELLS_H

#include <math.h>

static const real LAYER_NORM_EPS = (real)1e-5;

#define PARAM(p) load(t->params + (p)*t->params_plane + j * VL)
#define FOR_EACH_BLOCK(t) for (intptr_t j = 0; j < (t)->blocks; j++)

/* libm's, of the dtype */
INLINE real sqrt_real(real x) { return sizeof(real) == 4 ? (real)sqrtf(x) : (real)sqrt(x); }

/* One row's numbers of one normalisation; the last two are means over the row too,
 * of d = dL/dLN(a) and d LN(a). */
typedef struct {
    real mean, rstd, d, d_hat;
} Norm;

/* `planes` vectors at every block, `stride` reals from block to block;
 * lanes past the last unit hold zeros. */
INLINE Norm norm_of(const Tile *t, const real *a, const int planes, intptr_t stride) {
    vec sum = {0}, squares = {0};
    real n = planes * t->units;
    FOR_EACH_BLOCK(t)
        for (int p = 0; p < planes; p++)
            sum += load(a + j * stride + p * VL);
    Norm norm = {.mean = sum_lanes(sum) / n};
    FOR_EACH_BLOCK(t)
        for (int p = 0; p < planes; p++) {
            vec d = load(a + j * stride + p * VL) - norm.mean;
            for (intptr_t l = t->units - j * VL; l < VL; l++)
                d[l] = 0;
            squares += d * d;
        }
    norm.rstd = 1 / sqrt_real(sum_lanes(squares) / n + LAYER_NORM_EPS);
    return norm;
}

/* dL/da of a = `hat`'s, from dL/dLN(a). */
INLINE vec norm_backward(Norm norm, vec d, vec hat) {
    return norm.rstd * (d - norm.d - hat * norm.d_hat);
}

/* `gates` and `gains`: how many the cell has of each, constants of the function that uses these. */
#define PLANES (2 * gates)
#define HAT_X(p) ((load(PLANE(p)) - x.mean) * x.rstd)
#define HAT_H(p) ((load(PLANE(gates + (p))) - h.mean) * h.rstd)
#define GX(p) (PARAM(p) * HAT_X(p))
#define GH(p) (PARAM(gates + (p)) * HAT_H(p))
#define BIAS(p) PARAM(gains + (p))
#define A(p) (GX(p) + GH(p) + BIAS(p))
#define D_GAIN_X(p) DPLANE(PLANES + (p))
#define D_GAIN_H(p) DPLANE(PLANES + gates + (p))
#define D_BIAS(p) DPLANE(PLANES + gains + (p))
#define ROW_NORMS                                                                                  \
    Norm x = norm_of(t, t->row[GATES][r], gates, PLANES * VL);                                     \
    Norm h = norm_of(t, t->row[GATES][r] + gates * VL, gates, PLANES * VL);

/* The gradients of the gains from those of the pre-activations, and what both normalisations need
 * of them; then those of W_ih x and W_hh h. D_BIAS(h_last) is of h's last gate, which a GRU keeps
 * apart; the other gates of h have that of x. */
INLINE void products_backward(const Tile *t, intptr_t r, Norm x, Norm h, const int gates,
                              const int gains, const int h_last) {
    vec x_d = {0}, x_hat = {0}, h_d = {0}, h_hat = {0};
    real n = gates * t->units;
    FOR_EACH_BLOCK(t)
        for (int p = 0; p < gates; p++) {
            vec dx = load(D_BIAS(p)), dh = load(D_BIAS(p < gates - 1 ? p : h_last));
            vec hat = HAT_X(p), d = dx * PARAM(p);
            store(D_GAIN_X(p), dx * hat);
            x_d += d;
            x_hat += d * hat;
            hat = HAT_H(p), d = dh * PARAM(gates + p);
            store(D_GAIN_H(p), dh * hat);
            h_d += d;
            h_hat += d * hat;
        }
    x.d = sum_lanes(x_d) / n, x.d_hat = sum_lanes(x_hat) / n;
    h.d = sum_lanes(h_d) / n, h.d_hat = sum_lanes(h_hat) / n;
    FOR_EACH_BLOCK(t)
        for (int p = 0; p < gates; p++) {
            vec dx = load(D_BIAS(p)) * PARAM(p);
            vec dh = load(D_BIAS(p < gates - 1 ? p : h_last)) * PARAM(gates + p);
            store(DPLANE(p), norm_backward(h, dh, HAT_H(p)));
            store(DPLANE(gates + p), norm_backward(x, dx, HAT_X(p)));
        }
}

/* ---- the LSTM of gx + gh + bias, and h' = o * tanh(gain_c * LN(c') + bias_c) */
#define GAIN_C 8
#define BIAS_C 13
static void layer_norm_lstm_forward(const Tile *t) {
    const int gates = 4, gains = 9;
    for (intptr_t r = 0; r < t->rows; r++) {
        ROW_NORMS
        FOR_EACH_BLOCK(t) {
            vec i = sigmoid(A(0)), f = sigmoid(A(1)), g = tanh_(A(2));
            store(AT(C), f * load(AT(C_PREV)) + i * g);
            store(AT(H), sigmoid(A(3)));
        }
        Norm c = norm_of(t, t->row[C][r], 1, VL);
        FOR_EACH_BLOCK(t) {
            vec hat = (load(AT(C)) - c.mean) * c.rstd;
            store(AT(H), load(AT(H)) * tanh_(PARAM(GAIN_C) * hat + PARAM(BIAS_C)));
        }
    }
}

static void layer_norm_lstm_backward(const Tile *t) {
    const int gates = 4, gains = 9;
    for (intptr_t r = 0; r < t->rows; r++) {
        ROW_NORMS
        Norm c = norm_of(t, t->row[C][r], 1, VL);
        vec c_d = {0}, c_hat = {0};
        FOR_EACH_BLOCK(t) {
            vec hat = (load(AT(C)) - c.mean) * c.rstd, o = sigmoid(A(3)), dh = dh_total(t, r, j);
            vec u = tanh_(PARAM(GAIN_C) * hat + PARAM(BIAS_C));
            vec du = dh * o * (1 - u * u), d = du * PARAM(GAIN_C);
            store(D_BIAS(3), dh * u * o * (1 - o));
            store(DPLANE(PLANES + GAIN_C), du * hat);
            store(DPLANE(PLANES + BIAS_C), du);
            c_d += d;
            c_hat += d * hat;
        }
        c.d = sum_lanes(c_d) / t->units, c.d_hat = sum_lanes(c_hat) / t->units;
        FOR_EACH_BLOCK(t) {
            vec i = sigmoid(A(0)), f = sigmoid(A(1)), g = tanh_(A(2));
            vec hat = (load(AT(C)) - c.mean) * c.rstd;
            vec dc = norm_backward(c, load(DPLANE(PLANES + BIAS_C)) * PARAM(GAIN_C), hat);
            dc += load(AT(DC_IN)) + load(AT(DC_EXTERNAL));
            store(D_BIAS(0), dc * g * i * (1 - i));
            store(D_BIAS(1), dc * load(AT(C_PREV)) * f * (1 - f));
            store(D_BIAS(2), dc * i * (1 - g * g));
            store(AT(DC_OUT), dc * f);
        }
        products_backward(t, r, x, h, gates, gains, 3);
    }
}
#undef GAIN_C
#undef BIAS_C

/* ---- the GRU of gx and gh: r, z = s(gx + gh + bias), n = tanh(gx + bias + r * (gh + bias)) */
static void layer_norm_gru_forward(const Tile *t) {
    const int gates = 3, gains = 6;
    for (intptr_t r = 0; r < t->rows; r++) {
        ROW_NORMS
        FOR_EACH_BLOCK(t) {
            vec r_ = sigmoid(A(0)), z = sigmoid(A(1));
            vec n = tanh_(GX(2) + BIAS(2) + r_ * (GH(2) + BIAS(3)));
            store(AT(H), (1 - z) * n + z * load(AT(H_PREV)));
        }
    }
}

static void layer_norm_gru_backward(const Tile *t) {
    const int gates = 3, gains = 6;
    for (intptr_t r = 0; r < t->rows; r++) {
        ROW_NORMS
        FOR_EACH_BLOCK(t) {
            vec r_ = sigmoid(A(0)), z = sigmoid(A(1)), hn = GH(2) + BIAS(3);
            vec n = tanh_(GX(2) + BIAS(2) + r_ * hn);
            vec dh = dh_total(t, r, j), dxn = dh * (1 - z) * (1 - n * n);
            store(D_BIAS(0), dxn * hn * r_ * (1 - r_));
            store(D_BIAS(1), dh * (load(AT(H_PREV)) - n) * z * (1 - z));
            store(D_BIAS(2), dxn);
            store(D_BIAS(3), dxn * r_);
            store(AT(DH_OUT), dh * z);
        }
        products_backward(t, r, x, h, gates, gains, 3);
    }
}
#undef A
#undef PLANES

#endif
