"""Attention of CUDA tensors: checks, allocation, the Triton kernels.

What `fastseq._attend` is for arrays. float32, bfloat16 and float16; lse is float32. The values of
lengths and offsets are not checked, which would wait for the GPU; they are clamped.
"""

import torch

from fastseq import _attend_plan, _check
from fastseq.kernels.cpu.contract import CAUSAL, Attention
from fastseq.kernels.triton import kernels
from fastseq.torch._tensors import like


def forward(op, tensors, numbers):
    """o, lse of the operator's tensors (by name) and numbers."""
    call, packed = _call(op, tensors, numbers)
    B, NH, L = call.q.shape[:3]
    call.o = like(call.q, call.sizes[4])
    call.lse = call.q.new_empty((B, NH, L), dtype=torch.float32)
    if packed:  # rows of no sequence
        call.o.zero_()
        call.lse.fill_(-torch.inf)
    kernels(op, "attention").forward(call)
    return _as_given(call.o, packed), _as_given(call.lse, packed)


def backward(op, tensors, numbers, o, lse, do, dlse, *, needs_bias):
    """dq, dk, dv, dbias (None where not needed) of `forward`; do, dlse: None is zeros."""
    call, packed = _call(op, tensors, numbers)
    letters = "TQ, NH" if packed else "B, NH, L"
    for name, got, output in (("do", do, o), ("dlse", dlse, lse)):
        if got is not None:
            _check.shape(
                op, name, tuple(got.shape), letters + ", DV" * (name == "do"), output.shape
            )
            _same(op, name, got, output.dtype, output.device)
    do = torch.zeros_like(o) if do is None else do
    call.o, call.do = (_rows(_as_kernel(a, packed)) for a in (o, do))
    call.lse, call.dlse = (_as_kernel(a, packed) for a in (lse, dlse))
    call.dq, call.dk, call.dv = (like(a, a.shape[-1]) for a in (call.q, call.k, call.v))
    if packed:
        for gradient in (call.dq, call.dk, call.dv):
            gradient.zero_()
    bias = tensors.get("bias")
    if needs_bias and bias is not None:
        call.dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    kernels(op, "attention").backward(call)
    return *(_as_given(a, packed) for a in (call.dq, call.dk, call.dv)), call.dbias


def _call(op, tensors, numbers):
    """Checked arguments as the kernels take them, and whether their rows are packed."""
    q, k, v = (tensors[name] for name in "qkv")
    packed = "cu_seqlens_q" in tensors
    kernels(op, "launch").check(op, "q", q)
    for name, a in (("k", k), ("v", v)):
        _same(op, name, a, q.dtype, q.device)
    _attend_plan.check_shapes(op, packed, *(tuple(a.shape) for a in (q, k, v)))
    if packed:
        cu = [tensors[f"cu_seqlens_{x}"] for x in "qk"]
        B, lengths = len(cu[0]) - 1, (None, None)
        for name, a in zip(("cu_seqlens_q", "cu_seqlens_k"), cu, strict=True):
            _integers(op, name, a, "B + 1,", (max(B, 0) + 1,), q.device)
        q, k, v = (a.transpose(0, 1)[None] for a in (q, k, v))
    else:
        B, cu = q.shape[0], (None, None)
        lengths = (tensors.get("q_lengths"), tensors.get("kv_lengths"))
        for name, a in zip(("q_lengths", "kv_lengths"), lengths, strict=True):
            if a is not None:
                _integers(op, name, a, "B,", (B,), q.device)
    NH, L, D = q.shape[1:]
    NK, S, DV = v.shape[1:]
    causal, left, right, scale, softcap, dropout_p, score_mod = numbers
    if score_mod is not None:
        raise NotImplementedError(f"{op}: score_mod runs on the CPU only, got q on {q.device}")
    left, right = _attend_plan.window(op, (left, right))
    seed = tensors.get("seed")
    threshold, keep_scale = _attend_plan.dropout(op, dropout_p)
    return Attention(
        sizes=(B, NH, NK, D, DV),
        q=_rows(q),
        k=_rows(k),
        v=_rows(v),
        o=None,
        lse=None,
        q_lengths=_contiguous(lengths[0]),
        kv_lengths=_contiguous(lengths[1]),
        q_first=_contiguous(cu[0]),
        k_first=_contiguous(cu[1]),
        causal=CAUSAL[causal or False],
        left=left,
        right=right,
        scale=D**-0.5 if scale is None else _check.number(op, "scale", scale),
        softcap=_attend_plan.positive(op, "softcap", softcap),
        alibi_slopes=_slopes(op, tensors.get("alibi_slopes"), (B, NH), q),
        mask=_pairs(op, "mask", tensors.get("mask"), (B, NH, L, S), torch.bool, q.device),
        bias=_pairs(op, "bias", tensors.get("bias"), (B, NH, L, S), q.dtype, q.device),
        seed=_attend_plan.seed(op, dropout_p, seed if seed is None else seed.item()),
        threshold=threshold,
        keep_scale=keep_scale,
    ), packed


def _named(dtype):
    return str(dtype).removeprefix("torch.")


def _same(op, name, a, dtype, device):
    if a.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {_named(dtype)} as q is, got {_named(a.dtype)}")
    _on(op, name, a, device)


def _on(op, name, a, device):
    if a.device != device:
        raise ValueError(f"{op}: {name} must be on {device} as q is, got {a.device}")


def _integers(op, name, a, letters, shape, device):
    if a.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {_named(a.dtype)}")
    _check.shape(op, name, tuple(a.shape), letters, shape)
    _on(op, name, a, device)


def _pairs(op, name, a, sizes, dtype, device):
    """A mask or bias as (B, NH, L, S), broadcast by strides."""
    if a is None:
        return None
    if a.dtype != dtype:
        raise TypeError(f"{op}: {name} must be an array of {_named(dtype)}, got {_named(a.dtype)}")
    _on(op, name, a, device)
    _check.broadcasts(op, name, tuple(a.shape), "B, NH, L, S", sizes)
    return a.expand(sizes)


def _slopes(op, a, sizes, q):
    if a is None:
        return None
    if a.dtype not in (q.dtype, torch.float32):
        expected = f"float32 or {_named(q.dtype)} as q is"
        raise TypeError(f"{op}: alibi_slopes must be {expected}, got {_named(a.dtype)}")
    _on(op, "alibi_slopes", a, q.device)
    if tuple(a.shape) not in (sizes[1:], sizes):
        expected = f"(NH,) = ({sizes[1]},) or (B, NH) = {sizes}"
        raise ValueError(f"{op}: alibi_slopes must be {expected}, got {tuple(a.shape)}")
    return a.expand(sizes)


def _rows(a):
    """`a` with consecutive elements in its last axis."""
    return a if a.stride(-1) == 1 or a.is_contiguous() else a.contiguous()


def _contiguous(a):
    return a if a is None else a.contiguous()


def _as_kernel(a, packed):
    return a if a is None or not packed else a.transpose(0, 1)[None]


def _as_given(a, packed):
    return a[0].transpose(0, 1) if packed else a
