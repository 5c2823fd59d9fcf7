"""What a person sees while a table is trained on: on stderr, so that results on stdout stay clean.

On a terminal a bar moves; in a pipe or a log each epoch is a line. ``NO_COLOR`` and ``TERM=dumb`` are respected (by
rich).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from hesse.check import Report
from hesse.finding import Finding
from hesse.multimodal import Schema
from hesse.training.call import modality_name
from hesse.training.evaluate import score_name
from hesse.training.loop import Plan, State, diverged

__all__ = ["Screen", "Training"]

MARKS = {"info": ("·", "cyan"), "warning": ("!", "yellow"), "error": ("✗", "red")}
MOST_COLUMNS = 40  # of a table; the page lists all
LOG_WIDTH = 120  # of a pipe or a file, which have none of their own


class Screen:
    """Writes to stderr, or nowhere when ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
        self.console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, emoji=False, width=width)

    @property
    def live(self) -> bool:
        """Whether bars can move."""
        return self.console.is_terminal and not self.console.quiet

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style or None, soft_wrap=True)

    def columns(self, schema: Schema, name: str, rows: int) -> None:
        """The column table, before anything is trained: a line a column, cut where it would not fit."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("column", "kind", "role"):
            table.add_column(heading)
        for heading in ("missing", "unique"):
            table.add_column(heading, justify="right", no_wrap=True)
        for heading in ("why", "example"):
            table.add_column(heading)
        shown = schema.rows()
        for row in shown[:MOST_COLUMNS]:
            cells = (row[key] for key in ("name", "kind", "role", "missing", "unique", "reason", "example"))
            table.add_row(*(_line(cell) for cell in cells), style="dim" if row["role"] == "ignored" else "")
        self.say(f"{name}: {rows} rows, {len(shown)} columns", "bold")
        self.console.print(table)
        if len(shown) > MOST_COLUMNS:
            self.say(f"... and {len(shown) - MOST_COLUMNS} more columns")
        self.say("")

    @contextmanager
    def decoding(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for files that are read; the block gets a function of how many are done and how many there are."""
        progress = self._progress(TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
        task = progress.add_task(label, total=None)
        with progress:
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def gradient_check(self, report: Report) -> None:
        if report.ok:
            self.say(f"gradient check: passed (error {report.error:.1e}, noise of the differences {report.noise:.1e})")
            self.findings(report.findings)
        else:
            self.say(str(report))
            self.say("gradient check: FAILED; training goes on, judge its result with care", "red")

    def findings(self, findings: list[Finding]) -> None:
        for finding in findings:
            mark, colour = MARKS[finding.severity]
            self.console.print(Text(f"{mark} ", style=colour) + Text(str(finding)), soft_wrap=True)

    def training(self, plan: Plan, label: str) -> Training:
        columns = (TextColumn("{task.description}"), BarColumn(16), TextColumn("{task.fields[status]}"), _Left())
        return Training(self, self._progress(*columns), plan, label)

    def done(
        self,
        evaluation: dict[str, Any],
        compared: dict[str, dict[str, Any]],
        schema: Schema,
        state: State,
        report: Path,
    ) -> None:
        """The summary at the end; ``compared`` are the evaluations of the optimisers that ran beside this one."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        score = Text(_number(evaluation["value"]), style="bold")
        rest = f" on {evaluation['n']} rows, baseline {_number(evaluation['baseline'])}"
        table.add_row(f"{evaluation['part']} {evaluation['score']}", score + Text(rest))
        for name, one in evaluation["targets"].items() if len(evaluation["targets"]) > 1 else ():
            rest = f" on {one['n']} rows, baseline {_number(one['baseline'])}"
            table.add_row(Text("  ") + _line(f"{name} {one['score']}"), _number(one["value"]) + rest)
        for optimizer, other in compared.items():
            table.add_row(f"  {optimizer} beside it", _number(other["value"]))
        for key, parts in evaluation["modalities"].items():
            name = _line(modality_name(schema, key))
            adds = f", adds {_number(parts['shapley'])}" if "shapley" in parts else ""  # its Shapley value
            seen = f"{_number(parts['alone'])} alone, {_number(parts['without'])} without it{adds}"
            table.add_row(Text("  ") + name, seen)
        reason = ", then it diverged" if diverged(state) else ""
        table.add_row("best epoch", f"{state.best_epoch} of {state.epoch}{reason}")
        table.add_row("training time", f"{state.seconds:.1f} s")
        table.add_row("findings", str(sum(finding.severity != "info" for finding in state.findings)))
        self.say("")
        self.console.print(table)
        self.say(f"report: {report}")

    def _progress(self, *columns: ProgressColumn) -> Progress:
        return Progress(*columns, console=self.console, transient=True, disable=not self.live)


class Training(AbstractContextManager["Training"]):
    """The bar of the training loop: loss, validation score, time left; findings scroll by above it."""

    def __init__(self, screen: Screen, progress: Progress, plan: Plan, label: str) -> None:
        self._screen, self._progress, self._plan, self._label = screen, progress, plan, label
        self._per_epoch = -(-len(plan.feed) // plan.batch_size)
        self._valid = ""
        self._task = progress.add_task(label, total=1.0, status="")

    def __enter__(self) -> Training:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, state: State, loss: float) -> None:
        """After each step."""
        self._screen.findings(state.monitor.new_findings())
        if not self._screen.live:
            return
        plan = self._plan
        shares = [0.0]
        if plan.epochs is not None:
            shares.append((state.epoch + state.batch / self._per_epoch) / plan.epochs)
        if plan.seconds is not None:
            shares.append(state.seconds / plan.seconds)
        status = f"epoch {state.epoch + 1}  loss {_number(loss)}{self._valid}"
        self._progress.update(self._task, completed=min(1.0, max(shares)), status=status)

    def epoch(self, row: dict[str, Any]) -> None:
        """After each epoch, with its row of ``metrics.jsonl``."""
        self._valid = f"  valid {score_name(self._plan.schema)} {_number(row['valid_score'])}"
        if not self._screen.live:
            self._screen.say(
                f"{self._label} epoch {row['epoch']:>3}  {row['seconds']:6.1f} s  "
                f"train loss {_number(row['train_loss'])}  valid loss {_number(row['valid_loss'])}{self._valid}"
                f"{'  best' if row['best'] else ''}"
            )


class _Left(ProgressColumn):
    """Time left by the share that is done; training may end earlier, when validation stops getting better."""

    def render(self, task: Task) -> Text:
        if not task.completed or task.elapsed is None:
            return Text("")
        left = task.elapsed * (1 - task.completed) / task.completed
        return Text(f"{left:.0f} s left" if left < 90 else f"{left / 60:.0f} min left")


def _line(value: object) -> Text:
    """One line, which a narrow column cuts instead of folding."""
    return Text(" ".join(str(value).split()), no_wrap=True, overflow="ellipsis")


def _number(value: float | None) -> str:
    """Four digits; a dash for what is no number."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"
