"""Cells that users write, over torch tensors: the operators, `scan`, the module, torch.compile."""

import copy
import pickle
import warnings

import numpy as np
import pytest
from cell_problems import NOISE, READY, CellProblem, solve
from problems import Result
from running import assert_refused, assert_same_bits

import fastseq

torch = pytest.importorskip("torch")
import fastseq.torch  # noqa: E402


def tensors(arrays, **options):
    return {k: torch.tensor(a, **options) for k, a in arrays.items()}


def named(problem, results):
    if not problem.cell.has_c:
        return dict(zip(("y", "h_n"), results, strict=True))
    (y, c), (h_n, c_n) = results
    return {"y": y, "h_n": h_n, "c_n": c_n, "c": c}


def run(problem, leaves, scan=fastseq.torch.scan):
    options = problem.options | {"return_cell_states": problem.cell.has_c}
    names = ("lengths", "resets", *NOISE)
    masks = {k: torch.as_tensor(options[k]) for k in names if k in options}
    return named(problem, scan(problem.cell, **leaves, **options | masks))


def solve_with(problem, scan=fastseq.torch.scan):
    leaves = tensors(problem.inputs, requires_grad=True)
    outputs = run(problem, leaves, scan)
    cotangents = tensors(problem.cotangents)
    loss = sum((cotangents[f"d{k}"] * a).sum() for k, a in outputs.items())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return Result(
        {k: a.detach().numpy() for k, a in outputs.items()},
        {k: a.numpy() for k, a in zip(leaves, grads, strict=True)},
    )


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("masks", [False, True])
def test_bits_are_those_of_the_numpy_function(name, masks):
    options = {"ragged": masks, "resets": masks, "reverse": masks, "clip": 0.4 if masks else None}
    if masks:
        options |= {"dropout": READY[name][0].recurrent, "zoneout": "drawn"}
    problem = CellProblem(name, B=6, H=19, dtype="float32", **options)
    ours, expected = solve_with(problem), solve(problem)
    assert_same_bits(ours.outputs, expected.outputs)
    assert_same_bits(ours.grads, expected.grads)


@pytest.mark.parametrize("name", READY)
def test_no_bias(name):
    problem = CellProblem(name, H=6, bias=False)
    assert_same_bits(solve_with(problem).grads, solve(problem).grads)


@pytest.mark.parametrize("name", READY)
def test_gradcheck(name):
    problem = CellProblem(name, T=3, B=2, I=2, H=3, ragged=True)
    leaves = tensors(problem.inputs, requires_grad=True)
    names = list(leaves)

    def function(*given):
        return tuple(run(problem, dict(zip(names, given, strict=True))).values())

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("name", ["peephole_lstm", "ind_rnn", "layer_norm_lstm"])
def test_opcheck(name):
    problem = CellProblem(name, T=3, B=2, H=4, dtype="float32")
    cell, leaves = problem.cell, tensors(problem.inputs, requires_grad=True)
    states = [leaves.pop("h0")[None], leaves.pop("c0")[None] if cell.has_c else None]
    x, *weights = leaves.values()
    traced = name not in ("layer_norm_lstm", "layer_norm_gru")
    operator = getattr(torch.ops.fastseq, f"cell_{cell.key}" if traced else name).default
    flags = (1, False, False, cell.has_c, True, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noise = (
            [torch.rand(1, 2, 4), torch.rand(1, 3, 2, 4), None] if cell.recurrent else [None] * 3
        )
        torch.library.opcheck(operator, (x, *states, weights, None, None, *noise, *flags))


@pytest.mark.parametrize("name", READY)
def test_compile(name):
    problem = CellProblem(name, B=4, H=9, dtype="float32", ragged=True)
    torch._dynamo.reset()
    compiled = torch.compile(fastseq.torch.scan, fullgraph=True, backend="aot_eager")
    assert_same_bits(solve_with(problem, compiled).grads, solve_with(problem).grads)


def modules(**options):
    """The module of the user's LSTM and torch's own with the same parameters."""
    from cell_problems import lstm

    ours = fastseq.torch.nn.Recurrent(lstm, 5, 7, **options)
    theirs = torch.nn.LSTM(5, 7, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}],
)
def test_module_of_a_users_lstm_is_torchs(options):
    ours, theirs = modules(**options, dtype=torch.float64)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    assert_same(ours(x), theirs(x))
    if not ours.batch_first:
        pack = torch.nn.utils.rnn.pack_padded_sequence
        packed = pack(x, [6, 2, 1, 4], enforce_sorted=False)
        (y, last), (y_, last_) = ours(packed), theirs(packed)
        assert_same((y.data, last), (y_.data, last_))


