"""The linear scan's Triton kernels, through the public functions: in the interpreter, or on a GPU.

Without a GPU the kernels run in Triton's interpreter on CPU tensors (float32 and float16), and
`on_gpu` sends them there. "chunks" cuts time into pieces of 4 steps, "whole" does not cut it.
"""

import sys

import numpy as np
import pytest
from linear_scan_problems import FUNCTIONS, ScanProblem, _torch_terms, solve_reference, torch_loop
from running import assert_refused
from tolerance import assert_all_close

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the GPU kernels need triton")

from fastseq.kernels.triton import linear_scan as kernels  # noqa: E402
from fastseq.kernels.triton.launch import interpreted  # noqa: E402
from triton_running import (  # noqa: E402
    DEVICE,
    DTYPES,
    leaves_of,
    options_of,
    peer,
    result,
    rounded,
    tensor,
)

import fastseq.torch as fst  # noqa: E402
from fastseq.torch import linear_scan_ops  # noqa: E402

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="no GPU, and triton does not interpret"
)
OPTIONS = {
    "plain": {},
    "zerostate": {"initial": False, "T": 21, "C": 37, "decay": 0.0},
    "ragged": {"ragged": True, "B": 6},
    "resets-reverse": {"resets": 0.25, "reverse": True},
    "all": {"ragged": True, "resets": 0.25, "T": 11},
    "all-reverse": {"ragged": True, "resets": 0.25, "reverse": True, "T": 11, "B": 33},
}
every_cut = pytest.mark.parametrize("cut", ["whole", "chunks"], indirect=True)


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    for module in (linear_scan_ops, sys.modules["fastseq.torch.linear_scan"]):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    with np.errstate(all="ignore"):  # the interpreter's arithmetic is NumPy's
        yield


@pytest.fixture
def cut(request, monkeypatch):
    monkeypatch.setattr(kernels, "SHORTEST", 4 if request.param == "chunks" else 10**9)
    return request.param


def solve(problem, dtype="float32"):
    leaves = leaves_of(problem, dtype)
    h, h_n = getattr(fst, problem.function)(**leaves, **options_of(problem))
    return result(problem, leaves, {"h": h, "h_n": h_n})


def assert_solved(problem, dtype, ours):
    exact = rounded(problem, dtype)

    def torchs_outputs(leaves):
        terms = _torch_terms(exact.function, leaves)
        h, h_n = torch_loop(*terms, leaves.get("h0"), exact.options)
        return {"h": h, "h_n": h_n}

    ref, torchs = solve_reference(exact), peer(exact, dtype, torchs_outputs)
    assert_all_close(ours.outputs, ref.outputs, torchs.outputs)
    assert_all_close(ours.grads, ref.grads, torchs.grads, grad=True)


@every_cut
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_and_gradients(options, cut):
    problem = ScanProblem(**options)
    assert_solved(problem, "float32", solve(rounded(problem, "float32")))


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_gates_of_the_input(function):
    problem = ScanProblem(function, ragged=True, resets=0.25)
    assert_solved(problem, "float32", solve(rounded(problem, "float32")))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@every_cut
def test_half_precision(dtype, cut):
    problem = ScanProblem(T=12, ragged=True)
    assert_solved(problem, dtype, solve(rounded(problem, dtype), dtype))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (17, 1, 1), (2, 3, 129)], ids=str)
def test_edges(sizes):
    T, B, C = sizes
    problem = ScanProblem(T=T, B=B, C=C)
    assert_solved(problem, "float32", solve(rounded(problem, "float32")))


@pytest.mark.parametrize("sizes", [(3, 0, 2), (2, 3, 0), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("initial", [True, False])
def test_nothing_to_scan(sizes, initial):
    problem = rounded(ScanProblem(T=sizes[0], B=sizes[1], C=sizes[2], initial=initial), "float32")
    leaves = leaves_of(problem, "float32")
    h, h_n = fst.linear_scan(**leaves)
    assert h.shape == sizes
    assert torch.equal(h_n, leaves["h0"] if initial else torch.zeros_like(h_n))
    grads = torch.autograd.grad(h.sum() + h_n.sum(), list(leaves.values()))
    assert [g.shape for g in grads] == [a.shape for a in leaves.values()]
    assert not initial or (grads[2] == 1).all()


@every_cut
def test_what_is_past_a_length_or_reset_is_not_read(cut):
    problem = rounded(ScanProblem(T=11, ragged=True, resets=0.25), "float32")
    clean = solve(problem)
    past = (np.arange(problem.T)[:, None] >= problem.options["lengths"])[..., None]
    unread = past | problem.options["resets"][..., None]
    spoiled = problem.having(
        inputs={
            "a": np.where(unread, np.nan, problem.inputs["a"]),
            "b": np.where(past, np.nan, problem.inputs["b"]),
        },
        cotangents={"dh": np.where(past, np.nan, problem.cotangents["dh"])},
    )
    found = solve(spoiled)
    for name, a in clean.grads.items():
        assert torch.equal(found.grads[name], a), name


@every_cut
def test_infinite_states_end_at_a_reset(cut):
    problem = rounded(ScanProblem(T=12, B=1, C=3), "float32")
    resets = np.zeros((12, 1), bool)
    resets[5] = True
    b = problem.inputs["b"].copy()
    b[2] = np.inf
    inputs = {k: tensor(v, "float32") for k, v in (problem.inputs | {"b": b}).items()}
    h, h_n = fst.linear_scan(**inputs, resets=tensor(resets))
    assert h[2:5].isinf().all() and h[5:].isfinite().all() and h_n.isfinite().all()


@every_cut
def test_growth_past_float32_between_states_of_zero(cut):
    """The product of a chunk's a_t is no float32, but no state is large: none is NaN."""
    a, b = tensor(np.full((16, 1, 2), 1e15), "float32"), tensor(np.zeros((16, 1, 2)), "float32")
    h, h_n = fst.linear_scan(a, b)
    assert (h == 0).all() and (h_n == 0).all()


def test_errors():
    a = tensor(np.zeros((2, 3, 4)), "float32")
    assert_refused(
        lambda: fst.linear_scan(a.double(), a.double()),
        TypeError,
        "linear_scan: a must be float32, bfloat16 or float16 on a CUDA device, "
        f"got float64 on {a.device}",
    )
    assert_refused(
        lambda: fst.linear_scan(a, a[:1]),
        ValueError,
        "linear_scan: b must be (T, B, C) = (2, 3, 4), got (1, 3, 4)",
    )
    assert_refused(
        lambda: fst.linear_scan(a, a.half()),
        TypeError,
        "linear_scan: b must be float32 as a is, got float16",
    )


def test_chunks_fill_the_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda tensor: 132)

    def chunks(*sizes):
        scan = kernels.LinearScan(sizes, False, *[None] * 6)
        return kernels._cut(scan, 128)[1]

    assert chunks(4096, 64, 4096) == 1
    assert chunks(4096, 1, 128) == 64
    assert chunks(2**20, 8, 1536) == 22
    assert chunks(1, 1, 1) == 1
