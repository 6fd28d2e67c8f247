"""Attention's Triton kernels, through the public functions: in the interpreter, or on a GPU.

Without a GPU the kernels run in Triton's interpreter on CPU tensors (float32 and float16), and
`on_gpu` sends them there. Blocks are shrunk, so that small shapes have several, the last not full.
"""

import numpy as np
import pytest
from attention_problems import (
    ALL_OPTIONS,
    OPTIONS,
    AttentionProblem,
    _torch_attention,
    solve_reference,
)
from attention_running import lengths, pack, row
from problems import Result
from running import assert_refused
from tolerance import assert_all_close

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the GPU kernels need triton")

from fastseq.kernels.triton import attention as kernels  # noqa: E402
from fastseq.kernels.triton.launch import Row, interpreted  # noqa: E402

import fastseq.torch as fst  # noqa: E402
from fastseq.reference import attention as reference  # noqa: E402
from fastseq.torch import attention_ops  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="no GPU, and triton does not interpret"
)
DTYPES = ["float32", "float16"] + ["bfloat16"] * (DEVICE == "cuda")
TABLES = ("FORWARD", "FORWARD_PAIRS", "DECODE", "DQ", "DQ_PAIRS", "DKV")
TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
SIZES = {"B": 2, "NH": 2, "NK": 1, "L": 19, "S": 22, "D": 5, "DV": 3}  # no multiples of 16
LONG = {"L": 33, "S": 9}
EVERYTHING = ALL_OPTIONS | {"B": 2, "NH": 2, "NK": 1, "window": (14, 3)}
SMALL = {"B": 1, "NH": 1, "L": 17, "S": 18}
ALONE = [fields for fields in OPTIONS if "NH" not in fields and fields != {"causal": "top_left"}]


@pytest.fixture(autouse=True)
def small_blocks_on_the_gpu(monkeypatch):
    for name in TABLES:
        monkeypatch.setattr(kernels, name, [Row(np.inf, size, 0, TILE) for size in (2, 4)])
    monkeypatch.setattr(kernels, "SPAN", 16)
    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    monkeypatch.setattr(attention_ops, "on_gpu", lambda tensor: True)
    with np.errstate(all="ignore"):  # the interpreter's arithmetic is NumPy's
        yield


@pytest.fixture
def decoding(monkeypatch):
    """Queries of up to two blocks a group split the keys, at 16 a split."""
    monkeypatch.setattr(kernels, "FEW_ROWS", 64)


def problem_of(fields, dtype="float32"):
    """The problem, its arrays rounded to the dtype and kept as the widest the reference needs."""
    problem = AttentionProblem(**(SIZES | fields), dtype="float64")
    kept = getattr(torch, dtype)

    def rounded(arrays, names):
        return {
            name: torch.tensor(a).to(kept if name in names else torch.float32).double().numpy()
            for name, a in arrays.items()
        }

    options = {}
    if "alibi_slopes" in problem.options:
        options["alibi_slopes"] = problem.options["alibi_slopes"].astype(np.float32).astype(float)
    return problem.having(
        inputs=rounded(problem.inputs, problem.inputs),
        cotangents=rounded(problem.cotangents, ("do",)),
        options=options,
    )


def tensor(a, dtype=None):
    return torch.tensor(np.asarray(a), device=DEVICE, dtype=dtype)


def call_of(problem, dtype, requires_grad=False):
    """Leaves by name, and the options of the public function."""
    leaves = {
        name: tensor(a, getattr(torch, dtype)).requires_grad_(requires_grad)
        for name, a in problem.inputs.items()
    }
    options = {
        name: tensor(a, torch.float32 if name == "alibi_slopes" else None)
        if isinstance(a, np.ndarray)
        else a
        for name, a in problem.options.items()
    }
    return leaves, options


def arrays(tensors):
    return {name: a.detach().cpu() for name, a in tensors.items()}


def forward(problem, dtype="float32"):
    leaves, options = call_of(problem, dtype)
    o, lse = fst.attention(**leaves, **options, return_lse=True)
    return arrays({"o": o, "lse": lse})


