"""What the recurrent kernels promise to the bit: the same arithmetic is done whatever the chunks in
time, the threads, the batch, the memory's layout and former contents, and the path taken."""

from itertools import product

import numpy as np
import pytest
from problems import CELLS, Problem, forward, solve_reference
from running import LAYOUTS, PoisonedNumpy, assert_same_bits, moved, solve
from tolerance import assert_close

import fastseq
from fastseq import _dispatch, _stack

BOOL = (False, True)
DTYPES = ("float32", "float64")
MASKS = {"ragged": True, "resets": True}
CLIPPED = MASKS | {"clip": 0.3}
STATES = ("h0", "c0")


def cases(**fields):
    """Every cell and dtype."""
    found = [Problem(cell, dtype=dtype, **fields) for cell, dtype in product(CELLS, DTYPES)]
    return pytest.mark.parametrize("problem", found, ids=str)


def results(problem):
    """Outputs and gradients in one dict; `d` before the gradients."""
    solved = solve(problem)
    return solved.outputs | {f"d{name}": a for name, a in solved.grads.items()}


def of_row(arrays, b):
    """Row b, as a batch of one, of those that have a batch axis."""
    per_step, per_row = ("x", "resets", "y", "c"), ("lengths", "h0", "c0", "h_n", "c_n")
    row = slice(b, b + 1)
    found = {k: a[:, row] for k, a in arrays.items() if k.removeprefix("d") in per_step}
    return found | {k: a[row] for k, a in arrays.items() if k.removeprefix("d") in per_row}


# Time split


