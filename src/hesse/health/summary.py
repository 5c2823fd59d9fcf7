"""What a person reads about a watched run: the layers as last seen, the findings, and what looks odd but is well."""

from __future__ import annotations

from dataclasses import dataclass, field

from hesse.finding import Finding
from hesse.health.stats import Record

__all__ = ["HealthReport"]

COLUMNS = ("grad_norm", "weight_norm", "update_ratio", "dead", "saturated", "stuck", "turn")


@dataclass(frozen=True)
class HealthReport:
    """Findings so far and the layers as last seen; ``print(report)`` shows both.

    Attributes:
        findings: in the order in which they were found; interventions of the guard are among them.
        last: the last record, or None.
        notes: things that look suspicious and are healthy, and why.
    """

    findings: list[Finding]
    last: Record | None
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is worse than information."""
        return all(finding.severity == "info" for finding in self.findings)

    def __str__(self) -> str:
        said = [f"- step {finding.step}: {finding}" for finding in self.findings]
        said += [f"- healthy: {note}" for note in self.notes]
        if self.last is None:
            return "\n".join(["Nothing has been sampled yet.", *said])
        loss = "" if self.last["loss"] is None else f", loss {self.last['loss']:.6g}"
        layers = self.last["layers"]
        width = max([len("layer"), *map(len, layers)])
        keys = [key for key in COLUMNS if any(layer.get(key) is not None for layer in layers.values())]
        faults = sum(finding.severity != "info" for finding in self.findings)
        verdict = "healthy" if self.ok else f"{faults} finding{'s' * (faults != 1)}"
        lines = [f"Step {self.last['step']}{loss}: {verdict}"]
        lines.append(f"{'layer':<{width}}" + "".join(f"{key:>14}" for key in keys))
        for path, layer in layers.items():
            cells = ("" if layer.get(key) is None else f"{layer[key]:.3g}" for key in keys)
            lines.append((f"{path:<{width}}" + "".join(f"{cell:>14}" for cell in cells)).rstrip())
        return "\n".join([*lines, *said])
