"""The Triton kernels compile for Hopper, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="the GPU kernels need triton")

SHARED_MEMORY = 227 * 1024  # of a Hopper SM, for one program
KERNELS = {
    *("attention_fwd", "attention_decode", "attention_merge", "attention_delta"),
    *("attention_dq", "attention_dkv", "attention_dbias", "rotary_fwd"),
    *("recurrent_fwd", "recurrent_bwd", "linear_scan_fwd", "linear_scan_bwd"),
    *("linear_scan_summary", "linear_scan_carry"),
}


def test_kernels_compile_and_fit_in_shared_memory():
    script = Path(__file__).with_name("triton_compiling.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    shared = json.loads(ran.stdout.splitlines()[-1])
    assert set(shared) == KERNELS
    assert max(shared.values()) <= SHARED_MEMORY, shared
