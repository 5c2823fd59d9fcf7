"""Why no step lowers the function: precision, a kink, a wrong gradient, or nothing that has a name.

A search that fails has found that the function rises where its gradient says that it falls. At the end of every
accurate solve that is rounding, and a success. What else it can be shows in the values on both sides along the
refused direction: noise scatters, a kink has two slopes, a gradient that belongs to another function has one slope that is not
its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesse.minimizers.function import Point
from hesse.minimizers.models import Model
from hesse.minimizers.noise import noise
from hesse.minimizers.result import Status

__all__ = ["diagnose"]

# A promise this many times the noise of the values would have shown in them.
CLEAR = 30.0
# A step this many times as long as x leads to where nothing can be told of x.
FAR = 1e10


def diagnose(point: Point, model: Model) -> Status:
    """What stopped the search at ``point``; costs about a dozen values."""
    x, g, eps = point.x, point.gradient(), torch.finfo(point.x.dtype).eps
    whole = model.whole
    length, size = float(whole.norm()), float(x.norm())
    if not model.lowest < 0 and length <= 16 * eps * size:
        return Status.PRECISION
    p = whole if float(g @ whole) < 0 else -g
    if float(p.norm()) == 0:
        return Status.SADDLE if model.lowest < 0 else Status.PRECISION
    if not float(p.norm()) <= FAR * max(size, 1.0):  # Newton's step where nothing curves
        p = -g / float(g.norm()) * max(size, 1.0)
    # Behind x: ahead may be a jump, which is no noise.
    level = max(noise(lambda y: point.function.at(y.to(x)).value, x.double(), -p.double()), eps * abs(point.value))
    if not math.isfinite(level):
        return Status.STALLED
    promised = min(model.predicted, -0.5 * float(g @ p))
    if promised <= CLEAR * level:
        return Status.PRECISION
    return _slopes(point, p, level)


def _slopes(point: Point, p: Tensor, level: float) -> Status:
    """Compare the slope that the gradient says with those of the values ahead and behind."""
    said = float(point.gradient() @ p)
    shortest = 16 * torch.finfo(p.dtype).eps * float(point.x.norm()) / float(p.norm())
    for t in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        # Both changes have to stand clear of the noise.
        if t < shortest or -said * t < CLEAR * level:
            continue
        ahead = (point.function.at(point.x + t * p).value - point.value) / t
        behind = (point.value - point.function.at(point.x - t * p).value) / t
        if not (math.isfinite(ahead) and math.isfinite(behind)):
            continue
        if abs(ahead - behind) > 0.1 * max(abs(ahead), abs(behind)):
            return Status.KINK
        return Status.WRONG_GRADIENT if abs(ahead - said) > 0.1 * abs(said) else Status.STALLED
    return Status.PRECISION
