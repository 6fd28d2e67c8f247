"""Gradients clipped by their norm and by their values, over NumPy arrays."""

import numpy as np
import pytest
from running import assert_refused, assert_same_bits_in_order
from tolerance import assert_close

import fastseq
from fastseq import _dispatch
from fastseq.reference import training as reference

BLOCK = 1 << 16  # of the clipping kernel
SIZES = [(), (0,), (1,), (3, 5), (64, 64), (BLOCK - 1,), (BLOCK,), (2, BLOCK + 1), (0, 4)]
NORMS = [1.0, 2.0, 3.0, 0.5, np.inf]
LAYOUTS = {
    "c": lambda a: a,
    "fortran": np.asfortranarray,
    "every_other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
    "backwards": lambda a: a[..., ::-1] if a.ndim else a,
    "with_gaps": lambda a: np.repeat(a[..., None], 3, axis=-1)[..., 1],
    "misaligned": lambda a: misaligned(a),
}


def misaligned(a):
    """Shifted by one byte in memory."""
    memory = np.zeros(a.nbytes + 1, np.uint8)
    shifted = memory[1:].view(a.dtype).reshape(a.shape)
    shifted[...] = a
    return shifted


def many_threads(monkeypatch, n):
    """However little there is to do. Returns the kernels' module."""
    kernel = pytest.importorskip("fastseq.kernels.numba.clip")
    monkeypatch.setattr(kernel, "SMALL", 0)
    monkeypatch.setattr(_dispatch._Threads, "forced", n)
    return kernel


def drawn(rng, dtype="float32", sizes=SIZES, scale=1.0):
    return [np.array(scale * rng.standard_normal(s), dtype) for s in sizes]


def wide(arrays):
    return [a.astype(np.float64) for a in arrays]


def torch_clipped(arrays, max_norm, norm_type):
    """norm and gradients as torch has them, in the arrays' own dtype."""
    torch = pytest.importorskip("torch")
    parameters = [torch.nn.Parameter(torch.tensor(a.copy())) for a in arrays]
    for p, a in zip(parameters, arrays, strict=True):
        p.grad = torch.tensor(a.copy())
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
    return norm, [p.grad for p in parameters]


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("max_norm", [0.7, 0.0])
def test_reference_is_torch(p, max_norm, rng):
    arrays = drawn(rng, "float64", [(3, 5), (1,), (7,)])
    norm, clipped = reference.clip_grad_norm(arrays, max_norm, p)
    torch_norm, torch_arrays = torch_clipped(arrays, max_norm, p)
    assert_close(np.array(norm), torch_norm)
    for a, t in zip(clipped, torch_arrays, strict=True):
        assert_close(a, t)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clipped_by_norm(dtype, p, layout, rng):
    arrays = [LAYOUTS[layout](a) for a in drawn(rng, dtype)]
    ref_norm, ref = reference.clip_grad_norm(wide(arrays), 1.5, p)
    peer_norm, peer = torch_clipped([a for a in arrays if a.size], 1.5, p)
    norm = fastseq.clip_grad_norm_(arrays, 1.5, p)
    assert_close(np.array(norm, dtype), np.array(ref_norm), peer_norm)
    for a, r in zip(arrays, ref, strict=True):
        if a.size:
            assert_close(a, r, peer.pop(0), grad=True)
    assert isinstance(norm, float)


def test_mixed_dtypes_are_clipped_together(rng):
    arrays = [a for dtype in ("float32", "float64") for a in drawn(rng, dtype)]
    ref_norm, ref = reference.clip_grad_norm(wide(arrays), 2.0)
    _, peer = torch_clipped(arrays, 2.0, 2.0)
    norm = fastseq.clip_grad_norm_(arrays, 2.0)
    assert_close(np.array(norm), np.array(ref_norm))
    for a, r, t in zip(arrays, ref, peer, strict=True):
        if a.dtype == np.float64:
            assert_close(a, r)
        elif a.size:
            assert_close(a, r, t, grad=True)


def test_nothing_to_clip_changes_no_bit_and_writes_nothing(rng):
    arrays = drawn(rng)
    before = [a.copy() for a in arrays]
    for _ in range(2):
        norm = fastseq.clip_grad_norm_(arrays, 1e9)
    assert_same_bits_in_order(arrays, before)
    assert fastseq.clip_grad_norm_(arrays, np.inf) == norm
    assert_same_bits_in_order(arrays, before)


