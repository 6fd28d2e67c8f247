"""The job "memory": what attention needs beside its inputs and outputs, by sequence length.

Causal, one head of D = 64, B = 1, L = S. Each number is the peak of resident memory during one call
in a process of its own, less what was resident before it, less the outputs; training less the
gradients too. A score matrix of 32768 would be 4096 MiB.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .bars import Verdict
from .families import OURS, JobReport

LENGTHS = tuple(2**n for n in range(10, 16))
D = 64
ALLOWED_MIB = 64
CONTENDERS, JOBS = (OURS, "torch"), ("fwd", "train")
MIB = 2**20


def run(threads: int, full: bool, progress: Callable[[float], None]) -> JobReport:
    """A process for each number; the quick profile has inference at the greatest length only."""
    lengths, jobs = (LENGTHS, JOBS) if full else (LENGTHS[-1:], JOBS[:1])
    columns = [(who, job) for job in jobs for who in CONTENDERS]
    found: dict[str, dict[int, float]] = {}
    for i, (who, job) in enumerate(columns):
        found[f"{who} {job}"] = {L: in_a_process(who, job, L, threads) for L in lengths}
        progress((i + 1) / len(columns))
    rows = tuple((str(L), *(f"{mib[L]:.1f} MiB" for mib in found.values())) for L in lengths)
    longest = found[f"{OURS} fwd"][LENGTHS[-1]]
    verdict = Verdict(
        f"memory: peak beside inputs and outputs, causal L = S = {LENGTHS[-1]}, one head",
        f"< {ALLOWED_MIB} MiB",
        f"{longest:.1f} MiB",
        "1 of 1",
        longest < ALLOWED_MIB,
    )
    return JobReport("memory", ("L = S", *found), rows, (verdict,), {"mib": found})


def in_a_process(who: str, job: str, L: int, threads: int) -> float:
    """MiB, as a fresh interpreter measures it."""
    command = [sys.executable, "-m", "fastseq.bench.attention_memory", who, job, str(L)]
    done = subprocess.run([*command, str(threads)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(who: str, job: str, L: int) -> float:
    """MiB of one call in this process."""
    import torch

    call = _torch if who == "torch" else _ours
    short, long = (
        [torch.randn(1, 1, n, D, requires_grad=job == "train") for _ in range(3)] for n in (D, L)
    )
    do = torch.randn(1, 1, L, D)
    _attend(call, short, torch.ones(1, 1, D, D))  # whatever is set up once
    with contextlib.suppress(OSError):  # the peak so far counts where it cannot be forgotten
        Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    outputs = _attend(call, long, do)
    held = sum(a.untyped_storage().nbytes() for a in outputs)
    return (_status_bytes("VmHWM") - before - held) / MIB


def _attend(call, leaves: list, do) -> list:
    """The outputs: o, and in training the gradients."""
    import torch

    o = call(*leaves)
    return [o, *torch.autograd.grad(o, leaves, do)] if o.requires_grad else [o]


def _torch(q, k, v):
    from torch.nn import functional as F

    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _ours(q, k, v):
    import fastseq.torch

    return fastseq.torch.attention(q, k, v, causal=True)


def _status_bytes(field: str) -> int:
    """A line of /proc/self/status, which is in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"bench memory: /proc/self/status has no {field}")


def main() -> None:
    """Print what one call needs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("who", choices=CONTENDERS)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("L", type=int)
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    import torch

    import fastseq

    torch.set_num_threads(args.threads)
    fastseq.set_num_threads(args.threads)
    print(measure(args.who, args.job, args.L))


if __name__ == "__main__":
    main()
