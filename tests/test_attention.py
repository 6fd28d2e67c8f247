"""The attention kernels through the NumPy API, held against the float64 reference.

What may not be attended stands in test_attention_masked.py, the promises about bits in
test_attention_bits.py.
"""

from functools import cache
from itertools import product

import numpy as np
import pytest
from attention_problems import (
    ALL_OPTIONS,
    OPTIONS,
    AttentionProblem,
    option_pairs,
    solve_reference,
)
from attention_running import forward, judge, packed, solve, vjp
from finite_differences import assert_gradients_are_those_of
from running import assert_same_bits
from tolerance import assert_all_close

import fastseq
from fastseq import _dispatch
from fastseq.reference import attention as reference

DTYPES = ("float32", "float64")
LANES = {
    dtype: _dispatch.kernels("attention", np.dtype(dtype)).description()[0] for dtype in DTYPES
}

# At most 8 query heads and queries of a key head read its keys as they are, and up to 48 against as
# many keys as their square; others pack them.
PATHS = {"decode": {"L": 8, "S": 19}, "packed": {"L": 13, "S": 19}}
GROUPED = {"decode": {"L": 2, "S": 19}, "packed": {"L": 13, "S": 19}}
SIZES = {"B": 5, "D": 11, "DV": 9}


def on_both_paths(fields):
    """The fields with sizes that take them along either path."""
    grouped = fields.get("NH", 3) != fields.get("NK", 3)
    return [{**SIZES, **size, **fields} for size in (GROUPED if grouped else PATHS).values()]


CASES = [
    AttentionProblem(**fields, dtype=dtype)
    for chosen, dtype in product([{}, *OPTIONS, ALL_OPTIONS, *option_pairs()], DTYPES)
    for fields in on_both_paths(chosen)
]
CASES += [  # more queries than keys: an offset below zero, rows before all keys
    AttentionProblem(**{**SIZES, "L": 23, "S": 9, **fields}, dtype=dtype)
    for fields, dtype in product([{}, *OPTIONS, ALL_OPTIONS], DTYPES)
]

ONE = {"B": 1, "NH": 1, "NK": 1}
GROUP = {"B": 2, "NH": 4, "NK": 2}
# About every size at which a kernel cuts: packed keys 256, or 512 with AVX-512; decoding's chunks
# 1024, or 2048 with 4 key heads, and the 16 and 32 keys it sums at once; 48 queries of a block,
# forward and backward; backward's 192 keys, and its slabs: one up to 192 keys, 2, 3, 4 of them, 3
# again; its segments of 2048 queries.
SOME_KEYS = (191, 193, 255, 256, 257, 385, 511, 512, 513)
CUTS = [
    *({**GROUP, "L": 25, "S": s, "D": 5, "DV": 3} for s in SOME_KEYS),
    *({**ONE, "L": 49, "S": s, "D": 3, "DV": 5} for s in (576, 577, 769, 1537, 2100)),
    *({**GROUP, "L": 1, "S": s, "D": 9, "DV": 17} for s in (63, 64, 65, 1023, 1024, 1025, 2100)),
    *({"B": 1, "NH": 4, "NK": 4, "L": 1, "S": s, "D": 9, "DV": 17} for s in (2047, 2048, 2049)),
    *({**GROUP, "L": 6, "S": s, "D": 9, "DV": 17} for s in (143, 144, 145, 1023, 1025, 2100)),
    *({**ONE, "L": n, "S": 2304, "D": 5, "DV": 3} for n in (9, 47, 48)),
    *({**ONE, "L": n, "S": 21, "D": 5, "DV": 3} for n in (8, 47, 48, 49, 97, 2047, 2048, 2050)),
    *({**GROUP, "L": n, "S": 21, "D": 5, "DV": 3} for n in (3, 4, 5, 23, 24, 25)),
    {"B": 1, "NH": 7, "NK": 1, "L": 7, "S": 600, "D": 5, "DV": 3},  # 49 rows of one group
]
CUT_OPTIONS = [
    {},
    {"causal": "bottom_right", "window": (70, None), "bias": "LxS", "alibi": "NH"},
    {"mask": "BxNHxLxS", "softcap": 1.5, "dropout_p": 0.3, "ragged": "kv"},
]
LARGE = [
    AttentionProblem(**size, **options, dtype=dtype)
    for size, options, dtype in product(CUTS, CUT_OPTIONS, DTYPES)
]
# Head sizes of models; heads whose packed keys and values are more than are held at a time.
LARGE += [
    AttentionProblem(B=1, NH=4, NK=2, L=21, S=70, D=D, DV=DV, dtype=dtype, causal=True)
    for (D, DV), dtype in product([(80, 80), (96, 96), (128, 128), (200, 200), (64, 48)], DTYPES)
]
# Decoding's tiles of 1 to 4 rows, with values read once, in passes of rows, and by columns.
LARGE += [
    AttentionProblem(B=1, NH=n, NK=1, L=1, S=37, D=D, DV=D, dtype=dtype)
    for n, D, dtype in product((1, 2, 3, 4), (64, 96, 128, 192, 256, 272), DTYPES)
]
LARGE += [AttentionProblem(B=1, NH=3, NK=3, L=49, S=1030, D=512, DV=520, ragged="q")]


