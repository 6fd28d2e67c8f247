"""The family "attention": torch's scaled_dot_product_attention and MultiheadAttention, rivalled.

    op.job         what a call is
    sdpa.fwd       inference, softmax(q k^T / sqrt(D)) v
    sdpa.train     forward, and backward to q, k, v, and to the bias where there is one
    sdpa.decode    inference of one query (L = 1) on S keys and values, as in generating text
    mha.fwd        inference of nn.MultiheadAttention, self-attention, E = NH * D wide
    mha.train      forward, and backward to its weights and its input

    option         what is special; torch gets the first two and the window as a bool mask
    mask           keys padded to 52 % valid, as a mask (B, 1, 1, S)
    lengths        the same, as the number of valid keys of each batch row
    window         the WINDOW keys on each side of the diagonal
    dropout        of DROPOUT of the probabilities
    bias           learned, (1, NH, L, S)
    score_mod      a user's function, the score less distance / NEAR; torch gets it as a float mask

Building models and drawing inputs are not in the time. Work counts the allowed pairs alone.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .attention_bars import BARS
from .families import OURS, Family, Job, JobReport, Run, Setup

SEED, DROPOUT, WINDOW, NEAR = 20_170_612, 0.1, 256, 16
SHORTEST = 0.04  # of S: lengths spread evenly from here to S are 52 % of the keys
TRAINING = 3.5  # times the work of forward: 5 products after forward's 2
LARGE_SCORES = 2**28  # bytes of a score matrix that no peer is asked to write

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One row: L queries and S keys of NH and NK heads of D numbers, B times."""

    op: str
    job: str
    B: int
    NH: int
    NK: int
    L: int
    S: int
    D: int
    causal: bool = False
    option: str = ""
    quick: bool = False

    @property
    def name(self) -> str:
        """E.g. "sdpa.fwd/B1-NH8-L512-D64-causal"; NK and S where they are not NH and L."""
        sizes = {"B": self.B, "NH": self.NH}
        sizes |= {"NK": self.NK} if self.NK != self.NH else {}
        sizes |= {"S": self.S} if self.job == "decode" else {"L": self.L}
        shape = "-".join(f"{letter}{n}" for letter, n in (sizes | {"D": self.D}).items())
        value = {"dropout": DROPOUT, "window": WINDOW}.get(self.option, "")
        marks = "-causal" * self.causal + f"-{self.option}{value}" * bool(self.option)
        return f"{self.op}.{self.job}/{shape}{marks}"

    @property
    def training(self) -> bool:
        """Whether a call runs forward and backward."""
        return self.job == "train"

    @property
    def score_bytes(self) -> int:
        """Of the matrix that a fused kernel never writes."""
        return 4 * self.B * self.NH * self.L * self.S


