"""A finding is one sentence a person can act on: what is wrong, where, how far off, and what to do.

Gradient checks, health rules and the readers of data all speak in findings. Bad input that cannot be
worked around is the same sentence raised as an error: :class:`InputError` carries the finding it was raised with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "InputError", "Severity"]

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation about data, derivatives or training.

    Args:
        kind: short name of the rule, for instance ``"vanishing"`` or ``"missing file"``.
        where: path of the module or parameter, or file, row and column.
        message: what was seen, as one sentence.
        remedy: what to do about it, as one sentence.
        severity: ``"info"``, ``"warning"`` or ``"error"``.
        value: the number or text that was seen.
        limit: what it was held against.
        step: the optimiser step at which it was seen, if any.
        function: the autograd Function, operation or hook that is to blame, if it is known more closely than
            ``where`` tells.
        file, line: where that is written.
        evidence: the numbers behind the sentence, as a JSON object: a curve, a ratio, the elements that differ.

    Example:
        >>> print(Finding("vanishing", "encoder.0", "The gradient is 1e-9 of the weight.", "Add a skip connection."))
        vanishing at encoder.0: The gradient is 1e-9 of the weight. Add a skip connection.
    """

    kind: str
    where: str
    message: str
    remedy: str = ""
    severity: Severity = "warning"
    value: float | int | str | None = None
    limit: float | int | str | None = None
    step: int | None = None
    function: str | None = None
    file: str | None = None
    line: int | None = None
    evidence: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        head = f"{self.kind} at {self.where}" if self.where else self.kind
        if self.function:
            head += f", {self.function}"
        if self.file:
            head += f" ({self.file}:{self.line})" if self.line else f" ({self.file})"
        return " ".join(part for part in (f"{head}: {self.message}", self.remedy) if part)

    def to_dict(self) -> dict[str, Any]:
        """The finding as a JSON object; ``Finding(**d)`` reads it back."""
        return asdict(self)


class InputError(ValueError):
    """Input that hesse cannot use. ``str(error)`` is the finding's sentence; ``error.finding`` its parts.

    Example:
        >>> try:
        ...     raise InputError("missing file", "pets.csv", "There is no such file.", "Check the path.")
        ... except InputError as error:
        ...     error.finding.where
        'pets.csv'
    """

    def __init__(
        self, kind: str, where: str, message: str, remedy: str = "", value: float | int | str | None = None
    ) -> None:
        self.finding = Finding(kind, where, message, remedy, severity="error", value=value)
        super().__init__(str(self.finding))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and worker processes rebuild it from the finding's parts, not from its sentence."""
        f = self.finding
        return type(self), (f.kind, f.where, f.message, f.remedy, f.value)
