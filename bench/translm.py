"""The end-to-end job of the family "attention": a decoder-only Transformer on English characters.

Trained with torch's scaled_dot_product_attention and with fastseq.torch.attention; everything else
is torch's in both. lm.py says on what text and how the two are compared. Then the trained model
continues held-out text, one character at a time from a cache of keys and values: torch attends to
the valid part of the cache, fastseq is told the lengths.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fastseq.torch

from . import lm, measure
from .families import OURS, JobReport

GENERATIONS = 3  # rounds of generation; the median counts


@dataclass(frozen=True)
class Config:
    """B streams of the text, context of T characters; layers of NH heads, E numbers wide."""

    T: int = 256
    B: int = 16
    E: int = 128
    NH: int = 4
    layers: int = 4
    learning_rate: float = 2e-3
    clip_norm: float = 1.0
    seed: int = 0
    steps: int = 20
    prompt: int = 32  # characters that generation starts from


QUICK, FULL = Config(), Config(steps=200)


def run(full: bool, out: Path, progress: Callable[[float], None]) -> JobReport:
    """Train the three models side by side, generate with ours and with torch's attention."""
    config = FULL if full else QUICK
    train_text, held_out, vocabulary = lm.load_text(config.B)
    trainers = {
        OURS: Trainer(own_attention, config, vocabulary),
        "torch": Trainer(torch_attention, config, vocabulary),
        lm.TWIN: Trainer(torch_attention, config, vocabulary, one_rounding_off=True),
    }
    times = lm.train(trainers, train_text, config, lambda share: progress(0.9 * share))
    texts = (held_out, vocabulary)
    found = lm.report("translm", "character Transformer", config, trainers, times, texts, out)
    return with_generation(found, trainers[OURS].model, config, held_out[: config.prompt].T)


class Cache:
    """Keys and values of all layers, (B, NH, T, D) each, and how many of T are valid."""

    def __init__(self, config: Config, B: int):
        shape = config.layers, B, config.NH, config.T, config.E // config.NH
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.length = 0
        self.lengths = torch.zeros(B, dtype=torch.int64)

    def advance(self, L: int) -> None:
        """Make room for L positions, which every layer then appends."""
        self.length += L
        self.lengths += L

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Write the new positions of a layer. Returns its whole k and v."""
        new = slice(self.length - k.shape[2], self.length)
        self.k[layer, :, :, new], self.v[layer, :, :, new] = k, v
        return self.k[layer], self.v[layer]


def torch_attention(q, k, v, cache: Cache | None) -> torch.Tensor:
    """Causal; with a cache, L is 1, or the whole cache is new."""
    n = None if cache is None else cache.length
    causal = q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n], is_causal=causal)


def own_attention(q, k, v, cache: Cache | None) -> torch.Tensor:
    """Causal; with a cache, the queries are the last of its valid positions."""
    if cache is None:
        return fastseq.torch.attention(q, k, v, causal=True)
    return fastseq.torch.attention(q, k, v, causal="bottom_right", kv_lengths=cache.lengths)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config):
        super().__init__()
        E = config.E
        self.heads = config.NH, E // config.NH
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.project_in, self.project_out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.mlp = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E))

    def forward(self, x, layer: int, attend, cache: Cache | None):
        """(B, L, E) to the same."""
        q, k, v = self.project_in(self.norm1(x)).unflatten(2, (3, *self.heads)).unbind(2)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        x = x + self.project_out(attend(q, k, v, cache).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TransLM(nn.Module):
    """Embeddings of characters and positions, blocks, logits; `attend` may be exchanged."""

    def __init__(self, attend, config: Config, vocabulary: int):
        super().__init__()
        self.attend = attend
        self.embed = nn.Embedding(vocabulary, config.E)
        self.positions = nn.Parameter(0.02 * torch.randn(config.T, config.E))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.E)
        self.head = nn.Linear(config.E, vocabulary)

    def forward(self, x, cache: Cache | None = None):
        """Logits (B, L, V) of characters (B, L), which follow those in the cache."""
        start, L = 0 if cache is None else cache.length, x.shape[1]
        x = self.embed(x) + self.positions[start : start + L]
        if cache is not None:
            cache.advance(L)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, self.attend, cache)
        return self.head(self.norm(x))


class Trainer:
    """A model, its optimizer and the losses (nats) it has had."""

    def __init__(self, attend, config: Config, vocabulary: int, one_rounding_off: bool = False):
        torch.manual_seed(config.seed)
        self.config = config
        self.model = TransLM(attend, config, vocabulary)
        if one_rounding_off:
            lm.move_by_one_rounding(self.model, config.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), config.learning_rate)
        self.losses: list[float] = []

    def loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of a chunk (T, B)."""
        return F.cross_entropy(self.model(x.T).flatten(0, 1), target.T.flatten())

    def step(self, x: torch.Tensor, target: torch.Tensor, fresh: bool) -> float:
        """One chunk: forward, backward, clip, update. Returns its seconds."""
        start = time.perf_counter()
        loss = self.loss(x, target)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.losses.append(loss.item())
        return time.perf_counter() - start

    @torch.no_grad()
    def bits_per_character(self, text: torch.Tensor) -> float:
        """Mean over the held-out text, chunk by chunk."""
        losses = [self.loss(x, target) for x, target, _ in lm.chunks(text, self.config.T)]
        return float(torch.stack(losses).mean()) / math.log(2)


@torch.no_grad()
def generate(model: TransLM, config: Config, prompt: torch.Tensor) -> torch.Tensor:
    """The likeliest continuation of (B, prompt) up to the context: (B, T)."""
    cache = Cache(config, len(prompt))
    text, new = [prompt], prompt
    for _ in range(config.T - prompt.shape[1]):
        new = model(new, cache)[:, -1:].argmax(-1)
        text.append(new)
    return torch.cat(text, dim=1)


def with_generation(found: JobReport, model, config: Config, prompt: torch.Tensor) -> JobReport:
    """The report with two columns more: characters per second, and how many agree with torch's."""
    attends = {OURS: own_attention, "torch": torch_attention}
    times: measure.Times = {name: [] for name in attends}
    texts = {}
    for i in range(GENERATIONS):
        for name in attends if i % 2 == 0 else reversed(list(attends)):
            model.attend = attends[name]
            time.sleep(measure.REST_S)
            start = time.perf_counter()
            texts[name] = generate(model, config, prompt)
            times[name].append(time.perf_counter() - start)
    count = len(prompt) * (config.T - config.prompt)
    rates = {name: count / measure.median(seconds) for name, seconds in times.items()}
    same = {name: float((text == texts["torch"]).float().mean()) for name, text in texts.items()}
    cells = {name: (f"{rates[name]:.0f}/s", f"{same[name]:.1%}") for name in attends}
    return replace(
        found,
        columns=(*found.columns, "generated", "as torch"),
        rows=tuple((*row, *cells.get(row[0], ("-", "-"))) for row in found.rows),
        data=found.data | {"generation_s": times, "generated_as_torch": same},
    )
