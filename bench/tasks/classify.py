"""Many-to-one, variable length: from which area of the standard library is this sentence?

Claim: a recurrent layer reads a sentence of any length into one vector, its last state, from which
a class is told (as in sentiment analysis). In a batch of unequal lengths that must be each
sentence's own last state (PackedSequence); the state after the padding is a worse one, and costs
more. Sources: Goodfellow et al., Deep Learning, 2016, section 10.2 and figure 10.5; Socher et al.,
2013 (sentiment of sentences).

Sentences and labels are real: docstrings, labelled by the module's area (sentences.py). The same
GRU is trained on packed batches, and on padded ones as if they all had one length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from ..families import OURS, JobReport
from .library import Library
from .plots import Picture
from .sentences import AREAS, LONGEST, PAD, Corpus, load
from .train import COLUMNS, Progress, Recipe, about, part, same_curve, train, verdict

PACKED, PADDED = "packed", "padded"


@dataclass(frozen=True)
class Config:
    """Batches of B sentences, words of E numbers, H units."""

    B: int = 64
    E: int = 64
    H: int = 128
    recipe: Recipe = Recipe(steps=900, shared=900, learning_rate=2e-3, clip_norm=1.0)


QUICK = Config(recipe=Recipe(steps=30, shared=30, learning_rate=2e-3, clip_norm=1.0))
FULL = Config()
BAR = 0.2  # of accuracy above the most frequent area


class Classifier(nn.Module):
    """Words, a GRU, the area's logits from one state."""

    def __init__(self, reading: str, config: Config, vocabulary: int, library: Library):
        super().__init__()
        self.reading = reading
        self.embed = nn.Embedding(vocabulary, config.E, padding_idx=PAD)
        self.gru = library.GRU(config.E, config.H)
        self.head = nn.Linear(config.H, len(AREAS))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Words (T, B), PAD past the lengths (B,), to logits (B, areas)."""
        x = self.embed(words)
        if self.reading == PACKED:
            x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.head(self.gru(x)[1][-1])


def loss_of(model: Classifier, words: Tensor, lengths: Tensor, area: Tensor) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(words, lengths), area)


def batch_of(sentences: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Words (T, B), lengths (B,), areas (B,)."""
    lengths = torch.tensor([len(words) for words, _ in sentences])
    words = torch.full((int(lengths.max()), len(sentences)), PAD)
    for b, (sentence, _) in enumerate(sentences):
        words[: len(sentence), b] = torch.tensor(sentence)
    return words, lengths, torch.tensor([area for _, area in sentences])


def batches(corpus: Corpus, config: Config) -> Iterator[tuple[Tensor, ...]]:
    """Epoch after epoch, in random order."""
    rng = np.random.default_rng(config.recipe.seed)
    while True:
        order = rng.permutation(len(corpus.train))
        for start in range(0, len(order) - config.B + 1, config.B):
            yield batch_of([corpus.train[i] for i in order[start : start + config.B]])


@torch.no_grad()
def right(model: Classifier, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Of every held-out sentence: whether its area was told, and its length."""
    found = []
    for start in range(0, len(corpus.held_out), 256):
        words, lengths, area = batch_of(corpus.held_out[start : start + 256])
        found.append((model(words, lengths).argmax(1) == area, lengths))
    told, lengths = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    return told, lengths


def run(full: bool, out: Path, progress: Progress, config: Config | None = None) -> JobReport:
    """Train on packed and on padded batches, judge by held-out sentences."""
    config, corpus = config or (FULL if full else QUICK), load()
    found, told = {}, {}
    for i, reading in enumerate((PACKED, PADDED)):
        build = partial(Classifier, reading, config, corpus.vocabulary)
        tell = part(progress, i, 2)
        trained = train(reading, build, loss_of, batches(corpus, config), config.recipe, tell)
        found[reading] = trained
        told[reading] = {who: right(trained.model(who), corpus) for who in (OURS, "torch")}
    accuracy = {
        reading: {who: float(hit.mean()) for who, (hit, _) in by_who.items()}
        for reading, by_who in told.items()
    }
    areas = np.array([area for _, area in corpus.held_out])
    majority = float(np.bincount(areas).max() / len(areas))
    rows = [
        (reading, *(f"{accuracy[reading][who]:.1%}" for who in (OURS, "torch")), *trained.cells())
        for reading, trained in found.items()
    ]
    rows.append(("most frequent area", f"{majority:.1%}", f"{majority:.1%}", *"-" * len(COLUMNS)))
    draw({reading: by_who[OURS] for reading, by_who in told.items()}, out / "classify.png")
    bar = verdict(
        f"classify: {len(AREAS)} areas told from one state, above the most frequent",
        f">= {majority + BAR:.1%}, both libraries",
        ", ".join(f"{accuracy[PACKED][who]:.1%}" for who in (OURS, "torch")),
        min(accuracy[PACKED].values()) >= majority + BAR,
        full,
    )
    sizes = {"train": len(corpus.train), "held_out": len(corpus.held_out)}
    sizes["vocabulary"] = corpus.vocabulary
    return JobReport(
        "classify",
        ("reading", "held-out accuracy", "torch's", *COLUMNS),
        tuple(rows),
        (bar, same_curve("classify", found.values())),
        about(config.recipe, found.values(), accuracy=accuracy, majority=majority, corpus=sizes),
    )


def draw(told: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Accuracy over the length of the sentence."""
    edges = np.array([0, 8, 12, 16, 20, 25, 30, 40, LONGEST])
    curves = {}
    for reading, (hit, lengths) in told.items():
        bins = [(lengths > a) & (lengths <= b) for a, b in pairwise(edges)]
        points = [(lengths[b].mean(), hit[b].mean()) for b in bins if b.any()]
        curves[reading] = tuple(zip(*points, strict=True))
    picture = Picture("the area that a sentence is about, held-out sentences")
    picture.panel(0, curves, ("words and signs of the sentence", "accuracy"))
    picture.save(path)
