"""The family "rnn": RNN, GRU and LSTM, as layers, on packed sequences and step by step.

    job            what a call is
    fwd            inference of a layer, or of two layers in both directions
    train          forward, and backward to all weights and to x
    packed         the same on a PackedSequence, lengths spread from 10 to T
    step           one step of a stream, state carried, by the module
    cell           the same, by the *Cell module
    call           what a call costs: the module at T = B = 1
    numpy_call     the same, the NumPy function
    ragged         NumPy inference with lengths spread from 10 to T, against the full batch
    ragged_train   training on a PackedSequence, against the full batch

Building the model, packing its weights and packing the sequences are not in the time; I = H.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .families import OURS, Family, Job, JobReport, Run, Setup
from .recurrent_bars import BARS

KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
PEERS = {
    "fwd": ("torch", "onnxruntime", "openvino"),
    "train": ("torch", "jax"),
    "packed": ("torch",),
    "step": ("torch", "onnxruntime"),
    "cell": ("torch",),
    "call": ("torch", "onnxruntime"),
    "numpy_call": ("torch", "onnxruntime"),
    "ragged": (f"{OURS} full",),
    "ragged_train": (f"{OURS} full",),
}
SHORTEST = 10
STREAM_STEPS = 8  # how far a stream is followed by the gate
LARGE_WORKING_SET = 512 * 1024


@dataclass(frozen=True)
class Case:
    """One row: T steps of B rows with H units (and inputs); T = 1 for the streaming jobs."""

    kind: str
    job: str
    T: int
    B: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """E.g. "gru.fwd/T100-B32-H256"."""
        shape = f"T{self.T}-B{self.B}-H{self.H}"
        if self.layers > 1:
            shape += f"-L{self.layers}"
        return f"{self.kind}.{self.job}/{shape}{'-bi' if self.bidirectional else ''}"

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 1 + self.bidirectional

    @property
    def varlen(self) -> bool:
        """Whether the sequences have different lengths."""
        return self.job in ("packed", "ragged", "ragged_train")

    @property
    def streaming(self) -> bool:
        """Whether the state goes from call to call."""
        return self.job in ("step", "cell")

    @property
    def training(self) -> bool:
        """Whether a call runs forward and backward."""
        return self.job in ("train", "packed", "ragged_train")

    def input_size(self, layer: int) -> int:
        """Features that a layer reads."""
        return self.H if layer == 0 else self.H * self.directions


@dataclass(frozen=True)
class Problem:
    """The numbers of a case, the same for every contender; float32.

    x (T, B, H), dy (T, B, D*H), lengths (B,) sorted downward or None, weights as torch's
    parameters(): per (layer, direction) w_ih, w_hh, b_ih, b_hh.
    """

    case: Case
    x: np.ndarray
    dy: np.ndarray
    weights: tuple[np.ndarray, ...]
    lengths: np.ndarray | None

    @property
    def rows(self) -> list[int]:
        """The batch rows that the gate compares: the longest sequence and the shortest."""
        return sorted({0, self.x.shape[1] - 1})

    @property
    def gate_dy(self) -> np.ndarray:
        """dy with zeros but for `rows`, so that weight gradients are those of the sliced batch."""
        dy = np.zeros_like(self.dy)
        dy[:, self.rows] = self.dy[:, self.rows]
        return dy

    def sliced(self) -> "Problem":
        """The same problem with only the batch rows that the gate compares."""
        rows = self.rows
        lengths = None if self.lengths is None else self.lengths[rows]
        return replace(self, x=self.x[:, rows], dy=self.dy[:, rows], lengths=lengths)

    def padded(self) -> "Problem":
        """The same problem with every sequence at full length."""
        return replace(self, lengths=None)


def make_problem(case: Case) -> Problem:
    """Inputs N(0, 1), weights U(-1/sqrt(H), 1/sqrt(H)) as torch draws them; the name seeds them."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    steps = STREAM_STEPS if case.streaming else case.T
    x = rng.standard_normal((steps, case.B, case.H), dtype=np.float32)
    dy = rng.standard_normal((steps, case.B, case.directions * case.H), dtype=np.float32)
    rows = GATES[case.kind] * case.H
    weights: list[np.ndarray] = []
    for layer in range(case.layers):
        for _ in range(case.directions):
            shapes = (rows, case.input_size(layer)), (rows, case.H), (rows,), (rows,)
            weights += [_uniform(rng, shape, case.H**-0.5) for shape in shapes]
    lengths = None
    if case.varlen:
        lengths = np.linspace(case.T, SHORTEST, case.B).round().astype(np.int64)
    return Problem(case, x, dy, tuple(weights), lengths)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> np.ndarray:
    return (2 * bound) * rng.random(shape, dtype=np.float32) - np.float32(bound)


