"""One run of one family: its cases with progress, its jobs, its verdicts, its files."""

import dataclasses
import re
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine, measure, report
from .bars import judge
from .families import OURS, Family, JobReport, Run, failed_job
from .runner import Row, admit, row_name, run_case


class Session:
    """Runs what `full` and `pattern` choose; shows rows as they come and keeps all of them."""

    def __init__(
        self,
        family: Family,
        threads: int,
        full: bool = False,
        pattern: re.Pattern | None = None,
        out: Path | None = None,
    ):
        self.family, self.threads, self.full = family, threads, full
        self.effort = measure.FULL if full else measure.QUICK
        wanted = pattern.search if pattern else lambda _: True
        self.cases = [c for c in family.cases if (full or c.quick) and wanted(c.name)]
        self.jobs = [job for job in family.jobs if (full or job.quick) and wanted(job.name)]
        self.out = out or report.results_folder()
        self.rows: list[Row] = []
        self.reports: list[JobReport] = []
        self.tests: list[measure.SelfTest] = []
        self.console = report.console()

    @property
    def profile(self) -> str:
        """ "quick" or "full"."""
        return "full" if self.full else "quick"

    def names(self) -> list[str]:
        """The chosen cases and jobs."""
        return [case.name for case in self.cases] + [job.name for job in self.jobs]

    def self_test(self, count: int = 1) -> None:
        """Time ours against itself, among its rivals, on cases spread over the chosen ones."""
        self.about = machine.describe(self.threads)
        self.console.print(f"[bold]{self.family.name}[/bold], {self.profile} profile")
        self.console.print(machine.headline(self.about), soft_wrap=True)
        step = max(1, len(self.cases) // count)
        for case in self.cases[step // 2 :: step][:count]:
            contenders, *_ = admit(self.family.prepare(case, self.threads))
            if OURS not in contenders:
                continue
            calls = {name: contender.call for name, contender in contenders.items()}
            test = measure.self_test(calls, OURS)
            self.tests.append(dataclasses.replace(test, name=row_name(case, self.threads)))
            report.show_self_test(self.console, self.tests[-1])

    def run(self) -> bool:
        """Measure everything; True if a result of ours was wrong."""
        if self.cases:
            self.console.print(report.LEGEND, style="dim")
            head = report.line(report.header(self.family), self.family)
            self.console.print(f"[bold]{head}[/bold]", soft_wrap=True)
        with self._progress() as progress:
            task = progress.add_task("", total=len(self.cases) + len(self.jobs))
            for case in self.cases:
                progress.update(task, description=case.name)
                self.rows.append(run_case(self.family, case, self.threads, self.effort))
                report.show_row(progress.console, self.rows[-1], self.family)
                progress.advance(task)
            for job in self.jobs:
                self._run_job(job, progress, task)
        report.show_verdicts(self.console, self.verdicts())
        return any(row.wrong for row in self.rows) or any(job.failed for job in self.reports)

    def _run_job(self, job, progress: Progress, task) -> None:
        before = progress.tasks[0].completed
        self.out.mkdir(parents=True, exist_ok=True)

        def tell(share: float) -> None:
            progress.update(task, description=job.name, completed=before + share)

        try:
            found = job.run(Run(self.threads, self.full, self.out), tell)
        except Exception as error:  # what was measured before it must still be kept
            found = failed_job(job.name, f"{type(error).__name__}: {error}")
        self.reports.append(found)
        report.show_job(progress.console, self.reports[-1])

    def _progress(self) -> Progress:
        return Progress(
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
        )

    def verdicts(self) -> list:
        """On the family's bars, then on those of its jobs."""
        cases = [dataclasses.asdict(case) for case in self.family.cases]
        bars = [judge(bar, self.rows, cases) for bar in self.family.bars]
        return bars + [verdict for job in self.reports for verdict in job.verdicts]

    def keep(self, json_path: Path | None, seconds: float) -> None:
        """JSON, Markdown and PNG, named by family, profile and time."""
        from . import plot

        self.out.mkdir(parents=True, exist_ok=True)
        stem = f"{self.family.name}-{self.profile}-{time.strftime('%Y%m%d-%H%M%S')}"
        paths = {kind: self.out / f"{stem}.{kind}" for kind in ("json", "md", "png")}
        paths["json"] = json_path or paths["json"]
        found = (self.family, self.about, self.rows, self.reports, self.verdicts())
        tests = [dataclasses.asdict(test) for test in self.tests]
        paths["json"].write_text(
            report.as_json(*found, profile=self.profile, seconds=seconds, self_tests=tests)
        )
        paths["md"].write_text(report.markdown(*found))
        plot.speedups(self.rows, self.family.peers, machine.headline(self.about), paths["png"])
        written = [str(path) for path in paths.values() if path.exists()]
        self.console.print(f"{seconds:.0f} s; wrote {', '.join(written)}", soft_wrap=True)
