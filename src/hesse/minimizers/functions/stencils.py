"""One derivative along one variable: formulas of values on a line, and the search for the step that suits them.

A formula has two errors that pull its step in opposite ways: the noise of the values over the step, and the next
derivative, which the formula leaves out. A test difference of just that derivative, from the same values, tells the
second; the step is doubled or halved until it is about its own noise. The forward difference with sqrt(eps) and
the central one with eps^(1/3) are what comes out for a function of scale one with rounding for noise.

Steps are powers of two, so that x + h is exact and every value serves the next step too.

References:
    Gill, Murray, Saunders and Wright, Computing forward-difference intervals, SIAM J. Sci. Stat. Comput. 4 (1983).
    Shi, Xie, Xuan and Nocedal, Adaptive finite-difference interval estimation for noisy derivative-free optimization,
    SIAM J. Sci. Comput. 44 (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hesse.minimizers.functions.noise import EPS, Bounds, room, scales

__all__ = ["BEND", "BENDS", "SLOPES", "Line", "Reading", "Stencil", "along"]

# Of the test difference over its noise. At best it is 1, but pure noise reaches that too; halving h divides it by 8.
BALANCED = (1.2, 10.0)
# The part of the derivative below which noise needs no wider step, and above which a balance may be a chance of it.
FINE, ROUGH = (1e-9, 1e-6), 1e-7
ROUNDS = 14  # steps tried for one variable


class Stencil(NamedTuple):
    """Weights of the value at 0 and at ``offsets`` times h: of the derivative (all points), and of the test difference,
    which ``share`` turns into the error of the plain formula."""

    offsets: tuple[float, ...]
    value: tuple[float, ...]
    test: tuple[float, ...]
    share: float
    amplify: float  # of the noise, by the plain formula


def _mirrored(s: Stencil, order: int) -> Stencil:
    turned = tuple((-1) ** order * w for w in s.value)
    return s._replace(offsets=tuple(-a for a in s.offsets), value=turned)


# The derivative weights use every point and are one order better than the error that is stated.
SLOPE = Stencil((1, -1, 2, -2), (0, 8 / 12, -8 / 12, -1 / 12, 1 / 12), (0, -2, 2, 1, -1), 1 / 12, 1.0)
SLOPE_UP = Stencil((1, 2, 3), (-11 / 6, 3, -3 / 2, 1 / 3), (-1, 3, -3, 1), 1 / 3, 4.0)
BEND = Stencil((1, -1, 2, -2), (-30 / 12, 16 / 12, 16 / 12, -1 / 12, -1 / 12), (6, -4, -4, 1, 1), 1 / 12, 4.0)
BEND_UP = Stencil((1, 2, 3, 4), (35 / 12, -104 / 12, 114 / 12, -56 / 12, 11 / 12), (1, -4, 6, -4, 1), 11 / 12, 12.0)
SLOPES = (SLOPE, SLOPE_UP, _mirrored(SLOPE_UP, 1))
BENDS = (BEND, BEND_UP, _mirrored(BEND_UP, 2))


class Reading(NamedTuple):
    """One variable, one step: the derivative [m], its error [m], and what the values around tell."""

    value: Tensor
    error: Tensor
    width: float
    ratio: float
    visible: bool
    slope: float
    bend: float
    third: float


class Line:
    """The values on the line through x along variable i, each evaluated once."""

    def __init__(self, values: Callable[[Tensor], Tensor], x: Tensor, centre: Tensor, i: int) -> None:
        self.values, self.x, self.i = values, x, i
        self.known = {0.0: centre}

    def __call__(self, t: float) -> Tensor:
        if t not in self.known:
            y = self.x.clone()
            y[self.i] += t
            self.known[t] = self.values(y)
        return self.known[t]


def along(
    line: Line,
    x: Tensor,
    level: Tensor,
    bounds: Bounds | None,
    stencils: tuple[Stencil, Stencil, Stencil],
    start: float,
) -> tuple[Reading, Stencil]:
    """The derivative along one variable at the step that balances: central, or else on the side that has values."""
    scale = float(scales(x)[line.i])
    up, down = room(x, bounds, line.i)
    blank = line(0.0) * 0
    if max(up, down) <= 0:
        return Reading(blank, blank, 0.0, 0.0, False, 0.0, 0.0, 0.0), stencils[0]
    for stencil, free in zip(stencils, (min(up, down), up, down), strict=True):
        # Nearer to a bound than a small part of the usual step, the other side is better than so short a step.
        if free < start * scale / 2**8 and free < max(up, down):
            continue
        found = _search(line, level, stencil, scale, start, free)
        if found is not None:
            return found, stencil
    return Reading(blank * math.nan, blank + math.inf, 0.0, 0.0, False, 0.0, 0.0, 0.0), stencils[0]


def _search(line: Line, level: Tensor, stencil: Stencil, scale: float, start: float, free: float) -> Reading | None:
    """Double and halve the step until the test difference is about its noise; the reading of least error."""
    reach = max(abs(a) for a in stencil.offsets)
    order = 1 if stencil in SLOPES else 2
    widest = math.floor(math.log2(free / reach)) if math.isfinite(free) else 1000
    k = min(round(math.log2(start * scale)), widest)
    known = abs(float(line.x[line.i])) > 1e-8  # what is nearer to zero may be a rounding of it, and tells no scale
    low, high, best, lost = -1000, widest + 1, None, 0
    for _ in range(ROUNDS):
        reading = _read(line, level, stencil, 2.0**k, order)
        if reading is None:
            lost, high = lost + 1, k
            if best is None and lost == 3:
                return None
            jump = -5
        else:
            if best is None or float(reading.error.norm()) < float(best.error.norm()):
                best = reading
            fuzz = stencil.amplify * float(level.norm()) / reading.width**order
            # What a function of this curvature or slope would have for a derivative, were it not zero by chance.
            other, steps = (reading.bend, 2) if order == 1 else (reading.slope, 1)
            sure = other * reading.width**steps > 10 * float(level.norm())
            size = float(reading.value.norm()) + (other * scale ** (steps - order) if sure else 0.0)
            low_ratio = reading.ratio < BALANCED[0]
            coarse = fuzz > (FINE[order - 1] if low_ratio else ROUGH) * size
            if reading.ratio > BALANCED[1]:
                high, jump = k, -max(1, math.floor(math.log2(reading.ratio) / (order + 2)))
            elif coarse:
                low, jump = k, (2 if known and fuzz < 1e-6 * size else 4) if reading.visible else 10 if known else 20
                if 2.0**k >= ((1 if reading.visible else 8) * scale if known else 1e12):
                    break
            else:
                break
        if high - low <= 1:
            break
        k = k + jump if low < k + jump < high else (low + high) // 2 if low > -1000 and high < 1000 else k
        if k in (low, high):
            break
    return best


def _read(line: Line, level: Tensor, stencil: Stencil, h: float, order: int) -> Reading | None:
    values = [line(0.0)]
    for a in stencil.offsets:
        values.append(line(a * h))
        if not bool(values[-1].isfinite().all()):
            return None
    rows = torch.stack(values)
    floor = torch.maximum(level, EPS / 2 * rows.abs().amax(0))
    test = (rows.new_tensor(stencil.test) @ rows).abs()
    total = float(floor.norm())
    ratio = float(test.norm()) / (sum(map(abs, stencil.test)) * total) if total > 0 else 0.0
    spread = float((rows - rows[0]).norm(dim=1).max())
    error = (stencil.share * test + stencil.amplify * floor) / h**order
    value = rows.new_tensor(stencil.value) @ rows / h**order
    near = stencil.offsets[0]
    slope = float((rows[1] - rows[0]).norm()) / h
    second = rows[1] + rows[2] - 2 * rows[0] if stencil.offsets[1] == -near else rows[2] - 2 * rows[1] + rows[0]
    bend = max(float(second.norm()), 4 * total) / h**2
    third = 6 * stencil.share * float(test.norm()) / h**3 if order == 1 else 0.0
    return Reading(value, error, h, ratio, spread > 4 * total, slope, bend, third)
