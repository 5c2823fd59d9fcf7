"""Descents by second derivatives: how the quadratic model at a point is made.

``Exact`` asks for the whole Hessian, dense or sparse, ``Products`` and ``Truncated`` for a few
products with it. How accurate the products' solution has to be follows the gradient: Newton's method keeps its
superlinear convergence if the residual shrinks with it (Dembo, Eisenstat and Steihaug 1982).
"""

from __future__ import annotations

from torch import Tensor

from hesse.minimizers.factored import Factored
from hesse.minimizers.function import Point
from hesse.minimizers.krylov import Krylov
from hesse.minimizers.models import Dense, Model
from hesse.minimizers.state import scalar
from hesse.minimizers.steihaug import Dogleg, Steihaug
from hesse.tree import Params

__all__ = ["Bent", "Exact", "Products", "Truncated"]


class Exact:
    """The whole Hessian."""

    def begin(self, point: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        H, g = point.hessian(), point.gradient()
        return Dense(H, g, point.x) if isinstance(H, Tensor) else Factored(H, g)

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}


class Bent(Exact):
    """The whole Hessian, but only two directions of it: the dogleg."""

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        return Dogleg(point)


class Products(Exact):
    """Products in a Krylov space."""

    def begin(self, point: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {"gradient": scalar(float(point.gradient().norm()))}

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        return Krylov(point, forcing(point, memory), radius(memory))


class Truncated(Products):
    """Products on the path of conjugate gradients."""

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        return Steihaug(point, forcing(point, memory), radius(memory))


def forcing(point: Point, memory: Params) -> float:
    """Residual allowed, relative to the gradient: a tenth, and less as the gradient falls below that of the start."""
    begun = float(memory["gradient"])
    return min(0.1, (float(point.gradient().norm()) / begun) ** 0.5) if begun > 0 else 0.1


def radius(memory: Params) -> float | None:
    """The region that a search has left in the state, if it has one."""
    return float(memory["radius"]) if "radius" in memory else None
