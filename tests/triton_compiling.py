"""Compile Triton kernels for Hopper without a GPU: run as a script, without TRITON_INTERPRET.

The interpreter runs Python and forgives what the compiler does not: a variable that changes its
type, a tuple that holds None. Here the public functions run on CPU tensors as if these were on a
GPU, and every launch compiles down to machine code instead. Prints {kernel: most shared memory}.
"""

import json
import sys
from collections import defaultdict

import torch
from fastseq.kernels.triton import attention as kernels
from fastseq.kernels.triton import launch, linear_scan, recurrent
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fastseq.torch as fst
from fastseq.torch import attention_ops, linear_scan_ops, ops, position

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
    linear_scan.multiprocessors = recurrent.multiprocessors = lambda tensor: 132
    for module in (attention_ops, position, ops, linear_scan_ops):
        module.on_gpu = lambda tensor: True
    sys.modules["fastseq.torch.linear_scan"].on_gpu = lambda tensor: True


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


def scan(function, H, dtype, T=3, masks=False):
    G = {"rnn": 1, "gru": 3, "lstm": 4}[function]
    x, w, b = (torch.zeros(s, dtype=dtype) for s in ((T, 20, H), (G * H, H), (G * H,)))
    given = {"resets": torch.zeros(T, 20, dtype=torch.bool)} if masks else {}
    given |= {"lengths": torch.ones(20, dtype=torch.int64), "reverse": True} if masks else {}
    given |= {"clip_recurrent_grad": 0.5} if masks else {}
    given |= {"return_cell_states": True} if function == "lstm" else {}
    leaves = [a.requires_grad_() for a in (x, w, w.clone(), b, b.clone())]
    y, _ = getattr(fst, function)(*leaves, **given)
    (y[0] + y[1] if function == "lstm" else y).sum().backward()


def scans():
    """The largest sizes of the regimes, whose shared memory is the most."""
    for function, whole, together in (("rnn", 256, 1024), ("gru", 128, 512), ("lstm", 128, 512)):
        scan(function, whole, torch.bfloat16)
        scan(function, together, torch.bfloat16, masks=True)
    scan("rnn", 128, torch.float32)
    scan("gru", 128, torch.float32, masks=True)
    scan("lstm", 64, torch.float32)
    scan("lstm", 65, torch.float32)
    scan("gru", 520, torch.float16)
    scan("lstm", 2100, torch.bfloat16, T=2)
    scan("gru", 2100, torch.float32, T=2)
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.zeros(600, 2, 40, dtype=dtype, requires_grad=True)
        resets = torch.zeros(600, 2, dtype=torch.bool)
        h, _ = fst.linear_scan(a, a, lengths=torch.tensor([3, 600]), resets=resets)
        h.sum().backward()


def lengths_compile_nothing_new():
    """T, B and the directions' steps are no constants of a kernel."""
    compiled = []
    run = JITFunction.run

    def counting(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        compiled.append((self.fn.__name__, kernel.hash))
        return kernel

    JITFunction.run = counting
    for T in (1, 7, 16):
        scan("gru", 32, torch.float32, T=T)
    JITFunction.run = run
    assert len(set(compiled)) == len({name for name, _ in compiled}), compiled


def main():
    shared = defaultdict(int)
    compile_instead(shared)
    scans()
    lengths_compile_nothing_new()
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