def edges():
    """Sizes of one, primes, and about the lane count, a panel (2 or 4 vectors), several panels."""
    for dtype, path in product(DTYPES, PATHS.values()):
        lanes = LANES[dtype]
        about = {n + d for n in (lanes, 2 * lanes, 4 * lanes) for d in (-1, 0, 1)}
        for name, n in product(("S", "D", "DV"), sorted({1, 2, 3, 9 * lanes + 5} | about)):
            yield AttentionProblem(**{**SIZES, **path, name: n}, dtype=dtype)
    for dtype, n in product(DTYPES, (1, 3, 5, 6, 7, 11, 12, 17)):  # rows of a tile: 4 and 6
        yield AttentionProblem(**{**SIZES, "NK": 1, "L": n, "S": 7}, dtype=dtype)
    yield AttentionProblem(**ONE, L=1, S=1, D=1, DV=1)


def assert_solved(problem):
    ours, (ref, peer) = solve(problem), judge(problem)
    assert_all_close(ours.outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)


# Error of the outputs, and of the gradient of every input


@cache
def judge_once(problem):
    """For problems as they are drawn: one changed by `having` would be taken for its original."""
    return judge(problem)


@pytest.mark.parametrize("problem", CASES + LARGE, ids=str)
def test_forward_error(problem):
    ref, peer = judge_once(problem)
    assert_all_close(forward(problem), ref.outputs, peer and peer.outputs)


def is_decode(problem):
    rows = problem.L * problem.NH // problem.NK
    return rows <= 8 or (rows <= 48 and rows**2 <= problem.S)


# One backward pass follows both paths. Of so few queries as decoding's, torch's own float32 error,
# the room, is at times nil: they are float64 here.
@pytest.mark.parametrize(
    "problem",
    [p for p in CASES if p.dtype == "float64" or not is_decode(p)] + LARGE,
    ids=str,
)
def test_gradient_error(problem):
    """With both outputs' gradients at once: a part of the sum is that through lse."""
    ours, (ref, peer) = solve(problem), judge_once(problem)
    assert ours.grads.keys() == problem.inputs.keys()
    assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_written_to_the_arguments(path):
    problem = AttentionProblem(**{**SIZES, **PATHS[path], **ALL_OPTIONS})
    solve(problem)
    drawn = AttentionProblem(**{**SIZES, **PATHS[path], **ALL_OPTIONS})
    for part in ("inputs", "options", "cotangents"):
        arrays = [
            {k: a for k, a in getattr(p, part).items() if isinstance(a, np.ndarray)}
            for p in (problem, drawn)
        ]
        assert_same_bits(*arrays)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("given", ["do", "dlse"])
