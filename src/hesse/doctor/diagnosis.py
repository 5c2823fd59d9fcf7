"""What the doctor says: findings in order, what was done to get them, as text, as JSON and as a page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hesse.check import Report
from hesse.doctor.order import Entry
from hesse.finding import Finding

__all__ = ["Course", "Diagnosis", "Entry", "Sharpness"]


@dataclass(frozen=True, slots=True)
class Course:
    """The short training: what was made, and the records of the monitor."""

    optimizer: str
    lr: float | None
    steps: int
    seconds: float
    losses: list[float]  # of every step, before it was made
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        return all(math.isfinite(loss) for loss in self.losses)


@dataclass(frozen=True, slots=True)
class Sharpness:
    """How the loss of one batch bends.

    Attributes:
        when: "at first" or "after training".
        largest: eigenvalues of the Hessian, descending; the first is the sharpness.
        trace: of the Hessian, with its standard error.
        stable: the largest sharpness that the optimiser's steps bear, or None where no such number is known.
        products: Hessian-vector products that it took.
    """

    when: str
    largest: list[float]
    trace: float | None
    error: float | None
    stable: float | None
    products: int


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong, where and what to do, in order; ``print(diagnosis)`` shows it.

    Attributes:
        subject: the class of the model.
        entries: findings with what may be their consequences, the gravest first.
        checks: the reports of the checks of derivatives.
        course: the watched training, or None when there was none.
        sharpness: of the first batch.
        notes: what was not done and why, and what looks odd but is well.
    """

    subject: str
    entries: list[Entry]
    checks: list[Report]
    course: Course | None = None
    sharpness: list[Sharpness] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """All findings: each followed by what may be its consequences."""
        return [finding for entry in self.entries for finding in (entry.finding, *entry.consequences)]

    @property
    def ok(self) -> bool:
        """Whether nothing is worse than information."""
        return all(finding.severity == "info" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as a JSON object; numbers that are not finite are null."""
        course = self.course
        return _strict(
            {
                "torch": torch.__version__,
                "subject": self.subject,
                "ok": self.ok,
                "entries": [
                    {"finding": e.finding.to_dict(), "consequences": [f.to_dict() for f in e.consequences]}
                    for e in self.entries
                ],
                "checks": [report.to_dict() for report in self.checks],
                "course": None if course is None else asdict(course),
                "sharpness": [asdict(glance) for glance in self.sharpness],
                "notes": self.notes,
                "done": self.done(),
            }
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the diagnosis as one HTML page that opens without network; returns its path.

        Raises:
            ImportError: the libraries of the page are not installed.
        """
        from hesse.report.doctor import build_doctor

        return build_doctor(self.to_dict(), Path(path))

    def done(self) -> list[str]:
        """What was looked at, a sentence each."""
        lines = [_checked(report) for report in self.checks]
        if self.course is not None:
            lines.append(_trained(self.course))
        return lines + [_bends(glance) for glance in self.sharpness]

    def __str__(self) -> str:
        faults = [entry for entry in self.entries if entry.finding.severity != "info"]
        verdict = f"{len(faults)} thing{'s' * (len(faults) != 1)} to mend" if faults else "nothing found"
        lines = [f"Diagnosis of {self.subject}: {verdict}"]
        for number, entry in enumerate(faults, 1):
            finding = entry.finding
            lines += ["", f"{number}. {_head(finding)}", f"   {finding.message}"]
            lines += [f"   What to do: {finding.remedy}"] if finding.remedy else []
            lines += [f"   Perhaps its consequence: {_head(other)}" for other in entry.consequences]
        lines += ["", "What was looked at:", *(f"- {line}" for line in self.done())]
        infos = [str(entry.finding) for entry in self.entries if entry.finding.severity == "info"]
        notes = [*infos, *self.notes]
        return "\n".join([*lines, *(["", "Notes:"] if notes else []), *(f"- {note}" for note in notes)])


def _head(finding: Finding) -> str:
    head = f"{finding.kind} at {finding.where}" if finding.where else finding.kind
    head += f", {finding.function}" if finding.function else ""
    if finding.file:
        head += f" ({finding.file}:{finding.line})" if finding.line else f" ({finding.file})"
    return head if finding.step is None else f"{head}, step {finding.step}"


def _checked(report: Report) -> str:
    said = f"{report.check}: {'ok' if report.ok else 'failed'}"
    if not report.slopes:
        return f"{said}."
    return f"{said}; along {len(report.slopes)} directions it differs by {report.error:.1e} of the slope at the most."


def _trained(course: Course) -> str:
    lr = "" if course.lr is None else f" (lr {course.lr:g})"
    ends = f", loss {course.losses[0]:.4g} -> {course.losses[-1]:.4g}" if course.losses else ""
    return f"{course.steps} steps of {course.optimizer}{lr} in {course.seconds:.1f} s{ends}; weights were put back."


def _bends(glance: Sharpness) -> str:
    said = f"Curvature {glance.when}: largest eigenvalues of the Hessian {_few(glance.largest)}"
    if glance.trace is not None:
        said += f", trace {glance.trace:.3g} ± {glance.error:.1g}"
    return said + (f"; its steps are stable up to {glance.stable:.3g}." if glance.stable is not None else ".")


def _few(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
