"""Where a measurement was taken: machine class, versions, commit. No host or user names."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

PEERS = ("onnxruntime", "openvino", "jax")  # jax last: the others fork, and jax warns of it
PACKAGES = ("numpy", "torch", "onnxruntime", "openvino", "jax", "numba")


def describe(threads: int) -> dict[str, object]:
    """Everything a reader needs to compare two result files."""
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": cores(),
            "caches": cache_sizes(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "threads": threads,
        "fastseq": _fastseq_info(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    for line in _read_lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cache_sizes() -> dict[str, str]:
    """Sizes of the caches the first core sees, e.g. {"L1d": "48K", "L2": "2048K"}."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            "".join(_read_lines(index / name)).strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            sizes[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    return sizes


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, "+" behind it where files differ; None outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def headline(about: dict) -> str:
    """One line for the head of a table or a plot."""
    machine = about["machine"]
    level = about["fastseq"]["level"]["used"]
    return ", ".join(
        part
        for part in (
            machine["cpu"],
            f"{machine['cores']} cores",
            f"threads: {about['threads']}",
            f"level {level}",
            "float32",
            f"torch {about['versions']['torch']}",
            f"commit {about['commit']}" if about["commit"] else "",
        )
        if part
    )


def _fastseq_info() -> dict:
    from fastseq import info

    return dict(info.collect())


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def limit_threads(threads: int) -> None:
    """One thread count for all contenders, and the import of the peers, which depends on it.

    XLA offers no call for it and reads NPROC when it starts.
    """
    if "jax" in sys.modules and os.environ.get("NPROC") != str(threads):
        raise RuntimeError("bench: jax was imported before its thread count was set")
    os.environ["NPROC"] = str(threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import torch

    import fastseq

    torch.set_num_threads(threads)
    fastseq.set_num_threads(threads)
    for peer in PEERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(peer)
