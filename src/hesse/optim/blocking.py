"""A parameter as a batch of matrices that are small enough to factor.

A matrix is one block; a dimension above the limit is cut into equal parts; a convolution's kernel becomes a matrix of
its output channels by all the rest; vectors and scalars have no matrix. What a dimension is cut into decides
what a step costs: rotating an [m, n] matrix takes 4 m n (m + n) operations, in k x k blocks a k-th of that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Blocks", "blocks_of", "joined", "shared"]

# A dimension of more blocks than the first that is longer than the other by more than the second has no factor: the
# rows of an embedding, most of them rarely seen, whose factors would be larger than the embedding.
MOST_BLOCKS, MOST_TIMES = 8, 16


@dataclass(frozen=True)
class Blocks:
    """How a parameter is cut: as [rows, columns], padded with zeros, into grids of equal blocks.

    Args:
        rows: of the parameter as a matrix.
        columns: of the parameter as a matrix.
        grid: the number of blocks along each.
        sides: whether blocks have a factor on the left (rows) and on the right (columns).
    """

    rows: int
    columns: int
    grid: tuple[int, int]
    sides: tuple[bool, bool]

    @property
    def shape(self) -> tuple[int, int]:
        """Of one block."""
        return math.ceil(self.rows / self.grid[0]), math.ceil(self.columns / self.grid[1])

    @property
    def count(self) -> int:
        """The number of blocks."""
        return self.grid[0] * self.grid[1]

    def cut(self, x: Tensor) -> Tensor:
        """The parameter's elements as blocks [count, *shape]."""
        if self.count == 1:
            return x.reshape(1, self.rows, self.columns)
        (i, j), (m, n) = self.grid, self.shape
        matrix = x.reshape(self.rows, self.columns)
        if (i * m, j * n) != matrix.shape:
            matrix = torch.nn.functional.pad(matrix, (0, j * n - self.columns, 0, i * m - self.rows))
        return matrix.view(i, m, j, n).transpose(1, 2).reshape(i * j, m, n)

    def paste(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`cut`: blocks [count, *self.shape] as a tensor of the parameter's shape."""
        if self.count == 1:
            return blocks.reshape(shape)
        (i, j), (m, n) = self.grid, self.shape
        padded = blocks.view(i, j, m, n).transpose(1, 2).reshape(i * m, j * n)
        return padded[: self.rows, : self.columns].reshape(shape)


@functools.cache
def blocks_of(shape: tuple[int, ...], max_dim: int, split: bool = True) -> Blocks | None:
    """How a parameter of this shape is cut, or None if it has no matrix or no side of it gets a factor.

    Args:
        shape: of the parameter. Dimensions of one element do not count; beyond two, all after the first are one.
        max_dim: the largest factor.
        split: whether a dimension above it is cut into blocks. If not, it is left without a factor, as a very long one
            is in any case: more than eight blocks, and sixteen times the other dimension.

    Example:
        >>> blocks_of((64, 3, 3, 3), max_dim=256).shape, blocks_of((1000, 300), max_dim=256).shape
        ((64, 27), (250, 150))
        >>> blocks_of((50000, 64), max_dim=256).sides
        (False, True)
        >>> blocks_of((10,), max_dim=256) is None
        True
    """
    dims = [n for n in shape if n != 1]
    if len(dims) < 2 or 0 in dims:
        return None
    rows, columns = dims[0], math.prod(dims[1:])
    parts = [math.ceil(n / max_dim) for n in (rows, columns)]
    long = [n > MOST_TIMES * other for n, other in ((rows, columns), (columns, rows))]
    sides = [k == 1 or (split and not (k > MOST_BLOCKS and far)) for k, far in zip(parts, long, strict=True)]
    if not any(sides):
        return None
    i, j = (k if has else 1 for k, has in zip(parts, sides, strict=True))
    return Blocks(rows, columns, (i, j), (sides[0], sides[1]))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat(parts)``, without a copy where they are neighbours in memory already."""
    first = parts[0]
    if len(parts) == 1:
        return first
    storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        apart = part.storage_offset() != place or part.untyped_storage().data_ptr() != storage
        if apart or not part.is_contiguous() or part.dtype != first.dtype:
            return torch.cat(list(parts))
        place += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def shared(states: Sequence[dict[str, Any]], name: str) -> Tensor:
    """The states' tensors of that name as one [sum of lengths, ...], of which each state holds its part from now on.

    What is computed in place on the whole is then in every state, and at the next step nothing has to be copied.
    A state that comes from elsewhere (a checkpoint, a copy) is joined to the others again.
    """
    parts = [state[name] for state in states]
    whole = joined(parts)
    if len(parts) > 1 and whole.data_ptr() != parts[0].data_ptr():
        for state, part in zip(states, whole.split([len(part) for part in parts]), strict=True):
            state[name] = part
    return whole
