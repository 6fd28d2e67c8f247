"""The packed weights of fastseq.torch.nn's recurrent layers: packed once, every change of a weight
noticed, copies independent."""

import copy
import io
import pickle

import pytest
from tolerance import assert_close

torch = pytest.importorskip("torch")

from torch.nn.utils import prune  # noqa: E402
from torch_modules_running import B, H, I, T, every_kind, flat, pair  # noqa: E402

import fastseq.torch.nn as fnn  # noqa: E402


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
