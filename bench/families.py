"""What a family of benchmarks is, and the registry of all of them.

To add one: write its module with a `FAMILY`, and name it in `registry`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from . import measure
from .bars import Bar, Verdict
from .gate import Results

OURS = "fastseq"


class Absent(Exception):
    """A contender cannot take part here (its package is not installed); the message says why."""


class Case(Protocol):
    """One row: its name says operation and shape."""

    quick: bool

    @property
    def name(self) -> str:
        """E.g. "gru.fwd/T100-B32-H256"; the thread count is added where a row is reported."""


@dataclass(frozen=True)
class Contender:
    """One implementation of a case, ready to run: nothing is built or packed inside `call`."""

    call: Callable[[], object]  # what is timed
    results: Callable[[], Results]  # what is compared with the reference
    expected: Callable[[str], Results] | None = None  # if other than that of the setup


def fastest(contenders: Iterable[Contender]) -> Contender:
    """The one with the shortest call in a trial: a peer that a user may run in several ways."""
    return min(contenders, key=lambda contender: measure.estimate(contender.call))


@dataclass(frozen=True)
class Setup:
    """A case made ready: how to build each contender, what is right, and how much work it is."""

    builders: Mapping[str, Callable[[], Contender]]  # may raise Absent; OURS is among them
    expected: Callable[
        [str], Results
    ]  # what torch computes in "float64" (the reference), "float32"
    flop: float
    read_bytes: int = 0  # read by a call from a working set too large for the first cache
    working_set: int = 0  # bytes; 0: the case is bound by arithmetic


@dataclass(frozen=True)
class JobReport:
    """What an end-to-end job leaves: a table, bars, data for the JSON and plots."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    verdicts: tuple[Verdict, ...] = ()
    data: dict = field(default_factory=dict)
    failed: bool = False


def failed_job(name: str, message: str) -> JobReport:
    """The report of a job that raised."""
    verdict = Verdict(f"{name}: runs to its end", "no error", message, "-", False)
    return JobReport(name, ("error",), ((message,),), (verdict,), {"error": message}, failed=True)


@dataclass(frozen=True)
class Run:
    """How a job is to run."""

    threads: int
    full: bool
    out: Path  # for its plots


@dataclass(frozen=True)
class Job:
    """What is not a row: an end-to-end job of minutes, which tells its progress in [0, 1]."""

    name: str
    run: Callable[[Run, Callable[[float], None]], JobReport]  # tells its progress
    quick: bool = True


@dataclass(frozen=True)
class Family:
    """A table of cases, how to make one ready, the bars its rows must reach, and its jobs."""

    name: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]  # all there are, in the order of the columns
    contenders: Callable[[Case], tuple[str, ...]]  # those of a case, OURS first
    prepare: Callable[[Case, int], Setup]  # case, threads
    bars: tuple[Bar, ...] = ()
    jobs: tuple[Job, ...] = ()


def registry() -> dict[str, Family]:
    """All families by name."""
    from . import attention, cells, linear_scan, recurrent, tasks, training

    families = (recurrent, attention, cells, linear_scan, training, tasks)
    return {module.FAMILY.name: module.FAMILY for module in families}
