"""Order: which way does this sentence run?

Claim: self-attention alone sees a set. Without positions a block commutes with every permutation of
the steps, so a sentence and its reverse have the same mean over the steps and the same answer, and
of the two exactly one is right; what brings order in are positions, added to the input (sinusoidal)
or turning queries and keys (rotary). Sources: Vaswani et al., arXiv:1706.03762, section 3.5;
Lee et al., arXiv:1810.00825, section 3.1 (a set stays a set); Su et al., arXiv:2104.09864,
section 3.2 (rotary).

Pieces of T words of real sentences (sentences.py), forwards or backwards; a held-out piece is shown
both ways.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bars import Verdict
from ..families import OURS, JobReport
from .blocks import POSITIONS, SelfAttention, Shape
from .library import Library
from .plots import Picture, smooth
from .sentences import load
from .train import COLUMNS, Progress, Recipe, Trained, about, part, same_curve, train, verdict

CHANCE, ROUNDING = 0.5, 0.01  # of the held-out pieces; rounding may decide where the answer is open
BAR = 0.7


@dataclass(frozen=True)
class Config:
    """Pieces of T words in batches of B; blocks of NH heads, E numbers wide."""

    T: int = 10
    B: int = 64
    E: int = 64
    NH: int = 2
    layers: int = 1
    recipe: Recipe = Recipe(steps=2500, shared=40, learning_rate=2e-3, clip_norm=1.0)


QUICK = Config(recipe=Recipe(steps=40, shared=10, learning_rate=2e-3, clip_norm=1.0))
FULL = Config()


class Judge(nn.Module):
    """Words, self-attention, the mean over all steps, one logit: forwards."""

    def __init__(self, positions: str, config: Config, vocabulary: int, library: Library):
        super().__init__()
        shape = Shape(config.E, config.NH, config.layers, config.T, positions=positions)
        self.embed = nn.Embedding(vocabulary, config.E)
        self.body = SelfAttention(library, shape)
        self.head = nn.Linear(config.E, 1)

    def forward(self, words: Tensor) -> Tensor:
        """Words (T, B) to logits (B,)."""
        return self.head(self.body(self.embed(words)).mean(0))[:, 0]


def loss_of(model: Judge, words: Tensor, forwards: Tensor) -> Tensor:
    """Cross entropy."""
    return F.binary_cross_entropy_with_logits(model(words), forwards)


def pieces(sentences: list[tuple[list[int], int]], T: int) -> np.ndarray:
    """Side by side (T, pieces), as many as a sentence has without overlap."""
    found = [words[i : i + T] for words, _ in sentences for i in range(0, len(words) - T + 1, T)]
    return np.array(found).T


def batches(shown: np.ndarray, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Words (T, B), each piece one way or the other at random, and 1 where it is forwards (B,)."""
    rng = np.random.default_rng(config.recipe.seed)
    while True:
        words = shown[:, rng.integers(0, shown.shape[1], config.B)]
        forwards = rng.random(config.B) < CHANCE
        words = np.where(forwards, words, words[::-1])
        yield torch.from_numpy(words), torch.from_numpy(forwards.astype(np.float32))


@torch.no_grad()
def right(model: Judge, words: np.ndarray) -> float:
    """The share of right answers, every piece shown both ways."""
    one_way, other_way = (model(torch.from_numpy(w)) for w in (words, words[::-1].copy()))
    return torch.cat((one_way > 0, other_way <= 0)).double().mean().item()


def run(full: bool, out: Path, progress: Progress, config: Config | None = None) -> JobReport:
    """Train with each kind of position, judge by held-out pieces."""
    config, corpus = config or (FULL if full else QUICK), load()
    shown, held_out = (pieces(part, config.T) for part in (corpus.train, corpus.held_out))
    found, accuracy = {}, {}
    for i, positions in enumerate(POSITIONS):
        build = partial(Judge, positions, config, corpus.vocabulary)
        tell = part(progress, i, len(POSITIONS))
        found[positions] = train(
            positions, build, loss_of, batches(shown, config), config.recipe, tell
        )
        accuracy[positions] = right(found[positions].model(), held_out)
    rows = tuple((name, f"{accuracy[name]:.1%}", *t.cells()) for name, t in found.items())
    draw(found, out / "order.png")
    sizes = {"train": shown.shape[1], "held_out": held_out.shape[1]}
    return JobReport(
        "order",
        ("positions", "held-out accuracy", *COLUMNS),
        rows,
        (*verdicts(accuracy, full), same_curve("order", found.values())),
        about(config, found.values(), accuracy=accuracy, pieces=sizes),
    )


def verdicts(accuracy: dict[str, float], judged: bool) -> tuple[Verdict, ...]:
    """Chance without positions, whatever the training; order told with each kind of them."""
    none, *others = POSITIONS
    blind = verdict(
        "order: without positions a sentence is a set",
        f"{CHANCE:.0%} within {ROUNDING:.0%}",
        f"{accuracy[none]:.1%}",
        abs(accuracy[none] - CHANCE) <= ROUNDING,
    )
    return blind, *(
        verdict(
            f"order: told with {positions} positions",
            f">= {BAR:.0%}",
            f"{accuracy[positions]:.1%}",
            accuracy[positions] >= BAR,
            judged,
        )
        for positions in others
    )


def draw(found: dict[str, Trained], path: Path) -> None:
    """The loss with every kind of position."""
    picture = Picture("which way a sentence runs: training loss by positions")
    curves = {name: smooth(t.trainers[OURS].losses) for name, t in found.items()}
    picture.panel(0, curves, ("step", "cross entropy"), lines={"guessing": float(np.log(2))})
    picture.save(path)
