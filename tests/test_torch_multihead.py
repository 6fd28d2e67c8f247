"""fastseq.torch.nn.MultiheadAttention against torch.nn's: parameters, values, gradients, errors."""

import copy
import pickle

import pytest
from tolerance import assert_close

torch = pytest.importorskip("torch")

import fastseq.torch as ft  # noqa: E402
import fastseq.torch.attention_nn as attention_nn  # noqa: E402

E, HEADS, N, L, S = 12, 3, 2, 5, 7
CONSTRUCTORS = {
    "plain": {},
    "nobias": {"bias": False},
    "batch_first": {"batch_first": True},
    "kdim-vdim": {"kdim": 5, "vdim": 7},
    "kdim-nobias": {"kdim": 5, "bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv-zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "all": {"kdim": 5, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
every_constructor = pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
# torch.nn warns of what works here: a bool mask beside a float one
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(dtype=torch.float64, **options):
    """Our module and torch's with the same parameters, biases not at their zeros."""
    ours = ft.nn.MultiheadAttention(E, HEADS, **options, dtype=dtype)
    theirs = torch.nn.MultiheadAttention(E, HEADS, **options, dtype=dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs_of(module, batched=True, dtype=torch.float64):
    """query, key, value, all different."""
    sizes = ((L, E), (S, module.kdim), (S, module.vdim))
    axis = 0 if module.batch_first else 1
    shapes = [(*s[:axis], N, *s[axis:]) if batched else s for s in sizes]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def boolean(*shape):
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False  # every query keeps a key: torch.nn's weights know no other
    return mask


def additive(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).masked_fill(boolean(*shape), -torch.inf)


def flat(result):
    return [t for t in result if t is not None]


def assert_same(ours, theirs, args, **options):
    """Equal outputs and weights, and equal gradients of everything, in float64."""

    def solve(module):
        leaves = {id(a): a.detach().clone().requires_grad_() for a in args}
        given = dict(options)
        for name in ("attn_mask", "key_padding_mask"):
            mask = options.get(name)
            if mask is not None and mask.is_floating_point():
                given[name] = leaves[name] = mask.detach().clone().requires_grad_()
        found = flat(module(*(leaves[id(a)] for a in args), **given))
        wanted = [*leaves.values(), *module.parameters()]
        loss = sum((a * torch.linspace(1, 2, a.numel()).view(a.shape)).sum() for a in found)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return found, grads

    (found, grads), (ref, ref_grads) = solve(ours), solve(theirs)
    for mine, other in zip(found, ref, strict=True):
        assert_close(mine, other)
    for mine, other in zip(grads, ref_grads, strict=True):
        assert_close(mine, other, grad=True)


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@every_constructor
def test_values_and_gradients(options, batched, need_weights):
    ours, theirs = pair(**options)
    args = inputs_of(ours, batched)
    assert_same(ours, theirs, args, need_weights=need_weights)


def masks(N=N):
    """(attn_mask, key_padding_mask) of every kind and combination."""
    attn = {
        "none": None,
        "LxS": boolean(L, S),
        "NHxLxS": boolean(N * HEADS, L, S),
        "float-LxS": additive(L, S),
        "float-NHxLxS": additive(N * HEADS, L, S),
    }
    keys = {"none": None, "bool": boolean(N, S), "float": additive(N, S)}
    return {f"{a}-keys-{k}": (attn[a], keys[k]) for a in attn for k in keys}


MASKS = masks()


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize(
    "options", [CONSTRUCTORS["plain"], CONSTRUCTORS["all"]], ids=["plain", "all"]
)
@pytest.mark.parametrize("attn_mask, padding", MASKS.values(), ids=MASKS)
def test_masks(attn_mask, padding, options, need_weights):
    ours, theirs = pair(**options)
    given = {"attn_mask": attn_mask, "key_padding_mask": padding, "need_weights": need_weights}
    assert_same(ours, theirs, inputs_of(ours), **given)


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
def test_masks_unbatched(need_weights):
    ours, theirs = pair()
    args = inputs_of(ours, batched=False)
    for attn_mask in (boolean(L, S), boolean(HEADS, L, S), additive(HEADS, L, S)):
        given = {"attn_mask": attn_mask, "key_padding_mask": boolean(S)}
        assert_same(ours, theirs, args, **given, need_weights=need_weights)


@pytest.mark.parametrize("alike", ["self", "memory"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_equal_inputs_share_a_product(options, batched, alike, monkeypatch):
    ours, theirs = pair(**options)
    query, key, _ = inputs_of(ours, batched)
    args = (query, query, query) if alike == "self" else (query, key, key)
    products, linear = [], attention_nn.F.linear
    for need_weights in (False, True):
        assert_same(ours, theirs, args, need_weights=need_weights)
    monkeypatch.setattr(
        attention_nn.F, "linear", lambda x, *wb: products.append(1) or linear(x, *wb)
    )
    ours(*args)
    assert len(products) == {"self": 2, "memory": 3}[alike]


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("average", [True, False], ids=["mean", "heads"])
def test_weights_are_torchs(average, batched):
    ours, theirs = pair()
    args = inputs_of(ours, batched)
    mine, other = (m(*args, average_attn_weights=average)[1] for m in (ours, theirs))
    assert_close(mine, other)
    assert ours(*args, need_weights=False)[1] is None


def test_weights_are_formed_only_if_asked_for(monkeypatch):
    ours, _ = pair()
    monkeypatch.setattr(attention_nn, "_attend_with_weights", None)
    assert ours(*inputs_of(ours), need_weights=False)[1] is None


def test_padding_is_never_expanded(monkeypatch):
    """What the kernels get has no N * heads or L where the mask has none."""
    ours, seen = pair()[0], []
    real = attention_nn.attention

    def spy(*args, mask, bias, **options):
        seen.append([None if a is None else tuple(a.shape) for a in (mask, bias)])
        return real(*args, mask=mask, bias=bias, **options)

    monkeypatch.setattr(attention_nn, "attention", spy)
    args, padding = inputs_of(ours), boolean(N, S)
    for attn_mask in (None, boolean(L, S), additive(L, S), boolean(N * HEADS, L, S)):
        ours(*args, attn_mask=attn_mask, key_padding_mask=padding, need_weights=False)
    keys, pairs, whole = (N, 1, 1, S), (L, S), (N, HEADS, L, S)
    assert seen == [[keys, None], [pairs, keys], [keys, pairs], [whole, keys]]


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("masked", ["bool", "float", "padding"])
def test_rows_without_a_key(masked, need_weights):
    ours, _ = pair()
    args = [a.requires_grad_() for a in inputs_of(ours)]
    blocked = torch.zeros(L, S, dtype=torch.bool)
    blocked[2] = True
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    empty = {
        "bool": {"attn_mask": blocked},
        "float": {"attn_mask": torch.zeros(L, S).double().masked_fill(blocked, -torch.inf)},
        "padding": {"key_padding_mask": padding},
    }[masked]
    output, weights = ours(*args, **empty, need_weights=need_weights)
    rows = output[:, 1] if masked == "padding" else output[2]
    assert torch.equal(rows, ours.out_proj.bias.expand_as(rows))
    if need_weights:
        assert not (weights[1] if masked == "padding" else weights[:, 2]).any()
    grads = torch.autograd.grad(output.sum(), args)
    assert all(g.isfinite().all() for g in grads)
    assert not (grads[0][:, 1] if masked == "padding" else grads[0][2]).any()


@pytest.mark.parametrize("name", CONSTRUCTORS)
@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
def test_causal_hint_changes_nothing(name, need_weights):
    """torch.nn's hint hides the keys that add_bias_kv and add_zero_attn append; ours does not."""
    ours, theirs = pair(**CONSTRUCTORS[name])
    args = inputs_of(ours)
    mask = torch.ones(L, S, dtype=torch.bool).triu(1)
    for padding in (None, boolean(N, S)):
        given = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
        hinted = ours(*args, **given, is_causal=True)
        for mine, plain in zip(flat(hinted), flat(ours(*args, **given)), strict=True):
            assert_close(mine, plain.detach())
        for mine, other in zip(flat(hinted), flat(theirs(*args, **given)), strict=True):
            assert_close(mine, other)


def test_float32():
    ours, theirs = pair(torch.float32)
    args = inputs_of(ours, dtype=torch.float32)
    reference = copy.deepcopy(theirs).double()(*(a.double() for a in args), need_weights=False)[0]
    mine, peer = (m(*args, need_weights=False)[0] for m in (ours, theirs))
    assert_close(mine, reference, peer)


@every_constructor
def test_parameters_are_torchs(options):
    torch.manual_seed(3)
    ours = ft.nn.MultiheadAttention(E, HEADS, **options)
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(E, HEADS, **options)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[k], other[k]) for k in mine)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(other)
    theirs.load_state_dict(mine)
    assert isinstance(ours, torch.nn.MultiheadAttention)


def test_copies_and_pickles():
    ours, _ = pair()
    args = inputs_of(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(*args)[0], ours(*args)[0])


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
def test_dropout(need_weights):
    ours, theirs = pair(dropout=0.5)
    args = inputs_of(ours)
    torch.manual_seed(1)
    first, second = (ours(*args, need_weights=need_weights)[0] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(ours(*args, need_weights=need_weights)[0], first)
    assert not torch.equal(first, second)
    if need_weights:  # the weights are drawn as torch.nn draws them
        torch.manual_seed(1)
        for mine, other in zip(ours(*args), (torch.manual_seed(1), theirs(*args))[1], strict=True):
            assert_close(mine, other)
    ours.eval(), theirs.eval()
    assert_close(ours(*args, need_weights=need_weights)[0], theirs(*args)[0])


def test_dropout_has_the_mean_of_no_dropout():
    ours, _ = pair(dropout=0.25)
    args = [a.detach() for a in inputs_of(ours)]
    n = 2000
    with torch.no_grad():
        drawn = torch.stack([ours(*args, need_weights=False)[0] for _ in range(n)])
        expected = ours.eval()(*args, need_weights=False)[0]
    deviation = drawn.std(0) / n**0.5
    assert ((drawn.mean(0) - expected).abs() < 5 * deviation).all()


WRONG = {
    "rank-4": lambda m, q, k: m(q[None], k, k),
    "rank-1": lambda m, q, k: m(q[0, 0], k, k),
    "key-rank": lambda m, q, k: m(q, k[0], k),
    "value-rank": lambda m, q, k: m(q, k, k[0]),
    "embedding": lambda m, q, k: m(q[..., :5], k, k),
    "key-size": lambda m, q, k: m(q, k[..., :5], k[..., :5]),
    "key-value": lambda m, q, k: m(q, k, k[:3]),
    "batch": lambda m, q, k: m(q, k[:, :1], k[:, :1]),
    "padding-rank": lambda m, q, k: m(q, k, k, boolean(S)),
    "padding-rank-unbatched": lambda m, q, k: m(q[:, 0], k[:, 0], k[:, 0], boolean(N, S)),
    "padding-shape": lambda m, q, k: m(q, k, k, boolean(N, S + 1)),
    "padding-batch": lambda m, q, k: m(q, k, k, boolean(N + 1, S)),
    "padding-integers": lambda m, q, k: m(q, k, k, boolean(N, S).long()),
    "mask-rank": lambda m, q, k: m(q, k, k, attn_mask=boolean(1, 1, L, S)),
    "mask-LxS": lambda m, q, k: m(q, k, k, attn_mask=boolean(S, L)),
    "mask-3d": lambda m, q, k: m(q, k, k, attn_mask=boolean(N, L, S)),
    "mask-unbatched": lambda m, q, k: m(q[:, 0], k[:, 0], k[:, 0], attn_mask=boolean(N, L, S)),
    "mask-integers": lambda m, q, k: m(q, k, k, attn_mask=boolean(L, S).long()),
    "causal-alone": lambda m, q, k: m(q, k, k, is_causal=True, need_weights=False),
    "dtype": lambda m, q, k: m(q.double(), k.double(), k.double()),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_errors_are_torchs(call):
    raised = []
    for module in pair(torch.float32):
        query, key, _ = inputs_of(module, dtype=torch.float32)
        with pytest.raises(Exception) as error:
            call(module, query, key)
        raised.append(type(error.value))
    assert raised[0] is raised[1]


@pytest.mark.parametrize("args", [(0, 1), (E, 5), (E, 0)], ids=str)
def test_constructor_errors_are_torchs(args):
    raised = []
    for library in (ft.nn, torch.nn):
        with pytest.raises(Exception) as error:
            library.MultiheadAttention(*args)
        raised.append(type(error.value))
    assert raised[0] is raised[1]


def test_other_dtypes_are_refused():
    ours, _ = pair(torch.bfloat16)
    with pytest.raises(TypeError, match="float32 or float64 on the CPU, got bfloat16"):
        ours(*inputs_of(ours, dtype=torch.bfloat16), need_weights=False)


@pytest.mark.parametrize("case", ["fused", "weights", "dropout", "self", "unbatched"])
def test_compile_fullgraph(case):
    torch._dynamo.reset()
    ours, _ = pair(dropout=0.5 if case == "dropout" else 0.0, batch_first=True, add_bias_kv=True)
    query, key, value = inputs_of(ours, batched=case != "unbatched")
    args = (query, query, query) if case == "self" else (query, key, value)
    given = {"need_weights": case == "weights"}
    if case == "fused":
        given |= {"attn_mask": boolean(L, S), "key_padding_mask": boolean(N, S)}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = []
    for module in (ours, compiled):
        torch.manual_seed(4)
        output = module(*args, **given)[0]
        parameters = list(ours.parameters())
        results.append((output, *torch.autograd.grad(output.sin().sum(), parameters)))
    for mine, other in zip(*results, strict=True):
        assert_close(mine, other.detach(), grad=True)


def test_inside_torchs_transformer():
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(E, HEADS, 16, dropout=0.0, dtype=torch.float64)
    ours = copy.deepcopy(layer)
    for name in ("self_attn", "multihead_attn"):
        module = ft.nn.MultiheadAttention(E, HEADS, dtype=torch.float64)
        module.load_state_dict(getattr(layer, name).state_dict())
        setattr(ours, name, module)
    x, memory = torch.randn(L, N, E).double(), torch.randn(S, N, E).double()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    padding = boolean(N, S)
    given = {"tgt_mask": mask, "tgt_is_causal": True, "memory_key_padding_mask": padding}
    assert_close(ours(x, memory, **given), layer(x, memory, **given))
