"""Damped inverses and the two-dimensional solve, against dense float64 linear algebra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesse.linalg import damped_inverse, solve_psd
from tolerances import ROUNDING


def factor(n: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A second moment of ``rank`` rows, [n, n]: what layers hand in."""
    rows = torch.randn(rank, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n + rank))
    return (rows.T @ rows / rank).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (6, 12), (6, 2)])
@pytest.mark.parametrize("damping", [10.0, 0.1])
def test_damped_inverse_inverts(n: int, rank: int, damping: float, dtype: torch.dtype) -> None:
    matrix = factor(n, rank, dtype)
    inverse = damped_inverse(matrix, damping)
    assert inverse is not None
    assert inverse.dtype == dtype
    expected = torch.linalg.inv(matrix.double() + damping * torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(inverse.double(), expected, **ROUNDING[dtype])


def test_a_float32_factor_of_low_rank_inverts_at_a_damping_that_float32_cannot_see() -> None:
    matrix = 1e4 * factor(20, 3, torch.float32)
    damped = matrix.double() + 1e-2 * torch.eye(20, dtype=torch.float64)
    expected = torch.linalg.inv(damped)

    def error(inverse: Tensor) -> float:
        return float((inverse.double() - expected).abs().max() / expected.abs().max())

    inverse = damped_inverse(matrix, 1e-2)
    assert inverse is not None
    assert error(inverse) < 1e-6  # stored in float32; the condition of 1e6 costs float64 only 1e-10
    assert error(torch.linalg.inv(damped.float())) > 1e-3


def test_damped_inverse_of_a_diagonal() -> None:
    diagonal = torch.tensor([0.0, 3.0])
    assert torch.equal(damped_inverse(diagonal, 1.0), torch.tensor([1.0, 0.25]))
    assert torch.equal(diagonal, torch.tensor([0.0, 3.0]))


def test_the_matrix_given_is_kept() -> None:
    matrix = factor(4, 4)
    kept = matrix.clone()
    damped_inverse(matrix, 1.0)
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -2.0])
@pytest.mark.parametrize("shape", ["diagonal", "on the diagonal", "off the diagonal"])
def test_what_has_no_inverse_gives_none(bad: float, shape: str) -> None:
    matrix = torch.ones(3) if shape == "diagonal" else torch.eye(3)
    if shape == "off the diagonal":
        matrix[0, 2] = matrix[2, 0] = 3 * bad
    else:
        matrix.view(-1)[0] = bad
    assert damped_inverse(matrix, 1.0) is None


def test_an_inverse_too_large_for_the_dtype_gives_none() -> None:
    assert damped_inverse(torch.zeros(2, 2), 1e-40) is None


def psd(rank: int, k: int, stretch: tuple[float, ...]) -> Tensor:
    v = torch.randn(rank, k, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * torch.tensor(stretch)
    return v.T @ v


@pytest.mark.parametrize("stretch", [(1.0, 1.0), (1e-12, 1e9)])
def test_solve_psd_solves_though_the_directions_differ_by_decades(stretch: tuple[float, float]) -> None:
    m = psd(5, 2, stretch)
    x = torch.tensor([1.0 / stretch[0], -2.0 / stretch[1]], dtype=torch.float64)
    found = torch.tensor(solve_psd(m.tolist(), (m @ x).tolist()), dtype=torch.float64)
    torch.testing.assert_close(found / x, torch.ones(2, dtype=torch.float64))


def test_parallel_directions_share_the_step() -> None:
    m = [[2.0, 4.0], [4.0, 8.0]]  # the second direction is twice the first
    x = solve_psd(m, [2.0, 4.0])
    assert m[0][0] * x[0] + m[0][1] * x[1] == pytest.approx(2.0, rel=1e-12)
    assert max(abs(c) for c in x) <= 1.0


def test_directions_parallel_up_to_rounding_get_no_huge_coefficients() -> None:
    # The two slopes disagree by float32 rounding; taken at its word the system answers with 1e3 and -1e3.
    assert solve_psd([[1.0, 1.0], [1.0, 1.0 + 1e-10]], [1.0, 1.0 + 1e-7]) == pytest.approx([0.5, 0.5], rel=1e-6)


@pytest.mark.parametrize(
    ("matrix", "rhs", "expected"),
    [
        ([[4.0]], [2.0], [0.5]),
        ([[0.0]], [1.0], [0.0]),
        ([[0.0, 0.0], [0.0, 2.0]], [1.0, 1.0], [0.0, 0.5]),
        ([[math.nan]], [1.0], [0.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [math.inf, 1.0], [0.0, 0.0]),
    ],
)
def test_no_curvature_and_no_number_give_no_step(
    matrix: list[list[float]], rhs: list[float], expected: list[float]
) -> None:
    assert solve_psd(matrix, rhs) == pytest.approx(expected)
