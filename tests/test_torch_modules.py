"""fastseq.torch.nn's recurrent layers against torch.nn's: the same parameters, results, errors.

What becomes of packed weights stands in test_torch_modules_weights.py, cells in
test_torch_modules_cells.py.
"""

import copy
import pickle

import pytest
from tolerance import assert_close

torch = pytest.importorskip("torch")

from torch.nn.utils.rnn import pad_packed_sequence  # noqa: E402
from torch_modules_running import (  # noqa: E402
    LAYOUTS,
    B,
    H,
    I,
    T,
    assert_same,
    every_case,
    every_kind,
    flat,
    hx_for,
    pair,
    ragged,
    raised_by,
)

import fastseq.torch.nn as fnn  # noqa: E402
from fastseq.torch import recurrent_nn  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


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
