"""fastseq.torch's attention and its operators: values, gradients, compilation, errors, memory."""

import gc

import numpy as np
import pytest
from attention_problems import AttentionProblem, solve_reference, solve_torch
from tolerance import assert_all_close, assert_close

from fastseq.reference import attention as reference

torch = pytest.importorskip("torch")

import fastseq.torch as ft  # noqa: E402
from fastseq import _attend  # noqa: E402
from fastseq.torch import attention_ops  # noqa: E402

CASES = {
    "plain": {},
    "gqa": {"NH": 4, "NK": 2},
    "mqa-wide": {"NH": 4, "NK": 1, "D": 5, "DV": 5},
    "causal": {"causal": True},
    "top_left-long": {"causal": "top_left", "L": 9, "S": 4},
    "bottom_right": {"causal": "bottom_right", "ragged": "qkv"},
    "window": {"window": (2, 1)},
    "window-left": {"window": (1, None), "causal": "bottom_right"},
    "ragged-q": {"ragged": "q"},
    "ragged-kv": {"ragged": "kv"},
    "mask": {"mask": "BxNHxLxS"},
    "mask-keys": {"mask": "Bx1x1xS"},
    "bias": {"bias": "BxNHxLxS"},
    "bias-LxS": {"bias": "LxS"},
    "bias-NHx1xS": {"bias": "NHx1xS"},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "NH"},
    "alibi-B": {"alibi": "BxNH", "causal": "bottom_right"},
    "dropout": {"dropout_p": 0.4},
    "one-query": {"L": 1, "S": 19, "NH": 4, "NK": 2},
    "all": {
        "B": 3, "NH": 4, "NK": 2, "L": 6, "causal": "bottom_right", "window": (4, None),
        "mask": "Bx1xLxS", "bias": "NHxLxS", "ragged": "qkv", "scale": 0.4, "softcap": 2.0,
        "alibi": "NH", "dropout_p": 0.3,
    },
}  # fmt: skip
every_case = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
TENSORS = ("mask", "q_lengths", "kv_lengths", "alibi_slopes")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def leaves_of(problem, requires_grad=True):
    return {k: torch.tensor(a, requires_grad=requires_grad) for k, a in problem.inputs.items()}


def options_of(problem):
    """The keyword arguments beside q, k, v, bias; arrays as tensors."""
    options = dict(problem.options)
    for name in TENSORS:
        if options.get(name) is not None:
            options[name] = torch.tensor(options[name])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"].to(_dtype(problem))
    return options


def _dtype(problem):
    return getattr(torch, problem.dtype)


def forward(problem, leaves):
    """o, lse by name."""
    o, lse = ft.attention(**leaves, **options_of(problem), return_lse=True)
    return {"o": o, "lse": lse}


def solve_fastseq(problem):
    leaves = leaves_of(problem)
    outputs = forward(problem, leaves)
    cotangents = [torch.tensor(problem.cotangents[f"d{name}"]) for name in outputs]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return outputs, dict(zip(leaves, grads, strict=True))


def operator_arguments(requires_grad=True, **replaced):
    """Arguments of torch.ops.fastseq.attention, every optional one given."""
    problem = AttentionProblem(**CASES["all"])
    leaves, options = leaves_of(problem, requires_grad), options_of(problem)
    left, right = options.pop("window")
    given = leaves | options | {"left": left, "right": right, "score_mod": None}
    given["seed"] = torch.tensor(7)
    order = ("q", "k", "v", *attention_ops.TENSORS["attention"], *attention_ops.NUMBERS)
    return tuple((given | replaced)[name] for name in order)


def varlen_arguments(requires_grad=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=requires_grad)
        for shape in ((9, 4, 3), (11, 2, 3), (11, 2, 5))
    )
    cu_q, cu_k = torch.tensor([0, 2, 2, 9]), torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    return q, k, v, cu_q, cu_k


