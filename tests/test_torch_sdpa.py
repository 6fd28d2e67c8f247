"""fastseq.torch.scaled_dot_product_attention against torch.nn.functional's: one contract."""

import pytest
from tolerance import assert_close

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

import fastseq.torch as ft  # noqa: E402
from fastseq.torch import attention_sdpa  # noqa: E402

BOTH = (ft.scaled_dot_product_attention, F.scaled_dot_product_attention)
B, H, L, S, E = 2, 3, 5, 7, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def tensors(q=(B, H, L, E), k=(B, H, S, E), v=(B, H, S, E), dtype=torch.float64):
    return [draw(*shape, dtype=dtype) for shape in (q, k, v)]


def boolean(*shape):
    mask = torch.rand(shape) < 0.7
    mask[..., 0, :] = False  # a row without a key
    return mask


def additive(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).masked_fill(torch.rand(shape) < 0.2, -torch.inf)


def assert_same(args, options):
    """Equal values, and equal gradients of every float, in float64."""

    def solve(function):
        leaves = [a.detach().clone().requires_grad_() for a in args]
        given, mask = dict(options), options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            given["attn_mask"] = mask.detach().clone().requires_grad_()
            leaves.append(given["attn_mask"])
        o = function(*leaves[:3], **given)
        cotangent = torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape)
        return o, torch.autograd.grad((o * cotangent).sum(), leaves)

    (ours, grads), (ref, ref_grads) = solve(BOTH[0]), solve(BOTH[1])
    assert_close(ours, ref, name="o")
    for mine, other in zip(grads, ref_grads, strict=True):
        if mine.dtype == torch.float64:
            assert_close(mine, other, grad=True)


def shapes(*leading, q=(L, E), k=(S, E), v=(S, E)):
    return [(*leading, *shape) for shape in (q, k, v)]


SHAPES = {
    "2d": (shapes(), {}),
    "3d": (shapes(3), {}),
    "4d": (shapes(B, H), {}),
    "5d": (shapes(2, 3, 2), {}),
    "6d": (shapes(2, 1, 3, 2), {}),
    "values-wider": (shapes(B, H, v=(S, 6)), {}),
    "broadcast-batch": ([(B, H, L, E), (1, H, S, E), (H, S, E)], {}),
    "broadcast-keys-heads": ([(B, H, L, E), (B, 1, S, E), (B, 1, S, E)], {}),
    "broadcast-values-heads": ([(B, H, L, E), (B, H, S, E), (B, 1, S, E)], {}),
    "broadcast-queries": ([(1, 1, L, E), (B, H, S, E), (B, H, S, E)], {}),
    "broadcast-all": ([(B, H, L, E), (1, H, S, E), (B, 1, S, E)], {}),
    "broadcast-5d": ([(2, 1, H, L, E), (1, 3, 1, S, E), (2, 3, H, S, E)], {}),
    "2d-queries": ([(L, E), (H, S, E), (H, S, E)], {}),
    "3d-queries": ([(H, L, E), (B, H, S, E), (B, H, S, E)], {}),
    "gqa": ([(B, 6, L, E), (B, 2, S, E), (B, 2, S, E)], {"enable_gqa": True}),
    "gqa-3d": ([(6, L, E), (3, S, E), (3, S, E)], {"enable_gqa": True}),
    "gqa-5d": ([(2, 2, 6, L, E), (2, 2, 2, S, E), (2, 2, 2, S, E)], {"enable_gqa": True}),
    "gqa-uneven": ([(B, 6, L, E), (B, 2, S, E), (B, 3, S, E)], {"enable_gqa": True}),
    "gqa-broadcast": ([(B, 6, L, E), (1, 2, S, E), (1, 2, S, E)], {"enable_gqa": True}),
    "scale": (shapes(B, H), {"scale": 0.3}),
    "scale-negative": (shapes(B, H), {"scale": -1.0}),
    "scale-0": (shapes(B, H), {"scale": 0.0}),
    "causal": (shapes(B, H), {"is_causal": True}),
    "causal-long": (shapes(B, H, q=(9, E)), {"is_causal": True}),
    "causal-5d": (shapes(2, 2, 2), {"is_causal": True}),
}


