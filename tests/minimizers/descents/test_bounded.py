"""Projected Newton against all faces of a box, Hock and Schittkowski's optima and SciPy; and every corner of a box."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, minimize
from torch import Tensor

from composite_runs import CURVATURES, kkt, minimized
from hesse.minimizers.descents.bounded import LowRank
from tolerances import ALGEBRA

INF = math.inf


def enumerated(H: Tensor, g: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The minimiser of a convex quadratic in a box: the best feasible one of all faces."""
    best, where = INF, low
    for face in product((-1, 0, 1), repeat=len(g)):
        at = torch.tensor(face)
        x = torch.where(at < 0, low, torch.where(at > 0, high, 0.0))
        free = (at == 0).nonzero()[:, 0]
        if not bool(x.isfinite().all()):
            continue
        x[free] = torch.linalg.solve(H[free][:, free], -(g + H @ x)[free])
        value = float(g @ x + 0.5 * x @ H @ x)
        if bool(((x >= low) & (x <= high)).all()) and value < best:
            best, where = value, x
    return where


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_a_quadratic_in_a_box_is_the_best_of_all_faces(n: int, curvature: str) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        A = torch.randn(n + 1, n).double()
        H, g = A.T @ A + 0.05 * torch.eye(n), 2 * torch.randn(n).double()
        low, high = -torch.rand(n).double(), torch.rand(n).double()
        low[::3] = -INF
        found, status, _ = minimized(
            lambda x, H=H, g=g: g @ x + 0.5 * x @ H @ x,
            torch.zeros(n).double(),
            bounds=(low.tolist(), high.tolist()),
            curvature=curvature,
            rtol=1e-15,
        )
        closed = enumerated(H, g, low, high)
        assert status.success
        torch.testing.assert_close(found.x, closed, atol=1e-9 if curvature == "hessian" else 1e-5, rtol=0)
        # On a bound is on the bound, not beside it.
        assert found.x.eq(low).tolist() == closed.eq(low).tolist()
        assert found.x.eq(high).tolist() == closed.eq(high).tolist()


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    first = 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
    return first + 10.1 * ((b - 1) ** 2 + (d - 1) ** 2) + 19.8 * (b - 1) * (d - 1)


Problem = tuple[Callable[[Tensor], Tensor], list[float], list[float], list[float], float]

# Hock and Schittkowski, Test Examples for Nonlinear Programming Codes, 1981: function, start, bounds, best value. In 2
# the start leads to the second of two minima, at the least root of 400 x^3 - 598 x - 2 = 0.
PROBLEMS: dict[str, Problem] = {
    "HS1": (rosenbrock, [-2, 1], [-INF, -1.5], [INF, INF], 0.0),
    "HS2": (rosenbrock, [-2, 1], [-INF, 1.5], [INF, INF], 4.941229317989185),
    "HS3": (lambda x: x[1] + 1e-5 * (x[1] - x[0]) ** 2, [10, 1], [-INF, 0], [INF, INF], 0.0),
    "HS4": (lambda x: (x[0] + 1) ** 3 / 3 + x[1], [1.125, 0.125], [1, 0], [INF, INF], 8 / 3),
    "HS5": (
        lambda x: (x[0] + x[1]).sin() + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1,
        [0, 0],
        [-1.5, -3],
        [4, 3],
        -math.sqrt(3) / 2 - math.pi / 3,
    ),
    "HS38": (wood, [-3, -1, -3, -1], [-10] * 4, [10] * 4, 0.0),
    "HS45": (lambda x: 2 - x.prod() / 120, [2] * 5, [0] * 5, [1, 2, 3, 4, 5], 1.0),
    "HS110": (
        lambda x: ((x - 2).log() ** 2 + (10 - x).log() ** 2).sum() - x.prod() ** 0.2,
        [9] * 10,
        [2.001] * 10,
        [9.999] * 10,
        -45.77846970744629,
    ),
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_hock_and_schittkowskis_problems_are_solved(name: str, curvature: str) -> None:
    fun, start, low, high, best = PROBLEMS[name]
    point, status, state = minimized(fun, [float(v) for v in start], bounds=(low, high), curvature=curvature)
    assert status.success
    assert point.value == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert len(state.trace) <= (45 if curvature != "l-bfgs" else 200)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_bounded_valley_ends_where_scipy_ends(curvature: str) -> None:
    n = 20
    point, status, state = minimized(rosenbrock, [-1.0] * n, bounds=(-1.5, 0.8), curvature=curvature)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.from_numpy(x)
        return float(rosenbrock(leaf)), torch.func.grad(rosenbrock)(leaf).numpy()

    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000}
    theirs = minimize(value, -np.ones(n), jac=True, method="L-BFGS-B", bounds=Bounds(-1.5, 0.8), options=options)
    assert status.success
    assert point.value == pytest.approx(theirs.fun, rel=1e-10)
    np.testing.assert_allclose(point.x.numpy(), theirs.x, atol=1e-5)
    assert state.trace[-1].nfev <= theirs.nfev


@pytest.mark.parametrize("curvature", ["hessian", "products"])
def test_a_concave_function_ends_in_a_corner(curvature: str) -> None:
    torch.manual_seed(0)
    A = torch.randn(6, 6).double()
    g = torch.randn(6).double()
    point, status, _ = minimized(
        lambda x: g @ x - 0.5 * ((A @ x) ** 2).sum(), [0.0] * 6, bounds=(-1.0, 2.0), curvature=curvature
    )
    assert status.success
    assert bool((point.x.eq(-1) | point.x.eq(2)).all())
    assert kkt(point) == 0


