"""Random linear recurrences, minGRUs and minLSTMs, and two judges: the reference, and torch.

As in `problems.py`: a test solves a problem with the code under test and holds outputs and
gradients against `solve_reference` (float64), with the room that `solve_torch` leaves.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from problems import Drawn, Result, cast

from fastseq.reference import linear_scan as reference

FUNCTIONS = ("linear_scan", "min_gru", "min_lstm")
LETTERS = {"min_gru": "zh", "min_lstm": "fih"}  # of the projections, in the order of the arguments


@dataclass(frozen=True)
class ScanProblem(Drawn):
    """One call, its arrays drawn at random, always the same for the same fields.

    C: columns, or hidden units of I inputs. ragged: lengths 1, T, 0 and then random; resets: True
    for `resets` of the steps. decay: a is in 1 - decay * [0, 1), so that states last; 0: N(0, 1).
    """

    function: str = "linear_scan"
    T: int = 9
    B: int = 4
    C: int = 5
    dtype: str = "float64"
    I: int = 3  # noqa: E741
    bias: bool = True
    initial: bool = True
    ragged: bool = False
    resets: float = 0.0
    reverse: bool = False
    decay: float = 0.5

    def __str__(self):
        short = {"float64": "f64", "float32": "f32"}.get(self.dtype, self.dtype)
        flags = {
            "nobias": not self.bias,
            "zerostate": not self.initial,
            "ragged": self.ragged,
            "resets": self.resets,
            "reverse": self.reverse,
            f"decay{self.decay}": self.decay != 0.5,
        }
        size = f"{self.function}-T{self.T}-B{self.B}-C{self.C}-{short}"
        return "-".join([size, *(name for name, on in flags.items() if on)])

    @cached_property
    def inputs(self):
        """The differentiable arguments by name, in the order of the public function."""
        rng, sizes = self._rng("inputs"), (self.T, self.B)
        if self.function == "linear_scan":
            a = 1 - self.decay * rng.random((*sizes, self.C))
            if not self.decay:
                a = rng.standard_normal((*sizes, self.C))
            found = {"a": a, "b": rng.standard_normal((*sizes, self.C))}
        else:
            letters = LETTERS[self.function]
            found = {"x": rng.standard_normal((*sizes, self.I))}
            found |= {f"w_{c}": rng.standard_normal((self.C, self.I)) for c in letters}
            if self.bias:
                found |= {f"b_{c}": rng.standard_normal(self.C) for c in letters}
        if self.initial:
            found["h0"] = rng.standard_normal((self.B, self.C))
        return self._freeze(found)

    @cached_property
    def options(self):
        """The other keyword arguments."""
        rng = self._rng("options")
        options = {"reverse": self.reverse}
        if self.ragged:
            first = [min(1, self.T), self.T, 0]
            drawn = rng.integers(0, self.T + 1, self.B)
            options["lengths"] = np.array([*first, *drawn][: self.B], dtype=int)
        if self.resets:
            options["resets"] = rng.random((self.T, self.B)) < self.resets
        return options

    @cached_property
    def cotangents(self):
        """The gradients of the outputs: dh, dh_n."""
        rng, state = self._rng("cotangents"), (self.B, self.C)
        return self._freeze(
            {"dh": rng.standard_normal((self.T, *state)), "dh_n": rng.standard_normal(state)}
        )


def solve_reference(problem, dtype="float64"):
    """The reference's Result: outputs h, h_n, gradients as in ScanProblem.inputs."""
    inputs, cotangents = cast(problem.inputs, dtype), cast(problem.cotangents, dtype)
    h, h_n = getattr(reference, problem.function)(**inputs, **problem.options)
    vjp = getattr(reference, f"{problem.function}_vjp")
    grads = vjp(**inputs, **problem.options, **cotangents)
    return Result({"h": h, "h_n": h_n}, {name: grads[name] for name in inputs})


def solve_torch(problem, dtype=None):
    """torch's Result by autograd over a loop, in the problem's dtype unless given."""
    import torch

    dtype = dtype or problem.dtype
    leaves = {
        name: torch.tensor(a, requires_grad=True) for name, a in cast(problem.inputs, dtype).items()
    }
    cotangents = {name: torch.tensor(a) for name, a in cast(problem.cotangents, dtype).items()}
    h, h_n = torch_loop(*_torch_terms(problem.function, leaves), leaves.get("h0"), problem.options)
    loss = (cotangents["dh"] * h).sum() + (cotangents["dh_n"] * h_n).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return Result(
        {"h": h.detach().numpy(), "h_n": h_n.detach().numpy()},
        {name: a.numpy() for name, a in zip(leaves, grads, strict=True)},
    )


def _torch_terms(function, leaves):
    """a and b of the recurrence."""
    from torch.nn.functional import linear

    if function == "linear_scan":
        return leaves["a"], leaves["b"]
    *gates, n = (
        linear(leaves["x"], leaves[f"w_{c}"], leaves.get(f"b_{c}")) for c in LETTERS[function]
    )
    if function == "min_gru":
        z = gates[0].sigmoid()
        return 1 - z, z * n
    f, i = (gate.sigmoid() for gate in gates)
    return f / (f + i), i / (f + i) * n


def torch_loop(a, b, h0, options):
    """h, h_n step by step; rows past their length keep their state and give zeros."""
    import torch

    T, B, C = a.shape
    state = a.new_zeros(B, C) if h0 is None else h0
    lengths, resets = options.get("lengths"), options.get("resets")
    h = [None] * T
    for t in reversed(range(T)) if options["reverse"] else range(T):
        new = a[t] * state + b[t]
        if resets is not None:
            new = torch.where(torch.tensor(resets[t])[:, None], b[t], new)
        active = torch.tensor([True] * B if lengths is None else t < lengths)[:, None]
        state = torch.where(active, new, state)
        h[t] = torch.where(active, new, torch.zeros_like(new))
    return torch.stack(h) if T else a.new_zeros(a.shape), state
