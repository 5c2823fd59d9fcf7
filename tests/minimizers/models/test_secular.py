"""The step of a region or a cube satisfies the conditions that only the global minimiser satisfies, at any scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.minimizers.models.secular import cubic, trust_region

# The secular equation is solved to 1e-10 of the length.
SOLVED = 1e-8


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def model(w: Tensor, c: Tensor, y: Tensor) -> float:
    return float(c @ y + 0.5 * (w * y) @ y)


def assert_least_in_region(w: Tensor, c: Tensor, radius: float) -> None:
    """(H + shift) y = -c, H + shift positive semidefinite, and shift (radius - ||y||) = 0 (More and Sorensen)."""
    y, shift = trust_region(w, c, radius)
    length = float(y.norm())
    assert length <= radius * (1 + SOLVED)
    assert shift >= 0
    assert float(w.min()) + shift >= -1e-12 * float(w.abs().max())
    residual = (w + shift) * y + c
    assert bool((residual.abs() <= SOLVED * torch.maximum(c.abs(), c.norm() * 1e-3 + shift * y.abs())).all())
    if shift > 0:
        assert length == pytest.approx(radius, rel=SOLVED)


def assert_least_with_cube(w: Tensor, c: Tensor, sigma: float) -> None:
    """(H + shift) y = -c, H + shift positive semidefinite, and shift = sigma ||y|| (Nesterov and Polyak)."""
    y, shift = cubic(w, c, sigma)
    assert float(w.min()) + shift >= -1e-12 * float(w.abs().max())
    residual = (w + shift) * y + c
    assert bool((residual.abs() <= SOLVED * torch.maximum(c.abs(), c.norm() * 1e-3 + shift * y.abs())).all())
    assert sigma * float(y.norm()) == pytest.approx(shift, rel=SOLVED, abs=1e-300)


@pytest.mark.parametrize("seed", range(5))
def test_no_point_of_a_fine_grid_is_lower(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, c = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    w, radius, sigma = w.sort().values, 0.7, 0.9
    angles, lengths = torch.linspace(0, 2 * math.pi, 721), torch.linspace(0, 1, 201).double()
    rays = torch.stack([angles.cos(), angles.sin()], 1).double()
    inside = (radius * lengths[:, None, None] * rays).reshape(-1, 2)
    values = inside @ c + 0.5 * (inside**2) @ w
    found = model(w, c, trust_region(w, c, radius)[0])
    # Half a degree and a 400th part of the radius: the grid's best is at most this far above the least value.
    assert float(values.min()) - 1e-3 <= found <= float(values.min()) + 1e-12
    y = cubic(w, c, sigma)[0]
    wide = (20 * lengths[:, None, None] ** 2 * rays).reshape(-1, 2)
    cubes = wide @ c + 0.5 * (wide**2) @ w + sigma / 3 * wide.norm(dim=1) ** 3
    found = model(w, c, y) + sigma / 3 * float(y.norm()) ** 3
    assert float(cubes.min()) - 1e-1 <= found <= float(cubes.min()) + 1e-12


numbers = st.floats(-5, 5, allow_subnormal=False).map(lambda t: t if abs(t) > 1e-6 else 0.0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6), st.integers(-12, 12), st.integers(-12, 12))
def test_both_satisfy_the_conditions_of_the_least_value_at_any_scale(
    pairs: list[tuple[float, float]], curvatures: int, lengths: int
) -> None:
    rows = torch.tensor(sorted(pairs), dtype=torch.float64)
    w, c = rows[:, 0] * 10.0**curvatures, rows[:, 1] * 10.0 ** (curvatures + lengths)
    for part in (1e-3, 0.5, 30.0):
        assert_least_in_region(w, c, part * 10.0**lengths)
        assert_least_with_cube(w, c, part * 10.0 ** (curvatures - lengths))


def test_a_step_that_fits_is_newtons_with_no_shift() -> None:
    y, shift = trust_region(vector(1, 10), vector(3, 20), 4.0)
    assert y.tolist() == [-3, -2]
    assert shift == 0


@pytest.mark.parametrize("near", [0.0, 1e-300, 1e-100, 1e-30, 1e-16, 1e-10, 1e-5])
def test_the_hard_case_and_its_neighbours_reach_the_edge_along_the_lowest_direction(near: float) -> None:
    w, c = vector(-2, 1, 3), vector(near, 1, 1)
    y, shift = trust_region(w, c, 2.0)
    assert_least_in_region(w, c, 2.0)
    assert shift == pytest.approx(2, rel=1e-4)
    assert y[1:].tolist() == pytest.approx([-1 / 3, -1 / 5], rel=1e-4)
    assert float(y.norm()) == pytest.approx(2, rel=1e-9)
    assert_least_with_cube(w, c, 0.5)
    assert float(cubic(w, c, 0.5)[0].norm()) == pytest.approx(4, rel=1e-4)  # shift / sigma


def test_hard_on_the_curvature_but_long_enough_without_the_eigenvector() -> None:
    # -c / (w + 1) without the first element is longer than the radius: the shift is above the least.
    assert_least_in_region(vector(-1, 0), vector(0, 10), 1.0)
    assert trust_region(vector(-1, 0), vector(0, 10), 1.0)[1] == pytest.approx(10)


def test_at_a_stationary_point_nothing_moves_up_and_everything_moves_down() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    for w in (vector(1, 2), vector(0, 2), vector(0, 0)):
        assert trust_region(w, zero, 1.0)[0].tolist() == [0, 0]
        assert cubic(w, zero, 1.0)[0].tolist() == [0, 0]
    assert trust_region(vector(-1, 2), zero, 3.0)[0].abs().tolist() == [3, 0]
    assert cubic(vector(-1, 2), zero, 0.5)[0].abs().tolist() == [2, 0]


def test_a_slope_without_curvature_goes_to_the_edge_and_to_the_balance_with_the_cube() -> None:
    w, c = vector(0, 0), vector(3, 4)
    assert trust_region(w, c, 10.0)[0].tolist() == pytest.approx([-6, -8])
    y, shift = cubic(w, c, 5.0)  # sigma y^2 = 5
    assert y.tolist() == pytest.approx([-0.6, -0.8])
    assert shift == pytest.approx(5)


# A norm squares: 1e-150 is as small as float64 lets a length be.
@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_scaling_the_function_changes_no_step(scale: float) -> None:
    w, c = vector(-1, 0.5, 4), vector(1, -2, 0.3)
    plain, scaled = trust_region(w, c, 1.5), trust_region(scale * w, scale * c, 1.5)
    torch.testing.assert_close(plain[0], scaled[0], rtol=1e-8, atol=0)
    assert scaled[1] / scale == pytest.approx(plain[1], rel=1e-8)
    torch.testing.assert_close(cubic(w, c, 1.0)[0], cubic(scale * w, scale * c, scale)[0], rtol=1e-8, atol=0)


def test_curvatures_sixteen_decades_apart_are_each_treated_in_their_own_scale() -> None:
    w = vector(1e-8, 1, 1e8)
    c = vector(1e-8, 1, 1e8)
    for radius in (1e-10, 1e-4, 0.3, 1.5, 1.72, 2):
        assert_least_in_region(w, c, radius)
    for sigma in (1e-20, 1e-8, 1, 1e8, 1e20):
        assert_least_with_cube(w, c, sigma)
