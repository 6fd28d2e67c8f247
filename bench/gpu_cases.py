"""What `gpu.py` runs: every case with its contenders, all from the same tensors, and its bar.

A case builds {contender: call}. A call returns its results, tensors in one fixed order; the first
contender is ours. `exact` gives the same results in float64, by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq.torch as fst

OURS = "ours"
UNTIMED = "loop (untimed)"  # a peer for the results alone: it takes seconds
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Call = Callable[[], list]


@dataclass(frozen=True)
class Case:
    """One row: sizes by letter, and what it has to show, ours against the fastest of `against`."""

    family: str
    name: str
    sizes: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False
    bar: float | None = None  # time(against) / time(ours) at least
    against: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def outputs(self) -> int:
        """Of the results, those that are no gradients."""
        return 2 if self.family == "recurrent" else 1

    def __str__(self) -> str:
        sizes = "-".join(f"{k}{v}" for k, v in self.sizes.items())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}.{'fwd+bwd' if self.backward else 'fwd'}/{sizes}/{dtype}"


def cases(small: bool = False) -> list[Case]:
    """All of them; small: the same with sizes for the interpreter."""
    found = [*_recurrent(), *_packed(), *_attention(), *_scans()]
    if not small:
        return found
    tiny = {"T": 5, "B": 3, "I": 4, "H": 6, "NH": 2, "L": 19, "D": 8, "C": 5}
    seen: dict[str, Case] = {}
    for case in found:
        sizes = {k: tiny[k] for k in case.sizes}
        shrunk = Case(case.family, case.name, sizes, torch.float32, case.backward, None,
                      case.against, case.options)  # fmt: skip
        seen.setdefault(str(shrunk), shrunk)
    return list(seen.values())


def _recurrent() -> Iterator[Case]:
    for name in ("LSTM", "GRU", "RNN"):
        for dtype in (torch.bfloat16, torch.float32):
            for H in (64, 128, 256, 512, 768, 1024):
                bar = (1.0 if H <= 256 else 0.7) if name != "RNN" else None
                for backward in (False, True):
                    sizes = {"T": 1024, "B": 16, "I": H, "H": H}
                    against = ("cudnn",)
                    yield Case("recurrent", name, sizes, dtype, backward, bar, against)


def _packed() -> Iterator[Case]:
    for name in ("LSTM", "GRU"):
        for H in (128, 512):
            for backward in (False, True):
                sizes = {"T": 512, "B": 64, "I": H, "H": H}
                against, options = ("cudnn",), {"packed": True}
                yield Case("recurrent", f"{name}-packed", sizes, torch.bfloat16, backward, 3.0,
                           against, options)  # fmt: skip


def _attention() -> Iterator[Case]:
    for D in (64, 128):
        sizes = {"B": 2, "NH": 16, "L": 4096, "D": D}
        for causal in (False, True):
            name = "attention-causal" if causal else "attention"
            for backward, bar in ((False, 0.75), (True, 0.65)):
                options = {"causal": causal}
                yield Case("attention", name, sizes, torch.bfloat16, backward, bar,
                           tuple(BACKENDS), options)  # fmt: skip
        # the share of pairs that the mask leaves
        L, window = sizes["L"], 256
        bar = L * L / sum(min(i + 1, window + 1) for i in range(L))
        yield Case("attention", "attention-window", sizes, torch.bfloat16, False, bar,
                   ("mask",), {"window": window})  # fmt: skip
        bar = sizes["B"] * L * L / sum(n * n for n in _lengths(sizes["B"], L))
        yield Case("attention", "attention-varlen", sizes, torch.bfloat16, False, bar,
                   ("mask",), {"varlen": True})  # fmt: skip


def _lengths(B: int, L: int) -> list[int]:
    return [max(L >> b, 1) for b in range(B)]


def _scans() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for T, B, C in ((4096, 64, 2048), (4096, 8, 1536), (65536, 8, 256)):
            for backward in (False, True):
                sizes = {"T": T, "B": B, "C": C}
                yield Case("linear_scan", "linear_scan", sizes, dtype, backward, 0.8, ("copy",))


def build(case: Case, device: str) -> tuple[dict[str, Call], Call]:
    """The contenders' calls, and the call in float64."""
    torch.manual_seed(len(str(case)))
    return {"recurrent": _build_recurrent, "attention": _build_attention,
            "linear_scan": _build_scan}[case.family](case, device)  # fmt: skip


def _with_gradients(call: Call, leaves: list, backward: bool) -> list:
    """The outputs, and with `backward` the gradients of the sum of the first."""
    if not backward:
        with torch.no_grad():
            return call()
    outputs = call()
    grads = torch.autograd.grad(outputs[0], leaves, torch.ones_like(outputs[0]))
    return [*(o.detach() for o in outputs), *grads]


# ---- recurrent