def solve(problem, dtype="float32"):
    leaves, options = call_of(problem, dtype, requires_grad=True)
    o, lse = fst.attention(**leaves, **options, return_lse=True)
    do, dlse = problem.cotangents["do"], problem.cotangents["dlse"]
    cotangents = tensor(do, o.dtype), tensor(dlse, torch.float32)
    grads = torch.autograd.grad((o, lse), list(leaves.values()), cotangents)
    grads = dict(zip(leaves, grads, strict=True))
    return Result(arrays({"o": o, "lse": lse}), arrays(grads))


def peer(problem, dtype="float32"):
    """torch's Result in the dtype, its operators one by one on the CPU; lse float32 as ours is."""
    kept = getattr(torch, dtype)
    leaves = {n: torch.tensor(a).to(kept).requires_grad_() for n, a in problem.inputs.items()}
    cotangents = {n: torch.tensor(a).to(kept) for n, a in problem.cotangents.items()}
    o, lse, has_key = _torch_attention(leaves, problem.options)
    loss = (cotangents["do"] * o).sum() + (cotangents["dlse"] * lse)[has_key].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    grads = dict(zip(leaves, grads, strict=True))
    return Result({"o": o.detach(), "lse": lse.detach().float()}, grads)


def assert_solved(problem, dtype="float32"):
    ours, ref, torchs = solve(problem, dtype), solve_reference(problem), peer(problem, dtype)
    assert_all_close(ours.outputs, ref.outputs, torchs.outputs)
    assert_all_close(ours.grads, ref.grads, torchs.grads, grad=True)


# Values and gradients


@pytest.mark.parametrize("fields", [*ALONE, EVERYTHING], ids=str)
def test_every_option_meets_the_reference(fields):
    assert_solved(problem_of(fields))


@pytest.mark.parametrize("fields", [{"causal": "bottom_right"}, EVERYTHING], ids=str)
def test_more_queries_than_keys(fields):
    assert_solved(problem_of(fields | LONG))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("fields", [{"causal": True}, EVERYTHING], ids=str)
def test_half_precision(dtype, fields):
    assert_solved(problem_of(fields, dtype), dtype)


@pytest.mark.parametrize("fields", [*ALONE, EVERYTHING], ids=str)
def test_decoding(decoding, fields):
    """Split keys and their merge, against the reference; one launch has several splits."""
    problem = problem_of({"L": 3} | fields)
    assert_all_close(forward(problem), solve_reference(problem).outputs, peer(problem).outputs)


def test_decoding_in_one_split(decoding, monkeypatch):
    monkeypatch.setattr(kernels, "SPAN", 256)
    problem = problem_of({"L": 3, "causal": "bottom_right", "ragged": "kv"})
    assert_all_close(forward(problem), solve_reference(problem).outputs, peer(problem).outputs)


@pytest.mark.parametrize("few", [0, 64], ids=["blocks", "splits"])
def test_wide_heads_go_chunk_by_chunk(monkeypatch, few):
    monkeypatch.setattr(kernels, "FEW_ROWS", few)
    monkeypatch.setattr(kernels, "WIDEST", 16)
    monkeypatch.setattr(kernels, "CHUNK", 16)
    assert_solved(problem_of(SMALL | {"D": 37, "DV": 20, "causal": True}))


