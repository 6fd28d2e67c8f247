"""Fixtures of every family's tests; `tolerance.py` has the rule, `problems.py` the problems."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest

# Without a GPU Triton's kernels run in its interpreter, which it decides when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def rng(request):
    """NumPy's generator, seeded by the test's own id: the same alone, reordered or in parallel."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
