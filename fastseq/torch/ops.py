"""Operators torch.ops.fastseq.{rnn_tanh, gru, lstm, ...}, their backwards, and `run`.

One operator computes a whole stack of layers and both directions. All have one schema, those of
users' cells too (torch.ops.fastseq.cell_<name>_<hash>); an output that a call does not ask for is
an empty tensor. `run` is what functions and modules call. It goes through the operator where
something listens to operators (a compiler, a tracer, a mode), and else past the dispatcher, which
costs 10 us without, 15 us with gradients (2-core AVX-512 server), as much as a small step. Both
ways end in `fastseq._stack`, the entry point of the NumPy functions, or for CUDA tensors in
`recurrent_cuda`.
"""

from functools import lru_cache, partial

import torch
from torch import _C, from_numpy
from torch.autograd import Function

from fastseq import _check, _stack
from fastseq._cell import TracedCell
from fastseq._spec import KINDS, LISTENERS, NO_MASKS, Masks, Spec
from fastseq.torch import recurrent_cuda
from fastseq.torch._tensors import (
    FLOATS,
    OnceDifferentiable,
    array,
    borrow,
    differentiated,
    heard,
    on_gpu,
    or_empty,
    recorded,
    register,
    tensor_of,
    unsupported,
)

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # those with a path for CUDA tensors
_M = len(Masks._fields)

