"""Run fastseq's attention: an `AttentionProblem` with everything by name, padded or packed."""

import numpy as np
from attention_problems import solve_reference, solve_torch
from problems import Result
from running import on_one_thread

import fastseq
from fastseq.reference import attention as reference


def forward(problem):
    """The outputs by name."""
    o, lse = fastseq.attention(**problem.inputs, **problem.options, return_lse=True)
    return {"o": o, "lse": lse}


def vjp(problem):
    """The outputs {o, lse} and the pullback {do, dlse} -> {q, k, v, bias}.

    A cotangent may be None or missing.
    """
    arguments = problem.inputs | problem.options
    (o, lse), pull = fastseq.vjp(fastseq.attention, **arguments, return_lse=True)

    def pullback(cotangents):
        grads = pull((cotangents.get("do"), cotangents.get("dlse")))
        return dict(zip(problem.inputs, grads, strict=True))

    return {"o": o, "lse": lse}, pullback


def solve(problem):
    """fastseq's Result, as `solve_reference` and `solve_torch` give theirs."""
    outputs, pullback = vjp(problem)
    return Result(outputs, pullback(problem.cotangents))


def judge(problem):
    """The reference's Result, and for float32 torch's beside it, else None."""
    peer = on_one_thread(solve_torch, problem) if problem.dtype == "float32" else None
    return solve_reference(problem), peer


def results(problem):
    """Outputs and gradients in one dict; `d` before the gradients."""
    solved = solve(problem)
    return solved.outputs | {f"d{name}": a for name, a in solved.grads.items()}


def lengths(problem):
    """The queries and the keys of every batch row."""
    full = {"q": np.full(problem.B, problem.L), "kv": np.full(problem.B, problem.S)}
    return [problem.options.get(f"{name}_lengths", n) for name, n in full.items()]


def row(problem, b, *, trimmed=False):
    """Batch row b as a problem of its own; trimmed: without what its lengths leave out."""
    n, m = (int(found[b]) for found in lengths(problem)) if trimmed else (problem.L, problem.S)
    queries, keys = slice(n), slice(m)

    def cut(name, a):
        if not isinstance(a, np.ndarray):
            return a
        if name in ("mask", "bias"):
            wide = np.broadcast_to(a, (problem.B, problem.NH, problem.L, problem.S))
            return wide[b : b + 1, :, queries, keys]
        if name == "alibi_slopes":
            return a[b] if a.ndim == 2 else a
        if name in ("k", "v"):
            return a[b : b + 1, :, keys]
        return a[b : b + 1, :, queries] if a.ndim > 1 else a[b : b + 1]

    parts = {
        part: {name: cut(name, a) for name, a in getattr(problem, part).items()}
        for part in ("inputs", "options", "cotangents")
    }
    for name in ("q_lengths", "kv_lengths") if trimmed else ():
        parts["options"].pop(name, None)
    alone = problem.having()
    alone.__dict__.update(parts)
    return alone


def pack(problem):
    """(q, k, v, cu_seqlens_q, cu_seqlens_k) and (do, dlse): the rows that lengths leave, joined."""
    of_q, of_k = lengths(problem)

    def join(a, n):
        return np.concatenate([a[b, :, : n[b]].swapaxes(0, 1) for b in range(problem.B)])

    found = [join(problem.inputs[name], n) for name, n in (("q", of_q), ("k", of_k), ("v", of_k))]
    ends = [np.concatenate([[0], np.cumsum(n)]) for n in (of_q, of_k)]
    return (*found, *ends), tuple(join(problem.cotangents[name], of_q) for name in ("do", "dlse"))


def packed(problem):
    """`results` by attention_varlen, and by its reference: rows of all sequences, no padding."""
    arrays, (do, dlse) = pack(problem)
    left_out = ("q_lengths", "kv_lengths", "mask")
    options = {name: a for name, a in problem.options.items() if name not in left_out}
    call = (fastseq.attention_varlen, *arrays)
    (o, lse), pull = fastseq.vjp(*call, **options, return_lse=True)
    found = {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv"), pull((do, dlse)), strict=True))
    wide = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]
    of_o = reference.attention_varlen(*wide, **options)
    of_grads = reference.attention_varlen_vjp(*wide, do=do, dlse=dlse, **options)
    ref = dict(zip(("o", "lse"), of_o, strict=True))
    return found, ref | {f"d{name}": a for name, a in of_grads.items()}
