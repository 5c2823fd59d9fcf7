"""What a training of the blind corpus is, and how the monitor that watched it is judged.

Each training is a loop as its author would have written it, under any ``watch(model, optimizer)``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Run", "alarms", "healthy", "judged", "pathologies", "tail", "trained"]


@dataclass(frozen=True)
class Run:
    """A training.

    Args:
        train: ``train(watch, cured)`` gives the losses.
        goal: the mean of the last losses is below when the training succeeds (cured, or healthy).
        kinds: what the pathology may be called.
        where: the places that may be named; those ending in ``*`` are prefixes; empty: any place.
        latest: the last step at which it is in time to say so.
        quiet: kinds that count although they are information, no alarm.
    """

    train: Callable[[Any, bool], Sequence[float]]
    goal: float
    kinds: str = ""
    where: str = ""
    latest: int = 0
    quiet: str = "plateau"

    @property
    def name(self) -> str:
        return self.train.__name__


def pathologies(runs: list[Run]) -> Callable[..., Callable[[Any], Any]]:
    """A decorator for trainings that go wrong, appended to ``runs``: kinds, places, latest step, goal."""

    def sick(kinds: str, where: str, latest: int, goal: float) -> Callable[[Any], Any]:
        def keep(train: Any) -> Any:
            runs.append(Run(train, goal, kinds, where, latest))
            return train

        return keep

    return sick


def healthy(runs: list[Run]) -> Callable[[float], Callable[[Any], Any]]:
    """A decorator for trainings that go well, ``train(watch)``, appended to ``runs``."""

    def well(goal: float) -> Callable[[Any], Any]:
        def keep(train: Any) -> Any:
            def either(watch: Any, cured: bool) -> Any:
                return train(watch)

            either.__name__ = train.__name__
            runs.append(Run(either, goal))
            return train

        return keep

    return well


def trained(run: Run, watch: Callable[..., Any], cured: bool = False) -> tuple[Any, Sequence[float]]:
    """The monitor after the training, and its losses."""
    monitors = []

    def kept(*args: Any, **more: Any) -> Any:
        monitors.append(watch(*args, **more))
        return monitors[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the author's loops warn as loops do: schedulers before steps, and the like
        losses = run.train(kept, cured)
    return monitors[0], losses


def tail(losses: Sequence[float]) -> float:
    """The mean of the last losses; infinite when one of them is not finite."""
    last = losses[-15:]
    return sum(last) / len(last) if all(map(math.isfinite, last)) else math.inf


def alarms(monitor: Any) -> list[Any]:
    """Findings that a healthy training must not have."""
    return [finding for finding in monitor.report().findings if finding.severity != "info"]


def judged(run: Run, monitor: Any) -> dict[str, Any]:
    """What the monitor of a sick training gets wrong, by aspect, and what it says instead.

    ``kind``: none of what was found has an accepted one. ``place``: where the first of an accepted kind was found.
    ``time``: the step at which the first of an accepted kind was said. Not found at all is wrong in ``found`` alone.
    """
    found = [f for f in monitor.report().findings if f.severity != "info" or f.kind in run.quiet.split()]
    if not found:
        return {"found": "nothing"}
    right = [f for f in found if f.kind in run.kinds.split()]
    if not right:
        return {"kind": [f.kind for f in found]}
    wrong: dict[str, Any] = {}
    if not _fits(right[0].where, run.where.split()):
        wrong["place"] = right[0].where
    said = min(f.step or 0 for f in right)
    if said > run.latest:
        wrong["time"] = said
    return wrong


def _fits(where: str, accepted: list[str]) -> bool:
    return not accepted or any(where.startswith(a[:-1]) if a.endswith("*") else where == a for a in accepted)
