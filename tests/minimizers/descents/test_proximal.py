"""Proximal Newton finds the exact zeros and the coefficients that scikit-learn finds, and Newton's steps without L1."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression
from torch import Tensor
from torch.nn.functional import softplus

from composite_runs import CURVATURES, kkt, minimized
from hesse.minimizers.descents.proximal import Full
from hesse.minimizers.models.composite import Kinks, least
from hesse.minimizers.result import Status
from tolerances import ALGEBRA

Loss = Callable[[Tensor], Tensor]


def regression(rows: int, n: int) -> tuple[Tensor, Tensor, Loss]:
    """Correlated columns, a sparse truth and noise: A, y and the mean of half the squares."""
    torch.manual_seed(0)
    A = torch.randn(rows, n).double() + 0.7 * torch.randn(rows, 1).double()
    truth = torch.zeros(n).double()
    truth[: n // 4] = torch.linspace(-2, 2, n // 4).double()
    y = A @ truth + 0.5 * torch.randn(rows).double()
    return A, y, lambda x: 0.5 * ((A @ x - y) ** 2).mean()


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(("rows", "n", "l1"), [(60, 20, 0.05), (60, 20, 0.5), (30, 60, 0.1)])
def test_lasso_is_scikit_learns(rows: int, n: int, l1: float, curvature: str) -> None:
    A, y, loss = regression(rows, n)
    rtol = 1e-11 if curvature == "l-bfgs" else 1e-15
    point, status, _ = minimized(loss, [0.0] * n, l1=l1, curvature=curvature, hess=lambda x: A.T @ A / rows, rtol=rtol)
    theirs = Lasso(alpha=l1, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(A.numpy(), y.numpy()).coef_
    assert status.success
    # The last model promises less than rtol of the value; the root of that is the error of x.
    tolerance = {"hessian": 1e-9, "products": 1e-6, "l-bfgs": 1e-4}[curvature]
    np.testing.assert_allclose(point.x.numpy(), theirs, atol=tolerance)
    assert kkt(point) < tolerance
    assert point.x.eq(0).tolist() == (theirs == 0).tolist()
    assert 0 < int(point.x.eq(0).sum()) < n


def test_an_elastic_net_is_scikit_learns() -> None:
    A, y, loss = regression(60, 20)
    point, _, state = minimized(loss, [1.0] * 20, l1=0.1, l2=0.3)
    theirs = ElasticNet(alpha=0.4, l1_ratio=0.25, fit_intercept=False, tol=1e-14, max_iter=100_000)
    np.testing.assert_allclose(point.x.numpy(), theirs.fit(A.numpy(), y.numpy()).coef_, atol=1e-9)
    assert len(state.trace) == 2  # a quadratic is its own model


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_large_weight_leaves_exact_zeros_alone(curvature: str) -> None:
    _, _, loss = regression(60, 20)
    point, status, _ = minimized(loss, [0.3] * 20, l1=50.0, curvature=curvature)
    assert status.success
    assert not bool(point.x.any())


def test_signs_are_crossed_where_the_solution_lies_on_the_other_side() -> None:
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    g = torch.tensor([3.0, -4.0], dtype=torch.float64)
    point, _, _ = minimized(lambda x: g @ x + 0.5 * x @ H @ x, [5.0, -7.0], l1=0.5)
    closed = torch.linalg.solve(H, -g - 0.5 * torch.tensor([-1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(point.x, closed, **ALGEBRA)


@cache
def cancer() -> tuple[Tensor, Tensor]:
    X, y = load_breast_cancer(return_X_y=True)
    return torch.from_numpy((X - X.mean(0)) / X.std(0)), torch.from_numpy(2.0 * y - 1)


@cache
def digits() -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.from_numpy(X / 16), torch.from_numpy(2.0 * (y >= 5) - 1)


def logistic(X: Tensor, s: Tensor) -> tuple[Loss, Loss]:
    def loss(w: Tensor) -> Tensor:
        return softplus(-s * (X @ w)).sum()

    def hessian(w: Tensor) -> Tensor:
        p = torch.sigmoid(X @ w)
        return (X * (p * (1 - p))[:, None]).T @ X

    return loss, hessian


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(("data", "l1"), [(cancer, 1.0), (cancer, 20.0), (digits, 2.0)])
def test_logistic_regression_is_scikit_learns(
    data: Callable[[], tuple[Tensor, Tensor]], l1: float, curvature: str
) -> None:
    X, s = data()
    loss, hessian = logistic(X, s)
    n, tol = X.shape[1], 1e-8 if data is digits else 1e-10
    rtol = 1e-11 if curvature == "l-bfgs" else 1e-14
    point, status, state = minimized(loss, [0.0] * n, l1=l1, curvature=curvature, hess=hessian, rtol=rtol)
    theirs = LogisticRegression(
        l1_ratio=1.0, C=1 / l1, solver="liblinear", fit_intercept=False, tol=tol, max_iter=20_000, random_state=0
    )
    # liblinear never ends where it is asked for more digits of the digits.
    w = torch.from_numpy(theirs.fit(X.numpy(), s.numpy()).coef_[0])
    value = float(loss(w)) + l1 * float(w.abs().sum())
    assert status.success
    assert point.value <= value * (1 + (1e-9 if curvature == "l-bfgs" else 1e-10))
    # Of a Hessian to what is asked for; products leave a part of each model, and so does liblinear on the digits.
    atol = 1e-6 if curvature == "hessian" and data is cancer else 5e-6
    if curvature != "l-bfgs":  # gradients alone end where the value has no more digits, half of x's
        torch.testing.assert_close(point.x, w, atol=atol, rtol=0)
        assert len(state.trace) <= 16
        assert point.x.eq(0).tolist() == w.eq(0).tolist()


def test_the_last_steps_converge_quadratically() -> None:
    loss, hessian = logistic(*cancer())
    point, _, state = minimized(loss, [0.0] * 30, l1=1.0, hess=hessian, rtol=1e-15)
    sizes = [row.gradient for row in state.trace if row.gradient > 1e-8]
    # From one digit on each step doubles them, up to a constant that the first such pair gives.
    late = [size for size in sizes if size < 0.5]
    assert len(late) >= 2
    assert all(after < 0.3 * before**1.7 for before, after in pairwise(late))
    assert point.steepest() < 1e-7


def test_without_l1_the_steps_are_newtons() -> None:
    A, y, _ = regression(60, 20)

    def loss(x: Tensor) -> Tensor:
        return softplus(A @ x - y).sum() + 10 * (x @ x)

    _, _, state = minimized(loss, [0.0] * 20)
    x = torch.zeros(20, dtype=torch.float64)
    for row in list(state.trace)[1:6]:
        x = x - torch.linalg.solve(torch.func.hessian(loss)(x), torch.func.grad(loss)(x))
        assert row.fun == pytest.approx(float(loss(x)), rel=1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "products"])
def test_a_saddle_is_left_and_kinks_stay(curvature: str) -> None:
    # Down along y only; x sits on the kink, which its negative curvature does not outweigh.
    point, status, _ = minimized(
        lambda x: -0.5 * x[0] ** 2 + x[0] ** 4 + 3 * ((x[1] - 2) ** 2 - 1) ** 2 - 0.5 * x[1],
        [0.0, 2.0],
        l1=0.5,
        curvature=curvature,
    )
    assert status.success
    assert float(point.x[0]) == 0.0
    assert abs(float(point.x[1]) - 2) == pytest.approx(1, abs=1e-6)


def test_more_columns_than_rows_and_columns_of_zeros_are_no_negative_curvature() -> None:
    A, y, _ = regression(10, 40)
    A[:, ::7] = 0
    point, status, _ = minimized(lambda x: 0.5 * ((A @ x - y) ** 2).sum(), [1.0] * 40, l1=0.3)
    assert status.success
    assert kkt(point) < 1e-9
    assert not bool(point.x[::7].any())


def test_float32_reaches_its_own_precision() -> None:
    A, y, loss = regression(60, 20)
    exact, _, _ = minimized(loss, [0.0] * 20, l1=0.1)
    A, y = A.float(), y.float()
    point, status, _ = minimized(lambda x: 0.5 * ((A @ x - y) ** 2).mean(), torch.zeros(20), l1=0.1, rtol=1e-6)
    assert status.success
    assert point.x.dtype == torch.float32
    torch.testing.assert_close(point.x.double(), exact.x, atol=1e-4, rtol=0)
    assert point.x.eq(0).tolist() == exact.x.eq(0).tolist()


def test_an_unbounded_function_says_so() -> None:
    _, status, _ = minimized(lambda x: -2 * x.sum(), [1.0, 1.0], l1=1.0)
    assert status == Status.UNBOUNDED


def test_the_model_is_minimised_to_rounding_where_coordinate_descent_is_slow() -> None:
    # Columns that are almost the same: coordinate descent takes 1e5 sweeps here.
    torch.manual_seed(1)
    A = torch.randn(80, 1).double() + 1e-2 * torch.randn(80, 50).double()
    H, g = A.T @ A, -A.T @ torch.randn(80).double()
    end = torch.full((50,), math.inf, dtype=torch.float64)
    kinks = Kinks(0.2, -end, end)
    z = least(Full(H), g, torch.zeros(50, dtype=torch.float64), kinks, 1e-12).z
    assert float(kinks.least(z, g + H @ z).abs().max()) < 1e-10 * float(g.abs().max())
    assert 0 < int(z.eq(0).sum()) < 50


def test_a_cube_is_refused() -> None:
    point, _, _ = minimized(lambda x: (x**2).sum(), [1.0], l1=0.1)
    from hesse.minimizers.descents.proximal import Composite

    with pytest.raises(TypeError, match="prox-newton"):
        Composite(point, Full(point.hessian())).cubed(1.0)


def test_a_sweep_takes_each_coordinate_to_its_least_value() -> None:
    # Without coupling one sweep is the solution: soft thresholding, then clipping. H d is what it returns beside it.
    bends = torch.tensor([1.0, 2.0, 4.0, 1.0, 1.0], dtype=torch.float64)
    r = torch.tensor([-3.0, 3.0, 0.5, -0.5, -9.0], dtype=torch.float64)
    z, end = torch.zeros(5, dtype=torch.float64), torch.full((5,), 4.0, dtype=torch.float64)
    new, change = Full(bends.diag()).sweep(z, r, Kinks(1.0, -end, end), 1)
    assert new.tolist() == [2.0, -1.0, 0.0, 0.0, 4.0]
    torch.testing.assert_close(change, bends * new, **ALGEBRA)
