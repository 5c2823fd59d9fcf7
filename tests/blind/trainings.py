"""All trainings of the blind corpus of ``hesse.watch``."""

from __future__ import annotations

from blind import runs_flow, runs_numbers, runs_parts, runs_steps
from blind.runs_healthy import HEALTHY

__all__ = ["HEALTHY", "SICK"]

SICK = [*runs_flow.SICK, *runs_parts.SICK, *runs_steps.SICK, *runs_numbers.SICK]
