"""The function on flat vectors, each evaluation counted, nothing computed twice.

A ``Point`` is the function at one x: its value at once, gradient, Hessian and products when they are asked for. On
torch all four come from the graph of the one forward pass that made the value, so a step that is rejected has cost one
value, and an accepted one never evaluates again. What the user gave (``jac``, ``hess``, ``hessp``) comes first; what
is missing comes from a ``Source``: autodiff, or differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hesse.linalg.banded import SparseMatrix
from hesse.minimizers.functions.border import Border
from hesse.minimizers.functions.returned import number, square

__all__ = ["Counts", "Function", "Point", "Source"]


@dataclass
class Counts:
    """Evaluations so far, under SciPy's names."""

    nfev: int = 0
    njev: int = 0
    nhev: int = 0
    nhvp: int = 0


class Source(Protocol):
    """Values and derivatives of a function of a flat vector; ``handle`` is whatever the value left behind (a graph)."""

    name: str
    counts: Counts
    exact: bool  # whether curvature is known to more than the noise of values
    second: bool  # whether gradients are made so that they can be differentiated again

    def value(self, x: Tensor) -> tuple[Any, Any]:
        """What the user's function returned at ``x`` [n], and the handle."""

    def gradient(self, x: Tensor, handle: Any) -> Tensor:
        """[n]"""

    def hessian(self, x: Tensor, handle: Any, gradient: Tensor) -> Tensor | SparseMatrix:
        """[n, n]"""

    def product(self, x: Tensor, handle: Any, gradient: Tensor, v: Tensor) -> Tensor:
        """H v [n]"""


class Function:
    """What is minimised: ``fun(x) + l1 ||x||_1 + l2/2 ||x||^2`` on flat vectors, between bounds.

    Args:
        source: where values and missing derivatives come from.
        border: the user's kind of x.
        jac, hess, hessp: the user's derivatives, in SciPy's signatures, on the user's kind of x.
        l1: weight of the sum of magnitudes.
        l2: added to the curvature.
        bounds: the least and the largest x, [n] each, infinite where there is none.
    """

    def __init__(
        self,
        source: Source,
        border: Border,
        *,
        jac: Callable[[Any], Any] | None = None,
        hess: Callable[[Any], Any] | None = None,
        hessp: Callable[[Any, Any], Any] | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.source, self.border = source, border
        self.l1, self.l2, self.bounds = l1, l2, bounds
        self.jac, self.hess, self.hessp = jac, hess, hessp
        self.counts = source.counts

    @property
    def composite(self) -> bool:
        """Whether there is more to it than a smooth part: L1 or bounds."""
        return bool(self.l1) or self.bounds is not None

    @property
    def n(self) -> int:
        """Length of x."""
        return self.border.x0.numel()

    def at(self, x: Tensor) -> Point:
        """The function at ``x`` [n]: evaluates the value."""
        self.counts.nfev += 1
        returned, handle = self.source.value(x)
        penalty = 0.5 * self.l2 * float(x @ x) + self.l1 * float(x.abs().sum())
        return Point(self, x, number(returned) + penalty, handle)

    def curved_at(self, x: Tensor) -> Point:
        """The function at ``x`` with second derivatives to be had, whether or not the method has asked for them."""
        before, self.source.second = self.source.second, True
        try:
            point = self.at(x)
            point.gradient()
        finally:
            self.source.second = before
        return point

    def given_gradient(self, x: Tensor) -> Tensor:
        """The user's ``jac`` at x."""
        assert self.jac is not None
        return self.border.inside(self.jac(self.border.outside(x)), "jac")


class Point:
    """The function at one x. ``value`` is there; ``gradient()``, ``hessian()`` and ``product(v)`` are computed once."""

    def __init__(self, function: Function, x: Tensor, value: float, handle: Any) -> None:
        self.function, self.x, self.value = function, x, value
        self._handle = handle
        self._raw: Tensor | None = None
        self._hessian: Tensor | SparseMatrix | None = None

    def gradient(self) -> Tensor:
        """[n] of the smooth part, L2 included."""
        return self._plain_gradient().detach() + self.function.l2 * self.x

    def steepest(self) -> float:
        """The largest element of the gradient, or of the least subgradient where L1 or bounds keep x from moving."""
        f, g, x = self.function, self.gradient(), self.x
        if f.l1:
            g = torch.where(x == 0, g - g.clamp(-f.l1, f.l1), g + f.l1 * x.sign())
        if f.bounds is not None:
            low, high = f.bounds
            g = g.masked_fill(((x <= low) & (g > 0)) | ((x >= high) & (g < 0)), 0.0)
        return float(g.abs().max()) if g.numel() else 0.0

    def _plain_gradient(self) -> Tensor:
        if self._raw is None:
            f = self.function
            f.counts.njev += 1
            self._raw = f.given_gradient(self.x) if f.jac is not None else f.source.gradient(self.x, self._handle)
        return self._raw

    def hessian(self) -> Tensor | SparseMatrix:
        """[n, n], L2 included."""
        if self._hessian is None:
            f = self.function
            gradient = self._plain_gradient()
            f.counts.nhev += 1
            if f.hess is not None:
                H = square(f.hess(f.border.outside(self.x)), self.x)
            elif f.hessp is not None:
                H = torch.stack([self._given_product(v) for v in torch.eye(f.n).to(self.x)])
            else:
                H = f.source.hessian(self.x, self._handle, gradient)
            self._hessian = (
                H if not f.l2 else H + f.l2 * torch.eye(f.n).to(H) if isinstance(H, Tensor) else H.shifted(f.l2)
            )
        return self._hessian

    def product(self, v: Tensor) -> Tensor:
        """H v [n], L2 included."""
        f = self.function
        gradient = self._plain_gradient()
        f.counts.nhvp += 1
        if f.hessp is not None:
            return self._given_product(v) + f.l2 * v
        if f.hess is not None or self._hessian is not None:
            return self.hessian() @ v
        return f.source.product(self.x, self._handle, gradient, v) + f.l2 * v

    def _given_product(self, v: Tensor) -> Tensor:
        f = self.function
        assert f.hessp is not None
        return f.border.inside(f.hessp(f.border.outside(self.x), f.border.outside(v)), "hessp")

    @property
    def known_hessian(self) -> Tensor | SparseMatrix | None:
        """The Hessian if it was computed here, or None."""
        return self._hessian

    def free(self) -> Tensor:
        """[n] 1 where x can move both ways without meeting a kink of L1 or a bound, else 0."""
        f, x = self.function, self.x
        free = torch.ones_like(x)
        if f.l1:
            free = free.masked_fill(x == 0, 0.0)
        if f.bounds is not None:
            free = free.masked_fill((x <= f.bounds[0]) | (x >= f.bounds[1]), 0.0)
        return free

    def finite(self) -> bool:
        """Whether value and gradient are numbers."""
        return math.isfinite(self.value) and bool(self.gradient().isfinite().all())
