"""What the attention kernels promise to the bit: the same arithmetic is done whatever the threads,
the batch, padding or packing, the memory's layout and its former contents."""

from dataclasses import replace

import numpy as np
import pytest
from attention_problems import ALL_OPTIONS, AttentionProblem
from attention_running import forward, lengths, packed, results, row
from running import PoisonedNumpy, assert_same_bits, moved, python

import fastseq
from fastseq import _attend, _dispatch

DTYPES = ("float32", "float64")
SIZES = {"B": 5, "NH": 4, "NK": 2, "D": 11, "DV": 9}
PATHS = {
    "decode": {"L": 2, "S": 19},
    "decode-chunks": {"L": 2, "S": 1100},
    "decode-tiles": {"L": 7, "S": 1100},
    "packed": {"L": 13, "S": 19},
    "packed-blocks": {"L": 30, "S": 530},
}
RAGGED = {"ragged": "qkv", "causal": "bottom_right", "alibi": "NH", "dropout_p": 0.3}
FIELDS = {"plain": {}, "ragged": RAGGED, "all": ALL_OPTIONS}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_path = pytest.mark.parametrize("path", PATHS)
every_field = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)


def problem_of(path, fields, dtype):
    return AttentionProblem(**{**SIZES, **PATHS[path], **fields}, dtype=dtype)


# Threads

# By the rules of the kernels: tasks are heads where they are many, as many for each thread; the
# rest, or all, is blocks of queries of heads packed together, in several waves where their packs do
# not fit; chunks of keys; backward takes slabs of keys, all together where the bias is one for all
# keys. Rows of several lengths.
REGIMES = {
    "heads": {"B": 4, "NH": 4, "NK": 4, "L": 30, "S": 40, "D": 16, "DV": 16},
    "heads-and-one": {"B": 13, "NH": 1, "NK": 1, "L": 50, "S": 60, "D": 16, "DV": 16},
    "blocks": {"B": 1, "NH": 2, "NK": 1, "L": 130, "S": 600, "D": 16, "DV": 16},
    "one-head": {"B": 1, "NH": 1, "NK": 1, "L": 120, "S": 800, "D": 8, "DV": 8},
    "waves": {"B": 1, "NH": 3, "NK": 3, "L": 49, "S": 1030, "D": 512, "DV": 520},
    "decode": {"B": 3, "NH": 4, "NK": 2, "L": 1, "S": 2100, "D": 16, "DV": 16},
    "decode-tiles": {"B": 3, "NH": 8, "NK": 2, "L": 4, "S": 2100, "D": 16, "DV": 16},
    "inline": {"B": 1, "NH": 1, "NK": 1, "L": 3, "S": 5, "D": 4, "DV": 4},
    "mixed": {"B": 5, "NH": 2, "NK": 2, "L": 60, "S": 700, "D": 16, "DV": 16, "ragged": "qkv"},
}
THREADED = {
    "plain": {},
    "causal": {"causal": True},
    "all": {k: a for k, a in ALL_OPTIONS.items() if k not in ("B", "NH", "NK")},
    "bias-of-rows": {"bias": "1x1xLx1"},
}


@pytest.mark.parametrize("fields", THREADED.values(), ids=THREADED)
@pytest.mark.parametrize("regime", REGIMES)
@every_dtype
def test_threads_agree(dtype, regime, fields, monkeypatch):
    """3 threads on fewer cores wait for each other at every barrier."""
    problem = AttentionProblem(**{**fields, **REGIMES[regime]}, dtype=dtype)
    monkeypatch.setattr(_dispatch._Threads, "forced", 1)
    alone = results(problem)
    for threads in (2, 3):
        monkeypatch.setattr(_dispatch._Threads, "forced", threads)
        assert_same_bits(results(problem), alone)


@every_dtype
def test_threads_agree_on_packed_rows(dtype, monkeypatch):
    problem = AttentionProblem(
        **{**REGIMES["mixed"], "causal": True, "dropout_p": 0.2}, dtype=dtype
    )
    monkeypatch.setattr(_dispatch._Threads, "forced", 1)
    alone, _ = packed(problem)
    monkeypatch.setattr(_dispatch._Threads, "forced", 3)
    assert_same_bits(packed(problem)[0], alone)


@every_dtype
@every_path
@every_field
def test_a_call_repeated_gives_the_same_bits(fields, path, dtype):
    problem = problem_of(path, fields, dtype)
    first = results(problem)
    assert_same_bits(results(problem), first)
    assert_same_bits(forward(problem), {name: first[name] for name in ("o", "lse")})


