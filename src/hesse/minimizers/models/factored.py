"""The quadratic model of a sparse Hessian: its least value in a region by a few factorisations.

The shift that makes ``||(H + shift I)^{-1} g||`` the radius is the root of the secular equation; without eigenvalues
each look at it costs a factorisation, so the root is met to a tenth only (More and Sorensen 1983). Below the negative
of the least eigenvalue there are no factors, which is how the other end of the bracket is known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesse.linalg.banded import SparseFactor, SparseMatrix
from hesse.minimizers.models.dense import Dense, Step

__all__ = ["Factored"]

CLOSE = 0.1  # the length of a step may miss the radius by this share
FACTORISATIONS = 30
EDGE = 1e-6  # a shift this near, relatively, to one without factors is at the least eigenvalue


class Factored:
    """The model of a sparse Hessian.

    Args:
        H: [n, n] symmetric.
        g: [n].
    """

    natural = True

    def __init__(self, H: SparseMatrix, g: Tensor) -> None:
        self.H, self.g = H, g
        self.top = float(H.row_sums().max())
        # Curvature that is 0 but for rounding is not negative: variables of which the function depends no more.
        self.factors = H.factor() or H.factor(torch.finfo(g.dtype).eps * self.top)
        self.newton = None if self.factors is None else -self.factors.solve(g)
        if self.newton is not None and not bool(self.newton.isfinite().all()):
            self.newton = None
        self.predicted = math.inf if self.newton is None else -0.5 * float(g @ self.newton)
        self.lowest = 1.0 if self.newton is not None else -1.0
        self._first: tuple[float, SparseFactor, Tensor] | None = None

    @property
    def whole(self) -> Tensor:
        """Newton's step, with the least of a row of shifts that make the curvature positive, where it is not."""
        return self._positive()[2]

    @property
    def length(self) -> float:
        """Of Newton's step; where there is none, of one that a shift as large as the curvature keeps near."""
        if self.newton is not None:
            return float(self.newton.norm())
        factor = self.H.factor(1.1 * self.top)
        assert factor is not None  # Gershgorin: no eigenvalue is below -top
        return float(factor.solve(self.g).norm())

    def within(self, radius: float) -> Step:
        """See :class:`hesse.minimizers.models.dense.Model`."""
        if self.newton is not None and float(self.newton.norm()) <= radius:
            return self._step(self.newton)
        # Between a shift that is too small (the step too long, or no factors) and one that is too large.
        low = 0.0
        shift, factor, s = self._positive()
        for _ in range(FACTORISATIONS):
            size = float(s.norm())
            if abs(size - radius) <= CLOSE * radius:
                return self._step(s)
            if size > radius:
                low = shift
            elif shift - low <= EDGE * shift:
                break
            # Newton's step for 1/||s|| - 1/radius.
            slope = float(s @ factor.solve(s)) / size**2 if size > 0 else 0.0
            guess = shift + (size - radius) / radius / slope if slope > 0 else low
            found = None
            while found is None and (size > radius or shift - low > EDGE * shift):
                guess = (
                    guess if guess > low else low + 0.1 * (shift - low) if shift > low else 2 * low + 1e-8 * self.top
                )
                found = self.H.factor(guess)
                low = low if found is not None else max(low, guess)
            if found is None:
                break
            shift, factor = guess, found
            s = -factor.solve(self.g)
        # The hard case: no shift is long enough.
        return self._step(self._lengthened(factor, s, radius))

    def cubed(self, sigma: float) -> Step:
        """By the whole matrix: the cubic problem has no cheaper way."""
        return Dense(self.H.dense(), self.g, torch.zeros_like(self.g)).cubed(sigma)

    def _positive(self) -> tuple[float, SparseFactor, Tensor]:
        """A shift that makes the curvature positive, its factors, and the step: none if that is Newton's."""
        if self._first is None:
            shift, factor = 0.0, self.factors
            while factor is None:
                shift = 4 * shift or 1e-3 * self.top or 1.0
                factor = self.H.factor(shift)
            self._first = shift, factor, -factor.solve(self.g)
        return self._first

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
