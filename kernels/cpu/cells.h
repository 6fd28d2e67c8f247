/* cells.h: what makes one recurrent cell differ from another: its gates, and its
 * element-wise mathematics on a tile.
 *
 * The scan driver (scan_forward.pxi, scan_backward.pxi) does everything else and calls a cell
 * through a pointer. A tile is `rows` batch rows x `blocks` vectors of units; row[SLOT][r]
 * points at the tile's first unit.
 *
 * Planes are the per-unit values kept as [unit vector][plane][lane] in `GATES`: pre-activations
 * when forward is called, activations when it returns, and what backward reads:
 *     rnn   a                  gradients  da
 *     gru   xn | r | z | hn    gradients  dhn | dr | dz | dxn
 *     lstm  i | f | g | o      gradients  di | df | dg | do
 * hn = W_hn h + b_hn stays apart from xn.
 * The state product adds to the last `gates` planes, the projected input to the first:
 * for a GRU they differ by one, and the cells of layer_norm_cells.h, whose tiles are whole
 * rows, keep all planes of x and h apart.
 * The gradients of the first `gates` planes belong to h, of the last to x: DGATES holds them as
 * [plane][H], and after them those of the parameters per unit that a cell may have.
 */
#ifndef FASTSEQ_CELLS_H
#define FASTSEQ_CELLS_H

#include "functions.h"
#include "tile.h"

enum Slot {
    GATES, H_PREV, C_PREV, H, C,                     /* forward reads GATES H_PREV C_PREV,
                                                      * writes GATES H C */
    DH_PRODUCT, DY, DC_EXTERNAL, DH_IN, DC_IN,       /* gradients that reach this step */
    DGATES, DH_OUT, DC_OUT,                          /* gradients that leave it */
    SLOTS
};

typedef struct {
    intptr_t rows, blocks;
    intptr_t dgates_plane; /* distance of two planes in DGATES */
    intptr_t params_plane; /* and of two of `params` */
    const real *params;    /* the parameters of the tile's units, whole vectors; they are the same
                            * for all rows */
    const Functions *functions;
    real *row[SLOTS][MAX_ROWS];
    intptr_t units; /* of the tile: the last vector may hold fewer than VL */
} Tile;

typedef void (*CellFn)(const Tile *);

typedef struct {
    int gates;       /* rows of w_ih and w_hh per unit */
    int planes;      /* values kept per unit: gates, and those of h that stay apart from x */
    int has_c;       /* a second state besides h */
    int saves_gates; /* backward needs GATES (a plain RNN needs only H) */
    int dh_direct;   /* h reaches h' also past the gates: DH_OUT is written */
    int recurrent;   /* h is multiplied with w_hh; else it reaches h' only past the gates */
    int params;      /* parameters per unit */
    int whole_rows;  /* a tile is one row with all its units */
    CellFn forward, backward;
} Cell;

#define FOR_EACH_VECTOR(t)                                                                         \
    for (intptr_t r = 0; r < (t)->rows; r++)                                                       \
        for (intptr_t j = 0; j < (t)->blocks; j++)
#define AT(slot) (t->row[slot][r] + j * VL)
#define PLANE(p) (t->row[GATES][r] + (j * PLANES + (p)) * VL)
#define DPLANE(p) (t->row[DGATES][r] + (p)*t->dgates_plane + j * VL)

/* ---- h' = tanh(a) or relu(a) */
#define PLANES 1
static void rnn_tanh_forward(const Tile *t) {
    FOR_EACH_VECTOR(t) store(AT(H), tanh_(load(PLANE(0))));
}

static void rnn_relu_forward(const Tile *t) {
    FOR_EACH_VECTOR(t) store(AT(H), relu(load(PLANE(0))));
}

INLINE vec dh_total(const Tile *t, intptr_t r, intptr_t j) {
    return load(AT(DH_PRODUCT)) + load(AT(DY)) + load(AT(DH_IN));
}

static void rnn_tanh_backward(const Tile *t) {
    FOR_EACH_VECTOR(t) {
        vec h = load(AT(H));
        store(DPLANE(0), dh_total(t, r, j) * (1 - h * h));
    }
}

static void rnn_relu_backward(const Tile *t) {
    FOR_EACH_VECTOR(t) {
        vec dh = dh_total(t, r, j);
        store(DPLANE(0), choose(load(AT(H)) <= 0, (vec){0}, dh));
    }
}
#undef PLANES

