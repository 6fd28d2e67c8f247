"""What the tests of fastseq.torch.nn's recurrent modules share: the cases, and torch.nn's module
beside ours with the same parameters."""

import pytest
import torch
from tolerance import assert_close
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastseq.torch.nn as fnn

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

every_case = pytest.mark.parametrize("name, options", CASES.values(), ids=CASES)
every_kind = pytest.mark.parametrize("name, options", KINDS.values(), ids=KINDS)


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


def raised_by(module, call, name):
    """The error of a wrong call, the same with gradients and without."""
    found = []
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(Exception) as error:
            call(module, lambda *shape, **k: states(name, *shape, **{"dtype": torch.float32} | k))
        found.append(error.value)
    assert type(found[0]) is type(found[1]) and str(found[0]) == str(found[1])
    return type(found[0])
