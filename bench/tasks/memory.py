"""What the two long-term tasks share: six models side by side, and what initial values they need.

Initial values are the literature's for long memory, in both libraries alike:
    IRNN    W_hh = I, biases 0                              Le, Jaitly & Hinton, arXiv:1504.00941
    LSTM    forget bias log(U(1, T)), input bias minus it   Tallec & Ollivier, arXiv:1804.11188
    MinGRU  update bias minus log(U(1, T)), the same idea   MinGRU: Feng et al., arXiv:2410.01201
The tanh RNN and the GRU start as torch starts them. MinGRU's peer is a Python loop (library.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastseq.torch

from .blocks import SelfAttention, Shape
from .library import Library

RNN, IRNN, GRU, LSTM = "tanh RNN", "IRNN", "GRU", "LSTM"
MIN_GRU, ATTENTION = "MinGRU", "self-attention"
KINDS = (RNN, IRNN, GRU, LSTM, MIN_GRU, ATTENTION)


@dataclass(frozen=True)
class Sizes:
    """Of a model: inputs, outputs, units, and the T steps that it is to remember over."""

    inputs: int
    outputs: int
    H: int
    T: int
    attention: Shape


class Model(nn.Module):
    """Inputs (T, B, ·) through one of KINDS to outputs (T, B, ·)."""

    def __init__(self, kind: str, sizes: Sizes, library: Library):
        super().__init__()
        make = {MIN_GRU: _min_gru, IRNN: _irnn, LSTM: _lstm, ATTENTION: _attention}
        plain = {RNN: library.RNN, GRU: library.GRU}
        if kind in plain:
            self.body = plain[kind](sizes.inputs, sizes.H)
        else:
            self.body = make[kind](library, sizes)
        width = sizes.attention.E if kind == ATTENTION else sizes.H
        self.head = nn.Linear(width, sizes.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, inputs) to (T, B, outputs)."""
        y = self.body(x)
        return self.head(y[0] if isinstance(y, tuple) else y)


def _irnn(library: Library, sizes: Sizes) -> nn.Module:
    body = library.RNN(sizes.inputs, sizes.H, nonlinearity="relu")
    fastseq.torch.init.identity(body)
    return body


def _lstm(library: Library, sizes: Sizes) -> nn.Module:
    body = library.LSTM(sizes.inputs, sizes.H)
    H, spans = sizes.H, _spans(sizes)
    with torch.no_grad():  # gates i|f|g|o
        body.bias_hh_l0.zero_()
        body.bias_ih_l0[:H], body.bias_ih_l0[H : 2 * H] = -spans, spans
    return body


def _min_gru(library: Library, sizes: Sizes) -> nn.Module:
    body = library.MinGRU(sizes.inputs, sizes.H)
    with torch.no_grad():  # gates z|n
        body.bias_ih_l0[: sizes.H] = -_spans(sizes)
    return body


def _spans(sizes: Sizes) -> Tensor:
    """log U(1, T - 1) for every unit: a gate of that logit forgets after so many steps."""
    return torch.empty(sizes.H).uniform_(1, sizes.T - 1).log()


def _attention(library: Library, sizes: Sizes) -> nn.Module:
    embed = nn.Linear(sizes.inputs, sizes.attention.E)
    return nn.Sequential(embed, SelfAttention(library, sizes.attention))
