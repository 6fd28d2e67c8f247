"""What the tests of the GPU's scans share: where they run, dtypes, torch's results in any dtype."""

import warnings

import numpy as np
import torch
from problems import Result

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter keeps bfloat16 as integers, whose sums would be wrong
DTYPES = ["float32", "float16"] + ["bfloat16"] * (DEVICE == "cuda")


def rounded(problem, dtype):
    """The problem with its arrays rounded to the dtype, as float64 for the reference."""

    def of(arrays):
        return {k: torch.tensor(a).to(getattr(torch, dtype)).double().numpy() for k, a in arrays}

    return problem.having(
        inputs=of(problem.inputs.items()), cotangents=of(problem.cotangents.items())
    )


def tensor(a, dtype=None):
    """On the device; floats in the dtype, if given."""
    a = torch.tensor(np.asarray(a), device=DEVICE)
    return a.to(getattr(torch, dtype)) if dtype and a.is_floating_point() else a


def options_of(problem):
    return {k: tensor(v) if isinstance(v, np.ndarray) else v for k, v in problem.options.items()}


def leaves_of(problem, dtype):
    return {name: tensor(a, dtype).requires_grad_() for name, a in problem.inputs.items()}


def result(problem, leaves, outputs):
    """The Result of these outputs, by autograd, on the CPU."""
    loss = sum(
        (tensor(problem.cotangents[f"d{name}"]).to(a) * a).sum() for name, a in outputs.items()
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return Result(
        {name: a.detach().cpu() for name, a in outputs.items()},
        {name: a.cpu() for name, a in zip(leaves, grads, strict=True)},
    )


def peer(problem, dtype, outputs_of):
    """torch's Result in the dtype, on the CPU; outputs_of: leaves to outputs by name."""
    leaves = {
        name: torch.tensor(a).to(getattr(torch, dtype)).requires_grad_()
        for name, a in problem.inputs.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        outputs = outputs_of(leaves)
    loss = sum(
        (torch.tensor(problem.cotangents[f"d{name}"]).to(a) * a).sum()
        for name, a in outputs.items()
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return Result(
        {name: a.detach() for name, a in outputs.items()},
        dict(zip(leaves, grads, strict=True)),
    )
