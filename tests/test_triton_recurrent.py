"""The recurrent Triton kernels, through the public functions: in the interpreter, or on a GPU.

Without a GPU the kernels run in Triton's interpreter on CPU tensors (float32 and float16), and
`on_gpu` sends them there.
"""

import numpy as np
import pytest
from problems import CELLS, Problem, _torch_outputs, forward, solve_reference
from running import assert_refused
from tolerance import assert_all_close, assert_close

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the GPU kernels need triton")

from fastseq.kernels.triton import cells, launch  # noqa: E402
from fastseq.kernels.triton import recurrent as kernels  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402
from triton_running import (  # noqa: E402
    DEVICE,
    DTYPES,
    leaves_of,
    options_of,
    peer,
    result,
    rounded,
    run_programs_in_turns,
    tensor,
)

import fastseq.torch as fst  # noqa: E402
from fastseq._spec import Masks, Spec  # noqa: E402
from fastseq.torch import ops  # noqa: E402

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not launch.interpreted(), reason="no GPU, and triton does not interpret"
)
OPTIONS = {
    "plain": {},
    "ragged": {"ragged": True, "B": 6},
    "resets-reverse": {"resets": True, "reverse": True, "T": 4},
    "all-reverse": {"ragged": True, "resets": True, "reverse": True, "B": 5, "H": 17},
    "clip": {"ragged": True, "resets": True, "B": 6, "clip": 0.2},
    "clip-reverse": {"resets": True, "reverse": True, "T": 6, "H": 17, "clip": 0.2},
    "nobias-zerostate": {"bias": False, "initial": False, "T": 3, "B": 17, "H": 19},
}
every_cell = pytest.mark.parametrize("cell", CELLS)
REGIMES = ["whole", "together", "slices", "step"]
every_regime = pytest.mark.parametrize("regime", REGIMES, indirect=True)


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.setattr(ops, "on_gpu", lambda tensor: True)
    with np.errstate(all="ignore"):  # the interpreter's arithmetic is NumPy's
        yield


@pytest.fixture
def regime(request, monkeypatch):
    """Force a regime at any size, with blocks of 16; "slices" is together, W_hh by slices."""
    by_gates = {G: [] for G in (1, 3, 4)}
    if request.param != "whole":
        monkeypatch.setattr(kernels, "WHOLE", by_gates)
    if request.param == "step":
        monkeypatch.setattr(kernels, "TOGETHER", by_gates)
        monkeypatch.setitem(kernels._STEP, "BK", 16)
    if request.param in ("together", "slices"):
        meta = {"REGIME": "together", "BB": 16, "HU": 16, "num_warps": 4, "num_stages": 1}
        if DEVICE == "cuda":
            meta |= {"launch_cooperative_grid": True}
        else:
            run_programs_in_turns(monkeypatch)
        if request.param == "slices":
            meta["BK"] = 16
        table = [launch.Row(np.inf, size, 0, meta) for size in (2, 4)]
        monkeypatch.setattr(kernels, "TOGETHER", dict.fromkeys(by_gates, table))
        monkeypatch.setattr(kernels, "multiprocessors", lambda tensor: 99)
    return request.param


def solve(problem, dtype="float32"):
    leaves = leaves_of(problem, dtype)
    placed = problem.having(inputs=leaves, options=options_of(problem))
    return result(problem, leaves, forward(fst, placed))


def assert_solved(problem, dtype, ours):
    exact = rounded(problem, dtype)
    ref = solve_reference(exact)
    torchs = peer(exact, dtype, lambda leaves: _torch_outputs(exact, leaves))
    assert_all_close(ours.outputs, ref.outputs, torchs.outputs)
    assert_all_close(ours.grads, ref.grads, torchs.grads, grad=True)


@every_regime
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_cell
def test_forward_and_gradients(cell, options, regime):
    problem = Problem(cell, **({"T": 5} | options))
    assert_solved(problem, "float32", solve(rounded(problem, "float32")))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@every_cell
def test_half_precision(cell, dtype):
    problem = Problem(cell, T=6, B=5, H=20, ragged=True)
    assert_solved(problem, dtype, solve(rounded(problem, dtype), dtype))