def flop(problem: Problem) -> float:
    """Useful work of a call: 2 per weight, direction and valid step; training is three times it."""
    case = problem.case
    steps = case.T * case.B if problem.lengths is None else int(problem.lengths.sum())
    width = sum(case.input_size(layer) + case.H for layer in range(case.layers))
    forward = 2.0 * steps * case.directions * GATES[case.kind] * case.H * width
    return forward * (3 if case.training else 1)


def contenders(case: Case) -> tuple[str, ...]:
    """Who takes part; JAX only at B = 1, beyond that it is slower than torch."""
    peers = PEERS[case.job]
    return (OURS, *(peer for peer in peers if peer != "jax" or case.B == 1))


def prepare(case: Case, threads: int) -> Setup:
    """Make a case ready to run; no contender is built before it is asked for."""
    from . import recurrent_peers, recurrent_torch

    problem = make_problem(case)
    known = recurrent_torch.builders(problem) | recurrent_peers.builders(problem, threads)
    builders = {name: known[name] for name in contenders(case)}
    working_set = 4 * GATES[case.kind] * case.H**2  # the recurrent weights
    if case.B > 1 or case.T == 1 or case.training or working_set < LARGE_WORKING_SET:
        working_set = 0
    return Setup(
        builders=builders,
        expected=lambda dtype: recurrent_torch.expected(problem, dtype),
        flop=flop(problem),
        read_bytes=case.T * working_set,
        working_set=working_set,
    )


# (T, B, H), then the kinds that the quick profile measures for inference and for training.
_LAYERS = (
    ((100, 1, 64), ("rnn_tanh", "gru", "lstm"), ("rnn_tanh", "gru", "lstm")),
    ((100, 1, 256), ("rnn_tanh", "gru", "lstm"), ("gru", "lstm")),
    ((100, 1, 1024), ("gru",), ()),
    ((100, 32, 64), ("rnn_tanh", "gru", "lstm"), ("rnn_tanh", "gru", "lstm")),
    ((100, 32, 256), KINDS, KINDS),
    ((100, 32, 512), (), ()),
    ((50, 64, 1024), (), ()),
    ((100, 128, 128), ("rnn_tanh", "gru", "lstm"), ("rnn_tanh", "gru", "lstm")),
)


def _layer_cases() -> list[Case]:
    return [
        Case(kind, job, *shape, quick=kind in quick)
        for job, column in (("fwd", 1), ("train", 2))
        for kind in KINDS
        for row in _LAYERS
        for shape, quick in [(row[0], row[column])]
    ]


def _bidirectional_cases() -> list[Case]:
    return [
        Case(kind, job, 100, 32, H, layers=2, bidirectional=True, quick=H == 128)
        for job in ("fwd", "train")
        for kind in ("gru", "lstm")
        for H in (128, 256)
    ]


def _varlen_cases() -> list[Case]:
    return [
        Case("rnn_tanh", "packed", 200, 64, 512, quick=True),
        Case("gru", "packed", 100, 32, 256, quick=True),
        Case("gru", "packed", 200, 64, 512),
        Case("lstm", "packed", 100, 32, 256, quick=True),
        Case("lstm", "packed", 200, 64, 512),
        Case("gru", "ragged", 100, 32, 256),
        Case("lstm", "ragged", 100, 32, 256, quick=True),
        Case("gru", "ragged_train", 100, 32, 256),
        Case("lstm", "ragged_train", 100, 32, 256, quick=True),
    ]


def _streaming_cases() -> list[Case]:
    steps = [
        Case(kind, job, 1, 1, H, quick=job == "step" and H != 64)
        for kind in ("gru", "lstm")
        for job in ("step", "cell")
        for H in (16, 64, 256)
    ]
    calls = [
        Case(kind, job, 1, 1, 16, quick=kind == "lstm")
        for kind in ("gru", "lstm")
        for job in ("call", "numpy_call")
    ]
    return steps + calls


def _char_lm(run: Run, progress: Callable[[float], None]) -> JobReport:
    from . import charlm

    return charlm.run(run.full, run.out, progress)


def _leaks(run: Run, progress: Callable[[float], None]) -> JobReport:
    from . import leaks

    layers = [Case(kind, job, 12, 2, 16) for kind in KINDS for job in ("fwd", "train", "packed")]
    steps = [Case(kind, job, 1, 1, 16) for kind in KINDS for job in ("step", "cell", "numpy_call")]
    return leaks.run(layers + steps, prepare, run.threads, progress)


CASES = (*_layer_cases(), *_bidirectional_cases(), *_varlen_cases(), *_streaming_cases())
FAMILY = Family(
    name="rnn",
    cases=CASES,
    peers=("torch", "onnxruntime", "openvino", "jax", f"{OURS} full"),
    contenders=contenders,
    prepare=prepare,
    bars=BARS,
    jobs=(Job("charlm", _char_lm), Job("leaks", _leaks, quick=False)),
)