_MASKS = ", ".join(f"Tensor? {name}" for name in Masks._fields)
_SCHEMA = (
    f"(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, {_MASKS}, "
    "int num_layers, bool bidirectional, bool reverse, bool cell_states, bool save, "
    "float? clip_recurrent_grad)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor reserve)"
)
_BWD_SCHEMA = (
    f"(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, {_MASKS}, "
    "Tensor y, Tensor reserve, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, "
    "int num_layers, bool bidirectional, bool reverse, bool[4] needs, "
    "float? clip_recurrent_grad)"
    " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)


def run(spec, x, h0, c0, weights, masks=NO_MASKS, cell_states=False, cache=None):
    """`_stack.forward` over tensors, with gradients; what they need is kept only if one is wanted.

    Args:
        cache: the PackedWeights of the module that owns the weights.

    Returns:
        y, h_n, c_n, c; the last two None or empty where the cell or the call has none.
    """
    if on_gpu(x):
        if spec.cell not in CELLS:
            raise NotImplementedError(f"{spec.op}: it runs on the CPU, got x on {x.device}")
        x, h0, c0, *weights = recurrent_cuda.autocast(x, h0, c0, *weights)
    elif x.dtype not in FLOATS or not (x.is_cpu or x.is_meta):
        raise unsupported(spec.cell, "x", x)
    if masks is not NO_MASKS and differentiated(masks):
        raise RuntimeError(f"{spec.op}: masks are not differentiable, got one that requires_grad")
    inputs = (x, h0, c0, *weights)
    save = differentiated(inputs)
    if heard(inputs):
        args = (x, h0, c0, list(weights), *masks, *_options(spec, cell_states, save))
        return _OPERATORS[spec.cell](*args)[:4]
    if save:
        options = (*masks, cell_states, save)
        return _Recurrence.apply(cache, False, spec, x, h0, c0, *options, *weights)[:4]
    given = (spec, x, h0, c0, weights, masks, cell_states, save, cache)
    if _C._autograd._profiler_enabled():
        with torch.profiler.record_function(f"fastseq::{spec.cell}"):
            return _forward(*given)[:4]
    return _forward(*given)[:4]


def infer(spec, x, h0, c0, weights, cache):
    """y, h_n, c_n of `run`, in half its time for a small call; None: `run` has to be asked.

    For tensors on the CPU, without gradients, where nothing listens. `_stack.forward` alone checks
    the arguments: where it refuses them, the caller's own checks say why.
    """
    half = h0 is not None and c0 is None and spec.kind.has_c
    if half or not _unheard_inference(x, h0, c0, *weights):
        return None
    try:
        views, packed = _views(spec, weights, cache, pack=True)
        h0, c0 = None if h0 is None else array(h0), None if c0 is None else array(c0)
        y, h_n, c_n, _, _ = _stack.forward(spec, array(x), h0, c0, views, packed=packed)
    except (TypeError, ValueError):
        return None
    return from_numpy(y), from_numpy(h_n), None if c_n is None else from_numpy(c_n)


def infer_layer(spec, x, h, c, weights, cache=None, step=False):
    """As `infer` for one layer in one direction: states (B, .), and for a step x (B, I), y None.

    Axes of one are added and dropped in NumPy, which takes a sixth of what torch does.
    """
    if not _unheard_inference(x, h, c, *weights):
        return None
    try:
        views, packed = _views(spec, weights, cache, pack=True)
        x = array(x)[None] if step else array(x)
        h, c = None if h is None else array(h)[None], None if c is None else array(c)[None]
        y, h, c, _, _ = _stack.forward(spec, x, h, c, views, packed=packed)
    except (TypeError, ValueError):
        return None
    return (
        None if step else from_numpy(y),
        from_numpy(h[0]),
        None if c is None else from_numpy(c[0]),
    )


def run_step(spec, x, h, c, weights, cache=None):
    """h', c' of one step: x (B, I), h (B, R) and c (B, H) None for zeros; else as `run`."""
    found = infer_layer(spec, x, h, c, weights, cache, step=True)
    if found is not None:
        return found[1:]
    x, h, c = (None if t is None else t.unsqueeze(0) for t in (x, h, c))
    _, *states, _ = run(spec, x, h, c, weights, cache=cache)
    return tuple(None if s is None else s.squeeze(0) for s in states)


def _unheard_inference(*tensors):
    """Whether a call on these, any but the first None, may go straight to the CPU's kernels."""
    listening = heard(tensors) or _C._autograd._profiler_enabled()
    return not (listening or differentiated(tensors) or on_gpu(tensors[0]))


def _views(spec, weights, cache, pack=False):
    """The weights as arrays, and packed if that is worth keeping."""
    if cache is None:
        return borrow(spec.cell, weights), None
    return cache.packed(spec, weights) if pack else (cache.views(spec, weights), None)


def _forward(spec, x, h0, c0, weights, masks, cell_states, save, cache=None):
    """The kernels on tensors: y, h_n, c_n, c, reserve, None where absent."""
    options = {"cell_states": cell_states, "save": save}
    if on_gpu(x):
        _refuse_noise(spec, x, masks)
        return recurrent_cuda.forward(spec, x, h0, c0, weights, *masks[:2], **options)
    views, packed = _views(spec, weights, cache, pack=not save)
    x, h0, c0, *masks = [None if t is None else array(t) for t in (x, h0, c0, *masks)]
    outputs = _stack.forward(spec, x, h0, c0, views, Masks(*masks), packed=packed, **options)
    return tuple([None if a is None else from_numpy(a) for a in outputs])


def _backward(spec, x, h0, c0, weights, masks, *tensors, needs, cache=None):
    """The kernels on tensors: dx, dh0, dc0, [dweights], None or [] where not needed."""
    wanted = {"needs_x": needs[0], "needs_weights": needs[3]}
    if on_gpu(x):
        _refuse_noise(spec, x, masks)
        found = recurrent_cuda.backward(spec, x, h0, c0, weights, *masks[:2], *tensors, **wanted)
    else:
        views, _ = _views(spec, weights, cache)
        x, h0, c0, *arrays = map(array, (x, h0, c0, *tensors))
        masks = Masks(*map(array, masks))
        *states, dweights = _stack.backward(spec, x, h0, c0, views, masks, *arrays, **wanted)
        found = (*map(tensor_of, states), [tensor_of(d) for d in dweights or ()])
    *states, dweights = found
    dx, dh0, dc0 = (d if n else None for d, n in zip(states, needs, strict=False))
    return dx, dh0, dc0, dweights or []


def _refuse_noise(spec, x, masks):
    if masks.zoneout or masks.recurrent_mask is not None:
        what = "recurrent dropout and zoneout run on the CPU"
        raise NotImplementedError(f"{spec.op}: {what}, got x on {x.device}")


class _Recurrence(Function):
    """Autograd of every cell, around the operator if `by_operator`, else around the kernels.

    Written out because what torch.library.register_autograd generates flattens all arguments of
    each call, for 25 us more (4 weights, 2-core AVX-512 server).
    """

    @staticmethod
    def forward(ctx, cache, by_operator, spec, x, h0, c0, *rest):
        masks, (cell_states, save), weights = Masks(*rest[:_M]), rest[_M : _M + 2], rest[_M + 2 :]
        ctx.cache, ctx.spec, ctx.saved = cache, spec, save
        ctx.set_materialize_grads(False)
        given = (spec, x, h0, c0, weights, masks, cell_states, save)
        outputs = _forward_by_operator(*given) if by_operator else _forward(*given, cache)
        if save:
            y, _, c_n, c, reserve = outputs
            ctx.save_for_backward(x, h0, c0, *masks, y, reserve, *weights)
            has_c = spec.kind.has_c
            absent = (None if has_c else c_n, None if has_c and cell_states else c)
            ctx.mark_non_differentiable(reserve, *(t for t in absent if t is not None))
        return outputs

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dc, _):
        spec = ctx.spec
        if not ctx.saved:
            raise RuntimeError(f"fastseq::{spec.cell}: gradients need a call with save=True")
        x, h0, c0, *rest = ctx.saved_tensors
        masks, tensors = Masks(*rest[:_M]), (*rest[_M : _M + 2], dy, dh_n, dc_n, dc)
        weights, wanted = rest[_M + 2 :], ctx.needs_input_grad
        needs = (*wanted[3:6], any(wanted[8 + _M :]))
        args = (spec, x, h0, c0, weights, masks, *tensors)
        if torch.is_grad_enabled() or heard((x, *tensors, *weights)):
            grads = _backward_by_operator(*args, needs=needs)
        else:
            grads = _backward(*args, needs=needs, cache=ctx.cache)
        dx, dh0, dc0, dweights = grads
        dweights = dweights or [None] * len(weights)
        return None, None, None, dx, dh0, dc0, *[None] * (_M + 2), *dweights


