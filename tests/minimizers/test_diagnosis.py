"""Why nothing is lower is told apart: rounding, noise, a kink, a jump, a gradient of another function."""

from __future__ import annotations

import math

import pytest
import torch

from hesse.minimizers.descents.newton import Exact
from hesse.minimizers.descents.quasi_newton import Direction
from hesse.minimizers.diagnosis import diagnose
from hesse.minimizers.result import Status
from minimizers.points import Fun, point, rosenbrock, vector


def said(fun: Fun, x: torch.Tensor, **more: object) -> Status:
    p = point(fun, x, **more)
    return diagnose(p, Exact().model(p, {}))


def test_at_a_minimum_it_is_precision() -> None:
    assert said(rosenbrock, vector(1, 1)) == Status.PRECISION
    assert said(lambda x: 1e6 + rosenbrock(x), vector(1 + 1e-9, 1)) == Status.PRECISION


def test_noise_that_hides_the_rest_is_precision() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum() + 1e-4 * torch.randn((), generator=generator, dtype=x.dtype)

    assert said(noisy, vector(1e-3, 1e-3)) == Status.PRECISION


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_two_slopes_are_a_kink(scale: float) -> None:
    """At the bottom of a kink no step goes down, and autograd's gradient there is that of one side."""
    p = point(lambda x: scale * torch.maximum(2 * x, -3 * x).sum(), vector(1e-30))
    assert diagnose(p, Direction(-p.gradient(), -4.0 * scale**2, natural=False)) == Status.KINK


def test_a_jump_ahead_is_a_kink_and_not_noise() -> None:
    p = point(lambda x: x.square().sum() + 5 * (x[0] < 1), vector(1.0))
    assert diagnose(p, Direction(-p.gradient(), -4.0, natural=False)) == Status.KINK


@pytest.mark.parametrize("factor", [-1.0, 5.0, 0.1])
def test_another_slope_on_both_sides_is_a_wrong_gradient(factor: float) -> None:
    fun: Fun = lambda x: (x - 3).square().sum()  # noqa: E731
    p = point(fun, vector(1, 2), jac=lambda x: factor * 2 * (x - 3))
    assert diagnose(p, Direction(-p.gradient(), -1.0, natural=False)) == Status.WRONG_GRADIENT


def test_a_right_gradient_of_a_smooth_function_is_no_precision() -> None:
    """What a search should have found: neither rounding nor a kink explains it."""
    p = point(lambda x: (x - 3).square().sum(), vector(1, 2))
    assert diagnose(p, Direction(-p.gradient(), float(-p.gradient() @ p.gradient()), natural=False)) == Status.STALLED


def test_where_nothing_curves_and_all_slopes_are_clear_it_is_no_success() -> None:
    assert not said(lambda x: x[0].abs() + 2 * (x[1] - 1).abs(), vector(0.7, -1.3)).success


def test_it_costs_few_values() -> None:
    p = point(rosenbrock, vector(-1.2, 1))
    diagnose(p, Exact().model(p, {}))
    assert p.function.counts.nfev <= 40
    assert math.isfinite(p.value)


def test_in_single_precision_its_own_rounding_is_precision() -> None:
    assert said(lambda x: 1 + rosenbrock(x), torch.tensor([1.0001, 1.0002])) == Status.PRECISION
