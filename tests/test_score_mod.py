"""Users' functions of attention's scores, `fastseq.score_mod`, in NumPy and in torch."""

import numpy as np
import pytest
import score_mod_problems
from attention_problems import ALL_OPTIONS, OPTIONS, solve_reference, solve_torch
from attention_running import judge, packed, results, row, solve
from running import assert_refused, assert_same_bits, zeros
from score_mod_problems import MODS, ScoreProblem
from tolerance import assert_all_close, assert_close

import fastseq

DTYPES = ("float32", "float64")
SIZES = {"NH": 4, "NK": 2, "D": 11, "DV": 9}
PATHS = {
    "decode": {"L": 2, "S": 19},
    "decode-chunks": {"L": 1, "S": 1100},
    "tiles": {"L": 13, "S": 19},
    "blocks": {"L": 30, "S": 270},
}
every_mod = pytest.mark.parametrize("mod", MODS)
every_path = pytest.mark.parametrize("path", PATHS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def problem_of(mod, path="tiles", dtype="float64", **fields):
    return ScoreProblem(**{**SIZES, **PATHS[path], **fields}, mod=mod, dtype=dtype)


def assert_right(problem):
    ours, (ref, peer) = solve(problem), judge(problem)
    assert_all_close(ours.outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)


@every_mod
def test_the_reference_is_torchs_autograd(mod):
    problem = problem_of(mod, ragged="qkv", causal=True)
    ours, ref = solve_reference(problem), solve_torch(problem)
    assert_all_close(ours.outputs, ref.outputs)
    assert_all_close(ours.grads, ref.grads, grad=True)


@every_dtype
@every_path
@every_mod
def test_outputs_and_gradients(mod, path, dtype):
    assert_right(problem_of(mod, path, dtype))


@pytest.mark.parametrize("options", [*OPTIONS, ALL_OPTIONS], ids=str)
@pytest.mark.parametrize("mod", ["cosine", "sliding"])
def test_with_every_option(mod, options):
    assert_right(problem_of(mod, **options))


@every_path
@pytest.mark.parametrize("mod", ["cosine", "sliding"])
def test_packed_rows(mod, path):
    """Positions count within each sequence, and b is its number."""
    ours, ref = packed(problem_of(mod, path, B=4, ragged="qkv", causal="bottom_right"))
    assert_all_close(ours, ref)


@pytest.mark.parametrize("S", [1, 7, 8, 9, 191, 192, 193, 255, 256, 257, 1023, 1025])
@pytest.mark.parametrize("L", [1, 9])
def test_sizes(L, S):
    assert_right(problem_of("cosine", B=1, NH=1, NK=1, L=L, S=S))


def test_rows_without_a_key_are_zero():
    @fastseq.score_mod
    def nothing(score, b, h, q_idx, kv_idx):
        return np.where(q_idx == 1, -np.inf, score)

    q, k = np.ones((1, 2, 12, 4)), np.ones((1, 2, 9, 4))
    (o, lse), pull = fastseq.vjp(
        fastseq.attention, q, k, k, score_mod=nothing, softcap=2.0, return_lse=True
    )
    assert np.all(o[:, :, 1] == 0) and np.all(lse[:, :, 1] == -np.inf)
    assert np.all(np.delete(o, 1, axis=2) != 0)
    dq, dk, dv = pull((np.ones_like(o), np.ones_like(lse)))
    assert np.all(dq[:, :, 1] == 0) and all(np.isfinite(a).all() for a in (dq, dk, dv))


def test_alibi_by_hand():
    slopes = fastseq.alibi_slopes(8)

    @fastseq.score_mod
    def alibi(score, b, h, q_idx, kv_idx):
        return score - np.exp(-np.log(2.0) * (h + 1)) * abs(q_idx - kv_idx)

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 8, 21, 16)) for _ in range(3))
    ours = fastseq.attention(q, k, v, score_mod=alibi, causal=True)
    assert_close(ours, fastseq.attention(q, k, v, alibi_slopes=slopes.astype(float), causal=True))


@pytest.mark.parametrize("path", PATHS)
@every_dtype
def test_threads_and_neighbours_change_no_bit(dtype, path, monkeypatch):
    problem = problem_of("cosine", path, dtype, B=3, ragged="qkv")
    found = []
    for threads in (1, 3):
        fastseq.set_num_threads(threads)
        found.append(results(problem))
    fastseq.set_num_threads(None)
    assert_same_bits(*found)
    first = results(row(problem, 0))
    assert_same_bits(first, {name: a[:1] for name, a in found[0].items()})


def test_one_function_one_kernel():
    made = [fastseq.score_mod(lambda s, b, h, i, j: s * 3 + i) for _ in range(2)]
    assert made[0] is made[1]
    assert made[0](2, 0, 0, 1, 0) == 7


# What is refused shows the line


