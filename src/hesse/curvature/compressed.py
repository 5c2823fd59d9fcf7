"""A sparse Hessian from a few products: pattern and colouring found once, then a product a colour at each point.

The columns of one colour are multiplied together, ``B_c = H (sum of their unit vectors)``, and the elements of H are
read off from B: those that stand alone in a row of B_c directly, others after what is known by symmetry has been
subtracted.
Curtis, Powell and Reid's grouping of columns, direct recovery from a star colouring (Coleman and More) and
substitution from an acyclic one are this peeling with no symmetry, one round and more rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesse.curvature.colouring import acyclic_colours, star_colours
from hesse.curvature.dense import product, products
from hesse.curvature.sparsity import sparsity
from hesse.linalg.banded import Pattern, SparseMatrix

__all__ = ["CompressedHessian"]

Numbers = NDArray[np.int64]

ROUNDS = 16  # of substitution: each adds the rounding errors of those before it, and takes the time of a small gather


class Round(NamedTuple):
    """Elements that can be read off together.

    Args:
        own: the place [k * n] in the products where each stands alone now.
        other: the place where it still hides others.
    """

    own: Tensor
    other: Tensor


@dataclass(frozen=True, eq=False)
class CompressedHessian:
    """How to form the Hessian of one function from ``products`` products.

    Args:
        pattern: where it may be other than zero.
        colours: [n]; columns of one colour are multiplied together.
        rounds: of substitution, until the last elements stand alone.
        places: [nnz], for each element of the pattern where in the products it stands alone in the end.
        probe: [n], random numbers.

    Example:
        The Hessian of a chain of any length takes three products:

        >>> def chain(x):
        ...     return (x[1:] * x[:-1] ** 2).sum()
        >>> x = torch.arange(50.0, requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(chain(x), x, create_graph=True)
        >>> compressed = CompressedHessian.of(chain, x)
        >>> compressed.products
        3
        >>> torch.equal(compressed.recover(gradient, x).dense(), torch.func.hessian(chain)(x.detach()))
        True
    """

    pattern: Pattern
    colours: Tensor
    rounds: tuple[Round, ...]
    places: Tensor
    probe: Tensor

    @classmethod
    def of(cls, fun: Callable[[Tensor], Tensor], x: Tensor, most: int | None = None) -> CompressedHessian | None:
        """For a function of a flat x [n], by watching its gradient at x; None where the Hessian is dense.

        Args:
            fun, x, most: as for :func:`hesse.curvature.sparsity.sparsity`.

        Raises:
            Whatever ``fun`` and its backward pass raise.
        """
        pattern = sparsity(fun, x, most)
        return None if pattern is None else cls.on(pattern, x.device)

    @classmethod
    def on(cls, pattern: Pattern, device: torch.device | None = None) -> CompressedHessian | None:
        """For a known pattern; None if it takes more than a third of the products that a dense Hessian takes."""
        if 3 * int(np.diff(pattern.indptr).mean()) > pattern.n:
            return None
        colours = star_colours(pattern)
        rounds = _rounds(pattern, colours)
        assert rounds is not None  # one is enough
        if colours.max(initial=0) > 1:  # no graph with an edge does with less than two
            fewer = acyclic_colours(pattern)
            if fewer.max() < colours.max() and (longer := _rounds(pattern, fewer)) is not None:
                colours, rounds = fewer, longer
        if 3 * int(colours.max(initial=0) + 1) > pattern.n:
            return None
        lower = np.flatnonzero(pattern.rows > pattern.indices)
        keys = pattern.rows[lower] * pattern.n + pattern.indices[lower]
        high, low = np.maximum(pattern.rows, pattern.indices), np.minimum(pattern.rows, pattern.indices)
        alone = np.empty(lower.size + 1, dtype=np.int64)  # the last is for the diagonal to point at
        for elements, own, _ in rounds:
            alone[elements] = own
        below = alone[np.searchsorted(keys, high * pattern.n + low)]
        places = np.where(high == low, colours[high] * pattern.n + high, below)
        put = torch.device("cpu") if device is None else device
        return cls(
            pattern,
            torch.from_numpy(colours).to(put),
            tuple(
                Round(torch.from_numpy(own).to(put), torch.from_numpy(other).to(put)) for _, own, other in rounds[:-1]
            ),
            torch.from_numpy(places).to(put),
            torch.randn(pattern.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(put),
        )

    @property
    def products(self) -> int:
        """How many products a Hessian takes."""
        return int(self.colours.max()) + 1 if self.colours.numel() else 0

    def recover(self, gradient: Tensor, x: Tensor) -> SparseMatrix:
        """The Hessian at x.

        Args:
            gradient: [n], at ``x``, formed with ``create_graph=True``.
            x: [n], the tensor that requires gradients.

        Raises:
            DerivativeError: torch has no second derivative of an operation.
        """
        seeds = (self.colours == torch.arange(self.products, device=x.device)[:, None]).to(x.dtype)
        sums = products(gradient, x, seeds.mT).mT.reshape(-1)
        # A place where an element stands alone is never subtracted from again: all are read at the end.
        for own, other in self.rounds:
            sums.index_add_(0, other, -sums.index_select(0, own))
        return SparseMatrix(self.pattern, sums.index_select(0, self.places))

    def holds(self, matrix: SparseMatrix, gradient: Tensor, x: Tensor) -> bool:
        """Whether the pattern is still that of the Hessian at x: one product with a probe, against the matrix.

        Elements off the pattern are added to wrong places by :meth:`recover`; a probe of random numbers sees
        them all. What is not finite agrees: it is the function's, not the pattern's.
        """
        probe = self.probe.to(x)
        exact = product(gradient, x, probe)
        # Row by row, so that small curvature counts beside large; but cancellation in the large may leave noise in the
        # small.
        rows, columns = (torch.from_numpy(part).to(x.device) for part in (self.pattern.rows, self.pattern.indices))
        parts = matrix.data * probe.index_select(0, columns)
        found = torch.zeros_like(probe).index_add_(0, rows, parts)
        scale = torch.zeros_like(probe).index_add_(0, rows, parts.abs())
        eps = torch.finfo(x.dtype).eps
        limit = eps**0.5 * scale + eps**0.75 * scale.amax() if scale.numel() else scale
        return not bool(((exact - found).abs() > limit).any())


def _rounds(pattern: Pattern, colours: Numbers) -> list[tuple[Numbers, Numbers, Numbers]] | None:
    """Elements below the diagonal in the order in which they can be read off; None if that takes too many rounds."""
    n = pattern.n
    lower = np.flatnonzero(pattern.rows > pattern.indices)
    i, j = pattern.rows[lower], pattern.indices[lower]
    # Where the element stands in the products: in row i with the colour of j, and in row j with that of i.
    places = np.stack([colours[j] * n + i, colours[i] * n + j])
    hidden = np.bincount(places.reshape(-1), minlength=n * int(colours.max(initial=0) + 1))
    left = np.arange(lower.size)
    rounds: list[tuple[Numbers, Numbers, Numbers]] = []
    while left.size:
        if len(rounds) == ROUNDS:
            return None
        alone = hidden[places[:, left]] == 1
        free = alone.any(0)
        elements = left[free]
        side = np.where(alone[0, free], 0, 1)
        own, other = places[side, elements], places[1 - side, elements]
        rounds.append((elements, own, other))
        np.subtract.at(hidden, other, 1)
        left = left[~free]
    return rounds
