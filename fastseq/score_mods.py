"""Functions of attention's scores that users write: `score_mod` makes one of a plain function."""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastseq import _dispatch
from fastseq._by_name import ByName
from fastseq.kernels.cpu.contract import CompiledScoreMod
from fastseq.kernels.numba.trace import Graph, Node, definition, needed, trace

ARGUMENTS = ("score", "b", "h", "q_idx", "kv_idx")  # and their order


@dataclass(frozen=True, eq=False, repr=False)
class ScoreMod(ByName):
    """A function of the scores made by `fastseq.score_mod`; called, it is what it was made of.

    Attributes:
        function: the user's.
        key: the name the library knows it by, a hash of what it computes in it.
    """

    function: Callable
    key: str
    graph: Graph
    results: tuple[Node, ...]
    _compiled: dict[str, CompiledScoreMod] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.function(score, b, h, q_idx, kv_idx)

    def __repr__(self) -> str:
        return f"<fastseq.score_mod {self.function.__name__}>"

    def compiled(self, dtype: np.dtype) -> CompiledScoreMod:
        """Its callbacks for arrays of dtype."""
        try:
            from fastseq.kernels.numba.score_mod import compiled
        except ImportError as error:
            text = f"{self.function.__name__}: a score_mod needs Numba: pip install"
            raise ImportError(f"{text} fastseq-kernels[numba]") from error
        kernels = _dispatch.kernels("attention", dtype)
        with self._lock:
            if kernels.__name__ not in self._compiled:
                told = self.function, self.graph, self.results, kernels, dtype.name
                self._compiled[kernels.__name__] = compiled(*told)
            return self._compiled[kernels.__name__]

    def compile(self, dtype=np.float32) -> None:
        """Compile now for arrays of dtype, rather than at the first call with them."""
        self.compiled(np.dtype(dtype))


SCORE_MODS: dict[str, ScoreMod] = {}


def score_mod(function: Callable) -> ScoreMod:
    """A function of attention's scores of your own, called inside the fused kernel.

        s_ij = function(s_ij, b, h, i, j)        element by element

    The function is traced once with symbols and compiled by Numba to a callback on rows of scores.
    Its gradient by the score is derived by reverse-mode differentiation of the trace.

    Args:
        function: of (score, b, h, q_idx, kv_idx), by position: the score, scaled and softcapped;
            the numbers of the batch row or packed sequence, of the query head, of the query and
            of the key, the last two from 0 in the row or sequence, whatever `causal` aligns.
            They are numbers in the arrays' dtype, exact in float32 to 2^24. It returns the new
            score; -inf: do not attend. It may use arithmetic and comparisons, np.where, np.exp,
            np.tanh, np.maximum and their like, `sigmoid` and `relu` of fastseq.cells, and Python
            numbers from around it, which are read now and have no gradient.

    Returns:
        A `ScoreMod`, for the argument score_mod of `attention`, `attention_varlen` and those of
        fastseq.torch. ALiBi, bias, masks and dropout follow on its result.

    Raises:
        TypeError: the function has another number of arguments, does what is not element-wise, or
            fails, or returns an array; ValueError: it returns another number of values. The
            message shows the line.

    Accuracy: its arithmetic is done as written in the arrays' dtype; exp, tanh and sigmoid are the
        library's own, to 4 ULP.
    Cost: compiled at the first call per dtype, in seconds, and kept in ~/.cache/fastseq. Then its
        own operations per score, again in backward, which keeps nothing for it.
    Equivalent to: flex_attention(q, k, v, score_mod=function) of torch.nn.attention
    Source: He et al., FlexAttention, arXiv:2412.05496; reverse-mode differentiation: Griewank &
        Walther, Evaluating Derivatives, 2008.
    """
    name = getattr(function, "__name__", type(function).__name__)
    _check_arguments(name, function)
    graph, results = trace(f"score_mod {name}", function, ARGUMENTS, 1)
    told = [
        (n.op, [a.index if isinstance(a, Node) else a for a in n.args]) for n in needed(results)
    ]
    digest = hashlib.sha256(repr((told, results[0].index)).encode()).hexdigest()
    key = f"{name}_{digest[:16]}"
    return SCORE_MODS.setdefault(key, ScoreMod(function, key, graph, results))


def _check_arguments(name: str, function: Callable) -> None:
    """The function takes five arguments by position."""
    if not callable(function):
        raise TypeError(f"score_mod: function must be callable, got {name}")
    signature = inspect.signature(function)
    try:
        signature.bind(*ARGUMENTS)
    except TypeError:
        text = f"score_mod {name}: it must take ({', '.join(ARGUMENTS)}), got {signature}"
        raise TypeError(f"{text}\n{definition(function)}") from None


def found(op: str, value: Any) -> ScoreMod | None:
    """The argument score_mod of a call."""
    if value is not None and not isinstance(value, ScoreMod):
        text = f"{op}: score_mod must be made by fastseq.score_mod"
        raise TypeError(f"{text}, got {type(value).__name__}")
    return value
