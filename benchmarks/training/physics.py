"""Physics-informed networks whose forward pass is the residual of a differential equation, one row a point.

Derivatives in the inputs are carried through the layers beside the value (Taylor mode): a linear map maps them all, an
activation by its chain rule. So a residual is made of ordinary layers only, and any optimiser, curvature product or
forward-mode derivative sees nothing unusual. A point on the boundary has the error of its value as its row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Burgers", "Poisson", "burgers_points", "burgers_solution", "poisson_points", "poisson_solution"]

VISCOSITY = 0.1


class Field(nn.Module):
    """A tanh network u(x), with derivatives along the coordinates."""

    def __init__(self, inputs: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(before, after, dtype=torch.float64)
            for before, after in ((inputs, width), (width, width), (width, 1))
        )
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)

    def value(self, x: Tensor) -> Tensor:
        """u [N, 1] at x [N, inputs]."""
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [N, 1], du/dx_k [inputs, N, 1] and d2u/dx_0^2 [N, 1] at x [N, inputs]."""
        first = torch.eye(x.shape[1], dtype=x.dtype)[:, None].expand(-1, len(x), -1)
        second = torch.zeros_like(x)
        for layer in self.layers:
            x, first, second = layer(x), F.linear(first, layer.weight), F.linear(second, layer.weight)
            if layer is not self.layers[-1]:
                x = torch.tanh(x)
                slope = 1 - x**2
                second = slope * (second - 2 * x * first[0] ** 2)
                first = slope * first
        return x, first, second


class Poisson(Field):
    """u'' = f on [0, 1] with u(0) = u(1) = 0: rows u'' - f inside and ``weight`` u at the ends."""

    def __init__(self, weight: float = 10.0) -> None:
        super().__init__(1)
        self.weight = weight

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        u, _, second = self.derivatives(x)
        f = -(math.pi**2) * torch.sin(math.pi * x) - 4 * math.pi**2 * torch.sin(2 * math.pi * x)
        return inside * (second - f) + (1 - inside) * self.weight * u


class Burgers(Field):
    """u_t + u u_x = viscosity u_xx, u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0; coordinates (x, t)."""

    def __init__(self, weight: float = 3.0) -> None:
        super().__init__(2)
        self.weight = weight

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        u, first, second = self.derivatives(x)
        equation = first[1] + u * first[0] - VISCOSITY * second
        given = torch.where(x[:, 1:] == 0, -torch.sin(math.pi * x[:, :1]), 0.0)
        return inside * equation + (1 - inside) * self.weight * (u - given)


def poisson_points(count: int = 100) -> tuple[Tensor, Tensor]:
    """Points [N, 1] and whether each is inside: evenly spaced midpoints and both ends."""
    inside = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return _joined(inside[:, None], torch.tensor([[0.0], [1.0]], dtype=torch.float64))


def poisson_solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x) + torch.sin(2 * math.pi * x)


def burgers_points(across: int = 32, along: int = 20) -> tuple[Tensor, Tensor]:
    """Points [N, 2] and whether each is inside: midpoints of a grid, the start, and both walls."""
    x = -1 + 2 * (torch.arange(across, dtype=torch.float64) + 0.5) / across
    t = (torch.arange(along, dtype=torch.float64) + 0.5) / along
    start = torch.cartesian_prod(x, torch.zeros(1, dtype=torch.float64))
    walls = torch.cartesian_prod(torch.tensor([-1.0, 1.0], dtype=torch.float64), t)
    return _joined(torch.cartesian_prod(x, t), torch.cat([start, walls]))


def burgers_solution(x: Tensor) -> Tensor:
    """[N, 1] at (x, t) [N, 2], t > 0: Cole-Hopf transform and Gauss-Hermite quadrature (Basdevant et al., 1986)."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    place, time = x[:, :1].numpy(), x[:, 1:].numpy()
    shift = place - nodes * np.sqrt(4 * VISCOSITY * time)
    kernel = weights * np.exp(-np.cos(np.pi * shift) / (2 * np.pi * VISCOSITY))
    return torch.from_numpy(-(np.sin(np.pi * shift) * kernel).sum(1) / kernel.sum(1))[:, None]


def _joined(inside: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor]:
    points = torch.cat([inside, boundary])
    return points, (torch.arange(len(points)) < len(inside)).to(points.dtype)[:, None]
