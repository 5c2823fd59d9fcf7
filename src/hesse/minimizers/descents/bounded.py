"""Projected Newton without a Hessian: free coordinates by conjugate gradients, or from a few remembered steps.

Between bounds (and with L1) Newton's step is one of the free coordinates alone, and that needs less than H: its
products with vectors (``ProjectedCG``), or what the last gradients told about it (``ProjectedLBFGS``). The model and
the search are those of :mod:`hesse.minimizers.descents.proximal`; here is only how the curvature is known. Without
bounds and L1 they are truncated Newton and L-BFGS within a region.

References:
    Bertsekas, Projected Newton methods for optimization problems with simple constraints, SIAM J. Control Optim. 1982.
    Gafni and Bertsekas, Two-metric projection methods for constrained optimization, SIAM J. Control Optim. 1984.
    Byrd, Lu, Nocedal and Zhu, A limited memory algorithm for bound constrained optimization, SIAM J. Sci. Comput. 1995.
    Eisenstat and Walker, Choosing the forcing terms in an inexact Newton method, SIAM J. Sci. Comput. 1996.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hesse.minimizers.descents.proximal import Composite, Full
from hesse.minimizers.functions.function import Point
from hesse.minimizers.models.composite import Direction, Kinks, steepest
from hesse.minimizers.models.dense import Model
from hesse.minimizers.state import scalar
from hesse.tree import Params

__all__ = ["LowRank", "Products", "ProjectedCG", "ProjectedLBFGS"]

MOST_PRODUCTS = 500  # of one solve
EXACT = 1e-6  # of the L-BFGS model, which is not as true itself
WRITTEN = 500  # variables up to which coordinate descent on a written out L-BFGS matrix is cheap
PROBES = 20  # products for the least curvature
NEAR = 1e-3  # of the gradient at the start: below it, a minimum may be claimed soon


class ProjectedCG:
    """A descent: H by its products, L1 and bounds as they are. The model is minimised as well as it is worth here.

    Example:
        >>> from hesse.minimizers.functions.autodiff import Autodiff
        >>> from hesse.minimizers.functions.border import border_of
        >>> from hesse.minimizers.functions.function import Function
        >>> border = border_of(torch.zeros(3))
        >>> ends = torch.full((3,), -1.0), torch.full((3,), 2.0)
        >>> aim = torch.tensor([1.0, 5.0, -5.0])
        >>> f = Function(Autodiff(lambda x: ((x - aim) ** 2).sum(), border), border, bounds=ends)
        >>> point = f.at(border.x0)
        >>> ProjectedCG().model(point, {"steepest": torch.tensor(10.0)}).within(math.inf).s
        tensor([ 1.,  2., -1.])
    """

    def begin(self, point: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        first = float(memory["steepest"])
        part = point.steepest() / first if first > 0 else 0.0
        # The square root makes the last steps converge with the power 3/2, and wastes no products on the first.
        rtol = min(0.1, max(math.sqrt(part), 1e-8))
        return Composite(point, Products(lambda v: point.product(v.to(point.x.dtype)).double(), part <= NEAR), rtol)

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}


class ProjectedLBFGS:
    """A descent: H from the last steps and the changes of the gradient along them, L1 and bounds as they are.

    Args:
        pairs: how many steps are remembered.
    """

    def __init__(self, pairs: int = 10) -> None:
        self.pairs = pairs

    def begin(self, point: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        none = point.x.new_zeros(0, point.x.numel())
        # Nothing is known but the gradient: a first step a tenth as long as x, which the region corrects.
        size = 0.1 * float(point.x.norm()) or 1.0
        gamma = max(float(point.gradient().norm()) / size, torch.finfo(torch.float32).tiny)
        return {"s": none, "y": none, "gamma": scalar(gamma)}

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        return Composite(point, LowRank(memory["s"].double(), memory["y"].double(), float(memory["gamma"])), EXACT)

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        s, y = new.x - old.x, new.gradient() - old.gradient()
        # A region's steps may end where the curvature is negative; such a pair would make B indefinite.
        if not float(s @ y) > 1e-10 * float(s.norm() * y.norm()):
            return {} if len(memory["s"]) else {"gamma": 0.25 * memory["gamma"]}
        S, Y = torch.cat([memory["s"], s[None]]), torch.cat([memory["y"], y[None]])
        return {"s": S[-self.pairs :], "y": Y[-self.pairs :]}


class Products:
    """H by its products: conjugate gradients in the free coordinates, and Lanczos for the least curvature.

    Args:
        times: ``v -> H v``, float64.
        near: whether a minimum may be claimed here, which the least curvature has to be known for.
    """

    def __init__(self, times: Callable[[Tensor], Tensor], near: bool = True) -> None:
        self.times, self.near = times, near
        self._free: Tensor | None = None
        self._lowest: tuple[float, Tensor]

    def sweep(self, z: Tensor, r: Tensor, kinks: Kinks, patience: int) -> tuple[Tensor, Tensor]:
        """See :func:`hesse.minimizers.models.composite.steepest`."""
        return steepest(self, z, r, kinks)

    def solve(self, free: Tensor, force: Tensor, rtol: float, patience: int) -> Direction | None:
        """Conjugate gradients until the residual is a third of what is asked for, or curvature is negative."""
        left = -force.masked_fill(~free, 0.0)
        p, Hp, d = torch.zeros_like(left), torch.zeros_like(left), left
        size = float(left @ left)
        enough = (0.3 * rtol) ** 2 * size
        for _ in range(min(MOST_PRODUCTS, 2 * int(free.sum())) if size > 0 else 0):
            Hd = self.times(d)
            bend = float(d @ Hd)
            if bend <= 0:
                further = float(p.norm() / d.norm()) or 1.0
                return Direction(p + further * d, Hp + further * Hd, False)
            t = size / bend
            p, Hp = p + t * d, Hp + t * Hd
            left = left - t * Hd.masked_fill(~free, 0.0)
            size, before = float(left @ left), size
            if size <= enough:
                break
            d = left + (size / before) * d
        value, v = self.lowest(free)
        if value < 0:  # the force had no part along it: a saddle
            far = float(p.norm()) or 1.0
            return Direction(p + far * (-v if float(v @ force) > 0 else v), None, False)
        return Direction(p, Hp, True)

    def lowest(self, free: Tensor) -> tuple[float, Tensor]:
        """See :class:`hesse.minimizers.models.composite.Curvature`; far from a minimum it is not asked for."""
        if not self.near or not bool(free.any()):
            return 1.0, torch.zeros(len(free), dtype=torch.float64, device=free.device)
        if self._free is None or not torch.equal(self._free, free):
            self._free, self._lowest = free, _lanczos(self.times, free)
        return self._lowest


class LowRank:
    """The L-BFGS matrix ``B = gamma I - W M^{-1} W'`` of some steps, positive definite.

    Args:
        S, Y: [k, n], steps and changes of the gradient, float64, with ``s'y > 0``, the oldest first.
        gamma: curvature where nothing is known, without pairs.
    """

    def __init__(self, S: Tensor, Y: Tensor, gamma: float = 1.0) -> None:
        k = len(S)
        self.gamma = float(Y[-1] @ Y[-1]) / float(S[-1] @ Y[-1]) if k else gamma
        SY = S @ Y.T
        below = SY.tril(-1)
        upper, lower = [-SY.diagonal().diag(), below.T], [below, self.gamma * S @ S.T]
        self.M = torch.cat([torch.cat(upper, 1), torch.cat(lower, 1)])
        self.W = torch.cat([Y, self.gamma * S]).T

    def times(self, v: Tensor) -> Tensor:
        """See :class:`hesse.minimizers.models.composite.Curvature`."""
        return self.gamma * v - self.W @ torch.linalg.solve(self.M, self.W.T @ v)

    def sweep(self, z: Tensor, r: Tensor, kinks: Kinks, patience: int) -> tuple[Tensor, Tensor]:
        """By coordinates while B is small enough to write out, else along the steepest descent."""
        if len(z) > WRITTEN:
            return steepest(self, z, r, kinks)
        return Full(self.times(torch.eye(len(z), dtype=z.dtype, device=z.device))).sweep(z, r, kinks, patience)

    def solve(self, free: Tensor, force: Tensor, rtol: float, patience: int) -> Direction | None:
        """Exactly, by the formula of Sherman, Morrison and Woodbury in as many unknowns as there are pairs, twice."""
        c, W = force.masked_fill(~free, 0.0), self.W * free[:, None]
        inner = torch.linalg.solve(self.M - W.T @ W / self.gamma, W.T @ c)
        return Direction(-(c + W @ inner / self.gamma) / self.gamma, None, True)

    def lowest(self, free: Tensor) -> tuple[float, Tensor]:
        """Not known: the pairs were chosen so that their own is positive."""
        return math.nan, torch.zeros(len(free), dtype=self.W.dtype, device=self.W.device)


def _lanczos(times: Callable[[Tensor], Tensor], free: Tensor) -> tuple[float, Tensor]:
    """Least Ritz value of H_FF from a random start, and its vector."""
    generator = torch.Generator(free.device).manual_seed(0)
    start = torch.randn(len(free), dtype=torch.float64, device=free.device, generator=generator)
    v = start.masked_fill(~free, 0.0)
    V = (v / v.norm())[None]
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(PROBES, int(free.sum()))):
        w = times(V[-1]).masked_fill(~free, 0.0)
        alphas.append(float(w @ V[-1]))
        for _ in range(2):
            w = w - V.T @ (V @ w)
        betas.append(float(w.norm()))
        if betas[-1] <= 1e-10 * max(map(abs, alphas)):
            break
        V = torch.cat([V, w[None] / betas[-1]])
    k = len(alphas)
    T = torch.tensor(alphas, dtype=torch.float64).diag()
    for i, beta in enumerate(betas[: k - 1]):
        T[i, i + 1] = T[i + 1, i] = beta
    w, Q = torch.linalg.eigh(T)
    # Flat is not negative: products of rounded numbers are as uncertain as this.
    level = 1e-8 * float(w.abs().max())
    value = float(w[0])
    return (value if value < -level else max(value, 0.0)), Q[:, 0].to(V.device) @ V[:k]
