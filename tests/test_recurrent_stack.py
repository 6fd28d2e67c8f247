"""Stacked, two-directional and projected layers through _stack, against a composed reference.

Both public APIs go through it; for NumPy users alone one layer in one direction can be reached.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from problems import CELLS, Problem, Result, forward, solve_reference
from running import assert_same_bits, peer_of
from tolerance import assert_all_close

from fastseq import _dispatch, _stack
from fastseq._spec import Masks
from fastseq.reference import recurrent as reference

MASKS = {"ragged": True, "resets": True}
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


@dataclass(frozen=True)
class Stack:
    """A problem of several scans: layer 0 forward, layer 0 reverse, layer 1 forward, ..."""

    first: Problem
    layers: int = 1
    bidirectional: bool = False

    def __str__(self):
        return f"{self.first}-L{self.layers}" + "-bidirectional" * self.bidirectional

    @property
    def directions(self):
        return 2 if self.bidirectional else 1

    @property
    def scans(self):
        """A Problem each, with the masks of the first; its own x does not matter.

        Sizes and directions differ, so no two have the same weights: at most two layers.
        """
        p, found = self.first, []
        masks = {k: a for k, a in p.options.items() if k in ("lengths", "resets")}
        for width in [p.I, self.directions * (p.P or p.H)][: self.layers]:
            for reverse in [p.reverse, True][: self.directions]:
                scan = replace(p, I=width, reverse=reverse, ragged=False, resets=False)
                found.append(scan.having(options=masks))
        return found

    @property
    def spec(self):
        p = self.first
        shape = (self.layers, self.bidirectional, p.reverse)
        return _stack.Spec(p.cell, *shape, bias=p.bias, proj=p.P > 0, limit=p.clip)

    @property
    def weights(self):
        return [s.inputs[k] for s in self.scans for k in WEIGHTS if k in s.inputs]

    @property
    def states(self):
        """h0, c0 of all scans, or None."""
        found = [s.inputs for s in self.scans]
        return [np.stack([a[k] for a in found]) if k in found[0] else None for k in ("h0", "c0")]

    @property
    def cotangents(self):
        """dy, dc of the last layer's directions side by side; dh_n, dc_n of every scan."""
        p, rng = self.first, np.random.default_rng(len(str(self)))
        R, n, wide = p.P or p.H, len(self.scans), self.directions
        shapes = {"dy": (p.T, p.B, wide * R), "dh_n": (n, p.B, R)}
        if p.cell == "lstm":
            shapes |= {"dc_n": (n, p.B, p.H), "dc": (p.T, p.B, wide * p.H)}
        return {k: rng.standard_normal(shape).astype(p.dtype) for k, shape in shapes.items()}


def solve(stack, **options):
    """fastseq's Result; the gradients of weights as w0, w1, ..."""
    x, (h0, c0), d = stack.first.inputs["x"], stack.states, stack.cotangents
    masks = Masks(*(stack.first.options.get(k) for k in ("lengths", "resets")))
    lstm = stack.first.cell == "lstm"
    arguments = (stack.spec, x, h0, c0, stack.weights, masks)
    y, h_n, c_n, c, reserve = _stack.forward(*arguments, save=True, cell_states=lstm, **options)
    cotangents = [d.get(k) for k in ("dy", "dh_n", "dc_n", "dc")]
    dx, dh0, dc0, dweights = _stack.backward(*arguments, y, reserve, *cotangents)
    outputs = {"y": y, "h_n": h_n} | ({"c_n": c_n, "c": c} if lstm else {})
    grads = {"x": dx} | {f"w{i}": dw for i, dw in enumerate(dweights)}
    if h0 is not None:
        grads |= {"h0": dh0} | ({"c0": dc0} if lstm else {})
    return Result(outputs, grads)


def compose(stack, judge, outputs_of):
    """The Result that `judge` gives scan by scan: its outputs up, its gradients down again."""
    scans, D, d = stack.scans, stack.directions, stack.cotangents
    layers = [slice(layer * D, (layer + 1) * D) for layer in range(stack.layers)]
    outputs, x = [], stack.first.inputs["x"]
    for layer in layers:
        scans[layer] = [s.having(inputs={"x": x}) for s in scans[layer]]
        outputs += [outputs_of(s) for s in scans[layer]]
        x = np.concatenate([o["y"] for o in outputs[layer]], axis=-1)
    grads, dy = [None] * len(scans), d["dy"]
    for layer in reversed(layers):
        top = layer is layers[-1]
        for i, dy_part in zip(range(len(scans))[layer], np.split(dy, D, axis=-1), strict=True):
            cotangents = {"dy": dy_part, "dh_n": d["dh_n"][i]}
            if "dc_n" in d:
                dc = np.split(d["dc"] if top else 0 * d["dc"], D, axis=-1)
                cotangents |= {"dc_n": d["dc_n"][i], "dc": dc[i % D]}
            grads[i] = judge(scans[i].having(cotangents=cotangents)).grads
        dy = sum(g["x"] for g in grads[layer])
    found = {"y": x, "h_n": np.stack([o["h_n"] for o in outputs])}
    if "c_n" in outputs[0]:
        found["c_n"] = np.stack([o["c_n"] for o in outputs])
        found["c"] = np.concatenate([o["c"] for o in outputs[layers[-1]]], axis=-1)
    dweights = [g[k] for g in grads for k in WEIGHTS if k in g]
    total = {"x": dy} | {f"w{i}": dw for i, dw in enumerate(dweights)}
    total |= {k: np.stack([g[k] for g in grads]) for k in ("h0", "c0") if k in grads[0]}
    return Result(found, total)


