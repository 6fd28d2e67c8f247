"""GPU kernels in Triton: one stem per family, and `launch.py`, what they share.

Nothing here imports triton until a family's module is imported, at the first call on a CUDA tensor.
"""

import importlib
import importlib.util
from types import ModuleType


def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def kernels(op: str, stem: str) -> ModuleType:
    """The module `stem` of this package.

    Raises:
        ImportError: triton is not installed.
    """
    if not available():
        raise ImportError(
            f"{op}: CUDA tensors need triton: pip install fastseq-kernels[triton] (Linux)"
        )
    return importlib.import_module(f"{__name__}.{stem}")
