"""Contenders of the family "rnn" besides torch: ONNX Runtime, OpenVINO (inference), JAX (training).

ONNX Runtime and OpenVINO run the same ONNX model, built here from the problem's weights.
Gates: torch LSTM i|f|g|o, GRU r|z|n; ONNX LSTM i|o|f|c, GRU z|r|h with linear_before_reset=1.
"""

from collections.abc import Callable

import numpy as np

from .families import Contender
from .gate import Results
from .recurrent import GATES, Case, Problem
from .runtimes import onnx_session, openvino_model, require

OPERATORS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}
ONNX_GATES = {"rnn_tanh": (0,), "rnn_relu": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}
ONNX_IR, ONNX_OPSET = 10, 14


def builders(problem: Problem, threads: int) -> dict[str, Callable[[], Contender]]:
    """All peers; building one raises Absent if its package is not installed."""
    run_onnx = onnx_runtime_stream if problem.case.streaming else onnx_runtime
    return {
        "onnxruntime": lambda: run_onnx(problem, threads),
        "openvino": lambda: openvino(problem, threads),
        "jax": lambda: jax_training(problem),
    }


def onnx_runtime(problem: Problem, threads: int) -> Contender:
    """One session.run over all steps."""
    session = _session(problem, threads)
    inputs = {"x": problem.x}
    return Contender(
        lambda: session.run(None, inputs),
        lambda: _named_results(problem, session.run(None, inputs)),
    )


def onnx_runtime_stream(problem: Problem, threads: int) -> Contender:
    """One session.run a step, the state it returned fed back."""
    session = _session(problem, threads, steps=1)
    states = ["h0", "c0"][: _state_count(problem.case)]
    zeros = [np.zeros((1, 1, problem.case.H), np.float32) for _ in states]
    feed = {"x": problem.x[:1], **dict(zip(states, zeros, strict=True))}

    def call() -> None:
        _, *carried = session.run(None, feed)
        feed.update(zip(states, carried, strict=True))

    def results() -> Results:
        carried, ys = zeros, []
        for x in problem.x:
            y, *carried = session.run(
                None, {"x": x[None], **dict(zip(states, carried, strict=True))}
            )
            ys.append(y)
        return _named_results(problem, [np.concatenate(ys), *carried])

    return Contender(call, results)


def _session(problem: Problem, threads: int, steps: int | None = None):
    require("onnxruntime", "onnx")  # before the model is built
    return onnx_session(onnx_model(problem, steps), threads)


def openvino(problem: Problem, threads: int) -> Contender:
    """One synchronous inference request over all steps, in float32."""
    require("openvino", "onnx")  # before the model is built
    compiled = openvino_model(onnx_model(problem), threads)
    request = compiled.create_infer_request()
    inputs = {"x": problem.x}

    def call():
        return request.infer(inputs, share_inputs=True, share_outputs=True)

    def results() -> Results:
        found = call()
        return _named_results(problem, [np.array(found[out]) for out in compiled.outputs])

    return Contender(call, results)


def onnx_model(problem: Problem, steps: int | None = None) -> bytes:
    """The layers of a case as an ONNX model of fixed shape: x [h0 c0] -> y (T, D, B, H), h_n [c_n].

    `steps` given: that many steps only, and the state as an input. Between two layers y is brought
    to (T, B, D*H); the last y is left as the operator gives it, at no cost.
    """
    from onnx import TensorProto, helper

    case = problem.case
    T = steps or problem.x.shape[0]
    state = [case.layers * case.directions, case.B, case.H]
    state_names = ["h", "c"][: _state_count(case)]
    inputs = {"x": [T, case.B, case.H]}
    if steps:
        inputs |= {f"{name}0": state for name in state_names}
    outputs = {"y": [T, case.directions, case.B, case.H]}
    outputs |= {f"{name}_n": state for name in state_names}
    nodes, constants = _onnx_nodes(problem, T, list(inputs)[1:], list(outputs)[1:])

    def declare(shapes):
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ]

    graph = helper.make_graph(nodes, case.kind, declare(inputs), declare(outputs), constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=ONNX_IR
    )
    return model.SerializeToString()


def _onnx_nodes(problem: Problem, T: int, states_in: list[str], states_out: list[str]):
    """One operator a layer, y brought to (T, B, D*H) between them, the final states joined."""
    from onnx import helper, numpy_helper

    case = problem.case
    width = case.directions * case.H
    constants = {"rows": np.array([T, case.B, width])} if case.layers > 1 else {}
    nodes, x = [], "x"
    for layer in range(case.layers):
        last = layer == case.layers - 1
        weights = _onnx_weights(problem, layer)
        constants |= weights
        y = "y" if last else f"y{layer}"
        finals = [s if case.layers == 1 else f"{s}{layer}" for s in states_out]
        states = ["", *states_in] if states_in else []
        nodes.append(_operator(case, [x, *weights, *states], [y, *finals]))
        if not last:
            x = f"x{layer + 1}"
            nodes.append(helper.make_node("Transpose", [y], [f"{y}t"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"{y}t", "rows"], [x]))
    if case.layers > 1:
        for s in states_out:
            parts = [f"{s}{layer}" for layer in range(case.layers)]
            nodes.append(helper.make_node("Concat", parts, [s], axis=0))
    return nodes, [numpy_helper.from_array(value, name) for name, value in constants.items()]