def assert_same(ours, theirs):
    (y, states), (y_, states_) = ours, theirs
    for a, b in zip((y, *states), (y_, *states_), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_module_trains_and_keeps_its_state():
    cell = fastseq.cells.peephole_lstm
    torch.manual_seed(0)
    module = fastseq.torch.nn.Recurrent(cell, 3, 8, num_layers=2, bidirectional=True)
    names = [name for name, _ in module.named_parameters()]
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "params")
    assert names[:5] == [f"{kind}_l0" for kind in kinds]
    assert module.params_l1_reverse.shape == (3, 8)
    x = torch.randn(5, 4, 3)
    before = module(x)[0]
    before.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    with torch.no_grad():
        module.params_l0.add_(0.5)
    after = module(x)[0]
    assert not torch.equal(before, after)
    other = fastseq.torch.nn.Recurrent(cell, 3, 8, num_layers=2, bidirectional=True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], after)
    assert "Recurrent(3, 8, num_layers=2" in repr(module)


def test_module_is_copied_and_pickled():
    module = fastseq.torch.nn.Recurrent(fastseq.cells.peephole_lstm, 3, 8)
    x = torch.randn(5, 2, 3)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.cell is module.cell
        assert torch.equal(other(x)[0], module(x)[0])
    nameless = fastseq.cell(lambda a: np.tanh(a))
    with pytest.raises(pickle.PicklingError, match="is not what test_torch_cells"):
        pickle.dumps(nameless)


def test_module_without_recurrent_weights():
    module = fastseq.torch.nn.Recurrent(fastseq.cells.ind_rnn, 3, 8)
    assert {n for n, _ in module.named_parameters()} == {"weight_ih_l0", "bias_ih_l0", "params_l0"}
    y, h_n = module(torch.randn(5, 2, 3))
    assert torch.equal(y[-1], h_n[0])


NOISY = [
    ("LSTM", {"recurrent_dropout": 0.3, "zoneout": (0.2, 0.4)}),
    ("GRU", {"zoneout": 0.3, "num_layers": 2, "bidirectional": True}),
    ("RNN", {"recurrent_dropout": 0.5, "num_layers": 2, "dropout": 0.5}),
    ("LayerNormLSTM", {"recurrent_dropout": 0.3, "zoneout": 0.2}),
]


@pytest.mark.parametrize(("name", "noise"), NOISY)
def test_noise_of_modules(name, noise):
    module = getattr(fastseq.torch.nn, name)(3, 8, **noise)
    x = torch.randn(6, 4, 3, requires_grad=True)
    torch.manual_seed(1)
    first, other = module(x)[0], module(x)[0]
    torch.manual_seed(1)
    again = module(x)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first.square().sum().backward()
    assert x.grad.isfinite().all()
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    options = repr(module).removeprefix(name)
    again = eval(f"fastseq.torch.nn.{name}{options}")
    assert repr(again) == repr(module)


def test_zoneout_of_a_module_is_the_mean_in_inference():
    from fastseq.reference import recurrent as reference

    module = fastseq.torch.nn.LSTM(3, 8, zoneout=(0.25, 0.5), dtype=torch.float64).eval()
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    zoneout = {f"zoneout_{s}": np.full((6, 4, 8), p) for s, p in (("h", 0.25), ("c", 0.5))}
    weights = reference.Weights(*(w.detach().numpy() for w in module.parameters()))
    y, *_ = reference._scan_fwd(reference._LSTM, weights, x.numpy(), **zoneout)
    torch.testing.assert_close(module(x)[0], torch.tensor(y), rtol=1e-12, atol=1e-12)


def test_noise_in_training_follows_the_equations():
    module = fastseq.torch.nn.GRU(3, 8, zoneout=0.5, dtype=torch.float64)
    h0 = torch.randn(1, 4, 8, dtype=torch.float64)
    y, _ = module(torch.randn(6, 4, 3, dtype=torch.float64), h0)
    before = torch.cat([h0, y[:-1]])
    kept = (y == before).double().mean()
    assert 0.3 < kept < 0.7


def test_recurrent_dropout_of_ones_is_none_and_of_zeros_cuts_the_product():
    problem = CellProblem("cifg_lstm", T=4, H=6)
    leaves = tensors(problem.inputs)
    ones = {"recurrent_mask": torch.ones(3, 6, dtype=torch.float64)}
    plain = fastseq.torch.scan(problem.cell, **leaves)[0]
    assert torch.equal(fastseq.torch.scan(problem.cell, **leaves, **ones)[0], plain)
    zeros = {"recurrent_mask": torch.zeros(3, 6, dtype=torch.float64)}
    without = leaves | {"w_hh": torch.zeros_like(leaves["w_hh"])}
    cut = fastseq.torch.scan(problem.cell, **leaves, **zeros)[0]
    assert torch.equal(cut, fastseq.torch.scan(problem.cell, **without)[0])


