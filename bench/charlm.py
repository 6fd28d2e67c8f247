"""The end-to-end job of the family "rnn": a character-level LSTM language model on English text.

Trained with torch.nn and with fastseq.torch.nn by truncated backpropagation through time, the state
carried from chunk to chunk; lm.py says on what text and how the two are compared.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fastseq.torch.nn

from . import lm
from .families import OURS, JobReport


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
    train_text, held_out, vocabulary = lm.load_text(config.B)
    trainers = {
        OURS: Trainer(fastseq.torch.nn, config, vocabulary),
        "torch": Trainer(nn, config, vocabulary),
        lm.TWIN: Trainer(nn, config, vocabulary, one_rounding_off=True),
    }
    times = lm.train(trainers, train_text, config, progress)
    texts = (held_out, vocabulary)
    return lm.report("charlm", "character LSTM", config, trainers, times, texts, out)


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
            lm.move_by_one_rounding(self.model, config.seed)
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
        for x, target, _ in lm.chunks(text, self.config.T):
            logits, state = self.model(x, state)
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()))
        return float(torch.stack(losses).mean()) / math.log(2)
