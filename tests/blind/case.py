"""The blind corpus of ``hesse.check`` in one list each, and how a report is judged.

``judged`` serves the development corpus too (``gradient_faults``): both are made of the same ``Fault``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradient_faults.case import Fault
from hesse.check import Report

__all__ = ["collector", "judged"]


def collector(cases: list[Any], kind: type) -> Callable[..., Callable[[Any], Any]]:
    """A decorator for builders: ``collector(FAULTS, Fault)("kinds", "where", "function")``, appended to the list."""

    def of(*args: Any, **more: Any) -> Callable[[Any], Any]:
        def keep(build: Any) -> Any:
            cases.append(kind(build, *args, **more))
            return build

        return keep

    return of


def judged(fault: Fault, report: Report) -> dict[str, Any]:
    """What a report of a broken model gets wrong, by aspect, and what it says instead; empty when all is right.

    ``place``, ``kind``, ``function`` and ``file`` are of the first culprit; the file is the one the fault is written
    in. A fault that is not found at all is wrong in ``found`` alone.
    """
    if report.ok:
        return {"found": "nothing"}
    first = report.culprits[0]
    wrong: dict[str, Any] = {}
    if first.where not in fault.where.split():
        wrong["place"] = first.where
    if first.kind not in fault.kinds.split():
        wrong["kind"] = first.kind
    if fault.function and not any(name.lower() in str(first.function).lower() for name in fault.function.split()):
        wrong["function"] = first.function
    if Path(first.file or "").name != Path(inspect.getfile(fault.make)).name:
        wrong["file"] = first.file
    return wrong
