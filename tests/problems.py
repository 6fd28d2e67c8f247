"""Random recurrent problems, and two judges that solve them: the reference, and torch.

A test solves a `Problem` with the code under test and holds the outputs and gradients against
`solve_reference` (float64), with the room that `solve_torch` (the problem's dtype) leaves:

    ref, peer = solve_reference(problem), solve_torch(problem)
    assert_all_close(forward(fastseq, problem), ref.outputs, peer.outputs)

torch is imported on first use only.
"""

import warnings
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


class Result(NamedTuple):
    """Arrays by name. outputs: y, h_n, and for lstm c_n, c; grads: as in Problem.inputs."""

    outputs: dict
    grads: dict


class Drawn:
    """What the problems of every family share: arrays drawn from the name of a frozen dataclass."""

    def _rng(self, what):
        name = f"{replace(self, dtype='float64')} {what}"
        return np.random.default_rng(zlib.crc32(name.encode()))

    def _freeze(self, arrays):
        arrays = {name: a.astype(self.dtype) for name, a in arrays.items()}
        for a in arrays.values():
            a.flags.writeable = False
        return arrays

    def having(self, *, inputs=(), options=(), cotangents=()):
        """A copy with some of these replaced: {name: value}; a slice in time, a NaN, lengths."""
        copy = replace(self)
        copy.__dict__.update(
            inputs=self.inputs | dict(inputs),
            options=self.options | dict(options),
            cotangents=self.cotangents | dict(cotangents),
        )
        return copy


@dataclass(frozen=True)
class Problem(Drawn):
    """One layer in one direction, its arrays drawn at random, always the same for the same fields.

    bias, initial: whether b_ih, b_hh and h0, c0 are given; P > 0: an LSTM's projection; ragged:
    lengths 1, T, 0 and then random; resets: a mask, True for a quarter of the steps; clip:
    clip_recurrent_grad, of which 0.3 limits some elements and not others.
    The arrays are read-only and of the problem's dtype; a judge casts these same values to its own.
    """

    cell: str
    T: int = 7
    B: int = 3
    I: int = 5  # noqa: E741
    H: int = 4
    dtype: str = "float64"
    P: int = 0
    bias: bool = True
    initial: bool = True
    ragged: bool = False
    resets: bool = False
    reverse: bool = False
    clip: float | None = None

    def __str__(self):
        short = {"float64": "f64", "float32": "f32"}.get(self.dtype, self.dtype)
        size = f"{self.cell}-T{self.T}-B{self.B}-I{self.I}-H{self.H}"
        flags = {
            f"P{self.P}": self.P,
            "nobias": not self.bias,
            "zerostate": not self.initial,
            "ragged": self.ragged,
            "resets": self.resets,
            "reverse": self.reverse,
            f"clip{self.clip}": self.clip,
        }
        return "-".join([size, short, *(name for name, on in flags.items() if on)])

    @property
    def function(self):
        """The name of the public function: rnn, gru or lstm."""
        return self.cell.split("_")[0]

    @cached_property
    def inputs(self):
        """The differentiable arguments by name, in the order of the public function."""
        T, B, H, G = self.T, self.B, self.H, GATES[self.cell]
        R = self.P or H
        rng = self._rng("inputs")
        shapes = {"w_ih": (G * H, self.I), "w_hh": (G * H, R)}
        if self.bias:
            shapes |= {"b_ih": (G * H,), "b_hh": (G * H,)}
        if self.P:
            shapes["w_hr"] = (R, H)
        bound = max(H, 1) ** -0.5  # torch's initial values
        weights = {name: rng.uniform(-bound, bound, shape) for name, shape in shapes.items()}
        states = {}
        if self.initial:
            states["h0"] = rng.standard_normal((B, R))
        if self.initial and self.cell == "lstm":
            states["c0"] = rng.standard_normal((B, H))
        return self._freeze({"x": rng.standard_normal((T, B, self.I))} | weights | states)

    @cached_property
    def options(self):
        """The other keyword arguments of the public function."""
        rng = self._rng("options")
        options = {"reverse": self.reverse}
        if self.ragged:
            first = [min(1, self.T), self.T, 0]
            options["lengths"] = np.array(
                [*first, *rng.integers(0, self.T + 1, self.B)][: self.B], dtype=int
            )
        if self.resets:
            options["resets"] = rng.random((self.T, self.B)) < 0.25
        if self.clip:
            options["clip_recurrent_grad"] = self.clip
        if self.function == "rnn":
            options["nonlinearity"] = self.cell.removeprefix("rnn_")
        return options

    @cached_property
    def cotangents(self):
        """The gradients of the outputs: dy dh_n, and for lstm dc_n and dc."""
        T, B, H = self.T, self.B, self.H
        R = self.P or H
        shapes = {"dy": (T, B, R), "dh_n": (B, R)}
        if self.cell == "lstm":
            shapes |= {"dc_n": (B, H), "dc": (T, B, H)}
        rng = self._rng("cotangents")
        return self._freeze({name: rng.standard_normal(shape) for name, shape in shapes.items()})