@pytest.mark.parametrize("sizes, options", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(sizes, options):
    assert_same(tensors(*sizes), options)


MASKS = {
    "LxS": ((B, H), (L, S)),
    "1xS": ((B, H), (1, S)),
    "HxLxS": ((B, H), (H, L, S)),
    "1xLxS": ((B, H), (1, L, S)),
    "Bx1x1xS": ((B, H), (B, 1, 1, S)),
    "BxHxLxS": ((B, H), (B, H, L, S)),
    "Bx1xLxS": ((B, H), (B, 1, L, S)),
    "2d-LxS": ((), (L, S)),
    "3d-LxS": ((3,), (L, S)),
    "3d-3xLxS": ((3,), (3, L, S)),
    "3d-3x1xS": ((3,), (3, 1, S)),
    "5d-LxS": ((2, 3, 2), (L, S)),
    "5d-HxLxS": ((2, 3, 2), (2, L, S)),
    "5d-BxHxLxS": ((2, 3, 2), (3, 2, L, S)),
    "5d-Ax1x1x1xS": ((2, 3, 2), (2, 1, 1, 1, S)),
    "5d-1x1x1xLxS": ((2, 3, 2), (1, 1, 1, L, S)),
    "5d-all": ((2, 3, 2), (2, 3, 2, L, S)),
}


@pytest.mark.parametrize("make", [boolean, additive])
@pytest.mark.parametrize("leading, shape", MASKS.values(), ids=MASKS)
def test_masks(leading, shape, make):
    assert_same(tensors(*shapes(*leading)), {"attn_mask": make(*shape)})


def test_mask_of_whole_rows():
    """A number for a whole row moves nothing; its gradient is the rounding error of 0."""
    args = tensors()
    for mask in (torch.rand(L, 1) < 0.6, additive(L, 1)):
        assert_close(BOTH[0](*args, mask), BOTH[1](*args, mask))


def test_what_broadcasts_is_not_expanded(monkeypatch):
    seen, real = [], attention_sdpa.attention

    def spy(q, k, v, *, mask, **options):
        seen.append((k.shape[1], v.shape[1], tuple(mask.shape)))
        return real(q, k, v, mask=mask, **options)

    monkeypatch.setattr(attention_sdpa, "attention", spy)
    sizes = shapes(2, 3, 4)
    BOTH[0](*tensors(*sizes), boolean(1, 1, 1, L, S))
    BOTH[0](*tensors(sizes[0], *((2, 3, 1, *size[-2:]) for size in sizes[1:])), boolean(L, S))
    assert seen == [(4, 4, (1, 1, L, S)), (1, 1, (1, 1, L, S))]


def test_float32_mask_on_float64():
    assert_same(tensors(), {"attn_mask": additive(L, S, dtype=torch.float32)})


def test_rows_without_a_key_are_0_and_give_no_gradient():
    for empty in (torch.zeros(L, S) > 0, torch.full((L, S), -torch.inf, dtype=torch.float64)):
        leaves = [a.requires_grad_() for a in tensors()]
        o = BOTH[0](*leaves, empty)
        assert not o.any()
        assert not any(g.any() for g in torch.autograd.grad(o.sum(), leaves))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
def test_float32(options):
    args = tensors((2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 16), dtype=torch.float32)
    ref = BOTH[1](*(a.double() for a in args), **options)
    assert_close(BOTH[0](*args, **options), ref, BOTH[1](*args, **options))


EMPTY = {
    "L": (shapes(B, H, q=(0, E)), {}),
    "S": (shapes(B, H, k=(0, E), v=(0, E)), {}),
    "S-causal": (shapes(B, H, k=(0, E), v=(0, E)), {"is_causal": True}),
    "S-mask": (shapes(B, H, k=(0, E), v=(0, E)), {"attn_mask": torch.zeros(L, 0)}),
    "E": (shapes(B, H, q=(L, 0), k=(S, 0)), {}),
    "Ev": (shapes(B, H, v=(S, 0)), {}),
    "B": (shapes(0, H), {}),
    "5d": (shapes(2, 0, H), {}),
}


@pytest.mark.parametrize("sizes, options", EMPTY.values(), ids=EMPTY)
def test_empty_sizes(sizes, options):
    args = tensors(*sizes)
    ours, theirs = (function(*args, **options) for function in BOTH)
    assert_close(ours, theirs)
    leaves = [a.requires_grad_() for a in args]
    grads = torch.autograd.grad(BOTH[0](*leaves, **options).sum(), leaves)
    assert all(g.shape == a.shape for g, a in zip(grads, leaves, strict=True))


def assert_raises_as_torch(args, options):
    raised = []
    for function in BOTH:
        with pytest.raises(Exception) as error:
            function(*args, **options)
        raised.append(type(error.value))
    assert raised[0] is raised[1]


Q, K = torch.zeros(B, H, L, E), torch.zeros(B, H, S, E)
WRONG = {
    "1d": ((Q[0, 0, 0], K, K), {}),
    "key-dtype": ((Q, K.double(), K), {}),
    "value-dtype": ((Q, K, K.double()), {}),
    "integers": ((Q.long(), K.long(), K.long()), {}),
    "device": ((Q, K.to("meta"), K.to("meta")), {}),
    "key-features": ((Q, K[..., :3], K), {}),
    "heads": ((Q, K[:, :2], K[:, :2]), {}),
    "batch": ((Q, K[[0, 0, 0]], K[[0, 0, 0]]), {}),
    "gqa-heads": ((Q, K[:, :2], K[:, :2]), {"enable_gqa": True}),
    "gqa-2d": ((Q[0, 0], K[0, 0], K[0, 0]), {"enable_gqa": True}),
    "mask-double": ((Q, K, K), {"attn_mask": torch.zeros(L, S).double()}),
    "mask-half": ((Q, K, K), {"attn_mask": torch.zeros(L, S).half()}),
    "mask-integers": ((Q, K, K), {"attn_mask": torch.zeros(L, S).long()}),
    "mask-LxS": ((Q, K, K), {"attn_mask": torch.zeros(L, S + 1)}),
    "mask-BxHxLxS": ((Q, K, K), {"attn_mask": torch.zeros(3, H, L, S)}),
    "mask-5d": ((Q, K, K), {"attn_mask": torch.zeros(1, B, H, L, S)}),
    "mask-4d-on-3d": ((Q[0], K[0], K[0]), {"attn_mask": torch.zeros(1, H, L, S)}),
    "mask-grows-queries": ((Q[:, :, :1], K, K), {"attn_mask": torch.zeros(L, S)}),
    "mask-and-causal": ((Q, K, K, torch.zeros(L, S).requires_grad_()), {"is_causal": True}),
    "dropout-large": ((Q, K, K), {"dropout_p": 1.5}),
    "dropout-negative": ((Q, K, K), {"dropout_p": -0.5}),
    "numpy": ((Q.numpy(), K, K), {}),
    "none": ((Q, K, None), {}),
    "mask-list": ((Q, K, K), {"attn_mask": [1.0]}),
    "causal-str": ((Q, K, K), {"is_causal": "yes"}),
    "scale-positional": ((Q, K, K, None, 0.0, False, 2.0), {}),
}  # fmt: skip


@pytest.mark.parametrize("args, options", WRONG.values(), ids=WRONG)
def test_errors_are_torchs(args, options):
    assert_raises_as_torch(args, options)


def test_what_torch_documents_as_errors_is_refused_in_every_case():
    """torch notices these only on its unfused path, and else reads what is not there."""
    with pytest.raises(RuntimeError, match="attn_mask must be None where is_causal=True"):
        BOTH[0](Q, K, K, torch.zeros(L, S), is_causal=True)
    with pytest.raises(RuntimeError, match=r"value must be \(\.\.\., S, Ev\), S = 7"):
        BOTH[0](Q, K, K[:, :, 1:])


def test_half_precision_is_refused():
    q = Q.bfloat16()
    with pytest.raises(TypeError, match="float32 or float64 on the CPU, got bfloat16"):
        BOTH[0](q, q, q)


@pytest.mark.parametrize("mask", [None, torch.zeros(L, S)], ids=["plain", "mask"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)], ids=str)
def test_strides_are_torchs(order, mask):
    q = torch.empty([(B, H, L, E)[i] for i in order]).permute(*(order.index(i) for i in range(4)))
    q.normal_()
    expected = BOTH[1](q, K, K, mask).stride()
    assert BOTH[0](q, K, K, mask).stride() == expected
    assert BOTH[0](q.requires_grad_(), K, K, mask).stride() == expected


