"""The end-to-end job of the family "attention": a decoder-only Transformer on English characters.

Trained with torch's scaled_dot_product_attention and with fastseq.torch.attention; everything else
is torch's in both. lm.py says on what text and how the two are compared. Then the trained model
continues held-out text, one character at a time from a cache of keys and values: torch's in plain
tensors, of which it reads the valid part, fastseq's in its KVCache.
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


def torch_attention(q, k, v) -> torch.Tensor:
    """Causal, of whole sequences."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def own_attention(q, k, v) -> torch.Tensor:
    """The same."""
    return fastseq.torch.attention(q, k, v, causal=True)


class TorchCache:
    """Keys and values of a layer, (B, NH, T, D), of which the first `length` are valid."""

    def __init__(self, config: Config, B: int):
        shape = B, config.NH, config.T, config.E // config.NH
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.length = 0

    def attend(self, q, k, v) -> torch.Tensor:
        """Append k and v, and attend to all that is valid; only an empty cache takes several."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        k, v = self.k[:, :, : self.length], self.v[:, :, : self.length]
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


class OwnCache:
    """The same by fastseq.torch.KVCache."""

    def __init__(self, config: Config, B: int):
        self.held = fastseq.torch.KVCache(B, config.NH, config.T, config.E // config.NH)

    def attend(self, q, k, v) -> torch.Tensor:
        """Append k and v, and attend to all that is valid."""
        held = self.held
        held.append(k, v)
        return fastseq.torch.attention(
            q, held.k, held.v, causal="bottom_right", kv_lengths=held.lengths
        )


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config):
        super().__init__()
        E = config.E
        self.heads = config.NH, E // config.NH
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.project_in, self.project_out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.mlp = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E))

    def forward(self, x, attend):
        """(B, L, E) to the same."""
        q, k, v = self.project_in(self.norm1(x)).unflatten(2, (3, *self.heads)).unbind(2)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        x = x + self.project_out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TransLM(nn.Module):
    """Embeddings of characters and positions, blocks, logits; `attend` is used for training."""

    def __init__(self, attend, config: Config, vocabulary: int):
        super().__init__()
        self.attend = attend
        self.embed = nn.Embedding(vocabulary, config.E)
        self.positions = nn.Parameter(0.02 * torch.randn(config.T, config.E))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.E)
        self.head = nn.Linear(config.E, vocabulary)

    def forward(self, x, start: int = 0, caches=None):
        """Logits (B, L, V) of characters (B, L), which follow the `start` ones in the caches."""
        x = self.embed(x) + self.positions[start : start + x.shape[1]]
        for layer, block in enumerate(self.blocks):
            x = block(x, self.attend if caches is None else caches[layer].attend)
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
def generate(model: TransLM, config: Config, prompt: torch.Tensor, new_cache) -> torch.Tensor:
    """The likeliest continuation of (B, prompt) up to the context: (B, T)."""
    caches = [new_cache(config, len(prompt)) for _ in model.blocks]
    new, text, start = prompt, [prompt], 0
    for _ in range(config.T - prompt.shape[1]):
        length = new.shape[1]
        new = model(new, start, caches)[:, -1:].argmax(-1)
        start += length
        text.append(new)
    return torch.cat(text, dim=1)


def with_generation(found: JobReport, model, config: Config, prompt: torch.Tensor) -> JobReport:
    """The report with two columns more: characters per second, and how many agree with torch's."""
    caches = {OURS: OwnCache, "torch": TorchCache}
    times: measure.Times = {name: [] for name in caches}
    texts = {}
    for i in range(GENERATIONS):
        for name in caches if i % 2 == 0 else reversed(list(caches)):
            time.sleep(measure.REST_S)
            start = time.perf_counter()
            texts[name] = generate(model, config, prompt, caches[name])
            times[name].append(time.perf_counter() - start)
    count = len(prompt) * (config.T - config.prompt)
    rates = {name: count / measure.median(seconds) for name, seconds in times.items()}
    same = {name: float((text == texts["torch"]).float().mean()) for name, text in texts.items()}
    cells = {name: (f"{rates[name]:.0f}/s", f"{same[name]:.1%}") for name in caches}
    return replace(
        found,
        columns=(*found.columns, "generated", "as torch"),
        rows=tuple((*row, *cells.get(row[0], ("-", "-"))) for row in found.rows),
        data=found.data | {"generation_s": times, "generated_as_torch": same},
    )
