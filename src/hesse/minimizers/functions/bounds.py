"""Bounds as users write them: a pair, SciPy's ``Bounds``, or its list of pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesse.minimizers.functions.border import Border

__all__ = ["bounds_of", "landed", "project"]


def bounds_of(bounds: Any, border: Border) -> tuple[Tensor, Tensor] | None:
    """The least and the largest x [n], infinite where there is none; None without bounds.

    Args:
        bounds: ``(low, high)``, each a number, None or shaped as x; an object with ``lb`` and ``ub``; or a list with a
            pair for every element of x.
        border: the user's kind of x.

    Raises:
        TypeError: none of these.
        ValueError: another shape, NaN, or a lower bound above the upper.

    Example:
        >>> from hesse.minimizers.functions.border import border_of
        >>> bounds_of((0.0, None), border_of(torch.zeros(2)))
        (tensor([0., 0.]), tensor([inf, inf]))
    """
    if bounds is None:
        return None
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        low, high = bounds.lb, bounds.ub
    elif isinstance(bounds, tuple) and len(bounds) == 2:
        low, high = bounds
    elif getattr(bounds, "shape", None) == (border.x0.numel(), 2):
        low, high = bounds[:, 0], bounds[:, 1]
    elif isinstance(bounds, list) and len(bounds) == border.x0.numel() and all(len(pair) == 2 for pair in bounds):
        low = torch.tensor([-math.inf if a is None else a for a, _ in bounds], dtype=torch.float64)
        high = torch.tensor([math.inf if b is None else b for _, b in bounds], dtype=torch.float64)
    else:
        raise TypeError(
            "bounds must be a tuple (low, high), each a number, None or shaped as x0; or a list or array of one pair "
            f"for each of the {border.x0.numel()} elements of x0; got {bounds!r}."
        )
    found = _side(low, -math.inf, "the lower bound", border), _side(high, math.inf, "the upper bound", border)
    crossed = ~(found[0] <= found[1])
    if bool(crossed.any()):
        i = int(crossed.nonzero()[0])
        raise ValueError(
            f"bounds are crossed at element {i} of x0: from {float(found[0][i]):g} to {float(found[1][i]):g}. "
            "The tuple is (low, high)."
        )
    return found


def _side(value: Any, missing: float, name: str, border: Border) -> Tensor:
    x0 = border.x0
    if value is None:
        return torch.full_like(x0, missing)
    if isinstance(value, int | float) or getattr(value, "ndim", 1) == 0 or getattr(value, "shape", None) == (1,):
        return torch.full_like(x0, float(np.asarray(value).reshape(())))  # SciPy's Bounds(0, 1) makes arrays of one
    return border.inside(value, name)


def project(x: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    """The nearest x within bounds."""
    return x if bounds is None else torch.minimum(torch.maximum(x, bounds[0]), bounds[1])


def landed(x: Tensor, s: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    """``x + s`` [n] within bounds, and exactly on one that is a rounding away: only there does an element rest."""
    y = x + s
    if bounds is None:
        return y
    room = 2 * torch.finfo(x.dtype).eps
    for end in bounds:
        near = (y - end).abs() <= room * torch.maximum(x.abs(), end.abs())
        y = torch.where(near & end.isfinite(), end, y)
    return project(y, bounds)
