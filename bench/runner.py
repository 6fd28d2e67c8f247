"""From a case to a row: build the contenders, check them, time those that are right."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache

from . import ceiling, gate, measure
from .families import OURS, Absent, Case, Contender, Family, Setup


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured case. Times are seconds per call, one entry a round, ceilings included."""

    family: str
    name: str
    case: dict
    flop: float
    read_bytes: int
    working_set: int
    times: measure.Times
    accuracy: dict[str, float]  # contender -> largest error / max|ref|
    errors: dict[str, str]  # contender -> what was wrong
    absent: dict[str, str]  # contender -> why

    @property
    def peers(self) -> list[str]:
        """The contenders that were timed beside ours."""
        return [name for name in self.times if name not in (OURS, ceiling.PRODUCT, ceiling.READ)]

    @property
    def wrong(self) -> bool:
        """Whether ours failed the gate."""
        return any(name.startswith(OURS) for name in self.errors)

    def seconds(self, name: str = OURS) -> float | None:
        """The median time of a contender, None where it has none."""
        return measure.median(self.times[name]) if name in self.times else None

    def ratio(self, peer: str) -> float | None:
        """time(peer) / time(ours), pair by pair, median: above 1 ours is faster."""
        if OURS not in self.times or peer not in self.times:
            return None
        return measure.median(measure.ratios(self.times, peer, OURS))

    def best_peer(self) -> str | None:
        """The peer that comes closest to ours, or beats it by most."""
        return min(self.peers, key=lambda peer: self.ratio(peer) or 0.0, default=None)

    def gflops(self) -> float | None:
        """Useful work per second of ours."""
        return None if OURS not in self.times else self.flop / self.seconds() / 1e9

    def product_share(self) -> float | None:
        """Ours against the large product timed in the same rounds."""
        return self._share(ceiling.PRODUCT, self.flop / ceiling.PRODUCT_FLOP)

    def read_share(self) -> float | None:
        """Ours against reading the same working set, timed in the same rounds."""
        return self._share(ceiling.READ, self.read_bytes / max(self.working_set, 1))

    def _share(self, name: str, work: float) -> float | None:
        ratio = self.ratio(name)
        return None if ratio is None else ratio * work


def run_case(family: Family, case: Case, threads: int, effort: measure.Effort) -> Row:
    """One row of the family's table."""
    setup = family.prepare(case, threads)
    contenders, accuracy, errors, absent = admit(setup)
    times: measure.Times = {}
    if OURS in contenders:
        calls = {name: contender.call for name, contender in contenders.items()}
        times = measure.interleave(calls | ceiling.calls(setup.working_set), effort)
    return Row(
        family=family.name,
        name=row_name(case, threads),
        case=dataclasses.asdict(case),
        flop=setup.flop,
        read_bytes=setup.read_bytes,
        working_set=setup.working_set,
        times=times,
        accuracy=accuracy,
        errors=errors,
        absent=absent,
    )


def row_name(case: Case, threads: int) -> str:
    """E.g. "gru.fwd/T100-B32-H256/t2"."""
    return f"{case.name}/t{threads}"


def admit(setup: Setup) -> tuple[Mapping[str, Contender], dict, dict, dict]:
    """The contenders whose results are right; the errors of all; who is wrong, who is absent."""
    contenders, accuracy, errors, absent = {}, {}, {}, {}
    expected = cache(setup.expected)
    for name, build in setup.builders.items():
        try:
            contender = build()
            accuracy[name] = _check(name, contender, contender.expected or expected)
        except Absent as reason:
            absent[name] = str(reason)
        except gate.WrongResult as error:
            errors[name] = str(error)
        except Exception as error:  # a contender that fails must not end the suite
            errors[name] = f"{type(error).__name__}: {error}"
        else:
            contenders[name] = contender
    return contenders, accuracy, errors, absent


def _check(name: str, contender: Contender, expected: Callable[[str], gate.Results]) -> float:
    """The contender's largest relative error; WrongResult where it is too large."""
    got, reference = contender.results(), expected("float64")
    if name.startswith(OURS):
        gate.check_ours(got, expected("float32"), reference)
    else:
        gate.check_peer(got, reference)
    return gate.relative_error(got, reference)