# Batch neighbours, padding, packing


def of_row(found, b, n, m):
    """Row b of `results`, n queries and m keys of it."""
    rows = {"o": n, "lse": n, "dq": n, "dk": m, "dv": m}
    return {name: found[name][b : b + 1, :, :size] for name, size in rows.items()}


@every_dtype
@every_path
@pytest.mark.parametrize("name", ["plain", "ragged", "all"])
def test_batch_neighbours_do_not_matter(name, path, dtype):
    """A row alone and among four others; without dropout, whose numbers follow from b."""
    problem = problem_of(path, FIELDS[name] | {"dropout_p": 0.0}, dtype)
    together = results(problem)
    for b in range(problem.B):
        alone = of_row(results(row(problem, b)), 0, problem.L, problem.S)
        assert_same_bits(alone, of_row(together, b, problem.L, problem.S))


@every_dtype
@every_path
@pytest.mark.parametrize("name", ["ragged", "all"])
def test_padding_does_not_matter(name, path, dtype):
    """A row with its lengths, and cut to them; past them zeros and -inf."""
    problem = problem_of(path, FIELDS[name] | {"dropout_p": 0.0}, dtype)
    together = results(problem)
    for b, (n, m) in enumerate(zip(*lengths(problem), strict=True)):
        cut = results(row(problem, b, trimmed=True))
        assert_same_bits(of_row(cut, 0, n, m), of_row(together, b, n, m))
        assert not together["o"][b, :, n:].any() and not together["dq"][b, :, n:].any()
        assert not together["dk"][b, :, m:].any() and not together["dv"][b, :, m:].any()
        assert (together["lse"][b, :, n:] == -np.inf).all()


@every_dtype
@every_path
@pytest.mark.parametrize(
    "fields", [{}, RAGGED, {"window": (5, 1), "softcap": 2.0, "alibi": "BxNH"}], ids=str
)
def test_packed_rows_have_the_bits_of_padded_ones(fields, path, dtype):
    """Dropout included: it counts heads, queries and keys within a sequence."""
    problem = problem_of(path, fields | {"ragged": "qkv"}, dtype)
    found, _ = packed(problem)
    padded = results(problem)
    of_q, of_k = lengths(problem)
    for name, a in found.items():
        n = of_k if name in ("dk", "dv") else of_q
        pieces = [padded[name][b, :, : n[b]].swapaxes(0, 1) for b in range(problem.B)]
        assert_same_bits({name: a}, {name: np.concatenate(pieces)})


# Memory: layout, and former contents


def record(a):
    """Rows inside of records of an odd size: no stride is a multiple of the element."""
    kind = [("tag", "u1"), ("row", a.dtype, a.shape[-1:])]
    rows = np.zeros(a.shape[:-1], kind)["row"]
    rows[...] = a
    return rows


def unaligned(a):
    odd = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    odd[...] = a
    return odd


