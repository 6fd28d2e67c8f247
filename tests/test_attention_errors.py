"""Every error of attention's NumPy API: its type, and a message with operation, argument, expected,
got; and anything at all for arguments, which gives the reference's result or an error."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from attention_problems import AttentionProblem, solve_reference
from attention_running import forward, solve
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from running import BIG_ENDIAN, ODD_DTYPES, assert_refused, assert_same_bits, zeros
from tolerance import assert_all_close

import fastseq

B, NH, NK, L, S, D, DV = 2, 4, 2, 3, 5, 6, 7
PADDED = {"q": zeros(B, NH, L, D), "k": zeros(B, NK, S, D), "v": zeros(B, NK, S, DV)}
PACKED = {
    **{"q": zeros(L, NH, D), "k": zeros(S, NK, D), "v": zeros(S, NK, DV)},
    **{"cu_seqlens_q": np.array([0, 1, L]), "cu_seqlens_k": np.array([0, 4, S])},
}

# Argument, value, error, message
PADDED_ERRORS = [
    ("q", zeros(NH, L, D), ValueError, "q must be (B, NH, L, D), 4 axes, got shape (4, 3, 6)"),
    ("q", zeros(), ValueError, "q must be (B, NH, L, D), 4 axes, got shape ()"),
    ("q", zeros(B, NH, L, D + 1), ValueError,
     "k must be (B, NK, S, D) = (2, 2, 5, 7), got (2, 2, 5, 6)"),
    ("q", zeros(B + 1, NH, L, D), ValueError,
     "k must be (B, NK, S, D) = (3, 2, 5, 6), got (2, 2, 5, 6)"),
    ("q", zeros(B, 3, L, D), ValueError, "NH must be a multiple of NK, got NH = 3, NK = 2"),
    ("k", zeros(NK, S, D), ValueError, "k must be (B, NK, S, D), 4 axes, got shape (2, 5, 6)"),
    ("k", zeros(B, NK, S, D + 1), ValueError,
     "k must be (B, NK, S, D) = (2, 2, 5, 6), got (2, 2, 5, 7)"),
    ("v", zeros(B, NK, S, 1, DV), ValueError,
     "v must be (B, NK, S, DV), 4 axes, got shape (2, 2, 5, 1, 7)"),
    ("v", zeros(B, NK, S + 1, DV), ValueError,
     "v must be (B, NK, S, DV) = (2, 2, 5, 7), got (2, 2, 6, 7)"),
    ("v", zeros(B, NK + 2, S, DV), ValueError,
     "v must be (B, NK, S, DV) = (2, 2, 5, 7), got (2, 4, 5, 7)"),
    ("mask", zeros(B, NH, L, S), TypeError, "mask must be an array of bool, got float32"),
    ("mask", zeros(L, S, dtype=np.uint8), TypeError, "mask must be an array of bool, got uint8"),
    ("mask", [[True] * S] * L, TypeError, "mask must be an array of bool, got list"),
    ("mask", zeros(L, S - 1, dtype=bool), ValueError,
     "mask must broadcast to (B, NH, L, S) = (2, 4, 3, 5), got (3, 4)"),
    ("mask", zeros(1, B, NH, L, S, dtype=bool), ValueError,
     "mask must broadcast to (B, NH, L, S) = (2, 4, 3, 5), got (1, 2, 4, 3, 5)"),
    ("mask", zeros(0, S, dtype=bool), ValueError,
     "mask must broadcast to (B, NH, L, S) = (2, 4, 3, 5), got (0, 5)"),
    ("bias", zeros(L, S, dtype=float), TypeError, "bias must be an array of float32, got float64"),
    ("bias", zeros(L, S, dtype=bool), TypeError, "bias must be an array of float32, got bool"),
    ("bias", zeros(L, S, dtype=BIG_ENDIAN), TypeError, "bias must be an array of float32, got >f4"),
    ("bias", 1.0, TypeError, "bias must be an array of float32, got float"),
    ("bias", zeros(NK, L, S), ValueError,
     "bias must broadcast to (B, NH, L, S) = (2, 4, 3, 5), got (2, 3, 5)"),
    ("q_lengths", np.array([1, 4]), ValueError,
     "q_lengths must be in 0..L = 0..3, got q_lengths[1] = 4"),
    ("q_lengths", np.array([-1, 3]), ValueError,
     "q_lengths must be in 0..L = 0..3, got q_lengths[0] = -1"),
    ("kv_lengths", np.array([5, 6]), ValueError,
     "kv_lengths must be in 0..S = 0..5, got kv_lengths[1] = 6"),
    ("kv_lengths", np.array([2**62, 1]), ValueError,
     f"kv_lengths must be in 0..S = 0..5, got kv_lengths[0] = {2**62}"),
    ("kv_lengths", np.array([5]), ValueError, "kv_lengths must be (B,) = (2,), got (1,)"),
    ("kv_lengths", 5, ValueError, "kv_lengths must be (B,) = (2,), got ()"),
    ("kv_lengths", np.array([1.0, 2.0]), TypeError, "kv_lengths must be integers, got float64"),
    ("q_lengths", np.array([True, False]), TypeError, "q_lengths must be integers, got bool"),
    ("q_lengths", ["1", "2"], TypeError, "q_lengths must be integers, got <U1"),
]  # fmt: skip
PACKED_ERRORS = [
    ("q", zeros(1, L, NH, D), ValueError, "q must be (TQ, NH, D), 3 axes, got shape (1, 3, 4, 6)"),
    ("q", zeros(L, 3, D), ValueError, "NH must be a multiple of NK, got NH = 3, NK = 2"),
    ("k", zeros(S, NK, D + 1), ValueError, "k must be (TK, NK, D) = (5, 2, 6), got (5, 2, 7)"),
    ("v", zeros(S + 1, NK, DV), ValueError, "v must be (TK, NK, DV) = (5, 2, 7), got (6, 2, 7)"),
    ("v", zeros(S, NK), ValueError, "v must be (TK, NK, DV), 3 axes, got shape (5, 2)"),
    ("cu_seqlens_q", [0, 2, 1, 3], ValueError,
     "cu_seqlens_q must not descend, got cu_seqlens_q[1:3] = 2, 1"),
    ("cu_seqlens_q", [1, 2, 3], ValueError, "cu_seqlens_q must go from 0 to TQ = 3, got 1..3"),
    ("cu_seqlens_q", [0, 2, 4], ValueError, "cu_seqlens_q must go from 0 to TQ = 3, got 0..4"),
    ("cu_seqlens_k", [0, 2, 4], ValueError, "cu_seqlens_k must go from 0 to TK = 5, got 0..4"),
    ("cu_seqlens_k", [0, 9, 5], ValueError,
     "cu_seqlens_k must not descend, got cu_seqlens_k[1:3] = 9, 5"),
    ("cu_seqlens_k", [0, -3, 5], ValueError,
     "cu_seqlens_k must not descend, got cu_seqlens_k[0:2] = 0, -3"),
    ("cu_seqlens_k", [0, 1, 2, 5], ValueError, "cu_seqlens_k must be (B + 1,) = (3,), got (4,)"),
    ("cu_seqlens_q", np.array([0.0, 3]), TypeError, "cu_seqlens_q must be integers, got float64"),
    ("cu_seqlens_q", np.zeros(0, int), ValueError,
     "cu_seqlens_q must go from 0 to TQ = 3, got nothing"),
    ("cu_seqlens_q", [[0, 3]], ValueError,
     "cu_seqlens_q must be (B + 1), 1 axes, got shape (1, 2)"),
    ("cu_seqlens_q", None, TypeError, "cu_seqlens_q must be integers, got NoneType"),
    ("cu_seqlens_k", None, TypeError, "cu_seqlens_k must be integers, got object"),
]  # fmt: skip
ERRORS = [
    ("q", None, TypeError, "q must be a NumPy array, got NoneType"),
    ("q", [[1.0]], TypeError, "q must be a NumPy array, got list"),
    ("q", zeros(1, dtype=np.float16), TypeError, "q must be float32 or float64, got float16"),
    ("q", zeros(1, dtype=BIG_ENDIAN), TypeError, "q must be float32 or float64, got >f4"),
    ("q", zeros(1, dtype=complex), TypeError, "q must be float32 or float64, got complex128"),
    ("k", zeros(1, dtype=float), TypeError, "k must be float32 as q is, got float64"),
    ("k", None, TypeError, "k must be a NumPy array, got NoneType"),
    ("v", zeros(1, dtype=BIG_ENDIAN), TypeError, "v must be float32 as q is, got >f4"),
    ("v", 1.0, TypeError, "v must be a NumPy array, got float"),
    *(
        ("window", w, ValueError, f"window must be (left, right) of integers or None, got {w!r}")
        for w in (3, (1,), (1, 2, 3), (1.5, 2), ("1", 2), "ab")
    ),
    *(
        ("causal", c, ValueError, f"causal must be a bool, 'top_left' or 'bottom_right', got {c!r}")
        for c in ("left", None, 1, 0.0, ["top_left"])
    ),
    ("scale", "x", TypeError, "scale must be a number, got 'x'"),
    ("scale", [1.0, 2.0], TypeError, "scale must be a number, got [1.0, 2.0]"),
    ("scale", 1j, TypeError, "scale must be a number, got 1j"),
    ("softcap", 0.0, ValueError, "softcap must be positive or None, got 0.0"),
    ("softcap", -2, ValueError, "softcap must be positive or None, got -2"),
    ("softcap", np.nan, ValueError, "softcap must be positive or None, got nan"),
    ("softcap", "a", TypeError, "softcap must be a number, got 'a'"),
    ("dropout_p", 1.5, ValueError, "dropout_p must be in 0..1, got 1.5"),
    ("dropout_p", -0.1, ValueError, "dropout_p must be in 0..1, got -0.1"),
    ("dropout_p", np.nan, ValueError, "dropout_p must be in 0..1, got nan"),
    ("dropout_p", None, TypeError, "dropout_p must be a number, got None"),
    ("dropout_p", 0.5, ValueError, "dropout needs an integer seed, got None"),
    ("alibi_slopes", zeros(NH + 1), ValueError,
     "alibi_slopes must be (NH,) = (4,) or (B, NH) = (2, 4), got (5,)"),
    ("alibi_slopes", zeros(1, NH), ValueError,
     "alibi_slopes must be (NH,) = (4,) or (B, NH) = (2, 4), got (1, 4)"),
    ("alibi_slopes", zeros(NH, dtype=float), TypeError,
     "alibi_slopes must be float32 as q is, got float64"),
    ("alibi_slopes", [0.5] * NH, TypeError, "alibi_slopes must be a NumPy array, got list"),
]  # fmt: skip


def table():
    """The rows above for each of the functions they hold for: a case's id is its message."""
    for function, good, rows in (
        ("attention", PADDED, PADDED_ERRORS),
        ("attention_varlen", PACKED, PACKED_ERRORS),
    ):
        for argument, value, error, message in rows + ERRORS:
            case = (function, good | {argument: value}, error, f"{function}: {message}")
            yield pytest.param(*case, id=f"{function}-{message.replace(' ', '_')}-{argument}")


