"""Does a call leave memory behind? Ours, one small case per kind and job, thousands of calls."""

import gc
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from .bars import Verdict
from .families import OURS, Case, JobReport, Setup

WARM_UP, CALLS = 1_000, 20_000
ALLOWED_KIB = 1024


def run(
    cases: Iterable[Case],
    prepare: Callable[[Case, int], Setup],
    threads: int,
    progress: Callable[[float], None],
) -> JobReport:
    """Growth of the resident memory over CALLS calls of every case."""
    cases = list(cases)
    growth = {}
    for done, case in enumerate(cases):
        growth[case.name] = growth_kib(prepare(case, threads).builders[OURS]().call)
        progress((done + 1) / len(cases))
    worst = max(growth, key=lambda name: growth[name])
    verdict = Verdict(
        f"memory left by {CALLS} calls",
        f"each < {ALLOWED_KIB} KiB",
        f"worst {growth[worst]} KiB at {worst}",
        f"{len(cases)} of {len(cases)}",
        growth[worst] < ALLOWED_KIB,
    )
    rows = tuple((name, str(kib)) for name, kib in growth.items())
    return JobReport("leaks", ("case", "KiB"), rows, (verdict,), {"growth_kib": growth})


def growth_kib(call: Callable[[], object]) -> int:
    """How much more memory is resident after CALLS calls, beyond what the first ones took."""
    for _ in range(WARM_UP):
        call()
    before = resident_kib()
    for _ in range(CALLS):
        call()
    return resident_kib() - before


def resident_kib() -> int:
    """Resident memory of this process, without garbage."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024
