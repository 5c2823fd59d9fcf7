"""What differences of a function can say about its slope, and how far they can be trusted.

A difference of two values is a slope plus three errors: the curvature of the function (truncation), the
rounding of the values, and the kinks of ReLU, abs and max that lie between the two points. Each is
estimated from the values themselves, and the sum is the limit to which a gradient is held; there is no
constant tolerance. Central differences, Richardson's comparison of two steps and the one-sided bracket at a
kink are the three pieces.

The function may be a sum of many elements (the outputs of a layer, weighted): kinks of different elements
then cannot cancel, because each element is bracketed by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["BLUNT", "Probe", "Slope", "own_scales"]

# Relative steps tried in turn, in units of eps^(1/3), where truncation and rounding of a central difference
# balance for a function whose derivatives are of its own size. Stiff or kinked functions want less, noisy
# ones more.
LADDER = (1.0, 1 / 8, 4.0, 1 / 64)
SHARP = 0.02  # a limit below this part of the slope decides the matter at the first step
BLUNT = 0.25  # a limit above this part of the slope tells too little


@dataclass(frozen=True, slots=True)
class Slope:
    """The slope along one direction, twice.

    Args:
        analytic: the gradient times the direction.
        numeric: the central difference.
        limit: how far the two may differ for reasons that are not a fault; infinite when no value was finite.
        step: the relative step of the difference.
    """

    analytic: float
    numeric: float
    limit: float
    step: float

    @property
    def wrong(self) -> bool:
        """Whether the two differ by more than they may."""
        return abs(self.analytic - self.numeric) > self.limit

    @property
    def error(self) -> float:
        """The difference between the two, relative to the larger."""
        return self._relative(abs(self.analytic - self.numeric))

    @property
    def noise(self) -> float:
        """The limit, relative to the larger of the two: how blunt the comparison is."""
        return self._relative(self.limit)

    def _relative(self, amount: float) -> float:
        size = max(abs(self.analytic), abs(self.numeric))
        return amount / size if size else math.inf if amount else 0.0


def own_scales(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Typical size of each tensor's elements: the unit in which it is moved.

    That is its root mean square, but at least a thousandth of its largest sibling's (a bias that has just
    left zero), and the sibling's own for a tensor of zeros; siblings share the name up to the last dot.
    Where all siblings are zero, the median of the others stands in, or 1.

    Example:
        >>> own_scales({"a.weight": torch.full((2,), 4.0), "a.bias": torch.zeros(2)})
        {'a.weight': 4.0, 'a.bias': 4.0}
    """
    sizes = {name: _root_mean_square(t.detach()) for name, t in tensors.items()}
    largest: dict[str, float] = {}
    for name, size in sizes.items():
        home = name.rpartition(".")[0]
        largest[home] = max(size, largest.get(home, 0.0))
    positive = sorted(size for size in sizes.values() if size > 0)
    middle = positive[len(positive) // 2] if positive else 1.0
    scales = {}
    for name, size in sizes.items():
        sibling = largest[name.rpartition(".")[0]] or middle
        scales[name] = max(size, 1e-3 * sibling) if size > 0 else sibling
    return scales


class Probe:
    """A function that can be looked at around a point by moving tensors in place; they are put back bit for
    bit.

    Args:
        evaluate: returns a float64 vector; the function is its sum. Reads ``tensors``.
        tensors: what is moved.
        scales: the unit of each tensor's moves.
        eps: rounding unit of the coarsest number format in the computation.
        generator: where random directions come from.
    """

    def __init__(
        self,
        evaluate: Callable[[], Tensor],
        tensors: Sequence[Tensor],
        scales: Sequence[float],
        eps: float,
        generator: torch.Generator,
    ) -> None:
        self.evaluate = evaluate
        self.tensors = list(tensors)
        self.scales = list(scales)
        self.eps = eps
        self.generator = generator
        self.base = [t.detach().clone() for t in tensors]
        self.centre = evaluate()
        self.rounding, self.total_rounding = self._rounding()

    def restore(self) -> None:
        """Put every tensor back, bit for bit."""
        with torch.no_grad():
            for tensor, base in zip(self.tensors, self.base, strict=True):
                tensor.copy_(base)

    def random_direction(self) -> list[Tensor]:
        """Random signs times each tensor's scale: no element stands still, none moves further."""
        return [self._signs(t.shape).to(t) * scale for t, scale in zip(self.base, self.scales, strict=True)]

    def scaling_direction(self) -> list[Tensor]:
        """Each tensor stretched or shrunk as a whole, by the same part; one of zeros gets random signs.

        Random signs cancel: among n numbers they leave a slope sqrt(n) times smaller than a move that means
        something to the function, which float32 cannot see in a large model. Stretching means something,
        and needs no gradient to be believed first.
        """
        stretched = []
        for base, scale in zip(self.base, self.scales, strict=True):
            zero = not bool(base.any())
            stretched.append(scale * self._signs(base.shape).to(base) if zero else self._signs(()).to(base) * base)
        return stretched

    def _signs(self, shape: Sequence[int]) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.generator, dtype=torch.int8) * 2 - 1

    def aligned_direction(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradient's signs times each tensor's scale: where a slope stands out most clearly."""
        return [grad.sign() * scale for grad, scale in zip(grads, self.scales, strict=True)]

    def slopes(self, grads: Sequence[Tensor]) -> list[Slope]:
        """The slopes along the gradient, along a stretch and along random signs."""
        # Random signs see what the others may miss in a small model, and little in a large one at any step.
        return [
            self.slope(grads, self.aligned_direction(grads)),
            self.slope(grads, self.scaling_direction()),
            self.slope(grads, self.random_direction(), tries=2),
        ]

    def slope(self, grads: Sequence[Tensor], direction: Sequence[Tensor], tries: int = len(LADDER)) -> Slope:
        """The slope along ``direction`` at the step whose own error estimate is the smallest.

        The first step ends the search when it agrees and is sharp, the second when it agrees and is not
        blunt; a fault is looked at with all steps, ``tries`` at most.
        """
        tried: list[Slope] = []
        for factor in LADDER[:tries]:
            tried.append(self._measure(grads, direction, factor * self.eps ** (1 / 3)))
            tried.sort(key=lambda s: s.limit)
            if not tried[0].wrong and tried[0].noise <= (SHARP if len(tried) == 1 else BLUNT):
                return tried[0]
        best, second = tried[:2]
        # Kinks may cancel in one estimate of the error by chance, hardly in the values at two steps.
        return replace(best, limit=max(best.limit, 2 * abs(best.numeric - second.numeric)))

    def _measure(self, grads: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Slope:
        half = step / 2
        far_up, far_down = self.at(direction, step), self.at(direction, -step)
        up, ahead = self.at(direction, half), self._along(grads)
        down, behind = self.at(direction, -half), self._along(grads)
        self.restore()
        near = (up - down) / step
        far = (far_up - far_down) / (2 * step)
        # One-sided slopes differ by h f'' where f is smooth and by the jump where it is kinked; extrapolating
        # to h = 0 leaves the jump. A kink at distance x h from the centre shows J(1 - 3x) here and J x / 2
        # in near - far, and misleads `near` by at most J(1/2 - x): three times the one plus half the other
        # covers it for every x.
        jump = 2 * (up + down - 2 * self.centre) / half - (far_up + far_down - 2 * self.centre) / step
        fuzz = 2 * self.rounding / half
        bend = 3 * ((near - far).abs() - fuzz).clamp_min(0).sum()
        kink = (jump.abs() / 2 - fuzz).clamp_min(0).sum()
        # The gradient is rounded too; that matters in half precision only.
        pairs = zip(grads, direction, strict=True)
        own = sum(float(torch.sum((g * v).abs(), dtype=torch.float64)) for g, v in pairs)
        limit = float(bend + kink) + 4 * self.total_rounding / half + 4 * self.eps * own
        analytic, numeric = (ahead - behind) / step, float(near.sum())
        finite = math.isfinite(limit) and math.isfinite(numeric)
        return Slope(analytic, numeric if finite else 0.0, limit if finite else math.inf, half)

    def at(self, direction: Sequence[Tensor], length: float) -> Tensor:
        """The function at ``base + length * direction``."""
        with torch.no_grad():
            for tensor, base, v in zip(self.tensors, self.base, direction, strict=True):
                tensor.copy_(base + length * v)
        return self.evaluate()

    def _along(self, grads: Sequence[Tensor]) -> float:
        """The gradient times the move as rounded; differences of near numbers are exact."""
        with torch.no_grad():
            moves = zip(self.tensors, self.base, grads, strict=True)
            return sum(float(torch.sum((t - base) * grad, dtype=torch.float64)) for t, base, grad in moves)

    def _rounding(self) -> tuple[Tensor, float]:
        """Rounding error of each element and of the sum: their change when all last digits change."""
        worst = self.eps * self.centre.abs()
        total = float(worst.square().sum().sqrt())
        for _ in range(3):
            with torch.no_grad():
                signs = self.random_direction()
                for tensor, base, sign, scale in zip(self.tensors, self.base, signs, self.scales, strict=True):
                    tensor.copy_(base + self.eps * sign.sign() * base.abs().clamp_min(scale))
            change = self.evaluate() - self.centre
            worst = torch.maximum(worst, change.abs())
            total = max(total, abs(float(change.sum())))
        self.restore()
        return worst, max(total, float(worst.square().sum().sqrt()))


def _root_mean_square(t: Tensor) -> float:
    t = torch.view_as_real(t) if t.is_complex() else t
    return float(t.to(torch.promote_types(t.dtype, torch.float32)).square().mean().sqrt())
