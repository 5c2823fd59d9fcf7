"""Symmetric matrices with a given spectrum, and operators that count what they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from hesse.linalg import LinearOperator


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these eigenvalues and random eigenvectors, symmetric to the last digit."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    M = (Q * eigenvalues.double()) @ Q.T
    return 0.5 * (M + M.T)


class Counted(LinearOperator):
    """The operator of a dense matrix, with the number of columns multiplied and of the calls they came in."""

    def __init__(self, matrix: Tensor, *, symmetric: bool = True, psd: bool = False) -> None:
        super().__init__(self._apply, len(matrix), dtype=matrix.dtype, symmetric=symmetric, psd=psd)
        self.matrix = matrix
        self.columns = self.calls = 0

    def _apply(self, columns: Tensor) -> Tensor:
        self.columns += columns.shape[1]
        self.calls += 1
        return self.matrix @ columns


def counted(eigenvalues: Tensor, dtype: torch.dtype = torch.float64, *, psd: bool = False) -> Counted:
    return Counted(symmetric(eigenvalues).to(dtype), psd=psd)


N = 240


def _bulk(size: int, scale: float) -> Tensor:
    """Many small values with heavy tails, as below the outliers of a network's Hessian."""
    return scale * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) ** 3


# Eigenvalues that differ in what makes them hard.
SPECTRA: dict[str, Tensor] = {
    "network": torch.cat([torch.tensor([20.0, 12, 9, 7, 5, 4, 3, 2.5, 2]), _bulk(N - 9, 0.02)]),
    "network, psd": torch.cat([torch.tensor([20.0, 12, 9, 7, 5, 4, 3, 2.5, 2]), _bulk(N - 9, 0.02).abs()]),
    "zipf": 1 / (1 + torch.arange(N, dtype=torch.float64)),
    "geometric": 10 * 0.9 ** torch.arange(N, dtype=torch.float64),
    "low rank": torch.cat([torch.tensor([3.0, 2, 1, -0.5]), torch.zeros(N - 4)]),
    "both ends": torch.cat([torch.tensor([8.0, 5, 3, -4, -6]), _bulk(N - 5, 0.02)]),
    "identity": torch.ones(N),
    "zero": torch.zeros(N),
    # Ten classes of a linear model under squared error: every eigenvalue as often as there are classes.
    "copies": torch.cat([torch.tensor([9.0, 6, 4]).repeat_interleave(4), torch.linspace(0, 1, N - 12)]),
    # One Ritz value stands between several of these for many steps.
    "crowded": torch.cat([torch.tensor([10.0, 5, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4]), _bulk(N - 8, 0.02)]),
}
