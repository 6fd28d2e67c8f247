"""The cells that `scan` runs: traced from a user's function, or built into the kernels."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from fastseq import _dispatch
from fastseq._by_name import ByName
from fastseq._spec import Kind, add
from fastseq.kernels.cpu.contract import CELLS, CompiledCell
from fastseq.kernels.numba.trace import Graph, Node


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Cell(ByName, Kind):
    """A recurrent cell; called, it is its function, in NumPy.

    Attributes:
        op: the function's name.
        key: the name the library knows it by.
        arguments: the names of the function's arguments in their order.
    """

    function: Callable
    key: str
    arguments: tuple[str, ...]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __repr__(self) -> str:
        gates = f"{self.gates} gates" if self.gates > 1 else "1 gate"
        return f"<fastseq.cell {self.op}({', '.join(self.arguments)}): {gates}>"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TracedCell(Cell):
    """What `fastseq.cell` makes; its key holds a hash of what it computes.

    Attributes:
        planes: the arguments that are pre-activations, in the kernels' order.
        parameters: those that are per unit.
    """

    planes: tuple[str, ...]
    parameters: tuple[str, ...]
    graph: Graph
    results: tuple[Node, ...]
    _compiled: dict[str, CompiledCell] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def cell(self, kernels: ModuleType, dtype: np.dtype) -> CompiledCell:
        try:
            from fastseq.kernels.numba.cell import Source, compiled
        except ImportError as error:
            text = f"the cell {self.op} needs Numba: pip install fastseq-kernels[numba]"
            raise ImportError(text) from error
        with self._lock:
            if kernels.__name__ not in self._compiled:
                split = len(self.planes) > self.gates
                names = self.planes, split, self.parameters
                source = Source(self.function, *names, self.has_c, self.graph, self.results)
                options = kernels, dtype.name, self.recurrent
                self._compiled[kernels.__name__] = compiled(source, *options)
            return self._compiled[kernels.__name__]

    def compile(self, dtype=np.float32) -> None:
        """Compile now for arrays of dtype, rather than at the first call with them."""
        dtype = np.dtype(dtype)
        self.cell(_dispatch.kernels("recurrent", dtype), dtype)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RowCell(Cell):
    """A cell of the kernels whose units see each other: its function takes whole rows.

        h'[, c'] = function(W_ih x, W_hh h, h or c, params)      (B, G H), (B, G H), (B, H), (N, H)

    Its parameters beside the weights are all in `params`: `gains` of them, which start from 1, and
    biases, which start from 0.
    """

    gains: int

    def cell(self, kernels: ModuleType, dtype: np.dtype) -> int:
        return CELLS[self.key]


def of_rows(gates: int, params: int, gains: int) -> Callable[[Callable], RowCell]:
    """Decorates the equations of a cell that the kernels have under the function's name."""

    def made(function: Callable) -> RowCell:
        name, arguments = function.__name__, tuple(inspect.signature(function).parameters)
        found = RowCell(
            op=name,
            key=name,
            gates=gates,
            has_c="c" in arguments,
            params=params,
            gains=gains,
            function=function,
            arguments=arguments,
        )
        return add(name, found)  # type: ignore[return-value]

    return made


def check(op: str, cell: Any) -> None:
    """Refuse what is no cell."""
    if not isinstance(cell, Cell):
        got = f"got {type(cell).__name__}"
        raise TypeError(f"{op}: cell must be one of fastseq.cells or of fastseq.cell, {got}")
