"""Bars: what the measured rows must show, as data, and the verdict on each."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A claim over a group of rows.

    `select` chooses by a case's fields. `value` gives a row's number, None where the peer it needs
    is absent. A row where ours is wrong counts as missed. Limits are lower limits, or upper ones
    with `at_most`.
    """

    text: str
    select: Callable[[dict], bool]
    value: Callable[[Any], float | None]
    worst: float
    mean: float | None = None  # of the geometric mean
    at_most: bool = False
    unit: str = "x"


@dataclass(frozen=True)
class Verdict:
    """A bar beside what was measured; `passed` is None where no row says anything about it."""

    text: str
    bar: str
    measured: str
    rows: str
    passed: bool | None

    @property
    def word(self) -> str:
        """For the table."""
        return {True: "pass", False: "missed", None: "not measured"}[self.passed]


def judge(bar: Bar, rows: Iterable[Any], cases: Iterable[dict]) -> Verdict:
    """The verdict over the measured `rows`; `cases` are all of the family, measured or not."""
    chosen = [row for row in rows if bar.select(row.case)]
    values = {row.name: value for row in chosen if (value := bar.value(row)) is not None}
    wrong = [row.name for row in chosen if row.wrong]
    coverage = f"{len(values)} of {sum(map(bar.select, cases))}"
    if not values:
        passed = False if wrong else None
        return Verdict(bar.text, _limits(bar), _errors(wrong), coverage, passed)
    mean = math.exp(math.fsum(map(math.log, values.values())) / len(values))
    worst = (max if bar.at_most else min)(values, key=lambda name: values[name])
    passed = not wrong and _holds(bar, values[worst], bar.worst)
    if bar.mean is not None:
        passed = passed and _holds(bar, mean, bar.mean)
    measured = f"worst {values[worst]:.2f}{bar.unit} at {worst}"
    if bar.mean is not None:
        measured = f"mean {mean:.2f}{bar.unit}, {measured}"
    if wrong:
        measured += f"; {_errors(wrong)}"
    return Verdict(bar.text, _limits(bar), measured, coverage, passed)


def _holds(bar: Bar, value: float, limit: float) -> bool:
    return value <= limit if bar.at_most else value >= limit


def _limits(bar: Bar) -> str:
    sign = "<=" if bar.at_most else ">="
    worst = f"each {sign} {bar.worst:g}{bar.unit}"
    return worst if bar.mean is None else f"mean {sign} {bar.mean:g}{bar.unit}, {worst}"


def _errors(wrong: list[str]) -> str:
    return f"errors in {', '.join(wrong)}" if wrong else "-"
