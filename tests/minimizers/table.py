"""Small classic problems, each in torch and by hand in NumPy, and the methods by their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesse.minimizers.methods import METHODS
from minimizers.points import vector

__all__ = ["METHOD_NAMES", "PROBLEMS", "Problem"]

METHOD_NAMES = ["auto", *METHODS, "prox-newton"]


@dataclass(frozen=True)
class Problem:
    """A function with its standard start and what is known of its least value.

    Args:
        fun: of a tensor [n].
        x0: where More, Garbow and Hillstrom (or the function's author) start.
        least: values of the minima that a descent from x0 may end in.
        valley: gradient descent needs more than 1000 steps.
    """

    fun: Callable[[Tensor], Tensor]
    x0: Tensor
    least: tuple[float, ...]
    valley: bool = False

    def gap(self, x: Any) -> float:
        """How far the value at x is above the nearest of the least ones, of what there was to gain."""
        value, first = float(self.fun(torch.as_tensor(x, dtype=torch.float64))), float(self.fun(self.x0))
        return min(abs(value - least) / (first - least) for least in self.least)

    def arrays(self) -> tuple[Callable[[Any], float], Callable[[Any], Any], Callable[[Any], Any]]:
        """Value, gradient and Hessian in SciPy's signatures."""

        def tensor(x: Any) -> Tensor:
            return torch.from_numpy(np.asarray(x, dtype=np.float64))

        return (
            lambda x: float(self.fun(tensor(x))),
            lambda x: torch.func.grad(self.fun)(tensor(x)).numpy(),
            lambda x: torch.func.hessian(self.fun)(tensor(x)).numpy(),
        )


def rosenbrock(x: Tensor) -> Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def beale(x: Tensor) -> Tensor:
    i, y = torch.arange(1.0, 4, dtype=x.dtype), torch.tensor([1.5, 2.25, 2.625], dtype=x.dtype)
    return (y - x[0] * (1 - x[1] ** i)).square().sum()


def powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x
    return (a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    first = 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
    return first + 10 * (b + d - 2) ** 2 + 0.1 * (b - d) ** 2


def helical_valley(x: Tensor) -> Tensor:
    angle = torch.atan2(x[1], x[0]) / (2 * torch.pi)
    return 100 * ((x[2] - 10 * angle) ** 2 + (torch.hypot(x[0], x[1]) - 1) ** 2) + x[2] ** 2


def himmelblau(x: Tensor) -> Tensor:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def box_three(x: Tensor) -> Tensor:
    t = 0.1 * torch.arange(1.0, 11, dtype=x.dtype)
    return ((-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())).square().sum()


def logistic(x: Tensor) -> Tensor:
    t = torch.arange(1.0, 151, dtype=x.dtype)
    A = (7 * t).sin().view(30, 5) * 3
    b = (A[:, 0] - A[:, 2] + 2 * (11 * t[:30]).cos()).sign()
    return torch.nn.functional.softplus(-b * (A @ x)).mean() + 0.01 * x.square().sum()


def scaled_quadratic(x: Tensor) -> Tensor:
    w = torch.logspace(0, 3, x.numel(), dtype=x.dtype)
    return 0.5 * (w * (x - 1)) @ (x - 1) - 7


def barrier(x: Tensor) -> Tensor:
    """A linear function in a box by its logarithmic barrier; NaN outside."""
    return (x * torch.arange(1.0, x.numel() + 1, dtype=x.dtype)).sum() - 0.1 * (x.log() + (1 - x).log()).sum()


def _barrier_least(n: int) -> float:
    c = np.arange(1.0, n + 1)
    x = (c + 0.2 - np.sqrt((c + 0.2) ** 2 - 0.4 * c)) / (2 * c)  # c = 0.1 / x - 0.1 / (1 - x)
    return float((c * x - 0.1 * (np.log(x) + np.log(1 - x))).sum())


PROBLEMS: dict[str, Problem] = {
    "Rosenbrock": Problem(rosenbrock, vector(-1.2, 1), (0.0,), valley=True),
    "Beale": Problem(beale, vector(1, 1), (0.0,)),
    "Powell's singular": Problem(powell_singular, vector(3, -1, 0, 1), (0.0,), valley=True),
    "Wood": Problem(wood, vector(-3, -1, -3, -1), (0.0,), valley=True),
    "helical valley": Problem(helical_valley, vector(-1, 0, 0), (0.0,), valley=True),
    "Himmelblau": Problem(himmelblau, vector(0, 0), (0.0,)),
    "Box's three": Problem(box_three, vector(0, 10, 20), (0.0,), valley=True),
    "logistic": Problem(logistic, torch.zeros(5, dtype=torch.float64), (0.18560438656073908,)),
    "scaled quadratic": Problem(scaled_quadratic, torch.zeros(6, dtype=torch.float64), (-7.0,), valley=True),
    "barrier": Problem(barrier, torch.full((3,), 0.9, dtype=torch.float64), (_barrier_least(3),)),
}
