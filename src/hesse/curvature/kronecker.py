"""Kronecker blocks: the curvature A (x) G of a layer's weight matrix W [m, n], damped, inverted and applied.

``(A (x) G)`` acts on W as ``G @ W @ A``. The damped inverse is factored (Martens and Grosse, 2015, section 6.3),
``(G + sqrt(damping) / pi I)^{-1} W (A + pi sqrt(damping) I)^{-1}`` with ``pi^2 = (tr A / n) / (tr G / m)``, which
splits the damping so that the terms it adds to A (x) G are smallest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hesse.linalg import damped_inverse

__all__ = ["KroneckerInverse", "apply_inverse", "invert"]


@dataclass(frozen=True)
class KroneckerInverse:
    """``a`` [n, n] (or [n]) and ``g`` [m, m], the inverses of the damped factors, and the effective dimension.

    The effective dimension is ``tr((A (x) G) (A (x) G damped)^{-1})``: how many directions of W have more curvature
    than damping. It falls out of the inverses: with damping d, ``tr(A (A + d I)^{-1}) = n - d tr (A + d I)^{-1}``.
    """

    a: Tensor
    g: Tensor
    effective_dimension: float


def invert(factor_a: Tensor, factor_g: Tensor, damping: float) -> KroneckerInverse | None:
    """The damped inverse of ``factor_a (x) factor_g``; None if it has none in float64 (see :func:`damped_inverse`).

    Example:
        >>> import torch
        >>> inverse = invert(torch.eye(2), torch.eye(3), damping=1.0)
        >>> apply_inverse(inverse.a, inverse.g, torch.ones(3, 2))[0, 0].item(), inverse.effective_dimension
        (0.25, 1.5)
    """
    mean_a = float(_diagonal(factor_a).mean())
    mean_g = float(_diagonal(factor_g).mean())
    pi = math.sqrt(mean_a / mean_g) if mean_a > 0 and mean_g > 0 else 1.0
    damping_a, damping_g = pi * math.sqrt(damping), math.sqrt(damping) / pi
    a, g = damped_inverse(factor_a, damping_a), damped_inverse(factor_g, damping_g)
    if a is None or g is None:
        return None
    rank_a = len(a) - damping_a * float(_diagonal(a).sum())
    rank_g = len(g) - damping_g * float(_diagonal(g).sum())
    return KroneckerInverse(a, g, rank_a * rank_g)


def apply_inverse(a: Tensor, g: Tensor, matrix: Tensor) -> Tensor:
    """``g @ matrix @ a`` for a matrix [m, n]; ``a`` may be a diagonal [n]."""
    left = g @ matrix
    return left @ a if a.ndim == 2 else left * a


def _diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal() if factor.ndim == 2 else factor
