"""The quadratic model by products alone: exact in a Krylov space that grows as far as the region asks.

Lanczos vectors of the gradient make the Hessian tridiagonal; in its small eigenbasis the trust-region and the cubic
problem are the same secular equation as for a whole matrix. The basis is kept while steps are refused, so that a
shorter step costs no product. Inside the region this is Newton's method with conjugate gradients.

References:
    Gould, Lucidi, Roma and Toint, Solving the trust-region subproblem using the Lanczos method, SIAM J. Optim. 1999.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hesse.minimizers.models.dense import Step, first_length
from hesse.minimizers.models.secular import cubic, trust_region

__all__ = ["Krylov", "Lanczos"]

MOST = 300  # Lanczos vectors kept: n of them are memory, and their eigenproblem is cubic


class Lanczos:
    """An orthonormal basis of span{v, Hv, H^2 v, ...} and H in it, a tridiagonal, one product a vector.

    Every vector is made orthogonal to all before, twice: without it eigenvalues appear again and again.

    Args:
        product: H on a vector.
        v: [n] to start from, not zero.
        most: vectors at most.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], v: Tensor, most: int) -> None:
        self.product, self.most = product, min(most, v.numel())
        self.basis = [v / v.norm()]
        self.diagonal: list[float] = []
        self.beside: list[float] = []
        self.ended = False

    def grow(self) -> None:
        """One more row and column, or ``ended`` where the space is closed under H."""
        q = self.basis[-1]
        Hq = self.product(q).double().to(q)
        self.diagonal.append(float(q @ Hq))
        Q = torch.stack(self.basis)
        for _ in range(2):
            Hq = Hq - Q.T @ (Q @ Hq)
        size = float(Hq.norm())
        scale = max(map(abs, [*self.diagonal, *self.beside]))
        if len(self.diagonal) >= self.most or size <= torch.finfo(q.dtype).eps * 10 * scale or not math.isfinite(size):
            self.ended = True
            size = 0.0 if size <= 1e-7 * scale else size
        else:
            self.basis.append(Hq / size)
        self.beside.append(size)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [k] and eigenvectors [k, k] of the tridiagonal."""
        d = torch.tensor(self.diagonal, dtype=torch.float64)
        off = torch.tensor(self.beside[:-1], dtype=torch.float64)
        return torch.linalg.eigh(torch.diag(d) + torch.diag(off, 1) + torch.diag(off, -1))

    def vector(self, y: Tensor) -> Tensor:
        """[n] from coordinates [k] in the basis."""
        Q = torch.stack(self.basis[: y.numel()])
        return Q.T @ y.to(Q)


class Krylov:
    """The least value of the model in the Krylov space of the gradient.

    Args:
        product: H on a vector.
        g: [n] gradient.
        forcing: residual of the whole step, relative to the gradient, at which the space is large enough.
        radius: of the region, if known: a step that ends at its edge needs a smaller space.
    """

    natural = True

    def __init__(self, product: Callable[[Tensor], Tensor], g: Tensor, forcing: float, radius: float | None) -> None:
        self.g, self.forcing = g, forcing
        self.size = float(g.norm())
        self.space = Lanczos(product, g, MOST) if self.size > 0 else None
        self.lowest, self.predicted = math.nan, 0.0
        self.whole, self.length = torch.zeros_like(self.g), 0.0
        if self.space is not None:
            step, shift = self._solve(lambda w, c: trust_region(w, c, first_length(w, c) if radius is None else radius))
            self.whole, self.length = step.s, step.length
            self.predicted = step.predicted if shift == 0 else math.inf

    def within(self, radius: float) -> Step:
        return self._solve(lambda w, c: trust_region(w, c, radius))[0]

    def cubed(self, sigma: float) -> Step:
        return self._solve(lambda w, c: cubic(w, c, sigma))[0]

    def _solve(self, least: Callable[[Tensor, Tensor], tuple[Tensor, float]]) -> tuple[Step, float]:
        """The step of the smallest space in which its residual is small, and its shift."""
        space, check = self.space, 1
        if space is None:  # a stationary point: searches stay where they are
            return Step(torch.zeros_like(self.g), 0.0, 0.0), 0.0
        while True:
            while len(space.diagonal) < check and not space.ended:
                space.grow()
            w, U = space.eigen()
            # Of directions beside the gradient's space nothing is known.
            whole = len(space.diagonal) == self.g.numel()
            self.lowest = float(w[0]) if whole or float(w[0]) < 0 else math.nan
            y, shift = least(w, self.size * U[0])
            inside = U @ y
            residual = space.beside[-1] * abs(float(inside[-1]))
            if space.ended or residual <= self.forcing * self.size:
                value = self.size * float(U[0] @ y) + 0.5 * float((w * y) @ y)
                return Step(space.vector(inside), -value, float(y.norm())), shift
            check = len(space.diagonal) + max(1, len(space.diagonal) // 5)
