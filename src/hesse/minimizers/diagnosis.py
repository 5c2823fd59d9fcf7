"""Why no step lowers the function: precision, a kink, a wrong gradient, or nothing that has a name.

A search that fails has found that the function rises where its gradient says that it falls. At the end of every
accurate solve that is rounding, and a success. What else it can be shows in the values on both sides along the
refused direction: noise scatters, a kink has two slopes, a gradient that belongs to another function has one slope
that is not its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesse.minimizers.functions.function import Point
from hesse.minimizers.functions.noise import noise
from hesse.minimizers.models.dense import Model
from hesse.minimizers.result import Status

__all__ = ["diagnose"]

# A promise this many times the noise of the values would have shown in them.
CLEAR = 30.0


def diagnose(point: Point, model: Model) -> Status:
    """What stopped the search at ``point``; costs about a dozen values."""
    x, g, eps = point.x, point.gradient(), torch.finfo(point.x.dtype).eps
    whole = model.whole
    length, size = float(whole.norm()), float(x.norm())
    bounded = math.isfinite(model.predicted)
    if bounded and length <= 16 * eps * size:
        return Status.PRECISION
    p = whole if float(g @ whole) < 0 else -g
    if point.function.composite:
        p = whole  # L1 and bounds have kinks of their own: the model knows the way between them
    if float(p.norm()) == 0:
        return Status.SADDLE if model.lowest < 0 else Status.PRECISION
    if not bounded:  # a direction: its length means nothing, or is what a region left of it
        p = p * (max(size, 1.0) / float(p.norm()))
    # Behind x: ahead may be a jump, which is no noise. Only bounds leave no choice.
    side = p if point.function.composite else -p
    # A value is known no better than to its own rounding, nor than to what the rounding of x makes of it.
    known = eps * max(abs(point.value), float(g.abs() @ x.abs()))
    level = max(noise(lambda y: point.function.at(y.to(x)).value, x.double(), side.double()), known)
    if not math.isfinite(level):
        return Status.STALLED
    if point.function.composite:
        return Status.PRECISION if model.predicted <= CLEAR * level else Status.STALLED
    promised = min(model.predicted, -0.5 * float(g @ p))
    return Status.PRECISION if promised <= CLEAR * level else _slopes(point, p, level)


def _slopes(point: Point, p: Tensor, level: float) -> Status:
    """Compare the slope that the gradient says with those of the values ahead and behind."""
    said = float(point.gradient() @ p)
    shortest = 16 * torch.finfo(p.dtype).eps * float(point.x.norm()) / float(p.norm())
    looked = False
    for t in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        # Both changes have to stand clear of the noise.
        if t < shortest or -said * t < CLEAR * level:
            continue
        above, below = point.function.at(point.x + t * p).value, point.function.at(point.x - t * p).value
        if not (math.isfinite(above) and math.isfinite(below)):
            continue
        looked = True
        if above == point.value == below:  # terms much larger than their sum: its rounding is theirs, and regular
            continue
        ahead, behind = (above - point.value) / t, (point.value - below) / t
        apart = abs(ahead - behind)
        if apart > 0.1 * max(abs(ahead), abs(behind)):
            above, below = (point.function.at(point.x + side * 10 * t * p).value for side in (1, -1))
            # The slopes of a kink stay apart as their points come nearer, those of a parabola meet.
            if above + below - 2 * point.value > 30 * t * apart:
                return Status.PRECISION if 0.5 * said**2 * t / apart <= CLEAR * level else Status.STALLED
            return Status.KINK
        return Status.WRONG_GRADIENT if abs(ahead - said) > 0.1 * abs(said) else Status.STALLED
    return Status.PRECISION if looked or -said * 1e-4 < CLEAR * level else Status.STALLED
