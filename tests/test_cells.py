"""Cells that users write, through the NumPy API; what they may do and may not: test_trace.py."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cell_problems
import numpy as np
import pytest
from cell_problems import INPUTS, READY, REWRITTEN, CellProblem, solve, solve_reference, vjp
from finite_differences import assert_gradients_are_those_of
from problems import CELLS, Problem, Result
from running import assert_refused, assert_same_bits, judge, on_one_thread, python
from tolerance import assert_all_close

import fastseq
from fastseq import _dispatch

BOOL = (False, True)
DTYPES = ("float32", "float64")

SCANS = [
    CellProblem(name, B=11, H=19, dtype=dtype, ragged=masks, resets=masks, reverse=reverse)
    for name, dtype, masks, reverse in product(READY, DTYPES, BOOL, BOOL)
]
ARGUMENTS = [
    CellProblem(name, H=5, bias=bias, initial=not bias) for name, bias in product(READY, BOOL)
]
ARGUMENTS += [CellProblem(name, B=5, H=5, clip=0.3) for name in READY]
NOISY = [
    CellProblem(name, B=11, dtype=dtype, dropout=True, zoneout=zoneout, **options)
    for name, dtype, zoneout in product(READY, DTYPES, ("drawn", "mean", ""))
    for options in (
        {"H": 19},
        {"H": 4, "ragged": True, "resets": True, "reverse": True, "clip": 0.3},
        {"H": 70},
    )
    if READY[name][0].recurrent
]
SIZES = [
    CellProblem(name, *size, dtype=dtype)
    for name, dtype in product(READY, DTYPES)
    for size in [(3, 7, 5, 8), (3, 9, 1, 33), (5, 1, 3, 70), (1, 2, 9, 1), (4, 20, 0, 64)]
    if not (dtype == "float32" and size[-1] == 1)  # of so few elements torch's error may be nil
]


@pytest.mark.parametrize("problem", SCANS + ARGUMENTS + SIZES + NOISY, ids=str)
def test_outputs_and_gradients(problem):
    ref = solve_reference(problem)
    peer = None
    if problem.dtype == "float32":
        peer = on_one_thread(cell_problems.solve_torch, problem)
    ours = solve(problem)
    assert_all_close(ours.outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)


@pytest.mark.parametrize("name", READY)
def test_the_reference_is_torchs_autograd(name):
    problem = CellProblem(name, B=5, ragged=True, resets=True)
    ours, ref = solve_reference(problem), cell_problems.solve_torch(problem)
    assert_all_close(ours.outputs, ref.outputs)
    assert_all_close(ours.grads, ref.grads, grad=True)


@dataclass(frozen=True)
class Rewritten(Problem):
    """A built-in cell's problem for the user's cell that does the same."""

    def solve(self):
        cell, lstm = REWRITTEN[self.cell], self.cell == "lstm"
        options = {k: a for k, a in self.options.items() if k != "nonlinearity"}
        options["return_cell_states"] = lstm
        results, pull = fastseq.vjp(fastseq.scan, cell, **self.inputs, **options)
        dy, dh_n, dc_n, dc = (self.cotangents.get(k) for k in ("dy", "dh_n", "dc_n", "dc"))
        grads = pull(((dy, dc), (dh_n, dc_n)) if lstm else (dy, dh_n))
        grads = {k: a for k, a in zip(INPUTS, grads, strict=False) if a is not None}
        if not lstm:
            return Result(dict(zip(("y", "h_n"), results, strict=True)), grads)
        (y, c), (h_n, c_n) = results
        return Result({"y": y, "h_n": h_n, "c_n": c_n, "c": c}, grads)


ONCE_MORE = [
    Rewritten(cell, B=11, H=19, dtype=dtype, ragged=masks, resets=masks, reverse=masks, clip=clip)
    for cell, dtype, masks, clip in product(CELLS, DTYPES, BOOL, (None, 0.3))
]


@pytest.mark.parametrize("problem", ONCE_MORE, ids=str)
def test_a_built_in_cell_written_by_a_user_is_that_cell(problem):
    ours, (ref, peer) = problem.solve(), judge(problem)
    assert_all_close(ours.outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)


@pytest.mark.parametrize("name", READY)
def test_gradients_are_those_of_the_kernel(name):
    problem = CellProblem(name, T=4, B=3, H=5, ragged=True)

    def loss(**inputs):
        outputs, _ = vjp(problem.having(inputs=inputs))
        return sum((problem.cotangents[f"d{k}"] * a).sum() for k, a in outputs.items())

    _, pullback = vjp(problem)
    grads = pullback(problem.cotangents)
    rng = np.random.default_rng(0)
    assert_gradients_are_those_of(loss, problem.inputs, grads, rng)


@pytest.mark.parametrize("name", READY)
def test_bits_do_not_depend_on_threads_or_neighbours(name):
    noise = {"dropout": READY[name][0].recurrent, "zoneout": "drawn"}
    masks = {"ragged": True, "resets": True}
    problem = CellProblem(name, T=30, B=26, I=17, H=67, dtype="float32", **masks, **noise)
    before = fastseq.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            fastseq.set_num_threads(threads)
            found.append(solve(problem))
    finally:
        fastseq.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other.outputs, found[0].outputs)
        assert_same_bits(other.grads, found[0].grads)
    row = [3]
    alone = problem.having(
        inputs={k: a[:, row] for k, a in problem.inputs.items() if k == "x"}
        | {k: a[row] for k, a in problem.inputs.items() if k in ("h0", "c0")},
        options={
            k: a[row] if k in ("lengths", "recurrent_mask") else a[:, row]
            for k, a in problem.options.items()
            if isinstance(a, np.ndarray)
        },
    )
    outputs, _ = vjp(alone)
    axis = {"y": 1, "c": 1, "h_n": 0, "c_n": 0}
    expected = {k: a.take(row, axis[k]) for k, a in found[0].outputs.items()}
    assert_same_bits(outputs, expected)


@pytest.mark.parametrize("name", ["peephole_lstm", "layer_norm_lstm", "layer_norm_gru"])
def test_nan_stays_in_its_row(name):
    problem = CellProblem(name, B=4, H=9, dtype="float32")
    x = problem.inputs["x"].copy()
    x[2, 1, 0] = np.nan
    clean, _ = vjp(problem)
    outputs, _ = vjp(problem.having(inputs={"x": x}))
    assert np.isnan(outputs["y"][2:, 1]).all()
    others = [0, 2, 3]
    assert_same_bits({"y": outputs["y"][:, others]}, {"y": clean["y"][:, others]})


def test_without_zoneout_of_c_an_infinite_c_stays():
    problem = CellProblem("cifg_lstm", T=3, H=9)
    c0 = np.full_like(problem.inputs["c0"], np.inf)
    none = {"zoneout_h": np.zeros((3, 3, 9))}
    plain, _ = vjp(problem.having(inputs={"c0": c0}))
    zoned, _ = vjp(problem.having(inputs={"c0": c0}, options=none))
    assert_same_bits(zoned, plain)
    assert np.isinf(zoned["c_n"]).all()


def test_a_cell_is_its_function_and_is_known_once():
    def twice(a, h):
        return np.tanh(a) + 2 * h

    made = fastseq.cell(twice)
    assert made(0.0, 1.5) == 3
    assert fastseq.cell(twice) is made
    assert repr(made) == "<fastseq.cell twice(a, h): 1 gate>"
    assert (made.gates, made.has_c, made.recurrent, made.params) == (1, False, True, 0)


def test_an_argument_with_a_default_keeps_it():
    @fastseq.cell
    def leaky(a, h, rate=0.25):
        return (1 - rate) * h + rate * np.tanh(a)

    x, w_ih, w_hh = np.ones((1, 1, 2)), np.ones((3, 2)), np.zeros((3, 3))
    y, h_n = fastseq.scan(leaky, x, w_ih, w_hh, h0=np.ones((1, 3)))
    np.testing.assert_allclose(y[0], np.full((1, 3), 0.75 + 0.25 * np.tanh(2)), rtol=1e-15)
    np.testing.assert_array_equal(h_n, y[0])


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_gradient_flow_is_that_of_the_built_in_cell(name):
    problem = Problem(name)
    weights = {k: a for k, a in problem.inputs.items() if k != "x"}
    options = {"dy": problem.cotangents["dy"], "clip_recurrent_grad": 0.5}
    built_in = getattr(fastseq, problem.function)
    x = problem.inputs["x"]
    expected = fastseq.gradient_flow(built_in, x, **weights, **options)
    norms = fastseq.gradient_flow(REWRITTEN[name], x, **weights, **options)
    np.testing.assert_allclose(norms, expected, rtol=1e-12)


def test_gradient_flow_of_a_cell_with_params():
    problem = CellProblem("ind_rnn")
    norms = fastseq.gradient_flow(problem.cell, **problem.inputs)
    u = np.abs(problem.inputs["params"][0])
    assert norms.shape == (problem.T,)
    assert (norms[:-1] <= u.max() * norms[1:]).all()


ARRAYS = {name: CellProblem("peephole_lstm").inputs[name] for name in INPUTS}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cell": len}, TypeError, "scan: cell must be one of fastseq.cells or of fastseq.cell, "
         "got builtin_function_or_method"),
        ({"params": None}, ValueError, "peephole_lstm: params must be an array for <fastseq.cell "
         "peephole_lstm(i, f, g, o, c, p_i, p_f, p_o): 4 gates> with b_ih"),
        ({"b_hh": None}, ValueError, "peephole_lstm: b_hh must be an array for <fastseq.cell "
         "peephole_lstm(i, f, g, o, c, p_i, p_f, p_o): 4 gates> with b_ih"),
        ({"params": np.zeros((2, 4))}, ValueError,
         "peephole_lstm: params must be (N, H) = (3, 4), got (2, 4)"),
        ({"w_ih": np.zeros((12, 5))}, ValueError,
         "peephole_lstm: w_hh must be (4H, H) = (12, 3), got (16, 4)"),
        ({"clip_recurrent_grad": 0}, ValueError,
         "peephole_lstm: clip_recurrent_grad must be > 0, got 0"),
    ],
)  # fmt: skip
def test_errors_of_a_scan(change, error, message):
    cell = change.get("cell", READY["peephole_lstm"][0])
    given = ARRAYS | {k: a for k, a in change.items() if k != "cell"}
    assert_refused(lambda: fastseq.scan(cell, **given), error, message)


def test_what_a_cell_does_not_have_is_refused():
    problem = CellProblem("ind_rnn")
    cell, inputs = problem.cell, problem.inputs
    name = "<fastseq.cell ind_rnn(a, h, u): 1 gate>"
    for change, message in [
        ({"c0": np.zeros((3, 4))}, "c0 must not be given: the cell has no c"),
        ({"return_cell_states": True}, "return_cell_states must not be given: the cell has no c"),
        ({"w_hh": np.zeros((4, 4))}, f"w_hh must be None for {name} with b_ih"),
    ]:
        call = lambda change=change: fastseq.scan(cell, **inputs | change)  # noqa: E731
        assert_refused(call, ValueError, f"ind_rnn: {message}")


FIRST_USE = """
import time, numpy as np, fastseq
x, w, u = np.ones((2, 1, 3), "f"), np.ones((4, 3), "f"), np.ones((1, 4), "f")
start = time.perf_counter()
fastseq.scan(fastseq.cells.ind_rnn, x, w, params=u)
print(time.perf_counter() - start)
"""


def test_compiled_once_in_under_five_seconds(tmp_path):
    said = [
        python(f"import sys; sys.stderr = sys.stdout\n{FIRST_USE}", env={"FASTSEQ_CACHE": tmp_path})
        for _ in range(2)
    ]
    assert said[0].startswith("fastseq: Numba compiled the cell ind_rnn (float32) in ")
    assert float(said[0].split()[-1]) < 5
    assert "compiled" not in said[1]
    assert [path.name for path in tmp_path.glob("cell_ind_rnn_*.py")]


def test_where_no_cache_can_be_written_a_temporary_one_is(tmp_path):
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    code = (
        "import fastseq\n"
        "fastseq.cells.ind_rnn.compile()\n"
        "from fastseq.kernels.numba import generated\n"
        "print(generated.folder())\n"
    )
    folder = Path(python(code, env={"FASTSEQ_CACHE": nowhere}).strip())
    assert folder.name.startswith("fastseq-")
    assert not folder.exists()


@pytest.mark.parametrize("level", _dispatch.features.supported())
def test_every_isa_level(level):
    code = (
        "import sys; from test_cells import CellProblem, solve, solve_reference\n"
        "from fastseq import _dispatch; from tolerance import assert_all_close\n"
        "problem = CellProblem('peephole_lstm', B=5, H=21, ragged=True)\n"
        "ours, ref = solve(problem), solve_reference(problem)\n"
        "assert_all_close(ours.outputs, ref.outputs)\n"
        "assert_all_close(ours.grads, ref.grads, grad=True)\n"
        "print(_dispatch.level()[0])\n"
    )
    assert python(code, env={"FASTSEQ_CPU": level}) == f"{level}\n"


def test_without_numba_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np, fastseq\n"
        "try:\n"
        "    fastseq.cells.ind_rnn.compile()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert python(code) == "the cell ind_rnn needs Numba: pip install fastseq-kernels[numba]\n"
