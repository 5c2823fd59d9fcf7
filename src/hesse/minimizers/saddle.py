"""Is it a minimum? The least curvature at a stationary point, and the way down where it is negative.

Methods that see gradients, or products in the gradient's own Krylov space, stop at a saddle as at a minimum. Before one
of them claims a minimum, the least eigenvalue is looked for from a random vector: by Lanczos, or in the whole Hessian
where x is short.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesse.minimizers.functions.bounds import project
from hesse.minimizers.functions.function import Point
from hesse.minimizers.method import Advance
from hesse.minimizers.models.krylov import Lanczos
from hesse.minimizers.result import Status

__all__ = ["leave", "lowest"]

PRODUCTS = 30
ROUGH = 5  # where each costs as many values as two gradients by differences
HALVINGS = 40


def leave(point: Point, status: Status) -> tuple[Status | None, Advance]:
    """``status`` where ``point`` is a minimum; at a saddle None and a lower point, or SADDLE if there is none."""
    value, vector = lowest(point)
    if value >= 0:
        return status, Advance(None, {}, 0.0)
    new, t = _descend(point, vector)
    if new is not None:
        return None, Advance(new, {}, t)
    # Curvature by differences of values may be their noise; only a lower value proves it.
    return Status.SADDLE if point.function.source.exact else status, Advance(None, {}, 0.0)


def lowest(point: Point) -> tuple[float, Tensor]:
    """The least eigenvalue that a few products find, 0 if it is no more than rounding, and its vector [n].

    Where L1 or bounds hold some elements of x, of the block of the others.
    """
    n = point.x.numel()
    generator = torch.Generator().manual_seed(0)  # the same answer at every call
    v = torch.randn(n, generator=generator, dtype=torch.float64).to(point.x)
    if not point.function.source.second:
        point = point.function.curved_at(point.x)
    free = point.free()
    if not bool(free.any()):
        return 0.0, torch.zeros_like(v)
    space = Lanczos(
        lambda u: free * point.product(u),
        free * v,
        min(int(free.sum()), PRODUCTS if point.function.source.exact else ROUGH),
    )
    while not space.ended:
        space.grow()
    w, U = space.eigen()
    if not bool(w.isfinite().all()) or float(w[0]) >= -(torch.finfo(point.x.dtype).eps ** 0.5) * float(w.abs().max()):
        return 0.0, torch.zeros_like(point.x)
    return float(w[0]), space.vector(U[:, 0])


def _descend(point: Point, vector: Tensor) -> tuple[Point | None, float]:
    """A lower point along a direction of negative curvature: both ways, the longest step first that falls."""
    t = 0.1 * max(float(point.x.norm()), 1.0)
    margin = 4 * torch.finfo(point.x.dtype).eps * abs(point.value)
    bounds = point.function.bounds
    for _ in range(HALVINGS):
        found = [point.function.at(project(point.x + sign * t * vector, bounds)) for sign in (1.0, -1.0)]
        lower = [q for q in found if q.value < point.value - margin and (q.value == -math.inf or q.finite())]
        if lower:
            return min(lower, key=lambda q: q.value), t
        t *= 0.5
    return None, t