@pytest.mark.parametrize("masks", [{}, MASKS, CLIPPED], ids=["full", "masks", "clip"])
@pytest.mark.parametrize("reverse", BOOL, ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_time_split_carries_the_state_and_its_gradient(cell, dtype, reverse, masks):
    """Outputs to the bit; gradients, whose sums are cut, against the reference of the whole."""
    problem = Problem(cell, B=11, H=19, dtype=dtype, reverse=reverse, **masks)
    early, late = (slice(4, 7), slice(0, 4)) if reverse else (slice(0, 3), slice(3, 7))

    def chunk(steps, states, state_grads):
        time = ("x", "resets", "dy", "dc")
        options = {k: a[steps] for k, a in problem.options.items() if k in time}
        if "lengths" in problem.options:
            n = steps.stop - steps.start
            options["lengths"] = np.clip(problem.options["lengths"] - steps.start, 0, n)
        arrays = problem.inputs | problem.cotangents
        cut = {k: arrays[k][steps] for k in time if k in arrays}
        return solve(
            problem.having(
                inputs={"x": cut.pop("x")} | states, options=options, cotangents=cut | state_grads
            )
        )

    whole = forward(fastseq, problem)
    outputs = chunk(early, {}, {}).outputs
    states = {k: outputs[f"{k[0]}_n"] for k in STATES if k in problem.inputs}
    second = chunk(late, states, {})
    first = chunk(early, {}, {f"d{k[0]}_n": second.grads[k] for k in states})
    joined = {k: a for k, a in second.outputs.items() if k in ("h_n", "c_n")}
    for k in ("y", "c") & whole.keys():
        pieces = (first.outputs[k], second.outputs[k])
        joined[k] = np.concatenate(pieces[::-1] if reverse else pieces)
    assert_same_bits(joined, whole)
    if dtype == "float64":
        ref = solve_reference(problem).grads
        for k, a in first.grads.items():
            if k == "x":
                pieces = (a, second.grads[k])
                a = np.concatenate(pieces[::-1] if reverse else pieces)
            elif k not in STATES:
                a = a + second.grads[k]
            assert_close(a, ref[k], grad=True, name=f"d{k}")


# Threads

# By the rules of scan.pxi: slabs from 8 rows a thread where the weights fit L2, units where they do
# not or the rows are few, inline where the work is small; too few units for three threads: slabs.
REGIMES = {
    "slab": ({"T": 9, "B": 26, "H": 150}, 1 << 40),
    "slab-few-rows": ({"T": 20, "B": 9, "H": 70}, 1 << 40),
    "slab-one-panel": ({"T": 30, "B": 3, "H": 60}, 1 << 40),
    "slab-few-units": ({"T": 40, "B": 50, "H": 17}, 1),
    "units": ({"T": 9, "B": 26, "H": 150}, 1),
    "units-one-row": ({"T": 25, "B": 1, "H": 300}, 1 << 40),
    "inline": ({"T": 3, "B": 2, "H": 5}, 1),
}


@pytest.mark.parametrize(
    "masks", [{}, MASKS | {"reverse": True}, CLIPPED], ids=["full", "masks", "clip"]
)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_threads_agree(cell, dtype, regime, masks, monkeypatch):
    """Outputs and all gradients; 3 threads on fewer cores wait for each other at every barrier."""
    fields, l2_bytes = REGIMES[regime]
    problem = Problem(cell, dtype=dtype, **fields, **masks)
    monkeypatch.setattr(_dispatch, "l2_bytes", lambda: l2_bytes)
    monkeypatch.setattr(_dispatch._Threads, "forced", 1)
    alone = results(problem)
    for threads in (2, 3):
        monkeypatch.setattr(_dispatch._Threads, "forced", threads)
        assert_same_bits(results(problem), alone)


# Batch neighbours


@pytest.mark.parametrize("masks", [{}, MASKS, CLIPPED], ids=["full", "masks", "clip"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_batch_neighbours_do_not_matter(cell, dtype, masks):
    """A row alone, where every tile has one row, and among 12 others: outputs, dx, dh0, dc0."""
    problem = Problem(cell, T=23, B=13, I=9, H=33, dtype=dtype, **masks)
    together = results(problem)
    for b in range(problem.B):
        alone = problem.having(
            inputs=of_row(problem.inputs, b),
            options=of_row(problem.options, b),
            cotangents=of_row(problem.cotangents, b),
        )
        expected = of_row(together, b)
        found = {k: a for k, a in results(alone).items() if k in expected}
        assert_same_bits(found, expected)
        assert {"y", "h_n", "dx", "dh0"} <= expected.keys()


@cases(B=5, H=19, **MASKS)
def test_a_neighbour_of_nan_does_not_matter(problem):
    x = problem.inputs["x"].copy()
    x[:, 1] = np.nan
    clean, poisoned = results(problem), results(problem.having(inputs={"x": x}))
    assert np.isnan(poisoned["y"][:, 1]).any()
    for b in (0, 2, 3, 4):
        assert_same_bits(of_row(poisoned, b), of_row(clean, b))


# Memory: layout, and former contents


def record(a):
    """Rows inside of records of an odd size: no stride is a multiple of the element."""
    kind = [("tag", "u1"), ("row", a.dtype, a.shape[-1:])]
    rows = np.zeros(a.shape[:-1], kind)["row"]
    rows[...] = a
    return rows


def unaligned(a):
    odd = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    odd[...] = a
    return odd


ALL_LAYOUTS = {**LAYOUTS, "record": record, "unaligned": unaligned}


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@cases(B=5, H=19, **MASKS)
def test_any_layout(problem, layout):
    """Of inputs, masks and the gradients of the outputs."""
    assert_same_bits(results(moved(problem, ALL_LAYOUTS[layout])), results(problem))


@cases(B=5, H=19)
def test_broadcast_input(problem):
    """The same step again and again, its axis of stride zero."""
    x = np.broadcast_to(problem.inputs["x"][:1], problem.inputs["x"].shape)
    assert_same_bits(
        results(problem.having(inputs={"x": x})), results(problem.having(inputs={"x": x.copy()}))
    )


@pytest.mark.parametrize("masks", [{}, MASKS | {"reverse": True}], ids=["full", "masks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_are_written_whole_and_nothing_else(cell, dtype, masks, monkeypatch):
    problem = Problem(cell, B=5, H=19, dtype=dtype, **masks)
    clean = results(problem) | forward(fastseq, problem)
    poisoned = PoisonedNumpy()
    monkeypatch.setattr(_stack, "np", poisoned)
    assert_same_bits(results(problem), clean)
    assert_same_bits(forward(fastseq, problem), {k: clean[k] for k in clean if k[0] != "d"})
    assert len(poisoned.blocks) > 10
    poisoned.assert_guards()


# Paths


@cases(T=23, B=13, H=33, **MASKS)
def test_inference_gives_the_bits_of_training(problem):
    outputs = forward(fastseq, problem)
    assert_same_bits(outputs, solve(problem).outputs)
    if problem.cell == "lstm":
        y, (h_n, c_n) = fastseq.lstm(**problem.inputs, **problem.options)
        assert_same_bits({"y": y, "h_n": h_n, "c_n": c_n, "c": outputs["c"]}, outputs)


@pytest.mark.parametrize("initial", BOOL, ids=["zerostate", "states"])
@pytest.mark.parametrize("bias", BOOL, ids=["nobias", "biases"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_cells_are_the_steps_of_the_scan(cell, dtype, bias, initial):
    problem = Problem(cell, T=4, H=19, dtype=dtype, bias=bias, initial=initial)
    inputs = dict(problem.inputs)
    xs = inputs.pop("x")
    states = [inputs.pop(k, None) for k in STATES[: 1 + (cell == "lstm")]]
    activation = {k: a for k, a in problem.options.items() if k == "nonlinearity"}
    step = getattr(fastseq, f"{problem.function}_cell")
    outputs = forward(fastseq, problem)
    for t, x in enumerate(xs):
        states = step(x, *states, **inputs, **activation)
        states = states if isinstance(states, tuple) else (states,)
        for name, state in zip("yc", states, strict=False):
            assert_same_bits({name: state}, {name: outputs[name][t]})


@cases(T=1, H=19)
def test_the_gradient_of_a_cell_is_that_of_one_step(problem):
    inputs = dict(problem.inputs)
    x, lstm = inputs.pop("x"), problem.cell == "lstm"
    states = [inputs.pop(k) for k in STATES[: 1 + lstm]]
    activation = {k: a for k, a in problem.options.items() if k == "nonlinearity"}
    step = getattr(fastseq, f"{problem.function}_cell")
    _, pullback = fastseq.vjp(step, x[0], *states, **inputs, **activation)
    d = problem.cotangents
    names = ("x", *STATES[: 1 + lstm], *inputs)
    grads = dict(zip(names, pullback((d["dh_n"], d["dc_n"]) if lstm else d["dh_n"]), strict=True))
    one_step = {k: np.zeros_like(d[k]) for k in ("dy", "dc") if k in d}
    expected = solve(problem.having(cotangents=one_step)).grads
    assert_same_bits(grads | {"x": grads["x"][None]}, expected)
