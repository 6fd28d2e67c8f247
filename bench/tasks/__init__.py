"""The family "tasks": one small sequence task for every claim of the field, trained end to end.

To add one: a module with `run(full, out, progress) -> JobReport`, as adding.py, and its name below.
`charlm`, many-to-many on real text, is the end-to-end job of the family "rnn" too, one folder up.
"""

from collections.abc import Callable
from importlib import import_module

from ..families import Case, Family, Job, JobReport, Run, Setup

NAMES = ("classify", "adding", "copy_memory", "order", "bottleneck", "clipping", "one_to_many")
LANGUAGE_MODEL = "charlm"


def _run(name: str, run: Run, progress: Callable[[float], None]) -> JobReport:
    where = f"..{name}" if name == LANGUAGE_MODEL else f".{name}"
    task = import_module(where, __name__)  # torch and the task's data, when it is its turn
    return task.run(run.full, run.out, progress)


def _job(name: str) -> Job:
    return Job(name, lambda run, progress: _run(name, run, progress))


def _no_rows(case: Case, threads: int) -> Setup:
    raise LookupError(f"the family tasks has no rows, got {case.name}")


FAMILY = Family(
    name="tasks",
    cases=(),
    peers=(),
    contenders=lambda case: (),
    prepare=_no_rows,
    jobs=tuple(map(_job, (*NAMES, LANGUAGE_MODEL))),
)