@pytest.mark.skipif(DEVICE == "cpu", reason="shipped block sizes are for a GPU")
@pytest.mark.parametrize("fields", [{"causal": True}, {"bias": "NHxLxS"}], ids=str)
@pytest.mark.parametrize("D", [16, 64, 80, 128, 256, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_blocks(monkeypatch, dtype, D, fields):
    monkeypatch.undo()
    for sizes in ({"L": 333, "S": 517}, {"L": 2, "S": 1500}):
        assert_solved(problem_of(fields | sizes | {"D": D, "DV": D}, dtype), dtype)


# Packed rows


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": "bottom_right", "window": (9, 2), "alibi": "BxNH", "dropout_p": 0.3},
    ],
    ids=["plain", "options"],
)
def test_packed_rows_meet_the_reference(fields):
    problem = problem_of({"B": 6, "NH": 1, "ragged": "qkv"} | fields)
    (q, k, v, cu_q, cu_k), (do, dlse) = pack(problem)
    left_out = ("q_lengths", "kv_lengths", "mask")
    given = {name: a for name, a in problem.options.items() if name not in left_out}
    ref = dict(
        zip(("o", "lse"), reference.attention_varlen(q, k, v, cu_q, cu_k, **given), strict=True)
    )
    ref_grads = reference.attention_varlen_vjp(q, k, v, cu_q, cu_k, do=do, dlse=dlse, **given)
    _, options = call_of(problem, "float32")
    options = {name: options[name] for name in given}
    leaves = [tensor(a, torch.float32).requires_grad_() for a in (q, k, v)]
    cu = [tensor(a, torch.int32) for a in (cu_q, cu_k)]
    o, lse = fst.attention_varlen(*leaves, *cu, **options, return_lse=True)
    grads = torch.autograd.grad((o, lse), leaves, [tensor(a, torch.float32) for a in (do, dlse)])
    peers = packed_peer(problem)
    assert_all_close(arrays({"o": o, "lse": lse}), ref, peers.outputs)
    found = arrays(dict(zip("qkv", grads, strict=True)))
    assert_all_close(found, ref_grads, peers.grads, grad=True)


def packed_peer(problem):
    """`peer` of the padded rows, those that lengths leave joined."""
    padded, (of_q, of_k) = peer(problem), lengths(problem)

    def join(a, n):
        return torch.cat([a[b, :, : n[b]].transpose(0, 1) for b in range(problem.B)])

    grads = {name: join(a, of_q if name == "q" else of_k) for name, a in padded.grads.items()}
    return Result({name: join(a, of_q) for name, a in padded.outputs.items()}, grads)


# NaN