@every_case
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_values_and_gradients_meet_the_reference(dtype, fields):
    problem = AttentionProblem(**fields, dtype=dtype)
    ref = solve_reference(problem)
    peer = solve_torch(problem) if dtype == "float32" else None
    outputs, grads = solve_fastseq(problem)
    assert_all_close(outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(grads, ref.grads, peer and peer.grads, grad=True)


@every_case
def test_gradcheck(fields):
    sizes = {"NH": 2, "NK": 2, "L": 3, "S": 4, "D": 2, "DV": 3} | fields
    sizes |= {"L": min(sizes["L"], 4), "S": min(sizes["S"], 5)}
    problem = AttentionProblem(**sizes)
    leaves = leaves_of(problem)

    def function(*values):
        outputs = forward(problem, dict(zip(leaves, values, strict=True)))
        lse = outputs["lse"]  # a row without a key: its -inf has no difference quotient
        return outputs["o"], lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), nondet_tol=0.0)


@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
def test_packed_rows_meet_the_reference(causal):
    args = varlen_arguments()
    options = {"causal": causal, "softcap": 3.0, "window": (5, None)}
    random = {"dropout_p": 0.25, "seed": 2**63 + 5}
    slopes = torch.rand(3, 4, dtype=torch.float64)
    outputs = ft.attention_varlen(*args, **options, **random, alibi_slopes=slopes, return_lse=True)
    arrays = [a.detach().numpy() for a in args]
    known = options | random | {"alibi_slopes": slopes.numpy()}
    expected = reference.attention_varlen(*arrays, **known)
    for ours, ref in zip(outputs, expected, strict=True):
        assert_close(ours, ref)
    cotangents = [torch.randn_like(a) for a in outputs]
    grads = torch.autograd.grad(outputs, args[:3], cotangents)
    do, dlse = (a.numpy() for a in cotangents)
    ref = reference.attention_varlen_vjp(*arrays, do=do, dlse=dlse, **known)
    assert_all_close(dict(zip("qkv", grads, strict=True)), ref, grad=True)


def test_packed_rows_gradcheck():
    q, k, v, *cu = varlen_arguments()

    def function(q, k, v):
        o, lse = ft.attention_varlen(q, k, v, *cu, causal=True, return_lse=True)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, (q, k, v), nondet_tol=0.0)


@pytest.mark.parametrize("output", ["o", "lse"])
@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias"])
def test_one_gradient_alone(wanted, output):
    problem = AttentionProblem(bias="1x1xLxS", NH=4, NK=2)
    leaves = leaves_of(problem, requires_grad=False)
    leaves[wanted].requires_grad_()
    forward(problem, leaves)[output].backward(torch.tensor(problem.cotangents[f"d{output}"]))
    zeros = {k: a * 0 for k, a in problem.cotangents.items() if k != f"d{output}"}
    ref = solve_reference(problem.having(cotangents=zeros))
    assert_close(leaves[wanted].grad, ref.grads[wanted], grad=True)
    assert all(a.grad is None for name, a in leaves.items() if name != wanted)


def test_gradients_share_no_memory():
    _, grads = solve_fastseq(AttentionProblem(bias="LxS"))
    kept = {name: g.clone() for name, g in grads.items()}
    for name, g in grads.items():
        g.zero_()
        assert all(torch.equal(grads[k], v) for k, v in kept.items() if k != name)
        g.copy_(kept[name])


LAYOUTS = {"BLHD": (0, 2, 1, 3), "LBHD": (2, 0, 1, 3), "HBLD": (1, 0, 2, 3)}


def laid_out(a, order):
    """The same values, axes in memory in this order."""
    return a.permute(order).contiguous().permute(*(order.index(i) for i in range(4)))


@pytest.mark.parametrize("order", LAYOUTS.values(), ids=LAYOUTS)
def test_outputs_and_gradients_follow_the_layout(order):
    problem = AttentionProblem(mask="BxNHxLxS", bias="BxNHxLxS", NH=4, NK=2)
    leaves = {
        k: laid_out(torch.tensor(a), order).requires_grad_() for k, a in problem.inputs.items()
    }
    outputs = forward(problem, leaves)
    ref = solve_reference(problem)
    assert_all_close(outputs, ref.outputs)
    assert outputs["o"].permute(order).is_contiguous()
    loss = sum((a * torch.tensor(problem.cotangents[f"d{n}"])).sum() for n, a in outputs.items())
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert_all_close(grads, ref.grads, grad=True)
    assert all(grads[name].permute(order).is_contiguous() for name in "qkv")


