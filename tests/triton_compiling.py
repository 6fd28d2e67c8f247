"""Compile Triton kernels for Hopper without a GPU: run as a script, without TRITON_INTERPRET.

The interpreter runs Python and forgives what the compiler does not: a variable that changes its
type, a tuple that holds None. Here the public functions run on CPU tensors as if these were on a
GPU, and every launch compiles down to machine code instead. Prints {kernel: most shared memory}.
"""

import json
from collections import defaultdict

import torch
from fastseq.kernels.triton import attention as kernels
from fastseq.kernels.triton import launch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fastseq.torch as fst
from fastseq.torch import attention_ops, position

HOPPER = 90
TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
TABLES = ("FORWARD", "FORWARD_PAIRS", "DECODE", "DQ", "DQ_PAIRS", "DKV")


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", HOPPER, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


def compile_instead(shared):
    """Make every launch compile, and note the shared memory that the kernel asks for."""
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = self.fn.__name__
        shared[name] = max(shared[name], kernel.metadata.shared)
        return kernel

    JITFunction.run = compiled
    driver.set_active(Hopper())
    launch.check = lambda op, name, tensor: None
    launch.architecture = lambda tensor: HOPPER
    attention_ops.on_gpu = position.on_gpu = lambda tensor: True


def attend(dtype, D, L=40, **options):
    q, k = torch.zeros(2, 4, L, D, dtype=dtype), torch.zeros(2, 2, 600, D, dtype=dtype)
    leaves = [a.requires_grad_() for a in (q, k, k.clone())]
    fst.attention(*leaves, **options).sum().backward()


def everything(dtype):
    mask, bias = torch.ones(40, 600, dtype=torch.bool), torch.zeros(4, 40, 600, dtype=dtype)
    lengths = torch.tensor([3, 4])
    return {
        "mask": mask,
        "bias": bias.requires_grad_(),
        "causal": "bottom_right",
        "window": (300, 2),
        "q_lengths": lengths,
        "kv_lengths": lengths,
        "softcap": 3.0,
        "alibi_slopes": torch.ones(2, 4),
        "dropout_p": 0.1,
        "seed": 2**63 + 1,
    }


def main():
    shared = defaultdict(int)
    compile_instead(shared)
    attend(torch.bfloat16, 64, L=100, causal=True)  # the shipped blocks
    for name in TABLES:
        setattr(kernels, name, [launch.Row(float("inf"), size, 0, TILE) for size in (2, 4)])
    for few in (0, 400):
        kernels.FEW_ROWS = few
        attend(torch.float16, 20, **everything(torch.float16))
    kernels.WIDEST, kernels.CHUNK, kernels.FEW_ROWS = 16, 16, 0
    attend(torch.float32, 20)
    rows, offsets = torch.zeros(30, 2, 16, dtype=torch.bfloat16), torch.tensor([0, 10, 30])
    rows.requires_grad_()
    fst.attention_varlen(rows, rows, rows, offsets, offsets, causal=True).sum().backward()
    x = torch.zeros(2, 3, 20, 16, dtype=torch.bfloat16)
    for interleaved in (False, True):
        fst.rotary(x, dim=12, interleaved=interleaved, offsets=torch.tensor([1, 2]))
    print(json.dumps(shared))


if __name__ == "__main__":
    main()
