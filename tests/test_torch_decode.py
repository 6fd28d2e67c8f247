"""fastseq.torch's KVCache and merge_attention: decoding, joined key sets, gradients, errors."""

import numpy as np
import pytest
from tolerance import assert_close

import fastseq
from fastseq.reference import attention as reference

torch = pytest.importorskip("torch")

import fastseq.torch as ft  # noqa: E402

B, NH, NK, D, DV = 3, 4, 2, 5, 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def cache_of(capacity=9):
    return ft.KVCache(B, NK, capacity, D, DV, dtype=torch.float64)


@pytest.mark.parametrize("steps", [(1,) * 9, (4, 1, 1, 3), (9,)], ids=str)
def test_decoding_is_causal_attention(steps):
    q, k, v = draw(B, NH, 9, D), draw(B, NK, 9, D), draw(B, NK, 9, DV)
    cache, outputs, at = cache_of(), [], 0
    for n in steps:
        rows = slice(at, at + n)
        cache.append(k[:, :, rows], v[:, :, rows])
        now = {"kv_lengths": cache.lengths, "causal": "bottom_right"}
        outputs.append(ft.attention(q[:, :, rows], cache.k, cache.v, **now))
        at += n
    expected = reference.attention(q.numpy(), k.numpy(), v.numpy(), causal=True)[0]
    assert_close(torch.cat(outputs, 2), expected)


def test_rows_have_their_own_lengths():
    cache, twin = cache_of(10), fastseq.KVCache(B, NK, 10, D, DV, np.float64)
    for counts in ([2, 0, 4], [4, 4, 4], [0, 1, 1], None):
        n = 1 if counts is None else 4
        k, v = draw(B, NK, n, D), draw(B, NK, n, DV)
        cache.append(k, v, None if counts is None else torch.tensor(counts, dtype=torch.int32))
        twin.append(k.numpy(), v.numpy(), None if counts is None else np.array(counts))
        for name in ("k", "v", "lengths"):
            assert np.array_equal(getattr(cache, name).numpy(), getattr(twin, name)), name
    cache.truncate(torch.tensor([1, 0, 10]))
    assert cache.lengths.tolist() == [1, 0, 10] and cache.lengths.dtype == torch.int64


def test_no_gradient_flows_through_the_cache():
    cache = cache_of()
    cache.append(draw(B, NK, 2, D).requires_grad_(), draw(B, NK, 2, DV).requires_grad_())
    assert not cache.k.requires_grad and not cache.v.requires_grad
    q = draw(B, NH, 1, D).requires_grad_()
    o = ft.attention(q, cache.k, cache.v, kv_lengths=cache.lengths)
    cache.append(draw(B, NK, 1, D), draw(B, NK, 1, DV))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


WRONG = {
    "k-shape": (ValueError, r"k must be \(B, NK, n, D\)", lambda k, v: (k[:2], v)),
    "k-rank": (ValueError, r"k must be \(B, NK, n, D\)", lambda k, v: (k[0], v)),
    "v-shape": (ValueError, r"v must be \(B, NK, n, DV\)", lambda k, v: (k, v[:, :, :1])),
    "dtype": (TypeError, r"k must be torch\.float64", lambda k, v: (k.float(), v)),
    "counts": (ValueError, r"0\.\.n = 0\.\.2, got counts\[1\] = 3", lambda k, v: (k, v, [0, 3, 0])),
    "counts-shape": (ValueError, r"counts must be \(B,\) = \(3,\)", lambda k, v: (k, v, [1])),
    "counts-float": (TypeError, "counts must be integers", lambda k, v: (k, v, [1.0, 1.0, 1.0])),
}


@pytest.mark.parametrize("error, match, given", WRONG.values(), ids=WRONG)
def test_errors_write_nothing(error, match, given):
    cache = cache_of()
    k, v, *counts = given(draw(B, NK, 2, D), draw(B, NK, 2, DV))
    with pytest.raises(error, match=match):
        cache.append(k, v, *(torch.tensor(c) for c in counts))
    assert not cache.k.any() and not cache.v.any() and not cache.lengths.any()


