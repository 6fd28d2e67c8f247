"""Initial weights of recurrent modules and tensors, in place, without gradients.

They take fastseq.torch.nn's and torch.nn's RNN, GRU, LSTM and cells, all layers and directions, or
the tensors of one layer. Gate order is torch's: LSTM i|f|g|o, GRU r|z|n.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from fastseq.init import gate_count, orthogonal_blocks

__all__ = ["forget_bias", "identity", "orthogonal"]


@torch.no_grad()
def identity(
    target: Module | Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    """IRNN: the ReLU RNN whose state, without input, stays as it is.

        W_hh = scale I        b_ih = b_hh = 0        so that h' = max(h, 0) for x = 0

    Args:
        target: an RNN or RNNCell, all its layers and directions; or w_hh (H, H).
        b_ih: (H,), only with w_hh, or None where there are no biases.
        b_hh: (H,).
        scale: of the identity; the paper takes 0.01 where only short memory is wanted.

    Returns:
        None. w_ih stays as it is: the paper draws it from N(0, 0.001).

    Raises:
        TypeError: target is neither.
        ValueError: more than one gate; a shape does not fit; biases beside a module.

    Accuracy: exact.
    Cost: H^2 stores.
    Equivalent to: torch.nn.init.eye_(w_hh); torch.nn.init.zeros_(b_ih)
    Source: Le, Jaitly & Hinton, arXiv:1504.00941.
    """
    for w, *biases in _layers("identity", target, b_ih, b_hh):
        H = w.shape[-1]
        _check_shape("identity", "w_hh", w, "H, H", (H, H))
        for name, b in zip(("b_ih", "b_hh"), biases, strict=True):
            _check_shape("identity", name, b, "H,", (H,))
        w.copy_(scale * torch.eye(H, dtype=w.dtype, device=w.device))
        for b in biases:
            if b is not None:
                b.zero_()


@torch.no_grad()
def orthogonal(
    target: Module | Tensor,
    gates: int | None = None,
    *,
    gain: float = 1.0,
    generator: torch.Generator | np.random.Generator | None = None,
) -> None:
    """An orthogonal matrix for each gate, uniform over all of them (Haar).

        W_g^T W_g = gain^2 I        W_g = gain Q sign(diag R) of the QR of a normal matrix

    Args:
        target: a recurrent module, whose every W_hh is set; or w (G H, H), or with gates given
            (G R, C): each block has orthogonal columns, or rows where it has more columns.
        gates: G, only with a tensor; None: rows / columns.
        gain: of every block.
        generator: torch's or NumPy's; None: torch's default one, which torch.manual_seed seeds. A
            NumPy generator gives the weights that `fastseq.init.orthogonal` gives.

    Returns:
        None.

    Raises:
        TypeError: target is neither; another kind of generator.
        ValueError: the rows are no multiple of the gates; gates beside a module.

    Accuracy: computed in float64, rounded once.
    Cost: a QR of every block.
    Equivalent to: torch.nn.init.orthogonal_(w[g * H : (g + 1) * H], gain) for every gate g
    Source: Saxe, McClelland & Ganguli, arXiv:1312.6120.
    """
    hidden_size = getattr(target, "hidden_size", None)
    if hidden_size is not None and gates is not None:
        raise ValueError(f"orthogonal: gates must be None beside a module, got {gates!r}")
    for w, *_ in _layers("orthogonal", target):
        if w.dim() != 2:
            raise ValueError(f"orthogonal: w must be (G H, H), 2 axes, got {tuple(w.shape)}")
        rows, columns = w.shape
        G = gates if hidden_size is None else rows // hidden_size
        G = gate_count("orthogonal", (rows, columns), G)
        blocks = orthogonal_blocks(_normal(generator, (rows, columns)), G, gain)
        w.copy_(torch.from_numpy(blocks))


@torch.no_grad()
def forget_bias(target: Module | Tensor, b_hh: Tensor | None = None, value: float = 1.0) -> None:
    """The LSTM's forget gate open from the start: f = sigmoid(value + ...).

        b_ih[f] = value        b_hh[f] = 0        gates i|f|g|o: f = H..2H; the others stay

    Args:
        target: an LSTM or LSTMCell with biases, all its layers and directions; or b_ih (4H,).
        b_hh: (4H,), only with b_ih, or None where there is none.
        value: of the sum of both.

    Returns:
        None.

    Raises:
        TypeError: target is neither.
        ValueError: a module of other gates or without biases; a shape does not fit.

    Accuracy: exact.
    Cost: 2H stores.
    Equivalent to: b_ih[H : 2 * H].fill_(value); b_hh[H : 2 * H].zero_()
    Source: Gers, Schmidhuber & Cummins, Learning to forget, 2000; Jozefowicz et al., 2015.
    """
    for b_ih, other in _forget_biases(target, b_hh):
        if b_ih.dim() != 1 or b_ih.shape[0] % 4:
            raise ValueError(f"forget_bias: b_ih must be (4H,), got {tuple(b_ih.shape)}")
        H = b_ih.shape[0] // 4
        _check_shape("forget_bias", "b_hh", other, "4H,", (4 * H,))
        b_ih[H : 2 * H] = value
        if other is not None:
            other[H : 2 * H] = 0


def _forget_biases(target, b_hh) -> Iterator[tuple[Tensor, Tensor | None]]:
    if isinstance(target, Tensor):
        yield target, b_hh
        return
    for w_hh, b_ih, found in _layers("forget_bias", target, b_hh):
        if w_hh.shape[0] != 4 * target.hidden_size:
            name = type(target).__name__
            raise ValueError(f"forget_bias: module must be an LSTM or LSTMCell, got {name}")
        if b_ih is None:
            raise ValueError("forget_bias: module must have biases, got bias = False")
        yield b_ih, found


def _layers(op: str, target, *more) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """w_hh, b_ih, b_hh of every layer and direction; of a tensor, itself and what came with it."""
    if isinstance(target, Tensor):
        yield (target, *more)
        return
    if not isinstance(target, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
        name = type(target).__name__
        raise TypeError(f"{op}: target must be a recurrent module or a torch.Tensor, got {name}")
    if any(b is not None for b in more):
        raise ValueError(f"{op}: biases must be None beside a module, got tensors")
    found = dict(target.named_parameters(recurse=False))
    for name, w in found.items():
        if name.startswith("weight_hh"):
            suffix = name.removeprefix("weight_hh")
            yield w, found.get(f"bias_ih{suffix}"), found.get(f"bias_hh{suffix}")


def _check_shape(op: str, name: str, t, letters: str, expected: tuple) -> None:
    if t is not None and tuple(t.shape) != expected:
        numbers = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        got = tuple(t.shape)
        raise ValueError(f"{op}: {name} must be ({letters}) = ({numbers}), got {got}")


def _normal(generator, shape: tuple[int, int]) -> np.ndarray:
    if isinstance(generator, np.random.Generator):
        return generator.standard_normal(shape)
    if generator is not None and not isinstance(generator, torch.Generator):
        expected = "a torch.Generator, a numpy.random.Generator or None"
        raise TypeError(f"orthogonal: generator must be {expected}, got {type(generator).__name__}")
    device = "cpu" if generator is None else generator.device
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
    return drawn.cpu().numpy()
