"""Training aids over torch tensors, held against torch's own and against explicit loops."""

import re

import numpy as np
import pytest
from tolerance import assert_close

import fastseq
from fastseq.reference import training as reference

torch = pytest.importorskip("torch")

import fastseq.torch as ft  # noqa: E402

SIZES = [(3, 5), (1,), (0,), (), (2, 20000), (7, 4)]
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def parameters(dtype=torch.float32, sizes=SIZES, seed=0):
    """Parameters with gradients, one of them without."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in sizes]
    for p in made:
        p.grad = torch.randn(p.shape, dtype=dtype, generator=generator)
    return [*made, torch.nn.Parameter(torch.zeros(2))]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def arrays(made):
    return [p.grad.double().numpy().copy() for p in made if p.grad is not None]


def assert_refused(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


# Clipping


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, "inf"])
@pytest.mark.parametrize("max_norm", [0.0, 0.8, 1e9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_torchs(dtype, max_norm, p):
    ours, theirs = parameters(DTYPES[dtype]), parameters(DTYPES[dtype])
    ref_norm, ref = reference.clip_grad_norm(arrays(ours), max_norm, float(p))
    norm = ft.clip_grad_norm_(ours, max_norm, p)
    peer = torch.nn.utils.clip_grad_norm_([t for t in theirs if t.numel()], max_norm, p)
    assert isinstance(norm, torch.Tensor) and not norm.requires_grad
    assert norm.shape == () and norm.dtype == peer.dtype
    assert_close(norm, np.array(ref_norm), peer)
    for a, t, r in zip(ours, theirs, ref, strict=False):
        assert_close(a.grad, r, t.grad, grad=True)
    assert ours[-1].grad is None


def test_every_way_to_name_parameters():
    made = parameters()
    norm = ft.clip_grad_norm_(made, 1e9)
    assert torch.equal(norm, ft.clip_grad_norm_(iter(made), 1e9))
    assert torch.equal(norm, ft.clip_grad_norm_((p for p in made), 1e9))
    alone = ft.clip_grad_norm_(made[0], 1e9)
    assert torch.equal(alone, ft.clip_grad_norm_([made[0], made[-1]], torch.tensor(1e9)))
    model = ft.nn.GRU(3, 4)
    model(torch.randn(5, 2, 3))[0].sum().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert_close(ft.clip_grad_norm_(model.parameters(), 1.0), expected.double(), expected)


def test_nothing_to_clip():
    made = parameters()
    before = [g.copy() for g in arrays(made)]
    versions = [p.grad._version for p in made[:-1]]
    ft.clip_grad_norm_(made, 1e9)
    assert [p.grad._version for p in made[:-1]] == versions
    for g, b in zip(arrays(made), before, strict=True):
        np.testing.assert_array_equal(g, b)
    for empty in ([], [torch.nn.Parameter(torch.zeros(2))]):
        norm = ft.clip_grad_norm_(empty, 1.0, error_if_nonfinite=True)
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(empty, 1.0))
        assert ft.clip_grad_value_(empty, 1.0) is None
    with pytest.warns(UserWarning, match="`parameters` is an empty generator"):
        ft.clip_grad_norm_((p for p in []), 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norms_that_are_not_finite(bad):
    ours, theirs = parameters(), parameters()
    for p in (ours[4], theirs[4]):
        p.grad[1, 777] = bad
    before = arrays(ours)
    message = f"clip_grad_norm_: the norm of order 2 must be finite, got {bad}"
    assert_refused(
        lambda: ft.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True), RuntimeError, message
    )
    np.testing.assert_array_equal(arrays(ours)[4], before[4])
    norm = ft.clip_grad_norm_(ours, 1.0)
    peer = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    np.testing.assert_array_equal(norm, peer)
    for a, t in zip(ours[:-1], theirs, strict=False):
        np.testing.assert_array_equal(a.grad, t.grad)


def test_layouts_and_dtypes_mix():
    made = parameters(sizes=[(6, 4), (6, 4), (6, 4)])
    made[1].grad = torch.randn(4, 6).t()
    made[2].data = made[2].data.double()
    made[2].grad = torch.randn(6, 8, dtype=torch.float64)[:, ::2]
    wide = arrays(made)
    norm = ft.clip_grad_norm_(made, 2.0)
    ref_norm, ref = reference.clip_grad_norm(wide, 2.0)
    assert norm.dtype == torch.float64
    assert_close(norm, np.array(ref_norm))
    assert_close(made[2].grad, ref[2])
    for p, r, a in zip(made[:2], ref, wide, strict=False):
        assert_close(p.grad, r, torch.tensor(a).float() * np.float32(2 / (ref_norm + 1e-6)))
    before = arrays(made)
    ft.clip_grad_value_(made, 0.125)
    for p, a in zip(made, before, strict=False):
        np.testing.assert_array_equal(p.grad, a.clip(-0.125, 0.125))


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_is_torchs(dtype):
    ours, theirs = parameters(DTYPES[dtype]), parameters(DTYPES[dtype])
    for p in (ours[0], theirs[0]):
        p.grad[0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3, -0.3])
    assert ft.clip_grad_value_(ours, 0.3) is None
    torch.nn.utils.clip_grad_value_(theirs, 0.3)
    for a, t in zip(ours[:-1], theirs, strict=False):
        np.testing.assert_array_equal(a.grad, t.grad)


@pytest.mark.parametrize("name", ["norm", "value"])
def test_autograd_sees_the_change(name):
    x = torch.randn(4, requires_grad=True)
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    y = (x * p.grad).sum()
    getattr(ft, f"clip_grad_{name}_")([p], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("name", ["norm", "value"])
def test_clip_errors(name):
    call = getattr(ft, f"clip_grad_{name}_")
    limit = {"norm": "max_norm", "value": "clip_value"}[name]
    op = f"clip_grad_{name}_"
    p = parameters()[0]
    assert_refused(lambda: call([p], -1), ValueError, f"{op}: {limit} must be >= 0, got -1")
    half = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    half.grad = torch.zeros_like(half)
    message = "gradients[1] must be float32 or float64 on the CPU, got bfloat16 on cpu"
    assert_refused(lambda: call([p, half], 1.0), TypeError, f"{op}: {message}")
    sparse = torch.nn.Parameter(torch.zeros(2, 2))
    sparse.grad = torch.eye(2).to_sparse()
    message = "gradients[0] must be a dense torch.Tensor, got torch.sparse_coo"
    assert_refused(lambda: call([sparse], 1.0), TypeError, f"{op}: {message}")
    meta = torch.nn.Parameter(torch.zeros(2, device="meta"))
    meta.grad = torch.zeros_like(meta)
    message = "gradients[0] must be float32 or float64 on the CPU, got float32 on meta"
    assert_refused(lambda: call([meta], 1.0), TypeError, f"{op}: {message}")


# Initial values


def modules(kind, **options):
    return [getattr(where, kind)(3, 5, **options) for where in (torch.nn, ft.nn)]


def named(module, prefix):
    return [p for n, p in module.named_parameters() if n.startswith(prefix)]


@pytest.mark.parametrize("kind", ["RNN", "RNNCell"])
def test_identity(kind):
    stacked = {"num_layers": 2, "bidirectional": True} if kind == "RNN" else {}
    for module in modules(kind, nonlinearity="relu", **stacked):
        w_ih = [w.detach().clone() for w in named(module, "weight_ih")]
        ft.init.identity(module)
        found = named(module, "weight_hh")
        assert len(found) == (4 if stacked else 1)
        assert all(torch.equal(w, torch.eye(5)) and w.requires_grad for w in found)
        assert not any(b.any() for b in named(module, "bias"))
        assert all(map(torch.equal, named(module, "weight_ih"), w_ih))
    w, b = torch.randn(4, 4, dtype=torch.float64), torch.randn(4)
    ft.init.identity(w, b, scale=0.5)
    assert torch.equal(w, 0.5 * torch.eye(4).double()) and not b.any()


def test_a_module_of_identities_keeps_its_state():
    module = ft.nn.RNN(3, 5, nonlinearity="relu")
    ft.init.identity(module)
    h0 = torch.rand(1, 2, 5)
    y, h_n = module(torch.zeros(7, 2, 3), h0)
    assert torch.equal(y, h0.expand(7, 2, 5)) and torch.equal(h_n, h0)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_orthogonal(kind):
    gates = {"R": 1, "G": 3, "L": 4}[kind[0]]
    for module in modules(kind, dtype=torch.float64):
        ft.init.orthogonal(module, gain=2.0)
        (w,) = named(module, "weight_hh")
        for block in w.detach().split(5):
            assert_close(block.T @ block, 4 * torch.eye(5, dtype=torch.float64))
        ft.init.orthogonal(module, generator=np.random.default_rng(3))
        expected = np.empty((gates * 5, 5))
        fastseq.init.orthogonal(expected, rng=3)
        assert np.array_equal(w.detach().numpy(), expected)


def test_orthogonal_of_a_projection():
    module = torch.nn.LSTM(3, 6, proj_size=2, dtype=torch.float64)
    ft.init.orthogonal(module)
    for block in module.weight_hh_l0.detach().split(6):
        assert_close(block.T @ block, torch.eye(2, dtype=torch.float64))


def test_orthogonal_is_seeded():
    def drawn(**options):
        w = torch.empty(8, 4)
        ft.init.orthogonal(w, **options)
        return w

    torch.manual_seed(1)
    first, other = drawn(), drawn()
    torch.manual_seed(1)
    assert torch.equal(drawn(), first) and not torch.equal(first, other)
    assert torch.equal(drawn(generator=torch.Generator().manual_seed(1)), first)
    wide = torch.empty(8, 6)
    ft.init.orthogonal(wide, 4)
    for block in wide.double().split(2):
        assert (block @ block.T - torch.eye(2)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_forget_bias(kind):
    stacked = {"num_layers": 2, "bidirectional": True} if kind == "LSTM" else {}
    for module in modules(kind, **stacked):
        before = [b.detach().clone() for b in named(module, "bias")]
        ft.init.forget_bias(module, value=2.0)
        pairs = list(zip(named(module, "bias_ih"), named(module, "bias_hh"), strict=True))
        for b_ih, b_hh in pairs:
            assert (b_ih[5:10] == 2).all() and not b_hh[5:10].any()
        for b, old in zip(named(module, "bias"), before, strict=True):
            others = [*range(5), *range(10, 20)]
            assert torch.equal(b[others], old[others])
    b_ih, b_hh = torch.ones(8), torch.ones(8)
    ft.init.forget_bias(b_ih, b_hh, 3.0)
    assert b_ih.tolist() == [1, 1, 3, 3, 1, 1, 1, 1] and b_hh.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]


INIT_ERRORS = [
    ("identity", (torch.nn.GRU(2, 4),), {}, ValueError,
     "w_hh must be (H, H) = (4, 4), got (12, 4)"),
    ("identity", (torch.nn.Linear(2, 4),), {}, TypeError,
     "target must be a recurrent module or a torch.Tensor, got Linear"),
    ("identity", (torch.nn.RNN(2, 4), torch.zeros(4)), {}, ValueError,
     "biases must be None beside a module, got tensors"),
    ("identity", (torch.zeros(2, 2), torch.zeros(3)), {}, ValueError,
     "b_ih must be (H,) = (2,), got (3,)"),
    ("orthogonal", (torch.zeros(9, 4),), {}, ValueError, "w must be (2 H, H), got (9, 4)"),
    ("orthogonal", (torch.zeros(4),), {}, ValueError, "w must be (G H, H), 2 axes, got (4,)"),
    ("orthogonal", (torch.nn.GRU(2, 4), 3), {}, ValueError,
     "gates must be None beside a module, got 3"),
    ("orthogonal", (torch.zeros(4, 4),), {"generator": 5}, TypeError,
     "generator must be a torch.Generator, a numpy.random.Generator or None, got int"),
    ("orthogonal", ([[1.0]],), {}, TypeError,
     "target must be a recurrent module or a torch.Tensor, got list"),
    ("forget_bias", (torch.nn.GRU(2, 4),), {}, ValueError,
     "module must be an LSTM or LSTMCell, got GRU"),
    ("forget_bias", (torch.nn.LSTM(2, 4, bias=False),), {}, ValueError,
     "module must have biases, got bias = False"),
    ("forget_bias", (torch.zeros(6),), {}, ValueError, "b_ih must be (4H,), got (6,)"),
    ("forget_bias", (torch.zeros(8), torch.zeros(4)), {}, ValueError,
     "b_hh must be (4H,) = (8,), got (4,)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "options", "error", "message"), INIT_ERRORS)
def test_init_errors(name, given, options, error, message):
    assert_refused(lambda: getattr(ft.init, name)(*given, **options), error, f"{name}: {message}")


# Truncated backpropagation

T, B, I, H = 11, 2, 3, 5  # noqa: E741


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("where", [torch.nn, ft.nn], ids=["torch", "fastseq"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_truncated(kind, where, batch_first):
    """Outputs and gradients of the reference: each chunk's state is a constant."""
    module = getattr(where, kind)(I, H, batch_first=batch_first, dtype=torch.float64)
    x, dy = torch.randn(T, B, I).double(), torch.randn(T, B, H).double()
    turned = x.transpose(0, 1) if batch_first else x
    ys, t = [], 0
    for y, state in ft.tbptt(module, turned, chunk=4):
        y = y.transpose(0, 1) if batch_first else y
        (y * dy[t : t + 4]).sum().backward()
        assert not any(s.requires_grad for s in (state if kind == "LSTM" else (state,)))
        ys, t = [*ys, y], t + 4
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    weights = {n: p.detach().numpy() for n, p in zip(names, module.parameters(), strict=True)}
    states = {n: np.zeros((B, H)) for n in ("h0", "c0")[: 1 + (kind == "LSTM")]}
    ref = reference.tbptt(kind.lower(), x.numpy(), weights, states, dy.numpy(), 4)
    assert_close(torch.cat(ys), ref[0])
    for s, r in zip(state if kind == "LSTM" else (state,), ref[1], strict=True):
        assert_close(s[0], r)
    for p, grad in zip(module.parameters(), ref[2].values(), strict=True):
        assert_close(p.grad, grad, grad=True)


