"""The recurrent kernels through the NumPy API, held against the float64 reference.

The promises about bits stand in test_recurrent_bits.py, stacked layers in test_recurrent_stack.py.
"""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from problems import CELLS, Problem, forward, problems, solve_reference
from running import assert_same_bits, judge, solve, vjp
from tolerance import assert_all_close

import fastseq
from fastseq import _dispatch

BOOL = (False, True)
DTYPES = ("float32", "float64")
LANES = {
    dtype: _dispatch.kernels("recurrent", np.dtype(dtype)).description()[0] for dtype in DTYPES
}

ARGUMENTS = [
    Problem(cell, H=19, dtype=dtype, bias=bias, initial=initial)
    for cell, dtype, bias, initial in product(CELLS, DTYPES, BOOL, BOOL)
]
SCANS = [
    Problem(cell, B=11, H=19, dtype=dtype, ragged=ragged, resets=resets, reverse=reverse)
    for cell, dtype, ragged, resets, reverse in product(CELLS, DTYPES, BOOL, BOOL, BOOL)
]
CLIPPED = [
    Problem(cell, B=11, H=19, dtype=dtype, ragged=masks, resets=masks, reverse=reverse, clip=0.3)
    for cell, dtype, masks, reverse in product(CELLS, DTYPES, BOOL, BOOL)
]
# Sums longer than any block of k and than a block of rows (t, b), where one chain of additions
# would lose more than torch does; more rows than are projected at once.
LARGE = [
    Problem(cell, *size, dtype=dtype, ragged=dtype == "float64")
    for cell, size, dtype in product(CELLS, [(13, 23, 521, 131), (3, 7, 2050, 19)], DTYPES)
]
LARGE += [Problem(cell, T=100, B=64, I=3, H=17, dtype="float32") for cell in CELLS]


def edges():
    """Sizes of one, primes, and H about the lane count, a panel (up to 4 vectors), several panels.

    float32 keeps a few rows: over one or two elements torch's own error, the room, may be nil.
    """
    for cell, dtype in product(CELLS, DTYPES):
        lanes = LANES[dtype]
        for hidden in (lanes - 1, lanes, lanes + 1, 4 * lanes - 1, 4 * lanes, 4 * lanes + 1):
            yield Problem(cell, T=3, B=7, H=hidden, dtype=dtype)
        yield Problem(cell, T=3, B=7, H=9 * lanes + 5, dtype=dtype)
        yield Problem(cell, T=1, B=7, dtype=dtype)
        yield Problem(cell, T=7, B=7, I=1, H=1, dtype=dtype)
        yield Problem(cell, T=13, B=1, I=11, H=29, dtype=dtype)
        yield Problem(cell, T=5, B=2, I=lanes + 1, H=3, dtype=dtype)
    for cell in CELLS:
        yield Problem(cell, T=1, B=1, I=1, H=1)
        yield Problem(cell, T=4, I=0)


def names_of(arrays):
    """(cell, name) for all of a problem's inputs or cotangents."""
    return [(cell, name) for cell in CELLS for name in getattr(Problem(cell), arrays)]


def assert_solved(problem):
    ours, (ref, peer) = solve(problem), judge(problem)
    assert_all_close(ours.outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)


# Error of the outputs, and of the gradient of every input


@cache
def judge_once(problem):
    """For problems as they are drawn: one changed by `having` would be taken for its original."""
    return judge(problem)


@pytest.mark.parametrize("problem", ARGUMENTS + SCANS + LARGE, ids=str)
def test_forward_error(problem):
    ref, peer = judge_once(problem)
    assert_all_close(forward(fastseq, problem), ref.outputs, peer and peer.outputs)


@pytest.mark.parametrize("problem", ARGUMENTS + SCANS + CLIPPED + LARGE, ids=str)
def test_gradient_error(problem):
    ours, (ref, peer) = solve(problem), judge_once(problem)
    assert ours.grads.keys() == problem.inputs.keys()
    assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)
    assert_same_bits(problem.inputs, replace(problem).inputs)  # drawn anew: nothing wrote to them