/* ---- r = s(.), z = s(.), n = tanh(xn + r * hn), h' = (1 - z) * n + z * h
 * The tanh in a loop of its own: behind the gates of the same vector it waits for them. GRU forward
 * 1.04 to 1.1 times as fast at H 64, LSTM 1.01 (Zen 5). */
#define PLANES 4
static void gru_forward(const Tile *t) {
    FOR_EACH_VECTOR(t) {
        store(PLANE(1), sigmoid(load(PLANE(1))));
        store(PLANE(2), sigmoid(load(PLANE(2))));
    }
    FOR_EACH_VECTOR(t) {
        vec z = load(PLANE(2)), n = tanh_(load(PLANE(0)) + load(PLANE(1)) * load(PLANE(3)));
        store(PLANE(0), n);
        store(AT(H), (1 - z) * n + z * load(AT(H_PREV)));
    }
}

static void gru_backward(const Tile *t) {
    FOR_EACH_VECTOR(t) {
        vec n = load(PLANE(0)), r_ = load(PLANE(1)), z = load(PLANE(2)), hn = load(PLANE(3));
        vec dh = dh_total(t, r, j);
        vec dxn = dh * (1 - z) * (1 - n * n);
        store(DPLANE(0), dxn * r_);
        store(DPLANE(1), dxn * hn * r_ * (1 - r_));
        store(DPLANE(2), dh * (load(AT(H_PREV)) - n) * z * (1 - z));
        store(DPLANE(3), dxn);
        store(AT(DH_OUT), dh * z);
    }
}

/* ---- c' = s(f) * c + s(i) * tanh(g), h' = s(o) * tanh(c') */
static void lstm_forward(const Tile *t) {
    FOR_EACH_VECTOR(t) {
        vec i = sigmoid(load(PLANE(0))), f = sigmoid(load(PLANE(1)));
        vec g = tanh_(load(PLANE(2))), o = sigmoid(load(PLANE(3)));
        vec c = f * load(AT(C_PREV)) + i * g;
        store(PLANE(0), i);
        store(PLANE(1), f);
        store(PLANE(2), g);
        store(PLANE(3), o);
        store(AT(C), c);
    }
    FOR_EACH_VECTOR(t) store(AT(H), load(PLANE(3)) * tanh_(load(AT(C))));
}

static void lstm_backward(const Tile *t) {
    FOR_EACH_VECTOR(t) {
        vec i = load(PLANE(0)), f = load(PLANE(1)), g = load(PLANE(2)), o = load(PLANE(3));
        vec tc = tanh_(load(AT(C))), dh = dh_total(t, r, j);
        vec dc = load(AT(DC_IN)) + load(AT(DC_EXTERNAL)) + dh * o * (1 - tc * tc);
        store(DPLANE(0), dc * g * i * (1 - i));
        store(DPLANE(1), dc * load(AT(C_PREV)) * f * (1 - f));
        store(DPLANE(2), dc * i * (1 - g * g));
        store(DPLANE(3), dh * tc * o * (1 - o));
        store(AT(DC_OUT), dc * f);
    }
}
#undef PLANES

#include "layer_norm_cells.h"

enum { RNN_TANH, RNN_RELU, GRU, LSTM, LAYER_NORM_GRU, LAYER_NORM_LSTM, CELLS };

/* Returned by value: a table of function pointers is no shared state. */
INLINE Cell cell_of(int which) {
    const Cell cells[CELLS] = {
        /* gates planes has_c saves_gates dh_direct recurrent params whole_rows */
        [RNN_TANH] = {1, 1, 0, 0, 0, 1, 0, 0, rnn_tanh_forward, rnn_tanh_backward},
        [RNN_RELU] = {1, 1, 0, 0, 0, 1, 0, 0, rnn_relu_forward, rnn_relu_backward},
        [GRU] = {3, 4, 0, 1, 1, 1, 0, 0, gru_forward, gru_backward},
        [LSTM] = {4, 4, 1, 1, 0, 1, 0, 0, lstm_forward, lstm_backward},
        [LAYER_NORM_GRU] = {3, 6, 0, 1, 1, 1, 10, 1, layer_norm_gru_forward,
                            layer_norm_gru_backward},
        [LAYER_NORM_LSTM] = {4, 8, 1, 1, 0, 1, 14, 1, layer_norm_lstm_forward,
                             layer_norm_lstm_backward},
    };
    return cells[which];
}

#endif
