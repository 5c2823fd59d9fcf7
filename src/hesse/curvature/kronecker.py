"""Kronecker blocks: the curvature A (x) G of a layer's weight matrix W [m, n], damped, inverted and applied.

``(A (x) G)`` acts on W as ``G @ W @ A``. The damped inverse is factored (Martens and Grosse, 2015, section 6.3),
``(G + sqrt(damping) / pi I)^{-1} W (A + pi sqrt(damping) I)^{-1}`` with ``pi^2 = (tr A / n) / (tr G / m)``, which
splits the damping so that the terms it adds to A (x) G are smallest. A weight that consists of independent matrices, as
that of a grouped convolution, has a block for each: the factors then carry that dimension in front. A long side of W
may be in parts, and its factor block-diagonal (:mod:`hesse.curvature.tiles`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from hesse.curvature import tiles
from hesse.linalg import damped_inverse

__all__ = ["KroneckerInverse", "apply_inverse", "invert", "split_damping"]


class KroneckerInverse(NamedTuple):
    """The inverses of the damped factors, shaped as the factors, and the effective dimension of each block, [] or [K].

    The effective dimension is ``tr((A (x) G) (A (x) G damped)^{-1})``: how many directions of W have more curvature
    than damping. It falls out of the inverses: with damping d, ``tr(A (A + d I)^{-1}) = n - d tr (A + d I)^{-1}``.
    """

    a: Tensor
    g: Tensor
    rank: Tensor


def invert(
    factor_a: Tensor, factor_g: Tensor, damping: float, shape: tuple[int, int] | None = None
) -> KroneckerInverse | None:
    """The damped inverse of ``factor_a (x) factor_g``; None if it has none in float64 (see :func:`damped_inverse`).

    Args:
        factor_a: [n, n], [n] for a diagonal; or [K, n, n] or [K, n] for K blocks, which are dealt with at once.
        factor_g: [m, m], or [K, m, m].
        damping: added to the eigenvalues of the product, positive; every block splits it by its own pi.
        shape: (m, n), if the sides are in parts: the factors are then [.., k, b, b], and a diagonal [.., 1, n].

    Example:
        >>> import torch
        >>> inverse = invert(torch.eye(2), torch.eye(3), damping=1.0)
        >>> apply_inverse(inverse.a, inverse.g, torch.ones(3, 2))[0, 0].item(), inverse.rank.item()
        (0.25, 1.5)
    """
    diagonal = factor_a.ndim < factor_g.ndim
    damping_a, damping_g = split_damping(factor_a, factor_g, damping, shape)
    if shape is not None:  # the same for all parts
        damping_a, damping_g = damping_a[..., None], damping_g[..., None]
    a = damped_inverse(factor_a, damping_a, diagonal=diagonal)
    g = damped_inverse(factor_g, damping_g)
    if a is None or g is None:
        return None
    rank_a = a.shape[-1] - damping_a * (a if diagonal else _diagonal(a)).double().sum(-1)
    rank_g = g.shape[-1] - damping_g * _diagonal(g).double().sum(-1)
    if shape is not None:
        rank_a, rank_g = rank_a.sum(-1), rank_g.sum(-1)  # the padding adds nothing
    return KroneckerInverse(a, g, rank_a * rank_g)


def split_damping(
    factor_a: Tensor, factor_g: Tensor, damping: float, shape: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """What is added to the eigenvalues of each factor, [] or [K], float64: their product is ``damping``."""
    a = factor_a if factor_a.ndim < factor_g.ndim else _diagonal(factor_a)
    ratio = _mean(a, shape and shape[1]) / _mean(_diagonal(factor_g), shape and shape[0])
    pi = ratio.sqrt().where((ratio > 0) & ratio.isfinite(), 1.0)  # a block that saw nothing has none
    return pi * math.sqrt(damping), math.sqrt(damping) / pi


def apply_inverse(a: Tensor, g: Tensor, matrix: Tensor) -> Tensor:
    """``g @ matrix @ a`` for a matrix [m, n], or [K, m, n] with ``a`` and ``g`` alike; ``a`` may be a diagonal.

    With sides in parts the factors have one dimension more.
    """
    if g.ndim > matrix.ndim:
        left = tiles.times(g, matrix)
        return left * a if a.ndim < g.ndim else tiles.times(a, left.mT).mT
    left = g @ matrix
    return left * a[..., None, :] if a.ndim < g.ndim else left @ a


def _mean(diagonal: Tensor, length: int | None) -> Tensor:
    """Of [.., n]; or of a side of that length in parts [.., k, b], whose padding does not count. Float64."""
    return diagonal.double().mean(-1) if length is None else diagonal.double().sum((-2, -1)) / length


def _diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1)