LAYOUTS = {
    "BLHD": lambda a: a.swapaxes(1, 2).copy().swapaxes(1, 2) if a.ndim == 4 else a,
    "LBHD": lambda a: a.transpose(2, 0, 1, 3).copy().transpose(1, 2, 0, 3) if a.ndim == 4 else a,
    "fortran": np.asfortranarray,
    "negative": lambda a: np.flip(np.flip(a).copy()),
    "negative-rows": lambda a: a[..., ::-1, :].copy()[..., ::-1, :] if a.ndim > 1 else a,
    "sliced": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "part-of-rows": lambda a: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(2, 3)])[..., 2:-3],
    "record": record,
    "unaligned": unaligned,
    "broadcast-copy": lambda a: np.broadcast_to(a[None], (2, *a.shape))[1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
@pytest.mark.parametrize("path", ["decode", "packed"])
def test_any_layout(path, dtype, layout):
    """Of inputs, masks, lengths, slopes and the gradients of the outputs."""
    problem = problem_of(path, ALL_OPTIONS, dtype)
    assert_same_bits(results(moved(problem, LAYOUTS[layout])), results(problem))


# A key's heads one behind the other are decoded together, from 4 MiB on: all, or 3 and 3 of 6 with
# 16 rows each; with one chunk of keys fewer, so that every thread has some.
TOGETHER = 1 << 22
NEIGHBOURS = {
    "one-row": {"NH": 6, "NK": 6, "L": 1, "D": 64, "DV": 64},
    "rows-of-a-group": {"NH": 8, "NK": 2, "L": 1, "D": 128, "DV": 128},
    "part-of-the-heads": {"NH": 12, "NK": 6, "L": 8, "D": 48, "DV": 48},
    "one-chunk": {"B": 1, "NH": 16, "NK": 8, "L": 1, "S": 2000, "D": 64, "DV": 64},
    "odd": {"NH": 12, "NK": 4, "L": 2, "D": 75, "DV": 83},
}
OF_NEIGHBOURS = {
    "plain": {},
    "window": {"causal": "bottom_right", "window": (2050, 0), "ragged": "kv", "mask": "LxS"},
    "a-mask-a-head": {"mask": "BxNHxLxS"},
}


@pytest.mark.parametrize("fields", OF_NEIGHBOURS.values(), ids=OF_NEIGHBOURS)
@pytest.mark.parametrize("sizes", NEIGHBOURS.values(), ids=NEIGHBOURS)
@every_dtype
def test_neighbouring_heads_decode_together(dtype, sizes, fields, monkeypatch):
    """Keys and values in arrays of their own, and side by side in one; heads that attend nothing in
    the first chunk, or only later keys, and a value that nobody may read."""
    problem = AttentionProblem(**{"B": 2, "S": 2100, **sizes, **fields}, dtype=dtype)
    if fields.get("mask") == "BxNHxLxS":
        mask, values = problem.options["mask"].copy(), problem.inputs["v"].copy()
        mask[:, 0, :, :2048], mask[:, 1, :, :100], mask[..., 7] = False, False, False
        values[:, :, 7] = np.nan
        problem = problem.having(options={"mask": mask}, inputs={"v": values})
    k, v = (problem.inputs[name].swapaxes(1, 2) for name in "kv")  # (B, S, NK, D or DV)
    flat = [a.reshape(*a.shape[:2], -1) for a in (k, v)]
    halves = np.split(np.concatenate(flat, axis=-1), [flat[0].shape[-1]], axis=-1)
    monkeypatch.setattr(_dispatch._Threads, "forced", 1)
    expected = forward(problem)
    for parts in (flat, halves):
        heads = [
            part.reshape(a.shape).swapaxes(1, 2) for part, a in zip(parts, (k, v), strict=True)
        ]
        assert heads[0].strides[1] == problem.D * heads[0].itemsize
        if not problem.ragged:  # else lengths decide
            assert sum(part.nbytes for part in flat) >= TOGETHER
        for threads in (1, 2, 3):
            monkeypatch.setattr(_dispatch._Threads, "forced", threads)
            found = forward(problem.having(inputs=dict(zip("kv", heads, strict=True))))
            assert_same_bits(found, expected)


@pytest.mark.parametrize("path", ["decode", "packed"])
def test_what_is_broadcast_by_strides(path):
    """q, k, v of one head or row for all, axes of stride zero; a bias by strides has its own
    gradient of every element."""
    problem = problem_of(path, {"bias": "BxNHxLxS"}, "float64")
    ones = {"q": np.s_[:, :1], "k": np.s_[:1], "v": np.s_[:, :, :1], "bias": np.s_[:1, :, :1]}
    views = {
        name: np.broadcast_to(problem.inputs[name][at], problem.inputs[name].shape)
        for name, at in ones.items()
    }
    copies = {name: a.copy() for name, a in views.items()}
    assert_same_bits(results(problem.having(inputs=views)), results(problem.having(inputs=copies)))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)], ids=str)
def test_outputs_follow_the_order_of_q(order):
    """Axes of o and dq in memory as q's, dk's and dv's as their own."""
    problem = problem_of("packed", {"ragged": "qkv"}, "float32")

    def ordered(a):
        axes = (*order, 3)
        return a.transpose(axes).copy().transpose(np.argsort(axes))

    inputs = {name: ordered(a) for name, a in problem.inputs.items()}
    for ragged in (problem, replace(problem, ragged=None)):
        found = results(ragged.having(inputs=inputs))
        for name in ("o", "dq", "dk", "dv"):
            assert found[name].transpose(*order, 3).flags.c_contiguous, name


class GuardedNumpy(PoisonedNumpy):
    """numpy whose every new array stands between guards; `blank`: zeros are NaN too."""

    def __init__(self, *, blank):
        super().__init__()
        self.blank = blank

    def full(self, shape, value, dtype):
        a = self.empty(shape, dtype)
        a[...] = value
        return a

    def zeros(self, shape, dtype):
        return self.full(shape, np.nan if self.blank and shape else 0, dtype)


