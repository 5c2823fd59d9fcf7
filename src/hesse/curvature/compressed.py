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
        elements: of the lower triangle, by number.
        own: the place [k * n] in the products where each stands alone now.
        other: the place where it still hides others.
    """

    elements: Tensor
    own: Tensor
    other: Tensor


@dataclass(frozen=True, eq=False)
class CompressedHessian:
    """How to form the Hessian of one function from ``products`` products.

    Args:
        pattern: where it may be other than zero.
        colours: [n]; columns of one colour are multiplied together.
        rounds: in which the elements below the diagonal are read off.
        gather: [nnz], for each element of the pattern its number: 0 .. n - 1 for the diagonal, then the lower triangle.
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
    gather: Tensor
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
        gather = np.where(high == low, high, pattern.n + np.searchsorted(keys, high * pattern.n + low))
        put = torch.device("cpu") if device is None else device
        return cls(
            pattern,
            torch.from_numpy(colours).to(put),
            tuple(Round(*(torch.from_numpy(part).to(put) for part in r)) for r in rounds),
            torch.from_numpy(gather).to(put),
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
        n = self.pattern.n
        seeds = x.new_zeros(self.products, n)
        seeds[self.colours, torch.arange(n, device=x.device)] = 1
        sums = products(gradient, x, seeds.mT).mT.reshape(-1)
        values = sums.new_empty(n + (self.pattern.nnz - n) // 2)
        values[:n] = sums[self.colours * n + torch.arange(n, device=x.device)]
        for i, (elements, own, other) in enumerate(self.rounds):
            values[n + elements] = sums[own]
            if i + 1 < len(self.rounds):
                sums.index_add_(0, other, -values[n + elements])
        return SparseMatrix(self.pattern, values[self.gather])

    def holds(self, matrix: SparseMatrix, gradient: Tensor, x: Tensor) -> bool:
        """Whether the pattern is still that of the Hessian at x: one product with a probe, against the matrix.

        Elements off the pattern are added to wrong places by :meth:`recover`; a probe of random numbers sees
        them all. What is not finite agrees: it is the function's, not the pattern's.
        """
        probe = self.probe.to(x)
        exact, found = product(gradient, x, probe), matrix @ probe
        # Row by row, so that small curvature counts beside large; but cancellation in the large may leave noise in the
        # small.
        scale = SparseMatrix(self.pattern, matrix.data.abs()) @ probe.abs()
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