errors = pytest.mark.parametrize(("function", "arguments", "error", "message"), [*table()])


@errors
def test_errors(function, arguments, error, message):
    assert_refused(lambda: getattr(fastseq, function)(**arguments), error, message)


@errors
def test_vjp_raises_what_the_function_raises(function, arguments, error, message):
    assert_refused(lambda: fastseq.vjp(getattr(fastseq, function), **arguments), error, message)


@pytest.mark.parametrize("seed", [None, 1.0, True, "1", np.array([1])], ids=repr)
def test_seeds(seed):
    message = f"attention: dropout needs an integer seed, got {seed!r}"
    assert_refused(
        lambda: fastseq.attention(**PADDED, dropout_p=0.5, seed=seed), ValueError, message
    )


def test_no_features_or_heads():
    none = {"q": zeros(B, NH, L, 0), "k": zeros(B, NK, S, 0)}
    message = "attention: q must have D >= 1, got shape (2, 4, 3, 0)"
    assert_refused(lambda: fastseq.attention(**PADDED | none), ValueError, message)
    none = {"k": zeros(B, 0, S, D), "v": zeros(B, 0, S, DV)}
    message = "attention: NH must be a multiple of NK, got NH = 4, NK = 0"
    assert_refused(lambda: fastseq.attention(**PADDED | none), ValueError, message)


