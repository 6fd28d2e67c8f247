"""Which kernels run, and on how many threads: the one place that decides, and can say why."""

from __future__ import annotations

import importlib
import math
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np

from fastseq.kernels.cpu import features

LEVELS = ("baseline", "avx2", "avx512", "amx")

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@cache
def level() -> tuple[str, str]:
    """The ISA level in use and why: the best this CPU has, or FASTSEQ_CPU.

    AMX is used only where FASTSEQ_CPU asks for it: short sequences lose with it.
    """
    available = features.supported()
    usual = [name for name in available if name != "amx"]
    best = usual[-1]
    wanted = os.environ.get("FASTSEQ_CPU")
    if not wanted:
        asked = "; amx if FASTSEQ_CPU asks for it" if "amx" in available else ""
        return best, f"the best of {' '.join(usual)} that this CPU and OS support{asked}"
    if wanted not in LEVELS:
        raise ValueError(f"FASTSEQ_CPU must be one of {' '.join(LEVELS)}, got {wanted!r}")
    if wanted not in available:
        raise ValueError(f"FASTSEQ_CPU={wanted}: this machine supports only {' '.join(available)}")
    if wanted == "amx" and not features.request_tiles():
        raise ValueError("FASTSEQ_CPU=amx: the operating system refuses this process AMX's tiles")
    return wanted, f"FASTSEQ_CPU={wanted} (best here: {best})"


@cache
def kernels(stem: str, dtype: np.dtype) -> ModuleType:
    """The kernels of one family for float32 or float64 at the level in use; of AMX there is
    float32 attention, all else there is avx512's."""
    chosen = level()[0]
    if chosen == "amx" and (stem, dtype) != ("attention", np.float32):
        chosen = "avx512"
    return importlib.import_module(f"fastseq.kernels.cpu.{stem}_{chosen}_f{8 * dtype.itemsize}")


@cache
def l2_bytes() -> int:
    """A core's L2 in bytes, 1 MiB where Linux does not say; it decides how threads share a scan,
    never a result."""
    for level_of_cache in _CACHES.glob("index*/level"):
        try:
            if level_of_cache.read_text().strip() == "2":
                size = level_of_cache.with_name("size").read_text()  # 2048K
                return int(size.strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return 1 << 20


def _positive(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    # OMP_NUM_THREADS may be a list, one number per nesting level
    first = text.split(",")[0] if name == "OMP_NUM_THREADS" else text
    if not first.strip().isdecimal() or int(first) < 1:
        raise ValueError(f"{name} must be a positive integer, got {text!r}")
    return int(first)


def _cgroup_cpus() -> int | None:
    """CPUs that the cgroup v2 or v1 quota allows, rounded up."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            folder = Path("/sys/fs/cgroup/cpu")
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in {"max", "-1"}:
        return None
    return max(1, math.ceil(int(quota) / int(period)))


@cache
def _limits() -> dict[str, int]:
    """What bounds the thread count for the life of the process."""
    try:
        affinity = len(os.sched_getaffinity(0))
    except AttributeError:
        affinity = os.cpu_count() or 1
    limits = {
        "CPU affinity": affinity,
        "cgroup quota": _cgroup_cpus(),
        "OMP_NUM_THREADS": _positive("OMP_NUM_THREADS"),
        "FASTSEQ_NUM_THREADS": _positive("FASTSEQ_NUM_THREADS"),
    }
    return {name: n for name, n in limits.items() if n is not None}


class _Threads:
    """The process's settings; `forced` is for tests that need more threads than there are cores."""

    user: int | None = None
    forced: int | None = None
    forked: bool = False


def _after_fork() -> None:
    _Threads.forked = True  # libgomp's pool did not survive the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _torch_limit() -> int | None:
    # torch may be absent, or half imported
    get_num_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return None if get_num_threads is None else get_num_threads()


def thread_limits() -> dict[str, int]:
    """Every bound on the thread count that applies now; the smallest one counts."""
    changing = {
        "set_num_threads": _Threads.user,
        "torch.get_num_threads": _torch_limit(),
        "forked child": 1 if _Threads.forked else None,
    }
    return _limits() | {name: n for name, n in changing.items() if n is not None}


@cache
def _fixed_limit() -> int:
    return min(_limits().values())


def get_num_threads() -> int:
    """Threads a kernel may use: the smallest of the user's setting, torch's, OMP_NUM_THREADS,
    FASTSEQ_NUM_THREADS, the CPU affinity and the cgroup quota. Small work runs on one."""
    if _Threads.forced is not None:
        return _Threads.forced
    if _Threads.forked:
        return 1
    n, user, torch = _fixed_limit(), _Threads.user, _torch_limit()
    n = n if user is None or n < user else user
    return n if torch is None or n < torch else torch


def set_num_threads(n: int | None) -> None:
    """Use at most n threads from now on; None takes the limit back.

    Results do not depend on the number of threads.

    Args:
        n: a positive integer, or None.

    Raises:
        ValueError: n is not a positive integer.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"set_num_threads: n must be a positive integer or None, got {n!r}")
    _Threads.user = n
