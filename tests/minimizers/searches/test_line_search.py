"""A line search returns a point that satisfies the conditions that it is named for, or none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesse.minimizers.descents.quasi_newton import Direction
from hesse.minimizers.functions.function import Point
from hesse.minimizers.method import Advance
from hesse.minimizers.searches.line_search import Armijo, Fixed, Wolfe
from minimizers.points import Fun, point, rosenbrock, vector

SEARCHES = [Armijo(), Wolfe(), Wolfe(0.1)]


def search(how: Armijo | Wolfe | Fixed, p: Point, direction: Tensor, natural: bool = True) -> Advance:
    return how.advance(p, Direction(direction, float(p.gradient() @ direction), natural), {})


# f and a start, from which f falls to the right; more of More and Thuente's kind than of Rosenbrock's.
LINES: dict[str, tuple[Fun, float]] = {
    "parabola": (lambda x: (x - 1).square().sum(), 0.0),
    "far away": (lambda x: (x - 1e6).square().sum(), 0.0),
    "very near": (lambda x: (x - 1e-6).square().sum(), 0.0),
    "quartic": (lambda x: ((x - 2) ** 4).sum(), -3.0),
    "log barrier": (lambda x: (3 * x - x.clamp_min(1e-300).log() - (1 - x).log()).sum(), 0.001),
    "flat then steep": (lambda x: (-x / (x**2 + 2)).sum(), 0.0),
    "oscillating": (lambda x: (-0.1 * x + 0.3 * (5 * x).sin() + 0.05 * x**2).sum(), 0.5),
    "exponential": (lambda x: ((8 * x).exp() - 50 * x).sum(), 0.0),
}


@pytest.mark.parametrize("natural", [True, False])
@pytest.mark.parametrize("how", SEARCHES, ids=str)
@pytest.mark.parametrize("name", LINES)
def test_the_point_satisfies_the_conditions(name: str, how: Armijo | Wolfe, natural: bool) -> None:
    fun, x = LINES[name]
    p = point(fun, vector(x))
    direction = -p.gradient()
    found = search(how, p, direction, natural)
    assert found.point is not None
    slope, t = float(p.gradient() @ direction), found.size
    assert float(found.point.x) == pytest.approx(x + t * float(direction), rel=1e-12)
    assert found.point.value <= p.value + 1e-4 * t * slope
    if isinstance(how, Wolfe):
        assert abs(float(found.point.gradient() @ direction)) <= how.flat * abs(slope)
    assert p.function.counts.nfev <= 60


@pytest.mark.parametrize("how", [Armijo(), Wolfe()], ids=str)
def test_a_newton_step_that_lowers_enough_is_taken_whole_by_one_value(how: Armijo | Wolfe) -> None:
    p = point(lambda x: (x - 3).square().sum(), vector(0.0))
    found = search(how, p, vector(3.0))
    assert found.size == 1
    assert p.function.counts.nfev == 2


@pytest.mark.parametrize("how", SEARCHES, ids=str)
def test_not_a_number_beyond_an_edge_shortens_the_step(how: Armijo | Wolfe) -> None:
    p = point(lambda x: (x - x.log()).sum(), vector(4.0))
    found = search(how, p, vector(-50.0))
    assert found.point is not None
    assert 0 < float(found.point.x) < 4
    assert found.point.finite()


@pytest.mark.parametrize("how", SEARCHES, ids=str)
def test_upwards_nothing_is_found(how: Armijo | Wolfe) -> None:
    p = point(lambda x: x.sum() - 2 * x.detach().sum(), vector(1.0))  # -x, with a gradient of the wrong sign
    assert search(how, p, vector(-1.0)).point is None
    assert p.function.counts.nfev <= 130


@pytest.mark.parametrize("how", SEARCHES, ids=str)
def test_a_function_without_a_least_value_is_followed_far_and_the_search_ends(how: Armijo | Wolfe) -> None:
    p = point(lambda x: -x.sum(), vector(0.0))
    found = search(how, p, vector(1.0), natural=False)
    assert found.point is not None
    assert found.point.value < -1e10
    assert p.function.counts.nfev <= 62


@pytest.mark.parametrize("how", SEARCHES, ids=str)
def test_minus_infinity_is_an_end(how: Armijo | Wolfe) -> None:
    p = point(lambda x: torch.where(x > 10, -math.inf, -x).sum(), vector(0.0))
    found = search(how, p, vector(1.0), natural=False)
    assert found.point is not None
    assert found.point.value == -math.inf


def test_the_fixed_step_is_the_textbooks_whatever_the_value() -> None:
    p = point(lambda x: x.square().sum(), vector(1.0))
    found = Fixed(3.0).advance(p, Direction(-p.gradient(), -4.0, False), {})
    assert found.point is not None
    assert found.point.x.tolist() == [-5]
    assert found.point.value == 25


@pytest.mark.parametrize("size", [0.0, -1.0, math.inf, math.nan])
def test_a_fixed_step_of_no_size_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match="step_size must be positive"):
        Fixed(size)


def test_the_last_size_is_remembered_for_a_direction_without_a_length() -> None:
    p = point(lambda x: 0.5e6 * x.square().sum(), vector(1.0))
    found = search(Armijo(), p, -p.gradient(), natural=False)
    assert "size" in found.memory
    assert float(found.memory["size"]) == found.size
    again = found.point
    assert again is not None
    before = p.function.counts.nfev
    Armijo().advance(
        again, Direction(-again.gradient(), -float(again.gradient() @ again.gradient()), False), found.memory
    )
    assert p.function.counts.nfev - before <= 4


@pytest.mark.parametrize("how", SEARCHES, ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_function_changes_no_step(how: Armijo | Wolfe, scale: float) -> None:
    found = []
    for size in (1.0, scale):
        p = point(lambda x, size=size: size * rosenbrock(x), vector(-1.2, 1))
        found.append(search(how, p, -p.gradient(), natural=False).point)
    assert found[0] is not None and found[1] is not None
    torch.testing.assert_close(found[0].x, found[1].x, rtol=1e-10, atol=0)


@pytest.mark.parametrize("how", [Armijo(), Wolfe()], ids=str)
def test_where_values_are_rounding_slopes_decide(how: Armijo | Wolfe) -> None:
    # 1e8 + (x - 1)^2 around 1 + 1e-7: values are equal to the last digit.
    p = point(lambda x: 1e8 + (x - 1).square().sum(), vector(1 + 1e-7))
    found = search(how, p, -0.5 * p.gradient())
    assert found.point is not None
    assert found.point.steepest() < p.steepest()
