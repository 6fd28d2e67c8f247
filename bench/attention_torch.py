"""Contenders of the family "attention" in torch: torch's own, and fastseq's over tensors.

torch's contender is SDPA as it chooses its backend (flash, where it applies), or the math backend
in a context of its own where a trial at the start finds that faster.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastseq.torch
from fastseq.reference.attention import dropout_keep

from .attention import DROPOUT, LARGE_SCORES, NEAR, SEED, WINDOW, Case, Problem
from .families import OURS, Contender, fastest
from .gate import Results

Attend = Callable[..., torch.Tensor]  # (q, k, v, bias) -> o, the rest of the case bound


def builders(problem: Problem) -> dict[str, Callable[[], Contender]]:
    """Ours and torch."""
    if problem.case.op == "mha":
        return {
            OURS: lambda: module(fastseq.torch.nn, problem),
            "torch": lambda: module(nn, problem),
        }
    return {
        OURS: lambda: contender(problem, own_attention(problem)),
        "torch": lambda: torch_contender(problem),
    }


def expected(problem: Problem, dtype: str) -> Results:
    """What torch computes in `dtype` for what the gate compares; dropout by the equations."""
    kind = getattr(torch, dtype)
    case = problem.case
    if case.op == "mha":
        return module(nn, problem, kind).results()
    if case.option == "dropout":
        keep = dropout_keep(SEED, case.B, case.NH, case.L, case.S, DROPOUT)
        return contender(problem, equations(torch.from_numpy(keep)), kind).results()
    part = problem.sliced()
    return contender(part, sdpa(part), kind).results()


def torch_contender(problem: Problem) -> Contender:
    """SDPA with the faster of its backends."""
    chosen = contender(problem, sdpa(problem))
    if problem.case.option == "dropout":  # math is its only backend
        return Contender(chosen.call, partial(_seeded, chosen), partial(_torch_dropout, problem))
    if problem.case.score_bytes > LARGE_SCORES:
        return chosen
    return fastest([chosen, contender(problem, math_sdpa(problem))])


def sdpa(problem: Problem) -> Attend:
    """torch's function, with the mask or the bias of the problem."""
    case = problem.case
    mask = None if problem.mask is None else torch.from_numpy(problem.mask)
    if case.option == "score_mod":
        mask = -(torch.arange(case.L)[:, None] - torch.arange(case.S)).abs() / NEAR
    settings = {
        "is_causal": case.causal,
        "dropout_p": DROPOUT if case.option == "dropout" else 0.0,
        "enable_gqa": case.NK != case.NH,
    }

    def attend(q, k, v, bias=None):
        given = mask if bias is None else bias
        if given is not None and given.is_floating_point():
            given = given.to(q.dtype)  # itself where it is that already
        return F.scaled_dot_product_attention(q, k, v, attn_mask=given, **settings)

    return attend


def math_sdpa(problem: Problem) -> Attend:
    """The same without fusion."""
    attend = sdpa(problem)

    def unfused(*tensors: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(*tensors)

    return unfused


@fastseq.score_mod
def near(score, b, h, q_idx, kv_idx):
    """Keys count the less the further away they are."""
    return score - np.abs(q_idx - kv_idx) / NEAR


def own_attention(problem: Problem) -> Attend:
    """fastseq.torch.attention, each option by the argument made for it."""
    case = problem.case
    settings: dict[str, object] = {"causal": True} if case.causal else {}
    match case.option:
        case "mask":
            settings["mask"] = torch.from_numpy(problem.mask)
        case "lengths":
            settings["kv_lengths"] = torch.from_numpy(problem.kv_lengths)
        case "window":
            settings["window"] = (WINDOW, WINDOW)
        case "score_mod":
            settings["score_mod"] = near
        case "dropout":
            settings |= {"dropout_p": DROPOUT, "seed": SEED}
    return lambda q, k, v, bias=None: fastseq.torch.attention(q, k, v, bias=bias, **settings)


def equations(keep: torch.Tensor) -> Attend:
    """Dropout spelled out, with the numbers drawn before."""

    def attend(q, k, v):
        p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return (p * keep / (1 - DROPOUT)) @ v

    return attend


def contender(problem: Problem, attend: Attend, dtype=torch.float32) -> Contender:
    """Inference under no_grad, or forward and the gradients of q, k, v and the bias."""
    given = {"q": problem.q, "k": problem.k, "v": problem.v, "bias": problem.bias}
    given = {name: a for name, a in given.items() if a is not None}
    leaves = [torch.from_numpy(a).to(dtype) for a in given.values()]
    do = torch.from_numpy(problem.do).to(dtype)
    pick = {"q": problem.of_queries, "k": problem.of_keys, "v": problem.of_keys}

    def inference():
        with torch.no_grad():
            return attend(*leaves)

    def training():
        o = attend(*leaves)
        return o, *torch.autograd.grad(o, leaves, do)

    def results() -> Results:
        if not problem.case.training:
            return {"o": problem.of_queries(inference().numpy())}
        o, *grads = training()
        found = {"o": problem.of_queries(o.detach().numpy())}
        for name, grad in zip(given, grads, strict=True):
            found[f"d{name}"] = pick.get(name, np.asarray)(grad.numpy())
        return found

    for leaf in leaves:
        leaf.requires_grad_(problem.case.training)
    return Contender(training if problem.case.training else inference, results)


def _seeded(made: Contender) -> Results:
    torch.manual_seed(SEED)
    return made.results()


def _torch_dropout(problem: Problem, dtype: str) -> Results:
    """The equations with the numbers that torch draws after the same seed."""
    case = problem.case
    torch.manual_seed(SEED)
    keep = F.dropout(torch.ones(case.B, case.NH, case.L, case.S), DROPOUT) != 0
    return contender(problem, equations(keep), getattr(torch, dtype)).results()


def module(namespace, problem: Problem, dtype=torch.float32) -> Contender:
    """Self-attention without its weights returned; `namespace` is torch.nn or fastseq.torch.nn."""
    case = problem.case
    layer = load_module(namespace, case).to(dtype).train(case.training)
    x, dy = (_rows(a).to(dtype) for a in (problem.q, problem.do))
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def inference():
        with torch.no_grad():
            return layer(x, x, x, need_weights=False)[0]

    def training():
        y, _ = layer(x, x, x, need_weights=False)
        return y, *torch.autograd.grad(y, (x, *parameters), dy)

    def results() -> Results:
        if not case.training:
            return {"y": inference().numpy()}
        y, *grads = training()
        named = zip(("x", *names), grads, strict=True)
        return {"y": y.detach().numpy()} | {f"d{name}": grad.numpy() for name, grad in named}

    x.requires_grad_(case.training)
    return Contender(training if case.training else inference, results)


def load_module(namespace, case: Case) -> nn.Module:
    """The layer with torch's initial weights, and biases U(-1/sqrt(E), 1/sqrt(E)): torch has 0."""
    width = case.NH * case.D
    torch.manual_seed(SEED)
    source = nn.MultiheadAttention(width, case.NH)
    for bias in (source.in_proj_bias, source.out_proj.bias):
        nn.init.uniform_(bias, -1 / math.sqrt(width), 1 / math.sqrt(width))
    layer = namespace.MultiheadAttention(width, case.NH, batch_first=True)
    layer.load_state_dict(source.state_dict())
    return layer


def _rows(a: np.ndarray) -> torch.Tensor:
    """(B, NH, L, D) as the input of a module, (B, L, E)."""
    return torch.from_numpy(a).transpose(1, 2).flatten(2).contiguous()
