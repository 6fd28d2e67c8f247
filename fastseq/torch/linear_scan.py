"""Linear recurrences over torch tensors, and minGRU and minLSTM built on them, with gradients.

Same names, arguments and results as the NumPy functions of `fastseq`.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from fastseq.torch._tensors import FLOATS, on_gpu, unsupported
from fastseq.torch.linear_scan_ops import run


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear recurrence over T steps, element by element.

        h_t = a_t * h_{t-1} + b_t

    Args:
        a: (T, B, C) float32 or float64, on a GPU float32, bfloat16 or float16; any strides.
        b: (T, B, C).
        h0: (B, C), zeros if None.
        reverse: time runs backwards, for each row from its own end.
        lengths: (B,) int64 in 0..T, any order; steps past a row's length are not computed.
        resets: (T, B) bool; True: the row's state is zero before that step is computed.

    Returns:
        h (T, B, C), zero past a row's length, and h_n (B, C), each row's own last state.

    Raises:
        TypeError: an argument is no tensor, or a or b of another dtype.
        ValueError: a shape, dtype or length (not read on a GPU) does not fit.
        ImportError: Numba is not installed, on a GPU triton.
        RuntimeError: a second derivative is asked for.

    Accuracy: float32 error within 2x of torch's own (3x for gradients), float64 1e-12 relative.
    Cost: 3 T B C numbers of memory traffic, 5 for the gradients; h is kept for backward.
    Equivalent to: for t in range(T): h[t] = h_n = a[t] * h_n + b[t]
    Source: Blelloch, Prefix sums and their applications, 1990 (chunks in time, for few columns).
    """
    _require_tensors("linear_scan", a=a, b=b, h0=h0, lengths=lengths, resets=resets)
    return run(a, b, h0, lengths, resets, bool(reverse))


