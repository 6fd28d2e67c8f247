"""What makes a cell a cell on the GPU: its gates, element-wise forward and backward on a tile.

All values are float32 tiles (rows, units). x0..x3 are the gates' parts of W_ih x + b, a0..a3 those
of W_hh h, in torch's gate order; a cell with fewer gates gets copies, which it does not read.

    cell       gates     kept for backward                         gradient planes
    rnn_tanh   1         nothing: tanh' = 1 - y^2                  da
    rnn_relu   1         nothing: relu' = y > 0                    da
    gru        r|z|n     r, z, n, a_n (with b_hn)                  dx_n, dr, dz, da_n
    lstm       i|f|g|o   i, f, g, o; and c of every step           di, df, dg, do

Of a GRU's gradient planes the first three are those of W_ih x (n first), the last three those of
W_hh h in torch's order: both are contiguous.
"""

import triton
import triton.language as tl

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
KEPT = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 4}  # planes
PLANES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 4}  # of gradients
HIDDEN_PLANE = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 1, "lstm": 0}  # the first of W_hh h


@triton.jit
def tanh(x):
    """Within 2 ulp: Cephes' polynomial below 0.625, else 1 - 2 / (exp(2 |x|) + 1)."""
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, p * s * x + x, tl.where(x < 0, -large, large))


@triton.jit
def _gru_fwd(x0, x1, x2, a0, a1, a2, bias, h):
    """h' = (1 - z) * n + z * h"""
    r = tl.sigmoid(x0 + a0)
    z = tl.sigmoid(x1 + a1)
    a_n = a2 + bias
    n = tanh(x2 + r * a_n)
    return (1 - z) * n + z * h, r, z, n, a_n


@triton.jit
def _gru_bwd(dh, r, z, n, a_n, h):
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h - n) * z * (1 - z)
    dr = dn * a_n * r * (1 - r)
    return dh * z, dn, dr, dz, dn * r


@triton.jit
def _lstm_fwd(x0, x1, x2, x3, a0, a1, a2, a3, c):
    """c' = f * c + i * g, h' = o * tanh(c')"""
    i = tl.sigmoid(x0 + a0)
    f = tl.sigmoid(x1 + a1)
    g = tanh(x2 + a2)
    o = tl.sigmoid(x3 + a3)
    c = f * c + i * g
    return o * tanh(c), c, i, f, g, o


@triton.jit
def _lstm_bwd(dh, dc, i, f, g, o, c, c_next):
    tanh_c = tanh(c_next)
    dc += dh * o * (1 - tanh_c * tanh_c)
    di = dc * g * i * (1 - i)
    df = dc * c * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * tanh_c * o * (1 - o)
    return dc * f, di, df, dg, do


@triton.jit
def forward(CELL: tl.constexpr, x0, x1, x2, x3, a0, a1, a2, a3, bias, h, c):
    """h', c', and the planes kept for backward."""
    if CELL == "lstm":
        h, c, k0, k1, k2, k3 = _lstm_fwd(x0, x1, x2, x3, a0, a1, a2, a3, c)
    elif CELL == "gru":
        h, k0, k1, k2, k3 = _gru_fwd(x0, x1, x2, a0, a1, a2, bias, h)
    else:
        a = x0 + a0
        h = tanh(a) if CELL == "rnn_tanh" else tl.where(a <= 0, 0.0, a)  # a NaN stays
        k0, k1, k2, k3 = h, h, h, h
    return h, c, k0, k1, k2, k3


@triton.jit
def backward(CELL: tl.constexpr, dh, dc, k0, k1, k2, k3, h, h_next, c, c_next):
    """dh (what does not go through W_hh), dc, and the gradient planes."""
    if CELL == "lstm":
        dc, d0, d1, d2, d3 = _lstm_bwd(dh, dc, k0, k1, k2, k3, c, c_next)
        dh = tl.zeros_like(dh)
    elif CELL == "gru":
        dh, d0, d1, d2, d3 = _gru_bwd(dh, k0, k1, k2, k3, h)
    else:
        slope = 1 - h_next * h_next
        d0 = dh * slope if CELL == "rnn_tanh" else tl.where(h_next <= 0, 0.0, dh)
        d1, d2, d3 = d0, d0, d0
        dh = tl.zeros_like(dh)
    return dh, dc, d0, d1, d2, d3
