"""Searches that trust the model of the function within a distance, and adapt the distance to how true it proved.

``TrustRegion`` limits the length of the step (More 1983; Conn, Gould and Toint 2000), ``Cubic`` charges for its cube
(Nesterov and Polyak 2006; Cartis, Gould and Toint 2011). Both try a step by its value alone: a step that is refused
costs one value, and the next, shorter one comes from the model at hand, without a new derivative.

The region starts as long as the first step that the model proposes, whatever the scale of x, and has no largest size.
"""

from __future__ import annotations

import math

import torch

from hesse.minimizers.functions.bounds import landed
from hesse.minimizers.functions.function import Point
from hesse.minimizers.method import ROUNDING, Advance
from hesse.minimizers.models.dense import Model, Step
from hesse.minimizers.state import scalar
from hesse.tree import Params

__all__ = ["Cubic", "TrustRegion"]

# A step is taken where it brings this share of what the model promised; the region shrinks below POOR and grows above
# GOOD.
ENOUGH, POOR, GOOD = 1e-4, 0.25, 0.85
# Values differ by rounding alone where less than this many units in the last place was promised: then gradients decide.
NOISE = 250 * ROUNDING
MOST_TRIALS = 60
# Where negative curvature leads is not told by a quadratic: the first look along it is this share of x away.
NEAR = 0.125
# Steps are a series where each is this part of the last, and as parallel as this; its sum is taken where it gains as
# much more than the model promises of the next step alone.
SERIES, PARALLEL, WORTH = (0.4, 0.95), 0.1, 1.3


class TrustRegion:
    """The least value of the model within a radius, in whatever norm the model measures lengths.

    Where Newton's steps repeat themselves, each a fixed part of the last, the function is flatter than a parabola along
    them (a quartic gives 2/3), and their geometric series is summed at once: Aitken's extrapolation, which for singular
    minima brings the quadratic convergence back (Decker and Kelley, Newton's method at singular points, 1980).
    """

    def advance(self, point: Point, model: Model, memory: Params) -> Advance:
        """See :class:`hesse.minimizers.method.Search`."""
        radius = float(memory["radius"]) if "radius" in memory else first_radius(point, model)
        kept = {"first": memory.get("first", scalar(radius))}
        leap = self._leap(point, model, memory, radius)
        if leap is not None:
            return leap
        for _ in range(MOST_TRIALS):
            step = model.within(radius)
            new, ratio = attempt(point, step)
            if new is not None:
                if ratio < POOR:
                    radius = 0.5 * step.length
                elif ratio > GOOD:
                    radius = max(radius, 2 * step.length)
                return Advance(new, {**kept, "radius": scalar(radius), "moved": step.s}, radius, ratio)
            if math.isnan(ratio) or float(step.s.norm()) <= torch.finfo(point.x.dtype).eps * float(point.x.norm()):
                break
            radius = step.length * shrink(point, step, ratio)
        return Advance(None, kept, radius)

    def _leap(self, point: Point, model: Model, memory: Params, radius: float) -> Advance | None:
        """The sum of the series that this step and the last begin, if they begin one and it is as low as it says."""
        if (
            point.function.composite
            or "moved" not in memory
            or not math.isfinite(model.predicted)
            or model.length > radius
        ):
            return None
        s = model.whole
        moving = s != 0
        ratios = s[moving] / memory["moved"][moving]  # element by element, which is the same in any units of x
        part = float(ratios.mean()) if ratios.numel() else math.nan
        if not SERIES[0] < part < SERIES[1] or not bool(((ratios - part).abs() <= PARALLEL * part).all()):
            return None
        new = point.function.at(point.x + s / (1 - part))
        ratio = (point.value - new.value) / model.predicted
        if not (ratio > WORTH and math.isfinite(new.value) and new.finite()):
            return None
        # The next step begins another series.
        return Advance(new, {"moved": torch.zeros_like(s)}, radius, ratio)


class Cubic:
    """The least value of the model plus ``sigma/3 ||s||^3``.

    sigma starts where the cube, at the length of the model's first step, weighs as much as the step promises.
    """

    def advance(self, point: Point, model: Model, memory: Params) -> Advance:
        """See :class:`hesse.minimizers.method.Search`."""
        kept = {"first": memory.get("first", scalar(model.length))}
        if "sigma" in memory:
            sigma = float(memory["sigma"])
        else:
            whole = model.within(model.length)
            sigma = 0.3 * whole.predicted / whole.length**3 if whole.length > 0 else 1.0
        for _ in range(MOST_TRIALS):
            step = model.cubed(sigma)
            new, ratio = attempt(point, step)
            if new is not None:
                if ratio > GOOD:
                    sigma *= 0.3
                elif ratio < POOR:
                    sigma *= 2
                return Advance(new, {**kept, "sigma": scalar(sigma)}, sigma, ratio)
            if math.isnan(ratio) or float(step.s.norm()) <= torch.finfo(point.x.dtype).eps * float(point.x.norm()):
                break
            # The length falls no faster than with the root of sigma.
            sigma = max(sigma, 1e-300) / shrink(point, step, ratio) ** 2
        return Advance(None, kept, sigma)


def first_radius(point: Point, model: Model) -> float:
    """The length of the model's whole step; where it has none that is a minimum, no more than an eighth of x."""
    size = float(point.x.norm())
    return model.length if math.isfinite(model.predicted) or size == 0 else min(model.length, NEAR * size)


def attempt(point: Point, step: Step, enough: float = ENOUGH) -> tuple[Point | None, float]:
    """The point that a step leads to, or None where it must not be taken; and actual over predicted decrease.

    The ratio is minus infinity where the function is not finite, NaN where neither values nor gradients tell any more.
    """
    new = point.function.at(landed(point.x, step.s, point.function.bounds))
    if new.value == -math.inf:
        return new, math.inf
    if not math.isfinite(new.value):
        return None, -math.inf
    gained = point.value - new.value
    ratio = gained / step.predicted if step.predicted > 0 else -math.inf
    unit = torch.finfo(point.x.dtype).eps * max(abs(point.value), abs(new.value))
    if step.predicted <= NOISE * unit and abs(gained) <= NOISE * unit:
        lower = gained > ROUNDING * unit or new.steepest() < point.steepest()
        return (new, 1.0) if new.finite() and lower else (None, math.nan)
    if ratio <= enough:
        return None, ratio
    return (new, ratio) if new.finite() else (None, -math.inf)


def shrink(point: Point, step: Step, ratio: float) -> float:
    """By how much to shorten a step that was refused: to the least value of the parabola through slope and values."""
    if not math.isfinite(ratio):
        return 0.25
    x, s = point.x, step.s
    slope = float(point.gradient() @ s)
    if point.function.l1:
        slope += point.function.l1 * float((x + s).abs().sum() - x.abs().sum())
    bend = -ratio * step.predicted - slope
    return min(max(-slope / (2 * bend), 0.1), 0.5) if bend > 0 and slope < 0 else 0.5
