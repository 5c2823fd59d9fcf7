"""Sparse symmetric matrices with a fixed pattern: products, and Cholesky factors of H + shift I.

Rows and columns are permuted to bring all elements near the diagonal (reverse Cuthill-McKee). A narrow band is factored
as one: a tridiagonal matrix, of a chain, in time n; a band of width b in n b^2. Otherwise SuperLU chooses an order of
little fill-in; as it never leaves the diagonal for a pivot of a positive definite matrix, positive pivots tell that the
matrix is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Pattern", "SparseFactor", "SparseMatrix"]

Numbers = NDArray[np.int64]

# A band of half-width b takes n b^2 operations at the speed of dense blocks, SuperLU fewer at a tenth of it: on grids
# of m x m points the factors take 11 and 30 ms at m = 100, 94 and 165 ms at m = 200, 350 and 450 ms at m = 300.
WIDEST = 250
MOST = 40_000_000  # numbers in a band: 320 MB


@dataclass(frozen=True, eq=False)
class Pattern:
    """Places of a symmetric matrix [n, n] that may hold something other than zero: the diagonal among them.

    Args:
        indptr: [n + 1], where each row starts in ``indices``.
        indices: columns, ascending in each row.
    """

    indptr: Numbers
    indices: Numbers

    @classmethod
    def of(cls, rows: Numbers, columns: Numbers, n: int) -> Pattern:
        """The pattern with these places, each given once and sorted by row, then column; symmetric, with diagonal."""
        return cls(np.searchsorted(rows, np.arange(n + 1)), np.asarray(columns, dtype=np.int64))

    @property
    def n(self) -> int:
        return self.indptr.size - 1

    @property
    def nnz(self) -> int:
        return self.indices.size

    @cached_property
    def rows(self) -> Numbers:
        """The row of each element."""
        return np.repeat(np.arange(self.n), np.diff(self.indptr))

    def dense(self) -> Tensor:
        """A boolean matrix [n, n]."""
        full = torch.zeros(self.n, self.n, dtype=torch.bool)
        full[torch.from_numpy(self.rows), torch.from_numpy(self.indices)] = True
        return full

    @cached_property
    def band(self) -> tuple[Numbers | None, int]:
        """The order that makes the band narrow, None for the order as it is, and the half-width of the band."""
        width = int(np.abs(self.rows - self.indices).max(initial=0))
        if width <= 2:
            return None, width
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import reverse_cuthill_mckee

        ones = csr_array((np.ones(self.nnz, dtype=np.int8), self.indices, self.indptr), shape=(self.n, self.n))
        order = reverse_cuthill_mckee(ones, symmetric_mode=True).astype(np.int64)
        place = np.empty_like(order)
        place[order] = np.arange(self.n)
        narrow = int(np.abs(place[self.rows] - place[self.indices]).max(initial=0))
        return (order, narrow) if narrow < width else (None, width)

    @cached_property
    def lower(self) -> tuple[Numbers, Numbers]:
        """Of the elements in the band's lower triangle: their places in ``indices``, and in storage [b + 1, n]."""
        order, _ = self.band
        rows, columns = self.rows, self.indices
        if order is not None:
            place = np.empty_like(order)
            place[order] = np.arange(self.n)
            rows, columns = place[rows], place[columns]
        chosen = np.flatnonzero(rows >= columns)
        return chosen, (rows[chosen] - columns[chosen]) * self.n + columns[chosen]

    @cached_property
    def diagonal(self) -> Numbers:
        """Places of the diagonal in ``indices``."""
        return np.flatnonzero(self.rows == self.indices)


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """A symmetric matrix with the elements ``data`` [nnz] on a pattern; needs scipy.

    Example:
        >>> pattern = Pattern(np.array([0, 2, 4]), np.array([0, 1, 0, 1]))
        >>> H = SparseMatrix(pattern, torch.tensor([2.0, 1.0, 1.0, 2.0]))
        >>> H @ torch.tensor([1.0, 0.0])
        tensor([2., 1.])
        >>> H.factor(2.0).solve(torch.tensor([5.0, 5.0])).round(decimals=4)
        tensor([1., 1.])
        >>> H.factor(-1.5) is None
        True
    """

    pattern: Pattern
    data: Tensor
    _scipy: list[Any] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, matrix: Any, dtype: torch.dtype) -> SparseMatrix:
        """A square ``scipy.sparse`` matrix on the pattern of its elements, their mirror images and the diagonal."""
        from scipy.sparse import csr_array, eye_array

        # A sum stores every place of both, in order.
        ones = abs(csr_array(matrix).sign()) + eye_array(matrix.shape[0], format="csr")
        places = (ones + ones.T).tocsr()
        places.sort_indices()
        pattern = Pattern(places.indptr, places.indices.astype(np.int64))
        found = csr_array(matrix)[pattern.rows, pattern.indices]
        return cls(pattern, torch.from_numpy(np.asarray(found, dtype=np.float64).reshape(-1)).to(dtype))

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.pattern.n, self.pattern.n])

    @property
    def scipy(self) -> Any:
        """The same numbers as a ``scipy.sparse.csr_array``."""
        if not self._scipy:
            from scipy.sparse import csr_array

            parts = (self.data.detach().cpu().numpy(), self.pattern.indices, self.pattern.indptr)
            self._scipy.append(csr_array(parts, shape=tuple(self.shape)))
        return self._scipy[0]

    def __matmul__(self, v: Tensor) -> Tensor:
        """``H v`` for v [n] or [n, k]."""
        return torch.from_numpy(self.scipy @ v.detach().cpu().numpy()).to(v)

    def diagonal(self) -> Tensor:
        """[n]"""
        return self.data[torch.from_numpy(self.pattern.diagonal).to(self.data.device)]

    def dense(self) -> Tensor:
        """[n, n]"""
        full = self.data.new_zeros(self.shape)
        where = (torch.from_numpy(self.pattern.rows), torch.from_numpy(self.pattern.indices))
        full[where] = self.data
        return full

    def shifted(self, shift: float) -> SparseMatrix:
        """``H + shift I``."""
        data = self.data.clone()
        data[torch.from_numpy(self.pattern.diagonal).to(data.device)] += shift
        return SparseMatrix(self.pattern, data)

    def row_sums(self) -> Tensor:
        """``sum_j |H_ij|`` [n]: the largest bounds every eigenvalue; with the diagonal they give Gershgorin's discs."""
        rows = torch.from_numpy(self.pattern.rows).to(self.data.device)
        return self.data.new_zeros(self.pattern.n).index_add_(0, rows, self.data.abs())

    def factor(self, shift: float = 0.0) -> SparseFactor | None:
        """The factors of ``H + shift I``, or None where that is not positive definite or not finite."""
        return SparseFactor.of(self, shift)


