"""Functions at points for the tests of models and searches: quadratics with a chosen Hessian, and counting ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesse.minimizers.functions.autodiff import Autodiff
from hesse.minimizers.functions.border import border_of
from hesse.minimizers.functions.function import Function, Point

Fun = Callable[[Tensor], Tensor]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def function(fun: Fun, x0: Tensor, **more: object) -> Function:
    border = border_of(x0)
    return Function(Autodiff(fun, border), border, **more)  # type: ignore[arg-type]


def point(fun: Fun, x: Tensor, **more: object) -> Point:
    return function(fun, x, **more).at(x)


def quadratic(H: Tensor, g: Tensor) -> Fun:
    """``g'x + 1/2 x'Hx``: gradient g and Hessian H at 0."""
    return lambda x: g @ x + 0.5 * x @ H @ x


def symmetric(n: int, seed: int, *, eigenvalues: Tensor | None = None) -> Tensor:
    """[n, n] with standard normal, or with the given, eigenvalues in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    w = torch.randn(n, dtype=torch.float64, generator=generator) if eigenvalues is None else eigenvalues
    H = (Q * w) @ Q.T
    return 0.5 * (H + H.T)


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rosenbrock(x: Tensor) -> Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def promise(H: Tensor, g: Tensor, s: Tensor) -> float:
    return -float(g @ s + 0.5 * s @ H @ s)


def least_in_region(H: Tensor, g: Tensor, radius: float) -> Tensor:
    """The step of a region by bisection for the shift: slow and obviously right away from the hard case."""
    eye = torch.eye(len(g), dtype=H.dtype)
    w = torch.linalg.eigvalsh(H)
    if float(w[0]) > 0:
        s = -torch.linalg.solve(H, g)
        if float(s.norm()) <= radius:
            return s
    low = max(0.0, -float(w[0]))
    high = low + float(g.norm()) / radius + float(w.abs().max())
    for _ in range(200):
        middle = 0.5 * (low + high)
        s = -torch.linalg.solve(H + middle * eye, g)
        low, high = (middle, high) if float(s.norm()) > radius else (low, middle)
    return s
