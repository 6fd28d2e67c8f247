"""Random problems for cells that users write, and two judges: the reference, and torch.

REWRITTEN   the built-in cells once more: judged as the built-in ones, by problems.py
READY       those of fastseq.cells: judged by reference/user_cells.py, and by torch's autograd
            over the equations written for tensors here
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from problems import Drawn, Result, cast

import fastseq
from fastseq import cell, cells
from fastseq.cells import relu, sigmoid


@cell
def rnn_tanh(a):
    return np.tanh(a)


@cell
def rnn_relu(a):
    return relu(a)


@cell(split=("xn", "hn"))
def gru(r, z, xn, hn, h):
    r, z = sigmoid(r), sigmoid(z)
    n = np.tanh(xn + r * hn)
    return (1 - z) * n + z * h


@cell
def lstm(i, f, g, o, c):
    c_new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c_new), c_new


INPUTS = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "params", "h0", "c0")
REWRITTEN = {"rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu, "gru": gru, "lstm": lstm}


def _peephole(gx, gh, h, c, params):
    i, f, g, o = (gx + gh).chunk(4)
    p_i, p_f, p_o = params
    c_new = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
    return (o + p_o * c_new).sigmoid() * c_new.tanh(), c_new


def _cifg(gx, gh, h, c, params):
    f, g, o = (gx + gh).chunk(3)
    c_new = f.sigmoid() * c + (1 - f.sigmoid()) * g.tanh()
    return o.sigmoid() * c_new.tanh(), c_new


def _light(gx, gh, h, c, params):
    z, a = (gx + gh).chunk(2)
    return z.sigmoid() * h + (1 - z.sigmoid()) * a.relu(), c


def _ind(gx, gh, h, c, params):
    return (gx + gh + params[0] * h).relu(), c


def _normed(a):
    from torch.nn.functional import layer_norm

    return layer_norm(a, a.shape)


def _layer_norm_lstm(gx, gh, h, c, params):
    gain_ih, gain_hh, gain_c, bias, bias_c = params.split([4, 4, 1, 4, 1])
    gates = gain_ih.flatten() * _normed(gx) + gain_hh.flatten() * _normed(gh) + bias.flatten()
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * (gain_c[0] * _normed(c) + bias_c[0]).tanh(), c


def _layer_norm_gru(gx, gh, h, c, params):
    gain_ih, gain_hh, b_x, b_hn = params.split([3, 3, 3, 1])
    xr, xz, xn = (gain_ih.flatten() * _normed(gx) + b_x.flatten()).chunk(3)
    hr, hz, hn = (gain_hh.flatten() * _normed(gh)).chunk(3)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * (hn + b_hn[0])).tanh()
    return (1 - z) * n + z * h, c


NOISE = ("recurrent_mask", "zoneout_h", "zoneout_c")
READY = {
    "peephole_lstm": (cells.peephole_lstm, _peephole),
    "cifg_lstm": (cells.cifg_lstm, _cifg),
    "light_gru": (cells.light_gru, _light),
    "ind_rnn": (cells.ind_rnn, _ind),
    "layer_norm_lstm": (cells.layer_norm_lstm, _layer_norm_lstm),
    "layer_norm_gru": (cells.layer_norm_gru, _layer_norm_gru),
}


@dataclass(frozen=True)
class CellProblem(Drawn):
    """A scan of one of READY, its arrays drawn from its name; ragged, resets as in `Problem`."""

    name: str
    T: int = 7
    B: int = 3
    I: int = 5  # noqa: E741
    H: int = 4
    dtype: str = "float64"
    bias: bool = True
    initial: bool = True
    ragged: bool = False
    resets: bool = False
    reverse: bool = False
    clip: float | None = None
    dropout: bool = False  # recurrent
    zoneout: str = ""  # "drawn", or "mean" as in inference

    def __str__(self):
        flags = ("bias", "initial", "ragged", "resets", "reverse", "clip", "dropout", "zoneout")
        on = [flag for flag in flags if getattr(self, flag)]
        size = f"{self.name}-T{self.T}-B{self.B}-I{self.I}-H{self.H}-{self.dtype}"
        return "-".join([size, *on])

    @property
    def cell(self):
        return READY[self.name][0]

    @cached_property
    def inputs(self):
        """The differentiable arguments by name, in the order of `scan`."""
        T, B, H, G = self.T, self.B, self.H, self.cell.gates
        rng, bound = self._rng("inputs"), H**-0.5
        shapes = {"w_ih": (G * H, self.I)}
        if self.cell.recurrent:
            shapes["w_hh"] = (G * H, H)
        if self.bias:
            shapes["b_ih"] = (G * H,)
        if self.bias and self.cell.recurrent:
            shapes["b_hh"] = (G * H,)
        if self.cell.params:
            shapes["params"] = (self.cell.params, H)
        arrays = {name: rng.uniform(-bound, bound, shape) for name, shape in shapes.items()}
        if self.initial:
            arrays["h0"] = rng.standard_normal((B, H))
        if self.initial and self.cell.has_c:
            arrays["c0"] = rng.standard_normal((B, H))
        return self._freeze({"x": rng.standard_normal((T, B, self.I))} | arrays)

    @cached_property
    def options(self):
        rng = self._rng("options")
        options = {"reverse": self.reverse, "clip_recurrent_grad": self.clip}
        if self.ragged:
            drawn = [1, self.T, 0, *rng.integers(0, self.T + 1, self.B)]
            options["lengths"] = np.array(drawn[: self.B], dtype=int)
        if self.resets:
            options["resets"] = rng.random((self.T, self.B)) < 0.25
        size = (self.T, self.B, self.H)
        if self.dropout:
            options["recurrent_mask"] = self._real(2 * (rng.random(size[1:]) < 0.5))
        for name in ("zoneout_h", "zoneout_c")[: (1 + self.cell.has_c) * bool(self.zoneout)]:
            p = rng.random(size)
            options[name] = self._real(p < 0.3 if self.zoneout == "drawn" else p)
        return options

    def _real(self, a):
        return a.astype(self.dtype)

    @cached_property
    def cotangents(self):
        """dy, dh_n, and of a cell with c: dc_n, dc."""
        T, B, H = self.T, self.B, self.H
        shapes = {"dy": (T, B, H), "dh_n": (B, H)}
        if self.cell.has_c:
            shapes |= {"dc_n": (B, H), "dc": (T, B, H)}
        rng = self._rng("cotangents")
        return self._freeze({name: rng.standard_normal(shape) for name, shape in shapes.items()})


def named(problem, results):
    """What scan returned, with return_cell_states where there are any, by name."""
    if not problem.cell.has_c:
        return dict(zip(("y", "h_n"), results, strict=True))
    (y, c), (h_n, c_n) = results
    return {"y": y, "h_n": h_n, "c_n": c_n, "c": c}


def vjp(problem):
    """The outputs by name, and the pullback {dy, dh_n, ...} -> {x, w_ih, ...}."""
    options = problem.options | {"return_cell_states": problem.cell.has_c}
    results, pull = fastseq.vjp(fastseq.scan, problem.cell, **problem.inputs, **options)

    def pullback(cotangents):
        dy, dh_n, dc_n, dc = (cotangents.get(k) for k in ("dy", "dh_n", "dc_n", "dc"))
        grads = pull(((dy, dc), (dh_n, dc_n)) if problem.cell.has_c else (dy, dh_n))
        return {k: a for k, a in zip(INPUTS, grads, strict=False) if a is not None}

    return named(problem, results), pullback


def solve(problem):
    """fastseq's Result."""
    outputs, pullback = vjp(problem)
    return Result(outputs, pullback(problem.cotangents))


