"""Derivatives of a function of which only values are known: differences whose steps are found, not assumed.

One routine does a vector of m values: a gradient is the case m = 1, the Jacobian of residuals any m, and a Hessian
from a given gradient m = n. What was found at one point (noise, steps, size of the neglected terms) is a value that
is handed on to the next point, where one or two evaluations a variable are then enough instead of four.
How a step is found: ``hesse.minimizers.functions.stencils``; the noise: ``hesse.minimizers.functions.noise``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.minimizers.functions.noise import EPS, Bounds, noise, noise_of, power_of_two, probe, room, scales
from hesse.minimizers.functions.stencils import BEND, BENDS, SLOPES, Line, Reading, Stencil, along

__all__ = ["Bounds", "Memory", "gradient", "hessian", "hessian_of", "jacobian", "noise", "product"]

QUICK = 1e-5  # a forward difference is taken while its error is below this part of the slope


@dataclass(frozen=True, slots=True)
class Memory:
    """What was found at one point and serves at the next.

    Args:
        noise: [m], the noise of each value.
        size: length of the values where the noise was measured.
        widths: [n], the balanced steps.
        slopes, bends, thirds: [n], length of the first, second and third derivative along each variable.
    """

    noise: Tensor
    size: float
    widths: Tensor
    slopes: Tensor
    bends: Tensor
    thirds: Tensor


def gradient(
    f: Callable[[Tensor], float], x: Tensor, fx: float, *, memory: Memory | None = None, bounds: Bounds | None = None
) -> tuple[Tensor, Tensor, Memory]:
    """The gradient [n] of f at x from its values, and how far each element may be off.

    Args:
        f: from a float64 vector [n] to a number; NaN and infinity are values that a step avoids.
        x: [n], float64.
        fx: ``f(x)``, finite.
        memory: what the last call returned: with it a variable costs one evaluation (forward) while that is exact to
            1e-5 of the slope, and two (central) near a stationary point; without it, four and a few for the noise.
        bounds: ``(lo, hi)``, each [n], which no evaluation leaves: differences turn one-sided there.

    Returns:
        The gradient, its error bounds [n], and the memory for the next call. An element is NaN with an infinite error
        where no step found finite values, and 0 where ``lo == hi``.

    Example:
        >>> x = torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> f = lambda x: float(torch.exp(x[0]) + 3 * x[1])
        >>> g, error, memory = gradient(f, x, f(x))
        >>> exact = torch.tensor([2.718281828459045, 3.0], dtype=torch.float64)
        >>> bool((g - exact).abs().max() < 1e-9), bool((error < 1e-7).all())
        (True, True)
    """

    def values(y: Tensor) -> Tensor:
        return torch.tensor([f(y)], dtype=torch.float64)

    centre = torch.tensor([fx], dtype=torch.float64)
    matrix, error, found = _matrix(values, x, centre, memory, bounds, quick=False)
    return matrix[0], error[0], found


def jacobian(
    residual: Callable[[Tensor], Tensor],
    x: Tensor,
    rx: Tensor,
    *,
    memory: Memory | None = None,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor, Memory]:
    """The Jacobian [m, n] of residuals [m]: as :func:`gradient`, but one evaluation a variable and one more from
    the first call on, where no element of x is zero and all changes are far above the noise and nearly straight.

    Example:
        >>> x = torch.tensor([2.0, 3.0], dtype=torch.float64)
        >>> r = lambda x: torch.stack([x[0] * x[1], x[0] ** 2])
        >>> J, error, memory = jacobian(r, x, r(x))
        >>> torch.allclose(J, torch.tensor([[3.0, 2.0], [4.0, 0.0]], dtype=torch.float64), atol=1e-6)
        True
    """
    return _matrix(residual, x, rx, memory, bounds, quick=True)


def hessian_of(
    grad: Callable[[Tensor], Tensor],
    x: Tensor,
    gx: Tensor,
    *,
    memory: Memory | None = None,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor, Memory]:
    """The Hessian [n, n] from differences of a given gradient, symmetrised: about n gradients.

    The error [n, n] is at least the asymmetry that was found.
    """
    H, error, memory = _matrix(grad, x, gx, memory, bounds, quick=True)
    return (H + H.T) / 2, torch.maximum((error + error.T) / 2, (H - H.T).abs() / 2), memory


def hessian(
    f: Callable[[Tensor], float],
    x: Tensor,
    fx: float,
    *,
    memory: Memory | None = None,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """The Hessian [n, n] from second differences of values, and an estimate of each element's error.

    About ``n^2 + 3 n`` evaluations: four a variable for the diagonal and its step, and two a pair,
    ``(f(+,+) + f(-,-) - f(+,0) - f(-,0) - f(0,+) - f(0,-) + 2 f) / (2 h k)``. Variables at a bound, or beside a region
    where f is not finite, take one-sided formulas of the same order. Elements without any finite values are NaN with an
    infinite error. ``memory`` is that of a gradient at or near x, and spares measuring the noise.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> f = lambda x: float(x[0] ** 2 * x[1])
        >>> H, error = hessian(f, x, f(x))
        >>> torch.allclose(H, torch.tensor([[4.0, 2.0], [2.0, 0.0]], dtype=torch.float64), atol=1e-6)
        True
    """

    def values(y: Tensor) -> Tensor:
        return torch.tensor([f(y)], dtype=torch.float64)

    n, centre = x.numel(), torch.tensor([fx], dtype=torch.float64)
    level, _ = _level(values, x, centre, memory, bounds)
    H, error = x.new_zeros(n, n), x.new_zeros(n, n)
    readings, lines = [], []
    for i in range(n):
        line = Line(values, x, centre, i)
        reading, stencil = along(line, x, level, bounds, BENDS, EPS**0.25)
        readings.append(reading)
        lines.append((line, stencil))
        H[i, i], error[i, i] = float(reading.value), float(reading.error)
    for i in range(n):
        for j in range(i):
            h, k = (_cross_width(readings[t], x, t) for t in (i, j))
            if h == 0 or k == 0:  # a fixed variable, or one without finite values
                value, off = (0.0, 0.0) if min(float(readings[t].error) for t in (i, j)) == 0 else (math.nan, math.inf)
            else:
                value = _cross(f, x, fx, (i, j), (h, k), (lines[i], lines[j]))
                off = 4 * float(level) / (h * k) + math.sqrt(float(readings[i].error) * float(readings[j].error))
            H[i, j] = H[j, i] = value
            error[i, j] = error[j, i] = off if math.isfinite(value) else math.inf
    return H, error


def product(
    grad: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, gx: Tensor, *, error: Tensor | None = None
) -> Tensor:
    """The Hessian times v [n] by one difference of a given gradient: one gradient where all is well.

    The step makes the move sqrt(eps) of x in length, both measured in the variables' own scales. It is widened while
    the gradient does not change visibly, and turned round or shortened where the gradient is not finite.

    Args:
        grad: from [n] to [n].
        x, v: [n].
        gx: ``grad(x)``.
        error: [n], how far elements of the gradient may be off, if it is itself made of differences
            (:func:`gradient` says so); by default their rounding.

    Raises:
        ArithmeticError: no step gave a finite gradient.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> x, v = torch.ones(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
        >>> torch.allclose(product(lambda x: A @ x, x, v, A @ x), A @ v, rtol=1e-6)
        True
    """
    length = float((v / scales(x)).norm())
    if length == 0 or not math.isfinite(length):
        return v * 0
    h = math.sqrt(EPS * max(1, x.numel())) / length
    floor = EPS * float(gx.norm()) + (0.0 if error is None else float(error.norm()))
    found = None
    for _ in range(6):
        for side in (h, -h):
            change = grad(x + side * v) - gx
            if bool(change.isfinite().all()):
                found = change / side
                break
        else:
            h /= 2**10
            if found is not None or h * length < 8 * EPS:
                break
            continue
        if float(change.norm()) > 1e3 * floor:
            break
        h *= 2**8
    if found is None:
        raise ArithmeticError(
            f"jac is not finite at any point near x along a direction of length {float(v.norm()):.3g}; "
            "differences of it need finite values on one side: pass hessp or hess, or start elsewhere."
        )
    return found


def _matrix(
    values: Callable[[Tensor], Tensor],
    x: Tensor,
    centre: Tensor,
    memory: Memory | None,
    bounds: Bounds | None,
    quick: bool,
) -> tuple[Tensor, Tensor, Memory]:
    n = x.numel()
    level, measured = _level(values, x, centre, memory, bounds)
    readings = _straight(values, x, centre, level, bounds) if quick and memory is None else None
    if readings is None:
        readings = []
        for i in range(n):
            line = Line(values, x, centre, i)
            reading = None if memory is None else _again(line, x, level, bounds, memory, i)
            if reading is None:
                start = EPS ** (1 / 3) if memory is None else float(memory.widths[i] / scales(x)[i])
                reading, _ = along(line, x, level, bounds, SLOPES, start or EPS ** (1 / 3))
            readings.append(reading)
    columns, errors = [r.value for r in readings], [r.error for r in readings]
    rows = [[r.width, float(r.value.norm()), r.bend, r.third] for r in readings]
    table = torch.tensor(rows, dtype=torch.float64).reshape(n, 4)
    found = Memory(level, measured, *table.T)
    empty = centre.new_zeros(centre.numel(), 0)
    return (torch.stack(columns, 1), torch.stack(errors, 1), found) if n else (empty, empty, found)


def _level(
    values: Callable[[Tensor], Tensor], x: Tensor, centre: Tensor, memory: Memory | None, bounds: Bounds | None
) -> tuple[Tensor, float]:
    """The noise, remembered or measured, and the length of the values where it was."""
    size = float(centre.norm())
    if memory is not None and 0.1 * memory.size <= size <= 10 * memory.size:
        return memory.noise, memory.size
    return noise_of(values, x, centre, probe(x, bounds)), size


def _straight(
    values: Callable[[Tensor], Tensor], x: Tensor, centre: Tensor, level: Tensor, bounds: Bounds | None
) -> list[Reading] | None:
    """Forward differences of all variables with sqrt(eps) of x, and one evaluation on the other side that tells how far
    the function is from straight; None unless x says its scale and all changes stand far above bend and noise."""
    moves, changes = torch.zeros_like(x), []
    for i, size in enumerate(x.abs().tolist()):
        moves[i] = h = power_of_two(math.sqrt(EPS) * size)
        if size == 0 or h > min(room(x, bounds, i)):
            return None
        changes.append(Line(values, x, centre, i)(h) - centre)
        if not bool(changes[-1].isfinite().all()):
            return None
    bent = (values(x - moves) - centre + torch.stack(changes).sum(0)).abs() if changes else centre * 0
    readings = []
    for h, size, change in zip(moves.tolist(), x.abs().tolist(), changes, strict=True):
        moved = change.abs() > 4 * level
        fuzz, fold = float(level[moved].norm()), float(bent[moved].norm())
        if not max(2 * fuzz, fold - 4 * fuzz) < QUICK * float(change.norm()):
            return None
        bend = max(fold, 4 * fuzz) / h**2
        wide = power_of_two(EPS ** (1 / 3) * size)
        error = (2 * level + bent / 2) / h
        readings.append(Reading(change / h, error, wide, 1.0, True, 0.0, bend, bend / size))
    return readings


def _again(line: Line, x: Tensor, level: Tensor, bounds: Bounds | None, memory: Memory, i: int) -> Reading | None:
    """One or two evaluations with the steps of the last point; None where they do not suit any more."""
    h, slope, bend, third = (float(t[i]) for t in (memory.widths, memory.slopes, memory.bends, memory.thirds))
    up, down = room(x, bounds, i)
    total = float(level.norm())
    if h <= 0 or not math.isfinite(slope) or h > max(up, down):
        return None
    expected = 2 * math.sqrt(total * bend)
    if bend > 0 and expected <= QUICK * slope:
        short = min(power_of_two(2 * math.sqrt(total / bend)), h)
        short = short if short <= up else -short
        change = line(short) - line(0.0)
        found = float(change.norm()) / abs(short)
        error = 2 * total / abs(short) + abs(short) * bend / 2
        # One value more says nothing of the curvature: it is taken for the old one where the slope still resembles it.
        if 0.1 * slope <= found <= 4 * slope and error <= 10 * QUICK * found:
            each = 2 * level / abs(short) + abs(short) * bend / 2
            return Reading(change / short, each, h, 1.0, True, found, bend, third)
    if h > min(up, down):
        return None
    ahead, behind = line(h), line(-h)
    now = float((ahead + behind - 2 * line(0.0)).norm()) / h**2
    fuzz = 4 * total / h**2
    # The third derivative is an old one; where the second has changed much, it is not believed.
    if not math.isfinite(now) or abs(now - bend) > 0.75 * max(now, bend) + fuzz:
        return None
    each = level / h + third * h**2 / 6
    return Reading((ahead - behind) / (2 * h), each, h, 1.0, True, slope, max(now, fuzz), third)


def _cross_width(reading: Reading, x: Tensor, i: int) -> float:
    """The diagonal's step; where nothing moved on that line it may have grown beyond what other lines bear."""
    return reading.width if reading.visible or reading.width == 0 else power_of_two(EPS**0.25 * float(scales(x)[i]))


def _cross(
    f: Callable[[Tensor], float],
    x: Tensor,
    fx: float,
    at: tuple[int, int],
    widths: tuple[float, float],
    lines: tuple[tuple[Line, Stencil], tuple[Line, Stencil]],
) -> float:
    """One mixed second derivative."""
    (i, j), (h, k), ((first, s), (second, t)) = at, widths, lines

    def corner(a: float, b: float) -> float:
        if a == 0 or b == 0:
            return float((first if b == 0 else second)(a * h if b == 0 else b * k))
        y = x.clone()
        y[i] += a * h
        y[j] += b * k
        return f(y)

    if s is BEND and t is BEND:
        ring = corner(1, 0) + corner(-1, 0) + corner(0, 1) + corner(0, -1) - 2 * fx
        for side in (1, -1):
            found = side * (corner(1, side) + corner(-1, -side) - ring) / (2 * h * k)
            if math.isfinite(found):
                return found
        return math.nan
    terms = [u * w * corner(a, b) for a, u in _slope_weights(s) for b, w in _slope_weights(t)]
    return sum(terms) / (h * k)


def _slope_weights(stencil: Stencil) -> tuple[tuple[float, float], ...]:
    """Offsets and weights of a first derivative of second order, on the side of the stencil."""
    if stencil is BEND:
        return ((1, 0.5), (-1, -0.5))
    side = stencil.offsets[0]
    return ((0, -1.5 * side), (side, 2.0 * side), (2 * side, -0.5 * side))
