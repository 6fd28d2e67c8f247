"""Recurrent scans of CUDA tensors: large products, allocation, the Triton kernels between.

What `fastseq._stack` is for arrays. The input product stands before the scan, and those of the
weights' and inputs' gradients after the backward scan, which emits only the gates' gradients.

A projection costs no kernel of its own: with h = W_hr m the recurrent product is
W_hh h = (W_hh W_hr) m, so the scan runs over m with the weights W_hh W_hr, and y = W_hr m is a
large product after it. An initial h enters through the gx of a row's first step.
"""

import torch

from fastseq import _check
from fastseq.kernels.triton import kernels
from fastseq.torch.recurrent_cuda_call import call, lay_out, reserve_per_step, same

__all__ = ["autocast", "backward", "forward", "reserve_per_step"]


def autocast(*tensors):
    """The tensors in torch.autocast's dtype where it is on, as torch's recurrent layers do."""
    if not torch.is_autocast_enabled("cuda"):
        return tensors
    dtype = torch.get_autocast_dtype("cuda")
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def forward(spec, x, h0, c0, weights, lengths, resets, *, cell_states=False, save=False):
    """y, h_n, c_n, c, reserve of `_stack.forward`."""
    made = call(spec, x, h0, c0, weights, lengths, resets)
    T, B, H, D = made.T, made.B, made.H, spec.directions
    reserve = None
    if save:
        reserve = made.new(T * B * reserve_per_step(spec, H, made.P))
        made.parts = lay_out(reserve, spec, T, B, H, made.P)
    h_n = x.new_empty((spec.scans, B, made.R))
    c_n = x.new_empty((spec.scans, B, H)) if spec.kind.has_c else None
    c = made.new(T, B, D * H) if cell_states else None
    y = x
    for layer in range(spec.num_layers):
        below, y = y, made.part("y", layer)
        y = made.new(T, B, D * made.R) if y is None else y
        for d in range(D):
            scanned_c = made.half(c, d, H) if layer == spec.num_layers - 1 else None
            last = _scan(made, layer * D + d, below, made.half(y, d, made.R), scanned_c)
            h_n[layer * D + d] = last[0]
            if c_n is not None:
                c_n[layer * D + d] = last[1]
    return y, h_n, c_n, c, reserve


def _scan(made, index, below, y, c):
    """Fill y and c (or None: not wanted) of one direction of a layer; returns h_n, c_n."""
    T, B, H, w_hr = made.T, made.B, made.H, made.weights[index]["w_hr"]
    gx = _input_product(made, index, below)
    states = made.x.new_zeros((3, B, H), dtype=torch.float32)
    if made.c0 is not None:
        states[2] = made.c0[index]
    m = y
    if w_hr is not None:
        m = made.part("m", index)
        m = made.new(T, B, H) if m is None else m
        _add_initial(made, index, gx)
    elif made.h0 is not None:
        states[0] = made.h0[index]
    kept_c = made.part("c", index)
    scan = made.scan(
        index,
        h0=None,
        c0=None,
        y=m,
        c=c if kept_c is None else kept_c,
        kept=made.part("kept", index),
        gx=gx,
        h_state=states[:2],
        shared=made.x.new_empty((2, B, H)),
        c_state=states[2],
    )
    last = kernels(made.spec.op, "recurrent").forward(scan) if B else states[0]
    if c is not None and kept_c is not None:
        c.copy_(kept_c)
    if w_hr is not None:
        y.copy_(m @ w_hr.t())
        last = _last_outputs(made, index, y)
    return last, states[2]


def _input_product(made, index, below):
    """gx (T, B, G H) = W_ih x + b_ih + b_hh, but for the GRU's b_hn."""
    w, H = made.weights[index], made.H
    T, B, G = made.T, made.B, made.spec.kind.gates
    kept = made.part("kept", index)
    gx = kept if kept is not None and made.spec.cell == "lstm" else made.new(T, B, G * H)
    flat, rows, w_ih = gx.view(T * B, G * H), _flat(below), w["w_ih"].t()
    if not made.spec.bias:
        torch.mm(rows, w_ih, out=flat)
        return gx
    bias = w["b_ih"] + w["b_hh"]
    if made.spec.cell == "gru":
        bias[2 * H :] = w["b_ih"][2 * H :]
    torch.addmm(bias, rows, w_ih, out=flat)
    return gx


