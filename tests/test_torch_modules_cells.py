"""fastseq.torch.nn's recurrent cells against torch.nn's: the same parameters, steps, errors."""

import pytest
from tolerance import assert_close

torch = pytest.importorskip("torch")

from torch_modules_running import B, H, I, assert_same, flat, pair, raised_by, states  # noqa: E402

import fastseq.torch.nn as fnn  # noqa: E402
from fastseq.torch import cells_nn  # noqa: E402

CELLS = {
    "tanh": ("RNNCell", {}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
    "gru": ("GRUCell", {}),
    "lstm": ("LSTMCell", {}),
    "lstm-nobias": ("LSTMCell", {"bias": False}),
}

every_cell = pytest.mark.parametrize("name, options", CELLS.values(), ids=CELLS)


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