def test_truncated_from_a_state():
    module = ft.nn.LSTM(I, H)
    x, hx = torch.randn(T, B, I), (torch.randn(1, B, H), torch.randn(1, B, H))
    ys, states = zip(*ft.tbptt(module, x, hx, chunk=T), strict=True)
    y, (h_n, c_n) = module(x, hx)
    assert torch.equal(ys[0], y) and torch.equal(states[0][0], h_n)
    assert torch.equal(states[0][1], c_n)
    unbatched = [y for y, _ in ft.tbptt(module, x[:, 0], chunk=2)]
    assert len(unbatched) == 6 and torch.cat(unbatched).shape == (T, H)


def test_loop_errors():
    module, x = ft.nn.GRU(I, H), torch.randn(T, B, I)
    both = ft.nn.GRU(I, H, bidirectional=True)
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
    for name, options in (("tbptt", {"chunk": 2}), ("gradient_flow", {})):
        call = getattr(ft, name)
        message = f"{name}: module must go forward in time, got bidirectional = True"
        assert_refused(lambda c=call, o=options: c(both, x, **o), ValueError, message)
        got = "got PackedSequence (which cannot be cut in time)"
        message = f"{name}: x must be a torch.Tensor, {got}"
        assert_refused(lambda c=call, o=options: c(module, packed, **o), TypeError, message)
    message = "tbptt: chunk must be an integer >= 1, got 0"
    assert_refused(lambda: ft.tbptt(module, x, chunk=0), ValueError, message)
    message = "gradient_flow: x must have at least one step, got T = 0"
    assert_refused(lambda: ft.gradient_flow(module, x[:0]), ValueError, message)
    message = "gradient_flow: loss must be a scalar, got (11, 2, 5)"
    assert_refused(lambda: ft.gradient_flow(module, x, loss=lambda y: y), ValueError, message)
    message = "gradient_flow: module's output must be its state h (2, 5), got (1, 2, 1)"
    head = Headed(I, H)
    assert_refused(lambda: ft.gradient_flow(head, x), ValueError, message)