def _add_initial(made, index, gx):
    """With a projection: gx of each row's first step += W_hh h0."""
    if made.h0 is not None:
        d = index % made.spec.directions
        product = made.from_start(d, made.h0[index] @ made.weights[index]["w_hh"].t())
        gx.index_put_(made.ends(made.reverse(d)), product, accumulate=True)


def _last_outputs(made, index, y):
    """With a projection: h_n, the y of each row's last step, or h0 if it has none."""
    last = y[made.ends(not made.reverse(index % made.spec.directions))]
    if made.lengths is None or made.h0 is None:
        return last
    return torch.where((made.lengths == 0).unsqueeze(1), made.h0[index], last)


def backward(
    spec, x, h0, c0, weights, lengths, resets, y, reserve, dy, dh_n, dc_n, dc, *,
    needs_x=True, needs_weights=True,
):  # fmt: skip
    """dx or None, dh0, dc0 or None, one gradient per weight or None; of `_stack.backward`."""
    made = call(spec, x, h0, c0, weights, lengths, resets)
    T, B, H, R, D = made.T, made.B, made.H, made.R, spec.directions
    made.parts = lay_out(reserve, spec, T, B, H, made.P)
    _check_cotangents(made, dy, dh_n, dc_n, dc)
    dh0 = x.new_zeros((spec.scans, B, R))
    dc0 = x.new_zeros((spec.scans, B, H)) if spec.kind.has_c else None
    if lengths is not None:
        x = x.masked_fill(_past(made), 0)  # what is there may be NaN
    dweights = [None] * spec.scans
    for layer in reversed(range(spec.num_layers)):
        top = layer == spec.num_layers - 1
        below = x if layer == 0 else made.part("y", layer - 1)
        layer_y = y if top else made.part("y", layer)
        dbelow = None
        for d in range(D):
            index = layer * D + d
            given = {
                "y": made.half(layer_y, d, R),
                "dy": made.half(dy, d, R),
                "dc": made.half(dc, d, H) if top else None,
                "dh_n": None if dh_n is None else dh_n[index],
                "dc_n": None if dc_n is None else dc_n[index],
            }
            dg, dh0[index], last_dc = _scan_back(made, index, **given)
            if dc0 is not None:
                dc0[index] = last_dc
            if layer > 0 or needs_x:
                dbelow = _input_gradient(made, index, dg, dbelow)
            if needs_weights:
                dweights[index] = _weight_gradients(made, index, dg, below, **given)
        dy = dbelow
    found = [dw for part in dweights for dw in part] if needs_weights else None
    return dy, dh0, dc0, found


def _past(made):
    steps = torch.arange(made.T, device=made.x.device).unsqueeze(1)
    return (steps >= made.lengths).unsqueeze(2)


def _check_cotangents(made, dy, dh_n, dc_n, dc):
    D, L = made.spec.directions, made.spec.scans
    letters = "T, B, H" if D == 1 else "T, B, 2H"
    expected = {
        "dy": (dy, letters, (made.T, made.B, D * made.R)),
        "dc": (dc, letters, (made.T, made.B, D * made.H)),
        "dh_n": (dh_n, "LD, B, H", (L, made.B, made.R)),
        "dc_n": (dc_n, "LD, B, H", (L, made.B, made.H)),
    }
    for name, (a, letters, numbers) in expected.items():
        if a is not None:
            same(made.spec.op, name, a, made.x)
            _check.shape(made.spec.op, name, tuple(a.shape), letters, numbers)


def _scan_back(made, index, y, dy, dc, dh_n, dc_n):
    """The gates' gradients dg (T, B, PLANES H), dh0, dc0 of one direction of a layer."""
    T, B, H, w = made.T, made.B, made.H, made.weights[index]
    states = made.x.new_zeros((2, B, H), dtype=torch.float32)
    if dc_n is not None:
        states[1] = dc_n
    m = y
    if w["w_hr"] is not None:
        m = made.part("m", index)
        dy = _with_last(made, index, dy, dh_n)
        dy = None if dy is None else dy @ w["w_hr"]
    elif dh_n is not None:
        states[0] = dh_n
    planes = kernels(made.spec.op, "cells").PLANES[made.spec.cell]
    dg = made.new(T, B, planes * H)
    scan = made.scan(
        index,
        h0=None if made.h0 is None or made.P else made.h0[index],
        c0=None if made.c0 is None else made.c0[index],
        y=m,
        c=made.part("c", index),
        kept=made.part("kept", index),
        dh_state=states[0],
        c_state=states[1],
        dy=_rows(dy),
        dc=_rows(dc),
        dg=dg,
        limit=made.spec.limit,
    )
    if B:
        kernels(made.spec.op, "recurrent").backward(scan)
    dh0 = states[0]
    if made.P:
        d = index % made.spec.directions
        dh0 = made.from_start(d, dg[made.ends(made.reverse(d))] @ w["w_hh"])
        if made.lengths is not None and dh_n is not None:
            dh0 = torch.where((made.lengths == 0).unsqueeze(1), dh_n, dh0)
    return dg, dh0, states[1]


