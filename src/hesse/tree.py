"""Named tensors as one vector: the inner product and sums of ``dict[str, Tensor]``.

Parameters, gradients, directions and curvature products are all such dictionaries (``Params``); the functions here
are the only ones that see them as points of one Euclidean space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Params", "add", "dot", "is_finite", "scale"]

Params = dict[str, Tensor]


def dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    """Inner product, a float64 scalar: sums over millions of float32 products lose digits that ratios need.

    Example:
        >>> x = {"a": torch.ones(2), "b": torch.full((1,), 2.0)}
        >>> dot(x, x).item()
        6.0
    """
    return torch.stack([torch.sum(x[name] * y[name], dtype=torch.float64) for name in x]).sum()


def scale(factor: float | Tensor, x: Mapping[str, Tensor]) -> Params:
    """``factor * x``."""
    return {name: factor * value for name, value in x.items()}


def add(*terms: tuple[float, Mapping[str, Tensor]]) -> Params:
    """Linear combination ``sum_i c_i x_i`` of trees with the same names.

    Example:
        >>> add((2.0, {"a": torch.ones(1)}), (-1.0, {"a": torch.ones(1)}))
        {'a': tensor([1.])}
    """
    (first, x), *rest = terms
    total = scale(first, x)
    for factor, y in rest:
        for name, value in total.items():
            value.add_(y[name], alpha=factor)
    return total


def is_finite(x: Mapping[str, Tensor] | Sequence[Tensor]) -> bool:
    """Whether every element is a number: one reduction a tensor, one synchronisation in all."""
    tensors = [value.detach() for value in (x.values() if isinstance(x, Mapping) else x) if value.numel()]
    return not tensors or bool(torch.stack([value.abs().amax() for value in tensors]).isfinite().all())