@pytest.mark.parametrize(("cell", "given"), names_of("cotangents"))
def test_each_cotangent_alone(cell, given):
    """The others None, which means zeros."""
    problem = Problem(cell, H=19, ragged=True, resets=True)
    _, pullback = vjp(problem)
    alone = {k: a if k == given else np.zeros_like(a) for k, a in problem.cotangents.items()}
    ref = solve_reference(problem.having(cotangents=alone))
    assert_all_close(pullback({given: problem.cotangents[given]}), ref.grads, grad=True)


@problems()
def test_pullback_may_be_called_again(problem):
    _, pullback = vjp(problem)
    first = pullback(problem.cotangents)
    pullback({k: -a for k, a in problem.cotangents.items()})
    assert_same_bits(pullback(problem.cotangents), first)


@pytest.mark.parametrize("given", ["h0", "c0"])
@problems(cells=["lstm"], initial=False, H=19)
def test_one_initial_state_alone(problem, given):
    state = {given: Problem("lstm", H=19).inputs[given]}
    inputs = {k: a for k, a in problem.inputs.items() if k not in ("h0", "c0")} | state
    problem = replace(problem)
    problem.__dict__["inputs"] = inputs
    assert_solved(problem)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(cell, T=4, B=4, I=2, H=3, ragged=ragged, resets=ragged, reverse=reverse)
        for cell, ragged, reverse in product(CELLS, BOOL, BOOL)
    ],
    ids=str,
)
def test_gradcheck(problem):
    """Finite differences of the kernels themselves, for every input and output, all options on."""
    torch = pytest.importorskip("torch")
    names = list(problem.inputs)

    class Kernels(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            inputs = {k: a.detach().numpy() for k, a in zip(names, leaves, strict=True)}
            outputs, ctx.pullback = vjp(problem.having(inputs=inputs))
            ctx.names = [f"d{name}" for name in outputs]
            return tuple(torch.from_numpy(a) for a in outputs.values())

        @staticmethod
        def backward(ctx, *cotangents):
            arrays = zip(ctx.names, cotangents, strict=True)
            grads = ctx.pullback({k: a.numpy() for k, a in arrays})
            return tuple(torch.from_numpy(grads[k]) for k in names)

    leaves = [torch.tensor(a, requires_grad=True) for a in problem.inputs.values()]
    assert torch.autograd.gradcheck(Kernels.apply, leaves, fast_mode=False)


def limited(problem, limit):
    return problem.having(options={"clip_recurrent_grad": limit})


@problems(H=19)
def test_clip_changes_no_output_and_an_infinite_one_nothing(problem):
    free, clipped = solve(problem), solve(limited(problem, 0.1))
    assert_same_bits(clipped.outputs, free.outputs)
    assert_same_bits(forward(fastseq, limited(problem, 0.1)), free.outputs)
    assert_same_bits(solve(limited(problem, np.inf)).grads, free.grads)
    assert_solved(limited(problem, 1e9))  # by the other path, which limits nothing


@pytest.mark.parametrize("limit", [1, 0.1, np.float32(0.1)], ids=repr)
@problems(H=19)
def test_clip_bounds_what_reaches_the_initial_states(problem, limit):
    grads = solve(limited(problem, limit)).grads
    assert max(np.abs(grads[k]).max() for k in ("h0", "c0") if k in grads) <= limit
    assert_solved(limited(problem, limit))


@problems(T=1, H=19)
def test_clip_leaves_what_comes_from_outside(problem):
    """Into a single step nothing flows from one after it."""
    free, clipped = solve(problem), solve(limited(problem, 1e-3))
    weights = [k for k in free.grads if k not in ("h0", "c0")]
    assert_same_bits(*({k: r.grads[k] for k in weights} for r in (clipped, free)))
    assert np.abs(free.grads["h0"]).max() > 1e-3 >= np.abs(clipped.grads["h0"]).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_clip_keeps_nan_and_limits_infinity(cell, value):
    problem = Problem(cell, B=5, H=19, clip=0.3)
    dy = problem.cotangents["dy"].copy()
    dy[4, 1, 3] = value
    assert_solved(problem.having(cotangents={"dy": dy}))


# Edges


@pytest.mark.parametrize("problem", [*edges()], ids=str)
def test_edge_shapes(problem):
    assert_solved(problem)


@pytest.mark.parametrize("lengths", [None, np.zeros(0, int)], ids=["full", "lengths"])
@problems(B=0, H=19)
def test_no_rows(problem, lengths):
    """Results of the right shape, and weight gradients of zero."""
    problem = problem.having(options={"lengths": lengths})
    ours, ref = solve(problem), solve_reference(problem)
    assert_all_close(ours.outputs, ref.outputs)
    assert_all_close(ours.grads, ref.grads, grad=True)
    assert not ours.grads["w_hh"].any() and ours.grads["w_hh"].size


@pytest.mark.parametrize(
    "lengths", [[0] * 4, [1] * 4, [7] * 4, [0, 7, 1, 5], [2, 2, 6, 0]], ids=str
)
@pytest.mark.parametrize("reverse", BOOL, ids=["forward", "reverse"])
@problems(B=4, H=19)
def test_lengths(problem, reverse, lengths):
    problem = problem.having(
        options={"reverse": reverse, "lengths": np.array([*map(int, lengths)])}
    )
    assert_solved(problem)
    outputs = forward(fastseq, problem)
    for b, length in enumerate(problem.options["lengths"]):
        assert not outputs["y"][length:, b].any()
        if length == 0:
            for k in ("h_n", "c_n") & outputs.keys():
                np.testing.assert_array_equal(outputs[k][b], problem.inputs[f"{k[0]}0"][b])


@problems(B=5, H=19, ragged=True, resets=True)
def test_padding_is_not_read(problem):
    past = np.arange(problem.T)[:, None, None] >= problem.options["lengths"][:, None]

    def poison(arrays):
        return {k: np.where(past, np.nan, a) for k, a in arrays.items() if k in ("x", "dy", "dc")}

    poisoned = solve(
        problem.having(inputs=poison(problem.inputs), cotangents=poison(problem.cotangents))
    )
    clean = solve(problem)
    assert_same_bits(poisoned.outputs, clean.outputs)
    assert_same_bits(poisoned.grads, clean.grads)


# Values that are not finite, or huge


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("masks", BOOL, ids=["plain", "masks"])
@pytest.mark.parametrize(("cell", "name"), names_of("inputs"))
def test_nan_and_inf_come_out_where_the_reference_has_them(cell, name, masks, value):
    problem = Problem(cell, B=5, ragged=masks, resets=masks)
    a = problem.inputs[name].copy()
    a.flat[a.size // 3] = value
    assert_solved(problem.having(inputs={name: a}))


@pytest.mark.parametrize("scale", [1e4, -1e4], ids=["1e4", "-1e4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_huge_inputs_stay_finite(cell, dtype, scale):
    problem = Problem(cell, B=5, H=19, dtype=dtype)
    problem = problem.having(inputs={"x": problem.inputs["x"] * np.dtype(dtype).type(scale)})
    ours, ref = solve(problem), solve_reference(problem)
    for name, a in (ours.outputs | ours.grads).items():
        assert np.isfinite(a).all(), name
    if cell in ("rnn_tanh", "gru"):  # what saturates is known without rounding
        saturated = np.abs(ref.outputs["y"]) == 1
        assert saturated.any()
        np.testing.assert_array_equal(ours.outputs["y"][saturated], ref.outputs["y"][saturated])
