"""All GPU work in one go: `python -m fastseq.bench.gpu [--out FILE] [--only PART ...]`.

First the tests of the Triton kernels on the GPU, in a process with a time limit, then arrays of
more than 2^31 elements, then every case of `gpu_cases.py`: no time without a right result,
contenders take turns, ratios are taken pair by pair, losses are shown. Writes JSON and a table.
--only runs parts of it, and puts them beside what FILE holds of the same commit.
With --interpret the cases' results are checked at small sizes in Triton's interpreter, untimed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("recurrent", "linear_scan", "attention", "position")
PARTS = ("tests", "large", "recurrent", "attention", "linear_scan")
ROUNDS, SECONDS_A_TURN, TEST_LIMIT = 15, 0.02, 540


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 if everything that ran is right."""
    parser = argparse.ArgumentParser(prog="python -m fastseq.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON; the table goes beside it as .md")
    parser.add_argument("--interpret", action="store_true", help="check small cases without a GPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        return _interpret()
    import torch

    if not torch.cuda.is_available():
        from .gpu_cases import cases

        print(f"no CUDA device: nothing to measure ({len(cases())} cases are ready)")
        return 0
    return _measure(options)


# ---- right results


def _interpret() -> int:
    import numpy as np

    import fastseq.torch  # noqa: F401
    from fastseq.torch import attention_ops, linear_scan_ops, ops

    from .gpu_cases import build, cases

    modules = (attention_ops, linear_scan_ops, ops, sys.modules["fastseq.torch.linear_scan"])
    for module in modules:
        module.on_gpu = lambda tensor: True
    wrong = 0
    for case in cases(small=True):
        calls, exact = build(case, "cpu")
        with np.errstate(all="ignore"):  # the interpreter's arithmetic is NumPy's
            errors = judge(case, {name: call() for name, call in calls.items()}, exact())
        wrong += bool(errors)
        print(f"{case}: {errors or 'right'}")
    return int(wrong > 0)


def judge(case, results, reference) -> dict[str, str]:
    """{contender: what is wrong}: the library's one tolerance for ours, beside the best peer.

    A peer whose results are off by a tenth computes something else.
    """
    import torch

    eps = torch.finfo(case.dtype).eps
    scales = [float(r.abs().max()) for r in reference]
    errors = {
        name: [float((a.double() - r).abs().max()) for a, r in zip(found, reference, strict=True)]
        for name, found in results.items()
        if found
    }
    peers = [e for name, e in errors.items() if _is_peer(name)]
    wrong = {}
    for name, found in errors.items():
        for i, (error, scale) in enumerate(zip(found, scales, strict=True)):
            limit = 0.1 * scale
            if name.startswith("ours"):
                slack = 2 if i < case.outputs else 3
                beside = peers if "tf32" not in name else [errors["cudnn tf32"]]
                limit = slack * max((e[i] for e in beside), default=0.0) + 4 * eps * scale
            if not error <= limit:
                wrong[name] = f"result {i} off by {error:.2e}, allowed {limit:.2e}"
    return wrong


def _is_peer(name: str) -> bool:
    return not name.startswith("ours") and "tf32" not in name


def _run_tests() -> str:
    """pytest's last line, from a process of its own: a kernel that hangs ends it, not us."""
    paths = [str(ROOT / "tests" / f"test_triton_{stem}.py") for stem in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *paths]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TEST_LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"not done after {TEST_LIMIT} s"
    if ran.returncode:
        print(ran.stdout[-20000:])
    return ran.stdout.strip().splitlines()[-1]


def more_than_32_bits() -> dict[str, str]:
    """Families on more than 2^31 elements: the last rows and columns as they are alone."""
    import torch

    import fastseq.torch as fst

    def scan():
        a = torch.full((2**15 + 1, 4, 2**14), 0.5, dtype=torch.bfloat16, device="cuda")
        b = torch.randn(a.shape[0], 1, 64, dtype=a.dtype, device="cuda")
        whole = torch.zeros_like(a)
        whole[:, -1:, -64:] = b
        found = fst.linear_scan(a, whole)[0][:, -1:, -64:]
        return found, fst.linear_scan(a[:, -1:, -64:].contiguous(), b)[0]

    def lstm():
        module = fst.nn.LSTM(8, 64).to("cuda", torch.bfloat16)
        x = torch.randn(2100, 4096, 8, dtype=torch.bfloat16, device="cuda")
        found = module(x)[0][:, -16:]
        return found.detach(), module(x[:, -16:].contiguous())[0].detach()

    def attention():
        q = torch.randn(32, 64, 16400, 64, dtype=torch.bfloat16, device="cuda")
        found = fst.attention(q, q, q, causal=True)[-1:, -1:]
        last = q[-1:, -1:].contiguous()
        return found, fst.attention(last, last, last, causal=True)

    words = {}
    for name, run in {"linear_scan": scan, "lstm": lstm, "attention": attention}.items():
        try:
            found, alone = run()
            difference = float((found.float() - alone.float()).abs().max())
            words[name] = "right" if difference <= 2**-6 else f"off by {difference:.2e}"
        except Exception as error:
            words[name] = f"{type(error).__name__}: {error}"
        torch.cuda.empty_cache()
    return words


# ---- times


def _measure(options) -> int:
    import torch

    from . import machine
    from .gpu_cases import build, cases

    device = torch.cuda.get_device_name()
    name = device.lower().replace(" ", "-").replace("/", "-")
    out = options.out or ROOT / "bench" / "results" / f"gpu-{name}.json"
    found = {
        "device": device,
        "versions": {name: machine.version(name) for name in ("torch", "triton")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": machine.commit(),
        "tests": "not run",
        "large": {},
        "rows": [],
    }
    before = json.loads(out.read_text()) if out.exists() else {}
    if before.get("commit") == found["commit"]:
        found = before
    if "tests" in options.only:
        found["tests"] = _run_tests()
    if "large" in options.only:
        found["large"] = more_than_32_bits()
    print(f"{device}: tests {found['tests']}; more than 2^31 elements {found['large']}")
    found["rows"] = [row for row in found["rows"] if row["family"] not in options.only]
    for case in cases():
        if case.family not in options.only:
            continue
        row = {"case": str(case), "family": case.family, "bar": case.bar}
        row |= _row(case, *build(case, "cuda"))
        found["rows"].append(row)
        print(line(row), flush=True)
        out.write_text(json.dumps(found, indent=1))  # what is there stays if a later case hangs
        torch.cuda.empty_cache()
    out.write_text(json.dumps(found, indent=1))
    out.with_suffix(".md").write_text(table(found))
    bad = any("ours" in row["errors"] for row in found["rows"])
    return int(bad or "failed" in found["tests"])


def _row(case, calls, exact) -> dict:
    """errors, milliseconds by contender and round, the ratio against the fastest peer."""
    results, errors = {}, {}
    for name, call in calls.items():
        try:
            results[name] = call()
        except Exception as error:  # a backend that does not take the case
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    try:
        reference = exact() if any(results.values()) else []
        errors |= judge(case, results, reference)
    except Exception as error:
        errors["reference"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        errors["ours"] = errors.get("ours", "not checked")
    del results
    timed = {k: call for k, call in calls.items() if k not in errors and "untimed" not in k}
    times = interleave(timed)
    peers = [name for name in case.against if name in times]
    ratio = None
    if "ours" in times and peers:
        fastest = min(peers, key=lambda name: statistics.median(times[name]))
        pairs = zip(times[fastest], times["ours"], strict=True)
        ratio = statistics.median(peer / ours for peer, ours in pairs)
    return {"errors": errors, "ms": times, "ratio": ratio}


def interleave(calls) -> dict[str, list[float]]:
    """Milliseconds of each call, one number a round; each turn is long enough for the clock."""
    repeats = {name: max(1, int(SECONDS_A_TURN * 1e3 / _time(call, 2))) for name, call in
               calls.items()}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        order = list(calls) if turn % 2 else list(calls)[::-1]
        for name in order:
            times[name].append(_time(calls[name], repeats[name]))
    return times


def _time(call, repeats: int) -> float:
    """Milliseconds of one call, on the GPU's clock."""
    import torch

    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


# ---- words


def line(row: dict) -> str:
    """One row of the table, for a terminal."""
    times = ", ".join(f"{name} {statistics.median(ms):.3f} ms" for name, ms in row["ms"].items())
    return f"{row['case']}: {times}; {verdict(row)}"


def verdict(row: dict) -> str:
    """The ratio beside its bar, or what went wrong."""
    if "ours" in row["errors"]:
        return f"ours: {row['errors']['ours']}"
    if row["ratio"] is None:
        return "no peer"
    if row["bar"] is None:
        return f"{row['ratio']:.2f}x"
    word = "pass" if row["ratio"] >= row["bar"] else "missed"
    return f"{row['ratio']:.2f}x, bar {row['bar']:g}x: {word}"


def table(found: dict) -> str:
    """Markdown."""
    head = (
        f"{found['device']}, torch {found['versions']['torch']}, triton "
        f"{found['versions']['triton']}, CUDA {found['cuda']}, cuDNN {found['cudnn']}, commit "
        f"{found['commit']}. Medians of {ROUNDS} rounds in ms; the ratio is the fastest peer's "
        "time by ours."
    )
    checks = [f"Tests on the GPU: {found['tests']}."]
    checks += [f"More than 2^31 elements, {k}: {v}." for k, v in found["large"].items()]
    lines = ["# Benchmark on a GPU", "", head, "", *checks, ""]
    lines += ["| case | ours | others | ratio |", "|---|---|---|---|"]
    for row in found["rows"]:
        medians = {name: f"{statistics.median(ms):.3f}" for name, ms in row["ms"].items()}
        ours = medians.pop("ours", "-")
        others = ", ".join(f"{name} {ms}" for name, ms in medians.items())
        lines.append(f"| {row['case']} | {ours} | {others} | {verdict(row)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
