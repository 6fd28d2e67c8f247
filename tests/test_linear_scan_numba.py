"""The linear recurrences' compiler, Numba: imported late, compiles once, missed by name."""

import os
import re
import subprocess
import sys
from pathlib import Path

from running import python

COMPILES = """
import sys
import fastseq
assert "numba" not in sys.modules
from linear_scan_problems import ScanProblem
from linear_scan_running import solve
for dtype in ("float32", "float64"):
    solve(ScanProblem(dtype=dtype))
assert "numba" in sys.modules
"""


def test_compiles_once_on_a_machine_and_says_so(tmp_path):
    """NUMBA_CACHE_DIR stands for the user's cache folder, used where the package is read-only."""

    def told(folder):
        env = {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", COMPILES]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    first = told(tmp_path).splitlines()
    assert [re.sub(r"\d+\.\d", "S", line) for line in first] == [
        f"fastseq: Numba compiled linear_scan for {bits}-bit numbers in S s, once"
        for bits in (32, 64)
    ]
    assert told(tmp_path) == ""


def test_nowhere_to_keep_what_is_compiled(monkeypatch):
    """Every process compiles for itself then."""
    from fastseq.kernels.numba import linear_scan, native
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    kernel, cached = native.compiled(linear_scan.forward_f32)
    assert callable(kernel) and not cached


def test_without_numba_the_error_names_the_extra():
    code = """
import sys
sys.modules["numba"] = None
import numpy as np, fastseq
try:
    fastseq.linear_scan(*np.zeros((2, 3, 2, 1)))
except ImportError as error:
    print(error)
"""
    assert "pip install fastseq-kernels[numba]" in python(code)