def test_any_strides():
    problem = AttentionProblem(mask="BxNHxLxS", bias="LxS", alibi="NH")
    leaves = leaves_of(problem, requires_grad=False)
    strided = {k: torch.stack([a, a], -1)[..., 0].requires_grad_() for k, a in leaves.items()}
    o = forward(problem, strided)["o"]
    grads = torch.autograd.grad(o.sum(), list(strided.values()))  # do has strides 0
    ones = {"do": np.ones(o.shape), "dlse": np.zeros(o.shape[:-1])}
    ref = solve_reference(problem.having(cotangents=ones))
    assert_close(o, ref.outputs["o"])
    assert_all_close(dict(zip(strided, grads, strict=True)), ref.grads, grad=True)


def test_tensors_are_not_copied(monkeypatch):
    problem, seen = AttentionProblem(mask="Bx1x1xS", bias="LxS", ragged="kv"), []
    real = _attend.forward

    def spy(op, q, k, v, options):
        seen.extend((q, k, v, options.bias, options.mask, options.kv_lengths))
        return real(op, q, k, v, options)

    monkeypatch.setattr(_attend, "forward", spy)
    leaves, options = leaves_of(problem), options_of(problem)
    ft.attention(**leaves, **options)
    given = [*leaves.values(), options["mask"], options["kv_lengths"]]
    assert [a.ctypes.data for a in seen] == [t.data_ptr() for t in given]


@pytest.mark.parametrize("sizes", [{"B": 0}, {"L": 0}, {"S": 0}, {"DV": 0}], ids=str)
def test_empty_sizes(sizes):
    problem = AttentionProblem(**sizes, bias="LxS")
    outputs, grads = solve_fastseq(problem)
    ref = solve_reference(problem)
    assert_all_close(outputs, ref.outputs)
    assert_all_close(grads, ref.grads, grad=True)


def packed_arguments(grad):
    numbers = ("top_left", None, 2, 0.5, None, 0.2, None)
    return "attention_varlen", (*varlen_arguments(grad), None, torch.tensor(3), *numbers)


OPERATORS = {
    "all": lambda grad: ("attention", operator_arguments(grad)),
    "plain": lambda grad: ("attention", (*operator_arguments(grad)[:3], *(None,) * 11, 0.0, None)),
    "mask": lambda grad: ("attention", operator_arguments(grad, bias=None, dropout_p=0.0)),
    "packed": packed_arguments,
}
every_operator = pytest.mark.parametrize("given", OPERATORS.values(), ids=OPERATORS)


@every_operator
def test_opcheck(given):
    name, args = given(True)
    torch.library.opcheck(getattr(torch.ops.fastseq, name).default, args)


def test_opcheck_of_other_layouts():
    args, operator = operator_arguments(), torch.ops.fastseq.attention.default
    for order in LAYOUTS.values():
        q, k, v = (laid_out(a.detach(), order).requires_grad_() for a in args[:3])
        args = (q, k, v, *args[3:])
        torch.library.opcheck(operator, args, test_utils="test_faketensor")
    scattered = laid_out(args[0].detach().repeat(1, 1, 1, 2), LAYOUTS["BLHD"])[..., ::2]
    torch.library.opcheck(operator, (scattered, *args[1:]), test_utils="test_faketensor")


@every_operator
@pytest.mark.parametrize("needs_bias", [False, True])
def test_opcheck_of_backward(given, needs_bias):
    name, _ = given(True)
    operator = getattr(torch.ops.fastseq, f"{name}_bwd").default
    n = 3 + len(attention_ops.TENSORS[name])
    for requires_grad in (False, True):
        _, args = given(requires_grad)
        o, lse = (t.detach() for t in getattr(torch.ops.fastseq, name)(*args))
        needs = needs_bias and name == "attention" and args[3] is not None
        args = (*args[:n], o, lse, torch.ones_like(o), torch.ones_like(lse), *args[n:], needs)
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not requires_grad:  # it would differentiate the backward, which refuses
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, args, test_utils=tests)


