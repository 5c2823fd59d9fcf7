"""Sums of squared per-example gradients, from rows: ``sum_k sum_b (sum_t g_kbt a_bt')^2``, element by element.

This is the diagonal of the Gauss-Newton matrix when the g are what the columns of a root send back, and the eigenvalues
of EKFAC when a and g are first turned into the eigenbases of their factors. How to sum depends on the number of
positions T. With many, each example's gradient is formed and squared, which costs what gradients cost. With few, the
square is multiplied out, ``sum_tu (sum_k g_t g_u) (a_t a_u)``: over pairs of positions, but with one product of
matrices for all columns and examples. With one position that is ``(sum_k g^2)' a^2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesse.curvature.layers import Lookups

__all__ = ["FORMED", "RowSquares", "lookup_squares"]

FORMED = 2**20  # elements of per-example gradients that exist at a time: a few megabytes stay in the cache


class RowSquares:
    """``sum_k sum_b (sum_t g_kbt a_bt')^2`` as matrices [G, m, n]; the inputs a are the same for all columns.

    Args:
        bias: whether to sum the squares [G, m] of ``sum_t g_kbt`` as well.
    """

    def __init__(self, bias: bool = False) -> None:
        self.bias = bias
        self.a: Tensor | None = None
        self.pairs: Tensor | None = None  # [B, T, T, G, m]: g_t g_u, summed over columns
        self.formed: Tensor | None = None
        self.shift: Tensor | None = None

    def add(self, a: Tensor, g: Tensor) -> None:
        """Columns ``g`` [K, B, T, G, m] for the inputs ``a`` [B, T, G, n]."""
        batch, positions, groups, n = a.shape
        if positions**2 <= n:
            self.a = a
            if self.pairs is None:
                self.pairs = g.new_zeros(batch, positions, positions, groups, g.shape[-1])
            for column in g:
                self.pairs.addcmul_(column[:, :, None], column[:, None, :])
            return
        if self.formed is None:
            self.formed = g.new_zeros(groups, g.shape[-1], n)
            self.shift = g.new_zeros(groups, g.shape[-1])
        _add_formed(self.formed, a, g)
        if self.bias:
            assert self.shift is not None
            self.shift += g.sum(2).square_().sum((0, 1))

    def total(self) -> tuple[Tensor, Tensor]:
        """The sums, of the weight's matrices [G, m, n] and of the bias [G, m]."""
        if self.a is None or self.pairs is None:
            assert self.formed is not None and self.shift is not None
            return self.formed, self.shift
        inputs = (self.a[:, :, None] * self.a[:, None, :]).flatten(0, 2).movedim(1, 0)
        return self.pairs.flatten(0, 2).movedim(1, 0).mT @ inputs, self.pairs.sum((0, 1, 2))


def lookup_squares(lookups: Sequence[Lookups]) -> Tensor:
    """The same [size, m] for lookups with g [K, B, T, m]: what an example gives to one index adds up first."""
    size, index = lookups[0].size, torch.cat([one.index for one in lookups], dim=1)
    g = torch.cat([one.g for one in lookups], dim=2).flatten(1, 2)
    keys, slots = (torch.arange(len(index), device=index.device)[:, None] * size + index).unique(return_inverse=True)
    sums = g.new_zeros(len(g), len(keys), g.shape[-1]).index_add_(1, slots.flatten(), g)
    return g.new_zeros(size, g.shape[-1]).index_add_(0, keys % size, sums.square_().sum(0))


def _add_formed(total: Tensor, a: Tensor, g: Tensor) -> None:
    """``total`` [G, m, n] plus the squares of per-example gradients, some columns and examples at a time."""
    batch, _, groups, n = a.shape
    m = g.shape[-1]
    columns = max(1, FORMED // (batch * groups * m * n))
    examples = max(1, FORMED // (groups * m * n))
    for some in g.split(columns):
        for begin in range(0, batch, examples):
            part = slice(begin, begin + examples)
            left = some[:, part].permute(1, 3, 0, 4, 2).flatten(2, 3)  # [b, G, k m, T]
            gradients = left @ a[part].transpose(1, 2)
            total += gradients.square_().sum(0).unflatten(1, (len(some), m)).sum(1)
