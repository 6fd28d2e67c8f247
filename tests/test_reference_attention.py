"""The reference of attention: against torch, finite differences, and its own contract."""

from itertools import cycle, product

import numpy as np
import pytest
from attention_problems import (
    ALL_OPTIONS,
    OPTIONS,
    AttentionProblem,
    option_pairs,
    solve_reference,
    solve_torch,
)
from finite_differences import assert_gradients_are_those_of
from problems import cast
from tolerance import assert_all_close, assert_close

from fastseq.reference import attention as reference

EDGES = [
    AttentionProblem(B=1, NH=1, NK=1, L=1, S=1, D=1, DV=1),
    AttentionProblem(B=1, NH=2, NK=1, L=1, S=13, D=8, DV=1, causal="bottom_right"),
    AttentionProblem(B=1, NH=1, NK=1, L=17, S=2, D=1, DV=3, causal="bottom_right"),
    AttentionProblem(B=5, NH=8, NK=2, L=33, S=47, D=16, DV=16, ragged="qkv", window=(3, 2)),
]
SIZES = [{"L": 5, "S": 7}, {"L": 7, "S": 5}, {"L": 6, "S": 6}]  # whatever is aligned differs
SINGLES = [a | size for a, size in product([{}, *OPTIONS, ALL_OPTIONS], SIZES)]
PAIRS = [a | size for a, size in zip(option_pairs(), cycle(SIZES), strict=False)]


# Against torch


@pytest.mark.parametrize(
    "problem", [AttentionProblem(**{"B": 5} | a) for a in SINGLES + PAIRS] + EDGES, ids=str
)
def test_matches_torch(problem):
    ours, judge = solve_reference(problem), solve_torch(problem)
    assert_all_close(ours.outputs, judge.outputs)
    assert_all_close(ours.grads, judge.grads, grad=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"mask": "BxNHxLxS"},
        {"mask": "LxS"},
        {"bias": "BxNHxLxS"},
        {"bias": "NHxLxS"},
        {"scale": -0.3, "NK": 1},
        {"causal": True, "NK": 1},
        {"mask": "Bx1x1xS", "NK": 1},
    ],
    ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()) or "plain",
)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "L{L}-S{S}".format(**size))
def test_matches_scaled_dot_product_attention(options, size):
    torch = pytest.importorskip("torch")
    problem = AttentionProblem(**options | size)
    leaves = {n: torch.tensor(a, requires_grad=True) for n, a in problem.inputs.items()}
    mask = problem.options.get("mask")
    o = torch.nn.functional.scaled_dot_product_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves.get("bias") if mask is None else torch.tensor(mask),
        is_causal=problem.causal,
        scale=problem.scale,
        enable_gqa=problem.NK != problem.NH,
    )
    grads = torch.autograd.grad(o, leaves.values(), torch.tensor(problem.cotangents["do"]))
    ours = solve_reference(problem.having(cotangents={"dlse": np.zeros(o.shape[:-1])}))
    assert_close(ours.outputs["o"], o.detach(), name="o")
    assert_all_close(ours.grads, dict(zip(leaves, grads, strict=True)), grad=True)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_inf_come_out_where_torch_has_them(name, value):
    problem = AttentionProblem()
    array = problem.inputs[name].copy()
    array[0, 1, 2, 0] = value
    problem = problem.having(inputs={name: array})
    ours, judge = solve_reference(problem), solve_torch(problem)
    assert_all_close({"o": ours.outputs["o"]}, {"o": judge.outputs["o"]})
    assert_all_close(ours.grads, judge.grads, grad=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all"])
def test_half_and_single_match_float64_as_torch_does(options, dtype):
    problem = AttentionProblem(**options, dtype=dtype)
    ours, ref, peer = (
        solve_reference(problem, dtype),
        solve_reference(problem),
        solve_torch(problem),
    )
    assert_all_close(ours.outputs, ref.outputs, peer.outputs)
    assert_all_close(ours.grads, ref.grads, peer.grads, grad=True)


# The gradients against finite differences of the same reference


@pytest.mark.parametrize("options", [{"bias": "Bx1xLxS"}, ALL_OPTIONS], ids=["bias", "all"])
def test_gradients_are_those_of_the_forward(options, rng):
    problem = AttentionProblem(**options)
    cotangents = cast(problem.cotangents, "longdouble")

    def loss(**inputs):
        o, lse = reference.attention(**inputs, **problem.options)
        has_key = lse != -np.inf
        return (cotangents["do"] * o).sum() + (cotangents["dlse"] * lse)[has_key].sum()

    grads = solve_reference(problem, "longdouble").grads
    assert_gradients_are_those_of(loss, cast(problem.inputs, "longdouble"), grads, rng)


def test_gradients_left_out_are_zeros():
    problem = AttentionProblem()
    both = solve_reference(problem).grads
    parts = [
        reference.attention_vjp(**problem.inputs, **problem.options, **{name: a})
        for name, a in problem.cotangents.items()
    ]
    for name, whole in both.items():
        assert_close(parts[0][name] + parts[1][name], whole, grad=True, name=f"d{name}")


# The same in pieces: packed, and over two halves of the keys


def packed(problem):
    """pack(name, array) without the padding of a ragged problem, and its cu_seqlens_q, _k."""
    lengths = {"q": problem.options["q_lengths"], "k": problem.options["kv_lengths"]}
    lengths |= {"v": lengths["k"], "do": lengths["q"], "dlse": lengths["q"]}

    def pack(name, a):
        rows = [a[b, :, :n].swapaxes(0, 1) for b, n in enumerate(lengths[name])]
        return np.concatenate(rows)

    cu_seqlens = {f"cu_seqlens_{n}": np.cumsum([0, *lengths[n]]) for n in ("q", "k")}
    return pack, cu_seqlens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"NH": 4, "NK": 2, "window": (2, 1), "softcap": 2.0, "alibi": "BxNH"},
        {"causal": "bottom_right", "alibi": "NH", "dropout_p": 0.4},
    ],
    ids=["plain", "gqa-window-softcap-alibi", "bottom_right-alibi-dropout"],
)
def test_packed_is_padded_without_the_padding(options):
    problem = AttentionProblem(**{"B": 6, "ragged": "qkv"} | options)
    padded, (pack, cu_seqlens) = solve_reference(problem), packed(problem)
    arrays = {name: pack(name, a) for name, a in (problem.inputs | problem.cotangents).items()}
    inputs, cotangents = ({n: arrays[n] for n in names} for names in ("qkv", ("do", "dlse")))
    given = {n: v for n, v in problem.options.items() if not n.endswith("lengths")} | cu_seqlens

    o, lse = reference.attention_varlen(**inputs, **given)
    grads = reference.attention_varlen_vjp(**inputs, **given, **cotangents)
    assert_close(o, pack("q", padded.outputs["o"]), name="o")
    assert_close(lse, pack("q", padded.outputs["lse"]), name="lse")
    assert_all_close(grads, {n: pack(n, a) for n, a in padded.grads.items()}, grad=True)


