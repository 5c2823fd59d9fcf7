"""A composite function minimised by each way to know its curvature, and what must hold where it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hesse.minimizers.descents.bounded import ProjectedCG, ProjectedLBFGS
from hesse.minimizers.descents.proximal import Proximal
from hesse.minimizers.functions.autodiff import Autodiff
from hesse.minimizers.functions.border import border_of
from hesse.minimizers.functions.function import Function, Point
from hesse.minimizers.method import Descent, Method
from hesse.minimizers.result import Status
from hesse.minimizers.searches.regions import TrustRegion
from hesse.minimizers.solve import solve
from hesse.minimizers.state import State

Bounds = tuple[Sequence[float] | float, Sequence[float] | float]

CURVATURES: dict[str, Callable[[], Descent]] = {"hessian": Proximal, "products": ProjectedCG, "l-bfgs": ProjectedLBFGS}


def minimized(
    fun: Callable[[Tensor], Tensor],
    x0: Sequence[float] | Tensor,
    *,
    l1: float = 0.0,
    l2: float = 0.0,
    bounds: Bounds | None = None,
    curvature: str = "hessian",
    hess: Callable[[Any], Any] | None = None,
    rtol: float = 1e-12,
    max_steps: int = 500,
) -> tuple[Point, Status, State]:
    """The last point, the status and the state of a solve from ``x0``, projected on the bounds."""
    x = x0 if isinstance(x0, Tensor) else torch.tensor(x0, dtype=torch.float64)
    ends = None
    if bounds is not None:
        low, high = (torch.as_tensor(end, dtype=x.dtype).expand(x.shape).clone() for end in bounds)
        x, ends = torch.minimum(torch.maximum(x, low), high), (low, high)
    border = border_of(x)
    visited: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        visited.append(x.detach().clone())
        return fun(x)

    function = Function(Autodiff(seen, border), border, l1=l1, l2=l2, bounds=ends, hess=hess)
    state = State("prox-newton", border, {"x": border.x0})
    method = Method("prox-newton", CURVATURES[curvature](), TrustRegion())
    point, status = solve(function, method, state, rtol=rtol, atol=0.0, max_steps=max_steps)
    if ends is not None:
        assert all(bool(((x >= ends[0]) & (x <= ends[1])).all()) for x in visited)
    return point, status, state


def kkt(point: Point) -> float:
    """The largest violation of the optimality conditions, by a loop over coordinates that follows the textbook."""
    f, worst = point.function, 0.0
    low, high = f.bounds if f.bounds is not None else (point.x * 0 - math.inf, point.x * 0 + math.inf)
    for g, x, a, b in zip(point.gradient().tolist(), point.x.tolist(), low.tolist(), high.tolist(), strict=True):
        left, right = g + (f.l1 if x > 0 else -f.l1), g + (f.l1 if x >= 0 else -f.l1)
        worst = max(worst, left if x > a else 0.0, -right if x < b else 0.0)
    return worst
