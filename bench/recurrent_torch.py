"""Contenders of the family "rnn" in torch: torch.nn, and fastseq behind the same interface.

`namespace` is torch.nn or fastseq.torch.nn: a comparison runs the same lines for both.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastseq
import fastseq.torch.nn

from .families import OURS, Contender
from .gate import Results
from .recurrent import Case, Problem

MODULES = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}

Builders = dict[str, Callable[[], Contender]]


def builders(problem: Problem) -> Builders:
    """Ours, and beside it torch, or ours on the full batch where the row is about lengths."""
    ours = fastseq.torch.nn
    job = problem.case.job
    if job in ("ragged", "ragged_train"):
        build = numpy_inference if job == "ragged" else partial(training, ours)
        full = problem.padded()
        return {
            OURS: lambda: build(problem),
            f"{OURS} full": lambda: replace(build(full), expected=partial(expected, full)),
        }
    if job == "numpy_call":
        return {OURS: lambda: numpy_inference(problem), "torch": lambda: inference(nn, problem)}
    special = {"train": training, "packed": training, "step": streaming, "cell": streaming_cell}
    build = special.get(job, inference)
    return {OURS: lambda: build(ours, problem), "torch": lambda: build(nn, problem)}


def expected(problem: Problem, dtype: str) -> Results:
    """What torch.nn computes in `dtype` for the batch rows that the gate compares."""
    build = training if problem.case.training else inference
    return build(nn, problem.sliced(), getattr(torch, dtype)).results()


def module(namespace, case: Case, weights, dtype=torch.float32) -> nn.Module:
    """The layer of a case with the problem's weights."""
    made = getattr(namespace, MODULES[case.kind])(
        case.H,
        case.H,
        num_layers=case.layers,
        bidirectional=case.bidirectional,
        dtype=dtype,
        **options(case),
    )
    return load(made, weights)


def options(case: Case) -> dict[str, object]:
    """The keyword arguments that tell the two kinds of RNN apart."""
    return {"nonlinearity": "relu"} if case.kind == "rnn_relu" else {}


def load(made: nn.Module, weights) -> nn.Module:
    """Copy NumPy weights into the parameters, in their order."""
    with torch.no_grad():
        for parameter, weight in zip(made.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(weight))
    return made


def outputs(y: torch.Tensor, state, rows: list[int]) -> dict[str, np.ndarray]:
    """y, h_n and c_n of some batch rows."""
    state = state if isinstance(state, tuple) else (state,)
    named = dict(zip(("h_n", "c_n"), state, strict=False), y=y)
    return {name: value.detach()[:, rows].numpy() for name, value in named.items()}


def inference(namespace, problem: Problem, dtype=torch.float32) -> Contender:
    """The layer under no_grad."""
    return inference_of(module(namespace, problem.case, problem.weights, dtype), problem, dtype)


def inference_of(layer: nn.Module, problem: Problem, dtype=torch.float32) -> Contender:
    """Any layer under no_grad."""
    layer = layer.eval()
    batch = Batch(problem, dtype)

    def call():
        with torch.no_grad():
            return layer(batch.wrap(batch.leaf))

    def results() -> Results:
        y, state = call()
        return outputs(batch.unwrap(y), state, problem.rows)

    return Contender(call, results)


def training(namespace, problem: Problem, dtype=torch.float32) -> Contender:
    """Forward, then gradients of every weight and of x."""
    return training_of(module(namespace, problem.case, problem.weights, dtype), problem, dtype)


def training_of(layer: nn.Module, problem: Problem, dtype=torch.float32) -> Contender:
    """Forward and backward of any layer."""
    batch = Batch(problem, dtype)
    leaf = batch.leaf.requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    dy = batch.data(problem.dy)

    def run(dy: torch.Tensor):
        y, state = layer(batch.wrap(leaf))
        flat = y.data if isinstance(y, PackedSequence) else y
        return y, state, torch.autograd.grad(flat, (leaf, *parameters), dy)

    def results() -> Results:
        y, state, (dx, *dweights) = run(batch.data(problem.gate_dy))
        found = outputs(batch.unwrap(y), state, problem.rows)
        found["dx"] = batch.unwrap(batch.wrap(dx))[:, problem.rows].numpy()
        return found | {f"d{name}": dw.numpy() for name, dw in zip(names, dweights, strict=True)}

    return Contender(lambda: run(dy), results)


