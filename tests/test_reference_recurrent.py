"""The reference of the recurrent scans: against torch, finite differences, and its own contract."""

from itertools import product

import numpy as np
import pytest
from finite_differences import assert_gradients_are_those_of
from problems import CELLS, Problem, cast, forward, problems, solve_reference, solve_torch
from tolerance import assert_all_close, assert_close

from fastseq.reference import recurrent as reference

BOOL = (False, True)
SCANS = [
    Problem(cell, B=5, ragged=ragged, resets=resets, reverse=reverse)
    for cell, ragged, resets, reverse in product(CELLS, BOOL, BOOL, BOOL)
]
ARGUMENTS = [
    Problem(cell, bias=bias, initial=initial) for cell, bias, initial in product(CELLS, BOOL, BOOL)
]
PROJECTIONS = [
    Problem("lstm", B=5, P=3, ragged=ragged, resets=ragged, reverse=reverse, bias=reverse)
    for ragged, reverse in product(BOOL, BOOL)
]
CLIPPED = [
    Problem(cell, B=5, ragged=masks, resets=masks, reverse=reverse, clip=0.3)
    for cell, masks, reverse in product(CELLS, BOOL, BOOL)
]
CLIPPED += [Problem("lstm", B=5, P=3, ragged=True, resets=True, clip=0.3)]
EDGES = [
    *(Problem(cell, T=1, B=1, I=1, H=1) for cell in CELLS),
    Problem("gru", T=13, B=1, I=2, H=17),
    Problem("gru", T=2, B=11, I=1, H=3, ragged=True),
    Problem("lstm", T=3, B=2, I=7, H=16, P=1),
    Problem("lstm", T=64, B=2, I=3, H=8),
]
ALL_OPTIONS = {"B": 5, "ragged": True, "resets": True, "reverse": True}


def assert_identical(ours, expected):
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


# Against torch


@pytest.mark.parametrize("problem", SCANS + ARGUMENTS + PROJECTIONS + CLIPPED + EDGES, ids=str)
def test_matches_torch(problem):
    ours, judge = solve_reference(problem), solve_torch(problem)
    assert_all_close(ours.outputs, judge.outputs)
    assert_all_close(ours.grads, judge.grads, grad=True)


@problems(**ALL_OPTIONS, dtype="float32")
def test_float32_matches_float64_as_torch_does(problem):
    ours, ref = solve_reference(problem, "float32"), solve_reference(problem)
    peer = solve_torch(problem)
    assert_all_close(ours.outputs, ref.outputs, peer.outputs)
    assert_all_close(ours.grads, ref.grads, peer.grads, grad=True)


@problems(cells=("gru", "lstm"))
def test_matches_bidirectional_torch_module_on_packed_rows(problem):
    """The module's parameters set by name; rows of unsorted lengths; the two states stacked."""
    torch = pytest.importorskip("torch")
    lengths = np.array([3, 7, 1])
    backwards = Problem(problem.cell, reverse=True).having(inputs={"x": problem.inputs["x"]})
    directions = {"": problem, "_reverse": backwards}
    kind = getattr(torch.nn, problem.cell.upper())
    module = kind(problem.I, problem.H, bidirectional=True, dtype=torch.float64)
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    module.load_state_dict(
        {
            f"{name}_l0{suffix}": torch.tensor(direction.inputs[key])
            for suffix, direction in directions.items()
            for name, key in names.items()
        }
    )
    x = torch.nn.utils.rnn.pack_padded_sequence(
        torch.tensor(problem.inputs["x"]), torch.tensor(lengths), enforce_sorted=False
    )
    states = [
        torch.tensor(np.stack([d.inputs[name] for d in directions.values()]))
        for name in ("h0", "c0")
        if name in problem.inputs
    ]
    with torch.no_grad():
        packed, finals = module(x, states if len(states) == 2 else states[0])
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    ours = [forward(reference, d.having(options={"lengths": lengths})) for d in directions.values()]
    assert_close(np.concatenate([o["y"] for o in ours], axis=-1), y, name="y")
    finals = finals if isinstance(finals, tuple) else (finals,)
    for name, final in zip(("h_n", "c_n"), finals, strict=False):
        assert_close(np.stack([o[name] for o in ours]), final, name=name)


@problems()
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_inf_come_out_where_torch_has_them(problem, value):
    """Put into one row, then cleared there by a reset; the other rows never see it."""
    x, resets = problem.inputs["x"].copy(), np.zeros((problem.T, problem.B), bool)
    x[2, 1, 0] = value
    resets[4, 1] = True
    problem = problem.having(inputs={"x": x}, options={"resets": resets})
    ours, judge = solve_reference(problem), solve_torch(problem)
    assert_all_close(ours.outputs, judge.outputs)
    assert_all_close(ours.grads, judge.grads, grad=True)
    assert np.isfinite(ours.outputs["y"][4:, 1]).all()


