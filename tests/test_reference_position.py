"""The reference of positional encodings: against torch, and what each of them is made for."""

from math import log2

import numpy as np
import pytest
from finite_differences import assert_gradients_are_those_of
from tolerance import assert_close

from fastseq.reference.attention import attention
from fastseq.reference.position import alibi_slopes, rotary, rotary_vjp, sinusoidal_positions

ROTATIONS = [
    {},
    {"interleaved": True},
    {"dim": 4},
    {"dim": 6, "interleaved": True},
    {"dim": 0},
    {"offsets": 11},
    {"offsets": np.array([3, 0])},
    {"base": 500.0, "offsets": np.array([0, 1000]), "dim": 2, "interleaved": True},
    {"inverse": True, "offsets": np.array([5, 2])},
]


def drawn(rng, dtype="float64"):
    return rng.standard_normal((2, 3, 5, 8)).astype(dtype)  # B, NH, L, D


def torch_rotary(x, dim=None, base=10000.0, interleaved=False, offsets=0, inverse=False):
    """The pairs as complex numbers, times exp(i theta); the angles in the dtype of x."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(x)
    dim = x.shape[-1] if dim is None else dim
    frequency = base ** -(torch.arange(0, dim, 2, dtype=x.dtype) / max(dim, 1))
    positions = torch.arange(x.shape[-2]) + torch.tensor(offsets).reshape(-1, 1, 1)
    theta = positions[..., None] * frequency * (-1 if inverse else 1)
    x1, x2 = (x[..., 0:dim:2], x[..., 1:dim:2]) if interleaved else x[..., :dim].chunk(2, dim=-1)
    turned = torch.complex(x1, x2) * torch.polar(torch.ones_like(theta), theta)
    parts = torch.stack([turned.real, turned.imag], dim=-1 if interleaved else -2)
    return torch.cat([parts.flatten(-2), x[..., dim:]], dim=-1)


# Sinusoidal


@pytest.mark.parametrize(
    ("L", "D", "base"), [(9, 6, 10000.0), (4, 7, 100.0), (3, 1, 2.0), (0, 4, 2.0)]
)
def test_sinusoidal_is_the_formula(L, D, base):
    torch = pytest.importorskip("torch")
    encoding = sinusoidal_positions(L, D, base)
    expected = torch.zeros(L, D, dtype=torch.float64)
    for d in range(D):
        angle = torch.arange(L, dtype=torch.float64) / base ** (d // 2 * 2 / D)
        expected[:, d] = angle.cos() if d % 2 else angle.sin()
    assert_close(encoding, expected)


def test_sinusoidal_products_depend_on_the_distance():
    encoding = sinusoidal_positions(20, 16)
    products = encoding @ encoding.T
    for distance in range(20):
        diagonal = np.diagonal(products, distance)
        assert_close(diagonal, np.full_like(diagonal, diagonal[0]))


# Rotary


@pytest.mark.parametrize("options", ROTATIONS, ids=str)
def test_rotary_matches_torch(options, rng):
    x = drawn(rng)
    assert_close(rotary(x, **options), torch_rotary(x, **options))


@pytest.mark.parametrize("options", ROTATIONS, ids=str)
def test_rotary_in_float32_matches_float64_as_torch_does(options, rng):
    x = drawn(rng, "float32")
    ref, peer = rotary(x.astype("float64"), **options), torch_rotary(x, **options)
    assert_close(rotary(x, **options), ref, peer)


@pytest.mark.parametrize("options", ROTATIONS, ids=str)
def test_rotary_gradient_is_that_of_the_forward(options, rng):
    x, dy = drawn(rng, "longdouble"), drawn(rng, "longdouble")
    grads = rotary_vjp(x, dy=dy, **options)
    assert_gradients_are_those_of(lambda x: (dy * rotary(x, **options)).sum(), {"x": x}, grads, rng)


@pytest.mark.parametrize("options", ROTATIONS[:-1], ids=str)
def test_rotary_inverse_turns_back(options, rng):
    x = drawn(rng)
    assert_close(rotary(rotary(x, **options), inverse=True, **options), x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_the_distance(interleaved, rng):
    """Attention does not change when all positions move by the same amount."""
    q, k, v = drawn(rng), drawn(rng), drawn(rng)
    o, moved = (
        attention(*(rotary(x, offsets=n, interleaved=interleaved) for x in (q, k)), v)[0]
        for n in (0, 37)
    )
    assert_close(moved, o)
    unlike, _ = attention(rotary(q, offsets=1), rotary(k), v)
    assert np.abs(unlike - o).max() > 1e-3


def test_rotary_offsets_continue_a_sequence(rng):
    x = drawn(rng)
    whole = rotary(x, offsets=np.array([3, 8]))
    assert_close(rotary(x[:, :, 2:], offsets=np.array([5, 10])), whole[:, :, 2:])
    assert_close(rotary(x[1, 0], offsets=8), whole[1, 0])


def test_rotary_leaves_its_input_and_dtype(rng):
    for dtype in ("float16", "float32", "float64", "longdouble"):
        x = drawn(rng, dtype)
        before = x.copy()
        assert rotary(x).dtype == dtype and rotary(x[:, :, :0]).shape == (2, 3, 0, 8)
        np.testing.assert_array_equal(x, before)


# ALiBi


def published_slopes(NH):
    """The recursion of the paper's code: powers of two, filled up from the next one's odd terms."""
    if log2(NH).is_integer():
        return [2 ** (-8 / NH * (h + 1)) for h in range(NH)]
    n = 2 ** int(log2(NH))
    return published_slopes(n) + published_slopes(2 * n)[0::2][: NH - n]


@pytest.mark.parametrize("NH", range(1, 21))
def test_alibi_slopes_are_the_published_ones(NH):
    assert_close(alibi_slopes(NH), np.array(published_slopes(NH)))


def test_alibi_slopes_of_8_heads_halve():
    np.testing.assert_array_equal(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
