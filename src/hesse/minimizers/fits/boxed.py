"""A fit's model between bounds: the face of the box that x lies on first, the box itself where the face is left.

Most steps of a bounded fit stay on the face they start from: elements at a bound that the gradient pushes against stay
there, the others take the step of the model on their own, which for residuals is taken from J itself. Where that step
leaves the box, the quadratic is minimised within box and region at once (see :mod:`hesse.minimizers.models.composite`),
and the better of that and of the step cut off at the bounds is taken; the former alone makes it converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hesse.minimizers.descents.proximal import Full
from hesse.minimizers.fits.linearised import Curved, Linear
from hesse.minimizers.models.composite import Kinks, least
from hesse.minimizers.models.dense import Step

__all__ = ["Boxed"]

# Of the largest gradient of the model that its least value within the box may leave.
EXACT = 1e-10


class Boxed:
    """A model that keeps x between bounds.

    Args:
        face: the model of some elements of x alone, by their indices.
        H: [n, n].
        g: [n].
        x: [n], between the bounds.
        scale: [n], the diagonal of D.
        bounds: least and largest x, [n] each.

    Example:
        >>> A, f = torch.eye(2, dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> one = torch.ones(2, dtype=torch.float64)
        >>> model = Boxed(lambda i: Linear(A[:, i], f, one[i]), A, f, 0 * one, one, (-2 * one, 9 * one))
        >>> model.within(9.0).s  # -3 is too far
        tensor([-2., -1.], dtype=torch.float64)
    """

    natural = True

    def __init__(
        self,
        face: Callable[[Tensor], Linear | Curved],
        H: Tensor,
        g: Tensor,
        x: Tensor,
        scale: Tensor,
        bounds: tuple[Tensor, Tensor],
    ) -> None:
        self.H, self.g, self.x, self.scale, self.dtype = H.double(), g.double(), x.double(), scale.double(), g.dtype
        self.low, self.high = bounds[0].double(), bounds[1].double()
        stuck = ((self.x <= self.low) & (self.g >= 0)) | ((self.x >= self.high) & (self.g <= 0))
        self.free = (~stuck).nonzero()[:, 0]
        self.face = face(self.free) if len(self.free) else None
        self.lowest = self.face.lowest if self.face is not None else 0.0
        self.length = self.face.length if self.face is not None else 0.0
        step = self._best(math.inf) if self.lowest >= 0 else None
        self.predicted = math.inf if step is None else step.predicted

    @property
    def whole(self) -> Tensor:
        """The step to the least value in the box."""
        return self._best(math.inf).s

    def within(self, radius: float) -> Step:
        return self._best(radius)

    def cubed(self, sigma: float) -> Step:
        if self.face is None:
            return self._step(torch.zeros_like(self.x))
        return self._step(self._cut(self.face.cubed(sigma).s.double())[0])

    def gain(self, s: Tensor) -> float:
        """Decrease of the model by the step ``s``."""
        return -float(s.double() @ (self.g + 0.5 * (self.H @ s.double())))

    def _best(self, radius: float) -> Step:
        if self.face is None:
            return self._step(torch.zeros_like(self.x))
        step = self.face.within(radius)
        s, inside = self._cut(step.s.double())
        if inside:
            return step._replace(s=s.to(self.dtype))
        reach = radius / self.scale
        kinks = Kinks(0.0, torch.maximum(self.low, self.x - reach), torch.minimum(self.high, self.x + reach))
        place = least(Full(self.H), self.g, self.x, kinks, EXACT)
        return max(self._step(s), self._step(place.z - self.x), key=lambda step: step.predicted)

    def _cut(self, s: Tensor) -> tuple[Tensor, bool]:
        """The face's step in all elements, cut off at the bounds, and whether it needed no cutting."""
        whole = torch.zeros_like(self.x)
        whole[self.free] = s
        end = self.x + whole
        inside = bool(((end >= self.low) & (end <= self.high)).all())
        return whole if inside else torch.minimum(torch.maximum(end, self.low), self.high) - self.x, inside

    def _step(self, s: Tensor) -> Step:
        return Step(s.to(self.dtype), self.gain(s), float((self.scale * s).norm()))
