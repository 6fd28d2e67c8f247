"""Timing contenders side by side, so that noise hits all of them alike.

A round times every contender once; the next round goes through them in the opposite order. Before
each timed batch the process rests and makes one untimed call: the idle threads of the contender
before (OpenMP, ONNX Runtime, XLA) spin for some milliseconds and would slow whoever comes next
(torch's LSTM was measured at 31 ms instead of 16 ms right after an ONNX Runtime call).
Ratios are taken within a round and the median over the rounds is kept. Freed memory stays with the
process, as in one that has been training for a while.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

REST_S = 0.005
BATCH_S = 0.004  # a timed batch lasts at least this long: 1000 x the clock's resolution and more
LARGE_BYTES = 31 << 20  # just below the largest block that glibc learns from
OWN_WARM_UP_S = 0.1  # a call of this length is its own warm-up: rest and caches are below 5 %

FEWEST_ROUNDS = 3
OVERRUN = 3  # a machine that became busy ends a row here, at FEWEST_ROUNDS at least


@dataclass(frozen=True)
class Effort:
    """How long one row is measured: rounds until the budget is spent, within the limits."""

    budget_s: float
    min_rounds: int
    max_rounds: int


QUICK = Effort(budget_s=0.8, min_rounds=5, max_rounds=11)
FULL = Effort(budget_s=5.0, min_rounds=5, max_rounds=31)
SELF_TEST = Effort(budget_s=3.0, min_rounds=8, max_rounds=25)

Times = dict[str, list[float]]  # contender -> seconds per call, one entry a round


def interleave(calls: Mapping[str, Callable[[], object]], effort: Effort) -> Times:
    """Seconds per call of every contender, one sample a round."""
    keep_freed_memory()
    single = {name: estimate(call) for name, call in calls.items()}
    batch = {name: max(1, math.ceil(BATCH_S / single[name])) for name in calls}
    round_s = sum(_sample_cost(single[name], batch[name]) for name in calls)
    rounds = min(max(int(effort.budget_s / round_s), effort.min_rounds), effort.max_rounds)
    order = list(calls)
    times: Times = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + OVERRUN * effort.budget_s
        for i in range(rounds):
            if i >= FEWEST_ROUNDS and time.perf_counter() > deadline:
                break
            for name in order if i % 2 == 0 else reversed(order):
                times[name].append(_sample(calls[name], batch[name], single[name]))
    finally:
        gc.enable()
    return times


def keep_freed_memory() -> None:
    """Let glibc free a large block: it then keeps up to twice as much for the allocations to come.

    Before that it gives results of 128 KiB and more back to the system, or not, by what the process
    did earlier. A linear recurrence of 65536 steps took 2 threads as long as one with those page
    faults, and 0.76 times as long without (training, Zen 3).
    """
    np.empty(LARGE_BYTES, np.uint8)


def estimate(call: Callable[[], object]) -> float:
    """Seconds of one call, after the first one, which may allocate, pack or compile."""
    call()
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if best > OWN_WARM_UP_S:
            break
    return best


def _sample_cost(single_s: float, batch: int) -> float:
    warm_up = single_s if single_s < OWN_WARM_UP_S else 0.0
    return REST_S + warm_up + batch * single_s


def _sample(call: Callable[[], object], batch: int, single_s: float) -> float:
    time.sleep(REST_S)
    if single_s < OWN_WARM_UP_S:
        call()
    start = time.perf_counter()
    for _ in range(batch):
        call()
    return (time.perf_counter() - start) / batch


def ratios(times: Times, numerator: str, denominator: str) -> list[float]:
    """time(numerator) / time(denominator), round by round."""
    return [a / b for a, b in zip(times[numerator], times[denominator], strict=True)]


def median(values: list[float]) -> float:
    """The middle value: one disturbed round does not move it."""
    return statistics.median(values)


def spread(values: list[float]) -> tuple[float, float]:
    """The quartiles, or the extremes of fewer than four values."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


@dataclass(frozen=True)
class SelfTest:
    """One contender against itself: the ratio must be 1, else the harness or the machine lies."""

    name: str
    ratio: float
    low: float
    high: float
    rounds: int

    TOLERANCE = 0.05

    @property
    def ok(self) -> bool:
        """Whether a ratio measured now can be believed to TOLERANCE."""
        return abs(self.ratio - 1) <= self.TOLERANCE


def self_test(calls: Mapping[str, Callable[[], object]], name: str) -> SelfTest:
    """Time `calls[name]` twice among its rivals, first and last in the order of the round."""
    others = {other: call for other, call in calls.items() if other != name}
    twin = f"{name} again"
    times = interleave({name: calls[name], **others, twin: calls[name]}, SELF_TEST)
    own = ratios(times, twin, name)
    return SelfTest(name, median(own), *spread(own), rounds=len(own))