@pytest.mark.parametrize("fields", [{}, ALL_OPTIONS], ids=["plain", "all"])
def test_each_cotangent_alone(fields, given, path):
    """The other None, which means zeros."""
    problem = AttentionProblem(**{**SIZES, **PATHS[path], **fields})
    _, pullback = vjp(problem)
    alone = {k: a if k == given else np.zeros_like(a) for k, a in problem.cotangents.items()}
    ref = solve_reference(problem.having(cotangents=alone))
    assert_all_close(pullback({given: problem.cotangents[given]}), ref.grads, grad=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pullback_may_be_called_again(dtype):
    problem = AttentionProblem(**{**SIZES, "L": 13, **ALL_OPTIONS}, dtype=dtype)
    _, pullback = vjp(problem)
    first = pullback(problem.cotangents)
    pullback({k: -a for k, a in problem.cotangents.items()})
    assert_same_bits(pullback(problem.cotangents), first)


def test_without_lse():
    """o alone, and its pullback of one gradient."""
    problem = AttentionProblem(**{**SIZES, "L": 13, **ALL_OPTIONS})
    arguments = problem.inputs | problem.options
    o, pull = fastseq.vjp(fastseq.attention, **arguments)
    do = problem.cotangents["do"]
    outputs, pullback = vjp(problem)
    assert_same_bits({"o": o, "again": fastseq.attention(**arguments)},
                     {"o": outputs["o"], "again": outputs["o"]})  # fmt: skip
    grads = dict(zip(problem.inputs, pull(do), strict=True))
    assert_same_bits(grads, pullback({"do": do}))


GRADCHECK = [
    AttentionProblem(**fields)
    for chosen in [{}, *OPTIONS, ALL_OPTIONS]
    for fields in on_both_paths(chosen)
]


@pytest.mark.parametrize("problem", GRADCHECK, ids=str)
def test_gradcheck(problem, rng):
    """Finite differences of the kernels themselves, for every input, through both outputs."""
    outputs, pullback = vjp(problem)
    has_key = np.isfinite(outputs["lse"])

    def loss(**inputs):
        found = forward(problem.having(inputs=inputs))
        terms = problem.cotangents["do"] * found["o"]
        return terms.sum() + (problem.cotangents["dlse"] * found["lse"])[has_key].sum()

    grads = pullback(problem.cotangents)
    assert_gradients_are_those_of(loss, problem.inputs, grads, rng)


# Keys split, and decoded one by one


@pytest.mark.parametrize("first", [0, 1, 7, 16, 270, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [2, 13])
def test_key_split_is_joined_by_merge(queries, dtype, first):
    """Of the keys, with their part of mask, bias and lengths; 0 and 300 leave a side without."""
    fields = {"mask": "BxNHxLxS", "bias": "NHxLxS", "softcap": 1.5, "ragged": "kv", "scale": 0.5}
    problem = AttentionProblem(B=5, NH=4, NK=2, L=queries, S=300, D=11, DV=9, dtype=dtype, **fields)

    def part(keys):
        inputs = {n: problem.inputs[n][:, :, keys] for n in "kv"}
        inputs |= {"bias": problem.inputs["bias"][..., keys]}
        n = np.clip(problem.options["kv_lengths"] - keys.start, 0, keys.stop - keys.start)
        options = {"mask": problem.options["mask"][..., keys], "kv_lengths": n}
        found = forward(problem.having(inputs=inputs, options=options))
        return found["o"], found["lse"]

    o, lse = fastseq.merge_attention(*part(slice(0, first)), *part(slice(first, 300)))
    ref, peer = judge(problem)
    assert_all_close({"o": o, "lse": lse}, ref.outputs, peer and peer.outputs)


@pytest.mark.parametrize("steps", [[1] * 11, [5, 1, 1, 1, 3], [9, 1, 1]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_with_a_cache_is_the_causal_whole(dtype, steps):
    """Step by step, and after a prompt; rows of different lengths do not see each other."""
    fields = {"causal": True, "window": (6, None), "softcap": 2.0}
    problem = AttentionProblem(B=3, NH=4, NK=2, L=11, S=11, D=9, DV=5, dtype=dtype, **fields)
    ref, peer = judge(problem)
    cache = fastseq.KVCache(3, 2, 13, 9, 5, dtype=dtype)
    options = {"causal": "bottom_right", "window": (6, None), "softcap": 2.0, "return_lse": True}
    pieces, t = [], 0
    for n in steps:
        now = slice(t, t + n)
        cache.append(*(problem.inputs[name][:, :, now] for name in "kv"))
        q = problem.inputs["q"][:, :, now]
        pieces.append(fastseq.attention(q, cache.k, cache.v, kv_lengths=cache.lengths, **options))
        t += n
    o, lse = (np.concatenate(found, axis=2) for found in zip(*pieces, strict=True))
    assert_all_close({"o": o, "lse": lse}, ref.outputs, peer and peer.outputs)


# Edges


@pytest.mark.parametrize("problem", [*edges()], ids=str)
def test_edge_shapes(problem):
    assert_solved(problem)


@pytest.mark.parametrize("axis", ["B", "NH", "L", "S", "DV"])
@pytest.mark.parametrize("fields", [{}, ALL_OPTIONS], ids=["plain", "all"])
@pytest.mark.parametrize("path", PATHS)
def test_sizes_of_zero(path, fields, axis):
    """Results of the right shape; without keys o is 0, lse -inf and every gradient 0."""
    problem = AttentionProblem(**{**SIZES, **PATHS[path], **fields, axis: 0})
    assert_solved(problem)
    if axis == "S":
        assert (forward(problem)["lse"] == -np.inf).all()


@pytest.mark.parametrize("fields", [{}, *OPTIONS[:6], *OPTIONS[-7:]], ids=str)
def test_packed_rows(fields):
    """`attention_varlen` with empty sequences among others."""
    size = {"B": 6, "NH": 4, "NK": 2, "L": 23, "S": 31, "D": 11, "DV": 9, "ragged": "qkv"}
    found, ref = packed(AttentionProblem(**size | fields))
    assert_all_close(found, ref)


# Shapes of what is broadcast

BROADCAST = ["x".join(s) for s in product(("B", "1"), ("NH", "1"), ("L", "1"), ("S", "1"))]
BROADCAST += ["NHxLxS", "1xLxS", "LxS", "Lx1", "1xS", "S", "1"]


@pytest.mark.parametrize("shape", BROADCAST)
@pytest.mark.parametrize("queries", [2, 13])
def test_bias_of_every_shape(queries, shape, monkeypatch):
    """Its gradient is the sum over what it is broadcast over: here over several slabs of keys."""
    monkeypatch.setattr(_dispatch._Threads, "forced", 3)
    assert_solved(AttentionProblem(B=2, NH=4, NK=2, L=queries, S=401, bias=shape, ragged="kv"))


@pytest.mark.parametrize("shape", BROADCAST)
@pytest.mark.parametrize("path", PATHS)
def test_mask_of_every_shape(path, shape):
    assert_solved(AttentionProblem(**{**SIZES, **PATHS[path]}, mask=shape))


# Values: extreme, and dropped


@pytest.mark.parametrize("fields", [{}, {"softcap": 30.0}, {"causal": True}], ids=str)
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e-30, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_extreme_scores(path, dtype, scale, fields):
    """Scores of +-1e4 and beyond: weights of 0 and 1, nothing overflows.

    q and k are multiples of 1/2, so that products have no error which the scale would magnify.
    """
    problem = AttentionProblem(**{**SIZES, **PATHS[path]}, dtype=dtype, scale=scale, **fields)
    halves = {name: np.round(2 * problem.inputs[name]) / 2 for name in "qk"}
    problem = problem.having(inputs=halves)
    ours, (ref, peer) = solve(problem), judge(problem)
    assert_all_close(ours.outputs, ref.outputs, peer and peer.outputs)
    for name, a in ours.grads.items():
        assert np.isfinite(a).all(), name
    if abs(scale) < 1:
        assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)


def weights(size, p, seed=7):
    """o of values that are the unit matrix: the weights themselves, with dv and dropout's keep."""
    B, NH, L, S = size
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((B, NH, L, 4)), rng.standard_normal((B, NH, S, 4))
    v = np.broadcast_to(np.eye(S), (B, NH, S, S))
    o, pull = fastseq.vjp(fastseq.attention, q, k, v, dropout_p=p, seed=seed)
    _, _, dv = pull(np.broadcast_to(np.eye(L, S), o.shape).copy())
    return o, dv, reference.dropout_keep(int(seed), *size, p)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, np.int64(5)], ids=repr)
@pytest.mark.parametrize("size", [(2, 3, 1, 1100), (2, 3, 50, 600)], ids=["decode", "packed"])
def test_dropout_keeps_what_the_reference_does(size, seed):
    """In forward and backward, in every block of keys; as often as it says, within 5 sigma."""
    p = 0.3
    o, dv, keep = weights(size, p, seed)
    np.testing.assert_array_equal(o != 0, keep)
    n = min(size[2:])
    of_diagonal = dv[..., :n, :n].diagonal(axis1=-2, axis2=-1)
    np.testing.assert_array_equal(of_diagonal != 0, keep.diagonal(axis1=-2, axis2=-1))
    assert abs(keep.mean() - (1 - p)) < 5 * (p * (1 - p) / keep.size) ** 0.5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_everything(dtype, path):
    """p = 1: o is 0 and lse as ever; q and k have gradients through lse alone."""
    problem = AttentionProblem(**{**SIZES, **PATHS[path]}, dtype=dtype, dropout_p=1.0)
    assert_solved(problem)
    assert not forward(problem)["o"].any()


@pytest.mark.parametrize("scale", [-0.7, 1.5])
@pytest.mark.parametrize("L", [2, 8, 13])
def test_float32_gradients_of_scores_of_some_units(L, scale):
    """Weights recomputed from scores that are summed otherwise than forward's would miss this."""
    problem = AttentionProblem(B=5, L=L, S=19, D=11, DV=9, dtype="float32", scale=scale)
    ours, (ref, peer) = solve(problem), judge(problem)
    assert_all_close(ours.grads, ref.grads, peer.grads, grad=True)
