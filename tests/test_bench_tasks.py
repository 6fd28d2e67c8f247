"""Every sequence task of the benchmark runs to its end, in two steps, the same way twice."""

import json
import math
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
import torch
from fastseq.bench import lm
from fastseq.bench.families import OURS
from fastseq.bench.tasks import NAMES, order
from fastseq.bench.tasks.blocks import POSITIONS
from fastseq.bench.tasks.bottleneck import pig_latin
from fastseq.bench.tasks.library import OWN, TORCH
from fastseq.bench.tasks.one_to_many import batch_of
from fastseq.bench.tasks.phrases import PAD, SIGNS
from fastseq.bench.tasks.train import Trained, same_curve, thinned

EPS = torch.finfo(torch.float32).eps


def run(name, out):
    task = import_module(f"fastseq.bench.tasks.{name}")
    few = replace(task.QUICK.recipe, steps=2, shared=2)
    told = []
    report = task.run(False, out, told.append, replace(task.QUICK, recipe=few))
    assert told == sorted(told)
    assert told[-1] == 1
    return report


@pytest.mark.parametrize("name", NAMES)
def test_task(name, tmp_path):
    report = run(name, tmp_path)
    assert not report.failed
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert list(tmp_path.glob(f"{name}*.png"))
    json.dumps(report.data)
    again = run(name, tmp_path)
    for model, kept in report.data["models"].items():
        assert again.data["models"][model]["losses"] == kept["losses"]


@pytest.mark.parametrize(
    ("ours", "torchs", "drift"),
    [
        ((3.0, 2.0, math.nan, 5.0), (3.0, 2.5, math.inf, math.nan), 0.5),
        ((3.0, math.nan), (3.0, 2.0), math.inf),
        ((3.0, 2.0), (3.0, math.inf), math.inf),
        ((math.nan,), (math.nan,), 0.0),
    ],
)
def test_drift_until_neither_is_finite(ours, torchs, drift):
    losses = {OURS: ours, "torch": torchs}
    trainers = {who: SimpleNamespace(losses=curve) for who, curve in losses.items()}
    assert Trained("lost", trainers, {}).drift(OURS) == drift


@pytest.mark.parametrize(("roundings", "same"), [(0, True), (9, True), (11, False)])
def test_curve_beside_a_twin_that_agrees(roundings, same):
    first = 3.0
    losses = {OURS: [first * (1 + roundings * EPS)], "torch": [first], lm.TWIN: [first]}
    trainers = {who: SimpleNamespace(losses=curve) for who, curve in losses.items()}
    assert same_curve("task", [Trained("model", trainers, {OURS: [1.0]})]).passed is same


def test_thinned_curve_is_json():
    assert thinned([1.0, math.nan, math.inf]) == [1.0, None, None]


def test_pig_latin():
    assert pig_latin("print each word") == "intpray eachway ordway"


def test_vector_of_letter_pairs():
    vectors, signs = batch_of(["nana", "an"])
    for vector, word in zip(vectors, signs.T.tolist(), strict=True):
        pairs = {a * SIGNS + b for a, b in pairwise(word) if b != PAD}
        assert set(vector.nonzero().flatten().tolist()) == pairs
        assert vector.max() == 1


@pytest.mark.parametrize("library", [OWN, TORCH], ids=lambda library: library.name)
@pytest.mark.parametrize("positions", POSITIONS)
def test_order_is_seen_with_positions_alone(positions, library):
    torch.manual_seed(0)
    judge = order.Judge(positions, order.QUICK, 100, library).double()
    words = torch.randint(100, (order.QUICK.T, 8))
    difference = (judge(words) - judge(words.flip(0))).abs().min().item()
    assert (difference < 1e-12) == (positions == "none")


def test_attention_of_both_libraries_with_lengths():
    torch.manual_seed(0)
    q, k = torch.randn(3, 2, 5, 4).double(), torch.randn(3, 2, 7, 4).double()
    lengths = torch.tensor([7, 1, 4])
    ours, torchs = (library.attention(q, k, k, lengths=lengths) for library in (OWN, TORCH))
    assert (ours - torchs).abs().max() <= 1e-12
    assert torch.equal(ours[1], k[1, :, :1].expand(2, 5, 4))
