"""fastseq.torch's functions and operators: values, gradients, compilation, errors, memory."""

import gc
import re

import numpy as np
import pytest
from problems import CELLS, Problem, problems, solve_reference, solve_torch
from problems import forward as problems_forward
from tolerance import assert_all_close, assert_close

torch = pytest.importorskip("torch")

import fastseq.torch as ft  # noqa: E402
from fastseq.torch import ops  # noqa: E402

MASKS = ("lengths", "resets")
GRADIENT_FLAGS = {
    "plain": {},
    "nobias": {"bias": False},
    "zerostate": {"initial": False},
    "ragged": {"ragged": True},
    "resets": {"resets": True},
    "reverse": {"reverse": True},
    "all": {"ragged": True, "resets": True, "reverse": True},
}
CLIPPED = {"ragged": True, "resets": True, "clip": 0.3}  # its gradients are not the function's


def leaves_of(problem, requires_grad=True):
    return {k: torch.tensor(a, requires_grad=requires_grad) for k, a in problem.inputs.items()}


def forward(problem, leaves):
    """fastseq.torch's outputs by name, the arguments being `leaves`."""
    options = {k: torch.as_tensor(problem.options[k]) for k in MASKS if k in problem.options}
    return problems_forward(ft, problem.having(inputs=leaves, options=options))


def solve_fastseq(problem):
    leaves = leaves_of(problem)
    outputs = forward(problem, leaves)
    cotangents = {k: torch.tensor(a) for k, a in problem.cotangents.items()}
    loss = sum((cotangents[f"d{name}"] * a).sum() for name, a in outputs.items())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return outputs, dict(zip(leaves, grads, strict=True))