def problems(cells=CELLS, **fields):
    """Pytest's mark that runs a test with `problem` = Problem(cell, **fields), for each cell."""
    import pytest

    return pytest.mark.parametrize("problem", [Problem(c, **fields) for c in cells], ids=str)


def cast(arrays, dtype):
    return {name: a.astype(dtype) for name, a in arrays.items()}


def forward(api, problem):
    """The outputs by name, from api.rnn, gru or lstm; api: fastseq, fastseq.torch, a reference."""
    function = getattr(api, problem.function)
    if problem.cell != "lstm":
        y, h_n = function(**problem.inputs, **problem.options)
        return {"y": y, "h_n": h_n}
    (y, c), (h_n, c_n) = function(**problem.inputs, **problem.options, return_cell_states=True)
    return {"y": y, "h_n": h_n, "c_n": c_n, "c": c}


def solve_reference(problem, dtype="float64"):
    """The reference's Result."""
    from fastseq.reference import recurrent as reference

    problem = problem.having(
        inputs=cast(problem.inputs, dtype), cotangents=cast(problem.cotangents, dtype)
    )
    vjp = getattr(reference, f"{problem.function}_vjp")
    grads = vjp(**problem.inputs, **problem.options, **problem.cotangents)
    return Result(forward(reference, problem), grads)


def solve_torch(problem, dtype=None):
    """torch's Result by autograd, in the problem's dtype unless given.

    The operators are those that torch.nn's modules call. They know no reverse, no lengths (unless
    packed), no resets and no cell states of every step: rows are flipped, cut and put together by
    hand here, the LSTM always in pieces of one step, as all are with clip_recurrent_grad.
    """
    import torch

    dtype = dtype or problem.dtype
    inputs = cast(problem.inputs, dtype)
    leaves = {name: torch.tensor(a, requires_grad=True) for name, a in inputs.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        outputs = _torch_outputs(problem, leaves)
        cotangents = {name: torch.tensor(a) for name, a in cast(problem.cotangents, dtype).items()}
        loss = sum((cotangents[f"d{name}"] * a).sum() for name, a in outputs.items())
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return Result(
        {name: a.detach().numpy() for name, a in outputs.items()},
        {name: a.numpy() for name, a in zip(leaves, grads, strict=True)},
    )


def _torch_outputs(problem, leaves):
    """The outputs as tensors: the rows apart where lengths or resets tell them apart."""
    import torch

    T, B, _ = leaves["x"].shape
    lengths, resets = problem.options.get("lengths"), problem.options.get("resets")
    apart = B > 0 and (lengths is not None or resets is not None)
    lengths = np.full(B, T) if lengths is None else lengths
    resets = np.zeros((T, B), bool) if resets is None else resets
    groups = [slice(b, b + 1) for b in range(B)] if apart else [slice(0, B)]
    results = []
    for rows in groups:
        length = int(lengths[rows.start]) if apart else T
        reset = resets[:length, rows].any(axis=1)
        results.append(_torch_rows(problem, leaves, rows, length, reset))
    return {name: torch.cat([r[name] for r in results], dim=-2) for name in results[0]}


def _limited(state, clip):
    """The state as the next step takes it, whose gradient is limited on the way back."""
    if clip is None:
        return state
    state = state.view_as(state)
    state.register_hook(lambda d: d.clamp(-clip, clip))
    return state


def _torch_rows(problem, leaves, rows, length, reset):
    """The outputs of n rows of the same length and resets: y, c (T, n, .), h_n, c_n (n, .)."""
    import torch

    lstm = problem.cell == "lstm"
    weights = [leaves[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if k in leaves]
    settings = {"has_biases": "b_ih" in leaves, "num_layers": 1, "dropout": 0.0, "train": True}
    settings |= {"bidirectional": False, "batch_first": False}
    T, x = len(leaves["x"]), leaves["x"][:length, rows]
    sizes = {"h0": problem.P or problem.H} | ({"c0": problem.H} if lstm else {})
    state = [
        leaves[name][rows] if name in leaves else x.new_zeros(x.shape[1], size)
        for name, size in sizes.items()
    ]
    if problem.options["reverse"]:
        x, reset = x.flip(0), reset[::-1]
    pieces = [[x.new_zeros(0, *s.shape)] for s in state]  # of y, and of c
    clip = problem.options.get("clip_recurrent_grad")
    starts = [t for t in range(length) if lstm or clip or t == 0 or reset[t]]
    for start, stop in pairwise([*starts, length]):
        hx = [(torch.zeros_like(s) if reset[start] else _limited(s, clip))[None] for s in state]
        y, *hx = getattr(torch, problem.cell)(
            x[start:stop], hx if lstm else hx[0], params=weights, **settings
        )
        state = [s[0] for s in hx]
        for piece, new in zip(pieces, [y, *hx[1:]], strict=True):
            piece.append(new)
    scans = [torch.cat(piece) for piece in pieces]
    if problem.options["reverse"]:
        scans = [s.flip(0) for s in scans]
    padded = [torch.cat([s, s.new_zeros(T - length, *s.shape[1:])]) for s in scans]
    names = ("y", "c", "h_n", "c_n") if lstm else ("y", "h_n")
    return dict(zip(names, [*padded, *state], strict=True))
