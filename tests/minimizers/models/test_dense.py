"""The model of a whole Hessian proposes what the textbook's dense formulas give, in any units and for any rank."""

from __future__ import annotations

import math

import pytest
import torch

from hesse.minimizers.models.dense import Dense, first_length
from minimizers.points import least_in_region, normal, promise, symmetric, vector
from tolerances import ALGEBRA

EPS = torch.finfo(torch.float64).eps


def dense(H: torch.Tensor, g: torch.Tensor, x: torch.Tensor | None = None) -> Dense:
    return Dense(H, g, torch.zeros_like(g) if x is None else x)


def test_of_a_convex_model_the_whole_step_is_newtons() -> None:
    H, g = symmetric(5, 0, eigenvalues=vector(1, 2, 3, 4, 5)), normal(5, 1)
    model = dense(H, g)
    newton = -torch.linalg.solve(H, g)
    torch.testing.assert_close(model.whole, newton, **ALGEBRA)
    assert model.lowest > 0
    assert model.length == pytest.approx(float(newton.norm()))
    assert model.predicted == pytest.approx(promise(H, g, newton))
    assert torch.equal(model.within(2 * model.length).s, model.whole)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("radius", [1e-3, 0.5, 20.0])
def test_the_step_in_a_region_is_that_of_bisection(seed: int, radius: float) -> None:
    H, g = symmetric(6, seed), normal(6, seed + 100)
    step = dense(H, g).within(radius)
    wanted = least_in_region(H, g, radius)
    torch.testing.assert_close(step.s, wanted, rtol=1e-6, atol=1e-8 * radius)
    assert step.predicted == pytest.approx(promise(H, g, step.s), rel=1e-9)
    assert step.length == pytest.approx(float(step.s.norm()), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sigma", [1e-3, 1.0, 1e4])
def test_the_cubic_step_is_a_stationary_point_with_enough_curvature(seed: int, sigma: float) -> None:
    H, g = symmetric(6, seed), normal(6, seed + 100)
    step = dense(H, g).cubed(sigma)
    shift = sigma * float(step.s.norm())
    torch.testing.assert_close(H @ step.s + shift * step.s, -g, rtol=1e-6, atol=1e-8)
    assert float(torch.linalg.eigvalsh(H)[0]) + shift >= -1e-10
    assert step.predicted == pytest.approx(promise(H, g, step.s), rel=1e-9)


def test_negative_curvature_is_told_and_has_no_promise() -> None:
    model = dense(symmetric(3, 0, eigenvalues=vector(-2, 1, 3)), normal(3, 1))
    assert model.lowest == pytest.approx(-2)
    assert model.predicted == math.inf


@pytest.mark.parametrize("seed", range(4))
def test_the_whole_step_goes_down_whatever_the_curvature(seed: int) -> None:
    H, g = symmetric(4, seed), normal(4, seed + 10)
    assert float(dense(H, g).whole @ g) < 0
    flat = dense(torch.zeros(4, 4, dtype=torch.float64), g)
    assert bool(flat.whole.isfinite().all())
    assert float(flat.whole @ g) < 0


def test_a_slope_where_nothing_curves_has_no_promise_but_a_length() -> None:
    model = dense(torch.diag(vector(0, 2)), vector(1, 1))
    assert model.predicted == math.inf
    assert 0 < model.length < math.inf
    step = model.within(3.0)
    assert float(step.s.norm()) == pytest.approx(3)
    assert step.predicted > 0


def test_of_a_rank_deficient_model_newtons_step_stays_in_the_directions_that_curve() -> None:
    A = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H, x = A.T @ A, normal(6, 3)
    g = H @ x
    model = dense(H, g, x)
    torch.testing.assert_close(model.whole, -torch.linalg.pinv(H) @ g, rtol=1e-6, atol=1e-8)
    assert model.lowest == 0
    assert model.predicted == pytest.approx(0.5 * float(x @ g), rel=1e-6)


def test_a_minimum_that_is_a_line_is_a_minimum() -> None:
    # f = (|x| - 1)^2 / 2 at the circle: one flat direction, its gradient and curvature rounding.
    x = vector(0.6, 0.8)
    model = dense(torch.outer(x, x) + 1e-17 * torch.eye(2).double(), 1e-16 * x.flip(0), x)
    assert model.lowest == 0
    assert model.predicted <= 1e-30


@pytest.mark.parametrize("units", [1e-6, 1e-2, 1e4, 1e8])
def test_in_other_units_of_each_variable_the_newton_step_is_the_same_move(units: float) -> None:
    H, g = symmetric(3, 0, eigenvalues=vector(1, 2, 3)), normal(3, 1)
    D = torch.diag(vector(1, units, units**-1))
    plain, scaled = dense(H, g).whole, dense(D @ H @ D, D @ g).whole
    torch.testing.assert_close(D @ scaled, plain, rtol=1e-8, atol=0)


def test_curvatures_that_differ_by_sixteen_decades_are_definite_if_the_units_explain_it() -> None:
    model = dense(torch.diag(vector(1e-10, 1e10)), vector(1e-10, 1e10))
    assert model.lowest > 0
    torch.testing.assert_close(model.whole, vector(-1, -1), **ALGEBRA)


def test_a_pivot_of_rounding_is_not_curvature() -> None:
    H = torch.ones(2, 2, dtype=torch.float64)
    H[1, 1] += EPS
    model = dense(H, vector(1, -1))  # a slope along (1, -1), in which there is no curvature
    assert model.predicted > 1e10  # nothing that a solve would end on
    assert float(model.within(1.0).s.norm()) == pytest.approx(1)


def test_single_precision_is_solved_in_double_and_returned_in_single() -> None:
    H, g = symmetric(4, 0, eigenvalues=vector(1, 10, 100, 1000)), normal(4, 1)
    model = dense(H.float(), g.float())
    assert model.whole.dtype == torch.float32
    assert model.within(0.1).s.dtype == torch.float32
    assert model.cubed(1.0).s.dtype == torch.float32
    torch.testing.assert_close(model.whole.double(), -torch.linalg.solve(H, g), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-150, 1e-12, 1e12, 1e150])
def test_scaling_the_function_scales_the_promise_and_no_step(scale: float) -> None:
    H, g = symmetric(4, 3), normal(4, 1)
    one, other = dense(H, g), dense(scale * H, scale * g)
    assert other.length == pytest.approx(one.length, rel=1e-8)
    a, b = one.within(0.3), other.within(0.3)
    torch.testing.assert_close(a.s, b.s, rtol=1e-7, atol=1e-12)
    assert b.predicted / scale == pytest.approx(a.predicted, rel=1e-7)


def test_the_first_length_is_newtons_or_what_magnitudes_of_curvature_make_of_it() -> None:
    assert first_length(vector(2, 4), vector(2, 0)) == 1
    assert first_length(vector(-2, 4), vector(2, 0)) == 1
    assert first_length(vector(-1e-9, 1), vector(1, 0)) == pytest.approx(1e3)  # small ones count as a thousandth
    assert first_length(vector(0, 0), vector(3, 4)) == 5
