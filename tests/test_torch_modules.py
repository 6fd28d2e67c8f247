"""fastseq.torch.nn against torch.nn: the same parameters, results, errors; packed weights."""

import copy
import io
import pickle

import pytest
from tolerance import assert_close

torch = pytest.importorskip("torch")

from torch.nn.utils import prune  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence  # noqa: E402

import fastseq.torch.nn as fnn  # noqa: E402
from fastseq.torch import cells_nn, recurrent_nn  # noqa: E402

I, H, T, B = 5, 4, 7, 3  # noqa: E741
KINDS = {
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}
LAYOUTS = {
    "plain": {},
    "nobias": {"bias": False},
    "batch_first": {"batch_first": True},
    "two_layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "stack": {"num_layers": 3, "bidirectional": True},
}
PROJECTIONS = {
    "lstm-proj": ("LSTM", {"proj_size": 2}),
    "lstm-proj-stack": ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
}
CASES = {
    f"{kind}-{layout}": (name, options | extra)
    for kind, (name, options) in KINDS.items()
    for layout, extra in LAYOUTS.items()
} | PROJECTIONS
CELLS = {
    "tanh": ("RNNCell", {}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
    "gru": ("GRUCell", {}),
    "lstm": ("LSTMCell", {}),
    "lstm-nobias": ("LSTMCell", {"bias": False}),
}

every_case = pytest.mark.parametrize("name, options", CASES.values(), ids=CASES)
every_kind = pytest.mark.parametrize("name, options", KINDS.values(), ids=KINDS)
every_cell = pytest.mark.parametrize("name, options", CELLS.values(), ids=CELLS)
ignore_onednn = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
pytestmark = ignore_onednn


def pair(name, options, dtype=torch.float64, size=(I, H)):
    """Our module and torch's with the same parameters."""
    ours = getattr(fnn, name)(*size, **options, dtype=dtype)
    known = {k: v for k, v in options.items() if k != "clip_recurrent_grad"}
    theirs = getattr(torch.nn, name)(*size, **known, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def states(name, *shape, projection=0, dtype=torch.float64):
    """Random hx of torch.nn.<name>."""
    h = torch.randn(*shape[:-1], projection or shape[-1], dtype=dtype)
    return (h, torch.randn(shape, dtype=dtype)) if name.startswith("LSTM") else h


def flat(result):
    """The tensors of a module's result, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def assert_same(ours, theirs, x, hx=None):
    """Equal outputs, and equal gradients of everything, of two modules in float64."""

    def solve(module):
        leaves = [
            t.detach().clone().requires_grad_() for t in flat((x,) if hx is None else (x, hx))
        ]
        own_x = leaves[0] if isinstance(x, torch.Tensor) else x._replace(data=leaves[0])
        own_hx = None if hx is None else leaves[1] if len(leaves) == 2 else tuple(leaves[1:])
        result = flat(module(own_x, own_hx))
        wanted = leaves + list(module.parameters())
        loss = sum((a * torch.linspace(1, 2, a.numel()).view(a.shape)).sum() for a in result)
        return result, torch.autograd.grad(loss, wanted)

    (a, da), (b, db) = solve(ours), solve(theirs)
    for mine, other in zip(a, b, strict=True):
        assert_close(mine, other)
    for mine, other in zip(da, db, strict=True):
        assert_close(mine, other, grad=True)


def ragged(dtype=torch.float64, enforce_sorted=False):
    lengths = (7, 4, 4, 1) if enforce_sorted else (4, 1, 7, 4)
    rows = [torch.randn(n, I, dtype=dtype) for n in lengths]
    return pack_sequence(rows, enforce_sorted=enforce_sorted)


def hx_for(module, name, batch):
    S = module.num_layers * (1 + module.bidirectional)
    return states(name, S, *batch, H, projection=module.proj_size)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch", [(B,), ()], ids=["batched", "unbatched"])
@every_case
def test_values_and_gradients(name, options, batch, given):
    ours, theirs = pair(name, options)
    shape = (T, *batch, I)
    if batch and ours.batch_first:
        shape = (*batch, T, I)
    hx = hx_for(ours, name, batch) if given else None
    assert_same(ours, theirs, torch.randn(shape, dtype=torch.float64), hx)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["unsorted", "sorted"])
@every_case
def test_packed_sequences(name, options, enforce_sorted, given):
    ours, theirs = pair(name, options)
    packed = ragged(enforce_sorted=enforce_sorted)
    hx = hx_for(ours, name, (4,)) if given else None
    assert_same(ours, theirs, packed, hx)
    a, b = ours(packed, hx)[0], theirs(packed, hx)[0]
    assert torch.equal(a.batch_sizes, b.batch_sizes)
    for mine, other in zip(a[2:], b[2:], strict=True):
        assert mine is other is None or torch.equal(mine, other)
    assert torch.equal(pad_packed_sequence(a)[1], pad_packed_sequence(b)[1])


@every_case
def test_clip_recurrent_grad(name, options):
    """That of every layer; with an infinite limit, or where nothing flows back, torch's results."""
    ours, theirs = pair(name, options | {"clip_recurrent_grad": float("inf")})
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert_same(ours, theirs, x.transpose(0, 1) if ours.batch_first else x)
    ours, theirs = pair(name, options | {"clip_recurrent_grad": 1e-3})
    one = (1, B, I) if not ours.batch_first else (B, 1, I)
    assert_same(ours, theirs, torch.randn(one, dtype=torch.float64))
    hx = [s.requires_grad_() for s in flat(hx_for(ours, name, (B,)))]
    y, _ = ours(x.transpose(0, 1) if ours.batch_first else x, hx if name == "LSTM" else hx[0])
    for d in torch.autograd.grad(1000 * y.sum(), hx):
        assert d.abs().amax().item() == 1e-3


@every_kind
def test_clip_recurrent_grad_of_padded_and_packed_rows_is_the_same(name, options):
    module = getattr(fnn, name)(I, H, 2, **options, bidirectional=True, clip_recurrent_grad=1e-3)
    module.double()
    packed = ragged()
    x, lengths = pad_packed_sequence(packed)
    y, _ = pad_packed_sequence(module(packed)[0])
    together = torch.autograd.grad(y.sum(), list(module.parameters()))
    rows = [module(x[:n, b : b + 1])[0].sum() for b, n in enumerate(lengths)]
    alone = torch.autograd.grad(sum(rows), list(module.parameters()))
    for a, b in zip(together, alone, strict=True):
        assert_close(a, b, grad=True)


@every_kind
def test_clip_recurrent_grad_is_kept_and_shown(name, options):
    module = getattr(fnn, name)(I, H, 2, **options, dropout=0.5, clip_recurrent_grad=1e-3)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for one in (module, *copies):
        assert one.clip_recurrent_grad == 1e-3
        assert repr(one).endswith("clip_recurrent_grad=0.001)")
        h0 = [s.float().requires_grad_() for s in flat(hx_for(one, name, (B,)))]
        y, _ = one(torch.randn(T, B, I), h0 if name == "LSTM" else h0[0])
        assert torch.autograd.grad(1e6 * y.sum(), h0)[0].abs().amax() == h0[0].new_tensor(1e-3)
    assert "clip" not in repr(getattr(fnn, name)(I, H, **options))
    for limit, error in ((0, ValueError), (-1.0, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match=f"^{name}: clip_recurrent_grad must be > 0, got {limit}$"):
            getattr(fnn, name)(I, H, **options, clip_recurrent_grad=limit)
    with pytest.raises(TypeError, match=f"^{name}: clip_recurrent_grad must be a number > 0"):
        getattr(fnn, name)(I, H, **options, clip_recurrent_grad="1")


@every_kind
def test_float32(name, options):
    ours, theirs = pair(name, options, torch.float32, size=(33, 17))
    x = torch.randn(T, B, 33)
    reference = copy.deepcopy(theirs).double()(x.double())
    for mine, ref, peer in zip(flat(ours(x)), flat(reference), flat(theirs(x)), strict=True):
        assert_close(mine, ref, peer)


@every_case
def test_parameters_are_torchs(name, options):
    torch.manual_seed(3)
    ours = getattr(fnn, name)(I, H, **options)
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(I, H, **options)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[k], other[k]) for k in mine)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(other)
    theirs.load_state_dict(mine)
    assert isinstance(ours, torch.nn.RNNBase)


def test_constructors_take_torchs_positions():
    assert fnn.RNN(I, H, 2, "relu", False, True).nonlinearity == "relu"
    lstm = fnn.LSTM(I, H, 2, False, True, 0.5, True, 2)
    assert (lstm.num_layers, lstm.bias, lstm.batch_first) == (2, False, True)
    assert (lstm.dropout, lstm.bidirectional, lstm.proj_size) == (0.5, True, 2)
    assert fnn.LSTM(I, H, dtype=torch.float64).weight_ih_l0.dtype == torch.float64


WRONG_CONSTRUCTORS = {
    "nonlinearity": ("RNN", (I, H), {"nonlinearity": "gelu"}),
    "rnn-projection": ("RNN", (I, H), {"proj_size": 2}),
    "gru-projection": ("GRU", (I, H), {"proj_size": 2}),
    "projection-too-large": ("LSTM", (I, H), {"proj_size": H}),
    "projection-negative": ("LSTM", (I, H), {"proj_size": -1}),
    "hidden-zero": ("LSTM", (I, 0), {}),
    "hidden-float": ("GRU", (I, 4.0), {}),
    "layers-zero": ("GRU", (I, H), {"num_layers": 0}),
    "bias-int": ("GRU", (I, H), {"bias": 1}),
    "dropout-two": ("GRU", (I, H), {"dropout": 2.0}),
    "no-sizes": ("LSTM", (), {}),
}


@pytest.mark.parametrize("name, args, options", WRONG_CONSTRUCTORS.values(), ids=WRONG_CONSTRUCTORS)
def test_constructor_errors_are_torchs(name, args, options):
    raised = []
    for library in (fnn, torch.nn):
        with pytest.raises(Exception) as error:
            getattr(library, name)(*args, **options)
        raised.append(error.value)
    assert type(raised[0]) is type(raised[1])
    assert name != "RNN" or str(raised[0]) == str(raised[1])


WRONG_CALLS = {
    "rank-4": lambda m, hx: m(torch.zeros(1, 1, 1, I)),
    "rank-1": lambda m, hx: m(torch.zeros(I)),
    "no-steps": lambda m, hx: m(torch.zeros(0, B, I)),
    "input-size": lambda m, hx: m(torch.zeros(T, B, I + 1)),
    "float64-input": lambda m, hx: m(torch.zeros(T, B, I, dtype=torch.float64)),
    "integer-input": lambda m, hx: m(torch.zeros(T, B, I, dtype=torch.int64)),
    "hx-rank-2": lambda m, hx: m(torch.zeros(T, B, I), hx(1, H)),
    "hx-rank-3": lambda m, hx: m(torch.zeros(T, I), hx(1, 1, H)),
    "hx-batch": lambda m, hx: m(torch.zeros(T, B, I), hx(1, B + 1, H)),
    "hx-size": lambda m, hx: m(torch.zeros(T, B, I), hx(1, B, H + 1)),
    "hx-float64": lambda m, hx: m(torch.zeros(T, B, I), hx(1, B, H, dtype=torch.float64)),
    "packed-hx-batch": lambda m, hx: m(ragged(torch.float32), hx(1, 2, H)),
    "hx-half": lambda m, hx: m(torch.zeros(T, B, I), (torch.zeros(1, B, H), None)),
    "list": lambda m, hx: m([1.0]),
}


def raised_by(module, call, name):
    """The error of a wrong call, the same with gradients and without."""
    found = []
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(Exception) as error:
            call(module, lambda *shape, **k: states(name, *shape, **{"dtype": torch.float32} | k))
        found.append(error.value)
    assert type(found[0]) is type(found[1]) and str(found[0]) == str(found[1])
    return type(found[0])


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS)
@every_kind
def test_forward_errors_are_torchs(name, options, call):
    ours, theirs = pair(name, options, torch.float32)
    assert raised_by(ours, call, name) is raised_by(theirs, call, name)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@every_case
