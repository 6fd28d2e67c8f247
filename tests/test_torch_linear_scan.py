"""Linear recurrences, minGRU and minLSTM over tensors: values, gradients, operators, modules."""

import copy
import re

import pytest
from linear_scan_problems import FUNCTIONS, LETTERS, ScanProblem, solve_reference, solve_torch
from tolerance import assert_all_close, assert_close

torch = pytest.importorskip("torch")

import fastseq.torch as ft  # noqa: E402
from fastseq.torch import linear_scan_ops as ops  # noqa: E402

MASKS = ("lengths", "resets")
FLAGS = {
    "plain": {},
    "nobias": {"bias": False},
    "zerostate": {"initial": False},
    "masks": {"ragged": True, "resets": 0.25},
    "all": {"ragged": True, "resets": 0.25, "reverse": True},
}
MODULES = {"MinGRU": "min_gru", "MinLSTM": "min_lstm"}
every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
every_module = pytest.mark.parametrize("name", MODULES)


def leaves_of(problem):
    return {k: torch.tensor(a, requires_grad=True) for k, a in problem.inputs.items()}


def forward(problem, leaves):
    """h and h_n by name, the arguments being `leaves`."""
    masks = {k: torch.as_tensor(problem.options[k]) for k in MASKS if k in problem.options}
    h, h_n = getattr(ft, problem.function)(**leaves, **problem.options | masks)
    return {"h": h, "h_n": h_n}


def solve(problem):
    leaves = leaves_of(problem)
    outputs = forward(problem, leaves)
    cotangents = {k: torch.tensor(a) for k, a in problem.cotangents.items()}
    loss = sum((cotangents[f"d{name}"] * a).sum() for name, a in outputs.items())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return outputs, dict(zip(leaves, grads, strict=True))


def operator_arguments(requires_grad=True):
    """Arguments of torch.ops.fastseq.linear_scan with every optional tensor given."""
    generator = torch.Generator().manual_seed(0)
    T, B, C = 5, 2, 3

    def draw(*size):
        a = torch.randn(size, generator=generator, dtype=torch.float64)
        return a.requires_grad_(requires_grad)

    masks = (torch.tensor([3, T]), torch.rand((T, B), generator=generator) < 0.25)
    return draw(T, B, C), draw(T, B, C), draw(B, C), *masks, True


# Functions


@every_flag
@every_function
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_values_and_gradients_meet_the_reference(function, dtype, flags):
    problem = ScanProblem(function, dtype=dtype, **flags)
    ref = solve_reference(problem)
    peer = solve_torch(problem) if dtype == "float32" else None
    outputs, grads = solve(problem)
    assert_all_close(outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(grads, ref.grads, peer and peer.grads, grad=True)


@every_flag
@every_function
def test_gradcheck(function, flags):
    problem = ScanProblem(function, T=4, B=3, C=2, **flags)
    leaves = leaves_of(problem)

    def call(*values):
        return tuple(forward(problem, dict(zip(leaves, values, strict=True))).values())

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), nondet_tol=0.0)


@pytest.mark.parametrize("wanted", ["a", "b", "h0"])
def test_one_gradient_alone(wanted):
    problem = ScanProblem()
    leaves = {k: torch.tensor(a) for k, a in problem.inputs.items()}
    leaves[wanted].requires_grad_()
    forward(problem, leaves)["h_n"].backward(torch.tensor(problem.cotangents["dh_n"]))
    zeros = {"dh": 0 * problem.cotangents["dh"]}
    ref = solve_reference(problem.having(cotangents=zeros))
    assert_close(leaves[wanted].grad, ref.grads[wanted], grad=True)
    assert all(a.grad is None for name, a in leaves.items() if name != wanted)


@every_function
def test_padding_reaches_no_gradient(function):
    problem = ScanProblem(function, ragged=True)
    first = next(iter(problem.inputs))
    a = torch.tensor(problem.inputs[first])
    past = torch.arange(problem.T)[:, None] >= torch.tensor(problem.options["lengths"])
    a[past] = torch.nan
    outputs, grads = solve(problem.having(inputs={first: a.numpy()}))
    ref = solve_reference(problem)
    assert_all_close(outputs, ref.outputs)
    assert_all_close(grads, ref.grads, grad=True)


