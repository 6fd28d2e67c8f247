"""Training aids over NumPy arrays: truncated backpropagation, gradient flow, its plot.

Clipping stands in test_training_clip.py, initial values in test_training_init.py.
"""

import re
import sys

import numpy as np
import pytest
from running import assert_refused, assert_same_bits_in_order
from tolerance import assert_all_close, assert_close

import fastseq
from fastseq.reference import training as reference

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
    assert_same_bits_in_order([np.concatenate(ys)], [whole])


@pytest.mark.parametrize("cell", CELLS)
def test_truncated_with_lengths_and_resets(cell, rng):
    x, weights, states, _ = problem(cell, rng)
    options = {"lengths": np.array([11, 0, 6]), "resets": rng.random((T, B)) < 0.2}
    fn = getattr(fastseq, cell)
    chunks = fastseq.tbptt(fn, x, **weights, **states, chunk=4, **options)
    ys, last, _ = zip(*chunks, strict=True)
    y, state = fn(x, **weights, **states, **options)
    assert_same_bits_in_order([np.concatenate(ys)], [y])
    assert_same_bits_in_order(np.stack(last[-1]), np.stack(state))


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
            assert_same_bits_in_order([y], [y_1])
            for w in weights.values():
                w += 0.1
    assert_same_bits_in_order([y], [fastseq.rnn(x[6:], **second, h0=h, **options)[0]])


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
    assert_refused(
        lambda: fastseq.plot_gradient_flow(np.zeros(0), tmp_path / "x.png"), ValueError, message
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = "fastseq: plot_gradient_flow needs matplotlib: pip install matplotlib"
    assert_refused(
        lambda: fastseq.plot_gradient_flow(np.ones(3), tmp_path / "x.png"), ImportError, message
    )
