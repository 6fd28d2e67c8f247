"""What the language-model jobs share: a text, models that take turns, and how their losses differ.

The text is the documentation that ships with Python (`pydoc_data.topics`). The same model is
trained with torch.nn and with fastseq from the same seed; the two take turns, step by step.

Training amplifies rounding, so "the same loss curve" needs a yardstick: a third model, torch's
with every initial weight moved by one rounding. Ours may differ from torch by no more than
DRIFT times what torch differs from that twin.
"""

import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from . import measure
from .bars import Verdict
from .families import OURS, JobReport

TWIN = "torch, weights one rounding off"
DRIFT = 10.0
HELD_OUT = 0.05


class Config(Protocol):
    """What a job's dataclass of settings has at least: T characters of B streams, and steps."""

    T: int
    B: int
    steps: int


class Trainer(Protocol):
    """A model in training, and the losses (nats) it has had."""

    losses: list[float]

    def step(self, x: torch.Tensor, target: torch.Tensor, fresh: bool) -> float:
        """One chunk (T, B), the first of the text if fresh. Returns its seconds."""

    def bits_per_character(self, text: torch.Tensor) -> float:
        """Mean over a held-out text."""


def load_text(B: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Training and held-out text as streams (steps, B) of character numbers; how many there are."""
    from pydoc_data.topics import topics

    text = np.array(list("\n\n".join(topics[key] for key in sorted(topics))))
    characters, numbers = np.unique(text, return_inverse=True)
    cut = int(len(numbers) * (1 - HELD_OUT))
    train, test = (streams(part, B) for part in (numbers[:cut], numbers[cut:]))
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


def move_by_one_rounding(model: nn.Module, seed: int) -> None:
    """Every weight to its neighbour among the float32 numbers, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            up = torch.randint(2, weight.shape, generator=generator, dtype=torch.bool)
            towards = torch.where(up, math.inf, -math.inf)
            weight.copy_(torch.nextafter(weight, towards))


def train(
    trainers: Mapping[str, Trainer],
    text: torch.Tensor,
    config: Config,
    progress: Callable[[float], None],
) -> measure.Times:
    """config.steps steps of every model, side by side. Returns seconds per step."""
    times: measure.Times = {name: [] for name in trainers}
    for step, chunk in enumerate(islice(endless_chunks(text, config.T), config.steps)):
        for name in trainers if step % 2 == 0 else reversed(list(trainers)):
            time.sleep(measure.REST_S)
            times[name].append(trainers[name].step(*chunk))
        progress((step + 1) / config.steps)
    return times


def drift(losses: dict[str, list[float]], name: str) -> float:
    """The largest difference from torch's loss curve."""
    return max(abs(a - b) for a, b in zip(losses[name], losses["torch"], strict=True))


def report(
    name: str,
    title: str,
    config,
    trainers: Mapping[str, Trainer],
    times: measure.Times,
    texts: tuple[torch.Tensor, int],
    out: Path,
) -> JobReport:
    """The table, the verdict on the loss curve, and the plot; `texts`: held-out, vocabulary."""
    from .plot import loss_curves

    held_out, vocabulary = texts
    losses = {key: trainer.losses for key, trainer in trainers.items()}
    bits = {key: trainer.bits_per_character(held_out) for key, trainer in trainers.items()}
    rows = tuple(
        (
            key,
            f"{1e3 * measure.median(times[key]):.1f} ms",
            f"{measure.median(measure.ratios(times, key, OURS)):.2f}",
            f"{losses[key][-1] / math.log(2):.3f}",
            f"{bits[key]:.4f}",
            f"{drift(losses, key):.1e}",
        )
        for key in times
    )
    data = {"config": asdict(config), "python": platform.python_version()}
    data |= {"vocabulary": vocabulary, "losses": losses, "bits": bits, "times": times}
    loss_curves(losses, out / f"{name}.png", f"{title} on pydoc_data.topics, {config.steps} steps")
    columns = (
        "model",
        "step",
        "ratio",
        "last loss, bits",
        "held-out bits/char",
        "max |loss - torch|",
    )
    return JobReport(name, columns, rows, (_same_curve(name, losses),), data)


def _same_curve(name: str, losses: dict[str, list[float]]) -> Verdict:
    ours, allowed = drift(losses, OURS), DRIFT * drift(losses, TWIN)
    return Verdict(
        f"{name}: the loss curve of torch within rounding",
        f"<= {allowed:.1e} ({DRIFT:g} x torch's own)",
        f"{ours:.1e} nats",
        f"{len(losses[OURS])} steps",
        ours <= allowed,
    )
