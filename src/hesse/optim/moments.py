"""Adam's rule on lists of tensors: running moments of the gradient, and the step they make.

Shampoo and SOAP use it where a parameter has no matrix, SOAP also in the eigenbases of its factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["adam"]


def adam(
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: Sequence[int],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Adam's direction ``-m / (sqrt(v) + eps)`` with both moments corrected for their start at zero; updates them.

    Args:
        grads: any shapes.
        averages: m, shaped as the gradients, updated in place.
        squares: v, likewise.
        steps: of each, this one included.
        betas: of m and v.
        eps: added to the root of v.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015.

    Example:
        >>> m, v = torch.zeros(2), torch.zeros(2)
        >>> adam([torch.tensor([10.0, -0.1])], [m], [v], [1], (0.9, 0.99), 0.0)
        [tensor([-1.0000,  1.0000])]
    """
    if not grads:
        return []
    torch._foreach_lerp_(averages, grads, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])
    roots = torch._foreach_sqrt(squares)
    # Both corrections in one factor: m / c1 / (sqrt(v) / c2 + eps) = (c2 / c1) m / (sqrt(v) + c2 eps).
    scales = [math.sqrt(1 - betas[1] ** step) for step in steps]
    torch._foreach_add_(roots, [eps * scale for scale in scales])
    found = torch._foreach_div(averages, roots)
    torch._foreach_mul_(found, [-scale / (1 - betas[0] ** step) for scale, step in zip(scales, steps, strict=True)])
    return list(found)
