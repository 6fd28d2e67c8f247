"""Contenders of the family "attention" besides torch: ONNX Runtime and OpenVINO, for inference.

ONNX Runtime has several operators for it, and a trial at the start keeps the fastest that applies:

    Attention              opset 23, arrays as ours; takes shared key heads and masks
    MultiHeadAttention     q (B, L, NH * D); takes key padding as lengths
    GroupQueryAttention    a decode step on a cache that holds all keys but the last

OpenVINO's is ScaledDotProductAttention. Nothing is copied or transposed inside a call.
"""

from collections.abc import Callable, Iterator

import numpy as np

from .attention import LARGE_SCORES, Problem
from .families import Contender, fastest
from .runtimes import onnx_session, openvino_model, require

ONNX_IR, ONNX_OPSET = 10, 23
MICROSOFT = "com.microsoft"

Array = np.ndarray


def builders(problem: Problem, threads: int) -> dict[str, Callable[[], Contender]]:
    """All peers; building one raises Absent if its package is not installed."""
    return {
        "onnxruntime": lambda: onnx_runtime(problem, threads),
        "openvino": lambda: openvino(problem, threads),
    }


def onnx_runtime(problem: Problem, threads: int) -> Contender:
    """The fastest of its operators."""
    require("onnxruntime", "onnx")  # before a model is built
    return fastest(_operators(problem, threads))


def _operators(problem: Problem, threads: int) -> Iterator[Contender]:
    case = problem.case
    if case.job == "decode":
        yield group_query_attention(problem, threads)
    padded = problem.kv_lengths is not None
    if not padded and case.score_bytes <= LARGE_SCORES:  # it takes no mask (B, 1, 1, S)
        yield attention(problem, threads)
    if case.NK == case.NH and (padded or problem.mask is None):
        yield multi_head_attention(problem, threads)


def attention(problem: Problem, threads: int) -> Contender:
    """ONNX's own operator."""
    feed = {"q": problem.q, "k": problem.k, "v": problem.v}
    if problem.mask is not None:
        feed["mask"] = problem.mask
    model = onnx_model(
        "Attention", feed, {"o": problem.q.shape}, is_causal=int(problem.case.causal)
    )
    session = onnx_session(model, threads)

    def call():
        return session.run(None, feed)[0]

    return Contender(call, lambda: {"o": problem.of_queries(call())})


def multi_head_attention(problem: Problem, threads: int) -> Contender:
    """ONNX Runtime's operator for encoders."""
    case = problem.case
    feed = {name: _rows(getattr(problem, name)) for name in "qkv"}
    inputs = list(feed)
    if problem.kv_lengths is not None:
        feed["lengths"] = problem.kv_lengths.astype(np.int32)
        inputs += ["", "lengths"]  # no bias of the projections
    model = onnx_model(
        "MultiHeadAttention",
        feed,
        {"o": feed["q"].shape},
        inputs,
        domain=MICROSOFT,
        num_heads=case.NH,
        unidirectional=int(case.causal),
    )
    session = onnx_session(model, threads)

    def call():
        return session.run(None, feed)[0]

    def results():
        o = call().reshape(case.B, case.L, case.NH, case.D)
        return {"o": problem.of_queries(o.transpose(0, 2, 1, 3))}

    return Contender(call, results)


def group_query_attention(problem: Problem, threads: int) -> Contender:
    """ONNX Runtime's operator for decoders: it writes the last key into the cache in place."""
    case = problem.case
    last = {f"{name}_last": _rows(getattr(problem, name)[:, :, -1:]) for name in "kv"}
    feed = {"q": _rows(problem.q), **last, "k": problem.k, "v": problem.v}
    feed["last_index"] = np.full(case.B, case.S - 1, np.int32)
    feed["total"] = np.array([case.S], np.int32)
    outputs = {"o": feed["q"].shape, "k_cache": problem.k.shape, "v_cache": problem.v.shape}
    heads = {"num_heads": case.NH, "kv_num_heads": case.NK}
    model = onnx_model("GroupQueryAttention", feed, outputs, domain=MICROSOFT, **heads)
    session = onnx_session(model, threads)
    bound, o = _bind(session, feed, {"k_cache": "k", "v_cache": "v"})

    def call():
        session.run_with_iobinding(bound)

    def results():
        call()
        return {"o": problem.of_queries(o.numpy().reshape(problem.q.shape))}

    return Contender(call, results)


def _bind(session, feed: dict[str, Array], in_place: dict[str, str]):
    """The inputs held by the session, outputs written over inputs; returns also the output o."""
    (ort,) = require("onnxruntime")
    values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in feed.items()}
    o = ort.OrtValue.ortvalue_from_numpy(np.empty_like(feed["q"]))
    bound = session.io_binding()
    for name, value in values.items():
        bound.bind_ortvalue_input(name, value)
    bound.bind_ortvalue_output("o", o)
    for output, name in in_place.items():
        bound.bind_ortvalue_output(output, values[name])
    return bound, o


def onnx_model(operator: str, feed: dict[str, Array], outputs, inputs=None, **attributes) -> bytes:
    """A model of one operator, with fixed shapes; `inputs` are the names in `feed` unless given."""
    from onnx import TensorProto, helper

    node = helper.make_node(operator, inputs or list(feed), list(outputs), **attributes)
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in feed.items()
    ]
    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in outputs.items()
    ]
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph([node], operator, declared, made)
    return helper.make_model(graph, opset_imports=opsets, ir_version=ONNX_IR).SerializeToString()


def openvino(problem: Problem, threads: int) -> Contender:
    """One synchronous inference request."""
    ov, ops = require("openvino", "openvino.opset13")
    feed = {"q": problem.q, "k": problem.k, "v": problem.v}
    if problem.mask is not None:
        feed["mask"] = problem.mask
    inputs = [ops.parameter(a.shape, a.dtype, name=name) for name, a in feed.items()]
    node = ops.scaled_dot_product_attention(*inputs, causal=problem.case.causal)
    compiled = openvino_model(ov.Model([node], inputs, "attention"), threads)
    request = compiled.create_infer_request()
    arrays = list(feed.values())

    def call():
        return request.infer(arrays, share_inputs=True, share_outputs=True)

    return Contender(call, lambda: {"o": problem.of_queries(np.array(call()[0]))})


def _rows(a: Array) -> Array:
    """(B, heads, rows, D) as (B, rows, heads * D)."""
    B, heads, rows, D = a.shape
    return np.ascontiguousarray(a.transpose(0, 2, 1, 3)).reshape(B, rows, heads * D)