def test_inference_goes_the_short_way_to_the_bits_of_training(name, options, given, monkeypatch):
    module, _ = pair(name, options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    hx = hx_for(module, name, (B if not module.batch_first else T,)) if given else None
    expected = [t.detach() for t in flat(module(x, hx))]
    monkeypatch.delattr(recurrent_nn.Layers, "_forward_checked")
    with torch.no_grad():
        for _ in range(2):
            found = flat(module(x, hx))
            assert all(map(torch.equal, found, expected))
            assert [t.stride() for t in found] == [t.stride() for t in expected]


@every_kind
def test_empty_batch(name, options):
    x = torch.zeros(T, 0, I, dtype=torch.float64)
    ours, theirs = (flat(module(x)) for module in pair(name, options))
    assert [a.shape for a in ours] == [a.shape for a in theirs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_half_precision_is_refused(name, options, dtype):
    module = getattr(fnn, name)(I, H, **options).to(dtype)
    with pytest.raises(TypeError, match=r"float32 or float64 on the CPU, got b?float16"):
        module(torch.zeros(T, B, I, dtype=dtype))
    module.to(torch.float32)(torch.zeros(T, B, I))


@every_kind
def test_dropout_between_layers(name, options):
    options = options | {"num_layers": 3, "bidirectional": True, "dropout": 0.5}
    ours, theirs = pair(name, options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(flat(module(x)))
    for mine, other in zip(*results, strict=True):
        assert_close(mine, other)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval(), theirs.eval()
    assert_same(ours, theirs, x)
    packed = ragged()
    ours.train()
    assert not torch.equal(ours(packed)[0].data, ours(packed)[0].data)


def test_dropout_of_one_layer_warns():
    for library in (torch.nn, fnn):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            library.LSTM(I, H, dropout=0.5)


def by_optimizer(module, x):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    with torch.enable_grad():
        flat(module(x))[0].sum().backward()
    optimizer.step()


def by_swapped_data(module, x):
    """Another tensor of the same shape and, in all likelihood, address."""
    w = next(module.parameters())
    w.data = w.data * 2


def by_transposed_data(module, x):
    w = module.weight_hh_l0
    w.data = w.data[:H].T if w.shape[0] == H else w.data.T.contiguous().T * 2


def by_setattr(module, x):
    module.weight_ih_l0 = torch.nn.Parameter(torch.ones_like(module.weight_ih_l0))


def by_pruning(module, x):
    prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)


def by_parametrization(module, x):
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)


def by_numpy(module, x):
    module.weight_ih_l0.detach().numpy()[...] *= 2


CHANGES = {
    "optimizer": by_optimizer,
    "load_state_dict": lambda m, x: m.load_state_dict(
        {k: v + 1 for k, v in m.state_dict().items()}
    ),
    "assign": lambda m, x: m.load_state_dict(
        {k: v + 1 for k, v in m.state_dict().items()}, assign=True
    ),
    "data": by_swapped_data,
    "data-in-place": lambda m, x: m.bias_hh_l0.data.mul_(3),
    "data-one-element": lambda m, x: m.weight_hh_l0.data.view(-1)[-1:].add_(1e-9),
    "data-strides": by_transposed_data,
    "no-grad-in-place": lambda m, x: m.weight_ih_l0.detach().add_(1),
    "numpy": by_numpy,
    "setattr": by_setattr,
    "reset_parameters": lambda m, x: m.reset_parameters(),
    "prune": by_pruning,
    "weight_norm": by_parametrization,
    "to": lambda m, x: m.to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@every_kind
def test_every_change_of_a_weight_is_noticed(name, options, change):
    ours, theirs = pair(name, options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    with torch.no_grad():
        before = ours(x)[0]
        change(ours, x)
        after = ours(x)[0]
        fresh = {k: getattr(ours, k) for k in theirs.state_dict()}
        theirs.load_state_dict(fresh)
        assert_close(after, theirs(x)[0])
    assert not torch.equal(before, after)


@every_kind
def test_weights_are_packed_once(name, options, monkeypatch):
    from fastseq import _stack

    packs, real = [], _stack.pack
    monkeypatch.setattr(_stack, "pack", lambda *a: packs.append(1) or real(*a))
    module = getattr(fnn, name)(I, H, **options)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        results = [module(x)[0] for _ in range(3)]
        assert len(packs) == 1
        module.bias_ih_l0.data.add_(1)
        module(x), module(x)
        assert len(packs) == 2
    assert torch.equal(results[0], results[2])


@every_kind
def test_functional_call(name, options):
    ours, theirs = pair(name, options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    other = {k: torch.randn_like(v).requires_grad_() for k, v in ours.named_parameters()}
    call = torch.func.functional_call
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            before = ours(x)[0]
            assert_close(call(ours, other, (x,))[0], call(theirs, other, (x,))[0])
            assert torch.equal(ours(x)[0], before)
    call(ours, other, (x,))[0].sum().backward()
    assert all(v.grad is not None for v in other.values())
    assert all(p.grad is None for p in ours.parameters())


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
@every_kind
def test_clones(name, options, clone):
    module, _ = pair(name, options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)[0]
        twin = clone(module)
        assert torch.equal(twin(x)[0], expected)
        twin.weight_ih_l0.data.zero_()
        assert not torch.equal(twin(x)[0], expected)
        assert torch.equal(module(x)[0], expected)
    assert list(twin.state_dict()) == list(module.state_dict())
    twin.flatten_parameters()


@pytest.mark.parametrize("layout", ["plain", "stack", "dropout"])
@every_kind
def test_compile_fullgraph(name, options, layout):
    torch._dynamo.reset()
    extra = {"num_layers": 2, "dropout": 0.5} if layout == "dropout" else LAYOUTS[layout]
    module, _ = pair(name, options | extra)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = hx_for(module, name, (B,))
    results = []
    for function in (module, compiled):
        torch.manual_seed(1)
        out = flat(function(x, hx))
        loss = sum(a.sin().sum() for a in out)
        results.append([*out, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced) if layout != "dropout" else eager.shape == traced.shape
    with torch.no_grad():
        module.eval()
        assert torch.equal(compiled(x, hx)[0], module(x, hx)[0])


def test_compiled_module_runs_new_lengths():
    torch._dynamo.reset()
    module = fnn.GRU(I, H)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (3, 5, 11):
        x = torch.randn(steps, 2, I)
        assert torch.equal(compiled(x)[0], module(x)[0])


@pytest.mark.parametrize("batch", [(B,), ()], ids=["batched", "unbatched"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@every_cell
def test_cells(name, options, batch, given):
    ours, theirs = pair(name, options)
    x = torch.randn(*batch, I, dtype=torch.float64)
    assert_same(ours, theirs, x, states(name, *batch, H) if given else None)
    assert isinstance(ours, getattr(torch.nn, name))
    with torch.no_grad():
        ours(x)
        ours.weight_hh.data.zero_(), ours.weight_ih.data.zero_()
        theirs.load_state_dict(ours.state_dict())
        for mine, other in zip(flat(ours(x)), flat(theirs(x)), strict=True):
            assert_close(mine, other)


@every_cell
def test_cell_parameters_are_torchs(name, options):
    torch.manual_seed(3)
    ours = getattr(fnn, name)(I, H, **options)
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(I, H, **options)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[k], other[k]) for k in mine)
    assert repr(ours) == repr(theirs)


WRONG_STEPS = {
    "rank-3": lambda m, hx: m(torch.zeros(1, B, I)),
    "hx-rank-3": lambda m, hx: m(torch.zeros(B, I), hx(1, B, H)),
    "input-size": lambda m, hx: m(torch.zeros(B, I + 1)),
    "hx-batch": lambda m, hx: m(torch.zeros(B, I), hx(B + 1, H)),
    "hx-size": lambda m, hx: m(torch.zeros(B, I), hx(B, H + 1)),
    "hx-rank-1": lambda m, hx: m(torch.zeros(B, I), hx(H)),
    "hx-rank-2": lambda m, hx: m(torch.zeros(I), hx(1, H)),
    "hx-float64": lambda m, hx: m(torch.zeros(B, I), hx(B, H, dtype=torch.float64)),
    "float64-input": lambda m, hx: m(torch.zeros(B, I, dtype=torch.float64)),
    "integer-input": lambda m, hx: m(torch.zeros(B, I, dtype=torch.int64)),
}


@pytest.mark.parametrize("call", WRONG_STEPS.values(), ids=WRONG_STEPS)
@every_cell
def test_cell_errors_are_torchs(name, options, call):
    ours, theirs = pair(name, options, torch.float32)
    assert raised_by(ours, call, name) is raised_by(theirs, call, name)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@every_cell
def test_a_step_of_inference_goes_the_short_way(name, options, given, monkeypatch):
    module, _ = pair(name, options)
    x, hx = torch.randn(B, I, dtype=torch.float64), states(name, B, H) if given else None
    expected = [t.detach() for t in flat(module(x, hx))]
    monkeypatch.setattr(cells_nn, "run_step", None)
    with torch.no_grad():
        assert all(map(torch.equal, flat(module(x, hx)), expected))


@every_cell
def test_compiled_cell(name, options):
    torch._dynamo.reset()
    module, _ = pair(name, options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, hx = torch.randn(B, I, dtype=torch.float64), states(name, B, H)
    for eager, traced in zip(flat(module(x, hx)), flat(compiled(x, hx)), strict=True):
        assert torch.equal(eager, traced)


@every_kind
def test_no_leak(name, options):
    """The process grows by less than 1 MiB over many calls of all sorts."""
    resource = pytest.importorskip("resource")
    module = getattr(fnn, name)(I, H, **options)
    x, packed = torch.randn(T, B, I), ragged(torch.float32)

    def work(rounds):
        for _ in range(rounds):
            with torch.no_grad():
                module(x)
                module.bias_ih_l0.data.add_(0.001)
            flat(module(x))[0].sum().backward()
            flat(module(packed))[0].sum().backward()

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    work(200)
    before = peak()
    work(600)
    assert peak() - before < 1024
