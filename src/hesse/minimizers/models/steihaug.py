"""Truncated conjugate gradients: Newton's equation by products, until the region, negative curvature or accuracy ends
it.

The corners of the path lie further and further out, so that a smaller region is left on an earlier stretch of the same
path: a refused step costs no product. Without a region this is the descent of Newton-CG; with one that of trust-ncg.
``Dogleg`` is the path of two stretches, steepest descent and Newton's step (Powell 1970).

References:
    Steihaug, The conjugate gradient method and trust regions in large scale optimization, SIAM J. Numer. Anal. 1983.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from hesse.minimizers.functions.function import Point
from hesse.minimizers.models.dense import Dense, Step

__all__ = ["Dogleg", "Steihaug"]


class Path:
    """A model whose least value in a region is sought on a path of straight stretches from 0 outwards.

    Args:
        g: [n] gradient.
        corners: [n] each, the first 0.
        products: H on each corner.
        ray: [n] and H on it: where the path goes on for ever, along negative curvature.
    """

    def __init__(
        self, g: Tensor, corners: list[Tensor], products: list[Tensor], ray: tuple[Tensor, Tensor] | None, lowest: float
    ) -> None:
        self.g, self.corners, self.products, self.ray, self.lowest = g, corners, products, ray, lowest
        self.predicted = math.inf if ray is not None else self._promise(corners[-1], products[-1])
        last = corners[-1]
        self.whole = last if len(corners) > 1 or ray is None else ray[0]
        self.natural = self.whole is last  # a ray is only a direction
        self.length = float(self.whole.norm())

    def _promise(self, s: Tensor, Hs: Tensor) -> float:
        return -float(self.g @ s + 0.5 * s @ Hs)

    def within(self, radius: float) -> Step:
        """Where the path leaves the region, or its end."""
        stretches = list(zip(self.corners, self.products, strict=True))
        for (a, Ha), (b, Hb) in pairwise(stretches):
            if float(b.norm()) > radius:
                t = _leaves(a, b - a, radius)
                return self._step(a + t * (b - a), Ha + t * (Hb - Ha))
        a, Ha = stretches[-1]
        if self.ray is None:
            return self._step(a, Ha)
        p, Hp = self.ray
        t = _leaves(a, p, radius)
        return self._step(a + t * p, Ha + t * Hp)

    def _step(self, s: Tensor, Hs: Tensor) -> Step:
        return Step(s, self._promise(s, Hs), float(s.norm()))

    def cubed(self, sigma: float) -> Step:
        raise TypeError("a path has no least value plus a cube: use 'arc', which searches a Krylov space.")


class Steihaug(Path):
    """The path of conjugate gradients.

    Args:
        point: for gradient and products.
        forcing: residual, relative to the gradient, at which the path ends.
        radius: of the region, if known, beyond which the path is of no use.
    """

    def __init__(self, point: Point, forcing: float, radius: float | None) -> None:
        g = point.gradient()
        corners, products = [torch.zeros_like(g)], [torch.zeros_like(g)]
        r, p, lowest = g, -g, math.nan
        rr = float(r @ r)
        enough = forcing**2 * rr
        ray: tuple[Tensor, Tensor] | None = None
        for _ in range(min(2 * g.numel(), 1000)):
            if rr <= enough:
                break
            Hp = point.product(p)
            pHp = float(p @ Hp)
            lowest = min(pHp / float(p @ p), lowest) if lowest == lowest else pHp / float(p @ p)
            if pHp <= 0:
                ray = p, Hp
                break
            t = rr / pHp
            corners.append(corners[-1] + t * p)
            products.append(products[-1] + t * Hp)
            r, before = r + t * Hp, rr
            rr = float(r @ r)
            if radius is not None and float(corners[-1].norm()) > radius:
                break
            p = -r + rr / before * p
        # Positive curvature on the path says nothing of the directions beside it.
        super().__init__(g, corners, products, ray, lowest if lowest <= 0 else math.nan)


class Dogleg(Path):
    """The path to the least value along the gradient, then to Newton's step; needs positive curvature to be short.

    Where the curvature is not positive Newton's step is taken with the smallest shift that makes it so.
    """

    def __init__(self, point: Point) -> None:
        g, H = point.gradient(), point.hessian()
        H = H if isinstance(H, Tensor) else H.dense()
        exact = Dense(H, g, point.x)
        Hg = H @ g
        gHg = float(g @ Hg)
        corners, products = [torch.zeros_like(g)], [torch.zeros_like(g)]
        if gHg > 0:
            cauchy = float(g @ g) / gHg
            corners.append(-cauchy * g)
            products.append(-cauchy * Hg)
        if exact.newton is None or float(exact.whole.norm()) > float(corners[-1].norm()):
            corners.append(exact.whole)
            products.append(H @ exact.whole)
        super().__init__(g, corners, products, None, exact.lowest)
        self.predicted = exact.predicted


def _leaves(a: Tensor, p: Tensor, radius: float) -> float:
    """t >= 0 with ``||a + t p|| = radius``, for a inside."""
    aa, ap, pp = float(a @ a), float(a @ p), float(p @ p)
    missing = max(radius**2 - aa, 0.0)
    root = math.sqrt(ap**2 + pp * missing)
    # The form without cancellation for each sign.
    return missing / (ap + root) if ap > 0 else (root - ap) / pp if pp > 0 else 0.0