def _forward_by_operator(spec, x, h0, c0, weights, masks, cell_states, save):
    options = _options(spec, cell_states, save)
    with _C._AutoDispatchBelowAutograd():
        return _OPERATORS[spec.cell](x, h0, c0, list(weights), *masks, *options)


def _backward_by_operator(spec, x, h0, c0, weights, masks, *tensors, needs):
    options = _options(spec, needs)
    *states, dweights = _BWD_OPERATORS[spec.cell](x, h0, c0, weights, *masks, *tensors, *options)
    dx, dh0, dc0 = (d if n else None for d, n in zip(states, needs, strict=False))
    return dx, dh0, dc0, dweights


def _options(spec, *of_the_call):
    """An operator's arguments after the tensors; `_spec` is the way back."""
    return spec.num_layers, spec.bidirectional, spec.reverse, *of_the_call, spec.limit


@lru_cache(maxsize=256)
def _spec(cell, num_weights, num_layers, bidirectional, reverse, limit, zoneout):
    """The Spec that an operator's arguments mean.

    A scan has as many biases as weights or none, and may have a projection or parameters per unit.
    """
    kind = KINDS[cell]
    limit = _check.limit(kind.op, "clip_recurrent_grad", limit)
    per_scan = num_weights // (num_layers * (1 + bidirectional)) - (kind.params > 0)
    bias, proj = per_scan >= 2 * (1 + kind.recurrent), kind.recurrent and per_scan % 2 == 1
    options = {"limit": limit, "zoneout": zoneout}
    return Spec(cell, num_layers, bidirectional, reverse, bias, proj, **options)


