"""Initial values over NumPy arrays: identity, orthogonal, forget bias."""

import numpy as np
import pytest
from running import assert_refused, assert_same_bits_in_order
from tolerance import assert_close

import fastseq
from fastseq.reference import training as reference


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_identity_keeps_the_state(dtype, rng):
    """IRNN: without input h_t = h_{t-1}."""
    w_hh, b_ih, b_hh = (np.full(s, np.nan, dtype) for s in ((5, 5), 5, 5))
    fastseq.init.identity(w_hh, b_ih, b_hh)
    ref = reference.identity(5)
    for a, r in zip((w_hh, b_ih, b_hh), ref, strict=True):
        np.testing.assert_array_equal(a, r)
    h0 = rng.random((3, 5)).astype(dtype)
    x, w_ih = np.zeros((9, 3, 2), dtype), rng.standard_normal((5, 2)).astype(dtype)
    y, h_n = fastseq.rnn(x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity="relu")
    assert_same_bits_in_order([*y, h_n], [h0] * 10)
    fastseq.init.identity(w_hh[::-1], scale=0.01)
    np.testing.assert_array_equal(w_hh[::-1], (0.01 * np.eye(5)).astype(dtype))


@pytest.mark.parametrize("gates", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_orthogonal_per_gate(dtype, gates):
    H, gain = 7, 1.5
    w = np.full((gates * H, H), np.nan, dtype)
    fastseq.init.orthogonal(w, gain=gain, rng=5)
    exact = np.full((gates * H, H), np.nan)
    fastseq.init.orthogonal(exact, gain=gain, rng=np.random.default_rng(5))
    assert_same_bits_in_order([w], [exact.astype(dtype)])
    for block in np.split(exact, gates):
        assert_close(block.T @ block, gain**2 * np.eye(H))
    normal = np.random.default_rng(5).standard_normal(exact.shape)
    assert_close(exact, reference.orthogonal(normal, gates, gain))
    other = np.zeros_like(w)
    fastseq.init.orthogonal(other, rng=6)
    assert np.abs(other - w / gain).max() > 0.1


@pytest.mark.parametrize("shape", [(12, 2), (12, 9)])
def test_orthogonal_blocks_that_are_not_square(shape):
    w = np.empty(shape)
    fastseq.init.orthogonal(w, 4, rng=1)
    assert_close(w, reference.orthogonal(np.random.default_rng(1).standard_normal(shape), 4))
    for block in np.split(w, 4):
        small = block.T @ block if block.shape[0] > block.shape[1] else block @ block.T
        assert_close(small, np.eye(len(small)))


def test_orthogonal_is_uniform():
    """The trace of a Haar matrix has mean 0 and variance 1; QR's signs alone would shift it."""
    w = np.empty((4000, 2))
    fastseq.init.orthogonal(w, 2000, rng=0)
    traces = np.trace(w.reshape(2000, 2, 2), axis1=1, axis2=2)
    assert abs(traces.mean()) < 5 / np.sqrt(2000)
    assert abs(traces.var() - 1) < 5 * np.sqrt(2 / 2000)


def test_forget_bias(rng):
    b_ih, b_hh = rng.standard_normal((2, 12))
    ref = reference.forget_bias(b_ih, b_hh, 2.0)
    fastseq.init.forget_bias(b_ih, b_hh, 2.0)
    assert_same_bits_in_order([b_ih, b_hh], ref)
    fastseq.init.forget_bias(b_ih)
    np.testing.assert_array_equal(b_ih[3:6], 1)


def read_only(*shape):
    a = np.zeros(shape)
    a.flags.writeable = False
    return a


INIT_ERRORS = [
    ("identity", (np.zeros((8, 4)),), ValueError, "w_hh must be (H, H) = (4, 4), got (8, 4)"),
    ("identity", (np.zeros(4),), ValueError, "w_hh must be (H, H), 2 axes, got shape (4,)"),
    ("identity", ([[1.0]],), TypeError, "w_hh must be a NumPy array, got list"),
    ("identity", (read_only(2, 2),), ValueError, "w_hh must be writeable, got a read-only array"),
    ("identity", (np.zeros((2, 2)), np.zeros(3)), ValueError, "b_ih must be (H,) = (2,), got (3,)"),
    ("orthogonal", (np.zeros((9, 4)),), ValueError, "w must be (2 H, H), got (9, 4)"),
    ("orthogonal", (np.zeros((9, 4)), 2), ValueError, "w must be (2 H, C), got (9, 4)"),
    ("orthogonal", (np.zeros((2, 4)),), ValueError, "gates must be an integer >= 1, got 0"),
    ("orthogonal", (np.zeros((8, 4)), 1.5), ValueError, "gates must be an integer >= 1, got 1.5"),
    ("orthogonal", (np.zeros((2, 2), int),), TypeError, "w must be float32 or float64, got int64"),
    ("forget_bias", (np.zeros(6),), ValueError, "b_ih must be (4H,), got (6,)"),
    ("forget_bias", (None,), TypeError, "b_ih must be a NumPy array, got NoneType"),
    ("forget_bias", (np.zeros(8), np.zeros(4)), ValueError, "b_hh must be (4H,) = (8,), got (4,)"),
]


@pytest.mark.parametrize(("name", "given", "error", "message"), INIT_ERRORS)
def test_init_errors(name, given, error, message):
    assert_refused(lambda: getattr(fastseq.init, name)(*given), error, f"{name}: {message}")
