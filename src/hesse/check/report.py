"""What a check says: whether the derivatives are right, and if not, the culprits, best guess first."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from hesse.check.differences import Slope
from hesse.finding import Finding

__all__ = ["Report"]


@dataclass
class Report:
    """What a check found. ``print(report)`` shows it, slopes as a table.

    Args:
        check: what kind of check it was, for instance ``"Gradient check"``.
        subject: what was checked.
        slopes: the directions along which gradient and differences were compared.
        findings: all that was noticed; those of severity ``"error"`` make the report not ``ok``.
        notes: how to read it, for instance that an output was summed with random weights.
    """

    check: str
    subject: str
    slopes: list[Slope] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not self.culprits

    @property
    def culprits(self) -> list[Finding]:
        """The faults, best guess first: ``.where`` names the module; ``.function``, ``.file``, ``.line`` tell more."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def error(self) -> float:
        """Largest difference along one direction, relative to the slope."""
        return max((s.error for s in self.slopes), default=0.0)

    @property
    def noise(self) -> float:
        """The error the differences may have themselves, relative to the slope: the middle one of three.

        Random signs are blunt in a large model; the other two directions are then sharp.
        """
        return sorted(s.noise for s in self.slopes)[1] if self.slopes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object; infinite limits are null."""
        slopes = [asdict(slope) for slope in self.slopes]
        return {
            "check": self.check,
            "subject": self.subject,
            "ok": self.ok,
            "slopes": [{k: v if math.isfinite(v) else None for k, v in slope.items()} for slope in slopes],
            "findings": [finding.to_dict() for finding in self.findings],
            "notes": self.notes,
        }

    def raise_if_failed(self) -> None:
        """Raise :class:`AssertionError` with the table when the report is not ``ok``."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        lines = [f"{self.check} of {self.subject}: {'ok' if self.ok else 'FAILED'}", *self.notes]
        if self.slopes:
            row = "{:>9}  {:>13}  {:>13}  {:>9}  {:>9}  {}".format
            lines.append(row("step", "gradient", "differences", "error", "limit", "").rstrip())
            for s in self.slopes:
                numbers = (
                    f"{s.step:.1e}",
                    f"{s.analytic:.6g}",
                    f"{s.numeric:.6g}",
                    f"{s.error:.1e}",
                    f"{s.limit:.1e}",
                )
                lines.append(row(*numbers, "wrong" if s.wrong else "").rstrip())
        return "\n".join([*lines, *(f"- {finding}" for finding in self.findings)])