def test_any_strides():
    problem = ScanProblem(T=6)
    leaves = {k: torch.tensor(a) for k, a in problem.inputs.items()}
    strided = {k: torch.stack([a, a], -1)[..., 0].requires_grad_() for k, a in leaves.items()}
    outputs = forward(problem, strided)
    grads = torch.autograd.grad(outputs["h"].sum(), list(strided.values()))  # dh has strides 0
    ones = {k: a * 0 + (k == "dh") for k, a in problem.cotangents.items()}
    ref = solve_reference(problem.having(cotangents=ones))
    assert_all_close(outputs, ref.outputs)
    assert_all_close(dict(zip(strided, grads, strict=True)), ref.grads, grad=True)


# Operators


def test_opcheck():
    torch.library.opcheck(torch.ops.fastseq.linear_scan.default, operator_arguments())
    a, b, *_ = operator_arguments()
    bare = (a, b, None, None, None, False)
    torch.library.opcheck(torch.ops.fastseq.linear_scan.default, bare)


@pytest.mark.parametrize("given", [True, False], ids=["all", "bare"])
def test_opcheck_of_backward(given):
    operator = torch.ops.fastseq.linear_scan_bwd.default
    for requires_grad in (False, True):
        a, b, *rest, reverse = operator_arguments(requires_grad)
        h, h_n = torch.ops.fastseq.linear_scan(a, b, *rest, reverse)
        optional = rest if given else [None] * 3
        grads = (torch.ones_like(h), torch.ones_like(h_n)) if given else (None, None)
        args = (a, *optional, h.detach(), *grads, reverse)
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not requires_grad:  # it would differentiate the backward, which refuses
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, args, test_utils=tests)