@every_operator
def test_operator_equals_the_direct_path(given):
    name, args = given(True)
    n = 3 + len(attention_ops.TENSORS[name])
    tensors = [t for t in args[:n] if t is not None and t.requires_grad]
    direct = attention_ops.run(name, *args[:3], args[3:n], args[n:])
    operator = getattr(torch.ops.fastseq, name)(*args)
    for a, b in zip(direct, operator, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    cotangents = [torch.randn_like(a) for a in direct]
    pairs = (torch.autograd.grad(outputs, tensors, cotangents) for outputs in (direct, operator))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", ["plain", "all"])
def test_compile_fullgraph(case, dynamic):
    torch._dynamo.reset()
    problem = AttentionProblem(**CASES[case])
    options = options_of(problem)
    compiled = torch.compile(
        lambda inputs: ft.attention(**inputs, **options, return_lse=True),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    eager, traced = leaves_of(problem), leaves_of(problem)
    expected, outputs = forward(problem, eager).values(), compiled(traced)
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    for leaves, results in ((eager, expected), (traced, outputs)):
        sum(a.nan_to_num(neginf=0).sin().sum() for a in results).backward()
        assert all(a.grad is not None for a in leaves.values())
    assert all(torch.equal(eager[k].grad, traced[k].grad) for k in eager)


def test_compile_fullgraph_of_packed_rows():
    torch._dynamo.reset()
    args = varlen_arguments()
    compiled = torch.compile(ft.attention_varlen, fullgraph=True, backend="aot_eager", dynamic=True)
    o, lse = compiled(*args, causal=True, window=(3, None), return_lse=True)
    expected = ft.attention_varlen(*args, causal=True, window=(3, None), return_lse=True)
    assert torch.equal(o, expected[0]) and torch.equal(lse, expected[1])
    assert lse.stride() == expected[1].stride()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_seed_is_drawn_from_torchs_generator(compiled):
    torch._dynamo.reset()
    q = torch.randn(2, 3, 8, 4)

    def call(q):
        return ft.attention(q, q, q, dropout_p=0.5)

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    torch.manual_seed(5)
    first, second = function(q), function(q)
    torch.manual_seed(5)
    assert torch.equal(function(q), first) and not torch.equal(first, second)
    torch.manual_seed(5)  # one number a call: what comes after does not depend on the size
    call(q)
    after = torch.rand(1)
    torch.manual_seed(5)
    call(torch.randn(1, 1, 2, 2, generator=torch.Generator()))
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 3, 2**64 - 1])
def test_seeds_are_numbers_or_tensors(seed):
    q = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    o = ft.attention(q, q, q, dropout_p=0.5, seed=seed)
    a = q.numpy()
    assert_close(o, reference.attention(a, a, a, dropout_p=0.5, seed=seed)[0])
    signed = (seed + 2**63) % 2**64 - 2**63
    given = torch.tensor([signed])
    assert torch.equal(ft.attention(q, q, q, dropout_p=0.5, seed=given), o)