@every_field
@every_dtype
@every_path
def test_outputs_are_written_whole_and_nothing_else(path, dtype, fields, monkeypatch):
    problem = problem_of(path, fields, dtype)
    clean = results(problem)
    guarded = GuardedNumpy(blank=False)
    monkeypatch.setattr(_attend, "np", guarded)
    assert_same_bits(results(problem), clean)
    assert len(guarded.blocks) >= 5  # o, lse, dq, dk, dv
    guarded.assert_guards()


@every_dtype
@every_path
def test_gradients_are_written_not_added(path, dtype, monkeypatch):
    """Only rows past the lengths, and the bias's, need the zeros that they are made of."""
    problem = problem_of(path, {"causal": True, "mask": "BxNHxLxS"}, dtype)
    clean = results(problem)
    monkeypatch.setattr(_attend, "np", GuardedNumpy(blank=True))
    assert_same_bits(results(problem), clean)


# Memory: how much


# Prints by how many bytes the process's peak grows in a call.
PEAK = """
import resource, sys
import numpy as np
import fastseq
L, what = int(sys.argv[1]), sys.argv[2]
q, k, v, do = (np.ones((1, 1, L, 64), np.float32) for _ in range(4))
small = [a[:, :, :300].copy() for a in (q, k, v)]
_, pull = fastseq.vjp(fastseq.attention, *small)
pull(small[0])
if what == "backward":
    _, pull = fastseq.vjp(fastseq.attention, q, k, v)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
found = fastseq.attention(q, k, v) if what == "forward" else pull(do)
print(peak() - before)
"""


def test_forward_takes_memory_linear_in_the_lengths():
    """L = S = 8192: o 2 MiB, packed keys and values 4 MiB; the scores would be 256 MiB."""
    assert int(python(PEAK, 8192, "forward")) < 10 << 20


def test_backward_takes_memory_linear_in_the_lengths():
    """L = S = 4096: gradients 3 MiB, 4 parts of dq 4 MiB; the scores would be 64 MiB."""
    assert int(python(PEAK, 4096, "backward")) < 16 << 20


def test_the_seed_alone_decides_what_is_dropped():
    problem = problem_of("packed", {"dropout_p": 0.5}, "float64")
    assert_same_bits(forward(problem), forward(problem))
    other = forward(problem.having(options={"seed": 8}))
    assert (other["o"] != forward(problem)["o"]).any()
    assert_same_bits({"lse": other["lse"]}, {"lse": forward(problem)["lse"]})


@every_dtype
def test_merge_has_the_same_bits_in_any_shape_and_layout(dtype):
    problem = problem_of("packed", {"mask": "BxNHxLxS"}, dtype)
    one, two = forward(problem), forward(problem_of("packed", {}, dtype))
    o, lse = fastseq.merge_attention(one["o"], one["lse"], two["o"], two["lse"])
    flat = [a.reshape(-1, 9) if a.ndim == 4 else a.reshape(-1)
            for a in (one["o"], one["lse"], two["o"], two["lse"])]  # fmt: skip
    o_flat, lse_flat = fastseq.merge_attention(*flat)
    assert_same_bits({"o": o_flat, "lse": lse_flat},
                     {"o": o.reshape(-1, 9), "lse": lse.reshape(-1)})  # fmt: skip
    turned = [np.asfortranarray(a) for a in (one["o"], one["lse"], two["o"], two["lse"])]
    found = fastseq.merge_attention(*turned)
    assert_same_bits(dict(zip(("o", "lse"), found, strict=True)), {"o": o, "lse": lse})


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("NH", [1, 40])
def test_merge_and_rotary_agree_on_threads(NH, threads, monkeypatch):
    """On either side of the size below which one thread does it."""
    x = np.random.default_rng(0).standard_normal((2, NH, 70, 64))
    lse = x[..., 0].copy()
    lse[:, :, ::7] = -np.inf

    def solve():
        o, merged = fastseq.merge_attention(x, lse, -x, lse[..., ::-1].copy())
        return {"o": o, "lse": merged, "y": fastseq.rotary(x, offsets=np.array([3, 0]))}

    monkeypatch.setattr(_dispatch._Threads, "forced", 1)
    alone = solve()
    monkeypatch.setattr(_dispatch._Threads, "forced", threads)
    assert_same_bits(solve(), alone)
