"""Sequence to sequence: translation into pig Latin, through one vector or by attention.

Claim: an encoder that hands over only its last state has to press a sentence of any length into one
vector, and what is decoded from it gets worse with length; a decoder that attends to all states of
the encoder does not have this bottleneck. Sources: Sutskever et al., arXiv:1409.3215 (fixed
encoding); Cho et al., arXiv:1409.1259, section 5 (worse with length); Bahdanau et al.,
arXiv:1409.0473, figure 2 (attention keeps it); Luong et al., arXiv:1508.04025, section 3.1 (the
score "general", and attention after the recurrent layer, as here).

Real phrases (phrases.py), letter by letter. Pig Latin moves the consonants that a word starts with
to its end and adds "ay", and "way" to a word that starts with a vowel: "print each word" becomes
"intpray eachway ordway". Both models have the same GRUs, the decoder starts from the encoder's last
state. Held-out phrases are decoded greedily, each letter given back as the next input.
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
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..bars import Verdict
from ..families import JobReport
from .library import Library
from .phrases import LETTERS, PAD, SIGNS, greedy, phrase, spelled
from .plots import Picture
from .sentences import texts
from .train import COLUMNS, Progress, Recipe, about, part, same_curve, train, verdict

FIXED, ATTENTION = "last state only", "attention"
VOWELS = "aeiou"
SHORT, LONG = "1 to 8 letters", "25 to 32 letters"
SPANS = {SHORT: (1, 8), LONG: (25, 32)}
BINS = 8  # of the plot
BAR, FALL = 0.85, 0.3


@dataclass(frozen=True)
class Config:
    """Phrases of at most `letters` in batches of B; signs of E numbers, H units."""

    letters: int = 32
    B: int = 64
    E: int = 32
    H: int = 128
    held_out: int = 2048
    recipe: Recipe = Recipe(steps=2000, shared=20, clip_norm=1.0)


QUICK = Config(held_out=256, recipe=Recipe(steps=20, shared=6, clip_norm=1.0))
FULL = Config()


class Translator(nn.Module):
    """A GRU reads, a GRU writes."""

    def __init__(self, reading: str, config: Config, library: Library):
        super().__init__()
        self.library, H = library, config.H
        self.embed = nn.Embedding(SIGNS, config.E, padding_idx=PAD)
        self.encoder, self.decoder = (library.GRU(config.E, H) for _ in range(2))
        self.query = nn.Linear(H, H, bias=False) if reading == ATTENTION else None
        self.mix = nn.Linear(2 * H if self.query else H, H)
        self.head = nn.Linear(H, SIGNS)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Signs (S, B) to states (S, B, H) and the last of each phrase (1, B, H)."""
        packed = pack_padded_sequence(self.embed(source), lengths, enforce_sorted=False)
        states, last = self.encoder(packed)
        return pad_packed_sequence(states)[0], last

    def decode(
        self, given: Tensor, h: Tensor, states: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Signs (T, B) that precede, to logits (T, B, SIGNS), from state h; the state after."""
        y, h = self.decoder(self.embed(given), h)
        seen = torch.cat((self.context(y, states, lengths), y), 2) if self.query else y
        return self.head(self.mix(seen).tanh()), h

    def context(self, y: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
        """What each state (T, B, H) of the decoder attends to, of the encoder's (S, B, H)."""
        q, k = (a.transpose(0, 1).unsqueeze(1) for a in (self.query(y), states))
        return self.library.attention(q, k, k, lengths=lengths)[:, 0].transpose(0, 1)


def pig_latin(text: str) -> str:
    """Of words with a space between them."""
    return " ".join(map(_pig_word, text.split()))


def _pig_word(word: str) -> str:
    head = next((i for i, letter in enumerate(word) if letter in VOWELS), len(word))
    return f"{word[head:]}{word[:head]}ay" if head else f"{word}way"


def loss_of(model: Translator, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
    """The mean cross entropy of a letter of the translation, the ones before it given."""
    states, last = model.encode(source, lengths)
    logits, _ = model.decode(target[:-1], last, states, lengths)
    return F.cross_entropy(logits.flatten(0, 1), target[1:].flatten(), ignore_index=PAD)


def batches(
    sentences: list[list[str]], config: Config, B: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Phrases (S, B) short and long, their lengths (B,), their translations (T, B)."""
    rng = np.random.default_rng(seed)
    while True:
        chosen = [sentences[i] for i in rng.integers(0, len(sentences), B)]
        limits = rng.integers(1, config.letters, B, endpoint=True)
        read = [phrase(words, n, rng) for words, n in zip(chosen, limits, strict=True)]
        lengths = torch.tensor([len(text) + 2 for text in read])  # START and END
        yield spelled(read), lengths, spelled(map(pig_latin, read))


@torch.no_grad()
def right(model: Translator, source: Tensor, lengths: Tensor, target: Tensor) -> np.ndarray:
    """Of every phrase (B): the share of signs that are right, decoded greedily, the end too."""
    states, last = model.encode(source, lengths)
    step = partial(model.decode, states=states, lengths=lengths)
    counted = target[1:] != PAD
    hits = (greedy(step, last, len(target) - 1) == target[1:]) & counted
    return (hits.sum(0) / counted.sum(0)).numpy()


def words_of(sentences: dict[str, int]) -> list[list[str]]:
    """Words of LETTERS alone, of the sentences that have any."""
    found = ([word for word in text.split() if set(word) <= set(LETTERS)] for text in sentences)
    return [words for words in found if words]


def run(full: bool, out: Path, progress: Progress, config: Config | None = None) -> JobReport:
    """Train both, judge them by held-out phrases."""
    config = config or (FULL if full else QUICK)
    seen, kept = map(words_of, texts())
    asked = next(batches(kept, config, config.held_out, config.recipe.seed + 1))
    letters = asked[1].numpy() - 2
    found, hits = {}, {}
    for i, reading in enumerate((FIXED, ATTENTION)):
        stream = batches(seen, config, config.B, config.recipe.seed)
        build = partial(Translator, reading, config)
        found[reading] = train(reading, build, loss_of, stream, config.recipe, part(progress, i, 2))
        hits[reading] = right(found[reading].model(), *asked)
    reached = {reading: by_length(letters, share) for reading, share in hits.items()}
    draw(letters, hits, out / "bottleneck.png")
    return JobReport(
        "bottleneck",
        ("read by", *(f"right, {span}" for span in SPANS), *COLUMNS),
        tuple((reading, *cells(reached[reading]), *t.cells()) for reading, t in found.items()),
        (*verdicts(reached, full), same_curve("bottleneck", found.values())),
        about(config, found.values(), right=reached),
    )


def by_length(letters: np.ndarray, share: np.ndarray) -> dict[str, dict[str, float]]:
    """Letters right, and phrases without a fault, of every one of SPANS."""
    chosen = {
        span: share[(low <= letters) & (letters <= high)] for span, (low, high) in SPANS.items()
    }
    return {
        span: {"letters": float(found.mean()), "phrases": float((found == 1).mean())}
        for span, found in chosen.items()
    }


def cells(reached: dict[str, dict[str, float]]) -> tuple[str, ...]:
    """Letters, and in brackets phrases."""
    return tuple(f"{at['letters']:.1%} ({at['phrases']:.1%})" for at in reached.values())


def verdicts(reached: dict[str, dict], judged: bool) -> tuple[Verdict, ...]:
    """Attention keeps what the last state alone loses."""
    fixed, attention = (
        [reached[reading][span]["letters"] for span in SPANS] for reading in (FIXED, ATTENTION)
    )
    return (
        verdict(
            f"bottleneck: with attention, letters right in {LONG}",
            f">= {BAR:.0%}",
            f"{attention[-1]:.1%}",
            attention[-1] >= BAR,
            judged,
        ),
        verdict(
            f"bottleneck: through one vector, letters right in {LONG} against {SHORT}",
            f"<= {fixed[0] - FALL:.1%}",
            f"{fixed[-1]:.1%}",
            fixed[-1] <= fixed[0] - FALL,
            judged,
        ),
    )


def draw(letters: np.ndarray, hits: dict[str, np.ndarray], path: Path) -> None:
    """What is right over the length of the phrase."""
    edges = np.linspace(0, letters.max(), BINS + 1)
    bins = [(letters > a) & (letters <= b) for a, b in pairwise(edges)]
    bins = [chosen for chosen in bins if chosen.any()]
    middles = [letters[chosen].mean() for chosen in bins]
    picture = Picture("pig Latin of held-out phrases, decoded greedily", panels=2)
    whole = {reading: share == 1 for reading, share in hits.items()}
    panels = (("letters right", hits), ("phrases without a fault", whole))
    for i, (label, shares) in enumerate(panels):
        curves = {r: (middles, [share[b].mean() for b in bins]) for r, share in shares.items()}
        picture.panel(i, curves, ("letters of the phrase", label))
    picture.save(path)