def _with_last(made, index, dy, dh_n):
    """With a projection: dy, and dh_n added to that of each row's last step."""
    if dh_n is None:
        return dy
    dy = made.x.new_zeros((made.T, made.B, made.R)) if dy is None else dy.clone()
    if made.lengths is not None:
        dh_n = dh_n.masked_fill((made.lengths == 0).unsqueeze(1), 0)
    last = made.ends(not made.reverse(index % made.spec.directions))
    return dy.index_put_(last, dh_n, accumulate=True)


def _flat(a):
    """(T, B, n) as a matrix."""
    return a.reshape(a.shape[0] * a.shape[1], a.shape[2])


def _rows(a):
    """`a` with consecutive elements in its last axis."""
    return a if a is None or a.stride(-1) == 1 else a.contiguous()


def _gates(made, dg):
    """dg as the gradients of W_ih x (the GRU's n|r|z) and of W_hh h."""
    H, G = made.H, made.spec.kind.gates
    first = kernels(made.spec.op, "cells").HIDDEN_PLANE[made.spec.cell] * H
    return dg[:, :, : G * H], dg[:, :, first : first + G * H]


def _input_gradient(made, index, dg, other):
    """dx, added to that of the other direction, if any."""
    w_ih = made.weights[index]["w_ih"]
    if made.spec.cell == "gru":
        w_ih = w_ih.roll(made.H, 0)  # n|r|z
    flat = _flat(_gates(made, dg)[0])
    dx = flat @ w_ih if other is None else torch.addmm(_flat(other), flat, w_ih)
    return dx.view(made.T, made.B, w_ih.shape[1])


def _weight_gradients(made, index, dg, below, y, dy, dh_n, **_):
    """In the order of the weights."""
    spec, (dgx, dgh) = made.spec, _gates(made, dg)
    flat = _flat(dgx)
    found = {
        "w_ih": flat.t() @ _flat(below),
        "w_hh": _recurrent_gradient(made, index, dgh, y),
    }
    if spec.bias:
        found |= {"b_ih": flat.sum(0), "b_hh": dgh.sum((0, 1))}
    if spec.cell == "gru":
        found |= {name: found[name].roll(-made.H, 0) for name in ("w_ih", "b_ih") if name in found}
    if spec.proj:
        found["w_hr"] = _projection_gradient(made, index, dgh, _with_last(made, index, dy, dh_n))
    return [found[name] for name in spec.names]


def _steps_after(made, index, a, b):
    """a of all steps but the first in scan order, and b of the steps before them, as rows."""
    reverse = made.reverse(index % made.spec.directions)
    a, b = (a[:-1], b[1:]) if reverse else (a[1:], b[:-1])
    if made.resets is not None:
        reset = made.resets[:-1] if reverse else made.resets[1:]
        a = a.masked_fill(reset.bool().unsqueeze(2), 0)
    return _flat(a), _flat(b)


def _recurrent_gradient(made, index, dgh, y):
    """dW_hh = sum_t dgh_t^T h_{t-1}"""
    after, before = _steps_after(made, index, dgh, y)
    found = after.t() @ before
    if made.h0 is None:
        return found
    d = index % made.spec.directions
    first = made.from_start(d, dgh[made.ends(made.reverse(d))])
    return torch.addmm(found, first.t(), made.h0[index])


def _projection_gradient(made, index, dg, dy):
    """dW_hr = sum_t (dy_t + W_hh^T dg_{t+1})^T m_t"""
    m = made.part("m", index)
    after, before = _steps_after(made, index, dg, m)
    found = (after @ made.weights[index]["w_hh"]).t() @ before
    if dy is None:
        return found
    return torch.addmm(found, _flat(dy).t(), _flat(m))
