"""Linear recurrences of CUDA tensors: checks, allocation, the Triton kernels.

What `fastseq._linear_scan` is for arrays. float32, bfloat16 and float16, states in float32. Lengths
on the GPU are not checked, which would wait for it; they are clamped to 0..T.
"""

from fastseq import _check
from fastseq.kernels.triton import kernels
from fastseq.torch.recurrent_cuda_call import check_lengths, check_resets, same


def _call(op, a, x, h0, lengths, resets, reverse, name):
    """Checked arguments as the kernels take them; x, called `name`, is of a's shape."""
    kernels(op, "launch").check(op, "a", a)
    _check.rank(op, "a", tuple(a.shape), "T, B, C")
    _like(op, name, x, a, "T, B, C", a.shape)
    _like(op, "h0", h0, a, "B, C", a.shape[1:])
    return kernels(op, "linear_scan").LinearScan(
        sizes=tuple(a.shape),
        reverse=reverse,
        a=a.contiguous(),
        h0=_contiguous(h0),
        lengths=check_lengths(op, lengths, a),
        resets=check_resets(op, resets, a),
        h=None,
        h_n=None,
    )


def _like(op, name, x, a, letters, shape):
    if x is not None:
        same(op, name, x, a, like="a")
        _check.shape(op, name, tuple(x.shape), letters, tuple(shape))


def _contiguous(a):
    return None if a is None else a.contiguous()


def forward(op, a, b, h0, lengths, resets, reverse):
    """h (T, B, C) and h_n (B, C)."""
    scan = _call(op, a, b, h0, lengths, resets, reverse, "b")
    scan.b, scan.h, scan.h_n = b.contiguous(), a.new_empty(a.shape), a.new_empty(a.shape[1:])
    if a.numel():
        kernels(op, "linear_scan").forward(scan)
    elif h0 is None:
        scan.h_n.zero_()
    else:
        scan.h_n.copy_(h0)
    return scan.h, scan.h_n


def backward(op, a, h0, lengths, resets, h, dh, dh_n, reverse):
    """da, db (T, B, C) and dh0 (B, C) of `forward`; dh and dh_n may be None (zeros)."""
    scan = _call(op, a, h, h0, lengths, resets, reverse, "h")
    _like(op, "dh", dh, a, "T, B, C", a.shape)
    _like(op, "dh_n", dh_n, a, "B, C", a.shape[1:])
    scan.h, scan.h_n, scan.dh = h.contiguous(), _contiguous(dh_n), _contiguous(dh)
    scan.da, scan.db = a.new_empty(a.shape), a.new_empty(a.shape)
    scan.dh0 = a.new_empty(a.shape[1:])
    if a.numel():
        kernels(op, "linear_scan").backward(scan)
    elif dh_n is None:
        scan.dh0.zero_()
    else:
        scan.dh0.copy_(dh_n)
    return scan.da, scan.db, scan.dh0
