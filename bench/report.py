"""What a run shows and what it keeps: lines while it runs, then Markdown, JSON and a plot."""

import dataclasses
import json
import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import machine
from .bars import Verdict
from .families import OURS, Family, JobReport
from .measure import SelfTest
from .runner import Row

NAME_WIDTH, WIDTH = 36, 9
PIPE_WIDTH = 150  # where the output is no terminal
SHORT_NAMES = {"onnxruntime": "ONNX RT", "openvino": "OpenVINO", "jax": "JAX"}
LEGEND = (
    "times are medians of a call; / torch and / best are time(peer) / time(fastseq), above 1 "
    "fastseq is faster; % prod and % read are shares of a large product and of reading the same "
    "working set, timed in the same rounds; err is fastseq's largest error / max|float64|"
)


def console() -> Console:
    """A console that does not fold table lines when piped to a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def header(family: Family) -> list[str]:
    """The column heads."""
    peers = [SHORT_NAMES.get(peer, peer.removeprefix(f"{OURS} ")) for peer in family.peers]
    return ["case", OURS, *peers, "/ torch", "/ best", "GFLOP/s", "% prod", "% read", "err"]


def cells(row: Row, family: Family) -> list[str]:
    """A row's cells, in the order of the header; "-" where a number has no meaning."""
    best = row.best_peer()
    return [
        row.name,
        *(_time_cell(row, name) for name in (OURS, *family.peers)),
        _number(row.ratio("torch"), "{:.2f}"),
        _number(best and row.ratio(best), "{:.2f}"),
        _number(row.gflops(), "{:.3g}"),
        _number(row.product_share(), "{:.0%}"),
        _number(row.read_share(), "{:.0%}"),
        _number(row.accuracy.get(OURS), "{:.0e}"),
    ]


def line(values: list[str], family: Family) -> str:
    """Cells in columns."""
    name, *rest = values
    longest = max(len(case.name) for case in family.cases) + len("/t2 ")
    return name.ljust(max(NAME_WIDTH, longest)) + "".join(value.rjust(WIDTH) for value in rest)


def show_row(out: Console, row: Row, family: Family) -> None:
    """One line, and under it what went wrong."""
    out.print(escape(line(cells(row, family), family)), soft_wrap=True)
    for name, message in row.errors.items():
        out.print(f"    [red]{escape(f'{name}: {message}')}[/red]", soft_wrap=True)


def show_self_test(out: Console, test: SelfTest) -> None:
    """The harness's own check, with a warning where it did not hold."""
    text = (
        f"self-test on {test.name}: time against itself {test.ratio:.3f} "
        f"(quartiles {test.low:.3f} to {test.high:.3f}, {test.rounds} rounds)"
    )
    if not test.ok:
        text += " [yellow]not within 5 %: the machine is too busy for small differences[/yellow]"
    out.print(text, soft_wrap=True)


def show_job(out: Console, job: JobReport) -> None:
    """The table of an end-to-end job."""
    table = Table(*job.columns, title=job.name, title_justify="left")
    for row in job.rows:
        table.add_row(*map(escape, row))
    out.print(table)


def show_verdicts(out: Console, verdicts: list[Verdict]) -> None:
    """Every bar beside what was measured."""
    colours = {True: "green", False: "red", None: "yellow"}
    table = Table("what", "bar", "measured", "rows", "", title="bars", title_justify="left")
    for verdict in verdicts:
        word = f"[{colours[verdict.passed]}]{verdict.word}[/]"
        table.add_row(verdict.text, verdict.bar, verdict.measured, verdict.rows, word)
    out.print(table)


def markdown(family: Family, about: dict, rows: list[Row], jobs, verdicts: list[Verdict]) -> str:
    """The same as one file."""
    parts = [f"# fastseq bench {family.name}", machine.headline(about), LEGEND + "."]
    parts.append(_markdown_table(header(family), [cells(row, family) for row in rows]))
    wrong = [f"- {row.name}: {who}: {why}" for row in rows for who, why in row.errors.items()]
    parts += ["\n".join(wrong)] if wrong else []
    for job in jobs:
        parts += [f"## {job.name}", _markdown_table(job.columns, job.rows)]
    bars = [(v.text, v.bar, v.measured, v.rows, v.word) for v in verdicts]
    parts += ["## bars", _markdown_table(("what", "bar", "measured", "rows", ""), bars)]
    return "\n\n".join(parts) + "\n"


def as_json(family: Family, about: dict, rows: list[Row], jobs, verdicts, **more) -> str:
    """Everything measured, with every sample, so that any other ratio can be formed later."""
    found = {
        "family": family.name,
        **about,
        **more,
        "rows": [_row_record(row) for row in rows],
        "jobs": {job.name: job.data for job in jobs},
        "bars": [dataclasses.asdict(verdict) for verdict in verdicts],
    }
    return json.dumps(found, indent=1) + "\n"


def results_folder() -> Path:
    """bench/results in a checkout, ./bench-results where the package cannot be written."""
    here = Path(__file__).resolve().parent
    return here / "results" if os.access(here, os.W_OK) else Path("bench-results")


def _row_record(row: Row) -> dict:
    derived = {
        "ratios": {peer: row.ratio(peer) for peer in row.peers},
        "gflops": row.gflops(),
        "product_share": row.product_share(),
        "read_share": row.read_share(),
    }
    return dataclasses.asdict(row) | derived


def _time_cell(row: Row, name: str) -> str:
    if name in row.errors:
        return "error"
    if name in row.absent:
        return "absent"
    seconds = row.seconds(name)
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _markdown_table(columns, rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
