"""Attention of q, k, v and at most kv_lengths over tensors, by their addresses.

What it does not take, `attention_ops` does by way of arrays; a None here says so.
"""

import torch

from fastseq._attend_plain import plain
from fastseq.torch._tensors import FLOATS


def forward(inputs, numbers):
    """o and lse as arrays, of the operator's tensors and numbers."""
    found = _of_operator(inputs, numbers)
    if found is None:
        return None
    call, at = found
    return call.forward(at)


def backward(inputs, results, numbers):
    """dq, dk and dv as arrays; results: o, lse, do, dlse."""
    o, lse, do, dlse = results
    found = _of_operator(inputs, numbers) if dlse is None and do is not None else None
    if found is None:
        return None
    call, at = found
    tensors, shape = (o, lse, do), (*call.lse, inputs[2].shape[3])
    alike = all(t.dtype is inputs[0].dtype and t.is_cpu and not t.is_neg() for t in tensors)
    addresses = [t.data_ptr() for t in tensors] if alike else [0]
    in_place = o.stride() == do.stride() == call.o.steps and lse.is_contiguous()
    if not (all(addresses) and in_place and o.shape == do.shape == shape and lse.shape == call.lse):
        return None
    return call.backward(at, *addresses)


def _of_operator(inputs, numbers):
    """The call and its addresses, where no other tensor is given."""
    q, k, v, bias, mask, q_lengths, kv_lengths, slopes, _ = inputs
    causal, left, right, scale, softcap, dropout_p, score_mod = numbers
    if dropout_p != 0 or not bias is mask is q_lengths is slopes is score_mod is None:
        return None
    return addressed(q, k, v, kv_lengths, causal or False, left, right, scale, softcap)


def addressed(q, k, v, kv_lengths, causal, left, right, *numbers):
    """A `Plain` and the addresses it takes; None: the arrays have to be looked at."""
    if not all(side is None or type(side) is int for side in (left, right)):
        return None  # a tensor would be remembered as itself, whatever it holds later
    dtype = FLOATS.get(q.dtype)
    if dtype is None or not (q.dtype is k.dtype is v.dtype and q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    layouts = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride())
    try:
        call = plain(dtype, causal, left, right, *numbers, *layouts)
    except TypeError:  # also for what cannot be remembered
        return None
    if call is None or q.is_neg() or k.is_neg() or v.is_neg():
        return None
    at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if not all(at):  # nothing there
        return None
    if kv_lengths is None:
        return call, (*at, 0)
    return (call, (*at, kv_lengths.data_ptr())) if _fit(kv_lengths, call) else None


def _fit(lengths, call):
    """Whether the kernels may read them as they are."""
    if not (lengths.dtype is torch.int64 and lengths.is_cpu and lengths.shape == (call.B,)):
        return False
    found = lengths.tolist()
    in_place = lengths.is_contiguous() and not lengths.is_neg()
    return in_place and min(found) >= 0 and max(found) <= call.S