def test_empty_and_none():
    assert fastseq.clip_grad_norm_([], 1.0) == 0
    assert fastseq.clip_grad_norm_([None, np.zeros((0, 3), np.float32)], 1.0) == 0
    assert fastseq.clip_grad_norm_(iter([None]), 1.0, np.inf, True) == 0
    a = np.array([3.0, 4.0])
    assert fastseq.clip_grad_norm_((None, a), 1.0) == 5
    assert_close(a, np.array([0.6, 0.8]) * 5 / (5 + 1e-6))
    assert fastseq.clip_grad_norm_(np.ones((2, 2)), 9.0) == 2  # one array
    zeros = np.zeros(5)
    assert fastseq.clip_grad_norm_([zeros], 0.0) == 0
    assert_same_bits_in_order([zeros], [np.zeros(5)])


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, np.inf])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("at", [0, 31, BLOCK + 7])
def test_norms_that_are_not_finite(at, dtype, bad, p, rng):
    """Reported, refused on request with nothing changed, and else as torch has it."""
    arrays = drawn(rng, dtype, [(4,), (BLOCK + 9,)])
    arrays[1][at] = bad
    before = [a.copy() for a in arrays]
    message = f"clip_grad_norm_: the norm of order {p:g} must be finite, got {abs(bad)}"
    assert_refused(lambda: fastseq.clip_grad_norm_(arrays, 1.0, p, True), RuntimeError, message)
    assert_same_bits_in_order(arrays, before)
    peer_norm, peer = torch_clipped(arrays, 1.0, p)
    norm = fastseq.clip_grad_norm_(arrays, 1.0, p)
    np.testing.assert_array_equal(norm, peer_norm.item())
    for a, t in zip(arrays, peer, strict=True):
        np.testing.assert_array_equal(a, t.numpy())


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_squares_may_leave_the_range_of_float32(size):
    a = np.full(4, size, np.float32)
    expected = 2 * a[0]
    assert fastseq.clip_grad_norm_([a], 1.0) == expected
    assert (a == (np.float32(0.5) if size > 1 else np.float32(size))).all()


def test_an_array_is_scaled_as_often_as_it_is_given(monkeypatch):
    """By one thread: two would do it at the same time."""
    kernel, threads = many_threads(monkeypatch, 2), []
    native_run = kernel.native.run

    def run(function, job, n):
        threads.append(n)
        native_run(function, job, n)

    monkeypatch.setattr(kernel.native, "run", run)
    a, b = np.ones(BLOCK), np.ones(BLOCK)
    c = 512 / (1024 + 1e-6)
    for arrays, powers, expected in (([a, b] * 8, 8, [2, 1]), ([np.ones(16 * BLOCK)], 1, [2, 2])):
        assert fastseq.clip_grad_norm_(arrays, 512.0) == 1024
        scaled = np.prod(np.full(powers, c))
        for array in arrays:
            assert_close(array, np.full_like(array, scaled))
        assert threads == expected
        threads.clear()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_agree_bitwise(dtype, p, monkeypatch, rng):
    made = drawn(rng, dtype, [*SIZES, (5 * BLOCK + 3,)])
    results = []
    for threads in (1, 2, 3, 7):
        many_threads(monkeypatch, threads)
        arrays = [a.copy() for a in made]
        results.append([*arrays, np.array(fastseq.clip_grad_norm_(arrays, 0.3, p))])
        fastseq.clip_grad_value_(arrays, 1e-4)
    for found in results[1:]:
        assert_same_bits_in_order(found, results[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_limited_by_value(layout, dtype, rng):
    arrays = [LAYOUTS[layout](a) for a in drawn(rng, dtype)]
    arrays[3][1, 2:] = np.nan, np.inf, -np.inf
    limit = float(np.float32(0.4))
    ref = reference.clip_grad_value(wide(arrays), limit)
    assert fastseq.clip_grad_value_([None, *arrays], limit) is None
    for a, r in zip(arrays, ref, strict=True):
        np.testing.assert_array_equal(a, r)
    fastseq.clip_grad_value_(arrays[4:5], 0.0)
    assert not arrays[4].any()


CLIP_ERRORS = [
    (([[1.0]], 1.0), TypeError, "arrays[0] must be a NumPy array, got list"),
    (([np.zeros(2), np.zeros(2, int)], 1.0), TypeError,
     "arrays[1] must be float32 or float64, got int64"),
    (([np.zeros(2, ">f4")], 1.0), TypeError, "arrays[0] must be float32 or float64, got >f4"),
    (([np.broadcast_to(np.zeros(1), 3)], 1.0), ValueError,
     "arrays[0] must be writeable, got a read-only array"),
    (([np.zeros(2)], -1.0), ValueError, "{0} must be >= 0, got -1.0"),
    (([np.zeros(2)], np.nan), ValueError, "{0} must be >= 0, got nan"),
    (([np.zeros(2)], None), TypeError, "{0} must be a number, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), [("norm", "max_norm"), ("value", "clip_value")])
@pytest.mark.parametrize(("given", "error", "message"), CLIP_ERRORS)
def test_clip_errors(given, error, message, name, argument):
    call = getattr(fastseq, f"clip_grad_{name}_")
    assert_refused(lambda: call(*given), error, f"clip_grad_{name}_: {message.format(argument)}")


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (0, ValueError, "norm_type must be > 0, got 0"),
        (-np.inf, ValueError, "norm_type must be > 0, got -inf"),
        (np.nan, ValueError, "norm_type must be > 0, got nan"),
        ("two", TypeError, "norm_type must be a number, got 'two'"),
    ],
)
def test_norm_type_errors(p, error, message):
    assert_refused(
        lambda: fastseq.clip_grad_norm_([], 1.0, p), error, f"clip_grad_norm_: {message}"
    )