def test_capacity_and_lengths_are_limits():
    cache = cache_of(capacity=3)
    cache.append(draw(B, NK, 2, D), draw(B, NK, 2, DV), torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="capacity = 3, row 1 holds 2 and was given 2"):
        cache.append(draw(B, NK, 2, D), draw(B, NK, 2, DV))
    assert cache.lengths.tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match=r"lengths\[2\] = 2"):
        cache.truncate(torch.tensor([0, 2, 2]))
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32 or torch\.float64"):
        ft.KVCache(1, 1, 1, 1, dtype=torch.float16)


def parts():
    """o1, lse1, o2, lse2 with rows that have keys in both, one or neither part."""
    o1, o2, lse1, lse2 = draw(2, 3, 4), draw(2, 3, 4), draw(2, 3), draw(2, 3)
    lse1[0, 0] = lse1[1] = lse2[0, 0] = lse2[1, 1] = -torch.inf
    o1[lse1 == -torch.inf], o2[lse2 == -torch.inf] = 0, 0
    return [a.requires_grad_() for a in (o1, lse1, o2, lse2)]


def test_merge_meets_the_reference():
    given = parts()
    expected = reference.merge_attention(*(a.detach().numpy() for a in given))
    for ours, ref in zip(ft.merge_attention(*given), expected, strict=True):
        assert_close(ours, ref)
    given[0].data[given[1] == -torch.inf] = torch.nan  # not read
    for ours, ref in zip(ft.merge_attention(*given), expected, strict=True):
        assert_close(ours, ref)


def test_merge_in_float32():
    given = [a.detach().float() for a in parts()]
    wide = [a.double().numpy() for a in given]
    expected = reference.merge_attention(*wide)
    peers = fastseq.merge_attention(*(a.numpy() for a in given))
    for ours, ref, peer in zip(ft.merge_attention(*given), expected, peers, strict=True):
        assert_close(ours, ref, peer)


def test_merge_gradcheck_of_both_orders():
    def function(*given):
        o, lse = ft.merge_attention(*given)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, parts(), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(function, parts(), nondet_tol=0.0)


def test_merged_halves_are_the_whole_with_gradients():
    q, k, v = (
        a.requires_grad_() for a in (draw(B, NH, 4, D), draw(B, NK, 8, D), draw(B, NK, 8, DV))
    )
    mask = torch.rand(4, 8) < 0.5
    mask[1], mask[2, :5] = False, False

    def half(keys):
        given = (q, k[:, :, keys], v[:, :, keys])
        return ft.attention(*given, mask=mask[:, keys], return_lse=True)

    whole = ft.attention(q, k, v, mask=mask, return_lse=True)
    merged = ft.merge_attention(*half(slice(5)), *half(slice(5, 8)))
    cotangents = [torch.randn_like(a) for a in whole]
    grads = [torch.autograd.grad(r, (q, k, v), cotangents) for r in (merged, whole)]
    for mine, other in zip((*merged, *grads[0]), (*whole, *grads[1]), strict=True):
        assert_close(mine, other.detach(), grad=True)


def test_merge_compiles():
    torch._dynamo.reset()
    given = parts()
    compiled = torch.compile(ft.merge_attention, fullgraph=True, backend="aot_eager")
    for ours, ref in zip(compiled(*given), ft.merge_attention(*given), strict=True):
        assert torch.equal(ours, ref)


def test_merge_errors():
    o1, lse1, o2, lse2 = parts()
    with pytest.raises(TypeError, match="lse2 must be float64 as o1 is, got float32"):
        ft.merge_attention(o1, lse1, o2, lse2.float())
    with pytest.raises(ValueError, match=r"lse1 must be \(\.\.\.\) = \(2, 3\), got \(2,\)"):
        ft.merge_attention(o1, lse1[:, 0], o2, lse2)
    with pytest.raises(TypeError, match="o1 must be float32 or float64, got float16"):
        ft.merge_attention(o1.half(), lse1, o2, lse2)
    with pytest.raises(TypeError, match=r"o2 must be a torch\.Tensor, got ndarray"):
        ft.merge_attention(o1, lse1, o2.detach().numpy(), lse2)
