"""A recurrent call on CUDA tensors: its checks, its reserve, the rows' first and last steps.

float32, bfloat16 and float16. Lengths on the GPU are not checked, which would wait for it; they are
clamped to 0..T.
"""

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastseq import _check
from fastseq._spec import Spec
from fastseq.kernels.triton import kernels


@dataclass(slots=True)
class Call:
    """One call's checked arguments, the same for all layers. R = P with a projection, else H."""

    spec: Spec
    x: Tensor
    T: int
    B: int
    H: int
    P: int
    R: int
    h0: Tensor | None  # (L D, B, R)
    c0: Tensor | None
    weights: Any
    lengths: Tensor | None
    order: Tensor | None
    resets: Tensor | None
    parts: dict  # of the reserve

    def part(self, name: str, index: int) -> Any:
        """An array of the reserve, or None."""
        return self.parts.get((name, index))

    def half(self, a: Tensor | None, d: int, width: int) -> Any:
        """Direction d's columns of a layer's output."""
        if a is None or self.spec.directions == 1:
            return a
        return a[:, :, d * width : (d + 1) * width]

    def reverse(self, d: int) -> bool:
        return self.spec.reverse or d == 1

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a sequence: zeros where rows end early, as nothing is written past them."""
        make = self.x.new_empty if self.lengths is None else self.x.new_zeros
        return make(shape, dtype=dtype or self.x.dtype)

    def ends(self, reverse: bool) -> tuple[Tensor, Tensor]:
        """(steps, rows): each row's first step in this direction; 0 for a row of no steps."""
        rows = torch.arange(self.B, device=self.x.device)
        if not reverse:
            return torch.zeros_like(rows), rows
        if self.lengths is None:
            return torch.full_like(rows, self.T - 1), rows
        return (self.lengths - 1).clamp(min=0), rows

    def from_start(self, d: int, a: Tensor) -> Tensor:
        """(B, n) with zeros in the rows whose initial state reaches no step: none, or reset."""
        if self.lengths is not None:
            a = a.masked_fill((self.lengths == 0).unsqueeze(1), 0)
        if self.resets is not None:
            a = a.masked_fill(self.resets[self.ends(self.reverse(d))].bool().unsqueeze(1), 0)
        return a

    def scan(self, index: int, **arrays: Any) -> Any:
        """The kernels' Scan of one direction of a layer."""
        w_hh, w_hr = (self.weights[index][name] for name in ("w_hh", "w_hr"))
        w_hh = w_hh if w_hr is None else w_hh @ w_hr
        b_hn = None
        if self.spec.cell == "gru" and self.spec.bias:
            b_hn = self.weights[index]["b_hh"][2 * self.H :].contiguous()
        return kernels(self.spec.op, "recurrent").Scan(
            cell=self.spec.cell,
            sizes=(self.T, self.B, self.H),
            reverse=self.reverse(index % self.spec.directions),
            w_hh=w_hh.contiguous(),
            b_hn=b_hn,
            lengths=self.lengths,
            order=self.order,
            resets=self.resets,
            arrived=self.x.new_zeros(self.B, dtype=torch.int32),
            **arrays,
        )


def call(spec, x, h0, c0, weights, lengths, resets) -> Call:
    """Check the arguments."""
    op, G = spec.op, spec.kind.gates
    launch = kernels(op, "launch")
    launch.check(op, "x", x)
    if spec.cell not in kernels(op, "cells").GATES:
        raise TypeError(f"{op}: this cell has no kernel for {x.device}")
    if spec.limit is not None and spec.proj:
        raise NotImplementedError(
            f"{op}: clip_recurrent_grad with a projection must be None on {x.device}, "
            f"got {spec.limit}"
        )
    _check.rank(op, "x", tuple(x.shape), "T, B, I")
    T, B, _ = x.shape
    letters = f"{G}H, I" if G > 1 else "H, I"
    _check.rank(op, "w_ih", tuple(weights[0].shape), letters)
    H = weights[0].shape[0] // G
    if H < 1 or weights[0].shape[0] % G:
        got = tuple(weights[0].shape)
        raise ValueError(f"{op}: w_ih must be ({letters}) with H >= 1, got {got}")
    if T < 1:
        raise ValueError(f"{op}: x must have at least one step, got T = 0")
    P = spec.weights_of(weights, 0)[4].shape[0] if spec.proj else 0
    R = P or H
    named = [_named_weights(spec, x, weights, index, H, R) for index in range(spec.scans)]
    h0, c0 = _state(spec, x, "h0", h0, R), _state(spec, x, "c0", c0, H)
    lengths = check_lengths(op, lengths, x)
    order = None if lengths is None else torch.argsort(lengths, descending=True, stable=True)
    resets = check_resets(op, resets, x)
    return Call(spec, x, T, B, H, P, R, h0, c0, named, lengths, order, resets, {})