def test_no_dropout_reads_no_generator():
    q, state = torch.randn(1, 1, 4, 4), torch.get_rng_state()
    ft.attention(q, q, q)
    ft.attention(q, q, q, dropout_p=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_second_derivative_is_refused():
    leaves = leaves_of(AttentionProblem(bias="LxS"))
    o = ft.attention(**leaves)
    (dq,) = torch.autograd.grad(o.sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_bwd: second derivatives are not implemented"):
        dq.sum().backward()


def test_in_place_change_before_backward_is_noticed():
    leaves = leaves_of(AttentionProblem())
    o = ft.attention(**leaves)
    with torch.no_grad():
        leaves["k"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_slopes_refuse_a_gradient():
    q = torch.randn(1, 2, 3, 4)
    slopes = ft.alibi_slopes(2).requires_grad_()
    with pytest.raises(RuntimeError, match="alibi_slopes have no gradient"):
        ft.attention(q, q, q, alibi_slopes=slopes)
    with torch.no_grad():
        ft.attention(q, q, q, alibi_slopes=slopes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_other_dtypes_are_refused(dtype):
    q, name = torch.zeros(1, 1, 2, 2, dtype=dtype), str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"q must be float32 or float64 on the CPU, got {name}"):
        ft.attention(q, q, q)


Q, K = torch.zeros(2, 4, 5, 3), torch.zeros(2, 2, 6, 3)
WRONG = {
    "k-dtype": (TypeError, "k must be float32 as q is", {"k": K.double()}),
    "heads": (ValueError, "NH must be a multiple of NK", {"k": K[:, [0] * 3], "v": K[:, [0] * 3]}),
    "v-length": (ValueError, r"v must be \(B, NK, S, DV\)", {"v": K[:, :, :5]}),
    "q-rank": (ValueError, r"q must be \(B, NH, L, D\), 4 axes", {"q": Q[0]}),
    "numpy": (TypeError, "v must be a torch.Tensor, got ndarray", {"v": K.numpy()}),
    "mask-list": (TypeError, "mask must be a torch.Tensor, got list", {"mask": [[True]]}),
    "mask-float": (TypeError, "mask must be .* of bool, got float32", {"mask": torch.ones(5, 6)}),
    "mask-shape": (ValueError, r"broadcast to \(B, NH, L, S\)", {"mask": torch.ones(6, 6) > 0}),
    "bias-dtype": (TypeError, "bias must be", {"bias": torch.ones(5, 6).double()}),
    "lengths-range": (ValueError, "0..S = 0..6", {"kv_lengths": torch.tensor([7, 0])}),
    "lengths-float": (TypeError, "must be integers", {"q_lengths": torch.ones(2)}),
    "causal": (ValueError, "'top_left' or 'bottom_right', got 'lower'", {"causal": "lower"}),
    "window": (ValueError, "window must be", {"window": 3}),
    "window-float": (ValueError, "window must be", {"window": (1.5, None)}),
    "softcap": (ValueError, "softcap must be positive", {"softcap": 0.0}),
    "dropout": (ValueError, "dropout_p must be in 0..1", {"dropout_p": 1.5}),
    "seed": (ValueError, "integer seed, got 1.5", {"dropout_p": 0.5, "seed": 1.5}),
    "seed-tensor": (ValueError, "int64 tensor of one", {"dropout_p": 0.5, "seed": torch.ones(2)}),
    "slopes": (ValueError, r"alibi_slopes must be \(NH,\)", {"alibi_slopes": torch.ones(3)}),
    "meta": (ValueError, "CPU, got one on meta", {"kv_lengths": torch.ones(2, device="meta")}),
}  # fmt: skip


@pytest.mark.parametrize("error, match, given", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_argument_errors(error, match, given, requires_grad):
    with pytest.raises(error, match=match):
        ft.attention(**{"q": Q.clone().requires_grad_(requires_grad), "k": K, "v": K} | given)


def test_errors_of_packed_rows_name_them():
    q, k, v, cu_q, cu_k = varlen_arguments(requires_grad=False)
    with pytest.raises(ValueError, match="attention_varlen: cu_seqlens_q must go from 0 to TQ = 9"):
        ft.attention_varlen(q, k, v, cu_q[:-1], cu_k)
    with pytest.raises(TypeError, match=r"cu_seqlens_k must be a torch\.Tensor, got list"):
        ft.attention_varlen(q, k, v, cu_q, [0, 11])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_and_transforms_are_refused_not_wrong():
    q = torch.randn(2, 1, 3, 4)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        ft.attention(torch.autograd.forward_ad.make_dual(q, q), q, q)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda q: ft.attention(q, q, q).sum())(q)


def test_vmap_is_a_loop():
    q = torch.randn(3, 2, 1, 3, 4)
    o = torch.vmap(lambda q: ft.attention(q, q, q))(q)
    assert torch.equal(o, torch.stack([ft.attention(a, a, a) for a in q]))


def test_profiler_sees_the_call():
    q = torch.randn(1, 1, 3, 4)
    with torch.profiler.profile() as profile:
        ft.attention(q, q, q)
    assert any(event.key == "fastseq::attention" for event in profile.key_averages())


def test_no_leak():
    problem = AttentionProblem(bias="LxS", dtype="float32")
    leaves = leaves_of(problem)

    def train():
        forward(problem, leaves)["o"].sum().backward()
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