@pytest.mark.parametrize("cut", [0, 3, 7])
@pytest.mark.parametrize(
    "options", [{}, {"mask": "BxNHxLxS", "bias": "LxS"}], ids=["plain", "mask"]
)
def test_two_sets_of_keys_merge_into_the_whole(options, cut):
    problem = AttentionProblem(**options)
    a = problem.inputs | {n: m for n, m in problem.options.items() if n == "mask"}
    parts = []
    for keys in (slice(cut), slice(cut, None)):
        part = {n: x[..., keys] if n in ("mask", "bias") else x[..., keys, :] for n, x in a.items()}
        parts += reference.attention(**part | {"q": a["q"]})
    o, lse = reference.merge_attention(*parts)
    assert_all_close({"o": o, "lse": lse}, solve_reference(problem).outputs)


def test_a_part_without_a_key_is_not_read_by_the_merge():
    o, lse = solve_reference(AttentionProblem()).outputs.values()
    nothing = np.full_like(o, np.nan), np.full_like(lse, -np.inf)
    for parts in ((o, lse, *nothing), (*nothing, o, lse)):
        assert_all_close(dict(enumerate(reference.merge_attention(*parts))), {0: o, 1: lse})
    empty = reference.merge_attention(*nothing, *nothing)
    assert not empty[0].any() and (empty[1] == -np.inf).all()


# Edges


@pytest.mark.parametrize("size", [{"B": 0}, {"L": 0}, {"S": 0}, {"DV": 0}], ids=str)
def test_empty_sizes_have_a_result(size):
    problem = AttentionProblem(**{"bias": "LxS", "causal": "bottom_right", "dropout_p": 0.5} | size)
    result = solve_reference(problem)
    rows = (problem.B, problem.NH, problem.L)
    assert result.outputs["o"].shape == (*rows, problem.DV)
    assert result.outputs["lse"].shape == rows
    for name, a in problem.inputs.items():
        assert result.grads[name].shape == a.shape
    if "S" in size:
        assert not result.outputs["o"].any() and (result.outputs["lse"] == -np.inf).all()
        assert not result.grads["q"].any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble"])
def test_computes_in_the_dtype_of_q(dtype):
    result = solve_reference(AttentionProblem(**ALL_OPTIONS), dtype)
    for a in (*result.outputs.values(), *result.grads.values()):
        assert a.dtype == dtype
    o, lse = result.outputs.values()
    for a in reference.merge_attention(o, lse, o, lse):
        assert a.dtype == dtype
