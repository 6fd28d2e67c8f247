"""What may not be attended reaches nothing, NaN included; what may be, NaN included, does.

By every kind of masking, on every path, forward and backward, against the reference.
"""

from dataclasses import replace

import numpy as np
import pytest
from attention_problems import AttentionProblem, solve_reference
from attention_running import forward, lengths, pack, packed, results, solve
from running import assert_same_bits
from tolerance import assert_all_close

import fastseq

# Few queries against unpacked keys, in one chunk and in several; blocks of queries against packed
# keys; more queries than keys.
PATHS = {
    "decode": {"L": 8, "S": 19},
    "decode-chunks": {"L": 8, "S": 1050},
    "decode-tiles": {"L": 17, "S": 1050},
    "packed": {"L": 53, "S": 19},
    "packed-blocks": {"L": 53, "S": 601},
    "long": {"L": 61, "S": 23},
}
SIZES = {"B": 5, "NH": 2, "NK": 2, "D": 7, "DV": 9}
MASKINGS = {
    "lengths": {"ragged": "qkv"},
    "causal": {"causal": True},
    "bottom_right": {"causal": "bottom_right"},
    "bottom_right-lengths": {"causal": "bottom_right", "ragged": "qkv"},
    "window": {"window": (3, 2)},
    "window-left": {"window": (0, None), "causal": "bottom_right", "ragged": "kv"},
    "mask": {"mask": "BxNHxLxS"},
    "mask-keys": {"mask": "Bx1x1xS"},
    "bias": {"bias": "BxNHxLxS"},
    "bias-keys": {"bias": "S"},
    "softcap-alibi": {"mask": "LxS", "softcap": 1.5, "alibi": "NH", "causal": True},
    "dropout": {"mask": "BxNHxLxS", "dropout_p": 0.3},
}
every_masking = pytest.mark.parametrize("fields", MASKINGS.values(), ids=MASKINGS)
every_path = pytest.mark.parametrize("path", PATHS)
every_poison = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)


def problem_of(path, fields, dtype="float64"):
    return AttentionProblem(**{**SIZES, **PATHS[path], **fields}, dtype=dtype)


def allowed(problem):
    """(B, NH, L, S), read off the gradient of lse by a bias: the weights, which are above zero."""
    size = (problem.B, problem.NH, problem.L, problem.S)
    bias = problem.inputs.get("bias", np.zeros(()))
    zeros = {name: np.zeros_like(a) for name, a in problem.inputs.items()}
    zeros["bias"] = np.where(np.broadcast_to(bias, size) == -np.inf, -np.inf, 0)
    cotangents = {name: np.zeros_like(a) for name, a in problem.cotangents.items()}
    cotangents["dlse"] = np.ones(size[:3])
    options = {"alibi_slopes": None}
    probe = problem.having(inputs=zeros, cotangents=cotangents, options=options)
    return solve_reference(probe).grads["bias"] > 0


def keyed(dims, pairs, problem):
    """Whether any pair is allowed, for every query "L" or every key "S" of its own head."""
    if dims == "L":
        return pairs.any(axis=-1)
    grouped = pairs.reshape(problem.B, problem.NK, -1, problem.L, problem.S)
    return grouped.any(axis=(2, 3))


def assert_solved(problem):
    ours, ref = solve(problem), solve_reference(problem)
    assert_all_close(ours.outputs, ref.outputs)
    assert_all_close(ours.grads, ref.grads, grad=True)


# Rows without a key


@every_masking
@every_path
def test_rows_without_a_key_are_zero(path, fields):
    """o 0, lse -inf, no gradient; whatever q and do hold."""
    problem = problem_of(path, fields)
    empty = ~keyed("L", allowed(problem), problem)
    ours = results(problem)
    assert not ours["o"][empty].any() and (ours["lse"][empty] == -np.inf).all()
    assert not ours["dq"][empty].any() and np.isfinite(ours["lse"][~empty]).all()
    unused = ~keyed("S", allowed(problem), problem)
    assert not ours["dk"][unused].any() and not ours["dv"][unused].any()