def test_pullback_errors():
    for function, good, do, dlse in (
        ("attention", PADDED, "(B, NH, L, DV) = (2, 4, 3, 7)", "(B, NH, L) = (2, 4, 3)"),
        ("attention_varlen", PACKED, "(TQ, NH, DV) = (3, 4, 7)", "(TQ, NH) = (3, 4)"),
    ):
        _, pullback = fastseq.vjp(getattr(fastseq, function), **good, return_lse=True)
        for cotangents, error, message in (
            ((zeros(1, 2), None), ValueError, f"do must be {do}, got (1, 2)"),
            ((None, zeros(5)), ValueError, f"dlse must be {dlse}, got (5,)"),
            ((zeros(1, dtype=float), None), TypeError, "do must be float32 as q is, got float64"),
            ((None, [0.0]), TypeError, "dlse must be a NumPy array, got list"),
        ):
            assert_refused(lambda d=cotangents, p=pullback: p(d), error, f"{function}: {message}")


MERGE = {"o1": zeros(L, DV), "lse1": zeros(L), "o2": zeros(L, DV), "lse2": zeros(L)}


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("o1", [1.0], TypeError, "o1 must be a NumPy array, got list"),
        ("o1", zeros(L, DV, dtype=int), TypeError, "o1 must be float32 or float64, got int64"),
        ("o1", zeros(), ValueError, "o1 must be (..., DV), got shape ()"),
        ("lse1", zeros(L, 1), ValueError, "lse1 must be (...) = (3,), got (3, 1)"),
        ("o2", zeros(L, DV + 1), ValueError, "o2 must be (..., DV) = (3, 7), got (3, 8)"),
        ("lse2", zeros(L, dtype=float), TypeError, "lse2 must be float32 as o1 is, got float64"),
        ("lse2", None, TypeError, "lse2 must be a NumPy array, got NoneType"),
    ],
    ids=str,
)
def test_merge_errors(argument, value, error, message):
    call = MERGE | {argument: value}
    assert_refused(lambda: fastseq.merge_attention(**call), error, f"merge_attention: {message}")