@dataclass(frozen=True)
class SparseFactor:
    """Factors of a positive definite sparse matrix.

    Args:
        kind: "diagonal", "tridiagonal", "banded" or "SuperLU".
    """

    kind: str
    _solve: Callable[[NDArray[Any]], NDArray[Any]] = field(repr=False)

    @classmethod
    def of(cls, matrix: SparseMatrix, shift: float = 0.0) -> SparseFactor | None:
        """Factors ``matrix + shift I``, or None where that is not positive definite or not finite.

        Raises:
            ImportError: scipy is missing.
        """
        if matrix.data.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"sparse factors are of float32 or float64 matrices; got {matrix.data.dtype}.")
        if not bool(np.isfinite(matrix.data.detach().cpu().numpy()).all()):
            return None
        _, width = matrix.pattern.band
        narrow = width <= WIDEST and (width + 1) * matrix.pattern.n <= MOST
        return _banded(matrix, shift) if narrow else _superlu(matrix, shift)

    def solve(self, b: Tensor) -> Tensor:
        """``(H + shift I)^{-1} b`` for b [n] or [n, k]."""
        return torch.from_numpy(self._solve(b.detach().cpu().numpy())).to(b)


def _banded(matrix: SparseMatrix, shift: float) -> SparseFactor | None:
    from scipy.linalg import get_lapack_funcs

    pattern = matrix.pattern
    order, width = pattern.band
    data = matrix.data.detach().cpu().numpy()
    chosen, places = pattern.lower
    band = np.zeros((width + 1, pattern.n), dtype=data.dtype)
    band.reshape(-1)[places] = data[chosen]
    band[0] += shift
    if width == 0:
        info = int(not (band[0] > 0).all())
        kind = "diagonal"

        def run(b: NDArray[Any]) -> NDArray[Any]:
            return (b.T / band[0]).T

    elif width == 1:
        factor, solve = get_lapack_funcs(("pttrf", "pttrs"), (band,))
        d, e, info = factor(band[0], band[1, :-1])
        kind = "tridiagonal"

        def run(b: NDArray[Any]) -> NDArray[Any]:
            return solve(d, e, b)[0]
    else:
        factor, solve = get_lapack_funcs(("pbtrf", "pbtrs"), (band,))
        lower, info = factor(band, lower=1)
        kind = "banded"

        def run(b: NDArray[Any]) -> NDArray[Any]:
            return solve(lower, b, lower=1)[0]

    if info != 0:
        return None
    if order is None:
        return SparseFactor(kind, run)

    def ordered(b: NDArray[Any]) -> NDArray[Any]:
        x = np.empty_like(b)
        x[order] = run(b[order])
        return x

    return SparseFactor(kind, ordered)


def _superlu(matrix: SparseMatrix, shift: float) -> SparseFactor | None:
    from scipy.sparse import csc_array
    from scipy.sparse.linalg import splu

    pattern = matrix.pattern
    data = matrix.data.detach().cpu().numpy().copy()
    data[pattern.diagonal] += shift
    if not bool((data[pattern.diagonal] > 0).all()):
        return None
    columns = csc_array((data, pattern.indices, pattern.indptr), shape=tuple(matrix.shape))
    try:
        factors = splu(columns, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    except RuntimeError as error:
        if "singular" not in str(error):
            raise
        return None
    # A pivot off the diagonal is taken only where the one on it has become zero.
    if not np.array_equal(factors.perm_r, factors.perm_c) or not bool((factors.U.diagonal() > 0).all()):
        return None
    return SparseFactor("SuperLU", factors.solve)
