"""How noisy a function is, found from a few of its values; and how far to move a variable whose scale nobody told.

Smooth functions vanish from differences of high order of near values, noise does not: divided by what pure noise would
make of itself, differences of successive orders settle at its level (Hamming's table; ECnoise). Rounding is the usual
noise, an iteration inside the function that stops early is another. Whatever a method calls equal should be equal to
this level, and no change below it says anything.

References:
    Moré and Wild, Estimating computational noise, SIAM J. Sci. Comput. 33 (2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["EPS", "Bounds", "noise", "noise_of", "power_of_two", "probe", "room", "scales"]

Bounds = tuple[Tensor, Tensor]

EPS = torch.finfo(torch.float64).eps
POINTS = 7  # values in a table of differences


def noise(f: Callable[[Tensor], float], x: Tensor, direction: Tensor) -> float:
    """The noise level of f near x: the standard deviation of what is not smooth in its values along ``direction``.

    Seven values at equal, tiny distances; smooth functions vanish from their differences of third and higher order,
    noise does not. The spacing adapts. Rounding alone gives a few eps |f|; a change of f below the level says nothing.

    Args:
        f: from a float64 vector [n] to a number.
        x: [n].
        direction: [n], only its direction counts.

    References:
        Moré and Wild, Estimating computational noise, 2011, algorithm ECnoise.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> def f(x):
        ...     return float(x @ x + 1e-6 * torch.randn((), generator=generator, dtype=torch.float64))
        >>> 3e-7 < noise(f, torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)) < 3e-6
        True
    """

    def values(y: Tensor) -> Tensor:
        return torch.tensor([f(y)], dtype=torch.float64)

    longest = float((direction / scales(x)).abs().max()) if x.numel() else 0.0
    if longest == 0 or not math.isfinite(longest):
        return EPS * abs(f(x))
    return float(noise_of(values, x, values(x), direction * (2.0**-23 / longest)))


def scales(x: Tensor) -> Tensor:
    """The unit in which each variable is moved at first: its size, or a part of the others' where it is near zero."""
    size = x.abs()
    typical = float(size.square().mean().sqrt()) if x.numel() else 0.0
    return torch.where(size > 0, size.clamp_min(1e-3 * typical), typical if typical > 0 else 1.0).clamp_min(1e-150)


def power_of_two(h: float) -> float:
    return 2.0 ** round(math.log2(h)) if h > 1e-290 else 2.0**-960


def room(x: Tensor, bounds: Bounds | None, i: int) -> tuple[float, float]:
    """How far variable i may go up and down."""
    if bounds is None:
        return math.inf, math.inf
    lo, hi = bounds
    return max(0.0, float(hi[i] - x[i])), max(0.0, float(x[i] - lo[i]))


def probe(x: Tensor, bounds: Bounds | None) -> Tensor:
    """A move of all variables, by 1e-7 of their scales, into the bounds; powers of two, so that points are exact."""
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    move = torch.exp2((scales(x) * 2.0**-23).log2().round()) * signs
    if bounds is not None:
        lo, hi = bounds
        up, down = hi - x, x - lo
        move = torch.where(move.abs() * POINTS > torch.where(move > 0, up, down), -move, move)
        move = torch.where(move.abs() * POINTS > torch.where(move > 0, up, down), 0.0, move)
    return move


def noise_of(values: Callable[[Tensor], Tensor], x: Tensor, centre: Tensor, move: Tensor) -> Tensor:
    """The noise [m] of each value at ``x``, from values at ``x + t * move``, t = 1 ... 6.

    Args:
        values: from [n] to [m].
        x: [n].
        centre: [m], the values at ``x``.
        move: [n], see :func:`probe`.
    """
    level, floor = _table(values, x, centre, move)
    # A wave sampled once in many periods looks like noise. Where the scale of x is a guess, more than rounding has to
    # show at a much smaller distance too.
    if bool(((x == 0) & (move != 0)).any()) and bool((level > 1e3 * floor).any()):
        level = torch.minimum(level, _table(values, x, centre, move * 2.0**-16)[0])
    return level


def _table(values: Callable[[Tensor], Tensor], x: Tensor, centre: Tensor, move: Tensor) -> tuple[Tensor, Tensor]:
    """The noise by one table of differences whose spacing adapts, and the rounding of the values, its least."""
    floor = EPS / 2 * centre.abs()
    if not bool(move.any()):
        return floor, floor
    level, settled = torch.full_like(centre, math.inf), torch.zeros_like(centre, dtype=torch.bool)
    for _ in range(4):
        rows = torch.stack([centre, *(values(x + t * move) for t in range(1, POINTS))])
        if not bool(rows.isfinite().all()):
            move = -move / 2**6
            continue
        now, flat, agree = _levels(rows)
        # Far values may be large beyond measure: each table has its own rounding.
        now = torch.maximum(now, EPS / 2 * rows.abs().amax(0))
        level = torch.where(settled, level, torch.where(agree, now, torch.minimum(level, now)))
        settled |= agree
        if bool(settled.all()):
            break
        # Too near to differ, or too far for the function to look smooth?
        near = int((flat & ~settled).sum())
        move = move * (2.0**8 if 2 * near > int((~settled).sum()) else 2.0**-8)
    return torch.where(level.isfinite(), torch.maximum(level, floor), floor), floor


def _levels(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each column of [POINTS, m]: the noise, whether the points are too near to differ, whether orders agree."""
    column, sigmas, turns = rows, [], []
    flat = (rows[1:] == rows[:-1]).sum(0) > POINTS // 2
    for k in range(1, POINTS):
        column = column[1:] - column[:-1]
        gamma = math.factorial(k) ** 2 / math.factorial(2 * k)
        sigmas.append((gamma * column.square().mean(0)).sqrt())
        turns.append((column.amin(0) < 0) & (column.amax(0) > 0))
    s = torch.stack(sigmas)
    level, agree = s[2:].amin(0), torch.zeros_like(flat)
    for k in range(len(sigmas) - 2):
        three = s[k : k + 3]
        good = (three.amax(0) <= 4 * three.amin(0)) & turns[k] & ~flat & ~agree
        level = torch.where(good, s[k], level)
        agree |= good
    return level, flat, agree