class Batch:
    """The input of a layer: a tensor, or a PackedSequence where the problem has lengths."""

    def __init__(self, problem: Problem, dtype: torch.dtype):
        self.lengths = problem.lengths
        self.steps = problem.x.shape[0]
        self.dtype = dtype
        self.leaf = self.data(problem.x)

    def data(self, padded: np.ndarray) -> torch.Tensor:
        """The elements as the layer sees them: all, or the valid ones packed."""
        values = torch.from_numpy(padded).to(self.dtype)
        if self.lengths is None:
            return values
        packed = pack_padded_sequence(values, torch.from_numpy(self.lengths))
        self.batch_sizes = packed.batch_sizes
        return packed.data

    def wrap(self, data: torch.Tensor) -> torch.Tensor | PackedSequence:
        """What the layer takes."""
        return data if self.lengths is None else PackedSequence(data, self.batch_sizes)

    def unwrap(self, y: torch.Tensor | PackedSequence) -> torch.Tensor:
        """Back to (T, B, ...), zeros past the end."""
        if isinstance(y, PackedSequence):
            y, _ = pad_packed_sequence(y, total_length=self.steps)
        return y


def streaming(namespace, problem: Problem) -> Contender:
    """The layer on one step after the other, its state carried."""
    layer = module(namespace, problem.case, problem.weights).eval()
    steps = torch.from_numpy(problem.x).split(1)
    return stream(layer, steps, lambda found: found[1], lambda found: found[0])


def streaming_cell(namespace, problem: Problem) -> Contender:
    """The *Cell module on one step after the other, its state carried."""
    case = problem.case
    cell = getattr(namespace, MODULES[case.kind] + "Cell")(case.H, case.H, **options(case))
    steps = torch.from_numpy(problem.x).unbind()
    hidden = (lambda state: state[0]) if case.kind == "lstm" else (lambda state: state)
    made = stream(load(cell, problem.weights).eval(), steps, lambda state: state, hidden)

    def results() -> Results:
        found = made.results()
        y = found["y"].reshape(problem.x.shape)
        return {"y": y} | {key: found[key][None] for key in found if key != "y"}

    return Contender(made.call, results)


def stream(layer, steps, state_of, y_of) -> Contender:
    """One call is one step from the state that the last call left."""
    carried = None
    first = steps[0]

    def call() -> None:
        nonlocal carried
        with torch.no_grad():
            carried = state_of(layer(first, carried))

    def results() -> Results:
        state, ys = None, []
        with torch.no_grad():
            for x in steps:
                found = layer(x, state)
                state = state_of(found)
                ys.append(y_of(found))
        named = zip(("h_n", "c_n"), state if isinstance(state, tuple) else (state,), strict=False)
        return {name: value.numpy() for name, value in named} | {"y": torch.cat(ys).numpy()}

    return Contender(call, results)


def numpy_inference(problem: Problem) -> Contender:
    """The NumPy function, with lengths where the problem has them."""
    kind = problem.case.kind
    keywords = options(problem.case)
    if problem.lengths is not None:
        keywords["lengths"] = problem.lengths
    function = getattr(fastseq, kind.partition("_")[0])

    def call():
        return function(problem.x, *problem.weights, **keywords)

    def results() -> Results:
        y, state = call()
        state = state if isinstance(state, tuple) else (state,)
        found = dict(zip(("h_n", "c_n"), (s[None] for s in state), strict=False), y=y)
        return {name: value[:, problem.rows] for name, value in found.items()}

    return Contender(call, results)
