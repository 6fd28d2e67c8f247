"""Training aids over torch tensors: clipped gradients, truncated backpropagation, gradient flow."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import _clip
from fastseq.torch._tensors import unsupported

_States = Tensor | tuple[Tensor, ...]
_PLAIN = (Tensor, torch.nn.Parameter)


@torch.compiler.disable
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale the gradients of all parameters together, in place, so that their norm is at most
    max_norm.

        norm = (sum |g|^p)^(1/p) over all elements of all gradients, max |g| for p = inf
        g' = g * min(max_norm / (norm + 1e-6), 1)

    Args:
        parameters: whose gradients are clipped, or one tensor; those without one are skipped.
            Gradients are float32 or float64 on the CPU, any strides, in any mix.
        max_norm: >= 0.
        norm_type: p > 0, or inf.
        error_if_nonfinite: raise if the norm is NaN or infinite, before anything is changed. False:
            an infinite norm scales by 0, a NaN by NaN, as in torch.

    Returns:
        norm before the scaling, () of the gradients' widest dtype.

    Raises:
        TypeError: a gradient is no dense float32 or float64 tensor on the CPU.
        ValueError: max_norm < 0, norm_type <= 0.
        RuntimeError: the norm is not finite, with error_if_nonfinite.
        ImportError: Numba is not installed.

    Accuracy: summed in float64: float32 within 2x of torch's own error; the same bits for any
        number of threads.
    Cost: 2 FLOP an element and one pass over memory for the norm, one read and write for the
        scaling, which is left out where the factor is 1.
    Equivalent to: torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    Source: Pascanu, Mikolov & Bengio, arXiv:1211.5063.
    """
    gradients = _gradients(parameters)
    batch = _batch("clip_grad_norm_", gradients)
    if not gradients:
        dtype = torch.get_default_dtype()
    else:
        dtype = torch.float64 if batch.dtype == _clip.F64 else torch.float32
    norm, scaled = _clip.clip_norm(batch, max_norm, norm_type, error_if_nonfinite)
    if scaled:
        torch.autograd.graph.increment_version(gradients)
    return torch.tensor(norm, dtype=dtype, device="cpu")


@torch.compiler.disable
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Limit every element of the gradients of all parameters, in place.

        g' = min(max(g, -clip_value), clip_value)        NaN stays NaN

    Args:
        parameters: as in `clip_grad_norm_`.
        clip_value: >= 0.

    Returns:
        None.

    Raises:
        TypeError, ValueError, ImportError: as `clip_grad_norm_`.

    Accuracy: exact; clip_value is rounded to each gradient's dtype.
    Cost: one read and write of memory.
    Equivalent to: torch.nn.utils.clip_grad_value_(parameters, clip_value)
    Source: Mikolov, Statistical language models based on neural networks, 2012.
    """
    gradients = _gradients(parameters)
    _clip.clip_value(_batch("clip_grad_value_", gradients), clip_value)
    torch.autograd.graph.increment_version(gradients)


def _gradients(parameters) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    found = list(parameters)
    if not found and isinstance(parameters, types.GeneratorType):
        message = "`parameters` is an empty generator, no gradient clipping will occur."
        warnings.warn(message, stacklevel=4)
    return [g for p in found if (g := p.grad) is not None]


def _batch(op: str, gradients: list[Tensor]) -> _clip.Batch:
    batch = _clip.Batch(op, "gradients")
    blocks = {torch.float32: batch.blocks[_clip.F32], torch.float64: batch.blocks[_clip.F64]}
    for i, g in enumerate(gradients):
        block = blocks.get(g.dtype)
        if type(g) not in _PLAIN or g.layout is not torch.strided or not g.is_cpu or block is None:
            raise _refused(op, f"gradients[{i}]", g)
        if g.is_contiguous():
            block[0].append(g.data_ptr())
            block[1].append(g.numel())
        else:
            batch.add(i, g.detach().numpy())
    return batch


def _refused(op: str, name: str, g: Tensor) -> TypeError:
    if g.layout != torch.strided or type(g) not in _PLAIN:
        got = g.layout if type(g) in _PLAIN else type(g).__name__
        return TypeError(f"{op}: {name} must be a dense torch.Tensor, got {got}")
    return unsupported(op, name, g)


def tbptt(
    module: torch.nn.Module, x: Tensor, hx: _States | None = None, *, chunk: int
) -> Iterator[tuple[Tensor, _States]]:
    """Truncated backpropagation through time: a sequence chunk by chunk, the state carried on.

        y_k, state_k = module(x_k, state_{k-1})        d state_{k-1} = 0

        for y, state in tbptt(module, x, chunk=32):
            loss(y).backward()
            optimizer.step()

    Args:
        module: called as module(x_k, state) -> y_k, state: fastseq.torch.nn's or torch.nn's RNN,
            GRU or LSTM in one direction, or one of the user's.
        x: (T, B, I); (B, T, I) for a module with batch_first; (T, I) unbatched.
        hx: the first chunk's state, as module takes it; None: module's own.
        chunk: steps of a chunk, K >= 1; the last one has what is left.

    Returns:
        An iterator over the chunks: y, whose gradients reach the weights through this chunk's steps
        only, and the state after it, detached.

    Raises:
        TypeError: x is no tensor: a PackedSequence cannot be cut in time.
        ValueError: chunk < 1, a bidirectional module.

    Accuracy: as module; the state carried is exact.
    Cost: as module over all steps; kept for backward: one chunk.
    Equivalent to: y, state = module(x_k, state); state = state.detach(), chunk by chunk.
    Source: Williams & Peng, An efficient gradient-based algorithm for on-line training of
        recurrent network trajectories, 1990.
    """
    axis = _time_axis("tbptt", module, x)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"tbptt: chunk must be an integer >= 1, got {chunk!r}")
    return _chunks(module, x.split(chunk, axis), hx)


def _chunks(module, parts, state):
    for part in parts:
        y, state = module(part, state)
        state = _map(Tensor.detach, state)
        yield y, state


def _map(function, state):
    """function of every tensor of a state."""
    return function(state) if isinstance(state, Tensor) else tuple(map(function, state))


def _time_axis(op: str, module, x) -> int:
    """Where x's steps are, of a module that goes forward in time."""
    if not isinstance(x, Tensor):
        packed = " (which cannot be cut in time)" if isinstance(x, PackedSequence) else ""
        raise TypeError(f"{op}: x must be a torch.Tensor, got {type(x).__name__}{packed}")
    if getattr(module, "bidirectional", False):
        raise ValueError(f"{op}: module must go forward in time, got bidirectional = True")
    return 1 if getattr(module, "batch_first", False) and x.dim() == 3 else 0


