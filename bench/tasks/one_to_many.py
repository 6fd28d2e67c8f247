"""One-to-many: a sequence from one vector. A word is spelled from the letter pairs that it has.

Claim: one vector of fixed size is enough to start a recurrent network that generates a sequence of
any length and ends it by itself; the vector may be the first state or a further input at every
step. Sources: Goodfellow et al., Deep Learning, 2016, section 10.2.4 and figure 10.9 (both ways);
Vinyals et al., arXiv:1411.4555 (a picture's vector, given once, to a sentence).

Words are those of the standard library's docstrings (sentences.py). The vector says of all pairs of
neighbours, the two ends included, which ones the word has, not in which order: "each" is
{^e, ea, ac, ch, h$}. Whole words are held out, and count when every letter and the end are right.
"""

import zlib
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
from .library import Library
from .phrases import PAD, SIGNS, greedy, spelled
from .plots import Picture, smooth
from .sentences import HELD_OUT, texts
from .train import COLUMNS, Progress, Recipe, Trained, about, part, same_curve, train, verdict

FIRST, EVERY = "the first state", "an input at every step"
SHORTEST, LONGEST = 3, 14  # letters
PAIRS = SIGNS**2
BAR = 0.5


@dataclass(frozen=True)
class Config:
    """Batches of B words; signs of E numbers, H units."""

    B: int = 64
    E: int = 32
    H: int = 256
    recipe: Recipe = Recipe(steps=1500, shared=40, learning_rate=2e-3, clip_norm=1.0)


QUICK = Config(recipe=Recipe(steps=40, shared=10, learning_rate=2e-3, clip_norm=1.0))
FULL = Config()


class Speller(nn.Module):
    """A vector, a GRU, the next sign's logits."""

    def __init__(self, given: str, config: Config, library: Library):
        super().__init__()
        self.given = given
        self.embed = nn.Embedding(SIGNS, config.E, padding_idx=PAD)
        self.read = nn.Linear(PAIRS, config.H)
        self.gru = library.GRU(config.E + (config.H if given == EVERY else 0), config.H)
        self.head = nn.Linear(config.H, SIGNS)

    def step(self, signs: Tensor, h: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Signs (T, B) that precede, to logits (T, B, SIGNS), from state h; the state after."""
        x = self.embed(signs)
        if self.given == EVERY:
            x = torch.cat((x, read.expand(len(x), -1, -1)), 2)
        y, h = self.gru(x, h)
        return self.head(y), h

    def start(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B, PAIRS) to the first state and what is read at every step, both (1, B, H)."""
        read = self.read(vector).tanh().unsqueeze(0)
        return (read if self.given == FIRST else torch.zeros_like(read)), read


def loss_of(model: Speller, vector: Tensor, signs: Tensor) -> Tensor:
    """The mean cross entropy of a sign, the ones before it given."""
    logits, _ = model.step(signs[:-1], *model.start(vector))
    return F.cross_entropy(logits.flatten(0, 1), signs[1:].flatten(), ignore_index=PAD)


def words() -> tuple[list[str], list[str]]:
    """For training and held out, by a word's own checksum."""
    found = {word for part in texts() for text in part for word in text.split() if word.isalpha()}
    parts: tuple[list[str], list[str]] = [], []
    for word in sorted(found):
        if SHORTEST <= len(word) <= LONGEST:
            parts[zlib.crc32(word.encode()) % HELD_OUT == 0].append(word)
    return parts


def batch_of(chosen: list[str]) -> tuple[Tensor, Tensor]:
    """Vectors (B, PAIRS) and signs (T, B) of words."""
    signs = spelled(chosen)
    pairs, real = signs[:-1] * SIGNS + signs[1:], signs[1:] != PAD
    vector = torch.zeros(len(chosen), PAIRS)
    return vector.scatter_reduce(1, pairs.T, real.T.float(), "amax"), signs


def batches(shown: list[str], config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """At random."""
    rng = np.random.default_rng(config.recipe.seed)
    while True:
        yield batch_of([shown[i] for i in rng.integers(0, len(shown), config.B)])


@torch.no_grad()
def right(model: Speller, asked: list[str]) -> np.ndarray:
    """Of every word whether it is spelled without a fault, from its vector alone."""
    vector, signs = batch_of(asked)
    h, read = model.start(vector)
    written = greedy(partial(model.step, read=read), h, len(signs) - 1)
    return ((written == signs[1:]) | (signs[1:] == PAD)).all(0).numpy()


def run(full: bool, out: Path, progress: Progress, config: Config | None = None) -> JobReport:
    """Train with the vector given either way, judge by held-out words."""
    config = config or (FULL if full else QUICK)
    shown, held_out = words()
    found, told = {}, {}
    for i, given in enumerate((FIRST, EVERY)):
        build, stream = partial(Speller, given, config), batches(shown, config)
        found[given] = train(given, build, loss_of, stream, config.recipe, part(progress, i, 2))
        told[given] = right(found[given].model(), held_out)
    accuracy = {given: float(hits.mean()) for given, hits in told.items()}
    rows = [(given, f"{accuracy[given]:.1%}", *t.cells()) for given, t in found.items()]
    letters = np.array([len(word) for word in held_out])
    draw(found, told, letters, out / "one_to_many.png")
    sizes = {"train": len(shown), "held_out": len(held_out)}
    return JobReport(
        "one_to_many",
        ("the vector is", "held-out words right", *COLUMNS),
        tuple(rows),
        (*verdicts(accuracy, full), same_curve("one_to_many", found.values())),
        about(config, found.values(), accuracy=accuracy, words=sizes),
    )


def verdicts(accuracy: dict[str, float], judged: bool) -> tuple[Verdict, ...]:
    """Of either way to give the vector."""
    return tuple(
        verdict(
            f"one to many: held-out words spelled from {given}",
            f">= {BAR:.0%} without a fault",
            f"{share:.1%}",
            share >= BAR,
            judged,
        )
        for given, share in accuracy.items()
    )


def draw(
    found: dict[str, Trained], told: dict[str, np.ndarray], letters: np.ndarray, path: Path
) -> None:
    """The loss over the steps, and what is right over the letters of a word."""
    picture = Picture("words spelled from the letter pairs that they have", panels=2)
    losses = {given: smooth(t.trainers[OURS].losses) for given, t in found.items()}
    picture.panel(0, losses, ("step", "cross entropy of a letter"), log=True)
    spans = np.unique(letters)
    curves = {
        given: (spans, [hits[letters == n].mean() for n in spans]) for given, hits in told.items()
    }
    picture.panel(1, curves, ("letters of the word", "held-out words right"))
    picture.save(path)
