"""What the tests of the GPU's scans share: where they run, dtypes, torch's results in any dtype."""

import inspect
import threading
import warnings
from functools import partial

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


class Turns:
    """Programs of a launch in threads of their own, one at a time: each runs as far as it can.

    The turn passes on where a program asks an atomic a second time. The interpreter runs one
    program after the other: programs that wait for each other would never end. Its builder knows
    one program at a time, so the index is put back with the turn.
    """

    def __init__(self, builder):
        self.builder, self.atomic = builder, builder.create_atomic_rmw
        self.changed, self.at, self.waiting = threading.Condition(), 0, []
        self.asked = set()

    def atomic_then_pass_on(self, operation, pointer, value, *args):
        found = self.atomic(operation, pointer, value, *args)
        me = self.waiting[self.at]
        if value.data.any():
            self.asked.discard(me)
            return found
        if me not in self.asked:
            self.asked.add(me)
            return found
        index = self.builder.grid_idx
        self._pass_on(self.at + 1)
        self._take(me)
        self.builder.grid_idx = index
        return found

    def _pass_on(self, at):
        with self.changed:
            self.at = at % max(len(self.waiting), 1)
            self.changed.notify_all()

    def _take(self, me):
        with self.changed:
            self.changed.wait_for(lambda: self.waiting and self.waiting[self.at] == me)

    def run(self, programs):
        """Each of these functions to its end; the first error is raised."""
        self.waiting, self.at, errors = list(range(len(programs))), 0, []
        self.asked.clear()

        def body(me):
            self._take(me)
            try:
                programs[me]()
            except Exception as error:
                errors.append(error)
            here = self.waiting.index(me)
            self.waiting.remove(me)
            self._pass_on(here)

        threads = [threading.Thread(target=body, args=(me,)) for me in range(len(programs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def run_programs_in_turns(monkeypatch):
    """Make the interpreter run the programs of a launch with the same first index side by side."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    turns = Turns(builder)

    class InTurns(interpreter.GridExecutor):
        def __call__(self, *args, **kwargs):
            names = inspect.getfullargspec(self.fn).args
            given = {k: v for k, v in kwargs.items() if k in names}
            scope = interpreter._patch_lang(self.fn)
            try:
                args = inspect.getcallargs(self.fn, *args, **given)
                args = {
                    k: v if k in self.constexprs else interpreter._implicit_cvt(v)
                    for k, v in args.items()
                }
                self._run(args, (*self.grid, 1)[:2])
            finally:
                scope.restore()

        def _run(self, args, grid):
            builder.set_grid_dim(*grid, 1)

            def program(x, y):
                builder.set_grid_idx(x, y, 0)
                with np.errstate(all="ignore"):
                    self.fn(**args)

            for x in range(grid[0]):
                turns.run([partial(program, x, y) for y in range(grid[1])])

    monkeypatch.setattr(interpreter, "GridExecutor", InTurns)
    monkeypatch.setattr(builder, "create_atomic_rmw", turns.atomic_then_pass_on)