def min_gru(
    x: Tensor,
    w_z: Tensor,
    w_h: Tensor,
    b_z: Tensor | None = None,
    b_h: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Minimal gated recurrent unit over T steps: gates and candidate of x alone.

        z = sigmoid(W_z x + b_z)        n = W_h x + b_h        h' = (1 - z) * h + z * n

    Args:
        x: (T, B, I) float32 or float64, on a GPU float32, bfloat16 or float16; any strides.
        w_z: (H, I).
        w_h: (H, I).
        b_z: (H,), zeros if None.
        b_h: (H,), zeros if None.
        h0: (B, H), zeros if None.
        lengths: (B,) int64 in 0..T, any order; steps past a row's length are not read.
        resets: (T, B) bool; True: the row's state is zero before that step is computed.
        reverse: time runs backwards, for each row from its own end.

    Returns:
        h (T, B, H), zero past a row's length, and h_n (B, H), each row's own last state.

    Raises:
        TypeError: an argument is no tensor, or x of another dtype.
        ValueError, RuntimeError: a shape, dtype or length (not read on a GPU) does not fit.
        ImportError: Numba is not installed, on a GPU triton.

    Accuracy: float32 error within 2x of torch's own (3x for gradients), float64 1e-12 relative.
    Cost: 4 H I FLOP a step and row by torch's products, and `linear_scan`.
    Equivalent to: linear_scan(1 - z, z * n, h0)
    Source: Feng et al., Were RNNs all we needed?, arXiv:2410.01201, section 3.1.
    """
    projections = {"w_z": w_z, "w_h": w_h, "b_z": b_z, "b_h": b_h}
    _check("min_gru", x, h0, lengths, resets, projections)
    x = active(x, lengths)
    a, b = min_gru_gates(linear(x, w_z, b_z), linear(x, w_h, b_h))
    return run(a, b, h0, lengths, resets, bool(reverse))


def min_lstm(
    x: Tensor,
    w_f: Tensor,
    w_i: Tensor,
    w_h: Tensor,
    b_f: Tensor | None = None,
    b_i: Tensor | None = None,
    b_h: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Minimal long short-term memory over T steps: gates and candidate of x alone, f + i = 1.

        f = sigmoid(W_f x + b_f)    i = sigmoid(W_i x + b_i)    n = W_h x + b_h
        h' = f / (f + i) * h + i / (f + i) * n

    Args:
        x: (T, B, I) float32 or float64, on a GPU float32, bfloat16 or float16; any strides.
        w_f: (H, I).
        w_i: (H, I).
        w_h: (H, I).
        b_f: (H,), zeros if None.
        b_i: (H,), zeros if None.
        b_h: (H,), zeros if None.
        h0: (B, H), zeros if None.
        lengths: (B,) int64 in 0..T, any order; steps past a row's length are not read.
        resets: (T, B) bool; True: the row's state is zero before that step is computed.
        reverse: time runs backwards, for each row from its own end.

    Returns:
        h (T, B, H), zero past a row's length, and h_n (B, H), each row's own last state.

    Raises:
        TypeError: an argument is no tensor, or x of another dtype.
        ValueError, RuntimeError: a shape, dtype or length (not read on a GPU) does not fit.
        ImportError: Numba is not installed, on a GPU triton.

    Accuracy: as `min_gru`; f / (f + i) is computed from logarithms and does not underflow.
    Cost: 6 H I FLOP a step and row by torch's products, and `linear_scan`.
    Equivalent to: linear_scan(f / (f + i), i / (f + i) * n, h0)
    Source: Feng et al., Were RNNs all we needed?, arXiv:2410.01201, section 3.2.
    """
    projections = {"w_f": w_f, "w_i": w_i, "w_h": w_h, "b_f": b_f, "b_i": b_i, "b_h": b_h}
    _check("min_lstm", x, h0, lengths, resets, projections)
    x = active(x, lengths)
    a, b = min_lstm_gates(linear(x, w_f, b_f), linear(x, w_i, b_i), linear(x, w_h, b_h))
    return run(a, b, h0, lengths, resets, bool(reverse))


def min_gru_gates(k, n):
    """a and b of h' = a h + b, from the projections."""
    return torch.sigmoid(-k), torch.sigmoid(k) * n


def min_lstm_gates(f, i, n):
    """a and b of h' = a h + b, from the projections."""
    log = logsigmoid(i) - logsigmoid(f)  # finite where f and i themselves would be 0
    return torch.sigmoid(-log), torch.sigmoid(log) * n


def active(x, lengths):
    """x with zeros past the rows' lengths: what is there reaches no result and no gradient."""
    if lengths is None:
        return x
    steps = torch.arange(x.shape[0], device=lengths.device)
    past = (steps.unsqueeze(1) >= lengths).to(x.device)
    return x.masked_fill(past.unsqueeze(-1), 0)


def _require_tensors(op, **arguments):
    for name, a in arguments.items():
        if a is not None and not isinstance(a, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(a).__name__}")


def _check(op, x, h0, lengths, resets, projections):
    _require_tensors(op, x=x, **projections, h0=h0, lengths=lengths, resets=resets)
    if not on_gpu(x) and (x.dtype not in FLOATS or not (x.is_cpu or x.is_meta)):
        raise unsupported(op, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be (T, B, I), 3 axes, got shape {tuple(x.shape)}")
    H = projections["w_h"].shape[0]
    for name, value in projections.items():
        if value is None:
            continue
        letters, expected = ("H, I", (H, x.shape[2])) if name[0] == "w" else ("H,", (H,))
        if value.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must be {x.dtype} as x is, got {value.dtype}")
        if value.shape != expected:
            numbers = str(tuple(expected))
            got = tuple(value.shape)
            raise ValueError(f"{op}: {name} must be ({letters}) = {numbers}, got {got}")
    if lengths is not None and lengths.shape != x.shape[1:2]:
        got, B = tuple(lengths.shape), x.shape[1]
        raise ValueError(f"{op}: lengths must be (B,) = ({B},), got {got}")
