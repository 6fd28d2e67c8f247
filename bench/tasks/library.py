"""The two libraries that every task is trained with: the same names, fastseq's and torch's own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq.torch

from ..families import OURS


class LoopMinGRU(fastseq.torch.nn.MinGRU):
    """MinGRU in plain torch, which has none: the same weights, the recurrence a Python loop."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, B, I) to the states (T, B, H) of the last layer, and the last state of all layers."""
        last = []
        for layer in range(self.num_layers):
            weight, bias = (getattr(self, f"{kind}_ih_l{layer}") for kind in ("weight", "bias"))
            k, n = F.linear(x, weight, bias).chunk(2, dim=-1)
            z = k.sigmoid()
            h, states = torch.zeros_like(n[0]), []
            for a_t, b_t in zip(1 - z, z * n, strict=True):
                h = a_t * h + b_t
                states.append(h)
            x = torch.stack(states)
            last.append(h)
        return x, torch.stack(last)


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, lengths: Tensor | None = None
) -> Tensor:
    """(B, NH, L, D) to the same; of the keys of a sequence the first `lengths` (B,) count."""
    mask = None
    if lengths is not None:
        mask = (torch.arange(k.shape[2]) < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def own_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, lengths: Tensor | None = None
) -> Tensor:
    """The same."""
    return fastseq.torch.attention(q, k, v, causal=causal, kv_lengths=lengths)


def torch_rotary(x: Tensor) -> Tensor:
    """Rotary positions of (B, NH, L, D) in plain torch: the two halves of D are the pairs."""
    L, D = x.shape[-2:]
    wave = 10000.0 ** (-torch.arange(0, D, 2) / D)
    angle = torch.arange(L).unsqueeze(1) * wave
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


@dataclass(frozen=True)
class Library:
    """What a task's model is made of, and what clips its gradients."""

    name: str
    RNN: type[nn.Module]
    GRU: type[nn.Module]
    LSTM: type[nn.Module]
    MinGRU: type[nn.Module]
    attention: Callable[..., Tensor]
    rotary: Callable[[Tensor], Tensor]
    clip_grad_norm_: Callable[..., Tensor]


OWN = Library(
    OURS,
    fastseq.torch.nn.RNN,
    fastseq.torch.nn.GRU,
    fastseq.torch.nn.LSTM,
    fastseq.torch.nn.MinGRU,
    own_attention,
    fastseq.torch.rotary,
    fastseq.torch.clip_grad_norm_,
)
TORCH = Library(
    "torch",
    nn.RNN,
    nn.GRU,
    nn.LSTM,
    LoopMinGRU,
    torch_attention,
    torch_rotary,
    nn.utils.clip_grad_norm_,
)
