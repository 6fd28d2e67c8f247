"""Training aids over NumPy arrays: clipping, initial values, truncated backpropagation, flow."""

import re
import sys

import numpy as np
import pytest
from running import assert_same_bits
from tolerance import assert_all_close, assert_close

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


def same_bits(ours, expected):
    assert_same_bits(dict(enumerate(ours)), dict(enumerate(expected)))


def refused(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


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


# Clipping by norm


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
    same_bits(arrays, before)
    assert fastseq.clip_grad_norm_(arrays, np.inf) == norm
    same_bits(arrays, before)


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
    same_bits([zeros], [np.zeros(5)])


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
    refused(lambda: fastseq.clip_grad_norm_(arrays, 1.0, p, True), RuntimeError, message)
    same_bits(arrays, before)
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
        same_bits(found, results[0])


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
    refused(lambda: call(*given), error, f"clip_grad_{name}_: {message.format(argument)}")


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
    refused(lambda: fastseq.clip_grad_norm_([], 1.0, p), error, f"clip_grad_norm_: {message}")


# Initial values


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
    same_bits([*y, h_n], [h0] * 10)
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
    same_bits([w], [exact.astype(dtype)])
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
    same_bits([b_ih, b_hh], ref)
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
    refused(lambda: getattr(fastseq.init, name)(*given), error, f"{name}: {message}")


# Truncated backpropagation and gradient flow

T, B, I, H = 11, 3, 4, 5  # noqa: E741
CELLS = {"rnn": 1, "gru": 3, "lstm": 4}


def problem(cell, rng, dtype="float64", scale=0.4, bias=True):
    """x, weights, states, dy; by name where the functions name them."""
    G = CELLS[cell] * H

    def draw(*shape):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    weights = {"w_ih": draw(G, I), "w_hh": draw(G, H)}
    weights |= {"b_ih": draw(G), "b_hh": draw(G)} if bias else {}
    states = {"h0": draw(B, H)} | ({"c0": draw(B, H)} if cell == "lstm" else {})
    return draw(T, B, I), weights, states, rng.standard_normal((T, B, H)).astype(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
@pytest.mark.parametrize("cell", CELLS)
def test_truncated_gradients(cell, chunk, bias, rng):
    x, weights, states, dy = problem(cell, rng, bias=bias)
    sums = [np.zeros_like(w) for w in weights.values()]
    fn, t, ys, dxs = getattr(fastseq, cell), 0, [], []
    chunks = fastseq.tbptt(fn, x, **weights, **states, chunk=chunk, grads=sums)
    for y, last, pullback in chunks:
        state = last
        dx, *dws = pullback(dy[t : t + chunk])
        assert [d is not None for d in dws] == [True, True, bias, bias]
        t, ys, dxs = t + chunk, [*ys, y], [*dxs, dx]
    ref_y, ref_state, ref = reference.tbptt(cell, x, weights, states, dy, chunk)
    assert_close(np.concatenate(ys), ref_y)
    for s, r in zip(state if cell == "lstm" else (state,), ref_state, strict=True):
        assert_close(s, r)
    assert_all_close(dict(zip(weights, sums, strict=True)), ref, grad=True)
    assert np.concatenate(dxs).shape == x.shape
    whole = fn(x, **weights, **states)[0]
    same_bits([np.concatenate(ys)], [whole])


@pytest.mark.parametrize("cell", CELLS)
def test_truncated_with_lengths_and_resets(cell, rng):
    x, weights, states, _ = problem(cell, rng)
    options = {"lengths": np.array([11, 0, 6]), "resets": rng.random((T, B)) < 0.2}
    fn = getattr(fastseq, cell)
    chunks = fastseq.tbptt(fn, x, **weights, **states, chunk=4, **options)
    ys, last, _ = zip(*chunks, strict=True)
    y, state = fn(x, **weights, **states, **options)
    same_bits([np.concatenate(ys)], [y])
    same_bits(np.stack(last[-1]), np.stack(state))


def test_weights_may_change_between_chunks(rng):
    x, weights, _, _ = problem("rnn", rng)
    first, second = (
        {n: w.copy() for n, w in weights.items()},
        {n: w + 0.1 for n, w in weights.items()},
    )
    options = {"nonlinearity": "relu"}
    for k, (y, _, _) in enumerate(fastseq.tbptt(fastseq.rnn, x, **weights, chunk=6, **options)):
        if k == 0:
            y_1, h = fastseq.rnn(x[:6], **first, **options)
            same_bits([y], [y_1])
            for w in weights.values():
                w += 0.1
    same_bits([y], [fastseq.rnn(x[6:], **second, h0=h, **options)[0]])


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_flow_is_the_reference(cell, last_only, clip, rng):
    x, weights, states, dy = problem(cell, rng)
    given = None if last_only else dy
    if last_only:
        dy = np.zeros_like(dy)
        dy[-1] = 1
    clip = {"clip_recurrent_grad": clip}
    norms = fastseq.gradient_flow(getattr(fastseq, cell), x, **weights, **states, dy=given, **clip)
    assert_close(norms, reference.gradient_flow(cell, x, weights, states, dy, **clip))


def test_gradient_flow_vanishes_and_explodes():
    rng = np.random.default_rng(0)
    x = 0.01 * rng.standard_normal((40, 2, 4))
    w_ih, w_hh = 0.1 * rng.standard_normal((8, 4)), np.empty((8, 8))
    flows = {}
    for gain in (0.5, 1.0, 1.5):
        fastseq.init.orthogonal(w_hh, gain=gain, rng=1)
        given = (x, w_ih, w_hh)
        flows[gain] = fastseq.gradient_flow(fastseq.rnn, *given, nonlinearity="tanh")
    ratio = {gain: norms[0] / norms[-1] for gain, norms in flows.items()}
    assert ratio[0.5] < 1e-9 and ratio[1.5] > 1e3 and 0.5 < ratio[1.0] <= 1
    assert (np.diff(flows[0.5]) > 0).all()
    irnn = np.empty((8, 8))
    fastseq.init.identity(irnn)
    kept = fastseq.gradient_flow(fastseq.rnn, 0 * x + 1, np.abs(w_ih), irnn, nonlinearity="relu")
    np.testing.assert_array_equal(kept, np.full(40, np.sqrt(16)))


def test_gradient_flow_of_float32_is_float64(rng):
    x, weights, states, dy = problem("gru", rng, "float32")
    norms = fastseq.gradient_flow(fastseq.gru, x, **weights, **states, dy=dy)
    assert norms.dtype == np.float64 and norms.shape == (T,)


RNN = (np.zeros((2, 1, 3)), np.zeros((4, 3)), np.zeros((4, 4)))
LOOP_ERRORS = [
    ("tbptt", (max, *RNN), {"chunk": 1}, TypeError,
     "fn must be one of fastseq's rnn gru lstm, got <built-in function max>"),
    ("tbptt", (fastseq.rnn, *RNN), {"chunk": 0}, ValueError,
     "chunk must be an integer >= 1, got 0"),
    ("tbptt", (fastseq.rnn, *RNN), {"chunk": 1, "reverse": True}, ValueError,
     "reverse must be False: states go forward in time, got True"),
    ("tbptt", (fastseq.rnn, *RNN), {"chunk": 1, "c0": np.zeros((1, 4))}, TypeError,
     "c0 must be None for rnn, got ndarray"),
    ("tbptt", (fastseq.rnn, *RNN), {"chunk": 1, "grads": [np.zeros(3)]}, ValueError,
     "grads must be 2 or 4 arrays, as the weights, got 1"),
    ("tbptt", (fastseq.rnn, *RNN), {"chunk": 1, "grads": [None, np.zeros((4, 3))]}, ValueError,
     "grads[1] must be (G H, H) = (4, 4), got (4, 3)"),
    ("tbptt", (fastseq.rnn, RNN[0][0], *RNN[1:]), {"chunk": 1}, ValueError,
     "x must be (T, B, I), 3 axes, got shape (1, 3)"),
    ("gradient_flow", (fastseq.vjp, *RNN), {}, TypeError,
     re.sub(" at 0x.*", "", f"fn must be one of fastseq's rnn gru lstm, got {fastseq.vjp!r}")),
    ("gradient_flow", (fastseq.rnn, RNN[0][:0], *RNN[1:]), {}, ValueError,
     "x must have at least one step, got T = 0"),
    ("gradient_flow", (fastseq.rnn, *RNN), {"dy": np.zeros((2, 1, 3))}, ValueError,
     "dy must be (T, B, H) = (2, 1, 4), got (2, 1, 3)"),
    ("gradient_flow", (fastseq.gru, *RNN), {"nonlinearity": "relu"}, TypeError,
     "nonlinearity must be None for gru, got 'relu'"),
    ("gradient_flow", (fastseq.gru, *RNN), {"clip_recurrent_grad": -1}, ValueError,
     "clip_recurrent_grad must be > 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "options", "error", "message"), LOOP_ERRORS)
def test_loop_errors(name, given, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'{name}: {message}')}"):
        getattr(fastseq, name)(*given, **options)


# The plot


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    t = np.arange(30)
    curves = {
        "vanishing": 2.0 ** -t[::-1],
        "exploding": 2.0 ** t[::-1],
        "cut off": np.where(t < 9, 0, 1.0),
        "overflown": np.where(t < 5, np.inf, np.where(t < 7, np.nan, 1.0)),
    }
    for name, norms in (("one", curves["vanishing"]), ("all", curves), ("zeros", np.zeros(3))):
        path = tmp_path / f"{name}.png"
        fastseq.plot_gradient_flow(norms, path)
        assert path.stat().st_size > 5000


def test_plot_errors(monkeypatch, tmp_path):
    message = "plot_gradient_flow: norms must be (T,) with T >= 1, got (0,)"
    refused(
        lambda: fastseq.plot_gradient_flow(np.zeros(0), tmp_path / "x.png"), ValueError, message
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = "fastseq: plot_gradient_flow needs matplotlib: pip install matplotlib"
    refused(
        lambda: fastseq.plot_gradient_flow(np.ones(3), tmp_path / "x.png"), ImportError, message
    )
