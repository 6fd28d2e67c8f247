"""Long-term dependency: copy memory. What was shown is to be repeated after a delay.

Claim: the copy needs every symbol kept apart over the delay; a tanh RNN does no better than a model
without memory, gates learn it slowly, and direct access to all steps (attention) finds it soonest.
Sources: Hochreiter & Schmidhuber, 1997; Arjovsky, Shah & Bengio, arXiv:1511.06464, section 5.1.

SHOWN symbols out of SYMBOLS, then blanks, then a mark from which on they are to be given in order;
before the mark the answer is blank. Without memory the best cross entropy is, over all steps,
SHOWN ln(SYMBOLS) / (T + 2 SHOWN).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..bars import Verdict
from ..families import OURS, JobReport
from .blocks import Shape
from .memory import ATTENTION, KINDS, RNN, Model, Sizes
from .plots import Picture, smooth
from .train import COLUMNS, Progress, Recipe, Trained, about, part, same_curve, train, verdict

SHOWN, SYMBOLS = 10, 8
BLANK, MARK = SYMBOLS, SYMBOLS + 1


@dataclass(frozen=True)
class Config:
    """A delay of T steps, batches of B; H units."""

    T: int = 60
    B: int = 64
    H: int = 64
    held_out: int = 512
    recipe: Recipe = Recipe(steps=1200, shared=30, clip_norm=1.0)

    @property
    def steps(self) -> int:
        """Of a sequence."""
        return self.T + 2 * SHOWN

    @property
    def baseline(self) -> float:
        """The cross entropy without memory."""
        return SHOWN * math.log(SYMBOLS) / self.steps


QUICK = Config(T=20, held_out=64, recipe=Recipe(steps=20, shared=6, clip_norm=1.0))
FULL = Config()


def batches(config: Config, B: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One-hot symbols (steps, B, SYMBOLS + 2), and the answers (steps, B)."""
    rng = np.random.default_rng(seed)
    while True:
        shown = torch.from_numpy(rng.integers(0, SYMBOLS, (SHOWN, B)))
        seen = torch.full((config.steps, B), BLANK)
        seen[:SHOWN], seen[-SHOWN] = shown, MARK
        answer = torch.full((config.steps, B), BLANK)
        answer[-SHOWN:] = shown
        yield F.one_hot(seen, SYMBOLS + 2).float(), answer


def loss_of(model: Model, x: Tensor, answer: Tensor) -> Tensor:
    """The mean cross entropy over all steps."""
    return F.cross_entropy(model(x).flatten(0, 1), answer.flatten())


def run(full: bool, out: Path, progress: Progress, config: Config | None = None) -> JobReport:
    """Train the six kinds, judge them by the symbols of held-out sequences that they give back."""
    config = config or (FULL if full else QUICK)
    found, right = {}, {}
    for i, kind in enumerate(KINDS):
        found[kind] = train_kind(kind, config, part(progress, i, len(KINDS)))
        right[kind] = accuracy(found[kind].model(), config)
    rows = tuple((kind, f"{right[kind]:.1%}", *t.cells()) for kind, t in found.items())
    draw(found, out / "copy_memory.png", config)
    return JobReport(
        "copy_memory",
        ("model", "symbols right", *COLUMNS),
        rows,
        (*verdicts(right, full), same_curve("copy_memory", found.values())),
        about(config, found.values(), symbols_right=right),
    )


def train_kind(kind: str, config: Config, progress: Progress) -> Trained:
    """One of KINDS with both libraries."""
    symbols, steps = SYMBOLS + 2, config.steps
    sizes = Sizes(symbols, symbols, config.H, steps, Shape(32, 2, 1, steps, causal=True))
    stream = batches(config, config.B, config.recipe.seed)
    return train(kind, partial(Model, kind, sizes), loss_of, stream, config.recipe, progress)


@torch.no_grad()
def accuracy(model: Model, config: Config) -> float:
    """The share of the shown symbols that are given back."""
    x, answer = next(batches(config, config.held_out, config.recipe.seed + 1))
    given = model(x)[-SHOWN:, :, :SYMBOLS].argmax(2)
    return (given == answer[-SHOWN:]).double().mean().item()


def verdicts(right: dict[str, float], judged: bool) -> tuple[Verdict, ...]:
    """Attention gives back more than the tanh RNN, which guesses."""
    guess = 1 / SYMBOLS
    return (
        verdict(
            "copy memory: a tanh RNN does little better than guessing",
            f"<= {2 * guess:.1%}",
            f"{right[RNN]:.1%}",
            right[RNN] <= 2 * guess,
            judged,
        ),
        verdict(
            "copy memory: self-attention gives back more than the tanh RNN",
            f">= {right[RNN] + guess:.1%}",
            f"{right[ATTENTION]:.1%}",
            right[ATTENTION] >= right[RNN] + guess,
            judged,
        ),
    )


def draw(found: dict[str, Trained], path: Path, config: Config) -> None:
    """The loss of every kind over the steps."""
    picture = Picture(f"copy memory, delay {config.T}: training loss")
    curves = {kind: smooth(t.trainers[OURS].losses) for kind, t in found.items()}
    levels = {"without memory": config.baseline}
    picture.panel(0, curves, ("step", "cross entropy"), log=True, lines=levels)
    picture.save(path)
