"""Gauss-Newton, and Newton where residuals bend: how a fit's quadratic model is chosen at every point.

The Hessian of 1/2 ||r||^2 is J'J + sum_i r_i H_i. Gauss-Newton's model has the first part alone: it costs nothing
beyond J, is never negative, and is exact where residuals vanish or are linear. Where it is not, it converges slowly or
not at all. After every step the values tell which model had been right about it, and that one is taken next (NL2SOL's
idea, Dennis, Gay and Welsch 1981, with the second part by autodiff in place of their secant update of it). The second
part is also formed before a minimum is claimed, since J'J cannot tell one from a saddle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesse.minimizers.fits.boxed import Boxed
from hesse.minimizers.fits.linearised import Curved, Linear, Turning, bidiagonal
from hesse.minimizers.fits.residuals import Evaluated, Residuals
from hesse.minimizers.functions.function import Function, Point
from hesse.minimizers.models.dense import Model
from hesse.minimizers.state import scalar
from hesse.tree import Params

__all__ = ["Fit", "FitPoint", "GaussNewton"]

# The change of the cost is this near to what Gauss-Newton's model said: no use for second derivatives.
NEAR = 0.25
# It is wrong, but promised more than this part of the cost: in a curved valley (Rosenbrock) it still is the better
# guide, # for it looks along the valley. At a remainder that does not go away it creeps, and that tells them apart.
REMAIN = 0.03
# Of a Krylov model: the part of the gradient that a step may leave, and the most products.
LEFT, MOST = 1e-4, 300


class Fit(Function):
    """A function that is a sum of losses of residuals."""

    source: Residuals

    def at(self, x: Tensor) -> FitPoint:
        """The residuals at ``x`` [n], which is moved onto the bounds that rounding took it across."""
        if self.bounds is not None:
            x = torch.minimum(torch.maximum(x, self.bounds[0]), self.bounds[1])
        self.counts.nfev += 1
        cost, at = self.source.value(x)
        return FitPoint(self, x, cost + 0.5 * self.l2 * float(x @ x), at)


class FitPoint(Point):
    """Residuals at one x."""

    def __init__(self, function: Fit, x: Tensor, value: float, at: Evaluated) -> None:
        super().__init__(function, x, value, at)
        self.fit, self.found = function, at
        self._linear: tuple[Tensor, Linear | Boxed] | None = None
        self._curved: tuple[Tensor, Curved | Boxed] | None = None

    def jacobian(self) -> Tensor:
        """J [m, n]."""
        self.gradient()
        return self.fit.source.jacobian(self.x, self.found)

    def weighted(self) -> tuple[Tensor, Tensor]:
        """Roots of the curvatures along the residuals [m], and the residuals that give the gradient with them."""
        root = self.found.rho.kept.sqrt()
        return root, torch.where(root > 0, self.found.rho.weight * self.found.r / root, 0.0)

    def linear(self, scale: Tensor, dogleg: bool = False) -> Linear | Boxed:
        """Gauss-Newton's model, L2 as n further residuals."""
        if self._linear is None or not torch.equal(self._linear[0], scale):
            root, f = self.weighted()
            l2, x = math.sqrt(self.function.l2), self.x
            model: Linear | Boxed
            if not self.fit.source.dense(self.found):
                model = self._by_products(root, f, scale, l2, dogleg)
            else:
                J = root[:, None] * self.jacobian()
                if l2:
                    J, f = torch.cat([J, l2 * torch.eye(len(x)).to(x)]), torch.cat([f, l2 * x])
                if self.function.bounds is None:
                    model = Linear(J, f, scale, dogleg=dogleg)
                else:

                    def face(i: Tensor) -> Linear:
                        return Linear(J[:, i], f, scale[i], dogleg=dogleg)

                    model = Boxed(face, J.mT @ J, self.gradient(), x, scale, self.function.bounds)
            self._linear = scale, model
        return self._linear[1]

    def _by_products(self, root: Tensor, f: Tensor, scale: Tensor, l2: float, dogleg: bool) -> Linear:
        source, m = self.fit.source, len(f)

        def push(v: Tensor) -> Tensor:
            self.fit.counts.nhvp += 1
            Jv = root * source.push(self.x, self.found, v)
            return torch.cat([Jv, l2 * v]) if l2 else Jv

        def pull(u: Tensor) -> Tensor:
            v = source.pull(self.x, self.found, root * u[:m])
            return v + l2 * u[m:] if l2 else v

        f = torch.cat([f, l2 * self.x]) if l2 else f
        B, head, V = bidiagonal(push, pull, f, scale.double(), LEFT, MOST)
        return Linear(B, head, scale, dogleg=dogleg, basis=V, dtype=self.x.dtype)

    def curved(self, scale: Tensor) -> Curved | Boxed:
        """Newton's model."""
        if self._curved is None or not torch.equal(self._curved[0], scale):
            H, g, x = self.hessian(), self.gradient(), self.x
            assert isinstance(H, Tensor)
            model: Curved | Boxed
            if self.function.bounds is None:
                model = Curved(H, g, x, scale)
            else:

                def face(i: Tensor) -> Curved:
                    return Curved(H[i][:, i], g[i], x[i], scale[i])

                model = Boxed(face, H, g, x, scale, self.function.bounds)
            self._curved = scale, model
        return self._curved[1]

    @property
    def has_curved(self) -> bool:
        """Whether second derivatives have been formed here."""
        return self._curved is not None


