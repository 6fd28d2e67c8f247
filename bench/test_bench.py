"""The cases of the quick profile under pytest-benchmark: `pytest bench/ --benchmark-only`.

One test is one contender of one case, grouped by case; a wrong result fails, an absent peer skips.
FASTSEQ_NUM_THREADS sets the threads, as everywhere; default min(2, cores).
"""

import os
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("pytest_benchmark")

from fastseq.bench import machine
from fastseq.bench.families import registry
from fastseq.bench.runner import admit, row_name

THREADS = int(os.environ.get("FASTSEQ_NUM_THREADS") or min(2, machine.cores()))
CASES = [
    pytest.param(family, case, name, id=f"{row_name(case, THREADS)}/{name}")
    for family in registry().values()
    for case in family.cases
    if case.quick
    for name in family.contenders(case)
]


@pytest.fixture(scope="session", autouse=True)
def threads():
    """The same thread count for all contenders."""
    machine.limit_threads(THREADS)


@pytest.mark.parametrize(("family", "case", "name"), CASES)
@pytest.mark.benchmark(min_rounds=3, max_time=0.3, warmup=True, warmup_iterations=1)
def test_case(benchmark, family, case, name):
    """One contender, checked and then timed."""
    setup = family.prepare(case, THREADS)
    alone = replace(setup, builders={name: setup.builders[name]})
    contenders, _, errors, absent = admit(alone)
    if absent:
        pytest.skip(absent[name])
    assert not errors, errors[name]
    benchmark.group = row_name(case, THREADS)
    benchmark(contenders[name].call)
