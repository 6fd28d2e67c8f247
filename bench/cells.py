"""The family "cells": users' cells and layer-normalised ones as layers, beside an eager loop.

    fwd     inference of a layer
    train   forward, and backward to all weights and to x

`lstm` is the built-in LSTM written once more by a user; the others are those of fastseq.cells.
Contenders: the built-in layer with as many gates, whose matrix products are the same, and "loop",
an eager loop over time in torch with its input product over all steps at once. I = H.
"""

import zlib

import numpy as np

from .bars import Bar
from .families import OURS, Family, Setup
from .recurrent import Case, Problem
from .runner import Row

GATES = {"lstm": 4, "peephole_lstm": 4, "cifg_lstm": 3, "light_gru": 2, "ind_rnn": 1}
NORMALISED = {"layer_norm_lstm": 4, "layer_norm_gru": 3}
GATES |= NORMALISED
BUILT_IN = {4: f"{OURS} LSTM", 3: f"{OURS} GRU"}
LOOP = "loop"


def contenders(case: Case) -> tuple[str, ...]:
    """The built-in layer only where there is one with as many gates."""
    built_in = BUILT_IN.get(GATES[case.kind])
    return (OURS, built_in, LOOP) if built_in else (OURS, LOOP)


def prepare(case: Case, threads: int) -> Setup:
    """Make a case ready to run."""
    from . import cells_torch

    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    x, dy = rng.standard_normal((2, case.T, case.B, case.H), dtype=np.float32)
    problem = Problem(case, x, dy, (), None)
    width = case.H * (1 if case.kind == "ind_rnn" else 2)
    forward = 2.0 * case.T * case.B * GATES[case.kind] * case.H * width
    return Setup(
        builders={who: cells_torch.builder(who, problem) for who in contenders(case)},
        expected=lambda dtype: cells_torch.expected(problem, dtype),
        flop=forward * (3 if case.training else 1),
    )


_SHAPES = ((100, 1, 128), (100, 8, 64), (100, 32, 128), (100, 32, 256), (50, 64, 512))
_QUICK_KINDS = ("lstm", "peephole_lstm", "light_gru", "layer_norm_lstm")
_QUICK = ((100, 1, 128), (100, 32, 128))
CASES = tuple(
    Case(kind, job, *shape, quick=shape in _QUICK and kind in _QUICK_KINDS)
    for job in ("fwd", "train")
    for kind in GATES
    for shape in _SHAPES
)


def _share_of_lstm(row: Row) -> float | None:
    ratio = row.ratio(BUILT_IN[4])
    return None if ratio is None else 1 / ratio


BARS = (
    Bar(
        "a user's cell of 4 gates, time of the built-in LSTM",
        lambda case: GATES[case["kind"]] == 4 and case["kind"] not in NORMALISED,
        _share_of_lstm,
        1.3,
        at_most=True,
    ),
    Bar(
        "a user's cell / eager loop",
        lambda case: case["kind"] not in NORMALISED,
        lambda row: row.ratio(LOOP),
        1.3,
        5.0,
    ),
    Bar(
        "layer-normalised LSTM training / eager loop",
        lambda case: case["kind"] == "layer_norm_lstm" and case["job"] == "train",
        lambda row: row.ratio(LOOP),
        1.3,
        4.0,
    ),
)
FAMILY = Family(
    name="cells",
    cases=CASES,
    peers=(*BUILT_IN.values(), LOOP),
    contenders=contenders,
    prepare=prepare,
    bars=BARS,
)