def _read(cell, weights, rest):
    """Spec, masks, cell_states and save of an operator's arguments after the weights."""
    masks, (*fixed, cell_states, save, limit) = Masks(*rest[:_M]), rest[_M:]
    return _spec(cell, len(weights), *fixed, limit, masks.zoneout), masks, cell_states, save


def _kernel(cell, x, h0, c0, weights, *rest):
    spec, masks, cell_states, save = _read(cell, weights, rest)
    outputs = _forward(spec, x, h0, c0, weights, masks, cell_states, save)
    return tuple(or_empty(t, x) for t in outputs)


def _kernel_bwd(cell, x, h0, c0, weights, *rest):
    *tensors, num_layers, bidirectional, reverse, needs, limit = rest
    masks, tensors = Masks(*tensors[:_M]), tensors[_M:]
    flags = num_layers, bidirectional, reverse, limit, masks.zoneout
    spec = _spec(cell, len(weights), *flags)
    *states, dweights = _backward(spec, x, h0, c0, weights, masks, *tensors, needs=needs)
    return *(or_empty(t, x) for t in states), dweights


def _fake(cell, x, h0, c0, weights, *rest):
    spec, _, cell_states, save = _read(cell, weights, rest)
    T, B, _ = x.shape
    w_ih, _, _, _, w_hr, _ = spec.weights_of(weights, 0)
    H = w_ih.shape[0] // spec.kind.gates
    P = 0 if w_hr is None else w_hr.shape[0]
    R = P or H
    D = spec.directions
    # the reserve holds (T, B, ·) arrays, whatever the input size: T and B may stay symbolic
    if on_gpu(x):
        per_step = recurrent_cuda.reserve_per_step(spec, int(H), int(P))
    else:
        per_step = _stack.reserve_size(spec, 1, 1, 1, int(H), int(P), FLOATS[x.dtype])
    sizes = (
        (T, B, D * R),
        (spec.scans, B, R),
        (spec.scans, B, H) if spec.kind.has_c else 0,
        (T, B, D * H) if spec.kind.has_c and cell_states else 0,
        T * B * per_step if save else 0,
    )
    return tuple(x.new_empty(size) for size in sizes)


def _fake_bwd(x, h0, c0, weights, *rest):
    needs = rest[-2]
    inputs = zip((x, h0, c0), needs, strict=False)
    states = [x.new_empty(t.shape) if n else x.new_empty(0) for t, n in inputs]
    return *states, [x.new_empty(w.shape) for w in weights] if needs[3] else []


def _autograd(cell, x, h0, c0, weights, *rest):
    spec, masks, *options = _read(cell, weights, rest)
    if recorded(x, h0, c0, weights):
        return _Recurrence.apply(None, True, spec, x, h0, c0, *masks, *options, *weights)
    return _forward_by_operator(spec, x, h0, c0, weights, masks, *options)


def _autograd_bwd(cell, *args):
    operator = _BWD_OPERATORS[cell]
    if not recorded(*args):
        with _C._AutoDispatchBelowAutograd():
            return operator(*args)
    tensors = (*args[:3], *args[3], *args[4 : 4 + _M + 6])
    dx, dh0, dc0, *dweights = OnceDifferentiable.apply(operator, args, *tensors)
    return dx, dh0, dc0, dweights


_OPERATORS: dict = {}
_BWD_OPERATORS: dict = {}


def _define(cell):
    """Register the operators of a cell: the built-in ones here, a user's when it is made."""
    name = f"cell_{cell}" if isinstance(KINDS[cell], TracedCell) else cell
    forward, backward = partial(_kernel, cell), partial(_kernel_bwd, cell)
    rules = partial(_autograd, cell), partial(_fake, cell)
    _OPERATORS[cell] = register(name, _SCHEMA, forward, *rules, forward)
    rules = partial(_autograd_bwd, cell), _fake_bwd
    _BWD_OPERATORS[cell] = register(f"{name}_bwd", _BWD_SCHEMA, backward, *rules, backward)


for _cell in KINDS:
    _define(_cell)
LISTENERS.append(_define)
