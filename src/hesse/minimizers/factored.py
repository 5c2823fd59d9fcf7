"""The quadratic model of a sparse Hessian: its least value in a region by a few factorisations.

The shift that makes ``||(H + shift I)^{-1} g||`` the radius is the root of the secular equation; without eigenvalues each
look at it costs a factorisation, so the root is met to a tenth only (More and Sorensen 1983). Below the negative of the
least eigenvalue there are no factors, which is how the other end of the bracket is known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesse.linalg.banded import SparseFactor, SparseMatrix
from hesse.minimizers.models import Dense, Step

__all__ = ["Factored"]

CLOSE = 0.1  # the length of a step may miss the radius by this share
FACTORISATIONS = 30


class Factored:
    """The model of a sparse Hessian.

    Args:
        H: [n, n] symmetric.
        g: [n].
        x: [n].
    """

    natural = True

    def __init__(self, H: SparseMatrix, g: Tensor, x: Tensor) -> None:
        self.H, self.g, self.x = H, g, x
        self.top = float(H.row_sums().max())
        # Curvature that is 0 but for rounding is not negative: variables of which the function depends no more.
        self.factors = H.factor() or H.factor(torch.finfo(g.dtype).eps * self.top)
        self.newton = None if self.factors is None else -self.factors.solve(g)
        if self.newton is not None and not bool(self.newton.isfinite().all()):
            self.newton = None
        self.predicted = math.inf if self.newton is None else -0.5 * float(g @ self.newton)
        self.lowest = 1.0 if self.newton is not None else -1.0
        self._shift = 0.0

    @property
    def whole(self) -> Tensor:
        """Newton's step, with the least of a row of shifts that make the curvature positive, where it is not."""
        return self.newton if self.newton is not None else self._positive()[2]

    @property
    def length(self) -> float:
        """Of Newton's step; where there is none, of one that a shift as large as the curvature keeps near."""
        if self.newton is not None:
            return float(self.newton.norm())
        factor = self.H.factor(self.top)
        assert factor is not None  # Gershgorin: no eigenvalue is below -top
        return float(factor.solve(self.g).norm())

    def within(self, radius: float) -> Step:
        if self.newton is not None and float(self.newton.norm()) <= radius:
            return self._step(self.newton)
        low = 0.0
        if self.newton is None:
            shift, factor, s = self._positive()
        else:
            shift, factor, s = 0.0, self.factors, self.newton
        assert factor is not None
        for _ in range(FACTORISATIONS):
            size = float(s.norm())
            if abs(size - radius) <= CLOSE * radius:
                break
            # Newton's step for 1/||s|| - 1/radius.
            slope = float(s @ factor.solve(s)) / size**2 if size > 0 else 0.0
            new = shift + (size - radius) / radius / slope if slope > 0 else 2 * shift if size > radius else low
            if size > radius:
                low = max(low, shift)
            else:
                if shift - low <= 1e-6 * shift:
                    return self._step(self._lengthened(factor, s, radius))
            found = None
            while found is None:
                if new <= low:
                    new = low + 0.1 * (shift - low) if shift > low else 2 * low + 1e-8 * self.top
                found = self.H.factor(new)
                if found is None:
                    low = max(low, new)
                    if shift - low <= 1e-6 * shift:
                        return self._step(self._lengthened(factor, s, radius))
            shift, factor = new, found
            s = -factor.solve(self.g)
        return self._step(s if float(s.norm()) >= (1 - CLOSE) * radius else self._lengthened(factor, s, radius))

    def cubed(self, sigma: float) -> Step:
        """By the whole matrix: the cubic problem has no cheaper way."""
        return Dense(self.H.dense(), self.g, self.x).cubed(sigma)

    def _positive(self) -> tuple[float, SparseFactor, Tensor]:
        """A shift that makes the curvature positive, its factors, and the step."""
        shift = self._shift or 1e-3 * self.top or 1.0
        factor = self.H.factor(shift)
        while factor is None:
            shift *= 4
            factor = self.H.factor(shift)
        self._shift = shift
        return shift, factor, -factor.solve(self.g)

    def _lengthened(self, factor: SparseFactor, s: Tensor, radius: float) -> Tensor:
        """The hard case: the least eigenvector, by inverse iteration, makes up the length."""
        v = torch.randn(s.shape, generator=torch.Generator().manual_seed(0), dtype=s.dtype)
        for _ in range(4):
            v = factor.solve(v)
            v = v / v.norm()
        v = -v if float(v @ self.g) > 0 else v
        sv = float(s @ v)
        return s + (math.sqrt(max(sv**2 + radius**2 - float(s @ s), 0.0)) - sv) * v

    def _step(self, s: Tensor) -> Step:
        return Step(s, -float(self.g @ s + 0.5 * s @ (self.H @ s)), float(s.norm()))