# The gradients against finite differences of the same reference


@pytest.mark.parametrize(
    "problem",
    [Problem(cell, **ALL_OPTIONS) for cell in CELLS] + [Problem("lstm", P=3, **ALL_OPTIONS)],
    ids=str,
)
def test_gradients_are_those_of_the_forward(problem, rng):
    grads = solve_reference(problem, "longdouble").grads
    inputs = cast(problem.inputs, "longdouble")
    cotangents = cast(problem.cotangents, "longdouble")

    def loss(**inputs):
        outputs = forward(reference, problem.having(inputs=inputs))
        return sum((cotangents[f"d{name}"] * a).sum() for name, a in outputs.items())

    assert_gradients_are_those_of(loss, inputs, grads, rng)


# The contract of the scan: rows, pieces and steps of it, each by itself


def part(problem, steps, row=slice(None), states=None):
    """The outputs of a scan over some steps of some rows, from zero states unless given."""
    states = states or {k: np.zeros_like(a[row]) for k, a in initial_states(problem).items()}
    inputs = {"x": problem.inputs["x"][steps, row]} | states
    plain = {"lengths": None, "resets": None}
    return forward(reference, problem.having(inputs=inputs, options=plain))


def initial_states(problem, row=slice(None)):
    return {k: problem.inputs[k][row] for k in ("h0", "c0") if k in problem.inputs}


def carried(outputs):
    """The final states as initial states: h_n -> h0, c_n -> c0."""
    return {f"{k[0]}0": outputs[k] for k in ("h_n", "c_n") if k in outputs}


def per_step(arrays, steps):
    """Those of the arrays that have a step axis, cut to some steps."""
    return {k: a[steps] for k, a in arrays.items() if k in ("x", "resets", "dy", "dc")}


@pytest.mark.parametrize("reverse", BOOL, ids=["forward", "reverse"])
@problems(B=6, ragged=True)
def test_lengths_are_rows_scanned_alone(problem, reverse):
    problem = problem.having(options={"reverse": reverse})
    outputs, lengths = forward(reference, problem), problem.options["lengths"]
    assert {0, 1, problem.T} <= set(lengths) and list(lengths) != sorted(lengths, reverse=True)
    for b, length in enumerate(lengths):
        row = slice(b, b + 1)
        alone = part(problem, slice(length), row, initial_states(problem, row))
        for name in ("h_n", "c_n") & outputs.keys():
            assert_close(outputs[name][row], alone[name], name=name)
        for name in ("y", "c") & outputs.keys():
            assert_close(outputs[name][:length, row], alone[name], name=name)
            assert not outputs[name][length:, row].any()


@problems(**ALL_OPTIONS)
def test_padding_is_not_read(problem):
    past = np.arange(problem.T)[:, None, None] >= problem.options["lengths"][:, None]

    def poison(arrays):
        return {k: np.where(past, np.nan, a) for k, a in arrays.items() if k in ("x", "dy", "dc")}

    clean = solve_reference(problem)
    poisoned = solve_reference(
        problem.having(inputs=poison(problem.inputs), cotangents=poison(problem.cotangents))
    )
    assert_identical(poisoned.outputs, clean.outputs)
    assert_identical(poisoned.grads, clean.grads)
    assert not clean.grads["x"][past[..., 0]].any()


@pytest.mark.parametrize("reverse", BOOL, ids=["forward", "reverse"])
@problems(B=2)
def test_a_reset_starts_the_row_from_zero(problem, reverse):
    """Row 0 is reset at steps 2 and 3, row 1 at the scan's first step."""
    resets = np.zeros((problem.T, 2), bool)
    first = problem.T - 1 if reverse else 0
    resets[[2, 3], 0] = resets[first, 1] = True
    problem = problem.having(options={"reverse": reverse, "resets": resets})
    outputs = forward(reference, problem)

    cuts = (
        (slice(4, 7), slice(3, 4), slice(0, 3))
        if reverse
        else (slice(0, 2), slice(2, 3), slice(3, 7))
    )
    row = slice(0, 1)
    for states, steps in zip((initial_states(problem, row), None, None), cuts, strict=True):
        alone = part(problem, steps, row, states)
        assert_close(outputs["y"][steps, row], alone["y"], name="y")
    assert_close(outputs["h_n"][row], alone["h_n"], name="h_n")

    assert_close(outputs["y"][:, 1:], part(problem, slice(None), slice(1, 2))["y"], name="y")
    grads = solve_reference(problem).grads
    for name in initial_states(problem):
        assert grads[name][0].any() and not grads[name][1].any()