class GaussNewton:
    """A descent by residuals.

    Args:
        x_scale: [n], the size of changes that matter, or None for the least reciprocal column norms of J so far.
        second: whether second derivatives are to be had and used.
        dogleg: whether short steps follow the dogleg.
        rtol, atol: what the loop will ask for: before it stops, second derivatives are looked at.
    """

    def __init__(self, x_scale: Tensor | None, *, second: bool, dogleg: bool, rtol: float, atol: float) -> None:
        self.x_scale, self.second, self.dogleg, self.rtol, self.atol = x_scale, second, dogleg, rtol, atol

    def begin(self, point: Point) -> Params:
        assert isinstance(point, FitPoint)
        if self.x_scale is not None:
            return {"scale": 1 / self.x_scale, "second": scalar(0)}
        norms = self._norms(point)
        return {"scale": torch.where(norms > 0, norms, 1.0), "second": scalar(0)}

    def model(self, point: Point, memory: Params) -> Model:
        assert isinstance(point, FitPoint)
        scale = memory["scale"]
        linear = point.linear(scale, self.dogleg)
        if not self.second or self._nothing_left(point, memory):
            return linear
        if not point.fit.source.dense(point.found):
            linear.lowest = math.nan  # the loop looks for a saddle by products before it ends
            return linear
        if bool(memory["second"]) or self._ends(point, linear, memory):
            return point.curved(scale)
        return Turning(linear, lambda: point.curved(scale), REMAIN * point.value)

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        assert isinstance(old, FitPoint) and isinstance(new, FitPoint)
        scale, found = memory["scale"], {}
        if self.x_scale is None:
            found["scale"] = torch.maximum(scale, self._norms(new))
        if self.second and new.fit.source.dense(new.found):
            s, gained = new.x - old.x, old.value - new.value
            linear = old.linear(scale, self.dogleg)
            off = abs(linear.gain(s) - gained)
            right = off <= NEAR * abs(gained) or linear.gain(s) > REMAIN * old.value
            if old.has_curved and not right:
                right = off <= abs(old.curved(scale).gain(s) - gained)
            found["second"] = scalar(float(not right))
        return found

    def _norms(self, point: FitPoint) -> Tensor:
        if not point.fit.source.dense(point.found):
            return torch.ones_like(point.x)
        root, _ = point.weighted()
        return ((root[:, None] * point.jacobian()).square().sum(0) + point.function.l2).sqrt()

    def _nothing_left(self, point: FitPoint, memory: Params) -> bool:
        """Whether the residuals are as good as zero, which is a minimum whatever the curvature."""
        return point.value <= self.rtol**1.5 * (float(memory["start"]) - point.value)

    def _ends(self, point: FitPoint, linear: Linear | Boxed, memory: Params) -> bool:
        """Whether the loop would stop here."""
        gained = float(memory["start"]) - point.value
        enough = max(self.rtol * min(gained, point.value), self.rtol**1.5 * gained, 1e-15 * point.value)
        return linear.predicted <= enough or point.steepest() <= self.atol
