"""Derivatives along a direction from differences, with the error they carry: slow, noisy, and independent of autograd.

Central differences of a function at ``x + h v`` and ``x - h v``, once with h and once with h / 2. Their combination
``(4 D(h/2) - D(h)) / 3`` is exact to fourth order (Richardson), and the distance of the two says how far to trust it.
The step is a fraction of the point's length over the vector's, never a constant: with a fixed step a product with a
long vector leaves the neighbourhood in which the function is smooth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hesse import tree
from hesse.tree import Params

__all__ = ["directional", "step_for"]


def step_for(point: Mapping[str, Tensor], v: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """The step h at which truncation and rounding of a central difference balance: ``eps^(1/5) (1 + |x|) / |v|``, short
    of the length of x. The exponent is that of the extrapolated formula.
    """
    length = float(tree.dot(v, v)) ** 0.5
    if length == 0:
        return 1.0
    moving = {name: point[name].detach() for name in v}
    size = float(tree.dot(moving, moving)) ** 0.5
    return 0.1 * torch.finfo(dtype).eps ** 0.2 * max(size, 1e-3) / length


def directional(f: Callable[[float], Params], h: float) -> tuple[Params, float]:
    """The derivative of ``f(t)`` at t = 0 and the estimated relative error of it.

    Args:
        f: from a distance t along the direction to named tensors.
        h: the step.

    Example:
        The derivative of t^3 + 2t at 0 is 2; the cubic term is what extrapolation removes:

        >>> value, error = directional(lambda t: {"y": torch.tensor([t**3 + 2 * t], dtype=torch.float64)}, 0.1)
        >>> round(value["y"].item(), 12), error < 0.01
        (2.0, True)
    """
    coarse, fine = (_central(f, step) for step in (h, h / 2))
    value = tree.add((4 / 3, fine), (-1 / 3, coarse))
    difference = tree.add((1.0, fine), (-1.0, coarse))
    length = float(tree.dot(value, value)) ** 0.5
    return value, float(tree.dot(difference, difference)) ** 0.5 / length if length > 0 else 0.0


def _central(f: Callable[[float], Params], h: float) -> Params:
    return tree.scale(1 / (2 * h), tree.add((1.0, f(h)), (-1.0, f(-h))))
