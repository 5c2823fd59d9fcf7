"""Solves by products alone, against torch.linalg.solve in float64, and what they say when there is no solution."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from hesse.linalg import LinearOperator, Solution, solve
from hesse.tree import Layout
from spectra import Counted, counted, symmetric

DTYPES = [torch.float64, torch.float32]
N = 120


def ones(n: int, k: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (n,) if k is None else (n, k)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


# Eigenvalues, whether they are declared psd, and a damping: together never singular.
SYSTEMS: dict[str, tuple[Tensor, bool, float]] = {
    "definite": (torch.linspace(1, 9, N), True, 0.0),
    "definite, damped": (torch.linspace(1, 9, N), True, 2.0),
    "definite, undeclared": (torch.linspace(1, 9, N), False, 2.0),
    "semidefinite, damped": (torch.cat([torch.linspace(1, 9, 20), torch.zeros(N - 20)]), True, 0.1),
    "indefinite": (torch.cat([torch.linspace(-5, -1, 40), torch.linspace(1, 9, 80)]), False, 0.0),
    "indefinite, damped": (torch.cat([torch.linspace(-5, -2, 40), torch.linspace(1, 9, 80)]), False, 1.0),
    "network": (torch.cat([torch.tensor([50.0, 20, 9]), torch.linspace(0, 0.1, N - 3)]), True, 0.1),
    "zero, damped": (torch.zeros(N), True, 3.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_solution_is_that_of_a_dense_solve(name: str, k: int | None, dtype: torch.dtype) -> None:
    values, psd, damping = SYSTEMS[name]
    A, b = counted(values, dtype, psd=psd), ones(N, k, dtype)
    rtol = 1e-8 if dtype == torch.float64 else 1e-4
    found = solve(A, b, damping=damping, rtol=rtol)
    assert (found.converged, found.status) == (True, "converged")
    assert found.x.shape == b.shape
    assert found.x.dtype == dtype
    damped = symmetric(values) + damping * torch.eye(N, dtype=torch.float64)
    residual = torch.linalg.vector_norm(b.double() - damped @ found.x.double(), dim=0)
    relative = float((residual / torch.linalg.vector_norm(b.double(), dim=0)).max())
    assert relative == pytest.approx(found.residual, rel=0.05, abs=1e-6 if dtype == torch.float32 else 1e-14)
    assert found.residual <= rtol
    condition = float((values + damping).abs().max() / (values + damping).abs().min())
    expected = torch.linalg.solve(damped, b.double())
    torch.testing.assert_close(found.x.double(), expected, rtol=0, atol=2 * rtol * condition * float(expected.norm()))
    assert found.steps == A.calls  # one block product a step, whatever the number of columns


def test_as_many_steps_as_distinct_eigenvalues() -> None:
    # Both methods are exact then, and one product more computes the true residual.
    values = torch.tensor([1.0, 2, 5]).repeat(N // 3)
    for psd, damping in ((True, 1.0), (False, 0.0)):
        found = solve(counted(values, psd=psd), ones(N), damping=damping, rtol=1e-10)
        assert (found.converged, found.steps) == (True, 4)


def test_columns_end_each_by_its_own_clock() -> None:
    values = torch.linspace(1, 100, N)
    A = counted(values, psd=True)
    vectors = torch.linalg.eigh(A.matrix).eigenvectors
    b = torch.stack([torch.zeros(N), vectors[:, 3], vectors[:, :5].sum(1), ones(N)], dim=1)
    found = solve(A, b, damping=1.0, rtol=1e-10)
    torch.testing.assert_close(found.x, torch.linalg.solve(A.matrix + torch.eye(N), b), rtol=0, atol=1e-9)
    assert torch.equal(found.x[:, 0], torch.zeros(N, dtype=torch.float64))
    alone = [solve(counted(values, psd=True), b[:, i], damping=1.0, rtol=1e-10).steps for i in range(4)]
    assert alone == sorted(alone)
    assert found.steps == alone[3] == A.calls
    # A column that has ended is not multiplied again, but for its true residual.
    assert A.columns == sum(alone[1:]) - 3 + 3


def test_the_columns_of_a_block_are_those_of_single_solves() -> None:
    A = counted(torch.cat([torch.linspace(-5, -1, 40), torch.linspace(1, 9, 80)]))
    b = ones(N, 3)
    block = solve(A, b, rtol=1e-9).x
    for i in range(3):
        torch.testing.assert_close(block[:, i], solve(A, b[:, i], rtol=1e-9).x, rtol=0, atol=1e-7)


@pytest.mark.parametrize("psd", [True, False])
def test_a_preconditioner_saves_steps(psd: bool) -> None:
    scale = torch.logspace(-2, 2, N, dtype=torch.float64)
    matrix = torch.diag(scale) + 0.1 * symmetric(torch.rand(N, generator=torch.Generator().manual_seed(0)))
    b = ones(N)
    made = partial(Counted, matrix, psd=psd)
    plain = solve(made(), b, damping=0.1)
    inverse = LinearOperator.of(torch.diag(1 / (scale + 0.1)), psd=True)
    for preconditioner in (inverse, lambda r: r / (scale + 0.1)[:, None]):
        found = solve(made(), b, damping=0.1, preconditioner=preconditioner)
        assert found.converged
        assert found.residual <= 1e-6
        assert found.steps < plain.steps / 4
    exact = torch.linalg.inv(matrix + 0.1 * torch.eye(N, dtype=torch.float64))
    assert solve(made(), b, damping=0.1, preconditioner=LinearOperator.of(0.5 * (exact + exact.T))).steps <= 3


def test_a_singular_system_that_has_a_solution_is_solved() -> None:
    for psd in (True, False):
        A = counted(torch.cat([torch.linspace(1, 9, 30), torch.zeros(N - 30)]), psd=psd)
        b = A.matrix @ ones(N)
        found = solve(A, b, rtol=1e-9)
        assert found.converged
        torch.testing.assert_close(A.matrix @ found.x, b, rtol=0, atol=1e-8 * float(b.norm()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_system_without_a_solution_ends_at_least_squares(dtype: torch.dtype) -> None:
    A = counted(torch.cat([torch.linspace(1, 9, 30), torch.zeros(N - 30)]), dtype, psd=True)
    b = ones(N, dtype=dtype)
    found = solve(A, b, rtol=1e-6)
    assert not found.converged
    assert "least-squares" in found.status
    assert found.steps < 40
    best = torch.linalg.lstsq(
        symmetric(torch.cat([torch.linspace(1, 9, 30), torch.zeros(N - 30)])), b.double()[:, None]
    )
    left = b.double() - A.matrix.double() @ best.solution[:, 0]
    assert found.residual == pytest.approx(float(left.norm() / b.double().norm()), rel=1e-3)


def test_negative_curvature_of_an_operator_declared_psd_is_said() -> None:
    values = torch.cat([torch.linspace(-3, -1, 5), torch.linspace(1, 9, N - 5)])
    A = counted(values, psd=True)
    small = solve(A, ones(N), damping=0.5)
    assert not small.converged
    assert small.status.startswith("negative curvature")
    assert "declared psd, but has negative curvature" in small.status
    # Enough damping solves the system, and what was met on the way is still said.
    large = solve(A, ones(N), damping=5.0)
    assert large.converged
    assert "declared psd, but has negative curvature: v'Av / v'v = -" in large.status
    assert solve(counted(values), ones(N), damping=5.0).status == "converged"


def test_rounding_of_a_semidefinite_operator_is_not_taken_for_negative_curvature() -> None:
    values = torch.cat([torch.logspace(-3, 3, 40), torch.zeros(N - 40)])
    A = counted(values, torch.float32, psd=True)
    assert float(torch.linalg.eigvalsh(A.matrix)[0]) < 0
    found = solve(A, A.matrix @ ones(N, dtype=torch.float32), damping=1.0, rtol=1e-4)
    assert found.status == "converged"


def test_out_of_steps_is_an_answer() -> None:
    A = counted(torch.logspace(-6, 0, N), psd=True)
    found = solve(A, ones(N), damping=1e-8, max_steps=10)
    assert (found.converged, found.steps, A.calls) == (False, 10, 10)
    assert found.status.startswith("out of steps")
    assert 1e-6 < found.residual < math.inf
    assert float(found.x.norm()) > 0  # as far as it came
    left = ones(N) - (A.matrix + 1e-8 * torch.eye(N)) @ found.x
    assert found.residual == pytest.approx(float(left.norm() / ones(N).norm()), rel=1e-6)


def test_the_reported_residual_is_true_where_the_recursion_believes_better() -> None:
    A = counted(torch.logspace(-6, 0, N), torch.float32, psd=True)
    found = solve(A, ones(N, dtype=torch.float32), damping=1e-6, rtol=1e-5)
    assert not found.converged
    assert found.status.startswith(("rounding", "out of steps", "singular"))
    left = ones(N) - (A.matrix.double() + 1e-6 * torch.eye(N)) @ found.x.double()
    assert found.residual == pytest.approx(float(left.norm() / ones(N).norm()), rel=0.05)
    assert found.residual > 1e-5


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_nan_is_said(damping: float) -> None:
    matrix = torch.eye(N)
    matrix[3, 3] = math.nan
    found = solve(Counted(matrix, psd=True), torch.ones(N), damping=damping)
    assert not found.converged
    assert "not finite" in found.status
    assert math.isnan(found.residual)
    b = torch.ones(N, 3)
    b[0, 1] = math.inf
    found = solve(Counted(torch.eye(N), psd=True), b, damping=damping)
    assert "not finite" in found.status
    assert "(1 of 3 columns)" in found.status
    torch.testing.assert_close(found.x[:, [0, 2]], torch.full((N, 2), 1 / (1 + damping)))
    assert torch.equal(found.x[:, 1], torch.zeros(N))


def test_a_preconditioner_that_is_not_definite_is_said() -> None:
    for psd in (True, False):
        found = solve(counted(torch.linspace(1, 9, N), psd=psd), ones(N), damping=1.0, preconditioner=lambda r: -r)
        assert not found.converged
        assert found.status.startswith("the preconditioner is not positive definite")


def test_nothing_to_solve() -> None:
    A = counted(torch.linspace(1, 9, N), psd=True)
    zero = solve(A, torch.zeros(N))
    assert (zero.converged, zero.steps, zero.residual) == (True, 0, 0.0)
    assert torch.equal(zero.x, torch.zeros(N, dtype=torch.float64))
    none = solve(A, torch.zeros(N, 0))
    assert (none.converged, none.residual, none.x.shape) == (True, 0.0, (N, 0))


def test_named_tensors_come_as_they_went() -> None:
    layout = Layout({"weight": torch.Size([3, 2]), "bias": torch.Size([2])})
    matrix = symmetric(torch.linspace(1, 3, 8))
    A = LinearOperator.of(matrix, psd=True, layout=layout)
    b = layout.split(ones(8))
    found = A.solve(b, damping=1.0, rtol=1e-10)
    assert isinstance(found, Solution)
    assert isinstance(found.x, dict)
    assert {name: x.shape for name, x in found.x.items()} == layout.shapes
    expected = torch.linalg.solve(matrix + torch.eye(8), ones(8))
    torch.testing.assert_close(layout.flatten(found.x), expected, rtol=0, atol=1e-9)


def test_a_right_hand_side_with_a_graph_gives_a_detached_solution() -> None:
    b = ones(N).requires_grad_()
    assert not solve(counted(torch.linspace(1, 9, N), psd=True), b).x.requires_grad


def test_what_cannot_be_solved() -> None:
    A = counted(torch.linspace(1, 9, N), psd=True)
    with pytest.raises(TypeError, match="symmetric=True"):
        solve(LinearOperator.of(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), torch.ones(2))
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="damping must not be negative"):
            solve(A, ones(N), damping=bad)
    with pytest.raises(ValueError, match="got shape \\[7\\]"):
        solve(A, ones(7))
    with pytest.raises(TypeError, match=r"real tensor .* got torch.complex64"):
        solve(A, torch.ones(N, dtype=torch.complex64))
    with pytest.raises(TypeError, match="got list"):
        solve(A, [1.0] * N)
    with pytest.raises(ValueError, match="rtol=0"):
        solve(A, ones(N), rtol=0.0)
    with pytest.raises(ValueError, match="max_steps=0"):
        solve(A, ones(N), max_steps=0)
    assert A.calls == 0
