"""Descents by second derivatives: how the quadratic model at a point is made.

``Exact`` asks for the whole Hessian, dense or sparse, ``Products`` and ``Truncated`` for a few
products with it. How accurate the products' solution has to be follows the gradient: Newton's method keeps its
superlinear convergence if the residual shrinks with it (Dembo, Eisenstat and Steihaug 1982).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesse.minimizers.descents.quasi_newton import Direction
from hesse.minimizers.functions.function import Point
from hesse.minimizers.models.dense import Dense, Model
from hesse.minimizers.models.factored import Factored
from hesse.minimizers.models.krylov import Krylov
from hesse.minimizers.models.steihaug import Dogleg, Steihaug
from hesse.minimizers.state import scalar
from hesse.tree import Params

__all__ = ["Bent", "Exact", "Mended", "Products", "Truncated"]

# A model is half true where the decrease differed from the promise by more than a little and less than half.
HALF = (0.2, 0.5)
COSTLY = 100  # variables above which a Hessian costs more than a step


class Exact:
    """The whole Hessian."""

    def begin(self, point: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        H, g = point.hessian(), point.gradient()
        if not bool((H if isinstance(H, Tensor) else H.data).isfinite().all()):
            return Direction(-g, -float(g @ g), natural=False)  # a step by the gradient leads away from there
        return Dense(H, g, point.x) if isinstance(H, Tensor) else Factored(H, g)

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}


class Mended(Exact):
    """The whole Hessian, and every other time, where it proved half true, the last one mended.

    A step along a curved valley ends off its floor, and the next one only goes back there. For that the old Hessian
    will do, once it fits the change of the gradient that was seen: the symmetric matrix nearest to it that does
    (Powell's symmetric Broyden update). Where the model was true (the end of a solve) Newton's own convergence is
    worth its price, unless a Hessian has many rows: then it is mended there too, as often as it stays true. Where it
    was false nothing of it is kept.

    References:
        Powell, A new algorithm for unconstrained optimization, 1970.
    """

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        if "mended" in memory and memory["mended"].numel():
            model = Dense(memory["mended"], point.gradient(), point.x)
            if model.lowest >= 0 and math.isfinite(model.predicted):
                return model
        return super().model(point, memory)

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        H, no = old.known_hessian, {"mended": old.x.new_zeros(0, 0)}
        costly, again = old.x.numel() > COSTLY, H is None
        if again:
            H = memory.get("mended")
        if not isinstance(H, Tensor) or not H.numel() or (again and not costly):
            return no
        s, g = new.x - old.x, old.gradient()
        Hs = H @ s
        promised = -float(g @ s + 0.5 * s @ Hs)
        least, most = (0.0 if costly else HALF[0]), (HALF[0] if again else HALF[1])
        if not promised > 0 or not least <= abs((old.value - new.value) / promised - 1) < most:
            return no
        r, ss = new.gradient() - g - Hs, s @ s
        rs = torch.outer(r, s)
        return {"mended": H + (rs + rs.T) / ss - (r @ s) / ss**2 * torch.outer(s, s)}


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
        return Krylov(point.product, point.gradient(), forcing(point, memory), radius(memory))


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