def test_operator_equals_the_direct_path():
    args = operator_arguments()

    def gradients(outputs):
        return torch.autograd.grad(sum(t.sin().sum() for t in outputs), args[:3])

    direct, operator = ops.run(*args), torch.ops.fastseq.linear_scan(*args)
    assert all(torch.equal(a, b) for a, b in zip(direct, operator, strict=True))
    pairs = zip(gradients(direct), gradients(operator), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@every_function
def test_compile_fullgraph(function, dynamic):
    torch._dynamo.reset()
    problem = ScanProblem(function, ragged=True, resets=0.25, reverse=True)
    compiled = torch.compile(
        lambda inputs: forward(problem, inputs),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    eager, traced = leaves_of(problem), leaves_of(problem)
    expected, outputs = forward(problem, eager), compiled(traced)
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    for result in (expected, outputs):
        sum(a.sin().sum() for a in result.values()).backward()
    assert_all_close(
        {k: a.grad for k, a in traced.items()}, {k: a.grad for k, a in eager.items()}, grad=True
    )


def test_second_derivative_is_refused():
    leaves = leaves_of(ScanProblem())
    h, _ = ft.linear_scan(**leaves)
    (da,) = torch.autograd.grad(h.sum(), leaves["a"], create_graph=True)
    message = "linear_scan_bwd: second derivatives are not implemented"
    with pytest.raises(RuntimeError, match=message):
        da.sum().backward()


def test_in_place_change_before_backward_is_noticed():
    leaves = leaves_of(ScanProblem())
    h, _ = ft.linear_scan(**leaves)
    with torch.no_grad():
        leaves["a"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_profiler_sees_the_call():
    a = torch.randn(3, 2, 4)
    with torch.profiler.profile() as profile:
        ft.linear_scan(a, a)
    assert any(event.key == "fastseq::linear_scan" for event in profile.key_averages())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
@every_function
def test_other_dtypes_are_refused(function, dtype):
    inputs = {k: torch.tensor(a).to(dtype) for k, a in ScanProblem(function).inputs.items()}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"must be float32 or float64 on the CPU, got {name}"):
        getattr(ft, function)(**inputs)


ERRORS = {
    "x-rank": ("min_gru", "x", torch.zeros(2, 3), "x must be (T, B, I), 3 axes, got shape (2, 3)"),
    "w-shape": ("min_gru", "w_z", torch.zeros(4, 2), "w_z must be (H, I) = (4, 3), got (4, 2)"),
    "b-shape": ("min_lstm", "b_i", torch.zeros(3), "b_i must be (H,) = (4,), got (3,)"),
    "h0-shape": ("min_lstm", "h0", torch.zeros(3), "h0 must be (B, C) = (2, 4), got (3,)"),
    "lengths": ("min_gru", "lengths", torch.tensor([5]), "lengths must be (B,) = (2,), got (1,)"),
    "b": ("linear_scan", "b", torch.zeros(2), "b must be (T, B, C) = (5, 2, 3), got (2,)"),
}


@pytest.mark.parametrize(("function", "name", "value", "message"), ERRORS.values(), ids=ERRORS)
def test_argument_errors(function, name, value, message):
    x, w = torch.zeros(5, 2, 3), torch.zeros(4, 3)
    given = {"a": x, "b": x} if function == "linear_scan" else {"x": x}
    given |= {f"w_{c}": w for c in LETTERS.get(function, "")}
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(ft, function)(**given | {name: value})
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got ndarray"):
        getattr(ft, function)(**given | {name: value.numpy()})


# Modules


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@every_module
def test_modules_are_their_functions_layer_by_layer(name, bias, batch_first):
    problem = ScanProblem(MODULES[name], ragged=True, resets=0.25, bias=bias)
    options = {"num_layers": 2, "bias": bias, "batch_first": batch_first, "dtype": torch.float64}
    module = getattr(ft.nn, name)(3, 5, **options)
    x, h0 = torch.tensor(problem.inputs["x"]), torch.randn(2, 4, 5, dtype=torch.float64)
    masks = {k: torch.as_tensor(problem.options[k]) for k in MASKS}
    expected, last = x, []
    for layer in range(2):
        weights = getattr(module, f"weight_ih_l{layer}").chunk(module.parts)
        biases = getattr(module, f"bias_ih_l{layer}").chunk(module.parts) if bias else ()
        function = getattr(ft, problem.function)
        expected, h = function(expected, *weights, *biases, h0=h0[layer], **masks)
        last.append(h)
    if batch_first:
        x, masks = x.transpose(0, 1), masks | {"resets": masks["resets"].t()}
    y, h_n = module(x, h0, **masks)
    assert_close(y.transpose(0, 1) if batch_first else y, expected)
    assert_close(h_n, torch.stack(last))


@pytest.mark.parametrize("initial", [False, True], ids=["zerostate", "state"])
@every_module
def test_steps_are_the_scan(name, initial):
    module = getattr(ft.nn, name)(3, 5, num_layers=2, dtype=torch.float64)
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    h = torch.randn(2, 4, 5, dtype=torch.float64) if initial else None
    y, h_n = module(x, h)
    for t in range(7):
        y_t, h = module.step(x[t], h)
        assert_close(y_t, y[t])
    assert_close(h, h_n)


@every_module
def test_modules_train_copy_and_load(name):
    torch.manual_seed(0)
    module = getattr(ft.nn, name)(3, 8, num_layers=2)
    assert all(p.abs().max() <= 8**-0.5 and p.std() > 0 for p in module.parameters())
    other = getattr(ft.nn, name)(3, 8, num_layers=2)
    other.load_state_dict(module.state_dict())
    x = torch.randn(20, 4, 3)
    assert torch.equal(module(x)[0], other(x)[0])
    assert torch.equal(copy.deepcopy(module)(x)[0], module(x)[0])
    module(x)[0].square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters())
    assert repr(module) == f"{name}(3, 8, num_layers=2)"


@every_module
def test_modules_compile(name):
    torch._dynamo.reset()
    module = getattr(ft.nn, name)(3, 8, batch_first=True)
    x = torch.randn(4, 20, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[0], module(x)[0])


@every_module
def test_errors_of_modules(name):
    module = getattr(ft.nn, name)(3, 8)
    with pytest.raises(ValueError, match=f"{name}: input must have 3 axes, got shape "):
        module(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=f"{name}: input must have I = 3, got 4"):
        module.step(torch.zeros(2, 4))
    message = f"{name}: the state must be (layers, B, H) = (1, 2, 8), got (2, 8)"
    with pytest.raises(ValueError, match=re.escape(message)):
        module(torch.zeros(5, 2, 3), torch.zeros(2, 8))
    with pytest.raises(ValueError, match=f"{name}: hidden_size must be >= 1, got 0"):
        getattr(ft.nn, name)(3, 0)