def as_float64(problem):
    return problem.having(
        inputs={k: a.astype(np.float64) for k, a in problem.inputs.items()},
        cotangents={k: a.astype(np.float64) for k, a in problem.cotangents.items()},
    )


def assert_solved(stack, ours):
    ref = compose(stack, solve_reference, lambda p: forward(reference, as_float64(p)))
    peer = None
    if stack.first.dtype == "float32":
        peer = compose(stack, peer_of, lambda p: peer_of(p).outputs)
    assert_all_close(ours.outputs, ref.outputs, peer and peer.outputs)
    assert_all_close(ours.grads, ref.grads, peer and peer.grads, grad=True)


STACKS = [
    Stack(Problem(cell, B=5, H=19, dtype=dtype, **masks), layers, bidirectional)
    for cell in CELLS
    for dtype in ("float32", "float64")
    for masks in ({}, MASKS, MASKS | {"clip": 0.3})
    for layers, bidirectional in ((1, True), (2, False), (2, True))
]
PROJECTED = [
    Stack(Problem("lstm", B=5, H=hidden, P=P, dtype=dtype, reverse=reverse, **masks), *shape)
    for hidden, P in ((19, 3), (37, 36), (5, 1))
    for dtype, masks, reverse, shape in (
        ("float64", {}, False, (1, False)),
        ("float64", MASKS, True, (1, False)),
        ("float64", {"bias": False, "initial": False}, False, (2, True)),
        ("float32", MASKS, False, (2, True)),
    )
]


@pytest.mark.parametrize("stack", STACKS + PROJECTED, ids=str)
def test_outputs_and_gradients(stack):
    assert_solved(stack, solve(stack))


@pytest.mark.parametrize("l2_bytes", [1, 1 << 40], ids=["units", "slab"])
@pytest.mark.parametrize(
    "stack",
    [
        *(Stack(Problem(cell, T=9, B=26, H=150, **MASKS), 2, True) for cell in CELLS),
        *(Stack(Problem(cell, T=40, B=1, H=150), 2, True) for cell in CELLS),
        Stack(Problem("lstm", T=9, B=26, H=150, P=77, **MASKS), 2, True),
        Stack(Problem("lstm", T=9, B=26, H=150, P=77), 1, False),
    ],
    ids=str,
)
def test_threads_agree(stack, l2_bytes, monkeypatch):
    """Directions side by side: of 3 threads one direction has two; of 6 each has three."""
    monkeypatch.setattr(_dispatch, "l2_bytes", lambda: l2_bytes)
    monkeypatch.setattr(_dispatch._Threads, "forced", 1)
    alone = solve(stack)
    for threads in (2, 3, 6):
        monkeypatch.setattr(_dispatch._Threads, "forced", threads)
        found = solve(stack)
        assert_same_bits(found.outputs, alone.outputs)
        assert_same_bits(found.grads, alone.grads)


@pytest.mark.parametrize("stack", STACKS[-1:] + PROJECTED[-1:], ids=str)
def test_packed_weights_give_the_same_bits(stack):
    packed = _stack.pack(stack.spec, stack.weights)
    found, expected = solve(stack, packed=packed), solve(stack)
    assert_same_bits(found.outputs, expected.outputs)
    assert_same_bits(found.grads, expected.grads)


@pytest.mark.parametrize("stack", STACKS[-1:] + PROJECTED[-1:], ids=str)
def test_reserve_has_the_size_told(stack):
    p = stack.first
    arguments = (stack.spec, p.inputs["x"], *stack.states, stack.weights)
    reserve = _stack.forward(*arguments, save=True)[4]
    size = _stack.reserve_size(stack.spec, p.T, p.B, p.I, p.H, p.P, p.dtype)
    assert reserve.shape == (size,) and reserve.dtype == p.dtype
    assert _stack.forward(*arguments)[4] is None  # inference keeps nothing


def test_fingerprint_sees_every_element():
    """Any one bit changed, or two weights exchanged: another value; equal contents: the same."""
    weights = Stack(Problem("gru", I=3, H=3), 2).weights
    value = _stack.fingerprint(weights)
    assert _stack.fingerprint([np.asfortranarray(w.copy()) for w in weights]) == value
    found = {value, _stack.fingerprint(weights[::-1])}
    changes = 0
    for i, w in enumerate(weights):
        for at in range(w.size):
            changed = w.copy()
            changed.view(np.uint64).flat[at] ^= np.uint64(1)
            found.add(_stack.fingerprint([*weights[:i], changed, *weights[i + 1 :]]))
            changes += 1
    assert len(found) == 2 + changes
