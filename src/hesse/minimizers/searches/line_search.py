"""Searches along one direction: how far to go where a descent says where to.

``Fixed`` takes the step as it is, ``Armijo`` shortens it until the function falls by a share of what the slope promises
(and lengthens steps that had no natural length), ``Wolfe`` also asks that the slope has flattened, which keeps
quasi-Newton curvatures positive. Near the least value, where differences of values are rounding, slopes decide
(Hager and Zhang, A new conjugate gradient method with guaranteed descent, SIAM J. Optim. 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.minimizers.functions.function import Point
from hesse.minimizers.method import ROUNDING, Advance
from hesse.minimizers.models.dense import Model, Step
from hesse.minimizers.searches.regions import attempt, shrink
from hesse.minimizers.state import scalar
from hesse.tree import Params

__all__ = ["Armijo", "Fixed", "Wolfe"]

SUFFICIENT = 1e-4
MOST_TRIALS = 60


@dataclass(frozen=True)
class Fixed:
    """``x + step_size p``, whatever the value there: the textbook's iteration."""

    step_size: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size must be positive; got {self.step_size}.")

    def advance(self, point: Point, model: Model, memory: Params) -> Advance:
        """See :class:`hesse.minimizers.method.Search`."""
        new = point.function.at(point.x + self.step_size * model.whole)
        return Advance(new if new.finite() else None, first(point, model, memory), self.step_size)


@dataclass(frozen=True)
class Armijo:
    """Backtracking to ``f(x + t p) <= f(x) + c t g'p`` (Armijo 1966), t from a parabola through what is known."""

    def advance(self, point: Point, model: Model, memory: Params) -> Advance:
        """See :class:`hesse.minimizers.method.Search`."""
        p = model.whole
        slope = float(point.gradient() @ p)
        natural = model.natural
        t = 1.0 if natural else start(point, p, memory)
        kept = first(point, model, memory)
        best: tuple[Point, float, float] | None = None
        for _ in range(MOST_TRIALS):
            step = Step(t * p, -t * slope, t)
            new, ratio = attempt(point, step, SUFFICIENT)
            if new is not None and (best is None or new.value < best[0].value):
                best = new, t, ratio
                # A direction without a length of its own is followed as long as the slope's promise is half kept.
                if natural or ratio < 0.5 or new.value == -math.inf:
                    break
                t *= 2
            elif (
                best is not None
                or math.isnan(ratio)
                or t * float(p.norm()) <= torch.finfo(p.dtype).eps * float(point.x.norm())
                or t == 0
            ):
                break
            else:
                t *= shrink(point, step, ratio)
        if best is None:
            return Advance(None, kept, t)
        return Advance(best[0], {**kept, "size": scalar(best[1])}, best[1], best[2])


@dataclass(frozen=True)
class Wolfe:
    """The strong Wolfe conditions: enough fall, and a slope of at most ``flat`` times the first.

    Bracketing and zoom with cubic interpolation; Nocedal and Wright, Numerical Optimization, algorithms 3.5 and 3.6.
    """

    flat: float = 0.9

    def advance(self, point: Point, model: Model, memory: Params) -> Advance:
        """See :class:`hesse.minimizers.method.Search`."""
        p = model.whole
        slope0 = float(point.gradient() @ p)
        t = 1.0 if model.natural else start(point, p, memory)
        kept = first(point, model, memory)
        low, high = _End(0.0, point.value, slope0, point), None
        rounding = ROUNDING * torch.finfo(p.dtype).eps * abs(point.value)
        for _ in range(MOST_TRIALS):
            if t * float(p.norm()) <= torch.finfo(p.dtype).eps * float(point.x.norm()):
                break
            new = point.function.at(point.x + t * p)
            if new.value == -math.inf:
                return Advance(new, {**kept, "size": scalar(t)}, t)
            fine = math.isfinite(new.value)
            flat_values = fine and abs(new.value - point.value) <= rounding
            if (
                not fine
                or (new.value > point.value + SUFFICIENT * t * slope0 and not flat_values)
                or new.value >= low.value + rounding
            ):
                high = _End(t, new.value, math.nan, new)
            elif not new.finite():
                high = _End(t, math.inf, math.nan, new)
            else:
                slope = float(new.gradient() @ p)
                if abs(slope) <= -self.flat * slope0:
                    ratio = (point.value - new.value) / (-t * slope0)
                    return Advance(new, {**kept, "size": scalar(t)}, t, ratio)
                end = _End(t, new.value, slope, new)
                if slope * ((high.t if high else math.inf) - low.t) >= 0:
                    high = low
                low = end
            if high is None:
                t = min(_cubic(low, None, t), 10 * t)
            elif abs(high.t - low.t) <= 1e-12 * max(high.t, low.t):
                break
            else:
                t = _cubic(low, high, t)
        if low.t > 0:  # it fell enough, if not as flat as asked
            return Advance(
                low.point, {**kept, "size": scalar(low.t)}, low.t, (point.value - low.value) / (-low.t * slope0)
            )
        return Advance(None, kept, t)


@dataclass(frozen=True)
class _End:
    """One end of the bracket; its slope is NaN where it was not computed."""

    t: float
    value: float
    slope: float
    point: Point


def _cubic(low: _End, high: _End | None, t: float) -> float:
    """The next trial: the least value of the cubic or parabola through both ends, kept away from them."""
    if high is None:
        return 2 * t
    width = high.t - low.t
    inner = low.t + 0.5 * width
    if math.isfinite(high.value):
        if math.isfinite(high.slope):
            d = low.slope + high.slope - 3 * (high.value - low.value) / width
            root = d * d - low.slope * high.slope
            if root >= 0:
                r = math.copysign(math.sqrt(root), width)
                bottom = high.slope - low.slope + 2 * r
                inner = high.t - width * (high.slope + r - d) / bottom if bottom else inner
        else:
            bend = high.value - low.value - low.slope * width
            inner = low.t - 0.5 * low.slope * width * width / bend if bend > 0 else inner
    else:
        inner = low.t + 0.1 * width
    near, far = sorted((low.t + 0.1 * width, low.t + 0.9 * width))
    return min(max(inner, near), far)


def start(point: Point, p: Tensor, memory: Params) -> float:
    """A first length for a direction that has none: twice the last, or a tenth of x."""
    if "size" in memory:
        return 2 * float(memory["size"])
    size = float(p.norm())
    return 0.1 * max(float(point.x.norm()), 1.0) / size if size > 0 else 1.0


def first(point: Point, model: Model, memory: Params) -> Params:
    """The length of the first step, in units of which a function without a least value is recognised."""
    return {"first": memory.get("first", scalar(max(model.length, 0.1 * float(point.x.norm()))))}