@pytest.mark.parametrize(
    "fields",
    [{"causal": True}, {"B": 8, "mask": "LxS"}, {"B": 4, "ragged": "qkv"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_nan_reaches_what_attends_it_and_nothing_else(name, fields):
    # with a mask few keys stay finite: eight rows, or torch's error is that of a few numbers
    problem = problem_of(SMALL | fields)
    poisoned = (problem.cotangents if name == "do" else problem.inputs)[name].copy()
    poisoned[:, :, 7], poisoned[:, :, 11, 1] = np.nan, np.nan if name == "do" else np.inf
    part = "cotangents" if name == "do" else "inputs"
    problem = problem.having(**{part: {name: poisoned}})
    ours, ref, torchs = solve(problem), solve_reference(problem), peer(problem)
    assert_all_close(ours.outputs, ref.outputs, torchs.outputs)
    assert_all_close(ours.grads, ref.grads, torchs.grads, grad=True)


def test_nan_in_decoding(decoding):
    problem = problem_of({"L": 3, "causal": True})
    v = problem.inputs["v"].copy()
    v[:, :, 2:] = np.nan
    problem = problem.having(inputs={"v": v})
    ours, ref = forward(problem), solve_reference(problem)
    assert_all_close(ours, ref.outputs, peer(problem).outputs)


# Sums


@pytest.mark.parametrize("few", [0, 64], ids=["blocks", "splits"])
def test_a_row_has_the_bits_it_has_alone(monkeypatch, few):
    monkeypatch.setattr(kernels, "FEW_ROWS", few)
    problem = problem_of(SMALL | {"B": 2, "causal": "bottom_right", "ragged": "kv", "alibi": "NH"})
    ours, again = solve(problem), solve(problem)
    alone = solve(row(problem, 1))
    for results, one, two in zip(ours, alone, again, strict=True):
        for name, a in results.items():
            assert torch.equal(a[1:2], one[name]), name
            assert torch.equal(a, two[name]), name


# Layouts, sizes, errors


def test_outputs_follow_the_layout():
    problem = problem_of({"causal": True})
    leaves, options = call_of(problem, "float32")
    o = fst.attention(**leaves, **options)
    given = {
        name: a.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, a in leaves.items()
    }
    strided = fst.attention(**given, **options)
    grads = torch.autograd.grad(strided.sum(), list(given.values()))
    assert torch.equal(strided, o)
    assert strided.transpose(1, 2).is_contiguous()
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)
    rows = {name: a.mT.contiguous().mT for name, a in leaves.items()}  # features not consecutive
    assert torch.equal(fst.attention(**rows, **options), o)


@pytest.mark.parametrize("sizes", [{"L": 0}, {"S": 0}, {"B": 0}, {"DV": 0}], ids=str)
def test_empty_sizes(sizes):
    problem = problem_of(sizes | {"bias": "NHxLxS"})
    ours, ref = solve(problem), solve_reference(problem)
    for found, expected in ((ours.outputs, ref.outputs), (ours.grads, ref.grads)):
        for name, a in expected.items():
            assert found[name].shape == a.shape, name
            if name != "lse" or sizes != {"DV": 0}:
                assert np.array_equal(found[name].numpy(), a) or a.any(), name


def test_errors_name_the_argument():
    q, k = torch.zeros(2, 4, 5, 3, device=DEVICE), torch.zeros(2, 2, 6, 3, device=DEVICE)
    where = q.device
    assert_refused(
        lambda: fst.attention(q.double(), k.double(), k.double()), TypeError,
        "attention: q must be float32, bfloat16 or float16 on a CUDA device, "
        f"got float64 on {where}",
    )  # fmt: skip
    assert_refused(
        lambda: fst.attention(q, k.half(), k), TypeError,
        "attention: k must be float32 as q is, got float16",
    )  # fmt: skip
    assert_refused(
        lambda: fst.attention(q, k, k[:, :, 1:]), ValueError,
        "attention: v must be (B, NK, S, DV) = (2, 2, 6, 3), got (2, 2, 5, 3)",
    )  # fmt: skip
    assert_refused(
        lambda: fst.attention(q, k, k, kv_lengths=torch.ones(3, dtype=torch.int64, device=where)),
        ValueError, "attention: kv_lengths must be (B,) = (2,), got (3,)",
    )  # fmt: skip
    assert_refused(
        lambda: fst.attention(q, k, k, mask=torch.ones(5, 6, device=where)), TypeError,
        "attention: mask must be an array of bool, got float32",
    )  # fmt: skip
    assert_refused(
        lambda: fst.attention(q, k, k, mask=torch.ones(5, 7, device=where, dtype=torch.bool)),
        ValueError, "attention: mask must broadcast to (B, NH, L, S) = (2, 4, 5, 6), got (5, 7)",
    )  # fmt: skip


# Routes


@pytest.mark.parametrize("name", ["attention", "attention_bwd", "attention_varlen"])
def test_operators_are_registered_for_cuda(name):
    for operator in (name, "attention_varlen_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastseq::{operator}", "CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_of_fake_tensors(dtype):
    """What a compiler sees: lse is float32, of any dtype of q."""
    q, k = (torch.empty(2, 4, n, 8, device="meta", dtype=dtype) for n in (5, 6))
    o, lse = torch.ops.fastseq.attention(q, k, k, *(None,) * 11, 0.0, None)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert (o.shape, lse.shape) == (q.shape, q.shape[:3])


def test_operator_equals_the_direct_path():
    problem = problem_of(SMALL | {"causal": True, "bias": "LxS"})
    leaves, options = call_of(problem, "float32", requires_grad=True)
    o = fst.attention(**leaves, **options)
    given = [leaves[name] for name in ("q", "k", "v", "bias")]
    by_operator, _ = torch.ops.fastseq.attention(
        *given, *(None,) * 5, "top_left", None, None, None, None, 0.0, None
    )
    grads = [torch.autograd.grad(a.sum(), given) for a in (o, by_operator)]
    assert torch.equal(o, by_operator)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_modules_and_torchs_function_arrive(monkeypatch):
    called = []
    run = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda call: called.append(call) or run(call))
    torch.manual_seed(0)
    ours = fst.nn.MultiheadAttention(12, 2, device=DEVICE)
    x = torch.randn(18, 2, 12, device=DEVICE)
    theirs = torch.nn.MultiheadAttention(12, 2, device=DEVICE)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(
        ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0]
    )
    q = torch.randn(2, 3, 18, 4, device=DEVICE)
    torch.testing.assert_close(
        fst.scaled_dot_product_attention(q, q, q, is_causal=True),
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
    )
    assert len(called) == 2
