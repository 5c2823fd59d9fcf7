"""Random vectors and their products, turned into independent samples of one quantity: three ways to spend a product.

A mean of plain samples; Hutch++, which spends two products of three on a basis Q of the range, where it is exact, and
one on a sample of what lies outside of Q; and leave-one-out, where every vector serves both purposes. All three
only gather samples; when to stop is :mod:`hesse.linalg.estimate`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hesse.linalg.lanczos import check_finite, generator_of, working_dtype

if TYPE_CHECKING:
    from hesse.linalg.operator import LinearOperator

__all__ = ["BLOCK", "HutchPlusPlus", "LeaveOneOut", "Mean", "Probes", "Sampler", "diagonals", "traces"]

BLOCK = 16  # columns multiplied at once


class Probes:
    """Products with an operator, counted; and vectors of random signs."""

    def __init__(self, A: LinearOperator, seed: int) -> None:
        self.A = A
        self.products = 0
        self.generator = generator_of(A, seed)

    def signs(self, k: int) -> Tensor:
        """[n, k] of 1 and -1."""
        shape = (self.A.shape[0], k)
        bits = torch.randint(2, shape, generator=self.generator, device=self.A.device)
        return (2 * bits - 1).to(working_dtype(self.A))

    def product(self, x: Tensor) -> Tensor:
        """``A x``, a few columns at a time."""
        y = torch.cat([self.A @ part for part in x.split(BLOCK, dim=1)], dim=1).to(working_dtype(self.A))
        check_finite(self.A, y)
        self.products += x.shape[1]
        return y


class Sampler(Protocol):
    """Gathers samples; ``cost`` is the number of products each takes."""

    cost: int
    count: int

    def draw(self, k: int) -> None:
        """Gather k more."""

    def mean(self) -> tuple[Tensor, Tensor]:
        """Mean of the samples so far and its standard error, in float64."""

    def remaining(self, excess: float) -> int:
        """How many more samples it may take until the error, now ``excess`` times too large, is small enough."""


class Mean:
    """Samples ``f(z, A z)`` of one product each."""

    cost = 1

    def __init__(self, probes: Probes, sample: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.probes = probes
        self.sample = sample
        self.count = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def draw(self, k: int) -> None:
        for begin in range(0, k, BLOCK):
            z = self.probes.signs(min(BLOCK, k - begin))
            self.add(z, self.probes.product(z))

    def add(self, z: Tensor, y: Tensor) -> None:
        """Samples from vectors whose products are known."""
        x = self.sample(z, y).double()
        # Two sets of samples merged (Chan, Golub and LeVeque, 1983): a sum of squares would cancel.
        fresh, m = x.mean(-1), x.shape[-1]
        total = self.count + m
        step = fresh - self._mean.to(fresh)
        squares = (x - fresh[..., None]).square().sum(-1)
        self._squares = self._squares.to(fresh) + squares + step.square() * (self.count * m / total)
        self._mean = self._mean.to(fresh) + step * (m / total)
        self.count = total

    def mean(self) -> tuple[Tensor, Tensor]:
        return self._mean, student(self.count) * (self._squares / (self.count - 1) / self.count).sqrt()

    def remaining(self, excess: float) -> int:
        return math.ceil(self.count * (1.1 * excess**2 - 1))


class Range:
    """An orthonormal basis Q of what products span, with ``A Q``, grown by blocks: ``Y = Q R``."""

    def __init__(self, probes: Probes) -> None:
        n, dtype, device = probes.A.shape[0], working_dtype(probes.A), probes.A.device
        self.probes = probes
        self.Q = self.AQ = torch.zeros(n, 0, dtype=dtype, device=device)
        self.R = torch.zeros(0, 0, dtype=torch.float64)

    def extend(self, Y: Tensor) -> None:
        """Add the columns of Y to what is spanned."""
        l, k = self.Q.shape[1], Y.shape[1]
        inside = torch.zeros(l, k, dtype=torch.float64)
        corner = torch.eye(k, dtype=torch.float64)
        fresh = Y
        for _ in range(2):  # once leaves Q orthogonal only up to the rounding errors of what was taken away
            h = self.Q.mT @ fresh
            inside += small(h) @ corner
            fresh, r = torch.linalg.qr(fresh - self.Q @ h)
            corner = small(r) @ corner
        self.R = torch.cat([torch.cat([self.R, inside], 1), torch.cat([torch.zeros(k, l).to(corner), corner], 1)])
        self.Q = torch.cat([self.Q, fresh], dim=1)
        self.AQ = torch.cat([self.AQ, self.probes.product(fresh)], dim=1)


class HutchPlusPlus:
    """The trace inside the range of a sketch exactly, plus samples of the trace outside (Meyer et al., 2021)."""

    cost = 3

    def __init__(self, probes: Probes) -> None:
        self.probes = probes
        self.range = Range(probes)
        self.count = 0
        self.z = self.y = self.range.Q

    def draw(self, k: int) -> None:
        self.range.extend(self.probes.product(self.probes.signs(k)))
        z = self.probes.signs(k)
        self.z = torch.cat([self.z, z], dim=1)
        self.y = torch.cat([self.y, self.probes.product(z)], dim=1)
        self.count += k

    def mean(self) -> tuple[Tensor, Tensor]:
        # With c = Q'z the sample (z - Q c)' A (z - Q c) needs no product but A z and A Q.
        Q, AQ = self.range.Q, self.range.AQ
        c, H = small(Q.mT @ self.z), small(Q.mT @ AQ)
        outside = small((self.z * self.y).sum(0)) - (c * small(Q.mT @ self.y)).sum(0)
        outside = outside - (small(AQ.mT @ self.z) * c).sum(0) + (c * (H @ c)).sum(0)
        return H.trace() + outside.mean(), student(self.count) * outside.std() / math.sqrt(self.count)

    def remaining(self, excess: float) -> int:
        return math.ceil(self.count * (excess - 1))


class LeaveOneOut:
    """Each vector in turn samples what lies outside of the range of all others (Epperly, Tropp and Webber, 2024).

    Without vector i the range is that of ``Q (I - s_i s_i') Q'``, with s_i orthogonal to all columns of R but the i-th:
    no further factorisation is needed. The samples are correlated, through the range that they share: measured on
    spectra of all kinds, the standard error of independent ones is short by up to 1.4, so it is widened by sqrt(2).

    Args:
        samples: [..., k] from all that is known here: XTrace or XDiag.
    """

    cost = 2

    def __init__(self, probes: Probes, samples: Callable[[LeaveOneOut], Tensor]) -> None:
        self.probes = probes
        self.samples = samples
        self.range = Range(probes)
        self.z = self.y = self.range.Q
        self.count = 0

    def draw(self, k: int) -> None:
        z = self.probes.signs(k)
        self.add(z, self.probes.product(z))

    def add(self, z: Tensor, y: Tensor) -> None:
        """Vectors whose products are known; one more product for each."""
        self.z = torch.cat([self.z, z], dim=1)
        self.y = torch.cat([self.y, y], dim=1)
        self.range.extend(y)
        self.count += z.shape[1]

    def left_out(self) -> Tensor:
        """The vectors s_i as columns [k, k]."""
        R = self.range.R.clone()
        pivots = R.diagonal()
        least = 1e-30 + torch.finfo(self.z.dtype).eps * float(pivots.abs().max())
        pivots[pivots.abs() < least] = least  # a range of lower rank: any direction outside of it may be left out
        S = torch.linalg.solve_triangular(R.mT, torch.eye(len(R), dtype=R.dtype), upper=False)
        return S / torch.linalg.vector_norm(S, dim=0)

    def mean(self) -> tuple[Tensor, Tensor]:
        x = self.samples(self)
        return x.mean(-1), math.sqrt(2) * student(self.count) * x.std(-1) / math.sqrt(self.count)

    def remaining(self, excess: float) -> int:
        return math.ceil(self.count * (excess - 1))


def traces(x: LeaveOneOut) -> Tensor:
    """XTrace: the trace inside of each range plus a sample of that outside, [k]."""
    Q, AQ, S = x.range.Q, x.range.AQ, x.left_out()
    H, c = small(Q.mT @ AQ), small(Q.mT @ x.z)
    c = c - S * (S * c).sum(0)
    outside = small((x.z * x.y).sum(0)) - (c * x.range.R).sum(0)
    outside = outside - (small(AQ.mT @ x.z) * c).sum(0) + (c * (H @ c)).sum(0)
    return H.trace() - (S * (H @ S)).sum(0) + outside


def diagonals(x: LeaveOneOut) -> Tensor:
    """XDiag: the diagonal of A on each range plus a sample of that outside, [n, k]."""
    Q, AQ, S = x.range.Q, x.range.AQ, x.left_out()
    c = small(Q.mT @ x.z)
    c = (c - S * (S * c).sum(0)).to(Q)
    S = S.to(Q)
    inside = (AQ * Q).sum(1, keepdim=True) - (AQ @ S) * (Q @ S)
    return (inside + x.z * (x.y - AQ @ c)).double()


def small(x: Tensor) -> Tensor:
    """Small matrices are kept in float64 beside the CPU's own."""
    return x.to("cpu", torch.float64)


def student(count: int) -> float:
    """Student's factor: how much wider 95 percent are for the mean of so few samples (Cornish and Fisher, 1960)."""
    z, free = 1.96, count - 1
    terms = [(z**2 + 1) / 4, (5 * z**4 + 16 * z**2 + 3) / 96, (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384]
    return 1 + sum(term / free ** (i + 1) for i, term in enumerate(terms))
