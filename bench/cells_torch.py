"""Contenders of the family "cells": a user's cell as a module, a built-in layer, a torch loop."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import fastseq
import fastseq.torch
from fastseq import cells

from .cells import BUILT_IN, GATES, LOOP
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


def _lstm(a: Tensor, h: Tensor, c: Tensor, _: Tensor | None) -> State:
    i, f, g, o = a.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _peephole(a: Tensor, h: Tensor, c: Tensor, params: Tensor) -> State:
    i, f, g, o = a.chunk(4, 1)
    p_i, p_f, p_o = params
    c_new = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
    return (o + p_o * c_new).sigmoid() * c_new.tanh(), c_new


def _cifg(a: Tensor, h: Tensor, c: Tensor, _: Tensor | None) -> State:
    f, g, o = a.chunk(3, 1)
    f = f.sigmoid()
    c = f * c + (1 - f) * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _light(a: Tensor, h: Tensor, c: Tensor, _: Tensor | None) -> State:
    z, a = a.chunk(2, 1)
    z = z.sigmoid()
    return z * h + (1 - z) * a.relu(), c


def _ind(a: Tensor, h: Tensor, c: Tensor, params: Tensor) -> State:
    return (a + params[0] * h).relu(), c


STEPS = {
    "lstm": _lstm,
    "peephole_lstm": _peephole,
    "cifg_lstm": _cifg,
    "light_gru": _light,
    "ind_rnn": _ind,
}


class Loop(nn.Module):
    """The layer as one writes it in torch: one product for all inputs, then step by step."""

    def __init__(self, layer: fastseq.torch.nn.Recurrent, kind: str):
        super().__init__()
        self.step, self.gates, self.has_c = STEPS[kind], GATES[kind], layer.cell.has_c
        for name, value in layer.state_dict().items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> tuple:
        """y, and the last states."""
        params, w_hh = (getattr(self, n, None) for n in ("params_l0", "weight_hh_l0"))
        inputs = nn.functional.linear(x, self.weight_ih_l0, self.bias_ih_l0)
        H = len(self.weight_ih_l0) // self.gates
        h = c = x.new_zeros(x.shape[1], H)
        y = []
        for a in inputs:
            if w_hh is not None:
                a = a + nn.functional.linear(h, w_hh, self.bias_hh_l0)
            h, c = self.step(a, h, c, params)
            y.append(h)
        return torch.stack(y), (h[None], c[None]) if self.has_c else h[None]


def layer(problem: Problem) -> fastseq.torch.nn.Recurrent:
    """The user's cell as a module; the kind seeds its weights."""
    case = problem.case
    torch.manual_seed(GATES[case.kind])
    return fastseq.torch.nn.Recurrent(CELLS[case.kind], case.H, case.H)


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
