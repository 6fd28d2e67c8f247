"""What a recurrent call does not change: the cell, its weights, layers, directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastseq.kernels.cpu.contract import CELLS, CompiledCell

WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "params")


@dataclass(frozen=True, eq=False)
class Kind:
    """A cell as the API sees it."""

    op: str  # its public name
    gates: int
    has_c: bool = False
    recurrent: bool = True  # has w_hh and b_hh
    params: int = 0  # parameters per unit
    projects: bool = False  # may have a projection w_hr

    def cell(self, kernels: ModuleType, dtype: np.dtype) -> int | CompiledCell:
        """What the kernels of one dtype know it by; a user's cell is compiled for them."""
        raise NotImplementedError


class _BuiltIn(Kind):
    def cell(self, kernels: ModuleType, dtype: np.dtype) -> int | CompiledCell:
        return CELLS[name_of(self)]


KINDS: dict[str, Kind] = {
    "rnn_tanh": _BuiltIn("rnn", 1),
    "rnn_relu": _BuiltIn("rnn", 1),
    "gru": _BuiltIn("gru", 3),
    "lstm": _BuiltIn("lstm", 4, has_c=True, projects=True),
}


LISTENERS: list[Callable[[str], None]] = []  # told of every kind that is added


def add(name: str, kind: Kind) -> Kind:
    """Add a kind to KINDS; the one there where the name is known."""
    if name not in KINDS:
        KINDS[name] = kind
        for tell in LISTENERS:
            tell(name)
    return KINDS[name]


def name_of(kind: Kind) -> str:
    """Its key among KINDS."""
    return next(name for name, known in KINDS.items() if known is kind)


class Masks(NamedTuple):
    """The arrays of a call that are neither states nor weights, None where absent; S scans."""

    lengths: Any = None  # (B,)
    resets: Any = None  # (T, B)
    recurrent_mask: Any = None  # (S, B, R), multiplied into h before W_hh
    zoneout_h: Any = None  # (S, T, B, H), the share of h that stays
    zoneout_c: Any = None

    @property
    def zoneout(self) -> bool:
        return self.zoneout_h is not None or self.zoneout_c is not None

    def of(self, scans: slice) -> Masks:
        """Those of some of the scans."""
        lengths, resets, *own = self
        return Masks(lengths, resets, *(None if a is None else a[scans] for a in own))


NO_MASKS = Masks()


class Spec(NamedTuple):
    """What does not change from call to call."""

    cell: str  # one of KINDS
    num_layers: int = 1
    bidirectional: bool = False
    reverse: bool = False  # one direction only: time runs backwards
    bias: bool = True
    proj: bool = False  # weights hold w_hr
    step: bool = False  # called as a single step: errors say gru_cell and h, not gru and h0
    limit: float | None = None  # of the gradient that flows from one step to the one before
    zoneout: bool = False  # a call's masks hold zoneout_h or zoneout_c

    @property
    def kind(self) -> Kind:
        return KINDS[self.cell]

    @property
    def op(self) -> str:
        """The public name, for errors."""
        return self.kind.op + "_cell" * self.step

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def scans(self) -> int:
        return self.num_layers * self.directions

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays of one direction of one layer, as they stand in the flat list of weights."""
        recurrent, params = self.kind.recurrent, self.kind.params > 0
        given = (True, recurrent, self.bias, self.bias and recurrent, self.proj, params)
        return tuple(name for name, there in zip(WEIGHTS, given, strict=True) if there)

    def weights_of(self, weights: Sequence, index: int) -> tuple:
        """The arrays of scan `index` in the order of WEIGHTS, None where absent."""
        names = self.names
        part = weights[index * len(names) : (index + 1) * len(names)]
        given = dict(zip(names, part, strict=True))
        return tuple([given.get(name) for name in WEIGHTS])
