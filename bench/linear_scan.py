"""The family "linear_scan": h_t = a_t * h_{t-1} + b_t, and the modules MinGRU and MinLSTM.

    op.job        what a call is
    scan.fwd      fastseq.linear_scan
    scan.train    the same, and the gradients of a, b and h0 (none is given)
    mingru.fwd    inference of fastseq.torch.nn.MinGRU, I = H; torch is torch.nn.GRU of that size
    mingru.train  forward, and backward to all weights and to x
    minlstm.*     the same, torch.nn.LSTM

    peer          what it is; at T = 65536 a loop takes seconds, and only fastseq t1 takes part
    numpy loop    what a user writes: a step is two array operations; gradients by hand
    torch loop    the same in torch, gradients by autograd
    triad         h = a * b over the same arrays by torch, on the same threads: what memory allows
    fastseq t1    ours on one thread

Drawing the inputs and building the modules is not in the time.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .bars import Bar
from .families import OURS, Family, Setup
from .runner import Row

LOOP, TORCH_LOOP, TRIAD, ALONE = "numpy loop", "torch loop", "triad", f"{OURS} t1"
LONG = 65536
STREAMS = {"fwd": 3, "train": 8}  # arrays moved by a call; the triad moves 3
PROJECTIONS = {"mingru": 2, "minlstm": 3}

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One row: T steps of B rows with C columns; for a module C units and inputs."""

    op: str
    job: str
    T: int
    B: int
    C: int
    quick: bool = True

    @property
    def name(self) -> str:
        """E.g. "scan.fwd/T1000-B8-C512"."""
        return f"{self.op}.{self.job}/T{self.T}-B{self.B}-C{self.C}"

    @property
    def training(self) -> bool:
        """Whether a call runs forward and backward."""
        return self.job == "train"


@dataclass(frozen=True)
class Problem:
    """The numbers of a case, the same for every contender; float32."""

    case: Case

    def _draw(self, what: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.case.name} {what}".encode()))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, B, C)"""
        return self.case.T, self.case.B, self.case.C

    @cached_property
    def a(self) -> Array:
        """Decays in (0.5, 1]."""
        return 1 - self._draw("a").random(self.shape, np.float32) / 2

    @cached_property
    def b(self) -> Array:
        """N(0, 1); the input of a module."""
        return self._draw("b").standard_normal(self.shape, np.float32)

    @cached_property
    def dh(self) -> Array:
        """N(0, 1)"""
        return self._draw("dh").standard_normal(self.shape, np.float32)


def flop(case: Case) -> float:
    """Useful work of a call."""
    numbers = float(case.T * case.B * case.C)
    if case.op == "scan":
        return numbers * (5 if case.training else 2)
    return numbers * 2 * PROJECTIONS[case.op] * case.C * (3 if case.training else 1)


def contenders(case: Case) -> tuple[str, ...]:
    """Who takes part."""
    if case.op != "scan":
        return (OURS, "torch")
    if case.T == LONG:
        return (OURS, ALONE)
    return (OURS, LOOP, TORCH_LOOP, TRIAD)


def prepare(case: Case, threads: int) -> Setup:
    """Make a case ready to run; no contender is built before it is asked for."""
    from . import linear_scan_peers as peers

    problem = Problem(case)
    known = peers.builders(problem, threads)
    moved = 4 * STREAMS[case.job] * case.T * case.B * case.C if case.op == "scan" else 0
    return Setup(
        builders={name: known[name] for name in contenders(case)},
        expected=lambda dtype: peers.expected(problem, dtype),
        flop=flop(case),
        read_bytes=moved,
        working_set=moved,
    )


def _is(op: str, *jobs: str, long: bool = False) -> Callable[[dict], bool]:
    return lambda c: c["op"] == op and c["job"] in jobs and (c["T"] == LONG) == long


def _loop(row: Row) -> float | None:
    return row.ratio(LOOP)


def _alone(row: Row) -> float | None:
    return row.ratio(ALONE)


def _percent_of_triad(row: Row) -> float | None:
    ratio = row.ratio(TRIAD)
    return None if ratio is None else 100 * ratio * STREAMS[row.case["job"]] / 3


def _wide(job: str) -> Callable[[dict], bool]:
    return lambda c: _is("scan", job)(c) and c["C"] == 512


BARS = (
    Bar("forward, 1000 x 8 x 512 / a NumPy loop", _wide("fwd"), _loop, 15),
    Bar(
        "forward, share of memory bandwidth (triad)", _wide("fwd"), _percent_of_triad, 60, unit="%"
    ),
    Bar("training, share of memory bandwidth", _wide("train"), _percent_of_triad, 60, unit="%"),
    Bar("T 65536, B C 1 / its own one thread", _is("scan", "fwd", "train", long=True), _alone, 1.5),
)

_SCANS = ((1000, 8, 512, True), (LONG, 1, 1, True), (200, 32, 256, False), (1000, 8, 64, False))
_MODULES = ((200, 32, 256, True), (1000, 8, 512, False))
CASES = tuple(
    Case(op, job, T, B, C, quick and op != "minlstm")
    for op, shapes in (("scan", _SCANS), ("mingru", _MODULES), ("minlstm", _MODULES))
    for T, B, C, quick in shapes
    for job in ("fwd", "train")
)
FAMILY = Family(
    name="linear_scan",
    cases=CASES,
    peers=("torch", LOOP, TORCH_LOOP, TRIAD, ALONE),
    contenders=contenders,
    prepare=prepare,
    bars=BARS,
)