def solve_reference(problem):
    from fastseq.reference import user_cells as reference

    inputs, cotangents = cast(problem.inputs, "float64"), cast(problem.cotangents, "float64")
    states = {"return_cell_states": problem.cell.has_c}
    results = reference.scan(problem.cell, **inputs, **problem.options, **states)
    grads = reference.scan_vjp(problem.cell, **inputs, **problem.options, **cotangents)
    return Result(named(problem, results), {name: grads[name] for name in inputs})


def solve_torch(problem, dtype=None):
    """torch's autograd over a loop, row by row where lengths or resets differ."""
    import torch

    dtype = dtype or problem.dtype
    leaves = {
        k: torch.tensor(a, requires_grad=True) for k, a in cast(problem.inputs, dtype).items()
    }
    outputs = _torch_scan(problem, leaves)
    cotangents = {k: torch.tensor(a) for k, a in cast(problem.cotangents, dtype).items()}
    loss = sum((cotangents[f"d{name}"] * a).sum() for name, a in outputs.items())
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return Result(
        {name: a.detach().numpy() for name, a in outputs.items()},
        {name: a.numpy() for name, a in zip(leaves, grads, strict=True)},
    )


def _torch_scan(problem, leaves):
    import torch

    x, (cell, step) = leaves["x"], READY[problem.name]
    T, B, H = problem.T, problem.B, problem.H
    lengths = problem.options.get("lengths", np.full(B, T))
    resets = problem.options.get("resets", np.zeros((T, B), bool))
    given = {k: torch.tensor(problem.options[k]).to(x) for k in NOISE if k in problem.options}
    mask = given.get("recurrent_mask", x.new_ones(B, H))
    z_h, z_c = (given.get(k, x.new_zeros(T, B, H)) for k in ("zoneout_h", "zoneout_c"))
    rows = []
    for b in range(B):
        h, c = (leaves[n][b] if n in leaves else x.new_zeros(H) for n in ("h0", "c0"))
        y, cs = ([x.new_zeros(H)] * T for _ in range(2))
        for s in range(lengths[b]):
            t = lengths[b] - 1 - s if problem.reverse else s
            if resets[t, b]:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            gx, gh = leaves["w_ih"] @ x[t, b] + leaves.get("b_ih", 0), 0
            if cell.recurrent:
                gh = leaves["w_hh"] @ (mask[b] * h) + leaves.get("b_hh", 0)
            h_new, c_new = step(gx, gh, h, c, leaves.get("params"))
            h, c = h_new + z_h[t, b] * (h - h_new), c_new + z_c[t, b] * (c - c_new)
            y[t], cs[t] = h, c
        rows.append({"y": torch.stack(y), "h_n": h, "c_n": c, "c": torch.stack(cs)})
    names = ("y", "h_n", "c_n", "c") if cell.has_c else ("y", "h_n")
    return {n: torch.stack([r[n] for r in rows], dim=1 if n in ("y", "c") else 0) for n in names}
