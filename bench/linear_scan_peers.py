"""Contenders of the family "linear_scan"; see linear_scan.py for what each is."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import fastseq
import fastseq.torch

from .families import OURS, Contender
from .gate import Results
from .linear_scan import ALONE, LOOP, TORCH_LOOP, TRIAD, Array, Problem

MODULES = {"mingru": ("MinGRU", nn.GRU), "minlstm": ("MinLSTM", nn.LSTM)}
SEED = 20_241_002


def builders(problem: Problem, threads: int) -> dict[str, Callable[[], Contender]]:
    """All contenders of a case."""
    op = problem.case.op
    if op in MODULES:
        ours, theirs = MODULES[op]
        made = getattr(fastseq.torch.nn, ours)
        return {
            OURS: lambda: module(problem, made),
            "torch": lambda: module(problem, theirs, lambda dtype: _of(problem, theirs, dtype)),
        }
    return {
        OURS: lambda: scan(problem),
        LOOP: lambda: numpy_loop(problem, np.float32),
        TORCH_LOOP: lambda: torch_loop(problem),
        TRIAD: lambda: triad(problem),
        ALONE: lambda: on_one_thread(scan(problem), threads),
    }


def expected(problem: Problem, dtype: str) -> Results:
    """What the plain loop gives in `dtype`."""
    op = problem.case.op
    if op == "scan":
        return numpy_loop(problem, dtype).results()
    return _of(problem, _LOOPS[op], dtype)


def _named(h, grads) -> Results:
    return {"h": h} | dict(zip(("da", "db"), grads, strict=False))


def scan(problem: Problem) -> Contender:
    """fastseq.linear_scan, and with training its pullback."""
    a, b, dh = problem.a, problem.b, problem.dh

    def call():
        if not problem.case.training:
            return fastseq.linear_scan(a, b)[0], ()
        (h, _), pullback = fastseq.vjp(fastseq.linear_scan, a, b)
        return h, pullback((dh, None))[:2]

    return Contender(call, lambda: _named(*call()))


def on_one_thread(contender: Contender, threads: int) -> Contender:
    """The same, one thread set for each call."""

    def call():
        fastseq.set_num_threads(1)
        try:
            return contender.call()
        finally:
            fastseq.set_num_threads(threads)

    return Contender(call, contender.results)


def numpy_loop(problem: Problem, dtype) -> Contender:
    """Step by step over NumPy arrays."""
    a, b, dh = (x.astype(dtype) for x in (problem.a, problem.b, problem.dh))

    def call():
        h, state = np.empty_like(a), np.zeros_like(a[0])
        for t in range(len(a)):
            state = h[t] = a[t] * state + b[t]
        return h, (_loop_gradients(a, h, dh) if problem.case.training else ())

    return Contender(call, lambda: _named(*call()))


def _loop_gradients(a: Array, h: Array, dh: Array) -> tuple[Array, Array]:
    da, db, g = np.empty_like(a), np.empty_like(a), np.zeros_like(a[0])
    for t in reversed(range(len(a))):
        g = db[t] = dh[t] + g
        da[t] = g * h[t - 1] if t else 0
        g = a[t] * g
    return da, db


def torch_loop(problem: Problem) -> Contender:
    """Step by step over tensors, gradients by autograd."""
    a, b, dh = (torch.from_numpy(x) for x in (problem.a, problem.b, problem.dh))
    a, b = (x.requires_grad_(problem.case.training) for x in (a, b))

    def call():
        with torch.set_grad_enabled(problem.case.training):
            h = _states(a, b)
            return h, torch.autograd.grad(h, (a, b), dh) if problem.case.training else ()

    def results() -> Results:
        h, grads = call()
        return _named(h.detach().numpy(), [g.numpy() for g in grads])

    return Contender(call, results)


def _states(a, b):
    state, states = torch.zeros_like(a[0]), []
    for a_t, b_t in zip(a, b, strict=True):
        state = a_t * state + b_t
        states.append(state)
    return torch.stack(states)


def triad(problem: Problem) -> Contender:
    """h = a * b: two arrays read and one written, as a scan does."""
    a, b = torch.from_numpy(problem.a), torch.from_numpy(problem.b)
    h = torch.empty_like(a)

    def product(dtype: str) -> Results:
        return {"h": problem.a.astype(dtype) * problem.b.astype(dtype)}

    return Contender(
        lambda: torch.mul(a, b, out=h), lambda: {"h": torch.mul(a, b).numpy()}, product
    )


def module(problem: Problem, kind, expected=None, dtype=torch.float32) -> Contender:
    """A layer of C units on C inputs: inference under no_grad, or gradients of weights and x."""
    case = problem.case
    torch.manual_seed(SEED)
    layer = kind(case.C, case.C).to(dtype)
    x, dy = (torch.from_numpy(a).to(dtype) for a in (problem.b, problem.dh))
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x.requires_grad_(case.training)

    def call():
        with torch.set_grad_enabled(case.training):
            y = layer(x)[0]
            return y, torch.autograd.grad(y, (x, *parameters), dy) if case.training else ()

    def results() -> Results:
        y, grads = call()
        named = zip(("x", *names), grads, strict=False)
        return {"y": y.detach().numpy()} | {f"d{name}": g.numpy() for name, g in named}

    return Contender(call, results, expected)


def _of(problem: Problem, kind, dtype: str) -> Results:
    return module(problem, kind, dtype=getattr(torch, dtype)).results()


class _MinGRULoop(fastseq.torch.nn.MinGRU):
    """The same weights and gates as the equations have them, the scan a loop."""

    def forward(self, x):
        k, n = nn.functional.linear(x, self.weight_ih_l0, self.bias_ih_l0).chunk(2, dim=-1)
        z = k.sigmoid()
        return (_states(1 - z, z * n),)


class _MinLSTMLoop(fastseq.torch.nn.MinLSTM):
    """As _MinGRULoop."""

    def forward(self, x):
        f, i, n = nn.functional.linear(x, self.weight_ih_l0, self.bias_ih_l0).chunk(3, dim=-1)
        f, i = f.sigmoid(), i.sigmoid()
        return (_states(f / (f + i), i / (f + i) * n),)


_LOOPS = {"mingru": _MinGRULoop, "minlstm": _MinLSTMLoop}
