"""The problems of Moré, Garbow and Hillstrom (ACM TOMS 7, 17-41, 1981), with their data and standard starts.

Each is a vector r(x) whose sum of squares is minimised. Least values are known to six digits from the paper; the digits
here were computed. Gulf: the paper's "y_i m i x2" is a misprint for y_i - x2, as its stated solution shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.minimize import classic_sized
from benchmarks.minimize.problems import Problem, least

__all__ = ["problems"]


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def count(first: int, last: int) -> Tensor:
    """first, ..., last as float64."""
    return torch.arange(first, last + 1, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x[0], x[1]
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, (-x).exp().sum() - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: Tensor) -> Tensor:
    return vector(1.5, 2.25, 2.625) - x[0] * (1 - torch.stack([x[1], x[1] ** 2, x[1] ** 3]))


def jennrich_sampson(x: Tensor) -> Tensor:
    i = count(1, 10)
    return 2 + 2 * i - ((i * x[0]).exp() + (i * x[1]).exp())


def helical_valley(x: Tensor) -> Tensor:
    # the paper's angle, arctan(x2/x1) with a half turn where x1 < 0, has its cut on the negative x2 axis; so has this
    turn = torch.atan2(-x[0], x[1]) / (2 * math.pi) + 0.25
    return torch.stack([10 * (x[2] - 10 * turn), 10 * ((x[0] ** 2 + x[1] ** 2).sqrt() - 1), x[2]])


BARD = vector(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)


def bard(x: Tensor) -> Tensor:
    u = count(1, 15)
    v = 16 - u
    return BARD - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


HALF_BELL = (0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521)
BELL = vector(*HALF_BELL, 0.3989, *reversed(HALF_BELL))


def gaussian(x: Tensor) -> Tensor:
    t = (8 - count(1, 15)) / 2
    return x[0] * (-x[1] * (t - x[2]) ** 2 / 2).exp() - BELL


MEYER = vector(
    34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872
)  # fmt: skip


def meyer(x: Tensor) -> Tensor:
    return x[0] * (x[1] / (45 + 5 * count(1, 16) + x[2])).exp() - MEYER


def gulf(x: Tensor) -> Tensor:
    t = count(1, 99) / 100
    y = 25 + (-50 * t.log()) ** (2 / 3)
    return (-((y - x[1]).abs() ** x[2]) / x[0]).exp() - t


def box3(x: Tensor) -> Tensor:
    t = 0.1 * count(1, 10)
    return (-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())


def powell_singular(x: Tensor) -> Tensor:
    return torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    return torch.stack(
        [10 * (b - a * a), 1 - a, 90**0.5 * (d - c * c), 1 - c, 10**0.5 * (b + d - 2), (b - d) / 10**0.5]
    )


KOWALIK_Y = vector(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
KOWALIK_U = vector(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


def kowalik_osborne(x: Tensor) -> Tensor:
    u = KOWALIK_U
    return KOWALIK_Y - x[0] * (u * u + u * x[1]) / (u * u + u * x[2] + x[3])


def brown_dennis(x: Tensor) -> Tensor:
    t = count(1, 20) / 5
    return (x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2


OSBORNE_1 = vector(
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603,
    0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411,
    0.406,
)  # fmt: skip


def osborne_1(x: Tensor) -> Tensor:
    t = 10 * count(0, 32)
    return OSBORNE_1 - (x[0] + x[1] * (-t * x[3]).exp() + x[2] * (-t * x[4]).exp())


def biggs_exp6(x: Tensor) -> Tensor:
    t = 0.1 * count(1, 13)
    y = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return x[2] * (-t * x[0]).exp() - x[3] * (-t * x[1]).exp() + x[5] * (-t * x[4]).exp() - y


OSBORNE_2 = vector(
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606,
    0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423,
    0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
    0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098,
    0.054,
)  # fmt: skip


def osborne_2(x: Tensor) -> Tensor:
    t = count(0, 64) / 10
    waves = x[1:4, None] * (-((t - x[8:11, None]) ** 2) * x[5:8, None]).exp()
    return OSBORNE_2 - (x[0] * (-t * x[4]).exp() + waves.sum(0))


def watson(n: int) -> Callable[[Tensor], Tensor]:
    t = (count(1, 29) / 29)[:, None]
    j = count(1, n)
    power = t ** (j - 1)
    slope = (j - 1) * t ** (j - 2).clamp(min=0)

    def residual(x: Tensor) -> Tensor:
        return torch.cat([slope @ x - (power @ x) ** 2 - 1, x[:1], x[1:2] - x[:1] ** 2 - 1])

    return residual


def problems() -> list[Problem]:
    small = [
        least("rosenbrock", rosenbrock, vector(-1.2, 1)),
        least("freudenstein-roth", freudenstein_roth, vector(0.5, -2), (0.0, 48.98425367924)),
        least("powell-badly-scaled", powell_badly_scaled, vector(0, 1)),
        least("brown-badly-scaled", brown_badly_scaled, vector(1, 1)),
        least("beale", beale, vector(1, 1)),
        least("jennrich-sampson", jennrich_sampson, vector(0.3, 0.4), (124.3621823556,)),
        least("helical-valley", helical_valley, vector(-1, 0, 0)),
        least("bard", bard, vector(1, 1, 1), (8.214877306579e-3, 17.4286933333)),  # the second at infinity
        least("gaussian", gaussian, vector(0.4, 1, 0), (1.127932769619e-8,)),
        least("meyer", meyer, vector(0.02, 4000, 250), (87.9458551706,)),
        least("gulf", gulf, vector(5, 2.5, 0.15)),
        least("box3", box3, vector(0, 10, 20)),
        least("powell-singular", powell_singular, vector(3, -1, 0, 1), (0.0,), "degenerate"),
        least("wood", wood, vector(-3, -1, -3, -1)),
        least("kowalik-osborne", kowalik_osborne, vector(0.25, 0.39, 0.415, 0.39), (3.075056038492e-4,)),
        least("brown-dennis", brown_dennis, vector(25, 5, -5, -1), (85822.20162636,)),
        least("osborne-1", osborne_1, vector(0.5, 1.5, -1, 0.01, 0.02), (5.464894697483e-5,)),
        least("biggs-exp6", biggs_exp6, vector(1, 2, 1, 1, 1, 1), (0.0, 5.6556499255e-3)),
        least("osborne-2", osborne_2, vector(1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), (4.013773629355e-2,)),
    ]
    values = {6: 2.287670053552e-3, 9: 1.399760138e-6, 12: 4.7223812e-10}
    small += [least(f"watson-{n}", watson(n), torch.zeros(n, dtype=torch.float64), (values[n],)) for n in values]
    return small + classic_sized.problems()