# The cache


def cache_of(held):
    """B = 2, NK = 2, capacity 5, with ones for what each row holds."""
    cache = fastseq.KVCache(2, 2, 5, 3, 4)
    ones = [np.ones((2, 2, 5, n), np.float32) for n in (3, 4)]
    cache.append(*ones, np.array(held))
    return cache


@pytest.mark.parametrize(
    ("k", "v", "counts", "error", "message"),
    [
        (zeros(2, 2, 2, 3), zeros(2, 2, 2, 4), None, ValueError,
         "capacity = 5, row 1 holds 4 and was given 2"),
        (zeros(2, 2, 4, 3), zeros(2, 2, 4, 4), np.array([4, 1]), ValueError,
         "capacity = 5, row 0 holds 2 and was given 4"),
        (zeros(2, 2, 1, 4), zeros(2, 2, 1, 4), None, ValueError,
         "k must be (B, NK, n, D) = (2, 2, 1, 3), got (2, 2, 1, 4)"),
        (zeros(2, 1, 3), zeros(2, 2, 1, 4), None, ValueError,
         "k must be (B, NK, n, D) = (2, 2, 0, 3), got (2, 1, 3)"),
        (zeros(2, 2, 1, 3), zeros(2, 2, 2, 4), None, ValueError,
         "v must be (B, NK, n, DV) = (2, 2, 1, 4), got (2, 2, 2, 4)"),
        (zeros(2, 2, 1, 3), zeros(2, 2, 1, 4), np.array([1, 2]), ValueError,
         "counts must be in 0..n = 0..1, got counts[1] = 2"),
        (zeros(2, 2, 1, 3), zeros(2, 2, 1, 4), np.array([1.0, 1]), TypeError,
         "counts must be integers, got float64"),
        (zeros(2, 2, 1, 3, dtype=float), zeros(2, 2, 1, 4), None, TypeError,
         "k must be float32 as the cache is, got float64"),
        (zeros(2, 2, 1, 3), [[[[0.0] * 4]] * 2] * 2, None, TypeError,
         "v must be a NumPy array, got list"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)  # fmt: skip
def test_a_refused_append_writes_nothing(k, v, counts, error, message):
    cache, before = cache_of([2, 4]), cache_of([2, 4])
    assert_refused(lambda: cache.append(k, v, counts), error, f"KVCache.append: {message}")
    assert_same_bits(
        {"k": cache.k, "v": cache.v, "lengths": cache.lengths},
        {"k": before.k, "v": before.v, "lengths": before.lengths},
    )


def test_cache_truncates():
    cache = cache_of([2, 4])
    for lengths, message in (
        ([3, 4], "lengths must not exceed [2, 4], got [3, 4]"),
        ([-1, 0], "lengths must be in 0..held = 0..4, got lengths[0] = -1"),
        ([1], "lengths must be (B,) = (2,), got (1,)"),
        (None, "lengths must not exceed [2, 4], got None"),
    ):
        assert_refused(
            lambda n=lengths: cache.truncate(n), ValueError, f"KVCache.truncate: {message}"
        )
        assert cache.lengths.tolist() == [2, 4]
    cache.truncate(np.array([0, 3]))
    assert cache.lengths.tolist() == [0, 3]


def test_cache_of_another_dtype():
    message = "KVCache: dtype must be float32 or float64, got float16"
    assert_refused(lambda: fastseq.KVCache(1, 1, 1, 1, dtype=np.float16), TypeError, message)


# Anything at all

CHANGES = ["shape", "dtype", "strides", "value"]
NAMES = ("q", "k", "v", "bias")


@st.composite
def calls(draw):
    """A problem, and up to two of its arguments changed; `spoilt` if any change may be an error."""
    NK, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    side = st.none() | st.integers(-2, 6)
    shapes = st.sampled_from([None, "BxNHxLxS", "LxS", "Bx1x1xS", "NHxLx1", "S"])
    problem = AttentionProblem(
        draw(st.integers(1, 3)), NK * group, NK,
        *(draw(st.integers(low, high)) for low, high in ((0, 11), (0, 20), (1, 9), (0, 9))),
        dtype=draw(st.sampled_from(["float32", "float64"])),
        causal=draw(st.sampled_from([False, True, "top_left", "bottom_right"])),
        window=draw(st.none() | st.tuples(side, side)),
        mask=draw(shapes),
        bias=draw(shapes),
        ragged=draw(st.sampled_from([None, "q", "kv", "qkv"])),
        scale=draw(st.none() | st.floats(-1, 1)),
        softcap=draw(st.none() | st.floats(0.5, 20)),
        alibi=draw(st.sampled_from([None, "NH", "BxNH"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.4, 1.0])),
    )  # fmt: skip
    everything = problem.inputs | problem.options
    changed, spoilt = {}, False
    names = [k for k, a in everything.items() if isinstance(a, np.ndarray)]
    for name in draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
        a, change = everything[name], draw(st.sampled_from(CHANGES))
        if change == "strides":
            steps = draw(st.tuples(*(st.sampled_from([-2, -1, 1, 3]) for _ in a.shape)))
            big = np.zeros([n * abs(s) for n, s in zip(a.shape, steps, strict=True)], a.dtype)
            view = big[tuple(slice(None, None, s) for s in steps)]
            view[...] = a
            changed[name] = view
            continue
        spoilt = True
        if change == "shape":
            shape = draw(arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=9))
            changed[name] = np.zeros(shape, a.dtype)
        elif change == "dtype":
            changed[name] = np.ones(a.shape).astype(draw(st.sampled_from(ODD_DTYPES)))
        elif name.endswith("lengths"):
            value = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 20)
            changed[name] = draw(arrays.arrays(np.int64, a.shape, elements=value))
        else:
            odd = [None, 0.5, "x", [1.0], {}, object, np.float32(1), bytes(a)]
            changed[name] = draw(st.sampled_from(odd))
    return problem, changed, spoilt


@settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(calls())
@example((AttentionProblem(ragged="kv"), {"kv_lengths": np.array([2**62, 0])}, True))
@example((AttentionProblem(ragged="kv"), {"kv_lengths": np.array([2**64 - 1, 0], "u8")}, True))
def test_random_arguments_never_crash(call):
    problem, changed, spoilt = call
    ours = problem.having(
        inputs={k: a for k, a in changed.items() if k in NAMES},
        options={k: a for k, a in changed.items() if k not in NAMES},
    )
    try:
        outputs = forward(ours)
        rows = (*ours.inputs["q"].shape[:3], ours.inputs["v"].shape[3])  # a shape that still fits
        cotangents = {"do": np.ones(rows, problem.dtype), "dlse": np.ones(rows[:3], problem.dtype)}
        ours.__dict__["cotangents"] = cotangents
        given = {k: a for k, a in ours.inputs.items() if a is not None}  # a bias left out
        ours.__dict__["inputs"] = given
        solved = solve(ours)
    except (TypeError, ValueError) as error:
        assert spoilt, error  # good arguments in any layout are accepted
        assert str(error).startswith("attention: "), error
        return
    if not spoilt:
        assert_same_bits(outputs, forward(problem))
    ref = solve_reference(ours)
    assert {k: a.shape for k, a in outputs.items()} == {k: a.shape for k, a in ref.outputs.items()}
    if problem.dtype == "float64":
        assert_all_close(outputs, ref.outputs)
        assert_all_close(solved.grads, ref.grads, grad=True)
