"""Does the training get anywhere? The loss curve, its noise, and how gradients turn from step to step.

The noise of a curve is taken from the differences of neighbours, which a trend hardly touches; so a rule can ask
whether a change of the loss is larger than the loss's own scatter, in whatever unit the loss has.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from hesse.health.rules.curves import PATIENCE
from hesse.health.stats import Stats

__all__ = ["coherence", "fall", "kept", "noise", "rising", "told", "turn", "turns"]


def told(stats: Stats) -> tuple[list[int], list[float]]:
    """Steps and losses that are known and finite, oldest first: of every step where it was told, else of records."""
    pairs = stats.told or [[record["step"], record["loss"]] for record in stats.records if record["loss"] is not None]
    known = [(int(step), loss) for step, loss in pairs if math.isfinite(loss)]
    return [step for step, _ in known], [loss for _, loss in known]


def noise(values: list[float]) -> float:
    """Standard deviation of the scatter about a smooth curve, from differences of neighbours.

    Robust: the median absolute difference, over 0.6745 for a normal's median and sqrt(2) for a difference.

    Example:
        >>> noise([5.0, 4.0, 3.0, 2.0])  # a straight fall of 1 a step: 1 / 0.954
        1.0483...
        >>> noise([1.0, 1.0, 1.0, 9.0, 1.0, 1.0])
        0.0
    """
    steps = [abs(b - a) for a, b in pairwise(values)]
    return median(steps) / (0.6745 * math.sqrt(2)) if steps else 0.0


def fall(values: list[float]) -> tuple[float, float]:
    """By how much the last third lies below the first, and how many standard errors that is.

    Example:
        >>> down, errors = fall([3.0, 3.1, 2.9, 2.0, 2.1, 1.9, 1.0, 1.1, 0.9])
        >>> round(down, 3), errors > 3
        (2.0, True)
    """
    third = max(1, len(values) // 3)
    down = fmean(values[:third]) - fmean(values[-third:])
    error = noise(values) * math.sqrt(2 / third)
    return down, down / error if error else math.copysign(math.inf, down) if down else 0.0


def turn(record: dict[str, Any]) -> float | None:
    """How much of the slope along the whole step is left behind it; of layers weighted by slope where need be.

    1 where the loss is straight along the step, 0 at its minimum, -1 where the step is twice as long as that.
    """
    if record.get("turn") is not None:
        return float(record["turn"])
    slope = left = 0.0
    for layer in record["layers"].values():
        if (
            all(layer.get(key) for key in ("grad_norm", "weight_norm", "update_ratio"))
            and layer.get("turn") is not None
        ):
            weight = layer["grad_norm"] * layer["weight_norm"] * layer["update_ratio"]
            slope += weight
            left += weight * layer["turn"]
    return left / slope if slope and math.isfinite(left / slope) else None


def turns(stats: Stats, last: int) -> list[float]:
    """The turns of the last records that have one."""
    found = [value for record in stats.records[-2 * last :] if (value := turn(record)) is not None]
    return found[-last:]


def coherence(before: dict[str, Any], now: dict[str, Any]) -> float | None:
    """Cosine between the whole gradients of two records in a row, from those of the layers where need be."""
    if now.get("coherence") is not None:
        return float(now["coherence"])
    dot = old = new = 0.0
    for path, layer in now["layers"].items():
        earlier = before["layers"].get(path, {})
        a, b, cosine = earlier.get("grad_norm"), layer.get("grad_norm"), layer.get("coherence")
        if a and b and cosine is not None and math.isfinite(a * b):
            dot, old, new = dot + a * b * cosine, old + a * a, new + b * b
    return dot / math.sqrt(old * new) if old and new else None


def kept(stats: Stats) -> float:
    """Length of the gradient now in units of that at the start, for the layer in the middle."""
    first, last = stats.records[:PATIENCE], stats.records[-PATIENCE:]
    shares = []
    for path in last[-1]["layers"]:
        early = [n for record in first if (n := record["layers"].get(path, {}).get("grad_norm"))]
        now = [n for record in last if (n := record["layers"].get(path, {}).get("grad_norm")) is not None]
        if early:
            shares.append(median(now or [0.0]) / median(early))
    return median(shares) if shares else 0.0


def rising(stats: Stats) -> bool:
    """Whether the learning rate still rises: warm-up."""
    rates = [record["lr"] for record in stats.records[-4:] if record.get("lr") is not None]
    return len(rates) > 1 and rates[-1] > rates[0]
