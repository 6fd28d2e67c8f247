"""From a graph of operations to the source of a Numba kernel that does them on a tile.

A tile is `rows` rows of `blocks` vectors. Its inputs are copied into arrays on the stack, loops
over all of the tile's elements, which LLVM vectorises, take turns with calls of the library's own
exp, tanh and sigmoid over whole arrays (functions.h), and the results are copied out. So a user's
cell has the built-in cells' accuracy and nearly their speed. Arithmetic is done as written, in the
kernel's dtype: nothing is contracted or reordered.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastseq.kernels.numba.trace import OPS, Node, needed
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ARRAY_FUNCTIONS = ("exp", "tanh", "sigmoid")  # those of functions.h
INDENT = "    "


@intrinsic
def copy(typingctx, target, source, n):
    """n numbers from source to target, pointers of one type; a constant n costs no call."""

    def codegen(context, builder, signature, args):
        size = context.get_abi_sizeof(context.get_data_type(target.dtype))
        cgutils.raw_memcpy(builder, args[0], args[1], args[2], size, align=1)

    return types.void(target, source, types.intp), codegen


@intrinsic
def shifted(typingctx, pointer, n):
    """The pointer n numbers on."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic
def call(typingctx, table, index, x, n):
    """Call the function at table[index], `void f(real *x, intptr_t n)`; table is an address."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        entry = builder.gep(builder.inttoptr(args[0], word.as_pointer()), [args[1]])
        kind = ir.FunctionType(ir.VoidType(), [args[2].type, word])
        builder.call(builder.inttoptr(builder.load(entry), kind.as_pointer()), [args[2], args[3]])

    return types.void(types.int64, types.int64, x, types.int64), codegen


@dataclass(frozen=True)
class Tile:
    """How a kernel reads and writes: the sizes of its arrays, and where inputs and results are."""

    lanes: int
    capacity: int  # numbers in a tile at most
    functions: Mapping[str, int]  # ARRAY_FUNCTIONS by name: their place in the table


def body(
    results: Mapping[str, Node],
    tile: Tile,
    fetch: Callable[[str], str],
    put: Callable[[str], str],
) -> list[str]:
    """The statements of a kernel: fetch, levels, put. `rows`, `blocks`, `table` are known.

    fetch(input) and put(result) give the pointer, of row r and block j, that it is at.
    """
    nodes = needed(results.values())
    levels = _levels(nodes, results.values())
    kept = _kept(nodes, levels, results.values())
    inputs = [n for n in nodes if n.op == "input" and n in kept]
    fetched = [(n, n.args[0]) for n in inputs]
    fetched += [(n, n.args[0].args[0]) for n in nodes if _of_input(n)]
    lines = [f"a{n.index} = stack({tile.capacity}, ZERO)" for n in sorted(kept, key=_index)]
    lines += ["n = rows * blocks * LANES"]
    lines += _for_each_block(
        [f"copy(shifted(a{n.index}, i), {fetch(name)}, LANES)" for n, name in fetched]
    )
    for level in range(max(levels.values(), default=0) + 1):
        lines += _level([n for n in nodes if levels[n] == level], kept, tile)
    return lines + _for_each_block(
        [f"copy({put(name)}, shifted(a{node.index}, i), LANES)" for name, node in results.items()]
    )


def _of_input(node: Node) -> bool:
    """Whether it is an array function of an input, which is then fetched to where it works."""
    return node.op in ARRAY_FUNCTIONS and node.args[0].op == "input"


def _index(node: Node) -> int:
    return node.index


def _levels(nodes: Sequence[Node], results: Iterable[Node]) -> dict[Node, int]:
    """The loop that computes each node: as late as those that read it allow.

    The result of an array function can be read one level after its argument is computed.
    """
    earliest: dict[Node, int] = {}
    for node in nodes:
        before = (earliest[a] + (a.op in ARRAY_FUNCTIONS) for a in node.operands)
        earliest[node] = max(before, default=0)
    last = max(earliest.values(), default=0)
    latest = dict.fromkeys(results, last)
    for node in reversed(nodes):
        level = earliest[node] if node.op in ARRAY_FUNCTIONS else latest[node]
        latest[node] = level
        for a in node.operands:
            latest[a] = min(latest.get(a, last), level)
    return latest


def _kept(nodes: Sequence[Node], levels: Mapping[Node, int], results: Iterable[Node]) -> set[Node]:
    """The nodes that have an array: results, array functions, what is read at a later level."""
    kept = {n for n in nodes if n.op in ARRAY_FUNCTIONS} | set(results)
    for node in nodes:
        if not _of_input(node):
            later = (a for a in node.operands if levels[a] < levels[node] or a.op == "input")
            kept.update(a for a in later if a.op != "constant")
    return kept


def _level(nodes: Sequence[Node], kept: set[Node], tile: Tile) -> list[str]:
    """One loop over the elements, then the calls that end the level."""
    calls = [n for n in nodes if n.op in ARRAY_FUNCTIONS]
    computed = [n for n in nodes if n.op in OPS and n not in calls]
    stored = [(n, n) for n in nodes if n in kept and (n in computed or n.op == "constant")]
    stored += [(n, n.args[0]) for n in calls if not _of_input(n)]
    read = {a for n in computed for a in n.operands} | {value for _, value in stored}
    read = {n for n in read if n.op != "constant" and n not in computed}
    lines = [f"v{n.index} = a{n.index}[m]" for n in sorted(read, key=_index)]
    lines += [f"v{n.index} = {_expression(n)}" for n in computed]
    lines += [f"a{n.index}[m] = {_value(value)}" for n, value in stored]
    head = ["for m in range(n):"]
    called = [f"call(table, {tile.functions[n.op]}, a{n.index}, n)" for n in calls]
    return (head + [INDENT + line for line in lines] if stored else []) + called


def _value(node: Node) -> str:
    if node.op != "constant":
        return f"v{node.index}"
    number = node.args[0]
    return f"REAL({number})" if number[-1].isdigit() else f"REAL(np.{number.lstrip('-')})"


def _expression(node: Node) -> str:
    if node.op == "power":
        base, exponent = _value(node.args[0]), node.args[1]
        if isinstance(exponent, int):
            return f"{base} ** {exponent}"
        return f"{base} ** REAL({exponent!r})"
    return OPS[node.op].source.format(*map(_value, node.args))


def _for_each_block(lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    head = [
        "for r in range(rows):",
        INDENT + "for j in range(blocks):",
        2 * INDENT + "i = (r * blocks + j) * LANES",
    ]
    return head + [2 * INDENT + line for line in lines]
