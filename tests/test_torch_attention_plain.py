"""Calls of q, k, v and lengths alone, given to the kernels by address: the bits of other calls."""

import pytest
from running import PoisonedNumpy, assert_same_bits

import fastseq

torch = pytest.importorskip("torch")

import fastseq.torch as ft  # noqa: E402
from fastseq import _attend_plain  # noqa: E402
from fastseq.torch import attention_ops, attention_plain  # noqa: E402

B, NH, NK, L, S, D = 2, 4, 2, 3, 11, 5
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, None), "causal": "bottom_right"},
    "numbers": {"scale": -0.3, "softcap": 2.0},
    "lengths": {"kv_lengths": torch.tensor([7, 0]), "causal": "bottom_right"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def rows_first(a):
    """In memory (B, rows, heads, columns)."""
    return a.transpose(1, 2).contiguous().transpose(1, 2)


def padded(a):
    """A part of a wider array, as a cache's keys."""
    return torch.cat([a, a], 2)[:, :, : a.shape[2]]


LAYOUTS = {
    "contiguous": lambda a: a,
    "rows-first": rows_first,
    "padded": padded,
    "one-batch": lambda a: a[:1].expand(a.shape),
}
NUMBERS = (None, None, None, None, None, 0.0, None)  # of the operators
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(_attend_plain, "np", PoisonedNumpy())


def draw(rows, heads, columns=D):
    return torch.randn(B, heads, rows, columns)


def call_of(layout, queries=L):
    return layout(draw(queries, NH)), layout(draw(S, NK)), layout(draw(S, NK, D + 1))


def by_arrays(q, k, v, do, options):
    """o, lse and the gradients from the NumPy functions."""
    arrays = {n: a.numpy() if isinstance(a, torch.Tensor) else a for n, a in options.items()}
    given = [a.detach().numpy() for a in (q, k, v)]
    (o, lse), pull = fastseq.vjp(fastseq.attention, *given, **arrays, return_lse=True)
    grads = zip(("dq", "dk", "dv"), pull((do.numpy(), None)), strict=True)
    return {"o": o, "lse": lse, **dict(grads)}


@pytest.fixture
def only_addresses(monkeypatch):
    def arrays(*_):
        raise AssertionError("went by arrays")

    monkeypatch.setattr(attention_ops, "array", arrays)


@every_option
@every_layout
@pytest.mark.parametrize("queries", [1, L])
def test_addresses_give_the_bits_of_arrays(queries, layout, options, only_addresses):
    q, k, v = (a.requires_grad_() for a in call_of(layout, queries))
    o, lse = ft.attention(q, k, v, **options, return_lse=True)
    do = torch.empty_strided(o.shape, o.stride()).normal_()
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    inferred = ft.attention(q.detach(), k.detach(), v.detach(), **options)
    expected = by_arrays(q, k, v, do, options)
    for output in (o.detach(), inferred):
        assert_same_bits({"o": output.numpy()}, {"o": expected["o"]})
    found = {"lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}
    assert_same_bits({n: a.numpy() for n, a in found.items()}, {n: expected[n] for n in found})
    _attend_plain.np.assert_guards()


def test_what_has_to_be_copied_or_resolved_goes_by_arrays():
    q, k, v = call_of(lambda a: a)
    expected = ft.attention(q, k, v)
    strided = torch.stack([q, q], -1)[..., 0]
    assert torch.equal(ft.attention(strided, k, v), expected)
    lengths = torch.full((2 * B,), S)[::2]
    for given in (lengths, lengths.int()):
        assert torch.equal(ft.attention(q, k, v, kv_lengths=given), expected)
    with pytest.raises(RuntimeError, match="negative bit"):
        ft.attention(torch._neg_view(-q), k, v)


ERRORS = {
    "causal": (ValueError, "causal must be", {"causal": "left"}),
    "window": (ValueError, "window must be", {"window": (2.0, None)}),
    "scale": (TypeError, "scale must be", {"scale": -0.3 + 0j}),
    "softcap": (ValueError, "softcap must be positive", {"softcap": 0.0}),
    "dropout": (TypeError, "dropout_p must be", {"dropout_p": None}),
    "lengths": (ValueError, "kv_lengths must be in 0", {"kv_lengths": torch.tensor([7, S + 1])}),
    "negative": (ValueError, "kv_lengths must be in 0", {"kv_lengths": torch.tensor([-1, 0])}),
    "few": (ValueError, "kv_lengths must be", {"kv_lengths": torch.tensor([7])}),
    "floats": (TypeError, "kv_lengths must be", {"kv_lengths": torch.tensor([7.0, 0.0])}),
}


@pytest.mark.parametrize("error, match, options", ERRORS.values(), ids=ERRORS)
def test_what_was_right_before_is_not_taken_for_what_is_wrong_now(error, match, options):
    q, k, v = call_of(lambda a: a)
    for right in OPTIONS.values():
        ft.attention(q, k, v, **right)
    with pytest.raises(error, match=match):
        ft.attention(q, k, v, **options)


def test_operator_refuses_halves_and_other_results():
    q, k, v = (a.half() for a in call_of(lambda a: a))
    none = (None,) * 11
    with pytest.raises(TypeError, match="float16"):
        torch.ops.fastseq.attention(q, k, v, *none, 0.0, None)
    q, k, v = call_of(lambda a: a)
    o, lse = ft.attention(q, k, v, return_lse=True)
    do = torch.ones_like(o)
    expected = attention_plain.backward((q, k, v, *(None,) * 6), (o, lse, do, None), NUMBERS)
    turned = rows_first(o), rows_first(lse.unsqueeze(-1)).squeeze(-1), rows_first(do)
    for results in ((turned[0], lse, do), (o, turned[1], do), (o, lse, turned[2])):
        given = (q, k, v, *(None,) * 6), (*results, None), NUMBERS
        assert attention_plain.backward(*given) is None
        grads = torch.ops.fastseq.attention_bwd(*given[0], *given[1], *NUMBERS, False)
        for grad, wanted in zip(grads, expected, strict=False):
            assert torch.equal(grad, torch.from_numpy(wanted))


def test_a_window_is_read_at_every_call():
    q = torch.randn(1, 2, 9, 4)
    side = torch.tensor(3)
    wide = fastseq.torch.attention(q, q, q, window=(side, 0))
    side.fill_(0)
    narrow = fastseq.torch.attention(q, q, q, window=(side, 0))
    assert torch.equal(narrow, fastseq.torch.attention(q, q, q, window=(0, 0)))
    assert not torch.equal(narrow, wide)