def refused_with(error, text, line, function):
    with pytest.raises(error) as caught:
        fastseq.score_mod(function)
    message = str(caught.value)
    assert text in message and line in message and __file__ in message


def test_errors_show_the_line():
    def branches(score, b, h, q_idx, kv_idx):
        return score if q_idx > kv_idx else -score

    def fails(score, b, h, q_idx, kv_idx):
        return score + unknown  # noqa: F821

    def sums(score, b, h, q_idx, kv_idx):
        return score - np.sum(score)

    def picks(score, b, h, q_idx, kv_idx):
        return score[0]

    refused_with(TypeError, "write np.where, not if", "score if q_idx > kv_idx", branches)
    refused_with(TypeError, "NameError", "score + unknown", fails)
    refused_with(TypeError, "score_mod sums: np.sum cannot be compiled", "np.sum(score)", sums)
    refused_with(TypeError, "none can be picked", "score[0]", picks)


def test_wrong_arguments_and_results_show_the_line():
    def few(score, q_idx, kv_idx):
        return score

    def two(score, b, h, q_idx, kv_idx):
        return score, q_idx

    def array(score, b, h, q_idx, kv_idx):
        return np.zeros((3, 4))

    def none(score, b, h, q_idx, kv_idx):
        pass

    expected = "it must take (score, b, h, q_idx, kv_idx), got (score, q_idx, kv_idx)"
    refused_with(TypeError, expected, "def few(", few)
    refused_with(ValueError, "must return 1 values, returned 2", "def two(", two)
    refused_with(TypeError, "must return a value per element", "def array(", array)
    refused_with(TypeError, "must return a value per element", "def none(", none)


def test_other_things_are_refused():
    q = zeros(1, 1, 2, 4)
    message = "attention: score_mod must be made by fastseq.score_mod, got function"
    assert_refused(lambda: fastseq.attention(q, q, q, score_mod=lambda *a: a), TypeError, message)
    message = "score_mod: function must be callable, got int"
    assert_refused(lambda: fastseq.score_mod(3), TypeError, message)


# torch

torch = pytest.importorskip("torch")
import fastseq.torch  # noqa: E402


def tensors(shape=(2, 4, 13, 8), dtype=torch.float64, grad=True):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(3)]


@every_mod
def test_torch_gradcheck(mod):
    def call(*t):
        return fastseq.torch.attention(*t, score_mod=MODS[mod], causal=True)

    assert torch.autograd.gradcheck(call, tensors((1, 2, 5, 4)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mod", ["distance", "cosine", "sliding"])
def test_torch_equals_flex_attention(mod):
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    q, k, v = tensors(grad=False)
    function = score_mod_problems.TORCH_MODS[MODS[mod]]

    def theirs(s, *at):
        return function(s, *(a.to(s) for a in at))

    expected = flex(q, k, v, score_mod=theirs)
    assert_close(fastseq.torch.attention(q, k, v, score_mod=MODS[mod]), expected)


def test_torch_compile():
    def call(q, k, v):
        return fastseq.torch.attention(q, k, v, score_mod=MODS["cosine"])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, expected = tensors(), tensors()
    compiled(*ours).sum().backward()
    call(*expected).sum().backward()
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_torch_operator():
    q, k, v = tensors((1, 2, 5, 4))
    numbers = (None, None, None, None, None, 0.0, MODS["cosine"].key)
    args = (q, k, v, *(None,) * 6, *numbers)
    torch.library.opcheck(torch.ops.fastseq.attention.default, args)


@pytest.mark.parametrize("mod", ["cosine", "sliding"])
def test_torch_varlen(mod):
    q, k, v = tensors((11, 2, 8), grad=False)
    cu = torch.tensor([0, 4, 11])
    ours = fastseq.torch.attention_varlen(q, k, v, cu, cu, score_mod=MODS[mod])
    numpy = [a.numpy() for a in (q, k, v, cu, cu)]
    assert (ours.numpy() == fastseq.attention_varlen(*numpy, score_mod=MODS[mod])).all()


def test_torch_multihead_attention():
    from fastseq.torch.nn import MultiheadAttention

    torch.manual_seed(0)
    mod = MultiheadAttention(8, 2, batch_first=True, score_mod=MODS["documents"]).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    halves = [mod(part, part, part, need_weights=False)[0] for part in (x[:, :6], x[:, 6:])]
    alone = MultiheadAttention(8, 2, batch_first=True).double()
    alone.load_state_dict(mod.state_dict())
    expected = [alone(part, part, part, need_weights=False)[0] for part in (x[:, :6], x[:, 6:])]
    whole = mod(x, x, x, need_weights=False)[0]
    assert_close(whole, torch.cat(expected, dim=1).detach())
    assert len(halves) == 2
    with pytest.raises(ValueError, match="need_weights must be False with a score_mod"):
        mod(x, x, x)