def test_strides_of_other_queries():
    expanded = torch.randn(1, H, L, E).expand(B, H, L, E)
    transposed = torch.randn(B, H, E, L).mT
    for q in (expanded, transposed):
        assert BOTH[0](q, K, K).stride() == BOTH[1](q, K, K).stride()


def test_dropout_is_reproducible_and_drawn_once():
    q, k, v = tensors(dtype=torch.float32)
    torch.manual_seed(3)
    first, second = (BOTH[0](q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(BOTH[0](q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    BOTH[0](q, k, v)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_and_scales(p):
    """Uniform weights 1/S and values of the identity: the output is the weights themselves."""
    n, size = 64, 48
    q, k = torch.zeros(1, n, size, 4), torch.zeros(1, n, size, 4)
    v = torch.eye(size).expand(1, n, size, size)
    torch.manual_seed(0)
    weights = BOTH[0](q, k, v, dropout_p=p) * size
    kept = weights > 0
    scaled = torch.full_like(weights[kept], 1 / (1 - p))
    assert torch.allclose(weights[kept], scaled, rtol=1e-5, atol=0)
    draws = kept.numel()
    assert abs(kept.sum() - draws * (1 - p)) < 5 * (draws * p * (1 - p)) ** 0.5
    for axis in (1, 2, 3):  # every head, query and key alike
        share = kept.double().mean(dim=[a for a in (1, 2, 3) if a != axis])
        deviation = (p * (1 - p) / (draws / share.numel())) ** 0.5
        assert (share - (1 - p)).abs().max() < 5 * deviation


def test_dropout_of_everything():
    q, k, v = (a.requires_grad_() for a in tensors())
    o = BOTH[0](q, k, v, dropout_p=1.0)
    assert not o.any()
    assert not any(g.any() for g in torch.autograd.grad(o.sum(), (q, k, v)))


def test_dropout_needs_no_training_flag_and_has_gradients():
    q, k, v = (a.requires_grad_() for a in tensors())

    def function(q, k, v):
        torch.manual_seed(0)
        return BOTH[0](q, k, v, dropout_p=0.3)

    assert torch.autograd.gradcheck(function, (q, k, v), nondet_tol=0.0)


@pytest.mark.parametrize("case", ["4d", "3d", "broadcast-5d", "gqa", "causal"])
def test_compile_fullgraph(case):
    torch._dynamo.reset()
    sizes, options = SHAPES[case]
    compiled = torch.compile(BOTH[0], fullgraph=True, backend="aot_eager")
    args = [a.requires_grad_() for a in tensors(*sizes)]
    results = [function(*args, **options) for function in (compiled, BOTH[0])]
    assert torch.equal(*results)
    pairs = zip(*(torch.autograd.grad(o.sum(), args) for o in results), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_compile_fullgraph_with_dropout_and_a_mask_with_gradient():
    torch._dynamo.reset()
    compiled = torch.compile(BOTH[0], fullgraph=True, backend="aot_eager")
    args = [a.requires_grad_() for a in (*tensors(), additive(L, S))]
    results = []
    for function in (compiled, BOTH[0]):
        torch.manual_seed(2)
        o = function(*args, dropout_p=0.4)
        results.append((o, *torch.autograd.grad(o.sum(), args)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
