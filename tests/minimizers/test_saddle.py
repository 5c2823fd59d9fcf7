"""A saddle is not taken for a minimum, and is left along its negative curvature."""

from __future__ import annotations

import math

import pytest
import torch

import hesse
from hesse.minimizers.methods import METHODS
from hesse.minimizers.result import Status
from hesse.minimizers.saddle import leave, lowest
from minimizers.points import Fun, point, quadratic, symmetric, vector

SECOND = ["auto", *(name for name in METHODS if name != "gd"), "prox-newton"]


@pytest.mark.parametrize("n", [1, 2, 10, 25])
def test_the_least_eigenvalue_and_its_vector_are_found(n: int) -> None:
    w = torch.linspace(-1, 5, n, dtype=torch.float64) if n > 1 else vector(-1.0)
    H = symmetric(n, 0, eigenvalues=w)
    value, v = lowest(point(quadratic(H, torch.zeros(n).double()), torch.zeros(n).double()))
    assert value == pytest.approx(-1, rel=1e-6)
    torch.testing.assert_close(H @ v, -v, rtol=1e-5, atol=1e-6)


def test_of_many_variables_negative_curvature_shows_in_few_products() -> None:
    w = torch.linspace(0, 5, 300, dtype=torch.float64)
    w[0] = -3
    p = point(lambda x: 0.5 * (w * x) @ x, torch.zeros(300).double())
    assert lowest(p)[0] < -2.9
    assert p.function.counts.nhvp <= 30


@pytest.mark.parametrize("w", [(1.0, 2.0), (0.0, 1.0), (0.0, 0.0), (-1e-12, 1.0)])
def test_a_minimum_has_none_and_rounding_is_none(w: tuple[float, float]) -> None:
    p = point(lambda x: 0.5 * (vector(*w) * x) @ x, vector(0, 0))
    assert lowest(p)[0] >= 0
    assert leave(p, Status.CONVERGED)[0] == Status.CONVERGED


def test_leaving_goes_to_a_lower_point() -> None:
    p = point(lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2, vector(0, 0))
    status, advance = leave(p, Status.CONVERGED)
    assert status is None
    assert advance.point is not None
    assert advance.point.value < p.value


def test_curvature_that_the_values_do_not_show_is_a_saddle_without_a_way_out() -> None:
    p = point(lambda x: x.square().sum(), vector(0, 0), jac=lambda x: -2 * x, hess=lambda x: -2 * torch.eye(2).double())
    assert leave(p, Status.CONVERGED)[0] == Status.SADDLE


def _network(x: torch.Tensor) -> torch.Tensor:
    t = torch.linspace(-1, 1, 9, dtype=torch.float64)
    return (torch.outer(t, x[:2]).tanh() @ x[2:] - (2 * t).tanh()).square().sum()


SADDLES: dict[str, tuple[Fun, torch.Tensor, float]] = {
    "two wells": (lambda x: x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2, vector(0, 0), -0.25),
    "maximum": (lambda x: x.cos().sum(), vector(0, 0), -2),
    "away from zero": (lambda x: (x - 7).cos().sum(), vector(7, 7, 7), -3),
    "monkey": (lambda x: x[0] ** 3 - 3 * x[0] * x[1] ** 2 + (x**4).sum() - x[0] ** 2, vector(0, 0), -math.inf),
    "maximum near zero": (lambda x: x.cos().sum(), vector(1e-13, 1e-13), -2),
    "large units": (lambda x: (x / 1e6).cos().sum(), vector(0, 0), -2),
    "symmetric network": (_network, vector(0, 0, 0, 0), -math.inf),
}


@pytest.mark.parametrize("method", SECOND)
@pytest.mark.parametrize("name", SADDLES)
def test_every_method_leaves_a_stationary_point_that_is_no_minimum(name: str, method: str) -> None:
    fun, x0, least = SADDLES[name]
    result = hesse.minimize(fun, x0, method=method)
    assert result.success, result.message
    assert result.fun < float(fun(x0))
    w = torch.linalg.eigvalsh(torch.autograd.functional.hessian(fun, result.x))
    assert float(w[0]) >= -1e-6 * float(w.abs().max())
    if math.isfinite(least):
        assert result.fun == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("method", ["gd", *SECOND])
@pytest.mark.parametrize("power", [2, 4])
def test_a_saddle_that_is_reached_without_a_slope_along_the_way_out_is_left_too(method: str, power: int) -> None:
    # The gradient on the axis, and all that products make of it, have no part along the way out.
    result = hesse.minimize(lambda x: x[0] ** 2 + x[0] ** power + (x[1] ** 2 - 1) ** 2, vector(3, 0), method=method)
    assert result.success
    assert result.fun == pytest.approx(0, abs=1e-8)
    assert abs(float(result.x[1])) == pytest.approx(1, abs=1e-4)