@problems(ragged=True, resets=True)
def test_reverse_is_the_scan_of_each_row_flipped(problem):
    lengths = problem.options["lengths"]
    order = np.tile(np.arange(problem.T)[:, None], problem.B)
    order = np.where(order < lengths, lengths - 1 - order, order)

    def flip(arrays):
        arrays = {k: a for k, a in arrays.items() if k in ("x", "y", "c", "dy", "dc", "resets")}
        return {k: a[order, np.arange(problem.B)] for k, a in arrays.items()}

    flipped = solve_reference(
        problem.having(
            inputs=flip(problem.inputs),
            options=flip(problem.options) | {"reverse": True},
            cotangents=flip(problem.cotangents),
        )
    )
    plain = solve_reference(problem)
    assert_all_close(flipped.outputs | flip(flipped.outputs), plain.outputs)
    assert_all_close(flipped.grads | flip(flipped.grads), plain.grads, grad=True)


@pytest.mark.parametrize("reverse", BOOL, ids=["forward", "reverse"])
@problems(resets=True)
def test_time_split_carries_the_state_and_its_gradient(problem, reverse):
    problem = problem.having(options={"reverse": reverse})
    whole = solve_reference(problem)
    early, late = (slice(4, 7), slice(0, 4)) if reverse else (slice(0, 3), slice(3, 7))

    def chunk(steps, states, state_grads):
        return solve_reference(
            problem.having(
                inputs=per_step(problem.inputs, steps) | states,
                options=per_step(problem.options, steps),
                cotangents=per_step(problem.cotangents, steps) | state_grads,
            )
        )

    states = carried(chunk(early, {}, {}).outputs)
    second = chunk(late, states, {})
    first = chunk(early, {}, {f"d{k[0]}_n": second.grads[k] for k in states})
    for name in ("h_n", "c_n") & whole.outputs.keys():
        assert_close(second.outputs[name], whole.outputs[name], name=name)
    for name in ("y", "c") & whole.outputs.keys():
        for steps, part_ in ((early, first), (late, second)):
            assert_close(part_.outputs[name], whole.outputs[name][steps], name=name)
    for name in set(whole.grads) - {"x"}:
        total = first.grads[name] + (0 if name in states else second.grads[name])
        assert_close(total, whole.grads[name], grad=True, name=f"d{name}")
    for steps, part_ in ((early, first), (late, second)):
        assert_close(part_.grads["x"], whole.grads["x"][steps], grad=True, name="dx")


@problems(T=3, bias=False)
def test_cells_are_the_steps_of_the_scan(problem):
    a, outputs = problem.inputs, forward(reference, problem)
    cell = getattr(reference, f"{problem.function}_cell")
    activation = {k: v for k, v in problem.options.items() if k == "nonlinearity"}
    state = list(initial_states(problem).values())
    for x, y in zip(a["x"], outputs["y"], strict=True):
        state = cell(x, *state, a["w_ih"], a["w_hh"], **activation)
        state = state if isinstance(state, tuple) else (state,)
        assert_close(state[0], y)
    for ours, name in zip(state, ("h_n", "c_n"), strict=False):
        assert_close(ours, outputs[name], name=name)


# Edges


@pytest.mark.parametrize("size", [{"T": 0}, {"B": 0}, {"I": 0}], ids=["T0", "B0", "I0"])
@pytest.mark.parametrize("cell", CELLS)
def test_empty_sizes_have_a_result(cell, size):
    problem = Problem(cell, **({"T": 7, "B": 3, "I": 5} | size))
    result = solve_reference(problem)
    assert result.outputs["y"].shape == (problem.T, problem.B, problem.H)
    for name, a in problem.inputs.items():
        assert result.grads[name].shape == a.shape
    if problem.T == 0:
        assert_identical(carried(result.outputs), initial_states(problem))
        assert_identical(result.grads, {"h0": problem.cotangents["dh_n"]})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble"])
@problems(**ALL_OPTIONS)
def test_computes_in_the_dtype_of_x(problem, dtype):
    result = solve_reference(problem, dtype)
    for a in (*result.outputs.values(), *result.grads.values()):
        assert a.dtype == dtype


def test_sigmoid_is_accurate_far_out():
    a = np.array([-700.0, -40.0, 0.0, 40.0, 700.0, -np.inf, np.inf, np.nan])
    expected = [np.exp(-700.0), np.exp(-40.0), 0.5, 1.0, 1.0, 0.0, 1.0, np.nan]
    np.testing.assert_allclose(reference.sigmoid(a), expected, rtol=4e-16, atol=0)
