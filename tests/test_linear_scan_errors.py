"""Every error of the linear recurrences' NumPy API, minGRU and minLSTM among them: its type, and a
message with operation, argument, expected, got."""

import re

import numpy as np
import pytest
from running import zeros

import fastseq

GIVEN = {
    "linear_scan": {"a": zeros(5, 2, 3), "b": zeros(5, 2, 3)},
    "min_gru": {"x": zeros(5, 2, 3), "w_z": zeros(4, 3), "w_h": zeros(4, 3)},
    "min_lstm": {"x": zeros(5, 2, 3), "w_f": zeros(4, 3), "w_i": zeros(4, 3), "w_h": zeros(4, 3)},
}
ERRORS = [
    ("linear_scan", "a", zeros(5, 3), ValueError, "a must be (T, B, C), 3 axes, got shape (5, 3)"),
    ("linear_scan", "a", [1.0], TypeError, "a must be a NumPy array, got list"),
    (
        "linear_scan",
        "a",
        zeros(5, 2, 3, dtype=int),
        TypeError,
        "a must be float32 or float64, got int64",
    ),
    (
        "linear_scan",
        "b",
        zeros(5, 2, 4),
        ValueError,
        "b must be (T, B, C) = (5, 2, 3), got (5, 2, 4)",
    ),
    (
        "linear_scan",
        "b",
        zeros(5, 2, 3, dtype=float),
        TypeError,
        "b must be float32 as a is, got float64",
    ),
    ("linear_scan", "h0", zeros(3), ValueError, "h0 must be (B, C) = (2, 3), got (3,)"),
    (
        "linear_scan",
        "lengths",
        np.array([6, 5]),
        ValueError,
        "lengths must be in 0..T = 0..5, got lengths[0] = 6",
    ),
    (
        "linear_scan",
        "lengths",
        np.array([1.0, 5]),
        TypeError,
        "lengths must be integers, got float64",
    ),
    ("linear_scan", "resets", zeros(5, 2), TypeError, "resets must be bool, got float32"),
    ("min_gru", "x", zeros(2, 3), ValueError, "x must be (T, B, I), 3 axes, got shape (2, 3)"),
    ("min_gru", "w_z", zeros(4, 2), ValueError, "w_z must be (H, I) = (4, 3), got (4, 2)"),
    ("min_gru", "w_h", zeros(5, 3), ValueError, "w_h must be (H, I) = (4, 3), got (5, 3)"),
    (
        "min_gru",
        "w_h",
        zeros(4, 3, dtype=float),
        TypeError,
        "w_h must be float32 as x is, got float64",
    ),
    ("min_gru", "b_z", zeros(3), ValueError, "b_z must be (H,) = (4,), got (3,)"),
    ("min_gru", "h0", zeros(2, 3), ValueError, "h0 must be (B, H) = (2, 4), got (2, 3)"),
    ("min_gru", "lengths", np.array([5]), ValueError, "lengths must be (B,) = (2,), got (1,)"),
    ("min_lstm", "w_i", None, TypeError, "w_i must be a NumPy array, got NoneType"),
    (
        "min_lstm",
        "resets",
        zeros(2, 5, dtype=bool),
        ValueError,
        "resets must be (T, B) = (5, 2), got (2, 5)",
    ),
]


@pytest.mark.parametrize(
    ("function", "name", "value", "error", "message"), ERRORS, ids=[e[-1] for e in ERRORS]
)
def test_errors(function, name, value, error, message):
    call, given = getattr(fastseq, function), GIVEN[function] | {name: value}
    for run in (
        lambda: call(**given),
        lambda: fastseq.vjp(call, **given),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'{function}: {message}')}$"):
            run()


@pytest.mark.parametrize(("name", "shape"), [("dh", (5, 2, 4)), ("dh_n", (2, 4))])
def test_errors_of_the_pullback(name, shape):
    _, pull = fastseq.vjp(fastseq.linear_scan, **GIVEN["linear_scan"])
    gradients = (zeros(*shape), None) if name == "dh" else (None, zeros(*shape))
    with pytest.raises(ValueError, match=rf"^linear_scan: {name} must be "):
        pull(gradients)