@pytest.mark.parametrize(
    "rows", [[0], [26], [52], [0, 1, 2, 3, 4, 5, 51, 52], [*range(48)]], ids=str
)
@pytest.mark.parametrize("kind", ["mask", "bias"])
@pytest.mark.parametrize("path", ["packed", "packed-blocks"])
def test_chosen_rows_without_a_key(path, kind, rows):
    """First, middle, last, a whole tile, a whole block of queries."""
    problem = problem_of(path, {kind: "BxNHxLxS"})
    part = "options" if kind == "mask" else "inputs"
    pairs = getattr(problem, part)[kind].copy()
    pairs[:, :, rows] = False if kind == "mask" else -np.inf
    problem = problem.having(**{part: {kind: pairs}})
    assert (forward(problem)["lse"][:, :, rows] == -np.inf).all()
    assert_solved(problem)


@pytest.mark.parametrize(
    "keys", [(0, 256), (0, 512), (512, 601), (100, 550), (1, 600), (0, 1), (600, 601)], ids=str
)
@pytest.mark.parametrize("kind", ["mask", "bias"])
@pytest.mark.parametrize("path", ["packed-blocks", "decode-chunks"])
def test_blocks_of_keys_that_nothing_attends(path, kind, keys):
    """Whole blocks, and all but the first and the last key."""
    problem = problem_of(path, {kind: "BxNHxLxS"})
    part = "options" if kind == "mask" else "inputs"
    pairs = getattr(problem, part)[kind].copy()
    pairs[..., slice(*keys)] = False if kind == "mask" else -np.inf
    assert_solved(problem.having(**{part: {kind: pairs}}))


@pytest.mark.parametrize("first", [0, 1, 255, 256, 511, 512, 1023, 1024, 1049])
@pytest.mark.parametrize("path", ["decode-chunks", "packed-blocks"])
def test_one_key_is_left(path, first):
    """By a mask and by a window of one: o is that key's value, with all its weight."""
    problem = problem_of(path, {"mask": "LxS"})
    first = min(first, problem.S - 1)
    mask = np.arange(problem.S) == first
    problem = problem.having(options={"mask": mask})
    values = np.broadcast_to(problem.inputs["v"][:, :, first : first + 1], (5, 2, problem.L, 9))
    assert_all_close({"o": forward(problem)["o"]}, {"o": values})
    assert_solved(problem)


# NaN and infinity where nothing attends


def poisoned_where_unattended(problem, poison):
    """q, do and dlse of rows without a key, and k and v of keys that no query attends."""
    pairs = allowed(problem)
    rows, keys = keyed("L", pairs, problem)[..., None], keyed("S", pairs, problem)[..., None]
    inputs = {"q": np.where(rows, problem.inputs["q"], poison)}
    inputs |= {name: np.where(keys, problem.inputs[name], poison) for name in "kv"}
    cotangents = {
        "do": np.where(rows, problem.cotangents["do"], poison),
        "dlse": np.where(rows[..., 0], problem.cotangents["dlse"], poison),
    }
    return problem.having(inputs=inputs, cotangents=cotangents)


@every_poison
@pytest.mark.parametrize("masking", MASKINGS)
@every_path
def test_poison_that_is_not_attended_leaks_nowhere(path, masking, poison):
    """And, of what only lengths, causal and window rule out, not a bit changes: it is not read."""
    problem = problem_of(path, MASKINGS[masking])
    poisoned = poisoned_where_unattended(problem, poison)
    assert_solved(poisoned)
    if not {"mask", "bias"} & MASKINGS[masking].keys():
        assert_same_bits(results(poisoned), results(problem))


@pytest.mark.parametrize("path", ["decode", "packed"])
def test_padding_of_packed_rows_is_not_read(path):
    """A sequence of NaN between two others."""
    problem = AttentionProblem(**{**SIZES, **PATHS[path], "B": 3})
    inputs = {name: a.copy() for name, a in problem.inputs.items()}
    for a in inputs.values():
        a[1] = np.nan
    clean, _ = packed(problem)
    with np.errstate(invalid="ignore"):
        found, _ = packed(problem.having(inputs=inputs))
    n, m = problem.L, problem.S
    rows = {"o": n, "lse": n, "dq": n, "dk": m, "dv": m}
    others = {name: np.r_[0:size, 2 * size : 3 * size] for name, size in rows.items()}
    assert_same_bits(
        {name: found[name][at] for name, at in others.items()},
        {name: clean[name][at] for name, at in others.items()},
    )
    assert np.isnan(found["o"][n : 2 * n]).all()


