"""Long-term dependency: the adding problem over T = 200 steps.

Claim: a tanh RNN cannot carry a value over hundreds of steps, because its gradient vanishes; gates
(LSTM, GRU), an identity recurrence (IRNN) or direct access to all steps (attention) can.
Sources: Hochreiter & Schmidhuber, 1997 (the problem); Bengio et al., 1994 (vanishing gradients);
Le, Jaitly & Hinton, arXiv:1504.00941 (IRNN solves it at T = 200 and beyond).

Every step has a number from U(0, 1) and a mark; one number in each half is marked, and the last
output is to be the sum of the two. Answering 1 always has a mean squared error of 1/6 = 0.167.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..bars import Verdict
from ..families import OURS, JobReport
from .blocks import Shape
from .memory import GRU, IRNN, KINDS, LSTM, RNN, Model, Sizes
from .plots import Picture, smooth
from .train import COLUMNS, Progress, Recipe, Trained, about, part, same_curve, train, verdict

BASELINE = 1 / 6
SOLVED = 0.01


@dataclass(frozen=True)
class Config:
    """T steps in batches of B; H units."""

    T: int = 200
    B: int = 50
    H: int = 64
    held_out: int = 1000
    recipe: Recipe = Recipe(steps=2000, shared=40, clip_norm=1.0)

    def of(self, kind: str) -> Recipe:
        """The recipe of a kind: an identity recurrence wants small steps, as in its paper."""
        rates = {IRNN: 0.1, RNN: 0.1}
        return replace(self.recipe, learning_rate=rates.get(kind, 1.0) * self.recipe.learning_rate)


QUICK = Config(T=50, held_out=200, recipe=Recipe(steps=60, shared=10, clip_norm=1.0))
FULL = Config()


def batches(config: Config, B: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x (T, B, 2), numbers and marks, and the sums of the two marked numbers (B,)."""
    rng = np.random.default_rng(seed)
    T, b = config.T, np.arange(B)
    while True:
        x = np.zeros((T, B, 2), np.float32)
        x[:, :, 0] = rng.random((T, B))
        first, second = rng.integers(0, T // 2, B), rng.integers(T // 2, T, B)
        x[first, b, 1] = x[second, b, 1] = 1
        yield torch.from_numpy(x), torch.from_numpy(x[first, b, 0] + x[second, b, 0])


def loss_of(model: Model, x: Tensor, total: Tensor) -> Tensor:
    """The mean squared error of the last output."""
    return F.mse_loss(model(x)[-1, :, 0], total)


def run(full: bool, out: Path, progress: Progress, config: Config | None = None) -> JobReport:
    """Train the six kinds, judge them by held-out sequences."""
    config = config or (FULL if full else QUICK)
    found, errors = {}, {}
    for i, kind in enumerate(KINDS):
        found[kind] = train_kind(kind, config, part(progress, i, len(KINDS)))
        errors[kind] = error(found[kind].model(), config)
    rows = tuple((kind, f"{errors[kind]:.4f}", *t.cells()) for kind, t in found.items())
    draw(found, out / "adding.png", config)
    return JobReport(
        "adding",
        ("model", "held-out MSE", *COLUMNS),
        rows,
        (*verdicts(errors, full), same_curve("adding", found.values())),
        about(config, found.values(), held_out_mse=errors),
    )


def train_kind(kind: str, config: Config, progress: Progress) -> Trained:
    """One of KINDS with both libraries."""
    sizes = Sizes(2, 1, config.H, config.T, Shape(32, 2, 1, config.T))
    stream = batches(config, config.B, config.recipe.seed)
    build = partial(Model, kind, sizes)
    return train(kind, build, loss_of, stream, config.of(kind), progress)


@torch.no_grad()
def error(model: Model, config: Config) -> float:
    """Mean squared, of sequences that training has not seen."""
    return loss_of(model, *next(batches(config, config.held_out, config.recipe.seed + 1))).item()


def verdicts(errors: dict[str, float], judged: bool) -> tuple[Verdict, ...]:
    """Who solves it and who does not."""
    return tuple(
        verdict(
            f"adding, T = {FULL.T}: {kind} {'solves it' if solves else 'does not solve it'}",
            f"MSE {'<' if solves else '>='} {SOLVED:g}",
            f"{errors[kind]:.4f}",
            (errors[kind] < SOLVED) == solves,
            judged,
        )
        for kind, solves in ((GRU, True), (LSTM, True), (IRNN, True), (RNN, False))
    )


def draw(found: dict[str, Trained], path: Path, config: Config) -> None:
    """The loss of every kind over the steps."""
    picture = Picture(f"adding problem, T = {config.T}: training loss")
    curves = {kind: smooth(t.trainers[OURS].losses) for kind, t in found.items()}
    levels = {"always 1": BASELINE, "solved": SOLVED}
    picture.panel(0, curves, ("step", "mean squared error"), log=True, lines=levels)
    picture.save(path)