def same(op: str, name: str, a: Tensor, x: Tensor, like: str = "x") -> None:
    """Raise unless the tensor has the dtype and device of x, which is argument `like`."""
    if a.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must be {_name(x.dtype)} as {like} is, got {_name(a.dtype)}")
    if a.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} as {like} is, got {a.device}")


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _named_weights(spec, x, weights, index, H, R):
    layer, direction = divmod(index, spec.directions)
    suffix = "" if spec.scans == 1 else f"_l{layer}" + "_reverse" * direction
    G, inputs = spec.kind.gates, x.shape[2] if layer == 0 else spec.directions * R
    gates = f"{G}H" if G > 1 else "H"
    expected = {
        "w_ih": (f"{gates}, I", (G * H, inputs)),
        "w_hh": (f"{gates}, {'P' if spec.proj else 'H'}", (G * H, R)),
        "b_ih": (f"{gates},", (G * H,)),
        "b_hh": (f"{gates},", (G * H,)),
        "w_hr": ("P, H", (R, H)),
    }
    found = dict(zip(expected, spec.weights_of(weights, index), strict=False))
    for name in spec.names:
        same(spec.op, name + suffix, found[name], x)
        _check.shape(spec.op, name + suffix, tuple(found[name].shape), *expected[name])
    return found


def _state(spec, x, name, state, width):
    """(L D, B, width), or None."""
    if state is None:
        return None
    name = name.removesuffix("0") if spec.step else name
    same(spec.op, name, state, x)
    letter = "P" if spec.proj and "h" in name else "H"
    shape = tuple(state.shape)
    if spec.scans == 1 and len(shape) == 3 and shape[0] == 1:
        _check.shape(spec.op, name, shape[1:], f"B, {letter}", (x.shape[1], width))
    else:
        expected = (spec.scans, x.shape[1], width)
        _check.shape(spec.op, name, shape, f"LD, B, {letter}", expected)
    return state.contiguous()


def check_lengths(op: str, lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """(B,) int64 on x's device, x (T, B, any); values are checked where they are on the CPU."""
    if lengths is None:
        return None
    T, B = x.shape[:2]
    if lengths.is_cpu:
        checked = _check.counts(op, "lengths", lengths, ("B", B), ("T", T))
        return torch.from_numpy(checked).to(x.device, non_blocking=True)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: lengths must be integers, got {_name(lengths.dtype)}")
    _check.shape(op, "lengths", tuple(lengths.shape), "B,", (B,))
    return lengths.to(torch.int64).clamp(0, T)


def check_resets(op: str, resets: Tensor | None, x: Tensor) -> Tensor | None:
    """(T, B) as the kernels take them, x (T, B, any)."""
    if resets is None:
        return None
    if resets.dtype != torch.bool:
        raise TypeError(f"{op}: resets must be bool, got {_name(resets.dtype)}")
    _check.shape(op, "resets", tuple(resets.shape), "T, B", tuple(x.shape[:2]))
    if resets.device != x.device:
        raise ValueError(f"{op}: resets must be on {x.device} as x is, got {resets.device}")
    return resets.contiguous().view(torch.uint8)


def _columns(spec: Spec, H: int, P: int) -> dict[tuple[str, int], int]:
    """{(name, scan or layer): elements of a step and row} of the reserve."""
    kept = kernels(spec.op, "cells").KEPT[spec.cell] * H
    columns: dict[tuple[str, int], int] = {}
    for index in range(spec.scans):
        columns |= {("kept", index): kept} if kept else {}
        columns |= {("c", index): H} if spec.kind.has_c else {}
        columns |= {("m", index): H} if P else {}
    for layer in range(spec.num_layers - 1):
        columns["y", layer] = spec.directions * (P or H)
    return columns


def reserve_per_step(spec: Spec, H: int, P: int) -> int:
    """Elements of the reserve for a step of a row."""
    return sum(_columns(spec, H, P).values())


def lay_out(reserve: Tensor, spec: Spec, T: int, B: int, H: int, P: int) -> dict:
    """{(name, scan or layer): its array (T, B, n)} in the reserve."""
    columns = _columns(spec, H, P)
    ends = [0, *accumulate(T * B * n for n in columns.values())]
    places = zip(columns.items(), ends, strict=False)
    return {key: reserve[at : at + prod((T, B, n))].view(T, B, n) for (key, n), at in places}
