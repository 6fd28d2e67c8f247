"""Functions of the scores as users write them, attention problems with them, and torch's judge."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from attention_problems import TORCH_MODS, AttentionProblem

import fastseq
from fastseq.cells import sigmoid

BEND = 0.3  # what a function reads from around it


@fastseq.score_mod
def distance(score, b, h, q_idx, kv_idx):
    return score - 0.1 * (h + 1) * np.sqrt((q_idx - kv_idx) ** 2 + BEND)


@fastseq.score_mod
def softcap(score, b, h, q_idx, kv_idx):
    return 2 * np.tanh(score / 2)


@fastseq.score_mod
def cosine(score, b, h, q_idx, kv_idx):
    return score * np.cos(0.1 * kv_idx + b) + np.sin(q_idx)


@fastseq.score_mod
def gated(score, b, h, q_idx, kv_idx):
    return np.exp(-0.1 * kv_idx) * sigmoid(score) * score


@fastseq.score_mod
def sliding(score, b, h, q_idx, kv_idx):
    near = (q_idx - kv_idx < 9) & (kv_idx <= q_idx + 2)
    return np.where(near, score, -np.inf)


@fastseq.score_mod
def documents(score, b, h, q_idx, kv_idx):
    return np.where((q_idx < 6) == (kv_idx < 6), score, -np.inf)


@fastseq.score_mod
def positions(score, b, h, q_idx, kv_idx):
    return -kv_idx / 8


@fastseq.score_mod
def same(score, b, h, q_idx, kv_idx):
    return score


# The same for tensors
def _gated(s, b, h, i, j):
    return (-0.1 * j).exp() * s.sigmoid() * s


def _sliding(s, b, h, i, j):
    return s.masked_fill(~((i - j < 9) & (j <= i + 2)), -float("inf"))


def _documents(s, b, h, i, j):
    return s.masked_fill((i < 6) != (j < 6), -float("inf"))


TORCH_MODS |= {
    distance: lambda s, b, h, i, j: s - 0.1 * (h + 1) * ((i - j) ** 2 + BEND).sqrt(),
    softcap: lambda s, b, h, i, j: 2 * (s / 2).tanh(),
    cosine: lambda s, b, h, i, j: s * (0.1 * j + b).cos() + i.sin(),
    gated: _gated,
    sliding: _sliding,
    documents: _documents,
    positions: lambda s, b, h, i, j: (-j / 8).expand(s.shape) + 0 * s,
    same: lambda s, b, h, i, j: s,
}
MODS = {mod.function.__name__: mod for mod in TORCH_MODS}


@dataclass(frozen=True)
class ScoreProblem(AttentionProblem):
    """An AttentionProblem with one of MODS."""

    mod: str = "distance"

    def __str__(self):
        return f"{self.mod}-{super().__str__()}"

    @cached_property
    def options(self):
        return super().options | {"score_mod": MODS[self.mod]}
