"""Problems of a thousand unknowns and more, most with sparse Hessians: chains, arrows, grids, and one dense one.

Extended Rosenbrock, Broyden: Moré, Garbow and Hillstrom (1981). Chained Wood, chained Rosenbrock: Toint (1978).
Arrowhead, Engval1, Dqrtic, Cosine, Liarwhd: the CUTEst collection (Gould, Orban and Toint, 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.minimize.classic_sized import broyden_banded, broyden_tridiagonal, extended_rosenbrock, rosenbrock_start
from benchmarks.minimize.problems import Problem, least

__all__ = ["chained_wood", "minimal_surface", "problems"]


def _full(n: int, number: float) -> Tensor:
    return torch.full((n,), number, dtype=torch.float64)


def chained_wood(x: Tensor) -> Tensor:
    a, b, c, d = x[0:-2:2], x[1:-2:2], x[2::2], x[3::2]
    left = 100 * (a * a - b) ** 2 + (a - 1) ** 2
    right = 90 * (c * c - d) ** 2 + (1 - c) ** 2
    return (left + right + 10 * (b + d - 2) ** 2 + 0.1 * (b - d) ** 2).sum()


def chained_wood_start(n: int) -> Tensor:
    return torch.cat([torch.tensor([-3.0, -1, -3, -1]), torch.tensor([-2.0, 0]).repeat((n - 4) // 2)]).double()


def chained_rosenbrock(x: Tensor) -> Tensor:
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def arrowhead(x: Tensor) -> Tensor:
    return ((x[:-1] ** 2 + x[-1] ** 2) ** 2 - 4 * x[:-1] + 3).sum()


def engval(x: Tensor) -> Tensor:
    return ((x[:-1] ** 2 + x[1:] ** 2) ** 2 - 4 * x[:-1] + 3).sum()


def dqrtic(x: Tensor) -> Tensor:
    return ((x - torch.arange(1, x.numel() + 1, dtype=x.dtype)) ** 4).sum()


def cosine(x: Tensor) -> Tensor:
    return (x[:-1] ** 2 - 0.5 * x[1:]).cos().sum()


def liarwhd(x: Tensor) -> Tensor:
    return torch.cat([2 * (x * x - x[0]), x - 1])


def minimal_surface(side: int) -> Problem:
    """Area of the graph over the unit square, two triangles a cell, inner grid [side, side], bent boundary."""
    t = torch.linspace(0, 1, side + 2, dtype=torch.float64)
    frame = (2 * torch.pi * t).sin()[:, None] * (1 - 2 * t)[None, :] + t[:, None] * t[None, :]
    inner = torch.zeros_like(frame)
    inner[1:-1, 1:-1] = 1
    h = 1 / (side + 1)

    def fun(x: Tensor) -> Tensor:
        z = frame * (1 - inner) + torch.nn.functional.pad(x.view(side, side), (1, 1, 1, 1))
        right, down = (z[:, 1:] - z[:, :-1]) / h, (z[1:] - z[:-1]) / h
        first = (1 + right[:-1] ** 2 + down[:, :-1] ** 2).sqrt().sum()
        second = (1 + right[1:] ** 2 + down[:, 1:] ** 2).sqrt().sum()
        return h * h / 2 * (first + second)

    return Problem(f"minimal-surface-{side}", fun, _full(side * side, 0.0), (BEST["surface"],), None, _LARGE)


def bratu(side: int) -> Problem:
    """Energy ½|∇u|² - λ exp(u) of the Bratu problem, λ = 4, on an inner grid [side, side]: below λ = 6.8 a minimum."""
    h = 1 / (side + 1)

    def fun(x: Tensor) -> Tensor:
        u = torch.nn.functional.pad(x.view(side, side), (1, 1, 1, 1))
        across, along = (u[:, 1:] - u[:, :-1]).square().sum(), (u[1:] - u[:-1]).square().sum()
        return (across + along) / 2 - 4 * h * h * x.exp().sum()

    # the energy falls without bound for large u: only the branch near the start is a minimum
    return Problem(f"bratu-{side}", fun, _full(side * side, 0.0), (BEST["bratu"],), None, _LARGE | {"local"})


def steep_diagonal(n: int) -> Problem:
    """½ Σ d_i x_i² - c_i x_i, d from 1e-5 to 1e5, each direction worth -½ at the answer x_i = d_i^-½."""
    d = torch.logspace(-5, 5, n, dtype=torch.float64)

    def fun(x: Tensor) -> Tensor:
        return (0.5 * d * x * x - d.sqrt() * x).sum()

    return Problem(f"quadratic-diagonal-{n}", fun, _full(n, 0.0), (-n / 2,), None, _LARGE)


def long_logistic(n: int, rows: int) -> Problem:
    """Logistic regression of [rows, n], more unknowns than rows; only ½ 1e-2 |x|² makes the answer unique."""
    g = torch.Generator().manual_seed(11)
    X = torch.randn(rows, n, generator=g, dtype=torch.float64) / n**0.5
    y = torch.sign(X[:, :20].sum(1) + 0.1 * torch.randn(rows, generator=g, dtype=torch.float64))

    def fun(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-y * (X @ x)).mean() + 0.5e-2 * (x @ x) / n

    return Problem(f"logistic-wide-{n}", fun, _full(n, 0.0), (BEST["wide"],), None, _LARGE)


_LARGE = frozenset({"large"})
BEST = {  # computed as in harder.py
    "surface": 2.335781912870722,
    "bratu": -4.118838824710394,
    "wide": 3.464277206792563e-2,
    "engval": 1108.194718785013,
}


def problems() -> list[Problem]:
    return [
        least("ext-rosenbrock-1000", extended_rosenbrock, rosenbrock_start(1000), (0.0,), "large"),
        least("ext-rosenbrock-5000", extended_rosenbrock, rosenbrock_start(5000), (0.0,), "large"),
        least("broyden-tridiagonal-1000", broyden_tridiagonal, _full(1000, -1.0), (0.0,), "large"),
        least("broyden-banded-1000", broyden_banded, _full(1000, -1.0), (0.0,), "large"),
        least("liarwhd-1000", liarwhd, _full(1000, 4.0), (0.0,), "large"),
        Problem(
            "chained-wood-1000",
            chained_wood,
            chained_wood_start(1000),
            (0.0, 78.33194937504750),
            None,
            _LARGE | {"local"},
        ),
        Problem("arrowhead-1000", arrowhead, _full(1000, 1.0), (0.0,), None, _LARGE),
        Problem("engval-1000", engval, _full(1000, 2.0), (BEST["engval"],), None, _LARGE),
        Problem("dqrtic-1000", dqrtic, _full(1000, 2.0), (0.0,), None, _LARGE | {"degenerate"}),
        Problem("cosine-1000", cosine, _full(1000, 1.0), (-999.0,), None, _LARGE),
        minimal_surface(32),
        bratu(32),
        steep_diagonal(1000),
        long_logistic(1000, 200),
    ]