def test_masks_are_not_differentiable():
    x, mask = torch.randn(5, 2, 3), torch.rand(2, 4, requires_grad=True)
    cell, weights = fastseq.cells.light_gru, [torch.randn(8, 3), torch.randn(8, 4)]
    with pytest.raises(RuntimeError, match="light_gru: masks are not differentiable"):
        fastseq.torch.scan(cell, x, *weights, recurrent_mask=mask)


LAYER_NORM = {"layer_norm_lstm": ("LayerNormLSTM", 9), "layer_norm_gru": ("LayerNormGRU", 6)}


@pytest.mark.parametrize("cell", LAYER_NORM)
def test_layer_norm_modules_are_their_cell_and_start_from_gains_of_one(cell):
    name, gains = LAYER_NORM[cell]
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    module = getattr(fastseq.torch.nn, name)(3, 8, **options, dtype=torch.float64)
    assert not any("bias" in name for name, _ in module.named_parameters())
    expected = torch.zeros_like(module.params_l1_reverse)
    expected[:gains] = 1
    assert torch.equal(module.params_l1_reverse, expected)
    same = fastseq.torch.nn.Recurrent(getattr(fastseq.cells, cell), 3, 8, bias=False, **options)
    assert torch.equal(same.params_l0, module.params_l0)
    same.double().load_state_dict(module.state_dict())
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    assert torch.equal(module(x)[0], same(x)[0])
    torch.testing.assert_close(module(1000 * x)[0], module(x)[0], rtol=0.1, atol=0.1)
    assert name in repr(module)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x)[0], module(x)[0])


def test_module_under_compile():
    module = fastseq.torch.nn.Recurrent(fastseq.cells.light_gru, 3, 8)
    x = torch.randn(5, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[0], module(x)[0])


def test_streaming_in_chunks_is_one_call():
    module = fastseq.torch.nn.Recurrent(fastseq.cells.cifg_lstm, 3, 8)
    x = torch.randn(9, 2, 3)
    with torch.no_grad():
        whole, last = module(x)
        first, state = module(x[:4])
        second, state = module(x[4:], state)
    assert torch.equal(whole, torch.cat([first, second]))
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))


def test_errors():
    cell, x = fastseq.cells.ind_rnn, torch.zeros(2, 1, 3)
    w, u = torch.zeros(4, 3), torch.zeros(1, 4)
    assert_refused(
        lambda: fastseq.torch.nn.Recurrent("lstm", 3, 4),
        TypeError,
        "Recurrent: cell must be one of fastseq.cells or of fastseq.cell, got str",
    )
    assert_refused(
        lambda: fastseq.torch.scan(cell, x, w),
        ValueError,
        "ind_rnn: params must be an array for <fastseq.cell ind_rnn(a, h, u): 1 gate> without b_ih",
    )
    given = {"params": u, "recurrent_mask": torch.ones(1, 4)}
    assert_refused(
        lambda: fastseq.torch.scan(cell, x, w, **given),
        ValueError,
        "ind_rnn: recurrent_mask must not be given: the cell has no w_hh",
    )
    assert_refused(
        lambda: fastseq.torch.scan(cell, x, w, params=u, zoneout_h=torch.ones(2, 1, 5)),
        ValueError,
        "ind_rnn: zoneout_h must be (T, B, H) = (2, 1, 4), got (2, 1, 5)",
    )
    for name, options, text in (
        ("GRU", {"zoneout": (0.1, 0.1)}, "GRU: zoneout of c must be 0: the cell has no c, got 0.1"),
        ("LSTM", {"zoneout": 1.0},
         "LSTM: zoneout must be a probability below 1, or two (of h, of c), got 1.0"),
        ("LSTM", {"zoneout": [0.1]},
         "LSTM: zoneout must be a probability below 1, or two (of h, of c), got [0.1]"),
        ("LSTM", {"zoneout": 0.1, "proj_size": 2},
         "LSTM: zoneout must be 0 with proj_size, got 0.1"),
        ("RNN", {"recurrent_dropout": -1},
         "RNN: recurrent_dropout must be a probability below 1, got -1"),
    ):  # fmt: skip
        assert_refused(
            lambda n=name, o=options: getattr(fastseq.torch.nn, n)(3, 4, **o), ValueError, text
        )
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got ndarray"):
        fastseq.torch.scan(cell, x, w, params=np.zeros((1, 4)))
    with pytest.raises(TypeError, match="float32 or float64 on the CPU, got float16"):
        fastseq.torch.scan(cell, x.half(), w.half(), params=u.half())
