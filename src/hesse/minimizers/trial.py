"""One look at the gradient before a solve is built on it."""

from __future__ import annotations

import torch
from torch import Tensor

from hesse.minimizers.functions.function import Function
from hesse.minimizers.functions.noise import noise

__all__ = ["check_gradient"]


def check_gradient(function: Function, x: Tensor) -> None:
    """Compare the slope along one random direction with differences of values, in which their noise is allowed for.

    Raises:
        ValueError: they differ.
    """
    point = function.at(x)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    v = v * (x.abs() + 0.1 * max(float(x.abs().max()), 1.0))  # each variable in its own units
    said = float(point.gradient() @ v)

    def value(y: Tensor) -> float:
        return function.at(y.to(x)).value

    level = max(noise(value, x.double(), v.double()), torch.finfo(x.dtype).eps * abs(point.value))
    found, error = _slope(value, x, v, level)
    if abs(found - said) > 10 * error + 1e-3 * abs(found):
        raise ValueError(
            f"jac does not belong to fun: along a random direction the gradient says a slope of {said:.6g}, the "
            f"values say {found:.6g} +- {error:.1g}. A sign, a factor or a missing term; "
            "hesse.check.gradients says where."
        )


def _slope(value: object, x: Tensor, v: Tensor, level: float) -> tuple[float, float]:
    """The central difference of the step at which two successive ones agree best, and how well they do."""
    assert callable(value)
    best, before = (0.0, float("inf")), None
    for power in range(2, 9):
        h = 10.0**-power
        slope = (value(x + h * v) - value(x - h * v)) / (2 * h)
        if before is not None:
            error = abs(slope - before) + level / h
            if error < best[1]:
                best = slope, error
        before = slope
    return best
