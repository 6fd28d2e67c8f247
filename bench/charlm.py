"""The end-to-end job: a character-level LSTM language model on real English text.

The text is the documentation that ships with Python (`pydoc_data.topics`). The same model is
trained with torch.nn and with fastseq.torch.nn from the same seed, by truncated backpropagation
through time with the state carried from chunk to chunk; the two take turns, step by step.

Training amplifies rounding, so "the same loss curve" needs a yardstick: a third model, torch.nn
with every initial weight moved by one rounding. Ours may differ from torch by no more than
DRIFT times what torch differs from that twin.
"""

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastseq.torch.nn

from . import measure
from .bars import Verdict
from .families import OURS, JobReport

TWIN = "torch, weights one rounding off"
DRIFT = 10.0
HELD_OUT = 0.05


@dataclass(frozen=True)
class Config:
    """B streams of the text, chunks of T characters, embedding E, H units."""

    T: int = 100
    B: int = 32
    E: int = 128
    H: int = 256
    learning_rate: float = 3e-3
    clip_norm: float = 1.0
    seed: int = 0
    steps: int = 100


QUICK, FULL = Config(), Config(steps=700)


def run(full: bool, out: Path, progress: Callable[[float], None]) -> JobReport:
    """Train the three models side by side, then report bits per character and time per step."""
    config = FULL if full else QUICK
    train_text, test_text, vocabulary = load_text(config)
    trainers = {
        OURS: Trainer(fastseq.torch.nn, config, vocabulary),
        "torch": Trainer(nn, config, vocabulary),
        TWIN: Trainer(nn, config, vocabulary, one_rounding_off=True),
    }
    times: measure.Times = {name: [] for name in trainers}
    for step, chunk in enumerate(islice(endless_chunks(train_text, config.T), config.steps)):
        for name in trainers if step % 2 == 0 else reversed(trainers):
            time.sleep(measure.REST_S)
            times[name].append(trainers[name].step(*chunk))
        progress((step + 1) / config.steps)
    losses = {name: trainer.losses for name, trainer in trainers.items()}
    bits = {name: trainer.bits_per_character(test_text) for name, trainer in trainers.items()}
    return report(config, times, losses, bits, out, vocabulary)


def load_text(config: Config) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Training and held-out text as streams (steps, B) of character numbers; how many there are."""
    from pydoc_data.topics import topics

    text = np.array(list("\n\n".join(topics[key] for key in sorted(topics))))
    characters, numbers = np.unique(text, return_inverse=True)
    cut = int(len(numbers) * (1 - HELD_OUT))
    train, test = (streams(part, config.B) for part in (numbers[:cut], numbers[cut:]))
    return train, test, len(characters)


def streams(numbers: np.ndarray, B: int) -> torch.Tensor:
    """B consecutive pieces of the text side by side: (steps, B)."""
    steps = len(numbers) // B
    return torch.from_numpy(numbers[: steps * B].reshape(B, steps).T.copy())


def chunks(text: torch.Tensor, T: int):
    """Pieces (T, B) in order, each with the next characters as target, and whether it is first."""
    for start in range(0, len(text) - T, T):
        yield text[start : start + T], text[start + 1 : start + T + 1], start == 0


def endless_chunks(text: torch.Tensor, T: int):
    """Epoch after epoch."""
    while True:
        yield from chunks(text, T)


class CharLM(nn.Module):
    """Embedding, LSTM, logits; `namespace` is torch.nn or fastseq.torch.nn."""

    def __init__(self, namespace, config: Config, vocabulary: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, config.E)
        self.lstm = namespace.LSTM(config.E, config.H)
        self.head = nn.Linear(config.H, vocabulary)

    def forward(self, x, state=None):
        """Logits (T, B, V) and the state after the chunk."""
        y, state = self.lstm(self.embed(x), state)
        return self.head(y), state


class Trainer:
    """A model, its optimizer, the state it carries and the losses (nats) it has had."""

    def __init__(self, namespace, config: Config, vocabulary: int, one_rounding_off: bool = False):
        torch.manual_seed(config.seed)
        self.config = config
        self.model = CharLM(namespace, config, vocabulary)
        if one_rounding_off:
            move_by_one_rounding(self.model, config.seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learning_rate)
        self.state = None
        self.losses: list[float] = []

    def step(self, x: torch.Tensor, target: torch.Tensor, fresh: bool) -> float:
        """One chunk: forward, backward, clip, update. Returns its seconds."""
        start = time.perf_counter()
        state = None if fresh or self.state is None else tuple(s.detach() for s in self.state)
        logits, self.state = self.model(x, state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.losses.append(loss.item())
        return time.perf_counter() - start

    @torch.no_grad()
    def bits_per_character(self, text: torch.Tensor) -> float:
        """Mean over the held-out text, read from left to right."""
        state, losses = None, []
        for x, target, _ in chunks(text, self.config.T):
            logits, state = self.model(x, state)
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()))
        return float(torch.stack(losses).mean()) / math.log(2)


def move_by_one_rounding(model: nn.Module, seed: int) -> None:
    """Every weight to its neighbour among the float32 numbers, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            up = torch.randint(2, weight.shape, generator=generator, dtype=torch.bool)
            towards = torch.where(up, math.inf, -math.inf)
            weight.copy_(torch.nextafter(weight, towards))


def drift(losses: dict[str, list[float]], name: str) -> float:
    """The largest difference from torch's loss curve."""
    return max(abs(a - b) for a, b in zip(losses[name], losses["torch"], strict=True))


def report(config, times, losses, bits, out: Path, vocabulary: int) -> JobReport:
    """The table, the verdict on the loss curve, and the plot."""
    from .plot import loss_curves

    rows = tuple(
        (
            name,
            f"{1e3 * measure.median(times[name]):.1f} ms",
            f"{measure.median(measure.ratios(times, name, OURS)):.2f}",
            f"{losses[name][-1] / math.log(2):.3f}",
            f"{bits[name]:.4f}",
            f"{drift(losses, name):.1e}",
        )
        for name in times
    )
    ours, allowed = drift(losses, OURS), DRIFT * drift(losses, TWIN)
    verdict = Verdict(
        "charlm: the loss curve of torch within rounding",
        f"<= {allowed:.1e} ({DRIFT:g} x torch's own)",
        f"{ours:.1e} nats",
        f"{config.steps} steps",
        ours <= allowed,
    )
    data = {"config": asdict(config), "python": platform.python_version()}
    data |= {"vocabulary": vocabulary, "losses": losses, "bits": bits, "times": times}
    loss_curves(losses, out / "charlm.png", config.steps)
    columns = (
        "model",
        "step",
        "ratio",
        "last loss, bits",
        "held-out bits/char",
        "max |loss - torch|",
    )
    return JobReport("charlm", columns, rows, (verdict,), data)
