"""What this machine can do at this moment, timed in the same rounds as the contenders.

Both numbers move by tens of percent with what else runs on a shared machine (sgemm on two cores
was seen between 317 and 378 GFLOP/s), so a share of the ceiling means something only when both were
measured together.
"""

from collections.abc import Callable
from functools import cache

import torch

PRODUCT_SIZE = 2048
PRODUCT_FLOP = 2 * PRODUCT_SIZE**3
PRODUCT, READ = "product ceiling", "read ceiling"


@cache
def product() -> Callable[[], object]:
    """A float32 product of 2048 x 2048 matrices with torch (MKL, where torch has it)."""
    n = PRODUCT_SIZE
    a, b, out = (torch.full((n, n), 1.0 / n) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def read(nbytes: int) -> Callable[[], object]:
    """One pass over `nbytes` of float32, every thread over its own part: a parallel sum.

    Its fixed cost is some microseconds, so below 1 MB it understates what the caches can do.
    """
    words = torch.ones(nbytes // 4)
    return words.sum


def calls(working_set: int) -> dict[str, Callable[[], object]]:
    """The ceilings a case is measured against; `working_set` 0: the product alone."""
    found = {PRODUCT: product()}
    if working_set:
        found[READ] = read(working_set)
    return found
