"""Sparse factors solve as dense ones do, and know whether the matrix is positive definite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hesse.linalg import banded
from hesse.linalg.banded import Pattern, SparseFactor, SparseMatrix
from tolerances import ROUNDING


def sparse(dense: Tensor) -> SparseMatrix:
    """The matrix with the places that are not zero, and the diagonal."""
    there = (dense != 0) | torch.eye(len(dense), dtype=torch.bool)
    rows, columns = there.nonzero().mT
    return SparseMatrix(Pattern.of(rows.numpy(), columns.numpy(), len(dense)), dense[there])


def band(n: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(n + width)
    full = torch.randn(n, n, generator=generator, dtype=torch.float64)
    full = full.tril().triu(-width)
    return full + full.T


def shuffled(matrix: Tensor) -> Tensor:
    order = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(1))
    return matrix[order][:, order]


def arrow(n: int) -> Tensor:
    matrix = torch.diag(torch.linspace(1, 2, n, dtype=torch.float64))
    matrix[0, 1:] = matrix[1:, 0] = torch.linspace(-1, 1, n - 1, dtype=torch.float64) / n
    return matrix


def laplacian(m: int) -> Tensor:
    line = 2 * torch.eye(m, dtype=torch.float64) - torch.diag(torch.ones(m - 1, dtype=torch.float64), 1).mul(1)
    line = (line + line.T) / 2 - torch.diag(torch.ones(m - 1, dtype=torch.float64), -1) / 2
    line = (line + line.T) / 2
    one = torch.eye(m, dtype=torch.float64)
    return torch.kron(line, one) + torch.kron(one, line)


MATRICES = {
    "diagonal": band(9, 0),
    "tridiagonal": band(30, 1),
    "tridiagonal, shuffled": shuffled(band(30, 1)),
    "pentadiagonal": band(30, 2),
    "band 5, shuffled": shuffled(band(40, 5)),
    "arrow": arrow(30),
    "grid": laplacian(6),
    "one": band(1, 0),
}


@pytest.fixture(params=["as it is", "SuperLU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "SuperLU":
        monkeypatch.setattr(banded, "WIDEST", -1)
    return str(request.param)


@pytest.mark.parametrize("name", MATRICES)
def test_factors_solve_and_know_the_sign_of_the_least_eigenvalue(name: str, way: str) -> None:
    dense = MATRICES[name]
    matrix = sparse(dense)
    n = len(dense)
    least = float(torch.linalg.eigvalsh(dense)[0])
    for shift in (-least + 1.0, -least + 1e-6):
        factor = matrix.factor(shift)
        assert factor is not None
        assert factor.kind == "SuperLU" if way == "SuperLU" else factor.kind in ("diagonal", "tridiagonal", "banded")
        for b in (torch.linspace(-1, 1, n, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)):
            kept = b.clone()
            x = factor.solve(b)
            expected = torch.linalg.solve(dense + shift * torch.eye(n, dtype=torch.float64), b)
            # The condition at the second shift is 1e7 at most.
            torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
            assert torch.equal(b, kept)
    for shift in (-least - 1e-6, -least - 1.0, -1e3):
        assert matrix.factor(shift) is None


@pytest.mark.parametrize("name", MATRICES)
def test_products_diagonal_and_row_sums_are_the_dense_ones(name: str) -> None:
    dense = MATRICES[name]
    matrix = sparse(dense)
    n = len(dense)
    assert torch.equal(matrix.dense(), dense)
    assert torch.equal(matrix.diagonal(), dense.diagonal())
    torch.testing.assert_close(matrix.row_sums(), dense.abs().sum(1), **ROUNDING[torch.float64])
    for v in (torch.linspace(-1, 1, n, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)):
        torch.testing.assert_close(matrix @ v, dense @ v, **ROUNDING[torch.float64])


def test_the_band_is_narrowed_by_an_order() -> None:
    order, width = sparse(shuffled(band(40, 5))).pattern.band
    assert order is not None
    assert sorted(order.tolist()) == list(range(40))
    assert width < 12
    assert sparse(band(40, 5)).pattern.band[1] == 5


def test_a_band_that_stays_wide_goes_to_superlu() -> None:
    n = 500
    factor = sparse(arrow(n)).factor()
    assert factor is not None
    assert factor.kind == "SuperLU"
    b = torch.linspace(-1, 1, n, dtype=torch.float64)
    torch.testing.assert_close(factor.solve(b), torch.linalg.solve(arrow(n), b), **ROUNDING[torch.float64])


def test_float32_stays_float32() -> None:
    dense = band(30, 1).float()
    factor = sparse(dense).factor(10.0)
    assert factor is not None
    x = factor.solve(torch.ones(30))
    assert x.dtype == torch.float32
    expected = torch.linalg.solve(dense + 10 * torch.eye(30), torch.ones(30))
    torch.testing.assert_close(x, expected, **ROUNDING[torch.float32])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_factors(bad: float) -> None:
    dense = band(8, 1) + 10 * torch.eye(8, dtype=torch.float64)
    dense[4, 3] = dense[3, 4] = bad
    assert sparse(dense).factor() is None


def test_a_singular_matrix_has_no_factors(way: str) -> None:
    flat = torch.zeros(6, 6, dtype=torch.float64)
    assert sparse(flat).factor() is None
    pairs = torch.block_diag(*[torch.ones(2, 2, dtype=torch.float64)] * 3)
    assert sparse(pairs).factor() is None
    # Indefinite with a positive diagonal, and with a zero one, where a pivot off the diagonal would do.
    assert sparse(pairs - 0.5 * torch.eye(6, dtype=torch.float64)).factor() is None
    assert sparse(pairs - torch.eye(6, dtype=torch.float64)).factor() is None


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float32 or float64"):
        SparseFactor.of(sparse(band(4, 1).to(torch.bfloat16)))


def test_nothing_solves_to_nothing() -> None:
    empty = SparseMatrix(Pattern(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)), torch.zeros(0))
    factor = empty.factor()
    assert factor is not None
    assert factor.solve(torch.zeros(0)).shape == (0,)
