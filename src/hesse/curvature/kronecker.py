"""Kronecker blocks: the curvature A (x) G of a layer's weight matrix W [m, n], damped, inverted and applied.

``(A (x) G)`` acts on W as ``G @ W @ A``. The damped inverse is factored (Martens and Grosse, 2015, section 6.3),
``(G + sqrt(damping) / pi I)^{-1} W (A + pi sqrt(damping) I)^{-1}`` with ``pi^2 = (tr A / n) / (tr G / m)``, which
splits the damping so that the terms it adds to A (x) G are smallest. A weight that consists of independent matrices, as
that of a grouped convolution, has a block for each: the factors then carry that dimension in front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.linalg import damped_inverse

__all__ = ["KroneckerInverse", "apply_inverse", "invert"]


@dataclass(frozen=True)
class KroneckerInverse:
    """``a`` [n, n], [G, n, n] or [n] and ``g`` [m, m] or [G, m, m], the inverses of the damped factors, and the
    effective dimension.

    The effective dimension is ``tr((A (x) G) (A (x) G damped)^{-1})``: how many directions of W have more curvature
    than damping. It falls out of the inverses: with damping d, ``tr(A (A + d I)^{-1}) = n - d tr (A + d I)^{-1}``.
    """

    a: Tensor
    g: Tensor
    effective_dimension: float


def invert(factor_a: Tensor, factor_g: Tensor, damping: float) -> KroneckerInverse | None:
    """The damped inverse of ``factor_a (x) factor_g``; None if it has none in float64 (see :func:`damped_inverse`).

    Args:
        factor_a: [n, n], [n] for a diagonal, or [G, n, n] for G blocks.
        factor_g: [m, m], or [G, m, m].
        damping: added to the eigenvalues of the product, positive; every block splits it by its own pi.

    Example:
        >>> import torch
        >>> inverse = invert(torch.eye(2), torch.eye(3), damping=1.0)
        >>> apply_inverse(inverse.a, inverse.g, torch.ones(3, 2))[0, 0].item(), inverse.effective_dimension
        (0.25, 1.5)
    """
    if factor_g.ndim == 3:
        return _invert_blocks(factor_a, factor_g, damping)
    mean_a = float(_diagonal(factor_a).mean())
    mean_g = float(_diagonal(factor_g).mean())
    ratio = mean_a / mean_g if mean_g > 0 else 0.0
    pi = math.sqrt(ratio) if 0 < ratio < math.inf else 1.0
    damping_a, damping_g = pi * math.sqrt(damping), math.sqrt(damping) / pi
    a, g = damped_inverse(factor_a, damping_a), damped_inverse(factor_g, damping_g)
    if a is None or g is None:
        return None
    rank_a = len(a) - damping_a * float(_diagonal(a).sum())
    rank_g = len(g) - damping_g * float(_diagonal(g).sum())
    return KroneckerInverse(a, g, rank_a * rank_g)


def apply_inverse(a: Tensor, g: Tensor, matrix: Tensor) -> Tensor:
    """``g @ matrix @ a`` for a matrix [m, n], or [G, m, n] with ``a`` and ``g`` alike; ``a`` may be a diagonal [n]."""
    left = g @ matrix
    return left * a if a.ndim == 1 else left @ a


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 1 else factor.diagonal(dim1=-2, dim2=-1)


def _invert_blocks(factor_a: Tensor, factor_g: Tensor, damping: float) -> KroneckerInverse | None:
    """The same for G blocks, without a loop: a depthwise convolution has hundreds."""
    a64, g64 = factor_a.double(), factor_g.double()
    ratio = _diagonal(a64).mean(-1) / _diagonal(g64).mean(-1)
    pi = ratio.sqrt().where((ratio > 0) & ratio.isfinite(), 1.0)  # a block that saw nothing has none
    damping_a, damping_g = pi * math.sqrt(damping), math.sqrt(damping) / pi
    a, g = _damped_inverses(a64, damping_a, factor_a.dtype), _damped_inverses(g64, damping_g, factor_g.dtype)
    if a is None or g is None:
        return None
    rank_a = a.shape[-1] - damping_a * _diagonal(a).sum(-1)
    rank_g = g.shape[-1] - damping_g * _diagonal(g).sum(-1)
    return KroneckerInverse(a, g, float((rank_a * rank_g).sum()))


def _damped_inverses(matrices: Tensor, damping: Tensor, dtype: torch.dtype) -> Tensor | None:
    damped = 0.5 * (matrices + matrices.mT)
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()) or not bool(factor.diagonal(dim1=-2, dim2=-1).isfinite().all()):
        return None
    inverse = torch.cholesky_inverse(factor).to(dtype)
    return inverse if bool(inverse.isfinite().all()) else None
