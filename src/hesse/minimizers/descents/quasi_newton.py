"""Descents by gradients alone: curvature learnt from how the gradient changed.

``BFGS`` keeps the inverse of the Hessian [n, n], ``LBFGS`` the last pairs of steps and changes of which it could be
made, ``Gradient`` nothing. A pair s, y of a convex stretch has s'y > 0, and each update makes the approximation map y
to s.

References:
    Nocedal and Wright, Numerical Optimization, 2nd edition, chapters 6 and 7.
    Shanno and Phua, Matrix conditioning and nonlinear optimization, Math. Programming 1978: the first scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.minimizers.functions.function import Point
from hesse.minimizers.models.dense import Model, Step
from hesse.tree import Params

__all__ = ["BFGS", "LBFGS", "Direction", "Gradient"]


@dataclass(frozen=True)
class Direction:
    """A model that knows a direction only.

    Args:
        whole: [n] downhill.
        slope: g'p, negative.
        natural: whether ``whole`` has a length of its own.
    """

    whole: Tensor
    slope: float
    natural: bool
    lowest: float = math.nan

    @property
    def predicted(self) -> float:
        """Half the squared decrement, once curvature is known."""
        return -0.5 * self.slope if self.natural else math.inf

    @property
    def length(self) -> float:
        """Of the whole step."""
        return float(self.whole.norm())

    def within(self, radius: float) -> Step:
        """As far as the region goes: the least value of a plane."""
        if not self.length:
            return Step(self.whole, 0.0, 0.0)
        part = radius / self.length
        return Step(part * self.whole, -part * self.slope, radius)

    def cubed(self, sigma: float) -> Step:
        """The least value of a plane plus a cube."""
        return self.within((self.length / sigma) ** 0.5)


class Gradient:
    """Steepest descent, p = -g."""

    def begin(self, point: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        g = point.gradient()
        return Direction(-g, -float(g @ g), natural=False)

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}


class BFGS:
    """p = -B g with B the inverse approximation [n, n], ``inverse`` in the state."""

    def begin(self, point: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        g = point.gradient()
        if "inverse" not in memory:
            return Direction(-g, -float(g @ g), natural=False)
        p = -(memory["inverse"] @ g)
        return Direction(p, float(g @ p), natural=True)

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        s, y = new.x - old.x, new.gradient() - old.gradient()
        if not curved(s, y):
            return {}
        sy = s @ y
        if "inverse" in memory:
            B = memory["inverse"]
        else:
            B = sy / (y @ y) * torch.eye(s.numel(), dtype=s.dtype, device=s.device)
        By = B @ y
        u = torch.outer(By, s)
        return {"inverse": B - (u + u.T) / sy + (1 + y @ By / sy) / sy * torch.outer(s, s)}


@dataclass(frozen=True)
class LBFGS:
    """p = -B g from the last ``memory_size`` pairs by two loops; ``steps`` and ``changes`` [k, n] in the state."""

    memory_size: int = 10

    def begin(self, point: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        none = point.x.new_zeros(0, point.x.numel())
        return {"steps": none, "changes": none.clone()}

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        g = point.gradient()
        p = -inverse_product(memory["steps"], memory["changes"], g)
        return Direction(p, float(g @ p), natural=len(memory["steps"]) > 0)

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        s, y = new.x - old.x, new.gradient() - old.gradient()
        if not curved(s, y):
            return {}
        kept = slice(max(0, len(memory["steps"]) + 1 - self.memory_size), None)
        return {
            "steps": torch.cat([memory["steps"][kept], s[None]]),
            "changes": torch.cat([memory["changes"][kept], y[None]]),
        }


def curved(s: Tensor, y: Tensor) -> bool:
    """Whether a pair shows positive curvature above rounding."""
    return float(s @ y) > torch.finfo(s.dtype).eps * float(s.norm()) * float(y.norm())


def inverse_product(steps: Tensor, changes: Tensor, v: Tensor) -> Tensor:
    """``B v`` for the limited-memory inverse of pairs [k, n], oldest first.

    Example:
        One pair of f = x^2 (s = 1, y = 2) knows the inverse curvature 1/2:

        >>> inverse_product(torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([3.0]))
        tensor([1.5000])
    """
    if not len(steps):
        return v.clone()
    v, weights = v.clone(), []
    inverse = (steps * changes).sum(1).reciprocal()
    for s, y, r in zip(steps.flip(0), changes.flip(0), inverse.flip(0), strict=True):
        weights.append(r * (s @ v))
        v -= weights[-1] * y
    v *= (steps[-1] @ changes[-1]) / (changes[-1] @ changes[-1])
    for s, y, r, a in zip(steps, changes, inverse, reversed(weights), strict=True):
        v += (a - r * (y @ v)) * s
    return v
