"""Positional encodings over NumPy arrays, held against the float64 reference."""

import numpy as np
import pytest
from running import BIG_ENDIAN, assert_refused, assert_same_bits, zeros
from tolerance import assert_close

import fastseq
from fastseq.reference import position as reference
from fastseq.reference.attention import attention

DTYPES = ("float32", "float64")
ROTATIONS = [
    {},
    {"interleaved": True},
    {"dim": 4},
    {"dim": 6, "interleaved": True},
    {"dim": 0},
    {"offsets": 11},
    {"offsets": np.array([3, 0])},
    {"offsets": np.array([0, 1000], np.int32)},
    {"base": 500.0, "offsets": np.array([0, 1000]), "dim": 2, "interleaved": True},
    {"inverse": True, "offsets": np.array([5, 2])},
]
SIZES = [(2, 3, 5, 8), (2, 1, 1, 128), (2, 2, 17, 66), (2, 3, 0, 8), (2, 0, 5, 8)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def peer_rotary(x, *, dim=None, base=10000.0, interleaved=False, offsets=0, inverse=False):
    """torch in the dtype of x, as models write it: the angles in float64, all else in x's."""
    torch = pytest.importorskip("torch")
    dim = x.shape[-1] if dim is None else dim
    frequency = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1))
    start = torch.tensor(np.asarray(offsets, np.int64)).reshape(-1, 1, 1, 1)
    theta = (start + torch.arange(x.shape[-2])[:, None]) * frequency
    x = torch.tensor(x)
    cos, sin = theta.cos().to(x.dtype), theta.sin().to(x.dtype) * (-1 if inverse else 1)
    x1, x2 = (x[..., 0:dim:2], x[..., 1:dim:2]) if interleaved else x[..., :dim].chunk(2, dim=-1)
    parts = torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1 if interleaved else -2)
    return torch.cat([parts.flatten(-2), x[..., dim:]], dim=-1)


# Rotary


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
@every_dtype
def test_rotary(dtype, rotation, size, rng):
    """And its gradient, which is the turn back, twice."""
    x, dy = (rng.standard_normal(size).astype(dtype) for _ in range(2))
    wide, peer = x.astype(np.float64), None
    y, pullback = fastseq.vjp(fastseq.rotary, x, **rotation)
    (dx,) = pullback(dy)
    (again,) = pullback(dy)
    back = rotation | {"inverse": not rotation.get("inverse", False)}
    if dtype == "float32":
        peer = peer_rotary(x, **rotation), peer_rotary(dy, **back)
    assert_close(y, reference.rotary(wide, **rotation), peer and peer[0], name="y")
    ref = reference.rotary_vjp(wide, dy=dy.astype(np.float64), **rotation)["x"]
    assert_close(dx, ref, peer and peer[1], grad=True, name="dx")
    assert_same_bits({"y": fastseq.rotary(x, **rotation), "dx": again}, {"y": y, "dx": dx})
    if rotation.get("dim") is not None:
        assert_same_bits({"rest": y[..., rotation["dim"] :]}, {"rest": x[..., rotation["dim"] :]})


def test_rotary_gradient_of_none_is_zero(rng):
    x = rng.standard_normal((2, 3, 5, 8))
    _, pullback = fastseq.vjp(fastseq.rotary, x)
    assert not pullback(None)[0].any()


@every_dtype
def test_rotary_of_fewer_axes(dtype, rng):
    x = rng.standard_normal((2, 3, 5, 8)).astype(dtype)
    y = fastseq.rotary(x, offsets=4)
    assert_same_bits({"y": fastseq.rotary(x[1], offsets=4)}, {"y": y[1]})
    assert_same_bits({"y": fastseq.rotary(x[1, 2], offsets=4)}, {"y": y[1, 2]})


@every_dtype
def test_rotary_step_by_step_is_the_whole(dtype, rng):
    """A decoding step finds the angles of the position it is at, whatever was asked before."""
    x = rng.standard_normal((2, 3, 70, 8)).astype(dtype)
    whole = fastseq.rotary(x)
    for t in (0, 1, 2, 3, 31, 32, 33, 63, 64, 69):
        step = fastseq.rotary(x[:, :, t : t + 1], offsets=t)
        assert_same_bits({"y": step}, {"y": whole[:, :, t : t + 1]})


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.swapaxes(1, 2).copy().swapaxes(1, 2),
        lambda a: np.flip(np.flip(a).copy()),
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        np.asfortranarray,
        lambda a: np.broadcast_to(a, a.shape),  # read-only
    ],
    ids=["BLHD", "negative", "sliced", "fortran", "read-only"],
)
@every_dtype
def test_rotary_of_any_layout(dtype, change, rng):
    x = rng.standard_normal((2, 3, 5, 8)).astype(dtype)
    found = fastseq.rotary(change(x), dim=6, offsets=np.array([2, 0]))
    assert_same_bits({"y": found}, {"y": fastseq.rotary(x, dim=6, offsets=np.array([2, 0]))})


