"""The GPU benchmark without a GPU: it says so, and its cases are right in the interpreter."""

import pytest
from running import python

pytest.importorskip("triton")

RUN = "from fastseq.bench import gpu; raise SystemExit(gpu.main({}))"


def test_without_a_gpu_it_says_so():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the script itself is the test")
    assert python(RUN.format([])).startswith("no CUDA device: nothing to measure (")


def test_every_family_is_right_in_the_interpreter():
    lines = python(RUN.format(["--interpret"])).splitlines()
    assert {line.split(".")[0].split("-")[0] for line in lines} >= {
        "LSTM", "GRU", "RNN", "attention", "linear_scan",
    }  # fmt: skip
    assert all(line.endswith(": right") for line in lines)