@pytest.mark.parametrize("curvature", ["hessian", "products"])
@pytest.mark.parametrize(
    ("fun", "best"),
    [
        (lambda x: -(x**2).sum(), -3.0),  # a maximum on bounds with no force
        (lambda x: -x[0] * x[1] + x[2] ** 2, -1.0),  # down along a diagonal alone
        (lambda x: x[0] * x[1] + x[2] ** 2, 0.0),  # negative curvature, but out of the box
        (lambda x: x[0] ** 2 + x[1] ** 2 + x[2] ** 2, 0.0),  # a minimum with multipliers of zero
    ],
)
def test_curvature_counts_where_x_may_go(fun: Callable[[Tensor], Tensor], best: float, curvature: str) -> None:
    point, status, _ = minimized(fun, [0.0] * 3, bounds=(0.0, 1.0), curvature=curvature)
    assert status.success
    assert point.value == best


@pytest.mark.parametrize("curvature", ["hessian", "products"])
def test_a_saddle_between_bounds_is_left(curvature: str) -> None:
    point, status, _ = minimized(
        lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 - x[2], [0.0] * 3, bounds=(-2.0, 2.0), curvature=curvature
    )
    assert status.success
    torch.testing.assert_close(point.x.abs(), torch.tensor([0, 0.5**0.5, 2], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_fixed_variables_stay_and_the_others_are_solved(curvature: str) -> None:
    low, high = [0.25, -INF, 0.5], [0.25, INF, 0.5]
    point, status, _ = minimized(
        lambda x: ((x - torch.tensor([1.0, 2.0, 3.0])) ** 2).sum() + x[0] * x[1],
        [0.0] * 3,
        bounds=(low, high),
        curvature=curvature,
    )
    assert status.success
    torch.testing.assert_close(point.x, torch.tensor([0.25, 1.875, 0.5], dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_start_where_nothing_may_move_is_the_end(curvature: str) -> None:
    point, status, state = minimized(lambda x: x.exp().sum(), [-5.0] * 3, bounds=(0.0, 1.0), curvature=curvature)
    assert status.success
    assert len(state.trace) == 1
    assert not bool(point.x.any())


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_minimum_on_a_bound_with_no_force_is_found(curvature: str) -> None:
    point, status, _ = minimized(lambda x: (x.exp() - x).sum(), [0.5, 3.0], bounds=(0.0, INF), curvature=curvature)
    assert status.success
    assert point.value == pytest.approx(2, abs=1e-9)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_l1_and_bounds_together_are_soft_thresholding_then_clipping(curvature: str) -> None:
    aim = torch.tensor([3.0, 0.4, -0.4, -3.0, 1.2, 5.0], dtype=torch.float64)
    low, high = [-1.0, -1.0, -1.0, -1.0, -1.0, 0.1], [1.0, 1.0, 1.0, 1.0, 1.0, INF]
    point, _, _ = minimized(
        lambda x: 0.5 * ((x - aim) ** 2).sum(), [0.2] * 6, l1=0.5, bounds=(low, high), curvature=curvature
    )
    torch.testing.assert_close(point.x, torch.tensor([1, 0, 0, -1, 0.7, 4.5], dtype=torch.float64), **ALGEBRA)


def test_a_bound_is_hit_exactly_though_the_sum_of_x_and_step_is_not_it() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x, low = 10 * torch.rand(200, dtype=dtype) + 1, torch.rand(200, dtype=dtype)
        assert not bool((x + (low - x)).eq(low).all())  # or this proves nothing
        point, _, _ = minimized(lambda x: x.sum(), x, bounds=(low.tolist(), INF), rtol=1e-6)
        assert bool(point.x.eq(low).all())


def test_a_function_without_value_outside_of_the_box_is_never_asked_there() -> None:
    # The helper asserts that; here NaN would end the solve.
    point, status, _ = minimized(lambda x: (x.sqrt() + (1 - x).sqrt()).sum(), [0.3, 0.6], bounds=(1e-6, 1 - 1e-6))
    assert status.success
    assert point.x.tolist() == [1e-6, 1 - 1e-6]


@pytest.mark.parametrize("curvature", ["products", "l-bfgs"])
def test_thousands_of_variables_take_few_evaluations(curvature: str) -> None:
    # A membrane over an obstacle: half of the variables end on their bound.
    n = 1000
    load = torch.linspace(-1, 1, n, dtype=torch.float64) / n

    def energy(x: Tensor) -> Tensor:
        return 0.5 * ((x[1:] - x[:-1]) ** 2).sum() * 10 + 0.5 * (x**2).sum() * 0.01 - load @ x

    point, status, state = minimized(energy, [1.0] * n, bounds=(0.0, INF), curvature=curvature, rtol=1e-10)
    assert status.success
    assert kkt(point) < 1e-6
    assert 0.2 * n < int(point.x.eq(0).sum()) < 0.8 * n
    assert state.trace[-1].nfev <= (10 if curvature == "products" else 350)


def test_the_limited_memory_matrix_is_that_of_the_updates_one_by_one() -> None:
    torch.manual_seed(0)
    A = torch.randn(6, 6).double()
    S = torch.randn(3, 6).double()
    Y = S @ (A @ A.T + torch.eye(6))
    B = float(Y[-1] @ Y[-1] / (S[-1] @ Y[-1])) * torch.eye(6).double()
    for s, y in zip(S, Y, strict=True):
        B = B - torch.outer(B @ s, B @ s) / (s @ B @ s) + torch.outer(y, y) / (s @ y)
    known = LowRank(S, Y)
    v, free = torch.randn(6).double(), torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(known.times(v), B @ v, **ALGEBRA)
    direction = known.solve(free, v, 1e-10, 1)
    assert direction is not None
    torch.testing.assert_close(direction.p[free], -torch.linalg.solve(B[free][:, free], v[free]), **ALGEBRA)
    assert not bool(direction.p[~free].any())
