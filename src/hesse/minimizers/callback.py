"""The user's callback in SciPy's two signatures: of x, or of the result so far."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hesse.minimizers.functions.function import Point
from hesse.minimizers.result import Status
from hesse.minimizers.state import State

__all__ = ["told"]


def told(
    callback: Callable[..., Any] | None, report: Callable[[Any, Status], Any]
) -> Callable[[State, Point], None] | None:
    """What the loop calls after every step.

    Args:
        callback: ``callback(x)``, or ``callback(intermediate_result=...)`` if its parameter has that name.
        report: makes a result of a point and a status.
    """
    if callback is None:
        return None
    try:
        whole = "intermediate_result" in inspect.signature(callback).parameters
    except (TypeError, ValueError):  # builtins have no signature
        whole = False

    def tell(state: State, point: Point) -> None:
        result = report(point, Status.MAX_STEPS)
        if whole:
            callback(intermediate_result=result)
        else:
            callback(result.x)

    return tell
