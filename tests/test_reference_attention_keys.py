"""The reference of attention: which keys a query attends, and that nothing else is read."""

import numpy as np
import pytest
from attention_problems import AttentionProblem, solve_reference
from tolerance import assert_close

from fastseq.reference import attention as reference


def assert_identical(ours, expected):
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def poisoned(arrays, **where):
    """The arrays by name with NaN put in where the index of that name points."""
    copies = {name: a.copy() for name, a in arrays.items()}
    for name, index in where.items():
        copies[name][index] = np.nan
    return copies


# Which keys a query may attend


def attended(L, S, B=1, **options):
    """Rows of x and . for one head: with q = 0 and v the identity, o is p."""
    q, k, v = np.zeros((B, 1, L, 1)), np.zeros((B, 1, S, 1)), np.tile(np.eye(S), (B, 1, 1, 1))
    o, _ = reference.attention(q, k, v, **options)
    return [" ".join("".join(".x"[int(p > 0)] for p in row) for row in rows) for rows in o[:, 0]]


@pytest.mark.parametrize(
    ("L", "S", "options", "expected"),
    [
        (3, 5, {"causal": True}, "x.... xx... xxx.."),
        (3, 5, {"causal": "bottom_right"}, "xxx.. xxxx. xxxxx"),
        (5, 3, {"causal": "top_left"}, "x.. xx. xxx xxx xxx"),
        (5, 3, {"causal": "bottom_right"}, "... ... x.. xx. xxx"),
        (3, 5, {"window": (1, 1)}, "xx... xxx.. .xxx."),
        (3, 5, {"window": (None, -1)}, "..... x.... xx..."),
        (3, 5, {"window": (0, None)}, "xxxxx .xxxx ..xxx"),
        (3, 5, {"causal": True, "window": (1, 1)}, "x.... xx... .xx.."),
        (3, 5, {"causal": "bottom_right", "window": (1, None)}, ".xx.. ..xx. ...xx"),
    ],
)
def test_diagonals_and_windows(L, S, options, expected):
    assert attended(L, S, **options) == [expected]


def test_bottom_right_ends_at_each_rows_own_lengths():
    lengths = {"q_lengths": [2, 3, 1], "kv_lengths": [4, 2, 0]}
    assert attended(3, 4, B=3, causal="bottom_right", **lengths) == [
        "xxx. xxxx ....",
        ".... x... xx..",
        ".... .... ....",
    ]


@pytest.mark.parametrize("rows", [[0], [2], [4], [0, 2, 4]], ids=str)
@pytest.mark.parametrize("how", ["mask", "bias"])
def test_a_row_with_no_key(how, rows):
    """o = 0, lse = -inf, and the others as if it were not there."""
    problem = AttentionProblem()
    allowed = ~np.isin(np.arange(problem.L), rows)[:, None]
    given = {"mask": allowed} if how == "mask" else {"bias": np.where(allowed, 0, -np.inf)}
    o, lse = reference.attention(**problem.inputs, **given)
    grads = reference.attention_vjp(**problem.inputs, **given, **problem.cotangents)
    assert not o[:, :, rows].any() and (lse[:, :, rows] == -np.inf).all()
    assert not grads["q"][:, :, rows].any() and np.isfinite(lse[:, :, allowed[:, 0]]).all()

    others = {"inputs": {"q": problem.inputs["q"][:, :, allowed[:, 0]]}}
    others["cotangents"] = {n: a[:, :, allowed[:, 0]] for n, a in problem.cotangents.items()}
    alone = solve_reference(problem.having(**others))
    assert_close(o[:, :, allowed[:, 0]], alone.outputs["o"], name="o")
    for name in ("k", "v"):
        assert_close(grads[name], alone.grads[name], grad=True, name=f"d{name}")


def test_a_row_of_scores_all_minus_infinity_has_no_key():
    problem = AttentionProblem()
    k = np.abs(problem.inputs["k"])
    k[..., 0] = np.inf
    q = np.where(np.arange(problem.L)[:, None] == 1, -1, problem.inputs["q"])
    result = solve_reference(problem.having(inputs={"q": q, "k": k}))
    assert (result.outputs["lse"][:, :, 1] == -np.inf).all()
    assert not result.outputs["o"][:, :, 1].any() and not result.grads["q"][:, :, 1].any()


# What is not attended is not read


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("how", ["mask", "bias", "kv_lengths", "window"])
def test_nan_in_keys_nobody_attends_reaches_nothing(how, softcap):
    problem = AttentionProblem()
    last = np.arange(problem.S) >= problem.S - 2
    option = {
        "mask": {"mask": ~last},
        "bias": {"bias": np.where(last, -np.inf, 0.5)},
        "kv_lengths": {"kv_lengths": [problem.S - 2] * problem.B},
        "window": {"window": (None, problem.S - 2 - problem.L)},
    }[how] | {"softcap": softcap}
    clean = problem.inputs
    dirty = poisoned(clean, k=(..., last, slice(None)), v=(..., last, 0))
    results = []
    for inputs in (clean, dirty):
        o, lse = reference.attention(**inputs, **option)
        grads = reference.attention_vjp(**inputs, **option, **problem.cotangents)
        results.append({"o": o, "lse": lse} | {f"d{name}": a for name, a in grads.items()})
    assert_identical(results[1], results[0])
    for name in ("dk", "dv"):
        assert not results[1][name][:, :, last].any()


@pytest.mark.parametrize(("name", "value"), [("k", np.nan), ("v", np.nan), ("v", np.inf)])
def test_nan_in_a_key_reaches_only_the_queries_that_attend_it(name, value):
    problem = AttentionProblem(causal=True, bias="BxNHxLxS")
    array = problem.inputs[name].copy()
    array[:, :, 3] = value
    clean, dirty = solve_reference(problem), solve_reference(problem.having(inputs={name: array}))
    for grad in ("q", "bias"):
        before, after = (r.grads[grad][:, :, :3] for r in (clean, dirty))
        np.testing.assert_array_equal(after, before, err_msg=f"d{grad}")
    above = np.triu(np.ones((problem.L, problem.S), bool), 1)
    assert not dirty.grads["bias"][:, :, above].any()
    for output in ("o", "lse")[: 1 + (name == "k")]:
        before, after = np.split(dirty.outputs[output], [3], axis=2)
        assert_identical({output: before}, {output: clean.outputs[output][:, :, :3]})
        assert not np.isfinite(after).any()


def test_nan_past_the_queries_own_length_reaches_nothing():
    problem = AttentionProblem(B=5, ragged="qkv", causal="bottom_right", bias="NHxLxS")
    past = np.arange(problem.L) >= problem.options["q_lengths"][:, None]
    rows = tuple(np.argwhere(past).T)
    rows = (rows[0], slice(None), rows[1])
    clean = solve_reference(problem)
    dirty = solve_reference(
        problem.having(
            inputs=poisoned(problem.inputs, q=rows),
            cotangents=poisoned(problem.cotangents, do=rows, dlse=rows),
        )
    )
    assert past.any() and not clean.outputs["o"][rows].any()
    assert_identical(dirty.outputs, clean.outputs)
    assert_identical(dirty.grads, clean.grads)
