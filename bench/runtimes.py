"""Models of the inference runtimes made ready, with the settings that every family shares."""

import importlib


def require(*packages: str) -> list:
    """The imported packages, or Absent."""
    from .families import Absent

    try:
        return [importlib.import_module(package) for package in packages]
    except ImportError as error:
        raise Absent(f"{error.name or packages[0]} is not installed") from None


def onnx_session(model: bytes, threads: int):
    """An ONNX Runtime session on the CPU."""
    ort, _ = require("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its idle threads would slow whoever is timed next; measured to cost it nothing itself.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def openvino_model(model, threads: int):
    """An OpenVINO model compiled for the CPU in float32; `model` is its own, or ONNX bytes."""
    (ov,) = require("openvino")
    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the CPU has it
    }
    loaded = core.read_model(model) if isinstance(model, bytes) else model
    return core.compile_model(loaded, "CPU", settings)
