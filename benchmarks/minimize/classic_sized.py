"""The problems of Moré, Garbow and Hillstrom that come in any size n, numbers 21 to 35 of the paper."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.minimize.problems import Problem, least

__all__ = ["broyden_tridiagonal", "extended_rosenbrock", "problems", "rosenbrock_start"]


def _count(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def _full(n: int, number: float) -> Tensor:
    return torch.full((n,), number, dtype=torch.float64)


def extended_rosenbrock(x: Tensor) -> Tensor:
    odd, even = x[0::2], x[1::2]
    return torch.cat([10 * (even - odd**2), 1 - odd])


def rosenbrock_start(n: int) -> Tensor:
    return torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(n // 2)


def extended_powell(x: Tensor) -> Tensor:
    a, b, c, d = x.view(-1, 4).T
    return torch.cat([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


def penalty_1(x: Tensor) -> Tensor:
    return torch.cat([1e-5**0.5 * (x - 1), ((x * x).sum() - 0.25)[None]])


def penalty_2(x: Tensor) -> Tensor:
    n = x.numel()
    a, e, i = 1e-5**0.5, (x / 10).exp(), _count(n)
    y = (i / 10).exp()[1:] + ((i - 1) / 10).exp()[1:]
    last = ((n - i + 1) * x * x).sum() - 1
    return torch.cat([x[:1] - 0.2, a * (e[1:] + e[:-1] - y), a * (e[1:] - _full(1, -0.1).exp()), last[None]])


def variably_dimensioned(x: Tensor) -> Tensor:
    s = (_count(x.numel()) * (x - 1)).sum()
    return torch.cat([x - 1, torch.stack([s, s * s])])


def trigonometric(x: Tensor) -> Tensor:
    n = x.numel()
    return n - x.cos().sum() + _count(n) * (1 - x.cos()) - x.sin()


def brown_almost_linear(x: Tensor) -> Tensor:
    return torch.cat([x[:-1] + x.sum() - (x.numel() + 1), (x.prod() - 1)[None]])


def boundary_value(x: Tensor) -> Tensor:
    n = x.numel()
    t = _count(n) / (n + 1)
    y = pad(x, (1, 1))
    return 2 * x - y[:-2] - y[2:] + (x + t + 1) ** 3 / (2 * (n + 1) ** 2)


def integral_equation(x: Tensor) -> Tensor:
    n = x.numel()
    t = _count(n) / (n + 1)
    cube = (x + t + 1) ** 3
    low = (t * cube).cumsum(0)
    high = ((1 - t) * cube).sum() - ((1 - t) * cube).cumsum(0)
    return x + ((1 - t) * low + t * high) / (2 * (n + 1))


def broyden_tridiagonal(x: Tensor) -> Tensor:
    y = pad(x, (1, 1))
    return (3 - 2 * x) * x - y[:-2] - 2 * y[2:] + 1


def broyden_banded(x: Tensor) -> Tensor:
    n = x.numel()
    near = pad(x * (1 + x), (5, 1))
    return x * (2 + 5 * x * x) + 1 - sum(near[k : k + n] for k in range(7) if k != 5)


def linear_full_rank(m: int) -> Callable[[Tensor], Tensor]:
    def residual(x: Tensor) -> Tensor:
        return pad(x, (0, m - x.numel())) - 2 / m * x.sum() - 1

    return residual


def linear_rank_1(m: int) -> Callable[[Tensor], Tensor]:
    def residual(x: Tensor) -> Tensor:
        return _count(m) * (_count(x.numel()) * x).sum() - 1

    return residual


def linear_rank_1_zeros(m: int) -> Callable[[Tensor], Tensor]:
    def residual(x: Tensor) -> Tensor:
        inner = (_count(x.numel()) * x)[1:-1].sum()
        return pad((_count(m) - 1)[1:-1], (1, 1)) * inner - 1

    return residual


def chebyquad(x: Tensor) -> Tensor:
    n = x.numel()
    before, now, means = torch.ones_like(x), 2 * x - 1, []
    for i in range(1, n + 1):
        means.append(now.mean() + (1 / (i * i - 1) if i % 2 == 0 else 0))
        before, now = now, 2 * (2 * x - 1) * now - before
    return torch.stack(means)


def problems() -> list[Problem]:
    def start(n: int) -> Tensor:
        return _count(n) / (n + 1)

    return [
        least("ext-rosenbrock-100", extended_rosenbrock, rosenbrock_start(100)),
        least(
            "ext-powell-40", extended_powell, torch.tensor([3.0, -1, 0, 1]).double().repeat(10), (0.0,), "degenerate"
        ),
        least("penalty-1-4", penalty_1, _count(4), (2.249977500884e-5,)),
        least("penalty-1-10", penalty_1, _count(10), (7.08765146709e-5,)),
        least("penalty-2-4", penalty_2, _full(4, 0.5), (9.376293007355e-6,)),
        least("penalty-2-10", penalty_2, _full(10, 0.5), (2.936605374567e-4,)),
        least("variably-dimensioned", variably_dimensioned, 1 - _count(10) / 10),
        least("trigonometric", trigonometric, _full(10, 0.1), (0.0, 2.795056121879e-5), "local"),
        least("brown-almost-linear", brown_almost_linear, _full(10, 0.5), (0.0, 1.0)),
        least("boundary-value", boundary_value, start(10) * (start(10) - 1)),
        least("integral-equation", integral_equation, start(10) * (start(10) - 1)),
        least("broyden-tridiagonal", broyden_tridiagonal, _full(10, -1.0)),
        least("broyden-banded", broyden_banded, _full(10, -1.0)),
        least("linear-full-rank", linear_full_rank(10), _full(5, 1.0), (5.0,)),
        least("linear-rank-1", linear_rank_1(10), _full(5, 1.0), (10 * 9 / (2 * 21),), "degenerate"),
        least("linear-rank-1-zeros", linear_rank_1_zeros(10), _full(5, 1.0), (124 / (2 * 17),), "degenerate"),
        least("chebyquad-8", chebyquad, start(8), (3.516873725678e-3,), "local"),
        least("chebyquad-10", chebyquad, start(10), (4.772713696375e-3, 6.503954800882e-3), "local"),
    ]
