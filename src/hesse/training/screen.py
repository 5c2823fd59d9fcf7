"""What a person sees while a table is trained on: on stderr, so that results on stdout stay clean.

On a terminal a bar moves; in a pipe or a log each epoch is a line. ``NO_COLOR`` and ``TERM=dumb`` are respected (by
rich).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from hesse.check import GradientReport
from hesse.finding import Finding
from hesse.multimodal import Schema
from hesse.training.loop import Plan, State

__all__ = ["Screen"]

MARKS = {"info": ("·", "cyan"), "warning": ("!", "yellow"), "error": ("✗", "red")}


class Screen:
    """Writes to stderr, or nowhere when ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)

    def columns(self, schema: Schema, name: str, rows: int) -> None:
        """The column table, before anything is trained."""
        table = Table(title=f"{escape(name)}: {rows} rows", title_justify="left", box=None, pad_edge=False)
        for heading in ("column", "kind", "role", "why", "missing", "unique", "example"):
            table.add_column(heading, justify="right" if heading in ("missing", "unique") else "left", overflow="fold")
        for row in schema.rows():
            cells = (
                row["name"],
                row["kind"],
                row["role"],
                row["reason"],
                row["missing"],
                row["unique"],
                row["example"],
            )
            table.add_row(*(escape(str(cell)) for cell in cells), style="dim" if row["role"] == "ignored" else "")
        self.console.print(table)

    def decoding(self, total_label: str) -> Decoding:
        return Decoding(
            self._progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()), total_label
        )

    def gradient_check(self, report: GradientReport) -> None:
        if report.ok:
            self.say(f"gradient check: passed (error {report.error:.1e}, noise of the differences {report.noise:.1e})")
        else:
            self.say(str(report))

    def findings(self, findings: list[Finding]) -> None:
        for finding in findings:
            mark, colour = MARKS[finding.severity]
            self.console.print(Text(f"{mark} ", style=colour) + Text(str(finding)), soft_wrap=True)

    def training(self, plan: Plan, label: str) -> Training:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), _Left())
        return Training(self, self._progress(*columns), plan, label)

    def done(self, evaluation: dict[str, Any], report: Path, state: State) -> None:
        """The summary at the end."""
        table = Table(box=None, pad_edge=False, show_header=False)
        score, value, baseline = evaluation["score"], evaluation["value"], evaluation["baseline"]
        table.add_row(
            f"{evaluation['part']} {score}", f"{value:.4f}  (baseline {baseline:.4f}, {evaluation['n']} rows)"
        )
        for key, parts in evaluation["modalities"].items():
            table.add_row(escape(f"  {key}"), f"alone {parts['alone']:.4f}, without it {parts['without']:.4f}")
        table.add_row("best epoch", f"{state.best_epoch} of {state.epoch}")
        table.add_row("training time", f"{state.seconds:.1f} s")
        table.add_row("findings", str(len(state.findings)))
        self.console.print(table)
        self.say(f"report: {report}")

    def _progress(self, *columns: ProgressColumn) -> Progress:
        live = self.console.is_terminal and not self.console.quiet
        return Progress(*columns, console=self.console, transient=True, disable=not live)


class Decoding(AbstractContextManager[Callable[[int, int], None]]):
    """A bar for the files that are read; used as ``with screen.decoding("reading") as progress``."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._progress.start()
        return lambda done, total: self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class Training(AbstractContextManager["Training"]):
    """The bar of the training loop: loss, validation score, time left; findings scroll by above it."""

    def __init__(self, screen: Screen, progress: Progress, plan: Plan, label: str) -> None:
        self._screen, self._progress, self._plan, self._label = screen, progress, plan, label
        self._valid = ""
        self._task = progress.add_task(label, total=1.0, status="")

    def __enter__(self) -> Training:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, state: State, loss: float) -> None:
        plan = self._plan
        per_epoch = -(-len(plan.positions["train"]) // plan.batch_size)
        shares = [0.0]
        if plan.epochs is not None:
            shares.append((state.epoch + state.batch / per_epoch) / plan.epochs)
        if plan.seconds is not None:
            shares.append(state.seconds / plan.seconds)
        status = f"epoch {state.epoch + 1}  loss {loss:.4f}{self._valid}"
        self._progress.update(self._task, completed=min(1.0, max(shares)), status=status)
        self._screen.findings(state.monitor.new_findings())

    def epoch(self, row: dict[str, Any], score: str) -> None:
        self._valid = f"  valid {score} {row['valid_score']:.4f}"
        if not self._screen.console.is_terminal:
            self._screen.say(
                f"{self._label} epoch {row['epoch']}  {row['seconds']:.1f} s  train loss {row['train_loss']:.4f}  "
                f"valid loss {row['valid_loss']:.4f}{self._valid}{'  best' if row['best'] else ''}"
            )


class _Left(ProgressColumn):
    """Time left by the share that is done; training may end earlier, when validation stops getting better."""

    def render(self, task: Task) -> Text:
        if not task.completed or task.elapsed is None:
            return Text("")
        left = task.elapsed * (1 - task.completed) / task.completed
        return Text(f"at most {left:.0f} s left" if left < 90 else f"at most {left / 60:.0f} min left")
