"""An existing model's recurrent and attention modules exchanged for fastseq's."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastseq.torch import nn as fnn
from fastseq.torch._tensors import FLOATS, GPU_FLOATS

# torch.nn's classes, and ours with their parameters and attributes
_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(fnn, name)
    for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "MultiheadAttention")
}
_NAMES = {kind.__name__ for kind in _TWINS}


class Replaced(NamedTuple):
    """What `replace` did, by the modules' names in the model; the model itself is "".

    replaced: the names of the modules that are fastseq's now.
    left: the names of those of a kind that fastseq has but that stayed as they were, and why.
    """

    replaced: list[str]
    left: dict[str, str]


def replace(model: nn.Module) -> Replaced:
    """torch.nn's recurrent and attention modules of a model become fastseq's, in place.

        torch.nn.{RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell, MultiheadAttention}
            -> fastseq.torch.nn's class of the same name

    A module stays the same object with the same parameters, buffers and hooks, in the same mode:
    optimizers, state_dict keys, and whatever else refers to it keep working, and a module used in
    two places is replaced in both. A second call finds nothing to replace.

    Left as they are, with the reason in the result: subclasses of torch.nn's (they may compute
    something else), scripted and quantised modules, and parameters of a dtype that fastseq does not
    run on their device. Calls of torch.nn.functional inside a model's own forward are not modules;
    for those there is `fastseq.torch.scaled_dot_product_attention`. In inference
    torch.nn.TransformerEncoderLayer takes a fast path of torch's own, past its attention module,
    unless torch.backends.mha.set_fastpath_enabled(False).

    Args:
        model: any torch.nn.Module, itself one of those above or with some of them inside.

    Returns:
        Replaced(replaced, left).

    Raises:
        TypeError: model is not a torch.nn.Module.

    Cost: no parameter is read, copied or moved.
    Equivalent to: building the model with `import fastseq.torch.nn as nn`, with the same state.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"replace: model must be a torch.nn.Module, got {kind}")
    replaced: list[str] = []
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if reason := _reason_to_leave(module):
            left[name] = reason
        elif type(module) in _TWINS:
            module.__class__ = _TWINS[type(module)]
            module._adopt()
            replaced.append(name)
    return Replaced(replaced, left)


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why a module of a kind that fastseq has is not exchanged; None for all others."""
    kind = type(module)
    if kind in _TWINS:
        return next(filter(None, map(_reason_of_dtype, module.parameters())), None)
    if issubclass(kind, tuple(_TWINS.values())):
        return None
    if parents := [c.__name__ for c in kind.__mro__ if c in _TWINS]:
        return f"{kind.__name__} is a subclass of torch.nn.{parents[0]}"
    name = getattr(module, "original_name", kind.__name__)  # a scripted module's
    if kind.__module__.startswith("torch.") and name in _NAMES:
        return f"{name} is {kind.__module__}.{kind.__name__}, not torch.nn.{name}"
    return None


def _reason_of_dtype(parameter: nn.Parameter) -> str | None:
    dtype, device = parameter.dtype, parameter.device
    floats = {"cpu": FLOATS, "meta": FLOATS, "cuda": GPU_FLOATS}.get(device.type, ())
    return None if dtype in floats else f"fastseq does not run {dtype} on {device}"