class Headed(torch.nn.Module):
    """Its output is not its state."""

    def __init__(self, *sizes):
        super().__init__()
        self.rnn, self.head = ft.nn.RNN(*sizes), torch.nn.Linear(sizes[1], 1)

    def forward(self, x, hx=None):
        y, h = self.rnn(x, hx)
        return self.head(y), h


# Gradient flow


def explicit(kind, w, x, loss):
    """The norms of a loop over torch's cell functions, each state's gradient by autograd."""
    h = torch.zeros(B, H, dtype=x.dtype)
    c, states = h, []
    for x_t in x:
        if kind == "LSTM":
            h, c = torch.lstm_cell(x_t, (h, c), *w)
        else:
            h = {"RNN": torch.rnn_tanh_cell, "GRU": torch.gru_cell}[kind](x_t, h, *w)
        states.append(h)
    grads = torch.autograd.grad(loss(torch.stack(states)), states)
    return torch.stack([g.norm() for g in grads])


@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("form", ["layer", "batch_first", "cell"])
@pytest.mark.parametrize("where", [torch.nn, ft.nn], ids=["torch", "fastseq"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_gradient_flow_is_that_of_an_explicit_loop(kind, where, form, last_only):
    options = {"batch_first": True} if form == "batch_first" else {}
    name = f"{kind}Cell" if form == "cell" else kind
    module = getattr(where, name)(I, H, dtype=torch.float64, **options)
    x, dy = torch.randn(T, B, I).double(), torch.randn(T, B, H).double()
    turned = (lambda a: a.transpose(0, 1)) if options else (lambda a: a)
    loss = None if last_only else (lambda y: (turned(y) * dy).sum())
    norms = ft.gradient_flow(module, turned(x), loss=loss)
    plain = (lambda y: y[-1].sum()) if last_only else (lambda y: (y * dy).sum())
    assert_close(norms, explicit(kind, list(module.parameters()), x, plain).detach())
    assert all(p.grad is None for p in module.parameters())
    if last_only:
        dy = torch.zeros_like(dy)
        dy[-1] = 1
    w = [p.detach().numpy() for p in module.parameters()]
    fn = getattr(fastseq, kind.lower())
    assert_close(fastseq.gradient_flow(fn, x.numpy(), *w, dy=dy.numpy()), norms)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_flow_of_other_modules(frozen):
    """Stacked layers: the last one's state. A user's module, whose output is the state itself."""
    stacked, last = ft.nn.GRU(I, H, 2).double(), ft.nn.GRU(H, H).double()
    weights = stacked.state_dict()
    last.load_state_dict({n: weights[n.replace("l0", "l1")] for n in last.state_dict()})
    x = torch.randn(T, B, I).double()
    lower = ft.nn.GRU(I, H).double()
    lower.load_state_dict({n: weights[n] for n in lower.state_dict()})
    for module in (stacked, last):
        module.requires_grad_(not frozen)
    between = lower(x)[0].detach()
    norms = ft.gradient_flow(last, between)
    assert_close(ft.gradient_flow(stacked, x), norms)

    def own(x_t, h):
        h = torch.zeros(B, H).double() if h is None else h
        h = torch.gru_cell(x_t[0], h, *last.parameters())
        return h, h

    assert_close(ft.gradient_flow(own, between, loss=lambda y: y[-B:].sum()), norms)
    with torch.no_grad():
        assert_close(ft.gradient_flow(last, between[:, 0]), ft.gradient_flow(last, between[:, :1]))


def test_gradient_flow_vanishes_and_explodes():
    x, ratio = 0.01 * torch.randn(40, B, 4).double(), {}
    module = ft.nn.RNN(4, 8, bias=False).double()
    for gain in (0.5, 1.5):
        ft.init.orthogonal(module, gain=gain, generator=np.random.default_rng(0))
        norms = ft.gradient_flow(module, x)
        ratio[gain] = (norms[0] / norms[-1]).item()
    assert ratio[0.5] < 1e-9 and ratio[1.5] > 10


def test_compiled_training_steps_may_clip():
    made = parameters(sizes=[(3,)])
    made[0].grad.fill_(2.0)

    def step(made):
        ft.clip_grad_norm_(made, 1.0)
        return made[0].grad * 2

    found = torch.compile(step, backend="eager")(made)
    np.testing.assert_array_equal(found, 2 * made[0].grad)
    assert abs(made[0].grad.norm().item() - 1) < 1e-6