def _build_recurrent(case, device):
    T, B, I, H = case.sizes.values()  # noqa: E741
    kind = case.name.removesuffix("-packed")
    theirs = getattr(torch.nn, kind)(I, H).to(device, case.dtype)
    ours = getattr(fst.nn, kind)(I, H).to(device, case.dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = getattr(torch.nn, kind)(I, H).to(device, case.dtype)
    exact.load_state_dict(theirs.state_dict())
    exact = exact.double()
    x = torch.randn(T, B, I, device=device).to(case.dtype)
    lengths = None
    if case.options.get("packed"):
        lengths = torch.linspace(1, T, B).long().flip(0)  # of all lengths alike

    def run(module, dtype, tf32=False):
        leaf = x.to(dtype).requires_grad_(case.backward)
        given = leaf if lengths is None else pack_padded_sequence(leaf, lengths)
        leaves = [leaf, *module.parameters()]

        def call():
            y, last = module(given)
            h_n = last[0] if isinstance(last, tuple) else last
            return [y if lengths is None else y.data, h_n]

        def with_precision():
            with tensor_float(tf32):
                return _with_gradients(call, leaves, case.backward)

        return with_precision

    calls = {OURS: run(ours, case.dtype), "cudnn": run(theirs, case.dtype)}
    if case.dtype == torch.float32 and device != "cpu":
        calls |= {f"{OURS} tf32": run(ours, case.dtype, True)}
        calls |= {"cudnn tf32": run(theirs, case.dtype, True)}
    if lengths is None and H in (6, 256):
        calls["loop"] = _loop(kind, theirs, x, case)
    return calls, run(exact, torch.float64)


class tensor_float:
    """tf32 products within, for torch's products, cuDNN and ours; IEEE products without."""

    def __init__(self, on: bool):
        self.on = on

    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.on

    def __exit__(self, *_):
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


def _loop(kind, module, x, case):
    """torch's cell, step by step."""
    cell = getattr(torch.nn, f"{kind}Cell")(case.sizes["I"], case.sizes["H"]).to(x)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in module.state_dict().items()})
    leaf = x.clone().requires_grad_(case.backward)

    def call():
        state, found = None, []
        for step in leaf:
            state = cell(step, state)
            found.append(state[0] if kind == "LSTM" else state)
        return [torch.stack(found), found[-1][None]]

    return partial(_with_gradients, call, [leaf, *cell.parameters()], case.backward)


# ---- attention


def _build_attention(case, device):
    B, NH, L, D = case.sizes.values()
    q, k, v = torch.randn(3, B, NH, L, D, device=device).to(case.dtype)
    causal, window = case.options.get("causal", False), case.options.get("window")
    if case.options.get("varlen"):
        return _build_varlen(q, k, v)

    def run(function, dtype=case.dtype):
        leaves = [a.to(dtype).requires_grad_(case.backward) for a in (q, k, v)]
        return partial(_with_gradients, lambda: [function(*leaves)], leaves, case.backward)

    if window:
        ahead = torch.arange(L, device=device)
        distance = ahead[:, None] - ahead[None, :]
        mask = (distance >= 0) & (distance <= window)
        theirs = partial(scaled_dot_product_attention, attn_mask=mask)
        ours = partial(fst.attention, causal=True, window=(window, 0))
        return {OURS: run(ours), "mask": run(theirs)}, run(theirs, torch.float64)
    theirs = partial(scaled_dot_product_attention, is_causal=causal)
    calls = {OURS: run(partial(fst.attention, causal=causal))}
    calls["ours (sdpa)"] = run(partial(fst.scaled_dot_product_attention, is_causal=causal))
    for name, backend in BACKENDS.items() if device != "cpu" else ():
        calls[name] = run(partial(_by_backend, backend, theirs))
    return calls, run(partial(_by_backend, SDPBackend.MATH, theirs), torch.float64)


def _by_backend(backend, function, *args):
    with sdpa_kernel(backend):
        return function(*args)


def _build_varlen(q, k, v):
    """Packed rows of lengths L, L/2, L/4 ... against the padded batch with a mask."""
    L = q.shape[2]
    lengths = torch.tensor(_lengths(len(q), L), device=q.device)
    zero = lengths.new_zeros(1)
    offsets = torch.cat([zero, lengths.cumsum(0)]).int()
    there = torch.arange(L, device=q.device) < lengths[:, None]
    packed = [a.transpose(1, 2)[there] for a in (q, k, v)]
    mask = there[:, None, None, :]

    def ours():
        return [fst.attention_varlen(*packed, offsets, offsets)]

    def theirs(dtype=q.dtype):
        o = scaled_dot_product_attention(*(a.to(dtype) for a in (q, k, v)), attn_mask=mask)
        return [o.transpose(1, 2)[there]]

    return {OURS: ours, "mask": theirs}, partial(theirs, torch.float64)


# ---- linear scan


def _build_scan(case, device):
    T, B, C = case.sizes.values()
    a = (1 - torch.rand(T, B, C, device=device) / 8).to(case.dtype)
    b = torch.randn(T, B, C, device=device).to(case.dtype)

    def run(function, dtype=case.dtype):
        leaves = [t.to(dtype).requires_grad_(case.backward) for t in (a, b)]
        return partial(_with_gradients, lambda: [function(*leaves)], leaves, case.backward)

    def loop(a, b):
        h, found = torch.zeros_like(a[0]), []
        for factor, term in zip(a.unbind(), b.unbind(), strict=True):
            h = factor * h + term
            found.append(h)
        return torch.stack(found)

    # as much traffic: 2 arrays read and 1 written forward, 3 read and 2 written backward
    moved = (3 + 5 * case.backward) * T * B * C
    source = torch.empty(moved // 2, device=device, dtype=case.dtype)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)
        return []

    ours = run(lambda a, b: fst.linear_scan(a, b)[0])
    return {OURS: ours, "copy": copy, UNTIMED: run(loop)}, run(loop, torch.float64)
