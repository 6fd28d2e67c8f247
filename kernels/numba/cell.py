"""A user's recurrent cell as two callbacks of the scan driver (cells.h), forward and backward.

Forward leaves the planes of GATES as they are, and backward does forward's element-wise work again:
what is kept for it is what every cell keeps. The gradient is that of trace.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from fastseq.kernels.cpu.contract import CompiledCell
from fastseq.kernels.numba import elementwise, generated, native
from fastseq.kernels.numba.elementwise import INDENT, Tile
from fastseq.kernels.numba.trace import Graph, Node, gradients, needed

MAX_BLOCKS = 4  # vectors of units in a tile


@dataclass(frozen=True)
class Source:
    """A traced function, and what its arguments mean by name; the states are h and c."""

    function: Callable
    planes: tuple[str, ...]  # pre-activations, in the order of GATES
    split: bool  # the first and the last plane are parts of one gate
    params: tuple[str, ...]  # per unit
    has_c: bool
    graph: Graph
    results: tuple[Node, ...]  # h', and c'

    @property
    def reads_h(self) -> bool:
        """Whether h' depends on h past the gates."""
        return any(n.op == "input" and n.args == ("h",) for n in needed(self.results))

    def forward(self) -> dict[str, Node]:
        """What forward writes, by slot."""
        return dict(zip(("H", "C"), self.results, strict=False))

    def backward(self) -> dict[str, Node]:
        """What backward writes: a gradient per plane and parameter, DH_OUT, DC_OUT."""
        graph = self.graph
        dh = graph.input("DH_PRODUCT") + graph.input("DY") + graph.input("DH_IN")
        cotangents = [dh]
        first, *between, last = self.planes if self.split else (None, *self.planes, None)
        planes = [last, *between, first] if self.split else between  # DGATES' order, see cells.h
        wanted = [*planes, *self.params]
        slots = [f"DGATES {k}" for k in range(len(wanted))]
        if self.reads_h:
            wanted, slots = [*wanted, "h"], [*slots, "DH_OUT"]
        if self.has_c:
            cotangents.append(graph.input("DC_IN") + graph.input("DC_EXTERNAL"))
            wanted, slots = [*wanted, "c"], [*slots, "DC_OUT"]
        found = gradients(graph, self.results, cotangents, wanted)
        return dict(zip(slots, found, strict=True))

    def text(self, layout: dict, dtype: str) -> str:
        """The source of the generated module for kernels with this `tile_layout`."""
        tile = Tile(
            layout["lanes"],
            layout["max_rows"] * MAX_BLOCKS * layout["lanes"],
            layout["functions"],
        )
        name = self.function.__name__
        header = elementwise.header(f"cell {name}", self.function, dtype, tile.lanes)
        functions = (
            self._function(name, results, tile, layout)
            for name, results in (("forward", self.forward()), ("backward", self.backward()))
        )
        return header + "\n\n".join(functions)

    def _function(self, name: str, results: Mapping[str, Node], tile: Tile, layout: dict) -> str:
        words, slots = layout["words"], layout["slots"]

        def row(slot: str) -> str:
            return f"at(word[{slots[slot]} + r], ZERO)"

        def fetch(argument: str) -> str:
            if argument in self.planes:
                plane = self.planes.index(argument)
                return f"shifted({row('GATES')}, (j * {len(self.planes)} + {plane}) * LANES)"
            if argument in self.params:
                start = f"{self.params.index(argument)} * word[{words['params_plane']}] + j * LANES"
                return f"shifted(at(word[{words['params']}], ZERO), {start})"
            slot = {"h": "H_PREV", "c": "C_PREV"}.get(argument, argument)
            return f"shifted({row(slot)}, j * LANES)"

        def put(result: str) -> str:
            slot, *plane = result.split()
            start = f"{plane[0]} * word[{words['dgates_plane']}] + " if plane else ""
            return f"shifted({row(slot)}, {start}j * LANES)"

        size = max(slots.values()) + layout["max_rows"]
        lines = [
            f"word = carray(tile, {size}, np.int64)",
            f"rows, blocks = word[{words['rows']}], word[{words['blocks']}]",
            f"table = word[{words['functions']}]",
            *elementwise.body(results, tile, fetch, put),
        ]
        return "\n".join([f"def {name}(tile):", *(INDENT + line for line in lines), ""])


def compiled(source: Source, kernels: ModuleType, dtype: str, recurrent: bool) -> CompiledCell:
    """The cell for the kernels of one ISA level and dtype; the first time it takes seconds."""
    name = source.function.__name__
    text = source.text(kernels.tile_layout(), dtype)
    module = generated.load(f"cell_{name}", text, elementwise.__file__, native.__file__)
    what = f"the cell {name} ({dtype})"
    forward, backward = native.compile_all(what, (module.forward, module.backward))
    return CompiledCell(
        gates=len(source.planes) - source.split,
        split=source.split,
        has_c=source.has_c,
        recurrent=recurrent,
        dh_direct=source.reads_h,
        params=len(source.params),
        forward=native.address_of(forward),
        backward=native.address_of(backward),
    )
