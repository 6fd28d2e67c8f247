"""The tolerance rule itself: it passes what it should and fails what it must."""

import numpy as np
import pytest
from tolerance import assert_all_close, assert_close

REF = np.array([1.0, -2.0, 0.5])
EPS = np.finfo(np.float32).eps


def at_end(value):
    return np.array([0.0, 0.0, value])


def f32(*values):
    return np.array(values, np.float32)


def test_float64_is_relative_to_the_largest():
    assert_close(REF + at_end(1e-12), REF)
    with pytest.raises(AssertionError, match=r"y float64\[3\]: error 3e-12 > 2e-12"):
        assert_close(REF + at_end(3e-12), REF, name="y")


@pytest.mark.parametrize(("grad", "k"), [(False, 2), (True, 3)])
def test_float32_has_k_times_the_error_of_the_peer(grad, k):
    peer = f32(1, -2, 0.5 + 2**-10)
    within = f32(1, -2, 0.5 + k * 2**-10 + 4 * EPS)
    assert_close(within, REF, peer, grad=grad)
    with pytest.raises(AssertionError, match="error"):
        assert_close(within + f32(0, 0, 16 * EPS), REF, peer, grad=grad)


def test_float32_needs_a_peer_of_its_dtype_and_a_float64_reference():
    ours = REF.astype(np.float32)
    for arguments in ((ours, REF), (ours, REF, REF), (ours, ours, ours)):
        with pytest.raises(AssertionError):
            assert_close(*arguments)


def test_a_zero_reference_is_met_exactly():
    assert_close(np.zeros(3), np.zeros(3))
    with pytest.raises(AssertionError):
        assert_close(np.array([0, 0, 1e-300]), np.zeros(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_inf_must_stand_in_the_same_places(value):
    special = np.array([1.0, value, 0.5])
    assert_close(special, special)
    for ours, ref in ((special, REF), (REF, special), (special, -special[::-1])):
        with pytest.raises(AssertionError, match=r"misplaced|error"):
            assert_close(ours, ref)
    if not np.isnan(value):
        with pytest.raises(AssertionError, match="misplaced"):
            assert_close(np.array([1.0, -value, 0.5]), special)


def test_a_peer_that_is_not_finite_gives_no_room():
    with pytest.raises(AssertionError, match="error"):
        assert_close(f32(1, -2, 0.6), REF, f32(np.nan, np.inf, 0.5))


def test_shapes_and_names_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(REF[None], REF)
    with pytest.raises(AssertionError, match="names"):
        assert_all_close({"y": REF}, {"y": REF, "h_n": REF})
    assert_close(np.zeros((0, 3)), np.zeros((0, 3)))


def test_takes_tensors_and_bfloat16():
    torch = pytest.importorskip("torch")
    ours = torch.tensor(REF, dtype=torch.bfloat16, requires_grad=True)
    assert_close(ours, REF, ours)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_close(ours * 1.1, torch.tensor(REF), ours)
