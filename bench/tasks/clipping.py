"""Gradients: the same training with clipping and without.

Claim: the gradient of a recurrent network is a product over the steps and now and then explodes;
one such step throws the weights far away, and clipping the norm keeps them where they learn.
Sources: Bengio et al., 1994; Pascanu, Mikolov & Bengio, arXiv:1211.5063, section 3.2 (clipping the
norm) and figure 6 (the wall that it saves from); Le, Jaitly & Hinton, arXiv:1504.00941 (ReLU from
the identity, trained with clipped gradients).

Next characters of real text (lm.py) by plain gradient descent, as in Pascanu et al.: Adam would
divide by the gradient's size. A tanh RNN starts orthogonal, a ReLU RNN from the identity. Training
that is lost amplifies rounding without bound, so only what is clipped is held to torch's curve.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq.torch

from .. import lm
from ..bars import Verdict
from ..families import OURS, JobReport
from .library import Library
from .plots import Picture
from .train import COLUMNS, Progress, Recipe, Trained, about, part, same_curve, train, verdict

TANH, RELU = "tanh", "relu"  # torch.nn.RNN's names
CLIP = 0.25
NAMES = {
    (kind, clipped): f"{kind} RNN, {'clipped' if clipped else 'not clipped'}"
    for kind in (TANH, RELU)
    for clipped in (True, False)
}
LEARNT, LOST = 1.0, 1.0  # bits per character: under those of single characters, and over clipped


@dataclass(frozen=True)
class Config:
    """Chunks of T characters of B streams; characters of E numbers, H units."""

    T: int = 100
    B: int = 32
    E: int = 32
    H: int = 128
    recipe: Recipe = Recipe(steps=800, shared=20, learning_rate=1.5, optimizer="SGD")

    def of(self, kind: str, clipped: bool) -> Recipe:
        """The recipe of a network: ReLU, whose states have no bound, wants smaller steps."""
        rate = {TANH: 1.0, RELU: 0.2}[kind] * self.recipe.learning_rate
        return replace(self.recipe, learning_rate=rate, clip_norm=CLIP if clipped else math.inf)


QUICK = Config(recipe=replace(Config.recipe, steps=30, shared=10))
FULL = Config()


class Reader(nn.Module):
    """Characters, one recurrent layer, the next characters' logits."""

    def __init__(self, kind: str, config: Config, vocabulary: int, library: Library):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, config.E)
        self.rnn = library.RNN(config.E, config.H, nonlinearity=kind)
        self.head = nn.Linear(config.H, vocabulary)
        start = {TANH: fastseq.torch.init.orthogonal, RELU: fastseq.torch.init.identity}[kind]
        start(self.rnn)

    def forward(self, x: Tensor) -> Tensor:
        """Characters (T, B) to logits (T, B, vocabulary)."""
        return self.head(self.rnn(self.embed(x))[0])


def loss_of(model: Reader, x: Tensor, following: Tensor) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(x).flatten(0, 1), following.flatten())


def batches(text: Tensor, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks (T, B) in order, each with the characters that follow."""
    return ((x, following) for x, following, _ in lm.endless_chunks(text, config.T))


@torch.no_grad()
def bits(model: Reader, text: Tensor, config: Config) -> float:
    """Per character of held-out text."""
    chunks = islice(batches(text, config), len(text) // config.T)
    losses = [loss_of(model, *chunk) for chunk in chunks]
    return torch.stack(losses).mean().item() / math.log(2)


def entropy(text: Tensor) -> float:
    """Bits of a character that is told by its frequency alone."""
    counts = Counter(text.flatten().tolist())
    shares = [count / counts.total() for count in counts.values()]
    return -sum(share * math.log2(share) for share in shares)


def run(full: bool, out: Path, progress: Progress, config: Config | None = None) -> JobReport:
    """Train both networks with clipping and without, judge them by held-out text."""
    config = config or (FULL if full else QUICK)
    text, held_out, vocabulary = lm.load_text(config.B)
    found, reached = {}, {}
    for i, (case, name) in enumerate(NAMES.items()):
        build = partial(Reader, case[0], config, vocabulary)
        stream, tell = batches(text, config), part(progress, i, len(NAMES))
        found[name] = train(name, build, loss_of, stream, config.of(*case), tell)
        reached[name] = bits(found[name].model(), held_out, config)
    frequency = entropy(text)
    rows = [
        (name, shown(reached[name], ".3f"), largest_norm(t), *t.cells())
        for name, t in found.items()
    ]
    rows.append(("single characters", f"{frequency:.3f}", *"-" * (1 + len(COLUMNS))))
    held = [found[name] for (_, clipped), name in NAMES.items() if clipped]
    draw(found, out / "clipping.png")
    kept = {name: value if math.isfinite(value) else None for name, value in reached.items()}
    return JobReport(
        "clipping",
        ("network", "held-out bits/char", "largest gradient", *COLUMNS),
        tuple(rows),
        (*verdicts(reached, frequency, full), same_curve("clipping", held)),
        about(config, found.values(), bits=kept, single_characters=frequency),
    )


def shown(value: float, form: str) -> str:
    """For the table."""
    return format(value, form) if math.isfinite(value) else "not finite"


def largest_norm(trained: Trained) -> str:
    """Before clipping."""
    norms = trained.trainers[OURS].norms
    return shown(max(norms, key=lambda norm: (not math.isfinite(norm), norm)), ".1e")


def verdicts(reached: dict[str, float], frequency: float, judged: bool) -> Iterator[Verdict]:
    """Of each network: clipped it learns, not clipped it is lost."""
    for kind in (TANH, RELU):
        clipped, free = reached[NAMES[kind, True]], reached[NAMES[kind, False]]
        yield verdict(
            f"clipping: a {kind} RNN with clipping learns, bits per character",
            f"<= {frequency - LEARNT:.2f}",
            shown(clipped, ".2f"),
            clipped <= frequency - LEARNT,
            judged,
        )
        yield verdict(
            f"clipping: a {kind} RNN without it is lost",
            f">= {clipped + LOST:.2f}, or not finite",
            shown(free, ".2f"),
            not free < clipped + LOST,
            judged,
        )


def draw(found: dict[str, Trained], path: Path) -> None:
    """Loss and gradient norm at every step, as far as they are finite."""
    picture = Picture("the same training with clipped gradients and without", panels=2)
    trainers = {name: t.trainers[OURS] for name, t in found.items()}
    losses = {name: finite(trainer.losses) for name, trainer in trainers.items()}
    norms = {name: finite(trainer.norms) for name, trainer in trainers.items()}
    picture.panel(0, losses, ("step", "cross entropy"), log=True)
    label = "gradient norm before clipping"
    picture.panel(1, norms, ("step", label), log=True, lines={"clipped to": CLIP})
    picture.save(path)


def finite(curve: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """Steps and values before the first one that is not."""
    kept = list(takewhile(math.isfinite, curve))
    return range(1, len(kept) + 1), kept
