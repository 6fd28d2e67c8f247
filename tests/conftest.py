"""Fixtures of every family's tests; `tolerance.py` has the rule, `problems.py` the problems."""

import zlib

import numpy as np
import pytest


@pytest.fixture
def rng(request):
    """NumPy's generator, seeded by the test's own id: the same alone, reordered or in parallel."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