def gradient_flow(
    module: torch.nn.Module,
    x: Tensor,
    hx: _States | None = None,
    *,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """How large the gradient of the loss is at every step: where it vanishes, where it explodes.

        norm_t = ||dL / dh_t||, h_t reaching L through y_t and through every later step

    Args:
        module: one step or many: a cell, called as module(x_t, state) -> state, if it is a
            torch.nn.RNNCellBase; else called as module(x_t, state) -> y_t, state with one step. The
            state is h, or a tuple that begins with h; of stacked layers the last one counts.
        x: (T, B, I); (B, T, I) for a module with batch_first; (T, I) unbatched.
        hx: the first state, as module takes it; None: module's own.
        loss: of all outputs, y as module returns it over all steps, to a scalar; None: the sum of
            the last step's.

    Returns:
        (T,) float64: the Euclidean norm over batch and units. `fastseq.plot_gradient_flow` draws
        it. No parameter's grad is touched.

    Raises:
        TypeError: x is no tensor.
        ValueError: no step, a bidirectional module, a loss that is no scalar.

    Accuracy: the gradients as module's; their norms in float64.
    Cost: forward and backward in single steps.
    Equivalent to: [torch.autograd.grad(loss, h)[0].norm() for h in states] of a loop over cells
    Source: Pascanu, Mikolov & Bengio, arXiv:1211.5063.
    """
    axis = _time_axis("gradient_flow", module, x)
    if x.shape[axis] == 0:
        raise ValueError("gradient_flow: x must have at least one step, got T = 0")
    with torch.enable_grad():
        y, outputs, states = _single_steps(module, x, hx, axis)
        total = y.select(axis, -1).sum() if loss is None else loss(y)
        if total.dim():
            raise ValueError(f"gradient_flow: loss must be a scalar, got {tuple(total.shape)}")
        found = torch.autograd.grad(total, outputs + states, allow_unused=True)
    pairs = zip(found[: len(outputs)], found[len(outputs) :], outputs, strict=True)
    return torch.stack([_norm(direct, later, like) for direct, later, like in pairs])


def _single_steps(module, x, state, axis):
    """y over all steps, and by step the output as y takes it and h as the next step takes it."""
    cell = isinstance(module, torch.nn.RNNCellBase)
    outputs, states = [], []
    for part in x.unbind(axis) if cell else x.split(1, axis):
        found = module(part, state)
        out, state = (None, found) if cell else found
        h, *rest = (state,) if isinstance(state, Tensor) else state
        outputs.append(_apart(h if cell else out))
        states.append(_apart(h))
        state = states[-1] if isinstance(state, Tensor) else (states[-1], *rest)
    y = torch.stack(outputs, axis) if cell else torch.cat(outputs, axis)
    return y, outputs, states


def _apart(t):
    """t as one of its users sees it, with a gradient of that use alone."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _norm(direct, later, like):
    """||dL/dh||: what comes by the output, and by the next step; of stacked layers the last's."""
    total = torch.zeros_like(like) if direct is None else direct
    if later is not None:
        later = later if later.numel() == like.numel() else later[-1]
        if later.numel() != like.numel():
            h, y = tuple(later.shape), tuple(like.shape)
            raise ValueError(f"gradient_flow: module's output must be its state h {h}, got {y}")
        total = total + later.reshape(like.shape)
    return total.double().norm()