def operator_arguments(
    cell, *, num_layers=2, bidirectional=True, P=0, requires_grad=True, save=True, clip=None
):
    """Arguments of torch.ops.fastseq.<cell> with every optional tensor given."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.RNNBase(
        cell.upper(), 3, 4, num_layers, bidirectional=bidirectional, proj_size=P
    )
    T, B, S, R = 5, 2, num_layers * (1 + bidirectional), P or 4

    def draw(*size):
        a = torch.randn(size, generator=generator, dtype=torch.float64)
        return a.requires_grad_(requires_grad)

    return (
        draw(T, B, 3),
        draw(S, B, R),
        draw(S, B, 4) if cell == "lstm" else None,
        [draw(*w.shape) for w in module.parameters()],
        torch.tensor([3, T]),
        torch.rand((T, B), generator=generator) < 0.25,
        torch.rand((S, B, R), generator=generator, dtype=torch.float64),
        None if P else torch.rand((S, T, B, 4), generator=generator, dtype=torch.float64),
        None,
        num_layers,
        bidirectional,
        False,
        cell == "lstm",
        save,
        clip,
    )


@pytest.mark.parametrize(
    "flags", [*GRADIENT_FLAGS.values(), CLIPPED], ids=[*GRADIENT_FLAGS, "clip"]
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_meet_the_reference(cell, dtype, flags):
    problem = Problem(cell, T=9, B=4, dtype=dtype, **flags)
    ref = solve_reference(problem)
    peer = solve_torch(problem) if dtype == "float32" else None
    outputs, grads = solve_fastseq(problem)
    assert_all_close(outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(grads, ref.grads, peer and peer.grads, grad=True)


@pytest.mark.parametrize("flags", GRADIENT_FLAGS.values(), ids=GRADIENT_FLAGS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell, flags):
    problem = Problem(cell, T=4, B=3, I=2, H=3, **flags)
    leaves = leaves_of(problem)

    def function(*values):
        return tuple(forward(problem, dict(zip(leaves, values, strict=True))).values())

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), nondet_tol=0.0)


@pytest.mark.parametrize("wanted", ["x", "w_ih", "b_hh", "h0"])
@problems(T=4)
def test_one_gradient_alone(problem, wanted):
    leaves = {k: torch.tensor(a) for k, a in problem.inputs.items()}
    leaves[wanted].requires_grad_()
    outputs = forward(problem, leaves)
    outputs["h_n"].backward(torch.tensor(problem.cotangents["dh_n"]))
    zeros = {k: a * 0 for k, a in problem.cotangents.items() if k != "dh_n"}
    ref = solve_reference(problem.having(cotangents=zeros))
    assert_close(leaves[wanted].grad, ref.grads[wanted], grad=True)
    assert all(a.grad is None for name, a in leaves.items() if name != wanted)


@problems(T=5)
def test_gradients_share_no_memory(problem):
    _, grads = solve_fastseq(problem)
    kept = {name: g.clone() for name, g in grads.items()}
    for name, g in grads.items():
        g.zero_()
        others = {k: v for k, v in kept.items() if k != name}
        assert all(torch.equal(grads[k], v) for k, v in others.items()), name
        g.copy_(kept[name])


@problems(T=6)
def test_any_strides(problem):
    leaves = {k: torch.tensor(a) for k, a in problem.inputs.items()}
    strided = {k: torch.stack([a, a], -1)[..., 0] for k, a in leaves.items()}
    strided["w_hh"] = leaves["w_hh"].T.contiguous().T
    strided = {k: a.requires_grad_() for k, a in strided.items()}
    outputs = forward(problem, strided)
    grads = torch.autograd.grad(outputs["y"].sum(), list(strided.values()))  # dy has strides 0
    ones = {k: a * 0 + (k == "dy") for k, a in problem.cotangents.items()}
    ref = solve_reference(problem.having(cotangents=ones))
    assert_all_close(outputs, ref.outputs)
    assert_all_close(dict(zip(strided, grads, strict=True)), ref.grads, grad=True)


@problems(T=1, initial=True)
def test_cells_are_one_step(problem):
    leaves = leaves_of(problem, requires_grad=False)
    x, h, c = leaves.pop("x")[0], leaves.pop("h0"), leaves.pop("c0", None)
    if problem.cell == "lstm":
        h, c = ft.lstm_cell(x, h, c, **leaves)
        assert_close(c, solve_reference(problem).outputs["c_n"])
    elif problem.cell == "gru":
        h = ft.gru_cell(x, h, **leaves)
    else:
        h = ft.rnn_cell(x, h, **leaves, nonlinearity=problem.options["nonlinearity"])
    assert_close(h, solve_reference(problem).outputs["h_n"])


@pytest.mark.parametrize("case", ["stack", "single", "projection", "clip"])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, case, monkeypatch):
    # it compares the reserves of two calls, whose steps past a row's length are never written
    monkeypatch.setattr(np, "empty", np.zeros)
    if case == "projection" and cell != "lstm":
        pytest.skip("a projection is the LSTM's")
    single = {"num_layers": 1, "bidirectional": False}
    options = {"stack": {}, "single": single, "projection": {"P": 2}, "clip": {"clip": 0.3}}
    args = operator_arguments(cell, **options[case])
    torch.library.opcheck(getattr(torch.ops.fastseq, cell).default, args)


def test_operators_refuse_what_a_cell_has_no_place_for():
    arguments = {"num_layers": 1, "bidirectional": False, "requires_grad": False}
    x, h0, c0, weights, *rest = operator_arguments("gru", **arguments)
    projected = [*weights, torch.rand(2, 4, dtype=torch.float64)]
    with pytest.raises(ValueError, match="gru: weights must not hold w_hr"):
        torch.ops.fastseq.gru(x, h0, c0, projected, *rest)
    noise = rest[3]
    with pytest.raises(ValueError, match="gru: zoneout_c must not be given"):
        torch.ops.fastseq.gru(x, h0, c0, weights, *rest[:4], noise, *rest[5:])
    x, h0, c0, weights, *rest = operator_arguments("lstm", P=2, **arguments)
    with pytest.raises(ValueError, match="lstm: zoneout must not be given with a projection"):
        torch.ops.fastseq.lstm(x, h0, c0, weights, *rest[:3], noise, None, *rest[5:])


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("needs", [(1, 1, 1, 1), (0, 0, 0, 1), (1, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_backward(cell, needs, clip):
    needs = [bool(n) and not (i == 2 and cell != "lstm") for i, n in enumerate(needs)]
    operator = getattr(torch.ops.fastseq, f"{cell}_bwd").default
    for requires_grad in (False, True):
        args = operator_arguments(cell, requires_grad=requires_grad, clip=clip)
        y, h_n, c_n, c, reserve = getattr(torch.ops.fastseq, cell)(*args)
        grads = [torch.ones_like(t) if t.numel() else None for t in (y, h_n, c_n, c)]
        args = (*args[:9], y.detach(), reserve, *grads, *args[9:12], needs, clip)
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not requires_grad:  # it would differentiate the backward, which refuses
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, args, test_utils=tests)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("cell", CELLS)
def test_operator_equals_the_direct_path(cell, clip):
    args = operator_arguments(cell, clip=clip)
    spec = ops.Spec(cell, num_layers=2, bidirectional=True, limit=clip, zoneout=True)
    tensors = [t for t in (*args[:3], *args[3]) if t is not None]

    def gradients(y, h_n, c_n, c):
        loss = sum(t.sin().sum() for t in (y, h_n, c_n, c) if t is not None)
        return torch.autograd.grad(loss, tensors)

    direct = ops.run(spec, *args[:4], ops.Masks(*args[4:9]), cell_states=cell == "lstm")
    operator = getattr(torch.ops.fastseq, cell)(*args)
    assert torch.equal(direct[0], operator[0])
    pairs = zip(gradients(*direct), gradients(*operator[:4]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("clip", [None, 0.3])
@problems(T=6, B=3, ragged=True, resets=True)
def test_compile_fullgraph(problem, clip, dynamic):
    torch._dynamo.reset()
    if clip:
        problem = problem.having(options={"clip_recurrent_grad": clip})
    compiled = torch.compile(
        lambda inputs: forward(problem, inputs),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    eager, traced = leaves_of(problem), leaves_of(problem)
    expected, outputs = forward(problem, eager), compiled(traced)
    for name in expected:
        assert torch.equal(outputs[name], expected[name])
    for leaves, result in ((eager, expected), (traced, outputs)):
        sum(a.sin().sum() for a in result.values()).backward()
        assert all(a.grad is not None for a in leaves.values())
    assert all(torch.equal(eager[k].grad, traced[k].grad) for k in eager)


@problems(T=3)
def test_second_derivative_is_refused(problem):
    leaves = leaves_of(problem)
    y = forward(problem, leaves)["y"]
    (dx,) = torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        dx.sum().backward()


@problems(T=3)
def test_in_place_change_before_backward_is_noticed(problem):
    leaves = leaves_of(problem)
    y = forward(problem, leaves)["y"]
    with torch.no_grad():
        leaves["w_hh"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@problems(T=3)
def test_inference_keeps_nothing(problem, mode, monkeypatch):
    seen = []
    real = ops._stack.forward

    def spy(*args, **options):
        outputs = real(*args, **options)
        seen.append((options.get("save", False), outputs[4]))
        return outputs

    monkeypatch.setattr(ops._stack, "forward", spy)
    with mode():
        outputs = forward(problem, leaves_of(problem))
    assert seen == [(False, None)]
    assert not any(a.requires_grad for a in outputs.values())
    args = operator_arguments(problem.cell, requires_grad=False, save=False)
    assert getattr(torch.ops.fastseq, problem.cell)(*args)[4].numel() == 0


@problems(T=3)
def test_gradient_without_save_is_an_error(problem):
    args = operator_arguments(problem.cell, save=False)
    y = getattr(torch.ops.fastseq, problem.cell)(*args)[0]
    with pytest.raises(RuntimeError, match="save=True"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
@problems(T=3)
def test_other_dtypes_are_refused(problem, dtype):
    inputs = {k: torch.tensor(a).to(dtype) for k, a in problem.inputs.items()}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"x must be float32 or float64 on the CPU, got {name}"):
        forward(problem, inputs)
    inputs["x"] = inputs["x"].double()
    with pytest.raises(TypeError, match=f"weight must be float32 or float64 .* got {name}"):
        forward(problem, inputs)


@pytest.mark.parametrize("mixed", ["w_ih", "w_hh", "b_ih", "h0"])
@problems(T=3)
def test_mixed_dtypes_are_refused(problem, mixed):
    inputs = {k: torch.tensor(a) for k, a in problem.inputs.items()}
    with pytest.raises((TypeError, ValueError), match=mixed):
        forward(problem, inputs | {mixed: inputs[mixed].float()})


def test_argument_errors():
    x, w, b = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)
    with pytest.raises(ValueError, match="b_ih and b_hh must be given together, got b_hh = None"):
        ft.rnn(x, w, torch.zeros(5, 5), b)
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        ft.rnn(x, w, torch.zeros(5, 5), nonlinearity="gelu")
    with pytest.raises(TypeError, match=re.escape("expected a torch.Tensor, got ndarray")):
        ft.rnn(x.numpy(), w, torch.zeros(5, 5))
    with pytest.raises(TypeError, match="on meta"):
        ft.rnn(x, w.to("meta"), torch.zeros(5, 5))
    for limit, error in ((0, ValueError), (float("nan"), ValueError), (torch.ones(1), TypeError)):
        message = re.escape("must be > 0" if error is ValueError else "must be a number > 0")
        with pytest.raises(error, match=f"^rnn: clip_recurrent_grad {message}.*, got "):
            ft.rnn(x, w, torch.zeros(5, 5), clip_recurrent_grad=limit)
    with pytest.raises(ValueError, match=r"^gru: clip_recurrent_grad must be > 0, got -0\.3$"):
        torch.ops.fastseq.gru(*operator_arguments("gru", clip=-0.3))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_and_transforms_are_refused_not_wrong():
    x, w = torch.randn(3, 2, 4), torch.randn(4, 4)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        ft.rnn(torch.autograd.forward_ad.make_dual(x, x), w, w)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: ft.rnn(x, w, w)[0].sum())(x)
    with pytest.raises(RuntimeError):
        torch.vmap(lambda x: ft.rnn(x, w, w)[0])(x[None])


def test_profiler_sees_the_call():
    x, w = torch.randn(3, 2, 4), torch.randn(4, 4)
    with torch.profiler.profile() as profile:
        ft.rnn(x, w, w)
    assert any(event.key == "fastseq::rnn_tanh" for event in profile.key_averages())


@problems(T=4, dtype="float32")
def test_no_leak(problem):
    leaves = leaves_of(problem)

    def train():
        sum(a.sum() for a in forward(problem, leaves).values()).backward()
        for a in leaves.values():
            a.grad = None

    def live_tensors():
        gc.collect()
        return sum(issubclass(type(o), (torch.Tensor, np.ndarray)) for o in gc.get_objects())

    train()
    before = live_tensors()
    for _ in range(50):
        train()
    assert live_tensors() <= before


def test_storages_of_weights_stay_resizable():
    w = torch.randn(4, 4, requires_grad=True)
    ft.rnn(torch.randn(2, 1, 4), w, w)[0].sum().backward()
    w.untyped_storage().resize_(0)  # raises where NumPy holds the storage
    assert w.untyped_storage().nbytes() == 0
