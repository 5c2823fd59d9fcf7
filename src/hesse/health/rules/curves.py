"""What rules share: how long they wait, in which order layers work, how the loss goes, and the curves they show.

A rule compares; these are the things it compares with. Which layer is nearer to the loss follows from the order in
which layers were called, where a sensor has heard it, and else from the order in which the model defines them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from hesse.health.stats import Record, Stats

__all__ = [
    "FIRST",
    "PATIENCE",
    "WINDOW",
    "Course",
    "before",
    "course",
    "curve",
    "elasticities",
    "growth",
    "in_order",
    "number",
    "place",
    "profile",
    "weighted",
]

PATIENCE = 5  # samples in a row before something that passes by itself is called a fault
WINDOW = 50  # samples that are a layer's own past
FIRST = 5  # samples that show the initial weights
POINTS = 60  # of a curve are shown

Numbers = dict[str, Any]


def number(layer: Numbers, key: str) -> float | None:
    """A finite number of a layer, or None."""
    value = layer.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def in_order(record: Record) -> list[str]:
    """Paths of a record's layers as they were called in the forward pass, uncalled ones where they are defined."""
    layers = record["layers"]
    order: dict[str, float] = {}
    last = 0.0
    for path, layer in layers.items():
        called = number(layer, "order")
        last = called if called is not None else last
        order[path] = last
    return sorted(layers, key=lambda path: order[path])  # stable: what ties stays in the order of definition


def weighted(stats: Stats, record: Record) -> list[str]:
    """Paths of the layers that multiply by a weight matrix (not norms, biases or look-up tables), in order."""
    paths = []
    for path in in_order(record):
        part = stats.anatomy.get(path)
        if part is None or "Embedding" in part["type"]:
            continue
        if any(p["shape"] is not None and len(p["shape"]) > 1 for p in part.get("params", {}).values()):
            paths.append(path)
    return paths


def place(stats: Stats, path: str) -> str:
    """What a user calls the place: a module, and for a function called within one the layer whose output it reads."""
    part = stats.anatomy.get(path, {})
    after = part.get("after") if not part.get("params") and "index" not in part else None
    return after or path


def elasticities(record: Record) -> dict[str, float]:
    """|g| |w| of each layer in order: by what the loss changes when its weights change by their own size."""
    found = {}
    for path in in_order(record):
        layer = record["layers"][path]
        grad, weight = layer.get("grad_norm"), layer.get("weight_norm")
        if grad is not None and weight:
            found[path] = grad * weight
    return found


def curve(stats: Stats, path: str, key: str) -> dict[str, list[float]]:
    """One number of a layer over the steps, thinned to what a chart can show."""
    points = [
        (record["step"], value)
        for record in stats.records
        if (value := number(record["layers"].get(path, {}), key)) is not None
    ]
    if len(points) > POINTS:
        points = [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]
    return {"steps": [step for step, _ in points], "values": [value for _, value in points]}


def profile(record: Record, key: str, paths: Sequence[str]) -> dict[str, float]:
    """One number of many layers at one step, in their order: what a heat map's column shows."""
    return {path: value for path in paths if (value := number(record["layers"].get(path, {}), key)) is not None}


@dataclass(frozen=True)
class Course:
    """How the loss has gone: medians at the start and now, how uncertain they are, its fall in the later part of the
    run in units of that fall's standard error, and of how many losses.
    """

    start: float
    now: float
    error: float
    fall: float
    count: int

    @property
    def stuck(self) -> bool:
        """Whether it has fallen by less than chance may have it fall, or by less than one part in two hundred."""
        return self.start - self.now < max(2 * self.error, abs(self.start) / 200)

    @property
    def halted(self) -> bool:
        """Whether it falls no longer, wherever it was at the start."""
        return self.fall < 2

    @property
    def idle(self) -> bool:
        """Whether it has not come far and does not go on."""
        return self.stuck or (self.halted and self.start - self.now < abs(self.start) / 5)

    @property
    def worse(self) -> bool:
        """Whether it is above the start by more than chance may raise it."""
        return self.now > self.start + 2 * self.error


def course(stats: Stats) -> Course | None:
    """The course of the loss, from every step that was told; None with fewer than 10 finite losses."""
    told = [loss for _, loss in stats.told] or stats.losses
    told = [loss for loss in told if math.isfinite(loss)]
    if len(told) < 10:
        return None
    span = max(3, len(told) // 5)
    # Differences of neighbours know nothing of the trend.
    noise = median(abs(b - a) for a, b in pairwise(told)) / (0.6745 * math.sqrt(2))
    later = told[len(told) * 2 // 5 :]
    middle = (len(later) - 1) / 2
    slope = sum((i - middle) * loss for i, loss in enumerate(later)) / sum((i - middle) ** 2 for i in range(len(later)))
    error = noise * math.sqrt(12 / len(later))  # of the fall along a straight line
    fall = -slope * len(later) / error if error else math.copysign(math.inf, -slope) if slope else 0.0
    # The difference of two medians; one is a quarter less certain than a mean.
    return Course(median(told[:span]), median(told[-span:]), 1.25 * noise * math.sqrt(2 / span), fall, len(told))


def before(stats: Stats, record: Record, path: str) -> list[str]:
    """The layers with a weight matrix that are called before a place, in order."""
    order = number(record["layers"][path], "order")
    layers = weighted(stats, record)
    if order is None:
        return []
    return [p for p in layers if (n := number(record["layers"][p], "order")) is not None and n < order]


def growth(values: Sequence[float]) -> tuple[float, float] | None:
    """By which factor positive values change from first to last, and how steadily: the share of the steps that take
    part in it, going the same way by at least a quarter of the mean step.

    Example:
        >>> growth([1.0, 2.0, 4.0, 8.0])
        (8.0, 1.0)
        >>> growth([1.0, 1.0, 8.0, 8.0])[1]
        0.3333333333333333
    """
    if len(values) < 2 or any(value <= 0 for value in values):
        return None
    logs = [math.log(value) for value in values]
    total = logs[-1] - logs[0]
    steps = [b - a for a, b in pairwise(logs)]
    mean = total / len(steps)
    share = sum(step * mean > mean * mean / 4 for step in steps) / len(steps)
    return values[-1] / values[0], share
