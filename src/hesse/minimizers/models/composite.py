"""A quadratic plus magnitudes between bounds, minimised by pieces: what L1 and bounds make of Newton's step.

    min over d of  g'd + 1/2 d'Hd + sum_i l1 |x_i + d_i|      with  low <= x + d <= high

Both extra terms fall apart into coordinates and are linear between kinks: zero for L1, the ends for bounds (where the
slope becomes infinite). Between its kinks every coordinate is free and the function plainly quadratic. So the search
for the least value takes two kinds of steps by turns. A *sweep* looks at coordinates one at a time, or all along
the steepest descent, and settles who rests on a kink; a *solve* then takes Newton's step in the coordinates that are
free, bent at the kinks that it meets. Once it is settled who is free, one solve is exact.

Lasso by coordinate descent is the sweep alone, projected Newton (Bertsekas) the solve alone with l1 = 0, and Newton's
step is what is left without either. A limit on the length of the step is just narrower bounds, so a trust region costs
nothing extra and curvature of any sign is allowed (a local minimum of the model is what is found then).

References:
    Bertsekas, Projected Newton methods for optimization problems with simple constraints, SIAM J. Control Optim. 1982.
    More and Toraldo, On the solution of large quadratic programming problems with bound constraints,
    SIAM J. Optim. 1991.
    Lee, Sun and Saunders, Proximal Newton-type methods for minimizing composite functions, SIAM J. Optim. 2014.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Curvature", "Direction", "Kinks", "Place", "least", "steepest"]

_ROUNDS = 60
_PATIENCE = 64
_HALVINGS = 30
_FEW = 6  # shorter than 1/32 of Newton's step, a sweep gets further


@dataclass(frozen=True)
class Kinks:
    """``l1 |z|`` between bounds, by coordinates.

    Args:
        l1: slope of the magnitude.
        low, high: [n], infinite where there is no bound.

    Example:
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> Kinks(1.0, -one, one).least(torch.tensor([0.0, 0.5]), torch.tensor([0.4, 0.4]))
        tensor([0.0000, 1.4000])
    """

    l1: float
    low: Tensor
    high: Tensor

    def slopes(self, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes [n] to the left and to the right of ``z``, where the smooth part has the slope ``r``."""
        slope = torch.full_like(z, self.l1)  # not a bare number, which would be rounded to the default dtype
        left = (r + torch.where(z > 0, slope, -slope)).masked_fill(z <= self.low, -math.inf)
        right = (r + torch.where(z >= 0, slope, -slope)).masked_fill(z >= self.high, math.inf)
        return left, right

    def least(self, z: Tensor, r: Tensor) -> Tensor:
        """The subgradient of least magnitude [n]: zero where neither side falls."""
        left, right = self.slopes(z, r)
        return torch.where(left > 0, left, torch.where(right < 0, right, 0.0))

    def piece(self, z: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ends and slope [n] of the linear piece that ``z`` lies on; from a kink of the one ``-down`` points to."""
        if self.l1 == 0:
            return self.low, self.high, torch.zeros_like(z)
        side = torch.where(z != 0, z.sign(), -down.sign())
        zero = torch.zeros_like(z)
        low = torch.where(side > 0, self.low.clamp_min(0.0), torch.where(side == 0, zero, self.low))
        high = torch.where(side < 0, self.high.clamp_max(0.0), torch.where(side == 0, zero, self.high))
        return torch.minimum(low, z), torch.maximum(high, z), self.l1 * side

    def prox(self, u: Tensor, t: float) -> Tensor:
        """The least value of ``1/2 (z - u)^2 + t l1 |z|`` between the bounds."""
        shrunk = u.sign() * (u.abs() - t * self.l1).clamp_min(0.0) if self.l1 else u
        return torch.minimum(torch.maximum(shrunk, self.low), self.high)

    def rise(self, x: Tensor, z: Tensor) -> Tensor:
        """``l1 (|z| - |x|)`` [n], exact where no sign changes however near the two are."""
        return self.l1 * torch.where(x * z > 0, x.sign() * (z - x), z.abs() - x.abs())


class Direction(NamedTuple):
    """Where to go in the free coordinates.

    Args:
        p: [n], zero where a coordinate is not free.
        Hp: [n], if it is known.
        positive: whether p is Newton's step of a curvature that is positive.
    """

    p: Tensor
    Hp: Tensor | None
    positive: bool


class Curvature(Protocol):
    """H of the quadratic, in float64."""

    def times(self, v: Tensor) -> Tensor:
        """``H v`` [n]"""

    def sweep(self, z: Tensor, r: Tensor, kinks: Kinks, patience: int) -> tuple[Tensor, Tensor]:
        """A better z [n] by coordinates or along the steepest descent, across kinks; and H times the change.

        ``patience`` is 1 at first and grows as long as no solve settles it.
        """

    def solve(self, free: Tensor, force: Tensor, rtol: float, patience: int) -> Direction | None:
        """``-H_FF^{-1} force_F`` for the coordinates ``free`` [n]; what falls where H_FF is not positive definite.

        None where that is expensive to find and ``patience`` is 1.
        """

    def lowest(self, free: Tensor) -> tuple[float, Tensor]:
        """Least eigenvalue of H_FF with its eigenvector [n], zero elsewhere; any positive number if it is positive."""


class Place(NamedTuple):
    """A least value of the model.

    Args:
        z: [n], exactly on a kink where it rests on one.
        value: of the model, 0 at x; minus infinity where it falls without end.
    """

    z: Tensor
    value: float


def least(curvature: Curvature, g: Tensor, x: Tensor, kinks: Kinks, rtol: float) -> Place:
    """The least value of ``g's + 1/2 s'Hs`` plus kinks near x: downhill all the way, to a minimum of second order.

    Args:
        curvature: H.
        g, x: [n], float64; x within the bounds.
        kinks: L1 and bounds of x + s.
        rtol: of the largest subgradient, against that at x.

    Example:
        >>> from hesse.minimizers.descents.proximal import Full
        >>> H, g, end = torch.eye(2).double(), torch.tensor([-3.0, -0.5]).double(), torch.full((2,), 9.0).double()
        >>> least(Full(H), g, torch.zeros(2).double(), Kinks(1.0, -end, end), 1e-10).z
        tensor([2., 0.], dtype=torch.float64)
    """
    z, r = x, g
    down = kinks.least(z, r)
    # Below the rounding of the sums in r = g + H s a subgradient is noise.
    enough = max(rtol * _largest(down), 16 * torch.finfo(torch.float64).eps * (_largest(g) + kinks.l1))
    patience = 1
    for _ in range(_ROUNDS):
        low, high, slope = kinks.piece(z, down)
        force = r + slope
        free = ~(((z <= low) & (force > 0)) | ((z >= high) & (force < 0)) | (low >= high))
        # Who leaves a kink is for a sweep to say, at first: most that want to would be back soon.
        leaving = free & ((z <= low) | (z >= high))
        ready = patience > 1 or not bool(leaving.any())
        direction = _inward(curvature, z, free, force, low, high, rtol, patience) if ready else None
        went = False
        if direction is not None:
            if not direction.positive and _endless(curvature, force, direction.p, low, high):
                return Place(z, -math.inf)
            new, change = _bend(curvature, z, force, direction, low, high)
            went = new is not z
            z, r = new, r + change
        down = kinks.least(z, r)
        if direction is not None and direction.positive and _largest(down) <= enough:
            break
        new, change = curvature.sweep(z, r, kinks, patience)
        if float((kinks.rise(z, new) + (new - z) * (r + 0.5 * change)).sum()) < 0:
            z, r, went = new, r + change, True
            down = kinks.least(z, r)
        if not went and patience > 1:
            break
        patience = min(2 * patience, _PATIENCE)
    s = z - x
    return Place(z, float((kinks.rise(x, z) + 0.5 * s * (g + r)).sum()))


def steepest(curvature: Curvature, z: Tensor, r: Tensor, kinks: Kinks) -> tuple[Tensor, Tensor]:
    """A sweep for an H without rows: along the steepest descent and across kinks, as far as the curvature there says.

    Returns:
        The new z, and H times the change.
    """
    down = kinks.least(z, r)
    bend, size = float(down @ curvature.times(down)), float(down @ down)
    width = kinks.high - kinks.low
    reach = float(width[width.isfinite()].max()) if bool(width.isfinite().any()) else 0.0
    t = size / bend if bend > 0 else reach / max(_largest(down), 1e-300)
    for _ in range(_HALVINGS if t > 0 else 0):
        new = kinks.prox(z - t * r, t)
        change = curvature.times(new - z)
        if float((kinks.rise(z, new) + (new - z) * (r + 0.5 * change)).sum()) < 0:
            return new, change
        t *= 0.25
    return z, torch.zeros_like(z)


def _inward(
    curvature: Curvature, z: Tensor, free: Tensor, force: Tensor, low: Tensor, high: Tensor, rtol: float, patience: int
) -> Direction | None:
    """Newton's step of the free coordinates, less those that sit at an end which it would cross.

    The force pushes these off their end, but with the others going their way they would be pushed back at once.
    """
    direction = curvature.solve(free, force, rtol, patience)
    for _ in range(_FEW):
        if direction is None or not direction.positive:
            break
        back = ((z <= low) & (direction.p < 0)) | ((z >= high) & (direction.p > 0))
        if not bool(back.any()):
            break
        free = free & ~back
        direction = curvature.solve(free, force, rtol, patience)
    return direction


def _bend(
    curvature: Curvature, z: Tensor, force: Tensor, direction: Direction, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Along the direction, bent at the ends of the piece: new z and H times the change; z itself if nothing falls."""

    def at(t: float) -> tuple[Tensor, Tensor, float]:
        new = torch.minimum(torch.maximum(z + t * direction.p, low), high)
        s = new - z
        straight = direction.Hp is not None and bool((new == z + t * direction.p).all())
        Hs = t * direction.Hp if straight and direction.Hp is not None else curvature.times(s)
        return new, Hs, float(s @ (force + 0.5 * Hs))

    signs = (1.0,) if direction.positive else (1.0, -1.0)
    for sign in signs:
        t = sign
        for _ in range(_FEW if direction.positive else _HALVINGS):
            new, Hs, value = at(t)
            if value < 0:
                break
            t *= 0.5
        else:
            # To the nearest end: on a straight line Newton's step always falls, however near that is.
            room = torch.where(sign * direction.p > 0, high - z, z - low) / direction.p.abs()
            t = sign * float(room[direction.p != 0].min()) if bool(direction.p.any()) else 0.0
            new, Hs, value = at(t)
            if not value < 0:
                continue
        while not direction.positive:  # where it curves down, on to the ends
            further = at(2 * t)
            if not further[2] < value:
                break
            t, (new, Hs, value) = 2 * t, further
        return new, Hs
    return z, torch.zeros_like(z)


def _endless(curvature: Curvature, force: Tensor, p: Tensor, low: Tensor, high: Tensor) -> bool:
    """Whether the model falls for ever along p or against it, once all that meet an end have stopped there."""
    for sign in (1.0, -1.0):
        tail = p.masked_fill(~torch.where(sign * p > 0, high.isinf(), low.isinf()), 0.0)
        if bool(tail.any()):
            bend = float(tail @ curvature.times(tail))
            if bend < 0 or (bend == 0 and sign * float(force @ tail) < 0):
                return True
    return False


def _largest(v: Tensor) -> float:
    return float(v.abs().max()) if v.numel() else 0.0
