"""Paths: each corner lies further out and lower, a region cuts the path, and it ends where it should."""

from __future__ import annotations

import math

import pytest
import torch

from hesse.minimizers.models.dense import Dense
from hesse.minimizers.models.steihaug import Dogleg, Steihaug
from minimizers.points import normal, point, promise, quadratic, symmetric, vector


def steihaug(H: torch.Tensor, g: torch.Tensor, forcing: float = 1e-12, radius: float | None = None) -> Steihaug:
    return Steihaug(point(quadratic(H, g), torch.zeros_like(g)), forcing, radius)


def dogleg(H: torch.Tensor, g: torch.Tensor) -> Dogleg:
    return Dogleg(point(quadratic(H, g), torch.zeros_like(g)))


def convex(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return symmetric(n, 0, eigenvalues=torch.linspace(1, 20, n, dtype=torch.float64)), normal(n, 1)


def test_without_a_region_the_path_ends_at_newtons_step() -> None:
    H, g = convex()
    model = steihaug(H, g)
    newton = -torch.linalg.solve(H, g)
    torch.testing.assert_close(model.whole, newton, rtol=1e-8, atol=1e-10)
    assert model.predicted == pytest.approx(-0.5 * float(g @ newton))
    assert not model.lowest < 0
    assert model.length == pytest.approx(float(newton.norm()))


@pytest.mark.parametrize("make", [steihaug, dogleg])
@pytest.mark.parametrize("seed", range(4))
def test_further_out_is_lower_and_the_edge_is_met(make: type[Steihaug], seed: int) -> None:
    H, g = symmetric(6, seed, eigenvalues=vector(0.1, 1, 2, 3, 4, 50)), normal(6, seed)
    model = make(H, g)
    before = 0.0
    for radius in (1e-4, 1e-2, 0.1, 0.5, 1.0, 1e3):
        step = model.within(radius)
        assert float(step.s.norm()) <= radius * (1 + 1e-12)
        assert step.length == pytest.approx(float(step.s.norm()))
        assert step.predicted == pytest.approx(promise(H, g, step.s), rel=1e-9)
        assert step.predicted >= before
        before = step.predicted
        # Never better than the least value in the region, and at least the steepest descent's.
        assert step.predicted <= Dense(H, g, 0 * g).within(radius).predicted * (1 + 1e-9)
        t = min(radius / float(g.norm()), float(g @ g) / float(g @ H @ g))
        assert step.predicted >= promise(H, g, -t * g) * (1 - 1e-9)
        if radius < model.length:
            assert float(step.s.norm()) == pytest.approx(radius)


@pytest.mark.parametrize("seed", range(4))
def test_along_negative_curvature_the_path_goes_on_for_ever(seed: int) -> None:
    H, g = symmetric(5, seed, eigenvalues=vector(-1, 1, 2, 3, 4)), normal(5, seed)
    model = steihaug(H, g)
    assert model.predicted == math.inf
    assert model.lowest < 0
    assert float(g @ model.whole) < 0
    for radius in (0.1, 10.0, 1e6):
        step = model.within(radius)
        assert float(step.s.norm()) == pytest.approx(radius)
        assert step.predicted == pytest.approx(promise(H, g, step.s), rel=1e-6)
    assert model.within(1e6).predicted > 1e10


def test_the_first_direction_alone_is_the_gradient() -> None:
    model = steihaug(torch.diag(vector(-1, -2)), vector(3, 4))
    torch.testing.assert_close(model.within(5.0).s, vector(-3, -4))
    assert float(model.whole @ vector(3, 4)) < 0


def test_a_known_region_saves_products_and_changes_no_step_inside() -> None:
    H, g = convex(30)
    free, cut = (point(quadratic(H, g), torch.zeros_like(g)) for _ in range(2))
    whole, short = Steihaug(free, 1e-10, None), Steihaug(cut, 1e-10, 0.3 * float(g.norm()) / 20)
    assert cut.function.counts.nhvp < free.function.counts.nhvp
    radius = 0.2 * float(g.norm()) / 20
    torch.testing.assert_close(whole.within(radius).s, short.within(radius).s)


def test_a_refused_step_costs_no_product() -> None:
    H, g = convex()
    p = point(quadratic(H, g), torch.zeros_like(g))
    model = Steihaug(p, 1e-6, None)
    before = p.function.counts.nhvp
    for radius in (1.0, 0.3, 0.01):
        model.within(radius)
    assert p.function.counts.nhvp == before


def test_the_residual_is_as_small_as_asked() -> None:
    H, g = convex(30)
    for forcing in (0.5, 0.1, 1e-3):
        assert float((H @ steihaug(H, g, forcing).whole + g).norm()) <= forcing * float(g.norm())


def test_the_dogleg_bends_from_steepest_descent_to_newtons_step() -> None:
    H, g = torch.diag(vector(1, 10)), vector(1, 10)
    model = dogleg(H, g)
    torch.testing.assert_close(model.whole, vector(-1, -1))
    cauchy = -float(g @ g) / float(g @ H @ g) * g
    short = 0.5 * float(cauchy.norm())
    torch.testing.assert_close(model.within(short).s, 0.5 * cauchy)
    torch.testing.assert_close(model.within(float(cauchy.norm())).s, cauchy)
    middle = model.within(1.2).s  # on the second stretch: between the corners
    t = (middle - cauchy) / (model.whole - cauchy)
    assert float(t[0]) == pytest.approx(float(t[1]))
    assert 0 < float(t[0]) < 1


def test_the_dogleg_goes_down_where_the_curvature_is_negative() -> None:
    for seed in range(4):
        H, g = symmetric(4, seed, eigenvalues=vector(-2, 1, 2, 3)), normal(4, seed)
        model = dogleg(H, g)
        assert model.lowest < 0
        for radius in (1e-3, 1.0, 100.0):
            step = model.within(radius)
            assert step.predicted > 0
            assert float(step.s.norm()) <= radius * (1 + 1e-9)


def test_at_a_stationary_point_the_path_has_no_length() -> None:
    model = steihaug(torch.diag(vector(1, 2)), vector(0, 0))
    assert model.within(1.0).s.tolist() == [0, 0]
    assert math.isnan(model.lowest)
    assert model.predicted == 0


def test_a_cube_is_refused_with_the_method_that_takes_one() -> None:
    H, g = convex()
    with pytest.raises(TypeError, match="arc"):
        steihaug(H, g).cubed(1.0)
