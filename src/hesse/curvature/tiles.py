"""A long side of a matrix in equal parts, each with a factor of its own: block-diagonal Kronecker factors.

A factor of a side of n elements has n^2 of them and takes n^3 operations to invert. Over k parts of b = n / k these are
n b and n b^2: linear in n once b is bounded, as in blocked Shampoo (Anil et al., 2020). What is given up is the
curvature between parts. Factors in parts are [.., k, b, b]; the last part is filled up with zeros, where a matrix that
they act on has none. One part (k = 1) is the whole factor.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cut", "moments", "times"]


def moments(rows: Tensor, max_dim: int, ones: bool = False) -> Tensor:
    """The diagonal blocks [.., k, b, b], with b at most ``max_dim``, of ``x' x`` for rows x [.., R, n].

    With ``ones`` every row has a one behind its last entry, which is not written there. Nothing of n^2 is formed.

    Example:
        >>> import torch
        >>> moments(torch.tensor([[1.0, 2.0, 3.0]]), max_dim=2)
        tensor([[[1., 2.],
                 [2., 4.]],
        <BLANKLINE>
                [[9., 0.],
                 [0., 0.]]])
    """
    n = rows.shape[-1] + ones
    k = math.ceil(n / max_dim)
    b = math.ceil(n / k)
    blocks = rows.new_zeros(*rows.shape[:-2], k, b, b)
    for i, part in enumerate(rows.split(b, dim=-1)):
        blocks[..., i, : part.shape[-1], : part.shape[-1]] = part.mT @ part
    if ones:
        begin = (k - 1) * b  # of the last part
        end = n - 1 - begin
        blocks[..., -1, end, :end] = blocks[..., -1, :end, end] = rows[..., begin:].sum(-2)
        blocks[..., -1, end, end] = rows.shape[-2]
    return blocks


def cut(x: Tensor, blocks: Tensor) -> Tensor:
    """x [.., n, c] in parts [.., k, b, c] as those of ``blocks`` [.., k, b, b]."""
    k, b = blocks.shape[-3], blocks.shape[-1]
    missing = k * b - x.shape[-2]
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(-2, (k, b))


def times(blocks: Tensor, x: Tensor) -> Tensor:
    """The block-diagonal matrix of ``blocks`` [.., k, b, b] times x [.., n, c].

    Example:
        >>> import torch
        >>> times(torch.tensor([[[2.0]], [[3.0]]]), torch.ones(2, 1))
        tensor([[2.],
                [3.]])
    """
    return (blocks @ cut(x, blocks)).flatten(-3, -2)[..., : x.shape[-2], :]
