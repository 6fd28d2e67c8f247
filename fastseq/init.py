"""Initial weights of recurrent networks over NumPy arrays, written in place.

Gate order is torch's: LSTM i|f|g|o, GRU r|z|n. `fastseq.torch.init` does the same to modules.
"""

from __future__ import annotations

import numpy as np

from fastseq import _check

Array = np.ndarray

__all__ = ["forget_bias", "identity", "orthogonal"]


def identity(
    w_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None, *, scale: float = 1.0
) -> None:
    """IRNN: the ReLU RNN whose state, without input, stays as it is.

        W_hh = scale I        b_ih = b_hh = 0        so that h' = max(h, 0) for x = 0

    Args:
        w_hh: (H, H) float32 or float64, any strides.
        b_ih: (H,), or None where there are no biases.
        b_hh: (H,).
        scale: of the identity; the paper takes 0.01 where only short memory is wanted.

    Returns:
        None. w_ih stays as it is: the paper draws it from N(0, 0.001).

    Raises:
        TypeError: an array is none, or neither float32 nor float64.
        ValueError: a shape does not fit: more than one gate; an array is read-only.

    Accuracy: exact.
    Cost: H^2 stores.
    Equivalent to: torch.nn.init.eye_(w_hh); torch.nn.init.zeros_(b_ih)
    Source: Le, Jaitly & Hinton, arXiv:1504.00941.
    """
    H = _matrix("identity", "w_hh", w_hh, "H, H")[1]
    _check.shape("identity", "w_hh", w_hh.shape, "H, H", (H, H))
    biases = {"b_ih": b_ih, "b_hh": b_hh}
    for name, b in biases.items():
        _bias("identity", name, b, "H", H)
    w_hh[...] = scale * np.eye(H)
    for b in biases.values():
        if b is not None:
            b[...] = 0


def orthogonal(
    w: Array,
    gates: int | None = None,
    *,
    gain: float = 1.0,
    rng: np.random.Generator | int | None = None,
) -> None:
    """An orthogonal matrix for each gate, uniform over all of them (Haar).

        W_g^T W_g = gain^2 I        W_g = gain Q sign(diag R) of the QR of a normal matrix

    Args:
        w: (G H, H) float32 or float64, any strides: W_hh. Also (G R, C) with gates given, as W_ih:
            each block has orthogonal columns, or rows where it has more columns than rows.
        gates: G: RNN 1, GRU 3, LSTM 4; None: rows / columns.
        gain: of every block.
        rng: a generator or a seed of numpy.random.default_rng; None: another one at every call.

    Returns:
        None.

    Raises:
        TypeError: w is no array of float32 or float64.
        ValueError: the rows are no multiple of the gates; w is read-only.

    Accuracy: computed in float64, rounded once.
    Cost: a QR of every block.
    Equivalent to: torch.nn.init.orthogonal_(w[g * H : (g + 1) * H], gain) for every gate g
    Source: Saxe, McClelland & Ganguli, arXiv:1312.6120.
    """
    rows, columns = _matrix("orthogonal", "w", w, "G H, H")
    gates = gate_count("orthogonal", (rows, columns), gates)
    normal = np.random.default_rng(rng).standard_normal((rows, columns))
    w[...] = orthogonal_blocks(normal, gates, gain)


def forget_bias(b_ih: Array, b_hh: Array | None = None, value: float = 1.0) -> None:
    """The LSTM's forget gate open from the start: f = sigmoid(value + ...).

        b_ih[f] = value        b_hh[f] = 0        gates i|f|g|o: f = H..2H; the others stay

    Args:
        b_ih: (4H,) float32 or float64, any strides.
        b_hh: (4H,), or None where there is none.
        value: of the sum of both.

    Returns:
        None.

    Raises:
        TypeError: an array is none, or neither float32 nor float64.
        ValueError: a shape does not fit; an array is read-only.

    Accuracy: exact.
    Cost: 2H stores.
    Equivalent to: b_ih[H : 2 * H].fill_(value); b_hh[H : 2 * H].zero_()
    Source: Gers, Schmidhuber & Cummins, Learning to forget, 2000; Jozefowicz et al., 2015.
    """
    _check.floats("forget_bias", "b_ih", _check.signature(b_ih))
    _bias("forget_bias", "b_ih", b_ih, "4H")
    if b_ih.shape[0] % 4:
        raise ValueError(f"forget_bias: b_ih must be (4H,), got {b_ih.shape}")
    H = b_ih.shape[0] // 4
    _bias("forget_bias", "b_hh", b_hh, "4H", 4 * H)
    b_ih[H : 2 * H] = value
    if b_hh is not None:
        b_hh[H : 2 * H] = 0


def gate_count(op: str, shape: tuple[int, int], gates: int | None) -> int:
    """The gates stacked in a weight's rows, given or rows / columns."""
    rows, columns = shape
    found = rows // max(columns, 1) if gates is None else gates
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{op}: gates must be an integer >= 1, got {found!r}")
    expected = f"({found} H, {'H' if gates is None else 'C'})"
    if rows % found or (gates is None and rows != found * columns):
        raise ValueError(f"{op}: w must be {expected}, got {shape}")
    return found


def orthogonal_blocks(normal: Array, gates: int, gain: float) -> Array:
    """(G R, C) of normal numbers -> the same with a (semi-)orthogonal block for each gate."""
    blocks = normal.reshape(gates, -1, normal.shape[1])
    wide = blocks.shape[1] < blocks.shape[2]
    q, r = np.linalg.qr(blocks.swapaxes(1, 2) if wide else blocks)
    # QR's signs are a convention; without them Q would not be uniform (Mezzadri, 2007)
    q = q * np.where(np.diagonal(r, axis1=1, axis2=2) < 0, -1, 1)[:, None]
    return gain * (q.swapaxes(1, 2) if wide else q).reshape(normal.shape)


def _matrix(op: str, name: str, w, letters: str) -> tuple[int, int]:
    _check.floats(op, name, _check.signature(w))
    _check.rank(op, name, w.shape, letters)
    _writeable(op, name, w)
    return w.shape


def _bias(op: str, name: str, b, letters: str, size: int | None = None) -> None:
    if b is None:
        return
    _check.floats(op, name, _check.signature(b))
    _check.rank(op, name, b.shape, letters)
    if size is not None:
        _check.shape(op, name, b.shape, f"{letters},", (size,))
    _writeable(op, name, b)


def _writeable(op: str, name: str, a: Array) -> None:
    if not a.flags.writeable:
        raise ValueError(f"{op}: {name} must be writeable, got a read-only array")
