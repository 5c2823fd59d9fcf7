"""Solves by products against torch.linalg.solve, and what is said of those that cannot be done."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesse.linalg import LinearOperator, Solution, solve
from hesse.tree import Layout
from spectra import Counted, counted, symmetric

N = 60
DTYPES = [torch.float64, torch.float32]
RTOL = {torch.float64: 1e-10, torch.float32: 1e-4}

# Eigenvalues, whether they are declared psd, and the damping they are solved with.
PROBLEMS: dict[str, tuple[Tensor, bool, float]] = {
    "psd": (torch.linspace(0.5, 20, N), True, 0.0),
    "psd, damped": (torch.linspace(0, 20, N), True, 0.5),
    "psd, not declared": (torch.linspace(0, 20, N), False, 0.5),
    "indefinite": (torch.cat([torch.linspace(-8, -1, N // 2), torch.linspace(0.5, 10, N // 2)]), False, 0.0),
    "indefinite, damped": (torch.cat([torch.linspace(-8, -2, N // 2), torch.linspace(0, 10, N // 2)]), False, 0.7),
    "negative": (torch.linspace(-9, -1, N), False, 0.0),
    "low rank, damped": (torch.cat([torch.tensor([100.0, 30, 4]), torch.zeros(N - 3)]), True, 0.1),
    "identity": (torch.ones(N), True, 0.0),
    "zero, damped": (torch.zeros(N), True, 2.0),
}


def _random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(A: Counted, b: Tensor, found: Solution, damping: float, rtol: float, scale: float = 1.0) -> None:
    """Converged, right, and every claim kept."""
    assert isinstance(found.x, Tensor)
    assert (found.converged, found.status) == (True, "converged")
    assert found.steps == A.calls
    assert (found.x.dtype, found.x.shape) == (A.dtype, b.shape)
    M = A.matrix.double() + damping * torch.eye(len(A.matrix), dtype=torch.float64)
    b, x = b.to(A.dtype).double(), found.x.double()
    size = torch.linalg.vector_norm(b, dim=0)
    residual = float((torch.linalg.vector_norm(b - M @ x, dim=0) / size).max())
    rounding = 100 * torch.finfo(A.dtype).eps * scale
    assert found.residual <= rtol
    assert residual == pytest.approx(found.residual, rel=1e-3, abs=rounding)
    # x is off by the inverse of the matrix times the residual.
    off = torch.linalg.vector_norm(x - torch.linalg.solve(M, b), dim=0)
    assert bool((off <= (rtol + rounding) * size / torch.linalg.eigvalsh(M).abs().min()).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [None, 1, 4])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_solution_is_that_of_elimination(name: str, columns: int | None, dtype: torch.dtype) -> None:
    eigenvalues, psd, damping = PROBLEMS[name]
    A = counted(eigenvalues, dtype, psd=psd)
    b = (_random(N) if columns is None else _random(N, columns)).to(dtype)
    kept = b.clone()
    found = solve(A, b, damping=damping, rtol=RTOL[dtype])
    check(A, b, found, damping, RTOL[dtype])
    assert torch.equal(b, kept)
    assert A.columns <= A.calls * (columns or 1)


@pytest.mark.parametrize("psd", [True, False])
def test_as_many_products_as_eigenvalues_and_one_to_look(psd: bool) -> None:
    A = counted(torch.tensor([1.0, 4, 9]).repeat(20), psd=psd)
    found = solve(A, _random(N), damping=1e-3)
    check(A, _random(N), found, 1e-3, 1e-6)
    assert found.steps == 4


def test_each_column_stops_by_its_own_clock() -> None:
    A = counted(torch.linspace(1, 50, N), psd=True)
    easy = torch.linalg.eigh(A.matrix).eigenvectors[:, 0]
    for damping in (0.0, 1.0):
        A.calls = A.columns = 0
        b = torch.stack([easy, _random(N), torch.zeros(N, dtype=torch.float64)], dim=1)
        found = solve(A, b, damping=damping)
        assert found.converged
        assert isinstance(found.x, Tensor)
        torch.testing.assert_close(found.x[:, 0], easy / (1 + damping), rtol=0, atol=1e-6)
        assert torch.equal(found.x[:, 2], torch.zeros(N, dtype=torch.float64))
        # The first column is multiplied once and looked at, the last one not at all.
        assert A.columns == found.steps + 2


def test_a_loose_tolerance_is_cheaper() -> None:
    spent = [solve(counted(torch.linspace(0.1, 50, N)), _random(N), rtol=rtol).steps for rtol in (1e-1, 1e-4, 1e-8)]
    assert spent == sorted(set(spent))


def test_the_scale_of_the_right_hand_side_does_not_matter() -> None:
    for damping in (0.0, 1.0):
        A = counted(torch.linspace(0.5, 20, N), psd=True)
        ones, tiny, small = (solve(A, c * _random(N), damping=damping) for c in (1.0, 1e-30, 1e-3))
        assert ones.steps == tiny.steps == small.steps
        assert isinstance(ones.x, Tensor)
        assert isinstance(tiny.x, Tensor)
        torch.testing.assert_close(tiny.x * 1e30, ones.x, rtol=1e-6, atol=0)


# -- how b may come ----------------------------------------------------------------------------------------------


def test_named_tensors_come_back_by_name() -> None:
    layout = Layout({"weight": torch.Size([5, 10]), "bias": torch.Size([10])})
    M = symmetric(torch.linspace(0.5, 20, N))
    A = LinearOperator.of(M, psd=True, layout=layout)
    for b in (_random(N), _random(N, 2)):
        found = A.solve(dict(reversed(layout.split(b).items())), damping=0.5, rtol=1e-10)
        assert isinstance(found.x, dict)
        assert {name: list(value.shape[: len(layout.shapes[name])]) for name, value in found.x.items()} == {
            "weight": [5, 10],
            "bias": [10],
        }
        expected = torch.linalg.solve(M + 0.5 * torch.eye(N), b)
        torch.testing.assert_close(layout.flatten(found.x), expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(TypeError, match="no names"):
        LinearOperator.of(M).solve(layout.split(_random(N)))


def test_the_dtype_is_the_operators_and_no_graph_is_kept() -> None:
    b = _random(N).requires_grad_()
    for dtype, expected in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        A = LinearOperator.of(symmetric(torch.linspace(1, 3, N)).to(dtype), psd=True)
        found = A.solve(b, rtol=0.05)  # two digits are what bfloat16 products have
        assert isinstance(found.x, Tensor)
        assert found.converged
        assert (found.x.dtype, found.x.requires_grad) == (expected, False)


def test_nothing_to_solve() -> None:
    A = counted(torch.linspace(1, 3, N), psd=True)
    for b in (torch.zeros(N), torch.zeros(N, 3), torch.zeros(N, 0)):
        found = solve(A, b)
        assert isinstance(found.x, Tensor)
        assert (found.converged, found.residual, found.steps, found.x.shape) == (True, 0.0, 0, b.shape)
        assert not found.x.any()


# -- preconditioners ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_preconditioner_makes_it_cheaper_and_changes_nothing_else(dtype: torch.dtype, damping: float) -> None:
    scale = torch.logspace(-1, 0.5, N, dtype=torch.float64)
    M = scale[:, None] * symmetric(torch.linspace(0.5, 2, N)) * scale
    M = 0.5 * (M + M.T)
    inverse = (1 / (scale.square() + damping)).to(dtype)
    b = _random(N, 2).to(dtype)
    rtol = 1e-8 if dtype == torch.float64 else 1e-4
    plain = Counted(M.to(dtype), psd=True)
    alone = solve(plain, b, damping=damping, rtol=rtol)
    as_function, as_operator = Counted(M.to(dtype), psd=True), Counted(M.to(dtype), psd=True)
    function = solve(as_function, b, damping=damping, rtol=rtol, preconditioner=lambda r: inverse[:, None] * r)
    P = LinearOperator.of(inverse.diag(), psd=True)
    operator = solve(as_operator, b, damping=damping, rtol=rtol, preconditioner=P)
    for A, found in ((plain, alone), (as_function, function), (as_operator, operator)):
        check(A, b, found, damping, rtol, scale=float(torch.linalg.cond(M)))
    assert function.steps == operator.steps < alone.steps / 2


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_inverse_as_preconditioner_takes_one_product_and_one_to_look(damping: float) -> None:
    A = counted(torch.logspace(-2, 2, N), psd=True)
    inverse = torch.linalg.inv(A.matrix + damping * torch.eye(N))
    found = solve(A, _random(N), damping=damping, preconditioner=lambda r: inverse @ r)
    assert (found.converged, found.steps) == (True, 2)


def test_an_indefinite_operator_is_preconditioned_by_its_absolute_value() -> None:
    values = torch.cat([-torch.logspace(-1, 1, N // 2), torch.logspace(-1, 1, N // 2)])
    A = counted(values)
    inverse = symmetric(1 / values.abs())
    found = solve(A, _random(N), preconditioner=LinearOperator.of(inverse, psd=True))
    assert (found.converged, found.steps) == (True, 3)  # P A has the eigenvalues 1 and -1


def test_a_preconditioner_that_is_not_definite_is_said() -> None:
    A = counted(torch.linspace(1, 5, N), psd=True)
    found = solve(A, _random(N), damping=1.0, preconditioner=lambda r: -r)
    assert not found.converged
    assert found.status.startswith("the preconditioner is not positive definite")


# -- not converging is an answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_out_of_steps(steps: int, damping: float) -> None:
    A = counted(torch.logspace(-3, 2, N), psd=True)
    b = _random(N)
    found = solve(A, b, damping=damping, max_steps=steps)
    assert isinstance(found.x, Tensor)
    assert not found.converged
    assert found.status.startswith("out of steps")
    assert found.steps == A.calls == steps
    # What is said of the x reached is true of it.
    left = torch.linalg.vector_norm(b - A.matrix @ found.x - damping * found.x) / torch.linalg.vector_norm(b)
    assert float(left) == pytest.approx(found.residual, rel=1e-9)
    assert 1e-6 < found.residual < (1.0 if damping == 0 or steps == 1 else 10.0) + 1e-12  # it may rise under damping


def test_negative_curvature_in_an_operator_declared_psd() -> None:
    A = counted(torch.cat([torch.tensor([-5.0]), torch.linspace(1, 10, N - 1)]), psd=True)
    found = solve(A, _random(N), damping=1.0)
    assert not found.converged
    assert found.status.startswith("negative curvature")
    assert "declared psd" in found.status


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_negative_curvature_is_said_where_x_is_found_all_the_same(damping: float) -> None:
    A = counted(torch.cat([torch.tensor([-0.5]), torch.linspace(1, 10, N - 1)]), psd=True)
    b = torch.linalg.eigh(A.matrix).eigenvectors[:, 0]
    found = solve(A, b, damping=damping)
    assert isinstance(found.x, Tensor)
    assert found.converged
    assert found.status.endswith("v'Av / v'v = -0.5 was met")
    torch.testing.assert_close(found.x, b / (damping - 0.5), rtol=1e-6, atol=1e-9)
    declared = solve(LinearOperator.of(A.matrix, symmetric=True), b, damping=damping)
    assert declared.status == "converged"


@pytest.mark.parametrize("psd", [True, False])
def test_a_singular_operator_gives_least_squares(psd: bool) -> None:
    values = torch.cat([torch.zeros(5), torch.linspace(1, 10, N - 5)])
    A = counted(values, psd=psd)
    b = _random(N)
    found = solve(A, b)
    assert isinstance(found.x, Tensor)
    assert not found.converged
    assert found.status.startswith("singular")
    out_of_reach = torch.linalg.eigh(symmetric(values)).eigenvectors[:, :5].mT @ b.double()
    assert found.residual == pytest.approx(float(out_of_reach.norm() / b.norm()), rel=1e-4)
    assert float((A.matrix @ (b - A.matrix @ found.x)).norm()) < 1e-3 * float(b.norm())


def test_a_singular_operator_is_solved_where_b_can_be_reached() -> None:
    A = counted(torch.cat([torch.zeros(5), torch.linspace(-3, -1, 20), torch.linspace(1, 10, N - 25)]))
    b = A.matrix @ _random(N)
    found = solve(A, b, rtol=1e-9)
    assert isinstance(found.x, Tensor)
    assert found.converged
    torch.testing.assert_close(found.x, torch.linalg.pinv(A.matrix, rtol=1e-10) @ b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_more_digits_than_the_dtype_has(damping: float) -> None:
    found = solve(counted(torch.linspace(0.1, 10, N), torch.float32, psd=True), _random(N), damping=damping, rtol=1e-13)
    assert not found.converged
    assert found.status.startswith(("rounding", "singular"))
    assert found.residual < 1e-5  # and yet all there was to be had


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_a_product_that_is_not_finite_is_said(damping: float, bad: float) -> None:
    matrix = torch.eye(N)
    matrix[1, 1] = bad
    found = solve(LinearOperator.of(matrix, psd=True), torch.ones(N), damping=damping)
    assert not found.converged
    assert math.isnan(found.residual)
    assert "not finite" in found.status


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_a_bad_column_does_not_spoil_the_others(damping: float, bad: float) -> None:
    A = counted(torch.linspace(1, 10, N), psd=True)
    b = _random(N, 3)
    b[4, 1] = bad
    found = solve(A, b, damping=damping)
    assert isinstance(found.x, Tensor)
    assert not found.converged
    assert math.isnan(found.residual)
    assert "not finite" in found.status
    assert "(1 of 3 columns)" in found.status
    good = [0, 2]
    expected = torch.linalg.solve(A.matrix + damping * torch.eye(N), b[:, good])
    torch.testing.assert_close(found.x[:, good], expected, rtol=1e-4, atol=1e-6)


# -- what cannot be asked ----------------------------------------------------------------------------------------


def test_what_cannot_be_asked() -> None:
    A = counted(torch.linspace(1, 10, N), psd=True)
    b = _random(N)
    with pytest.raises(TypeError, match="symmetric=True"):
        solve(LinearOperator.of(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), torch.ones(2))
    for damping in (-1e-9, math.nan):
        with pytest.raises(ValueError, match=f"negative; got {damping}"):
            solve(A, b, damping=damping)
    for rtol in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"rtol={rtol}"):
            solve(A, b, rtol=rtol)
    with pytest.raises(ValueError, match="max_steps=0"):
        solve(A, b, max_steps=0)
    for shape in ((N + 1,), (2, N), (N, 1, 1), ()):
        with pytest.raises(ValueError, match=r"\[60\] or \[60, k\]; got shape"):
            solve(A, torch.ones(shape))
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        solve(A, torch.ones(N, dtype=torch.complex64))
    with pytest.raises(TypeError, match="got list"):
        solve(A, [1.0] * N)  # type: ignore[arg-type]
    assert A.calls == 0


def test_an_operator_is_shifted_the_other_way_as_the_message_says() -> None:
    A = counted(torch.linspace(1, 10, N), psd=True)
    b = _random(N)
    found = (A - 3.02 * LinearOperator.identity(A)).solve(b, rtol=1e-9)
    assert isinstance(found.x, Tensor)
    torch.testing.assert_close(found.x, torch.linalg.solve(A.matrix - 3.02 * torch.eye(N), b), rtol=1e-5, atol=1e-5)


# -- what float32 leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_system_without_a_solution_ends_at_least_squares(dtype: torch.dtype) -> None:
    A = counted(torch.cat([torch.linspace(1, 9, 30), torch.zeros(N - 30)]), dtype, psd=True)
    b = _random(N).to(dtype)
    found = solve(A, b, rtol=1e-6)
    assert not found.converged
    assert "least-squares" in found.status
    assert found.steps < 40
    best = torch.linalg.lstsq(
        symmetric(torch.cat([torch.linspace(1, 9, 30), torch.zeros(N - 30)])), b.double()[:, None]
    )
    left = b.double() - A.matrix.double() @ best.solution[:, 0]
    assert found.residual == pytest.approx(float(left.norm() / b.double().norm()), rel=1e-3)


def test_rounding_of_a_semidefinite_operator_is_not_taken_for_negative_curvature() -> None:
    values = torch.cat([torch.logspace(-3, 3, 40), torch.zeros(N - 40)])
    A = counted(values, torch.float32, psd=True)
    assert float(torch.linalg.eigvalsh(A.matrix)[0]) < 0
    found = solve(A, A.matrix @ _random(N).float(), damping=1.0, rtol=1e-4)
    assert found.status == "converged"


def test_the_reported_residual_is_true_where_the_recursion_believes_better() -> None:
    A = counted(torch.logspace(-6, 0, N), torch.float32, psd=True)
    found = solve(A, _random(N).float(), damping=1e-6, rtol=1e-5)
    assert not found.converged
    assert found.status.startswith(("rounding", "out of steps", "singular"))
    left = _random(N) - (A.matrix.double() + 1e-6 * torch.eye(N)) @ found.x.double()
    assert found.residual == pytest.approx(float(left.norm() / _random(N).norm()), rel=0.05)
    assert found.residual > 1e-5


def test_out_of_steps_gives_the_x_of_conjugate_gradients_whose_residual_may_have_grown() -> None:
    A = counted(torch.logspace(-6, 0, N), psd=True)
    found = solve(A, _random(N), damping=1e-8, max_steps=10)
    assert (found.converged, found.steps, A.calls) == (False, 10, 10)
    assert found.status.startswith("out of steps")
    assert 1e-6 < found.residual < math.inf
    assert float(found.x.norm()) > 0  # as far as it came
    left = _random(N) - (A.matrix + 1e-8 * torch.eye(N)) @ found.x
    assert found.residual == pytest.approx(float(left.norm() / _random(N).norm()), rel=1e-6)
