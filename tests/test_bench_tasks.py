"""Every sequence task of the benchmark runs to its end, in two steps, the same way twice."""

import json
from dataclasses import replace
from importlib import import_module

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
from fastseq.bench.tasks import NAMES


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