@dataclass(frozen=True)
class Problem:
    """The numbers of a case, the same for every contender; float32.

    q (B, NH, L, D), k v (B, NK, S, D), do as q; kv_lengths (B,), bias (1, NH, L, S) or None.
    """

    case: Case
    q: Array
    k: Array
    v: Array
    do: Array
    kv_lengths: Array | None = None
    bias: Array | None = None

    @cached_property
    def mask(self) -> Array | None:
        """Lengths or window as a mask, True = attend, that broadcasts to (B, NH, L, S)."""
        keys = np.arange(self.case.S)
        if self.case.option == "window":
            return (np.abs(np.arange(self.case.L)[:, None] - keys) <= WINDOW)[None, None]
        if self.kv_lengths is None:
            return None
        return (keys < self.kv_lengths[:, None])[:, None, None]

    @property
    def whole(self) -> bool:
        """Whether the gate needs every head: bias sums over rows, dropout counts them."""
        return self.bias is not None or self.case.option == "dropout"

    def of_keys(self, a: Array) -> Array:
        """What the gate compares of k, v and their gradients: the corners of batch and heads."""
        return a if self.whole else a[np.ix_(*(sorted({0, n - 1}) for n in a.shape[:2]))]

    def of_queries(self, a: Array) -> Array:
        """The same of q, o and their gradients: the heads that read those keys."""
        B, NH, L, D = a.shape
        NK = self.case.NK
        kept = self.of_keys(a.reshape(B, NK, NH // NK, L, D))
        return kept.reshape(kept.shape[0], -1, L, D)

    def sliced(self) -> "Problem":
        """The same problem with only what the gate compares."""
        if self.whole:
            return self
        q, do = self.of_queries(self.q), self.of_queries(self.do)
        k, v = self.of_keys(self.k), self.of_keys(self.v)
        lengths = self.kv_lengths
        if lengths is not None:
            lengths = lengths[sorted({0, len(lengths) - 1})]
        case = replace(self.case, B=q.shape[0], NH=q.shape[1], NK=k.shape[1])
        return Problem(case, q, k, v, do, lengths)


def make_problem(case: Case) -> Problem:
    """Everything N(0, 1); the name seeds it."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    queries, keys = (case.B, case.NH, case.L, case.D), (case.B, case.NK, case.S, case.D)
    problem = Problem(case, draw(*queries), draw(*keys), draw(*keys), draw(*queries))
    if case.option in ("mask", "lengths"):
        lengths = np.linspace(case.S, SHORTEST * case.S, case.B).round().astype(np.int64)
        problem = replace(problem, kv_lengths=lengths)
    if case.option == "bias":
        problem = replace(problem, bias=draw(1, case.NH, case.L, case.S))
    return problem


def pairs(problem: Problem) -> int:
    """Allowed pairs of a query and a key, over all batch rows, of one head."""
    case = problem.case
    if case.causal:
        return case.B * int(np.minimum(np.arange(1, case.L + 1), case.S).sum())
    if problem.mask is None:
        return case.B * case.L * case.S
    return int(np.broadcast_to(problem.mask, (case.B, 1, case.L, case.S)).sum())


def flop(problem: Problem) -> float:
    """Useful work of a call: two products over the allowed pairs, and a module's projections."""
    case = problem.case
    forward = 4.0 * case.NH * case.D * pairs(problem)
    if case.op == "mha":  # the gradients of a projection are two products of its own size
        projections = 8.0 * case.B * case.L * (case.NH * case.D) ** 2
        return TRAINING * forward + 3 * projections if case.training else forward + projections
    return TRAINING * forward if case.training else forward


def contenders(case: Case) -> tuple[str, ...]:
    """Who takes part; OpenVINO has no shared key heads, and repeats them at each call."""
    if case.training or case.op == "mha" or case.option == "score_mod":
        return (OURS, "torch")
    peers = ("torch", "onnxruntime", "openvino")
    return (OURS, *(peer for peer in peers if peer != "openvino" or case.NK == case.NH))


def prepare(case: Case, threads: int) -> Setup:
    """Make a case ready to run; no contender is built before it is asked for."""
    from . import attention_peers, attention_torch

    problem = make_problem(case)
    known = attention_torch.builders(problem) | attention_peers.builders(problem, threads)
    read = problem.k.nbytes + problem.v.nbytes if case.job == "decode" else 0
    return Setup(
        builders={name: known[name] for name in contenders(case)},
        expected=lambda dtype: attention_torch.expected(problem, dtype),
        flop=flop(problem),
        read_bytes=read,
        working_set=read,
    )


# (B, NH, L, D), then whether the quick profile measures it: fwd, causal fwd, train, causal train.
_SHAPES = (
    ((1, 8, 128, 64), (True, False, True, False)),
    ((1, 8, 512, 64), (True, True, False, True)),
    ((1, 8, 2048, 64), (False, True, False, False)),
    ((4, 12, 512, 64), (False, False, False, False)),
    ((1, 16, 2048, 128), (False, False, False, False)),
    ((32, 8, 128, 64), (False, True, False, True)),
    ((16, 12, 256, 64), (False, False, False, False)),
    ((8, 8, 64, 32), (True, False, False, False)),
)
_PADDED = ((8, 8, 512, 64), (16, 12, 256, 64))

# NH, NK, D, then B and S; the quick profile measures the first of each.
_DECODE = (
    (32, 32, 128, ((1, 1024),)),
    (32, 8, 128, ((1, 4096), (1, 16384), (1, 65536), (8, 4096))),
    (8, 8, 64, ((1, 4096), (1, 1024), (1, 16384), (1, 65536))),
    (8, 2, 64, ((1, 16384), (1, 4096), (1, 65536))),
    (32, 1, 128, ((1, 16384),)),
    (16, 1, 64, ((1, 65536), (1, 4096))),
)


def _sdpa(job: str, shape: tuple[int, int, int, int], NK: int = 0, **more) -> Case:
    B, NH, L, D = shape
    return Case("sdpa", job, B, NH, NK or NH, L, L, D, **more)


def _square_cases() -> list[Case]:
    cases = [
        _sdpa(job, shape, causal=causal, quick=quick[2 * (job == "train") + causal])
        for job in ("fwd", "train")
        for causal in (False, True)
        for shape, quick in _SHAPES
    ]
    long = [_sdpa(job, (1, 8, 8192, 64), causal=True) for job in ("fwd", "train")]
    odd = [_sdpa("fwd", (1, 8, 1000, D), quick=D == 80) for D in (64, 80, 96)]
    lone = [_sdpa(job, (1, 1, 2048, 64)) for job in ("fwd", "train")]
    shared = [_sdpa(job, (1, 8, 1024, 64), NK=1) for job in ("fwd", "train")]
    steps = [_sdpa("fwd", (1, 8, 2**n, 64), causal=True) for n in range(6, 14)]
    return list({case.name: case for case in steps + cases + long + odd + lone + shared}.values())


def _option_cases() -> list[Case]:
    padded = [
        _sdpa(job, shape, option=option, quick=shape[0] == 8 and option == quick)
        for job, quick in (("fwd", "mask"), ("train", "lengths"))
        for option in ("mask", "lengths")
        for shape in _PADDED
    ]
    window = [
        _sdpa(job, (1, 8, 2048, 64), option="window", quick=job == "fwd")
        for job in ("fwd", "train")
    ]
    other = [
        _sdpa("train", (4, 8, 512, 64), option=option, quick=True) for option in ("dropout", "bias")
    ]
    own = [_sdpa(job, (4, 8, 512, 64), option="score_mod", quick=True) for job in ("fwd", "train")]
    return padded + window + other + own


def _decode_cases() -> list[Case]:
    return [
        Case("sdpa", "decode", B, NH, NK, 1, S, D, quick=i == 0)
        for NH, NK, D, sizes in _DECODE
        for i, (B, S) in enumerate(sizes)
    ]


def _module_cases() -> list[Case]:
    return [Case("mha", job, 4, 8, 8, 512, 512, 64, quick=True) for job in ("fwd", "train")]


def _trans_lm(run: Run, progress: Callable[[float], None]) -> JobReport:
    from . import translm

    return translm.run(run.full, run.out, progress)


def _memory(run: Run, progress: Callable[[float], None]) -> JobReport:
    from . import attention_memory

    return attention_memory.run(run.threads, run.full, progress)


CASES = (*_square_cases(), *_option_cases(), *_decode_cases(), *_module_cases())
FAMILY = Family(
    name="attention",
    cases=CASES,
    peers=("torch", "onnxruntime", "openvino"),
    contenders=contenders,
    prepare=prepare,
    bars=BARS,
    jobs=(Job("translm", _trans_lm), Job("memory", _memory)),
)