# NaN and infinity that some rows attend


@every_poison
@pytest.mark.parametrize("name", ["v", "do", "dlse"])
@pytest.mark.parametrize("path", ["decode", "packed", "packed-blocks", "long"])
@pytest.mark.parametrize(
    "masking", ["lengths", "causal", "bottom_right", "window", "mask", "bias", "softcap-alibi"]
)
def test_poison_comes_out_where_the_reference_has_it(masking, path, name, poison):
    problem = replace(problem_of(path, MASKINGS[masking]), B=2)
    part = "cotangents" if name.startswith("d") else "inputs"
    a = getattr(problem, part)[name].copy()
    a[1, 0, a.shape[2] // 2] = poison
    assert_solved(problem.having(**{part: {name: a}}))


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("path", ["decode", "packed", "packed-blocks", "long"])
@pytest.mark.parametrize(
    "masking", ["lengths", "causal", "bottom_right", "window", "mask", "bias", "softcap-alibi"]
)
def test_scores_of_nan_come_out_where_the_reference_has_them(masking, path, name):
    problem = replace(problem_of(path, MASKINGS[masking]), B=2)
    a = problem.inputs[name].copy()
    a[1, 0, a.shape[2] // 2] = np.nan
    assert_solved(problem.having(inputs={name: a}))


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("path", ["decode", "packed", "packed-blocks"])
def test_a_bias_of_nan_or_infinity_spoils_its_row_alone(path, value):
    problem = problem_of(path, {"bias": "BxNHxLxS"})
    bias = problem.inputs["bias"].copy()
    bias[1, 0, 3, 5] = value
    assert_solved(problem.having(inputs={"bias": bias}))


@pytest.mark.parametrize("path", PATHS)
def test_values_of_nan_under_a_bias_leak_nowhere(path):
    problem = problem_of(path, MASKINGS["bias-keys"])
    v = np.where((problem.inputs["bias"] == -np.inf)[:, None], np.nan, problem.inputs["v"])
    assert_solved(problem.having(inputs={"v": v}))


@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("masking", ["lengths", "causal"])
@pytest.mark.parametrize("queries", [1, 13])
def test_poison_behind_the_lengths_of_float32(queries, masking, poison):
    """What a cache holds past its length, as a decoding step and a prompt find it."""
    fields = {"ragged": "kv"} | ({"causal": "bottom_right"} if masking == "causal" else {})
    problem = AttentionProblem(
        B=5, NH=4, NK=2, L=queries, S=301, D=16, DV=16, dtype="float32", **fields
    )
    _, of_k = lengths(problem)
    past = np.arange(problem.S)[:, None] >= np.reshape(of_k, (-1, 1, 1, 1))
    poisoned = {name: np.where(past, np.float32(poison), problem.inputs[name]) for name in "kv"}
    assert_same_bits(results(problem.having(inputs=poisoned)), results(problem))


# Without any key or query at all


@pytest.mark.parametrize("fields", [{"causal": True}, {"causal": "bottom_right"}], ids=str)
def test_windows_past_all_keys(fields):
    """On either side of the diagonal, or empty: left + right < 0."""
    problem = AttentionProblem(**{**SIZES, **PATHS["packed-blocks"], **fields})
    for window in ((-500, None), (None, -500), (-3, 2), (2, -3), (-2, -2), (2**62, 2**62)):
        assert_solved(problem.having(options={"window": window}))


def test_packed_rows_of_nothing():
    """All sequences empty, or all of them without keys."""
    problem = AttentionProblem(**{**SIZES, **PATHS["packed"]})
    for empty in (("q", "kv"), ("kv",)):
        options = {f"{name}_lengths": np.zeros(5, int) for name in empty}
        (q, k, v, *ends), _ = pack(problem.having(options=options))
        o, lse = fastseq.attention_varlen(q, k, v, *ends, return_lse=True)
        assert o.shape == (*q.shape[:2], 9) and not o.any()
        assert lse.shape == q.shape[:2] and (lse == -np.inf).all()