@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if "clip" not in o], ids=str)
def test_projection(options):
    problem = rounded(Problem("lstm", P=3, **({"T": 5} | options)), "float32")
    leaves = leaves_of(problem, "float32")
    given = options_of(problem)
    weights = [leaves[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if k in leaves]
    spec = Spec("lstm", reverse=given.pop("reverse"), bias=problem.bias, proj=True)
    states = (None if k not in leaves else leaves[k][None] for k in ("h0", "c0"))
    masks = Masks(**given)
    y, h_n, c_n, c = ops.run(spec, leaves["x"], *states, weights, masks, cell_states=True)
    outputs = {"y": y, "h_n": h_n[0], "c_n": c_n[0], "c": c}
    assert_solved(problem, "float32", result(problem, leaves, outputs))


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_packed_stack_of_both_directions(name):
    ours, theirs = modules(name, 5, 6, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(5, 4, 5), torch.tensor([2, 5, 1, 4])

    def run(module, dtype, device):
        leaf = x.to(device, dtype).requires_grad_()
        packed = pack_padded_sequence(leaf, lengths, enforce_sorted=False)
        y, last = module(packed)
        y, _ = pad_packed_sequence(y)
        outputs = [y, *(last if isinstance(last, tuple) else (last,))]
        loss = sum(out.square().sum() for out in outputs)
        grads = torch.autograd.grad(loss, [leaf, *module.parameters()])
        return [t.detach().cpu() for t in (*outputs, *grads)], len(outputs)

    found, n = run(ours.to(DEVICE), torch.float32, DEVICE)
    near, _ = run(theirs, torch.float32, "cpu")
    exact, _ = run(theirs.double(), torch.float64, "cpu")
    for i, (a, ref, b) in enumerate(zip(found, exact, near, strict=True)):
        assert_close(a, ref, b, grad=i >= n, name=f"result {i}")


def modules(name, *sizes, **options):
    """Ours and torch's, with the same weights."""
    torch.manual_seed(5)
    theirs = getattr(torch.nn, name)(*sizes, **options)
    ours = getattr(fst.nn, name)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@every_cell
def test_a_cell_module_takes_one_step(cell):
    problem = rounded(Problem(cell, T=1), "float32")
    leaves = leaves_of(problem, "float32")
    step = getattr(fst, f"{problem.function}_cell")
    states = [leaves["x"][0], leaves["h0"], *([leaves["c0"]] if cell == "lstm" else [])]
    options = {"nonlinearity": cell.removeprefix("rnn_")} if problem.function == "rnn" else {}
    weights = [leaves[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
    found = step(*states, *weights, **options)
    outputs = dict(zip(("h_n", "c_n"), found if cell == "lstm" else (found,), strict=False))
    ref = solve_reference(problem)
    torchs = peer(problem, "float32", lambda leaves: _torch_outputs(problem, leaves))
    for name, a in outputs.items():
        assert_close(a.detach().cpu(), ref.outputs[name], torchs.outputs[name], name=name)


@every_regime
@every_cell
def test_what_is_past_a_length_is_not_read(cell, regime):
    problem = rounded(Problem(cell, T=4, B=4, ragged=True), "float32")
    clean = solve(problem)
    past = np.arange(problem.T)[:, None] >= problem.options["lengths"]
    spoiled = {"x": np.where(past[..., None], np.nan, problem.inputs["x"])}
    wild = {
        name: np.where(past[..., None], np.nan, a) if a.ndim == 3 else a
        for name, a in problem.cotangents.items()
    }
    for name, a in solve(problem.having(inputs=spoiled, cotangents=wild)).grads.items():
        kept = a if name != "x" else a[~past]
        assert torch.equal(kept, clean.grads[name] if name != "x" else clean.grads["x"][~past])


@every_cell
def test_a_nan_stays_in_its_row(cell):
    problem = rounded(Problem(cell, T=4, B=7), "float32")
    x = problem.inputs["x"].copy()
    x[1, 2] = np.nan
    inputs = {k: tensor(a, "float32") for k, a in problem.inputs.items()}
    clean = forward(fst, problem.having(inputs=inputs))["y"]
    found = forward(fst, problem.having(inputs=inputs | {"x": tensor(x, "float32")}))["y"]
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(found[:, others], clean[:, others])
    assert torch.equal(found[0, 2], clean[0, 2]) and found[1:, 2].isnan().all()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 0, 2, 4), (2, 2, 0, 3)], ids=str)
@every_cell
def test_edges(cell, sizes):
    T, B, I, H = sizes  # noqa: E741
    problem = rounded(Problem(cell, T=T, B=B, I=I, H=H), "float32")
    assert_solved(problem, "float32", solve(problem))


def test_gates_saturate_and_relu_overflows():
    for cell, scale in (("gru", 1e4), ("lstm", 1e4), ("rnn_relu", 1e30)):
        problem = rounded(Problem(cell, T=4, H=3, B=2), "float32")
        problem = problem.having(inputs={"x": problem.inputs["x"] * scale})
        if cell == "rnn_relu":
            w_hh = np.full_like(problem.inputs["w_hh"], 1e30)
            problem = problem.having(inputs={"w_hh": w_hh})
        inputs = {k: tensor(a, "float32") for k, a in problem.inputs.items()}
        found = forward(fst, problem.having(inputs=inputs))["y"].cpu().numpy()
        ref = forward_reference(problem)
        assert (np.isnan(found) == np.isnan(ref)).all()
        assert (np.isinf(found) == np.isinf(ref)).all()


def forward_reference(problem):
    from fastseq.reference import recurrent as reference

    inputs = {k: a.astype(np.float32) for k, a in problem.inputs.items()}
    return forward(reference, problem.having(inputs=inputs))["y"]


def test_errors():
    x, w = tensor(np.zeros((2, 3, 4)), "float32"), tensor(np.zeros((12, 4)), "float32")
    on = f"on {x.device}"
    assert_refused(
        lambda: fst.gru(x.double(), w.double(), w.double()),
        TypeError,
        "gru: x must be float32, bfloat16 or float16 on a CUDA device, got float64 " + on,
    )
    assert_refused(
        lambda: fst.gru(x, w, w[:, :3]),
        ValueError,
        "gru: w_hh must be (3H, H) = (12, 4), got (12, 3)",
    )
    assert_refused(
        lambda: fst.gru(x, w, w.half()),
        TypeError,
        "gru: w_hh must be float32 as x is, got float16",
    )
    assert_refused(
        lambda: fst.gru(x, w, w, lengths=torch.tensor([1, 2, 3])),
        ValueError,
        "gru: lengths must be in 0..T = 0..2, got lengths[2] = 3",
    )
    assert_refused(
        lambda: fst.gru(x, w, w, resets=tensor(np.zeros((3, 2), bool))),
        ValueError,
        "gru: resets must be (T, B) = (2, 3), got (3, 2)",
    )
    projected = fst.nn.LSTM(4, 5, proj_size=2, clip_recurrent_grad=0.5).to(x.device)
    assert_refused(
        lambda: projected(x),
        NotImplementedError,
        f"lstm: clip_recurrent_grad with a projection must be None on {x.device}, got 0.5",
    )
    leaf = x.clone().requires_grad_()
    y, _ = fst.gru(leaf, w, w)
    (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(dx.sum(), leaf)


def test_autocast_computes_in_its_dtype(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    ours, _ = modules("LSTM", 3, 4)
    x = torch.randn(2, 3, 3, device=DEVICE, requires_grad=True)
    y, (h_n, c_n) = ours.to(DEVICE)(x)
    assert y.dtype == h_n.dtype == c_n.dtype == torch.float16
    y.sum().backward()
    assert x.grad.dtype == ours.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["linear_scan", *CELLS])
def test_operators_have_a_cuda_kernel(name):
    for suffix in ("", "_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastseq::{name}{suffix}", "CUDA")


@pytest.mark.parametrize("proj", [False, True])
def test_fake_outputs_have_the_shapes_of_real_ones(proj):
    spec = Spec("lstm", 2, True, proj=proj)
    weights = [w.detach() for w in torch.nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2 * proj)
               .to(DEVICE).parameters()]  # fmt: skip
    masks = [None] * len(Masks._fields)
    args = (tensor(np.zeros((4, 2, 3)), "float32"), None, None, weights, *masks)
    flags = (spec.num_layers, spec.bidirectional, False, True, True, None)
    real = torch.ops.fastseq.lstm(*args, *flags)
    mode = FakeTensorMode()
    with mode:
        device = {"device": "cuda"}
        fakes = [torch.empty(w.shape, **device) for w in weights]
        x = torch.empty(4, 2, 3, **device)
        fake = torch.ops.fastseq.lstm(x, None, None, fakes, *masks, *flags)
    assert [tuple(t.shape) for t in fake] == [tuple(t.shape) for t in real]


@pytest.mark.parametrize("options", [{"zoneout": 0.1}, {"recurrent_dropout": 0.1}])
def test_recurrent_dropout_and_zoneout_are_refused(options):
    module = fst.nn.GRU(3, 5, **options).to(DEVICE)
    with pytest.raises(NotImplementedError, match="recurrent dropout and zoneout run on the CPU"):
        module(tensor(np.zeros((4, 2, 3)), "float32"))


def test_the_regime_follows_from_the_size(monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda tensor: 132)
    monkeypatch.setattr(launch, "architecture", lambda tensor: arch)

    def regime(cell, H, dtype, B=16):
        w = torch.empty(cells.GATES[cell] * H, H, dtype=dtype)
        scan = kernels.Scan(
            cell, (9, B, H), False, w, *[None] * 4, h0=None, c0=None, y=None, c=None, kept=None
        )
        return kernels.plan(scan)["REGIME"]

    arch = 90
    assert regime("lstm", 128, torch.bfloat16) == regime("gru", 128, torch.float32) == "whole"
    assert regime("lstm", 129, torch.bfloat16) == regime("rnn_relu", 300, torch.half) == "together"
    assert regime("lstm", 129, torch.bfloat16, B=2000) == "step"
    assert regime("lstm", 2000, torch.half) == regime("lstm", 65, torch.float32) == "together"
    assert regime("lstm", 2049, torch.bfloat16) == regime("gru", 2000, torch.float32) == "step"
    arch = 80
    assert regime("lstm", 129, torch.bfloat16) == "step"
