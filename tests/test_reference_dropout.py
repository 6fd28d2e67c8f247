"""The reference's dropout: its generator, number by number, and what attention does with it."""

import numpy as np
import pytest
from attention_problems import SEED, AttentionProblem, solve_reference
from tolerance import assert_close

from fastseq.reference import attention as reference
from fastseq.reference.attention import dropout_keep


def splitmix64(z):
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def drawn(seed, b, h, NH, i, j):
    """The uint32 of one pair, in Python's integers."""
    row_key = splitmix64((splitmix64(seed ^ splitmix64(b * NH + h)) + i) % 2**64)
    x = j * 0x9E3779B9 % 2**32 ^ row_key % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32 ^ row_key >> 32
    return (x ^ x >> 15) * 0x846CA68B % 2**32


# The generator


def test_splitmix64_is_the_published_one():
    """The first two outputs from state 0."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


@pytest.mark.parametrize(
    ("seed", "b", "h", "NH", "i", "j", "expected"),
    [
        (0, 0, 0, 1, 0, 0, 0xFF5B18D5),
        (0, 0, 0, 3, 0, 1, 0x5E2F27E7),
        (1, 0, 2, 3, 4, 5, 0x7B274A3F),
        (SEED, 1, 0, 3, 2, 6, 0x9C8B6FE1),
        (2**64 - 1, 1, 2, 3, 4, 6, 0xA5ADC5B5),
    ],
)
def test_numbers_are_fixed(seed, b, h, NH, i, j, expected):
    """The number x is seen by its two neighbours: kept at p = x / 2^32, not one step above."""
    assert drawn(seed, b, h, NH, i, j) == expected
    for step, kept in ((0, True), (0.5, True), (1, False)):
        keep = dropout_keep(seed, b + 1, NH, i + 1, j + 1, (expected + step) / 2**32)
        assert keep[b, h, i, j] == kept


def test_every_pair_is_drawn_as_in_python_integers():
    B, NH, L, S, p = 2, 3, 5, 7, 0.4
    expected = [
        [
            [[drawn(SEED, b, h, NH, i, j) >= int(p * 2**32) for j in range(S)] for i in range(L)]
            for h in range(NH)
        ]
        for b in range(B)
    ]
    np.testing.assert_array_equal(dropout_keep(SEED, B, NH, L, S, p), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_the_share_kept_is_1_minus_p(p):
    """Of all pairs, and of each row, key and head: within 5 standard deviations."""
    keep = dropout_keep(SEED, 2, 4, 128, 96, p)
    for axis in (None, (0, 1, 3), (0, 1, 2), (2, 3)):
        share = keep.mean(axis=axis)
        bound = 5 * np.sqrt(p * (1 - p) * np.size(share) / keep.size)
        assert np.abs(share - (1 - p)).max() <= bound


def test_neighbours_are_independent():
    """Both or neither kept in half of the cases: for keys, rows, heads and rows of the batch."""
    keep = dropout_keep(SEED, 3, 4, 64, 64, 0.5)
    pairs = [np.split(keep, [1], axis) for axis in range(4)]
    pairs = [(keep.take(range(keep.shape[a] - 1), a), rest) for a, (_, rest) in enumerate(pairs)]
    pairs += [(keep, dropout_keep(seed, 3, 4, 64, 64, 0.5)) for seed in (SEED + 1, SEED ^ 1 << 63)]
    for one, other in pairs:
        assert abs((one == other).mean() - 0.5) <= 5 * 0.5 / np.sqrt(one.size)


def test_a_number_is_the_same_whatever_is_around_it():
    whole = dropout_keep(SEED, 4, 3, 9, 11, 0.5)
    np.testing.assert_array_equal(dropout_keep(SEED, 2, 3, 4, 6, 0.5), whole[:2, :, :4, :6])
    np.testing.assert_array_equal(dropout_keep(SEED, 1, 3, 9, 11, 0.5, sequence=2), whole[2:3])


def test_seeds_are_read_modulo_2_to_the_64():
    a, b = (dropout_keep(seed, 2, 3, 5, 7, 0.5) for seed in (-1, 2**64 - 1))
    np.testing.assert_array_equal(a, b)


# Attention under dropout


def test_probabilities_are_kept_or_zero_and_scaled():
    """v is the identity, so o is the probabilities; lse is that without dropout."""
    problem = AttentionProblem(DV=7)
    inputs = problem.inputs | {"v": np.tile(np.eye(7), (problem.B, problem.NK, 1, 1))}
    p, lse = reference.attention(**inputs)
    dropped, dropped_lse = reference.attention(**inputs, dropout_p=0.3, seed=SEED)
    keep = dropout_keep(SEED, *p.shape, 0.3)
    assert_close(dropped, keep * p / 0.7, name="o")
    assert_close(dropped_lse, lse, name="lse")


def test_p_0_needs_no_seed_and_p_1_keeps_nothing():
    problem = AttentionProblem()
    plain = solve_reference(problem)
    none, all_ = (
        solve_reference(problem.having(options={"dropout_p": p, "seed": seed}))
        for p, seed in ((0.0, None), (1.0, 5))
    )
    for name, a in (plain.outputs | plain.grads).items():
        np.testing.assert_array_equal((none.outputs | none.grads)[name], a)
    assert not all_.outputs["o"].any() and not all_.grads["v"].any()
    np.testing.assert_array_equal(all_.outputs["lse"], plain.outputs["lse"])


def test_the_seed_matters_and_repeats():
    problem = AttentionProblem(dropout_p=0.5)
    o = [solve_reference(problem.having(options={"seed": seed})).outputs["o"] for seed in (1, 2, 1)]
    np.testing.assert_array_equal(o[0], o[2])
    assert (o[0] != o[1]).any()