def _operator(case: Case, inputs: list[str], outputs: list[str]):
    from onnx import helper

    options = {"linear_before_reset": 1} if case.kind == "gru" else {}
    if case.kind == "rnn_relu":
        options["activations"] = ["Relu"] * case.directions
    direction = "bidirectional" if case.bidirectional else "forward"
    return helper.make_node(
        OPERATORS[case.kind],
        inputs,
        outputs,
        hidden_size=case.H,
        direction=direction,
        **options,
    )


def _onnx_weights(problem: Problem, layer: int) -> dict[str, np.ndarray]:
    """W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H) of a layer, by name."""
    case = problem.case
    per_direction = []
    for direction in range(case.directions):
        first = 4 * (layer * case.directions + direction)
        w_ih, w_hh, b_ih, b_hh = (
            _onnx_gates(case, weight) for weight in problem.weights[first : first + 4]
        )
        per_direction.append((w_ih, w_hh, np.concatenate([b_ih, b_hh])))
    stacked = (np.stack(parts) for parts in zip(*per_direction, strict=True))
    return dict(zip((f"W{layer}", f"R{layer}", f"B{layer}"), stacked, strict=True))


def _onnx_gates(case: Case, weight: np.ndarray) -> np.ndarray:
    """The gates (axis 0) in ONNX's order."""
    gates = np.split(weight, GATES[case.kind])
    return np.concatenate([gates[gate] for gate in ONNX_GATES[case.kind]])


def _named_results(problem: Problem, found: list[np.ndarray]) -> Results:
    """From the model's outputs to y (T, B, D*H), h_n and c_n of the rows that are compared."""
    y, *state = found
    T, D, B, H = y.shape
    y = y.transpose(0, 2, 1, 3).reshape(T, B, D * H)
    named = dict(zip(("h_n", "c_n"), state, strict=False), y=y)
    return {name: value[:, problem.rows] for name, value in named.items()}


def _state_count(case: Case) -> int:
    return 2 if case.kind == "lstm" else 1


def jax_training(problem: Problem) -> Contender:
    """jit of a lax.scan after one projection of all steps, and its vjp."""
    jax, jnp = require("jax", "jax.numpy")
    cell = _jax_cell(problem.case.kind, jax, jnp)

    def layer(x, weights):
        w_ih, w_hh, b_ih, b_hh = weights
        gx = x @ w_ih.T + b_ih

        def step(state, gx_t):
            state = cell(gx_t, state[0] @ w_hh.T + b_hh, *state)
            return state, state[0]

        zeros = jnp.zeros((x.shape[1], w_hh.shape[1]), x.dtype)
        state, y = jax.lax.scan(step, (zeros,) * _state_count(problem.case), gx)
        return y, state

    @jax.jit
    def run(x, weights, dy):
        y, pullback, state = jax.vjp(layer, x, weights, has_aux=True)
        return y, state, pullback(dy)

    x, dy, gate_dy = (jnp.asarray(a) for a in (problem.x, problem.dy, problem.gate_dy))
    weights = tuple(jnp.asarray(weight) for weight in problem.weights)

    def results() -> Results:
        y, state, (dx, dweights) = run(x, weights, gate_dy)
        names = ("dweight_ih_l0", "dweight_hh_l0", "dbias_ih_l0", "dbias_hh_l0")
        found = {"y": y, "dx": dx, "h_n": state[0][None], **dict(zip(names, dweights, strict=True))}
        if problem.case.kind == "lstm":
            found["c_n"] = state[1][None]
        return {name: np.asarray(value) for name, value in found.items()}

    return Contender(lambda: jax.block_until_ready(run(x, weights, dy)), results)


def _jax_cell(kind: str, jax, jnp) -> Callable:
    """(gx, gh, h[, c]) -> (h',) or (h', c'): the equations, gates in torch's order."""

    def rnn(gx, gh, h):
        activation = jax.nn.relu if kind == "rnn_relu" else jnp.tanh
        return (activation(gx + gh),)

    def gru(gx, gh, h):
        (xr, xz, xn), (hr, hz, hn) = jnp.split(gx, 3, -1), jnp.split(gh, 3, -1)
        r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
        return ((1 - z) * jnp.tanh(xn + r * hn) + z * h,)

    def lstm(gx, gh, h, c):
        i, f, g, o = jnp.split(gx + gh, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    return {"gru": gru, "lstm": lstm}.get(kind, rnn)
