"""What runs here and why: `python -m fastseq info [--json]` and `fastseq.show_config()`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Any

import numpy as np

from fastseq import _dispatch

OPTIONAL = ("torch", "numba", "triton", "onnxruntime", "openvino", "jax", "matplotlib", "rich")


def _version(name: str) -> str | None:
    """An optional part's version, without importing it; None where it is absent."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    """Whether the GPU kernels can run, and on what or why not."""
    for part in ("torch", "triton"):
        if importlib.util.find_spec(part) is None:
            return {"used": False, "why": f"{part} is not installed", "devices": []}
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_name(i) for i in range(count)]
    return {
        "used": count > 0,
        "why": ", ".join(devices) if devices else "torch finds no CUDA device",
        "devices": devices,
    }


def collect() -> dict:
    """Everything `show_config` prints, as plain data."""
    level, reason = _dispatch.level()
    lanes, real_bytes, pool = _dispatch.kernels("recurrent", np.dtype(np.float32)).description()
    limits = _dispatch.thread_limits()
    threads = _dispatch.get_num_threads() if pool else 1
    binding = " and ".join(name for name, n in limits.items() if n == threads)
    return {
        "fastseq": importlib.metadata.version("fastseq-kernels"),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "l2_bytes": _dispatch.l2_bytes()},
        "level": {
            "used": level,
            "why": reason,
            "register_bits": lanes * real_bytes * 8,
        },
        "threads": {
            "used": threads,
            "why": binding if pool else "libgomp.so.1 was not found: one thread",
            "limits": limits,
        },
        "gpu": _gpu(),
        "optional": {name: _version(name) for name in OPTIONAL},
    }


def show_config(*, as_json: bool = False) -> None:
    """Print which kernels are used and why, threads and why, and which optional parts are present.

    Args:
        as_json: print one JSON object instead of text.
    """
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    level, threads, cpu = found["level"], found["threads"], found["cpu"]
    limits = ", ".join(f"{name} {n}" for name, n in threads["limits"].items())
    lines = [
        f"fastseq {found['fastseq']}   python {found['python']}   numpy {found['numpy']}",
        f"cpu       {cpu['model']}, {cpu['cores']} cores, L2 {cpu['l2_bytes'] >> 10} KiB",
        f"kernels   {level['used']} ({level['register_bits']} bits): {level['why']}",
        f"threads   {threads['used']}: {threads['why']} (limits: {limits})",
    ]
    gpu = found["gpu"]
    lines.append(f"gpu       {'Triton kernels' if gpu['used'] else 'none'}: {gpu['why']}")
    lines += [f"{name:9s} {version or 'absent'}" for name, version in found["optional"].items()]
    sys.stdout.write("\n".join(lines) + "\n")
