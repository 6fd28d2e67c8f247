"""Contenders of the family "cells": a cell as a module, a built-in layer, a torch loop."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import fastseq
import fastseq.torch
from fastseq import cells

from .cells import BUILT_IN, GATES, LOOP, NORMALISED
from .families import OURS, Contender
from .gate import Results
from .recurrent import Problem
from .recurrent_torch import inference_of, training_of


@fastseq.cell
def lstm(i, f, g, o, c):
    """The built-in LSTM once more."""
    c_new = cells.sigmoid(f) * c + cells.sigmoid(i) * np.tanh(g)
    return cells.sigmoid(o) * np.tanh(c_new), c_new


CELLS = {"lstm": lstm} | {name: getattr(cells, name) for name in GATES if name != "lstm"}
State = tuple[Tensor, Tensor]


def _lstm(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor, _: Tensor | None) -> State:
    i, f, g, o = (gx + gh).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _peephole(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor, params: Tensor) -> State:
    i, f, g, o = (gx + gh).chunk(4, 1)
    p_i, p_f, p_o = params
    c_new = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
    return (o + p_o * c_new).sigmoid() * c_new.tanh(), c_new


def _cifg(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor, _: Tensor | None) -> State:
    f, g, o = (gx + gh).chunk(3, 1)
    f = f.sigmoid()
    c = f * c + (1 - f) * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _light(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor, _: Tensor | None) -> State:
    z, a = (gx + gh).chunk(2, 1)
    z = z.sigmoid()
    return z * h + (1 - z) * a.relu(), c


def _ind(a: Tensor, _: None, h: Tensor, c: Tensor, params: Tensor) -> State:
    return (a + params[0] * h).relu(), c


def _normed(a: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.flatten()
    return nn.functional.layer_norm(a, a.shape[-1:], gain.flatten(), bias)


def _layer_norm_lstm(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor, params: Tensor) -> State:
    i, f, g, o = (gx + _normed(gh, params[4:8])).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * _normed(c, params[8], params[13]).tanh(), c


def _layer_norm_gru(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor, params: Tensor) -> State:
    (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, 1), _normed(gh, params[3:6]).chunk(3, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * (hn + params[9])).tanh()
    return (1 - z) * n + z * h, c


STEPS = {
    "lstm": _lstm,
    "peephole_lstm": _peephole,
    "cifg_lstm": _cifg,
    "light_gru": _light,
    "ind_rnn": _ind,
    "layer_norm_lstm": _layer_norm_lstm,
    "layer_norm_gru": _layer_norm_gru,
}
# of W_ih x of all steps at once: rows of gains and of biases
INPUT_NORMS = {
    "layer_norm_lstm": (slice(4), slice(9, 13)),
    "layer_norm_gru": (slice(3), slice(6, 9)),
}


class Loop(nn.Module):
    """The layer as one writes it in torch: one product for all inputs, then step by step."""

    def __init__(self, layer: fastseq.torch.nn.Recurrent, kind: str):
        super().__init__()
        self.step, self.gates, self.has_c = STEPS[kind], GATES[kind], layer.cell.has_c
        self.input_norm = INPUT_NORMS.get(kind)
        for name, value in layer.state_dict().items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> tuple:
        """y, and the last states."""
        names = ("params_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        params, w_hh, b_ih, b_hh = (getattr(self, name, None) for name in names)
        inputs = nn.functional.linear(x, self.weight_ih_l0, b_ih)
        if self.input_norm is not None:
            inputs = _normed(inputs, *(params[rows] for rows in self.input_norm))
        h = c = x.new_zeros(x.shape[1], len(self.weight_ih_l0) // self.gates)
        y = []
        for gx in inputs:
            gh = None if w_hh is None else nn.functional.linear(h, w_hh, b_hh)
            h, c = self.step(gx, gh, h, c, params)
            y.append(h)
        return torch.stack(y), (h[None], c[None]) if self.has_c else h[None]


def layer(problem: Problem) -> fastseq.torch.nn.Recurrent:
    """The cell as a module; the kind seeds its weights.

    A normalisation's gains are 0.1 (Cooijmans et al., arXiv:1603.09025, section 4): with gains of 1
    a random cell is chaotic, and over 100 steps rounding grows a hundredfold, in torch as here.
    """
    case = problem.case
    torch.manual_seed(GATES[case.kind])
    if case.kind not in NORMALISED:
        return fastseq.torch.nn.Recurrent(CELLS[case.kind], case.H, case.H)
    made = fastseq.torch.nn.Recurrent(CELLS[case.kind], case.H, case.H, bias=False)
    with torch.no_grad():
        made.params_l0 *= 0.1
    return made


def builder(who: str, problem: Problem) -> Callable[[], Contender]:
    """How to build a contender."""
    case = problem.case
    of = training_of if case.training else inference_of
    if who == OURS:
        return lambda: of(layer(problem), problem)
    if who == LOOP:
        return lambda: of(Loop(layer(problem), case.kind), problem)
    return partial(_built_in, {name: k for k, name in BUILT_IN.items()}[who], of, problem)


def _built_in(gates: int, of: Callable, problem: Problem) -> Contender:
    """A layer with the same products; what it must give is what torch's gives."""
    H, name = problem.case.H, {4: "LSTM", 3: "GRU"}[gates]
    torch.manual_seed(0)
    theirs = getattr(nn, name)(H, H)
    ours = getattr(fastseq.torch.nn, name)(H, H)
    ours.load_state_dict(theirs.state_dict())

    def expected(dtype: str) -> Results:
        kind = getattr(torch, dtype)
        return of(theirs.to(kind), problem.sliced(), kind).results()

    made = of(ours, problem)
    return Contender(made.call, made.results, expected)


def expected(problem: Problem, dtype: str) -> Results:
    """What the loop gives in `dtype` for the batch rows that the gate compares."""
    kind = getattr(torch, dtype)
    of = training_of if problem.case.training else inference_of
    loop = Loop(layer(problem), problem.case.kind).to(kind)
    return of(loop, problem.sliced(), kind).results()
