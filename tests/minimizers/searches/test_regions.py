"""Regions shrink where the model was wrong and grow where it was right, and a refused step costs one value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesse.minimizers.descents.newton import Exact
from hesse.minimizers.method import Advance
from hesse.minimizers.models.dense import Step
from hesse.minimizers.searches.regions import Cubic, TrustRegion, attempt, shrink
from hesse.minimizers.state import scalar
from minimizers.points import Fun, point, rosenbrock, symmetric, vector

SEARCHES = [TrustRegion(), Cubic()]


def advance(search: TrustRegion | Cubic, fun: Fun, x: Tensor, **memory: float) -> tuple[Advance, int]:
    """One step, and the values that it took."""
    p = point(fun, x)
    model = Exact().model(p, {})
    before = p.function.counts.nfev
    return search.advance(p, model, {k: scalar(v) for k, v in memory.items()}), p.function.counts.nfev - before


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("x", [vector(-1.2, 1), vector(3, -4), vector(0, 0)])
def test_a_step_lowers_the_function(search: TrustRegion | Cubic, x: Tensor) -> None:
    found, _ = advance(search, rosenbrock, x)
    assert found.point is not None
    assert found.point.value < float(rosenbrock(x))
    assert found.size > 0


def test_of_a_quadratic_the_region_takes_newtons_step_at_once() -> None:
    H = symmetric(3, 0, eigenvalues=vector(1, 2, 3))
    found, values = advance(TrustRegion(), lambda x: 0.5 * (x - 1) @ H @ (x - 1), vector(5, -3, 40))
    assert found.point is not None
    torch.testing.assert_close(found.point.x, torch.ones(3).double())
    assert values == 1
    assert found.trust_ratio == pytest.approx(1)


def test_the_radius_doubles_where_the_model_was_right_and_halves_where_it_was_poor() -> None:
    right, _ = advance(TrustRegion(), lambda x: x.square().sum(), vector(8, 6), radius=2)
    assert right.trust_ratio == pytest.approx(1)
    assert float(right.memory["radius"]) == pytest.approx(4)
    # x^2 up to 1, then much flatter: half of what was promised is missing, and more.
    poor, values = advance(TrustRegion(), lambda x: torch.where(x > 4, x**2, 12 + x).sum(), vector(5.0), radius=5)
    assert values == 1
    assert 0 < poor.trust_ratio < 0.75
    assert float(poor.memory["radius"]) <= 5


@pytest.mark.parametrize("search", SEARCHES)
def test_a_refused_step_costs_one_value_and_no_derivative(search: TrustRegion | Cubic) -> None:
    p = point(lambda x: (x**4 - 3 * x**3 + 2).sum() + torch.where(x < 0.9, 1e3, 0.0).sum(), vector(1.0))
    model = Exact().model(p, {})
    c = p.function.counts
    before = c.nfev, c.njev, c.nhev
    found = search.advance(p, model, {"radius": scalar(1e3), "sigma": scalar(1e-9)})
    assert found.point is not None
    trials = c.nfev - before[0]
    assert trials > 1  # the first was refused
    assert (c.njev - before[1], c.nhev - before[2]) == (1, 0)  # the new point's gradient, which has to be finite


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_where_the_function_is_not_a_number_the_step_is_shortened(search: TrustRegion | Cubic, hole: float) -> None:
    # Newton's step for -log x - log(2 - x) from near an edge leaves the domain.
    found, values = advance(
        search,
        lambda x: torch.where(x > 0, x - x.clamp_min(1e-9).log(), hole).sum(),
        vector(5.0),
        radius=30,
        sigma=1e-12,
    )
    assert values > 1
    assert found.point is not None
    assert math.isfinite(found.point.value)
    assert found.point.value < 5 - math.log(5)


@pytest.mark.parametrize("search", SEARCHES)
def test_where_the_gradient_is_not_finite_the_step_is_shortened(search: TrustRegion | Cubic) -> None:
    # The square root is finite at 0, its derivative is not; Newton's step of x + 4 (x - 0.5)^2 - ... ends there.
    found, _ = advance(
        search, lambda x: (x.clamp_min(0).sqrt() + 2 * (x - 1) ** 2 - 0.5 * x).sum(), vector(3.0), radius=3, sigma=1e-12
    )
    assert found.point is not None
    assert found.point.finite()


@pytest.mark.parametrize("search", SEARCHES)
def test_a_step_to_minus_infinity_is_taken(search: TrustRegion | Cubic) -> None:
    found, _ = advance(
        search, lambda x: torch.where(x > 3, -math.inf, -(x**2)).sum(), vector(2.0), radius=10, sigma=1e-9
    )
    assert found.point is not None
    assert found.point.value == -math.inf


@pytest.mark.parametrize("search", SEARCHES)
def test_where_nothing_is_lower_no_point_is_returned(search: TrustRegion | Cubic) -> None:
    def kink(x: Tensor) -> Tensor:  # from 1, its minimum, with a gradient of 1
        return (x.detach() - 1).abs().sum() + (x - x.detach()).sum()

    found, values = advance(search, kink, vector(1.0))
    assert found.point is None
    assert values <= 61


def test_below_the_rounding_of_the_values_the_gradient_decides() -> None:
    # 1e10 + (x - 1)^2 at 1 + 1e-7: no digit of the value changes, the gradient falls to 0.
    p = point(lambda x: 1e10 + (x - 1).square().sum(), vector(1 + 1e-7))
    assert attempt(p, Step(vector(-1e-7), 1e-14, 1e-7))[0] is not None
    refused, ratio = attempt(p, Step(vector(1e-7), 1e-14, 1e-7))
    assert refused is None
    assert math.isnan(ratio)


def test_a_rise_is_refused_however_much_was_promised() -> None:
    p = point(lambda x: x.square().sum(), vector(1.0))
    refused, ratio = attempt(p, Step(vector(-3.0), 1.0, 3.0))
    assert refused is None
    assert ratio == pytest.approx(-3)
    assert attempt(p, Step(vector(-0.5), 0.0, 0.5))[1] == -math.inf  # a promise of nothing is none


def test_a_refused_step_is_shortened_to_the_bottom_of_the_parabola() -> None:
    p = point(lambda x: x.square().sum(), vector(1.0))
    step = Step(vector(-4.0), 1.0, 4.0)  # from 1 to -3: the bottom is a quarter of the way
    _, ratio = attempt(p, step)
    assert shrink(p, step, ratio) == pytest.approx(0.25)
    assert shrink(p, step, -math.inf) == 0.25
    assert shrink(p, Step(vector(-100.0), 1.0, 100.0), -9800.0) == 0.1  # not by more than tenfold at once


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("search", SEARCHES)
def test_scaling_the_function_changes_no_step(search: TrustRegion | Cubic, scale: float) -> None:
    one, _ = advance(search, rosenbrock, vector(-1.2, 1))
    other, _ = advance(search, lambda x: scale * rosenbrock(x), vector(-1.2, 1))
    assert one.point is not None and other.point is not None
    torch.testing.assert_close(one.point.x, other.point.x, rtol=1e-10, atol=0)
