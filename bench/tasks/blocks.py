"""Self-attention as the tasks use it: a few Transformer blocks, with and without positions."""

from dataclasses import dataclass

from torch import Tensor, nn

import fastseq.torch

from ..translm import Block
from .library import Library

POSITIONS = ("none", "sinusoidal", "rotary")


@dataclass(frozen=True)
class Shape:
    """Blocks of NH heads, E numbers wide, for sequences of at most T steps."""

    E: int
    NH: int
    layers: int
    T: int
    causal: bool = False
    positions: str = "sinusoidal"  # added to the input; "rotary" turns queries and keys


class SelfAttention(nn.Module):
    """Time-major as the recurrent layers: (T, B, E) to the same."""

    def __init__(self, library: Library, shape: Shape):
        super().__init__()
        if shape.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {shape.positions!r}")
        self.library, self.shape = library, shape
        self.register_buffer("table", fastseq.torch.sinusoidal_positions(shape.T, shape.E))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.E)

    def forward(self, x: Tensor) -> Tensor:
        """All blocks, then a last norm."""
        x = x.transpose(0, 1)
        if self.shape.positions == "sinusoidal":
            x = x + self.table[: x.shape[1]]
        for block in self.blocks:
            x = block(x, self._attend)
        return self.norm(x).transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.shape.positions == "rotary":
            q, k = self.library.rotary(q), self.library.rotary(k)
        return self.library.attention(q, k, v, causal=self.shape.causal)