def test_rotary_follows_the_order_of_x(rng):
    x = rng.standard_normal((2, 5, 3, 8)).swapaxes(1, 2)
    assert fastseq.rotary(x).swapaxes(1, 2).flags.c_contiguous


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_rotary_of_nan_stays_in_its_pair(poison, rng):
    x = rng.standard_normal((2, 3, 5, 8))
    x[1, 2, 3, 1] = poison
    with np.errstate(invalid="ignore"):
        assert_close(fastseq.rotary(x), reference.rotary(x))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a NumPy array, got list"),
        ({"x": None}, TypeError, "x must be a NumPy array, got NoneType"),
        ({"x": zeros(5, 8, dtype=int)}, TypeError, "x must be float32 or float64, got int64"),
        ({"x": zeros(5, 8, dtype=BIG_ENDIAN)}, TypeError, "x must be float32 or float64, got >f4"),
        ({"x": zeros(8)}, ValueError,
         "x must be (B, NH, L, D), (NH, L, D) or (L, D), got (8,)"),
        ({"x": zeros(1, 2, 3, 5, 8)}, ValueError,
         "x must be (B, NH, L, D), (NH, L, D) or (L, D), got (1, 2, 3, 5, 8)"),
        ({"dim": 3}, ValueError, "dim must be even and in 0..D = 0..8, got 3"),
        ({"dim": 10}, ValueError, "dim must be even and in 0..D = 0..8, got 10"),
        ({"dim": -2}, ValueError, "dim must be even and in 0..D = 0..8, got -2"),
        ({"x": zeros(5, 7)}, ValueError, "dim must be even and in 0..D = 0..7, got 7"),
        ({"offsets": -1}, ValueError, "offsets must be >= 0, got -1"),
        ({"offsets": np.array([0, -5])}, ValueError, "offsets must be >= 0, got -5"),
        ({"offsets": 1.5}, TypeError, "offsets must be integers, got float64"),
        ({"offsets": "1"}, TypeError, "offsets must be integers, got <U1"),
        ({"offsets": np.array([1, 2, 3])}, ValueError, "offsets must be (B,) = (2,), got (3,)"),
        ({"offsets": np.array([[1, 2]])}, ValueError, "offsets must be (B,) = (2,), got (1, 2)"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)  # fmt: skip
def test_rotary_errors(given, error, message):
    call = {"x": zeros(2, 3, 5, 8)} | given
    assert_refused(lambda: fastseq.rotary(**call), error, f"rotary: {message}")
    assert_refused(lambda: fastseq.vjp(fastseq.rotary, **call), error, f"rotary: {message}")


# Sinusoidal


@pytest.mark.parametrize(
    ("L", "D", "base"),
    [(9, 6, 10000.0), (4, 7, 100.0), (3, 1, 2.0), (0, 4, 2.0), (5, 0, 2.0), (1000, 64, 10000.0)],
)
def test_sinusoidal(L, D, base):
    """Rounded once: the nearest float32 to float64's."""
    ref = reference.sinusoidal_positions(L, max(D, 1), base)[:, :D]
    assert_close(fastseq.sinusoidal_positions(L, D, base, np.float64), ref)
    expected = {"PE": ref.astype(np.float32)}
    assert_same_bits({"PE": fastseq.sinusoidal_positions(L, D, base)}, expected)


@pytest.mark.parametrize(("L", "D"), [(-1, 4), (3, -2)])
def test_sinusoidal_errors(L, D):
    message = f"sinusoidal_positions: L and D must be >= 0, got L = {L}, D = {D}"
    assert_refused(lambda: fastseq.sinusoidal_positions(L, D), ValueError, message)


# ALiBi


@pytest.mark.parametrize("NH", [*range(1, 18), 24, 31, 32, 33, 64])
def test_alibi_slopes(NH):
    ref = reference.alibi_slopes(NH)
    assert_close(fastseq.alibi_slopes(NH, np.float64), ref)
    assert_same_bits({"slopes": fastseq.alibi_slopes(NH)}, {"slopes": ref.astype(np.float32)})
    if NH == 8:
        assert ref.tolist() == [2.0**-n for n in range(1, 9)]


@pytest.mark.parametrize("NH", [0, -3])
def test_alibi_errors(NH):
    message = f"alibi_slopes: NH must be >= 1, got {NH}"
    assert_refused(lambda: fastseq.alibi_slopes(NH), ValueError, message)


def test_alibi_slopes_are_what_attention_takes(rng):
    q, k, v = (rng.standard_normal((1, 6, n, 4)) for n in (3, 5, 5))
    slopes = fastseq.alibi_slopes(6, np.float64)
    bias = -slopes[:, None, None] * np.abs(np.arange(5) - np.arange(3)[:, None])
    ref, _ = attention(q, k, v, bias=bias)
    assert_close(fastseq.attention(q, k, v, alibi_slopes=slopes), ref)
