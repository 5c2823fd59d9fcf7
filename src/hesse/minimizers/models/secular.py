"""The least value of a quadratic model within a radius, or plus a cube, in coordinates where its curvature is diagonal.

    min over y of  c'y + 1/2 sum_i w_i y_i^2      subject to ||y|| <= radius            (trust region)
    min over y of  c'y + 1/2 sum_i w_i y_i^2  +  sigma/3 ||y||^3                        (cubic regularisation)

Both are solved by ``y(shift) = -c / (w + shift)`` with one number, the shift, on which everything hangs: for the trust
region ||y|| = radius, for the cube ||y|| = shift / sigma. That is the secular equation; in the reciprocal of ||y|| it
is almost straight, and Newton's method takes a few steps. Where c has no part along the lowest eigenvector (the hard
case) no shift is long enough, and the eigenvector itself makes up the length.

References:
    More and Sorensen, Computing a trust region step, SIAM J. Sci. Stat. Comput. 1983.
    Cartis, Gould and Toint, Adaptive cubic regularisation methods, Math. Programming 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["cubic", "trust_region"]

_STEPS = 60


def trust_region(w: Tensor, c: Tensor, radius: float) -> tuple[Tensor, float]:
    """The minimiser within ``||y|| <= radius``, and its shift.

    Args:
        w: [n] eigenvalues, float64.
        c: [n] gradient in the eigenbasis.
        radius: positive.

    Example:
        >>> trust_region(torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0]), 1.0)
        (tensor([-1., -0.]), 2.0)
        >>> trust_region(torch.tensor([-1.0, 4.0]), torch.tensor([0.0, 0.0]), 2.0)  # the hard case: at a saddle
        (tensor([2., -0.]), 1.0)
    """
    if float(w.min()) > 0:
        y = -c / w
        if float(y.norm()) <= radius:
            return y, 0.0
    return _solve(w, c, lambda shift: (radius, 0.0), radius, 0.0)


def cubic(w: Tensor, c: Tensor, sigma: float) -> tuple[Tensor, float]:
    """The minimiser of the model plus ``sigma/3 ||y||^3``, and its shift ``sigma ||y||``.

    Args:
        w: [n] eigenvalues, float64.
        c: [n] gradient in the eigenbasis.
        sigma: positive.

    Example:
        >>> y, shift = cubic(torch.tensor([0.0]), torch.tensor([-4.0]), 1.0)  # -4 y + y^3 / 3
        >>> y, round(shift, 6)
        (tensor([2.]), 2.0)
    """
    return _solve(w, c, lambda shift: (shift / sigma, 1 / sigma), None, sigma)


def _solve(
    w: Tensor, c: Tensor, length: Callable[[float], tuple[float, float]], radius: float | None, sigma: float
) -> tuple[Tensor, float]:
    """y and shift with ``||y|| = length(shift)``; ``length`` also returns its derivative.

    The unknown is what the shift is above the least that makes the model convex: near the hard case that is many
    decades below the shift itself, and would be lost in it.
    """
    low = max(0.0, -float(w.min()))
    d = w + low
    if not bool(c.any()) and low == 0:
        return torch.zeros_like(c), 0.0
    flat = d <= 0
    if not bool(c[flat].any()):
        y = torch.where(flat, 0.0, -c / d.masked_fill(flat, 1.0))
        short = length(low)[0] ** 2 - float(y @ y)
        if short >= 0:
            if low > 0:
                y[int(w.argmin())] = math.sqrt(short)
            return y, low
    below, above = _bracket(d, c, low, radius, sigma)
    delta, missed = below if below > 0 else above * 1e-8, math.inf
    for _ in range(_STEPS):
        y = -c / (d + delta)
        size, (want, slope) = float(y.norm()), length(low + delta)
        if abs(size - want) <= 1e-10 * want:
            break
        if size > want:
            below = delta
        else:
            above = delta
        # Newton's step for 1/||y|| - 1/length, which is increasing and concave: from below it never passes the root.
        rise = float((y * y / (d + delta)).sum()) / size**3 + slope / want**2 if want > 0 else math.inf
        delta -= (1 / size - 1 / want) / rise if 0 < rise < math.inf else 0.0
        miss = abs(math.log(size / want)) if want > 0 else math.inf
        if not below < delta < above or miss > 0.5 * missed:  # many decades away: halve the decades
            delta = math.sqrt(max(below, above * 1e-32)) * math.sqrt(above)  # their product may underflow
        missed = miss
        if above - below <= 1e-15 * above:
            break
    return -c / (d + delta), low + delta


def _bracket(d: Tensor, c: Tensor, low: float, radius: float | None, sigma: float) -> tuple[float, float]:
    """Bounds of the root: ||y|| is at least its largest element, and at most ||c|| over the least curvature."""
    if radius is not None:
        return max(0.0, float((c.abs() / radius - d).max())), float(c.norm()) / radius - float(d.min())
    near, size = float(c[d <= d.min()].norm()), float(c.norm())

    def root(norm: float, floor: float) -> float:  # (floor + delta) (low + delta) = sigma norm
        half = 0.5 * (floor + low)
        if norm == 0:
            return 0.0
        return (sigma * norm - floor * low) / (half + math.sqrt(max(0.0, half**2 - floor * low + sigma * norm)))

    return max(0.0, root(near, float(d.min()))), max(root(size, 0.0), root(size, float(d.min())))
