"""fastseq.torch.replace: torch.nn's modules of a model become ours in place, the rest is named."""

import copy

import pytest
from tolerance import assert_close

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_modules_running import H, I, every_case, flat, ragged, states  # noqa: E402

import fastseq.torch  # noqa: E402
import fastseq.torch.nn as fnn  # noqa: E402


class Tagger(nn.Module):
    """Every kind of module once, one of them used twice."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        options = {"dtype": dtype}
        self.encoder = nn.Sequential(nn.Linear(I, H, **options), nn.ReLU())
        self.lstm = nn.LSTM(H, H, num_layers=2, batch_first=True, bidirectional=True, **options)
        self.gru = nn.GRU(2 * H, H, batch_first=True, **options)
        self.rnn = nn.RNN(H, H, nonlinearity="relu", batch_first=True, **options)
        self.attention = nn.MultiheadAttention(H, 2, batch_first=True, **options)
        self.cells = nn.ModuleList(
            [nn.LSTMCell(H, H, **options), nn.GRUCell(H, H, **options), nn.RNNCell(H, H, **options)]
        )
        self.again = self.rnn

    def forward(self, x):
        x, _ = self.lstm(self.encoder(x))
        x, _ = self.gru(x)
        x, _ = self.again(self.rnn(x)[0])
        x, _ = self.attention(x, x, x, need_weights=False)
        h, _ = self.cells[0](x[:, 0])
        return self.cells[2](self.cells[1](h))


def gradients(model, x):
    y = model(x)
    loss = (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_same_gradients(ours, theirs, x):
    for mine, other in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert_close(mine, other, grad=True)


def test_every_kind_is_replaced_in_place():
    model = Tagger()
    theirs, parameters = copy.deepcopy(model), dict(model.named_parameters())
    modules = dict(model.named_modules())
    found = fastseq.torch.replace(model)
    names = ["lstm", "gru", "rnn", "attention", "cells.0", "cells.1", "cells.2"]
    assert found == (names, {})
    for name in names:
        assert model.get_submodule(name) is modules[name]
        assert type(modules[name]).__module__.startswith("fastseq.torch.")
    assert type(model.again) is fnn.RNN
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert_same_gradients(model, theirs, torch.randn(3, 7, I, dtype=torch.float64))


@every_case
def test_a_replaced_layer_is_torch_nns(name, options):
    theirs = getattr(nn, name)(I, H, **options, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    assert fastseq.torch.replace(ours) == ([""], {})
    assert type(ours) is getattr(fnn, name)
    S = ours.num_layers * (1 + ours.bidirectional)
    hx = states(name, S, 4, H, projection=ours.proj_size)
    x = ragged()
    for mine, other in zip(flat(ours(x, hx)), flat(theirs(x, hx)), strict=True):
        assert_close(mine, other)
    with torch.no_grad():
        for mine, other in zip(flat(ours(x, hx)), flat(theirs(x, hx)), strict=True):
            assert_close(mine, other)


def test_a_second_call_finds_nothing():
    model = Tagger()
    fastseq.torch.replace(model)
    assert fastseq.torch.replace(model) == ([], {})


def test_what_the_constructor_adds_is_off():
    lstm, attention = nn.LSTM(I, H), nn.MultiheadAttention(H, 2)
    for module in (lstm, attention):
        fastseq.torch.replace(module)
    assert repr(lstm) == repr(fnn.LSTM(I, H))
    assert lstm.clip_recurrent_grad is None
    assert attention.score_mod is None


def test_optimizer_hooks_and_mode_stay():
    model, x = Tagger(), torch.randn(3, 7, I, dtype=torch.float64)
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    model.gru.register_forward_hook(lambda module, *_: seen.append(module))
    model.eval()
    fastseq.torch.replace(model)
    assert not model.lstm.training
    model(x).square().sum().backward()
    before = model.lstm.weight_hh_l0.detach().clone()
    optimizer.step()
    assert seen == [model.gru]
    assert not torch.equal(before, model.lstm.weight_hh_l0)


def test_copies_of_a_replaced_model_are_independent():
    model, x = Tagger(), torch.randn(3, 7, I, dtype=torch.float64)
    fastseq.torch.replace(model)
    twin = copy.deepcopy(model)
    assert type(twin.lstm) is fnn.LSTM
    with torch.no_grad():
        twin.lstm.weight_hh_l0.zero_()
    theirs = Tagger()
    theirs.load_state_dict(model.state_dict())
    assert_same_gradients(model, theirs, x)


def test_a_transformers_attention_is_replaced():
    layer = nn.TransformerEncoderLayer(H, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64)
    theirs = copy.deepcopy(layer)
    assert fastseq.torch.replace(layer).replaced == ["self_attn"]
    x = torch.randn(3, 7, H, dtype=torch.float64)
    assert_same_gradients(layer, theirs, x)
    for module in (layer, theirs):
        module.eval()
    with torch.no_grad():
        assert_close(layer(x), theirs(x))


class OwnLSTM(nn.LSTM):
    pass


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.GRU(I, H), "weight_hh_l0")


LEFT = {
    "subclass": (lambda: OwnLSTM(I, H), "OwnLSTM is a subclass of torch.nn.LSTM"),
    "parametrized": (parametrized, "ParametrizedGRU is a subclass of torch.nn.GRU"),
    "scripted": (
        lambda: torch.jit.script(nn.LSTM(I, H)),
        "LSTM is torch.jit._script.RecursiveScriptModule, not torch.nn.LSTM",
    ),
    "bfloat16": (
        lambda: nn.MultiheadAttention(H, 2, dtype=torch.bfloat16),
        "fastseq does not run torch.bfloat16 on cpu",
    ),
}


@pytest.mark.parametrize("build, reason", LEFT.values(), ids=LEFT)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
def test_what_is_left_and_why(build, reason):
    model = nn.ModuleDict({"left": build(), "taken": nn.GRUCell(I, H), "none": nn.Linear(I, H)})
    kind = type(model["left"])
    assert fastseq.torch.replace(model) == (["taken"], {"left": reason})
    assert type(model["left"]) is kind


def test_subclasses_of_ours_and_users_classes_of_the_name_are_no_matter():
    class LSTM(nn.Module):
        """A user's wrapper."""

        def __init__(self):
            super().__init__()
            self.inner = nn.LSTM(I, H)

    class Ours(fnn.MultiheadAttention):
        pass

    model = nn.Sequential(LSTM(), Ours(H, 2), fnn.MinGRU(I, H))
    assert fastseq.torch.replace(model) == (["0.inner"], {})


def test_a_model_without_parameters_on_a_device_is_replaced():
    with torch.device("meta"):
        model = Tagger(torch.float32)
    assert len(fastseq.torch.replace(model).replaced) == 7


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"replace: model must be a torch.nn.Module, got dict"):
        fastseq.torch.replace({})
