"""A user's function of attention's scores as two callbacks of attention_scores.h.

Both change a row of scores in place; backward also gives the derivative by the score, that of
trace.py. The positions are numbers in the kernel's dtype.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from fastseq.kernels.cpu.contract import CompiledScoreMod
from fastseq.kernels.numba import elementwise, generated, native
from fastseq.kernels.numba.elementwise import INDENT, Tile
from fastseq.kernels.numba.trace import Graph, Node, gradients

ARGUMENTS = ("score", "b", "h", "q_idx", "kv_idx")


def text(
    function: Callable, graph: Graph, results: Sequence[Node], layout: dict, dtype: str
) -> str:
    """The source of the generated module for kernels with this `score_layout`."""
    (score,) = results
    (slope,) = gradients(graph, results, [graph.constant(1)], ["score"])
    top = elementwise.header(f"score_mod {function.__name__}", function, dtype, layout["lanes"])
    both = {"forward": {"score": score}, "backward": {"score": score, "factor": slope}}
    return top + "\n\n".join(_function(name, wanted, layout) for name, wanted in both.items())


def _function(name: str, results: Mapping[str, Node], layout: dict) -> str:
    words = layout["words"]
    tile = Tile(
        layout["lanes"],
        layout["max_keys"],
        layout["functions"],
        # a 32-bit index, which every level turns into a vector of numbers
        {"b": "b", "h": "h", "q_idx": "q_idx", "kv_idx": "first + REAL(np.int32(m))"},
    )

    def place(array: str) -> str:
        return f"shifted(at(word[{words[array]}], ZERO), j * LANES)"

    lines = [
        f"word = carray(tile, {len(words)}, np.int64)",
        f"rows, blocks = 1, word[{words['blocks']}]",
        f"table = word[{words['functions']}]",
        f"b, h = REAL(word[{words['b']}]), REAL(word[{words['h']}])",
        f"q_idx, first = REAL(word[{words['i']}]), REAL(word[{words['j']}])",
        *elementwise.body(results, tile, place, place),
    ]
    return "\n".join([f"def {name}(tile):", *(INDENT + line for line in lines), ""])


def compiled(
    function: Callable, graph: Graph, results: Sequence[Node], kernels: ModuleType, dtype: str
) -> CompiledScoreMod:
    """The callbacks for the kernels of one ISA level and dtype; the first time it takes seconds."""
    source = text(function, graph, results, kernels.score_layout(), dtype)
    name = re.sub(r"\W", "_", function.__name__)  # a lambda's has brackets
    module = generated.load(f"score_mod_{name}", source, elementwise.__file__, native.__file__)
    what = f"the score_mod {function.__name__} ({dtype})"
    forward, backward = native.compile_all(what, (module.forward, module.backward))
    return CompiledScoreMod(native.address_of(forward), native.address_of(backward))
