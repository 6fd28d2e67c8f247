"""The family "training": gradient clipping over 100 float32 tensors of H x H, as a model has them.

job    what a call is, with torch.nn.utils' function of the same name beside it
clip   clip_grad_norm_ where there is something to clip: max_norm falls by 0.1 % a call
keep   clip_grad_norm_ where there is nothing to clip
value  clip_grad_value_
numpy  fastseq.clip_grad_norm_ of NumPy arrays, as in "clip"
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .bars import Bar
from .families import OURS, Contender, Family, Setup
from .gate import Results

TENSORS = 100
LIMIT = 1.0  # of clip_grad_value_, on numbers from N(0, 1)
FALL = 0.999  # of max_norm, from call to call: thousands of calls stay far above denormals
KEEP = 1e9


@dataclass(frozen=True)
class Case:
    """One row."""

    job: str
    H: int
    quick: bool = False

    @property
    def name(self) -> str:
        """E.g. "gradients.clip/N100-H64"."""
        return f"gradients.{self.job}/N{TENSORS}-H{self.H}"

    @property
    def read_bytes(self) -> int:
        """Of a call: a pass for the norm, one for the scaling."""
        return (2 if self.job in ("clip", "numpy") else 1) * self.working_set

    @property
    def working_set(self) -> int:
        """Of all tensors."""
        return 4 * TENSORS * self.H**2


def make_problem(case: Case) -> np.ndarray:
    """Gradients (TENSORS, H, H) from N(0, 1); the name seeds them."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    return rng.standard_normal((TENSORS, case.H, case.H), dtype=np.float32)


def torch_parameters(gradients: np.ndarray) -> list:
    """Parameters with copies of the gradients."""
    import torch

    copies = [torch.from_numpy(g.copy()) for g in gradients]
    parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in copies]
    for p, g in zip(parameters, copies, strict=True):
        p.grad = g
    return parameters


def job(case: Case, by_norm: Callable, by_value: Callable, given) -> Callable[[], object]:
    """What is timed, and for the gate run once."""
    if case.job == "value":
        return lambda: by_value(given, LIMIT)
    if case.job == "keep":
        return lambda: by_norm(given, KEEP)
    state = {"max_norm": float(case.H * TENSORS**0.5)}  # about the norm

    def clip():
        state["max_norm"] *= FALL
        return by_norm(given, state["max_norm"])

    return clip


def results(norm, gradients) -> Results:
    """The norm, where there is one, and two of the gradients."""
    found = {} if norm is None else {"norm": np.asarray(norm)}
    return found | {"dfirst": np.array(gradients[0]), "dlast": np.array(gradients[-1])}


def contender(case: Case, who: str, gradients: np.ndarray) -> Contender:
    """Ours or torch's; the gate's call has gradients of its own."""
    import torch

    import fastseq
    import fastseq.torch

    if case.job == "numpy" and who == OURS:
        module, made, grads = fastseq, lambda: list(gradients.copy()), lambda given: given
    else:
        module = fastseq.torch if who == OURS else torch.nn.utils
        made, grads = (
            lambda: torch_parameters(gradients),
            lambda given: [p.grad.numpy() for p in given],
        )

    def call(given):
        return job(case, module.clip_grad_norm_, module.clip_grad_value_, given)

    def once() -> Results:
        given = made()
        norm = call(given)()
        norm = norm if norm is None else np.asarray(float(norm), gradients.dtype)
        return results(norm, grads(given))

    return Contender(call(made()), once)


def prepare(case: Case, threads: int) -> Setup:
    """Make a case ready to run."""
    gradients = make_problem(case)
    return Setup(
        builders={who: lambda who=who: contender(case, who, gradients) for who in (OURS, "torch")},
        expected=lambda dtype: contender(case, "torch", gradients.astype(dtype)).results(),
        flop=(0.0 if case.job == "value" else 2.0) * TENSORS * case.H**2,
        read_bytes=case.read_bytes,
        working_set=case.working_set,
    )


def _norm(*jobs: str) -> Callable[[dict], bool]:
    return lambda case: case["job"] in jobs


JOBS = ("clip", "keep", "value", "numpy")
QUICK = (("clip", 64), ("clip", 256), ("value", 64), ("numpy", 64))
CASES = tuple(Case(job, H, quick=(job, H) in QUICK) for job in JOBS for H in (64, 128, 256))
BARS = (
    Bar("clipping by norm / torch", _norm("clip", "keep"), lambda row: row.ratio("torch"), 1.5),
    Bar("clipping by value / torch", _norm("value"), lambda row: row.ratio("torch"), 1.0),
    Bar("NumPy, clipping by norm / torch", _norm("numpy"), lambda row: row.ratio("torch"), 1.5),
)
FAMILY = Family(
    name="training",
    cases=CASES,
    peers=("torch",),
    contenders=lambda case: (OURS, "torch"),
    prepare=prepare,
    bars=BARS,
)
