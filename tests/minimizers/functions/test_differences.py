"""Derivatives from values alone are right at any scale, say how right, and go nowhere the function is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hesse.minimizers.functions.differences import gradient, hessian, hessian_of, jacobian, noise, product

SCALES = (1e-8, 1e-4, 1.0, 1e4, 1e8)

# What a fourth-order formula can reach with rounding of 1e-16 in the values, and what forward differences are let off
# with. Both are parts of the largest element.
CENTRAL, FORWARD = 1e-8, 1e-5


class Counted:
    """A function of tensors seen only by its values, with the points at which it was asked."""

    def __init__(self, fun: Callable[[Tensor], Tensor]) -> None:
        self.fun = fun
        self.points: list[Tensor] = []

    def __call__(self, x: Tensor) -> float:
        self.points.append(x.clone())
        return float(self.fun(x))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def exact(fun: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.grad(fun)(x), torch.func.hessian(fun)(x)


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def wave(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.exp(x[0] / scale) * torch.sin(x[1] / scale) + (x[2] / scale) ** 3


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("at", [(1.0, 2.0, -1.5), (0.0, 0.0, 0.0), (0.3, 0.0, 1.0)])
def test_gradients_are_right_at_every_scale_and_bounded_by_their_error(scale: float, at: tuple[float, ...]) -> None:
    x, f = scale * vector(*at), Counted(wave(scale))
    wanted, _ = exact(wave(scale), x)
    g, error, memory = gradient(f, x, f(x))
    assert far(g, wanted) < CENTRAL
    assert bool(((g - wanted).abs() <= 2 * error).all())
    assert far(g + error, g) < 10 * CENTRAL
    again, error, _ = gradient(f, x, f(x), memory=memory)
    assert far(again, wanted) < FORWARD
    assert bool(((again - wanted).abs() <= 2 * error).all())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("at", [(1.0, 2.0, -1.5), (0.0, 0.0, 0.5)])
def test_hessians_from_values_are_right_at_every_scale(scale: float, at: tuple[float, ...]) -> None:
    x, f = scale * vector(*at), Counted(wave(scale))
    _, wanted = exact(wave(scale), x)
    H, error = hessian(f, x, f(x))
    assert torch.equal(H, H.T)
    assert far(H, wanted) < 1e-5
    assert bool(((H - wanted).abs() <= 3 * error).all())
    _, _, memory = gradient(f, x, f(x))
    f.points.clear()
    assert torch.equal(hessian(f, x, f(x), memory=memory)[0], hessian(f, x, f(x), memory=memory)[0])
    assert far(hessian(f, x, f(x), memory=memory)[0], wanted) < 1e-5


def test_the_next_gradients_cost_one_or_two_values_a_variable_and_stay_within_their_error() -> None:
    x, f, memory = vector(-1.2, 1.0, 0.7, 1.3), Counted(rosenbrock), None
    costs = []
    for _ in range(30):
        fx = f(x)
        before = len(f.points)
        g, error, memory = gradient(f, x, fx, memory=memory)
        costs.append(len(f.points) - before)
        wanted, H = exact(rosenbrock, x)
        assert bool(((g - wanted).abs() <= 3 * error).all())
        assert far(g, wanted) < FORWARD
        x = x - 0.3 * torch.linalg.solve(H @ H + torch.eye(4).double(), H @ g)
    assert costs[0] <= 6 + 4 * 4 + 8
    assert sorted(costs)[len(costs) // 2] <= 2 * 4
    assert min(costs) == 4


def test_near_a_stationary_point_the_error_is_absolute_and_small() -> None:
    f = Counted(rosenbrock)
    x = vector(1.0, 1.0, 1.0) + 1e-9
    _, _, memory = gradient(f, vector(1.1, 1.2, 1.4), f(vector(1.1, 1.2, 1.4)))
    g, _, _ = gradient(f, x, f(x), memory=memory)
    wanted, H = exact(rosenbrock, x)
    # In units of x: the step that the error in the gradient would make.
    assert float(torch.linalg.solve(H, g - wanted).abs().max()) < 1e-9


@pytest.mark.parametrize("level", [1e-10, 1e-6, 1e-3])
def test_noise_is_found_and_widens_the_steps(level: float) -> None:
    generator = torch.Generator().manual_seed(1)

    def f(x: Tensor) -> float:
        return float(torch.exp(x).sum() + level * torch.randn((), generator=generator, dtype=torch.float64))

    x = vector(0.5, -0.4, 1.0)
    found = noise(f, x, vector(1.0, 2.0, -1.0))
    assert level / 4 < found < 4 * level
    g, error, _ = gradient(f, x, f(x))
    wanted = torch.exp(x)
    # A formula of second order can do no better than noise^(2/3).
    assert far(g, wanted) < 10 * level ** (2 / 3)
    assert bool(((g - wanted).abs() <= 4 * error).all())
    H, _ = hessian(f, x, f(x))
    assert float((H - torch.diag(wanted)).abs().max()) < 15 * level**0.5


def test_noise_of_a_smooth_function_is_its_rounding() -> None:
    f = Counted(rosenbrock)
    x = vector(-1.2, 1.0)
    assert 1e-17 * f(x) < noise(f, x, vector(1.0, 1.0)) < 1e-14 * f(x)
    shifted = Counted(lambda x: 1e6 + rosenbrock(x))
    assert 1e-11 < noise(shifted, vector(1.0, 1.0), vector(1.0, 1.0)) < 1e-9
    assert noise(f, x, vector(0.0, 0.0)) < 1e-14


def test_noise_is_right_on_average_and_beside_an_edge() -> None:
    def noisy(seed: int, edge: float) -> Callable[[Tensor], float]:
        generator = torch.Generator().manual_seed(seed)

        def f(x: Tensor) -> float:
            value = torch.exp(x).sum() + 1e-5 * torch.randn((), generator=generator, dtype=torch.float64)
            return float(value) if float(x[0]) <= edge else math.nan

        return f

    x = vector(0.5, 1.0)
    found = vector(*(noise(noisy(seed, math.inf), x, vector(1.0, -1.0)) for seed in range(100)))
    # Each is an average over a few squares: 100 of them are known to a tenth.
    assert 0.8e-5 < float(found.median()) < 1.25e-5
    found = vector(*(noise(noisy(seed, 0.5), x, vector(1.0, -1.0)) for seed in range(100)))
    assert 0.8e-5 < float(found.median()) < 1.25e-5


def test_noise_of_digits_cut_off_is_the_last_digit() -> None:
    assert 1e-7 < noise(lambda x: round(float(torch.sin(x).sum()), 6), vector(1.0, 2.0), vector(1.0, 1.0)) < 3e-6


def test_no_value_is_asked_for_outside_the_bounds() -> None:
    lo, hi = vector(1.0, 0.0, -math.inf, 2.0, 0.99), vector(2.0, 1.0, 3.0, 2.0, 1.0)
    x = vector(1.0, 1.0, 3.0, 2.0, 1.0 - 1e-9)

    def fun(x: Tensor) -> Tensor:
        return (torch.log(x[:4]) * vector(1, 2, 3, 4)).sum() * x[4] ** 2 + x[0] * x[1] ** 2

    f = Counted(fun)
    g, _, memory = gradient(f, x, f(x), bounds=(lo, hi))
    again, _, _ = gradient(f, x, f(x), bounds=(lo, hi), memory=memory)
    H, _ = hessian(f, x, f(x), bounds=(lo, hi))
    assert all(bool(((p >= lo) & (p <= hi)).all()) for p in f.points)
    wanted, W = exact(fun, x)
    free = [0, 1, 2, 4]
    assert far(g[free], wanted[free]) < 1e-7
    assert far(again[free], wanted[free]) < FORWARD
    assert float(g[3]) == 0 and not H[3].any()
    assert far(H[free][:, free], W[free][:, free]) < 1e-4


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-7, 3e-6, 1e-5, 2e-5, 1e-4, 1e-3, 0.1])
@pytest.mark.parametrize("upper", [True, False])
def test_a_bound_at_any_distance_is_kept_and_costs_little_accuracy(gap: float, upper: bool) -> None:
    x, far_off = vector(1.0), vector(math.inf)
    bounds = (-far_off, x + gap) if upper else (x - gap, far_off)
    f = Counted(lambda x: torch.sin(3 * x[0]) + x[0] ** 3)
    wanted, W = exact(f.fun, x)
    _, _, memory = gradient(f, vector(1.1), f(vector(1.1)))
    f.points.clear()
    for known in (None, memory):
        g, _, _ = gradient(f, x, f(x), bounds=bounds, memory=known)
        assert far(g, wanted) < FORWARD / 10
    assert far(hessian(f, x, f(x), bounds=bounds)[0], W) < 1e-4
    assert all(bool(((p >= bounds[0]) & (p <= bounds[1])).all()) for p in f.points)


@pytest.mark.parametrize("outside", [math.nan, math.inf])
def test_steps_turn_away_from_where_the_function_is_not_finite(outside: float) -> None:
    def fun(x: Tensor) -> Tensor:
        good = (x[0] >= 1) & (x[1] <= 2)
        return torch.where(good, torch.sin(x[0]) * torch.exp(x[1]) + x[0] ** 2 * x[2], outside)

    x, f = vector(1.0, 2.0, 0.5), Counted(fun)
    smooth = lambda x: torch.sin(x[0]) * torch.exp(x[1]) + x[0] ** 2 * x[2]  # noqa: E731
    wanted, W = exact(smooth, x)
    g, error, _ = gradient(f, x, f(x))
    assert far(g, wanted) < 1e-7
    assert bool(((g - wanted).abs() <= 2 * error).all())
    H, _ = hessian(f, x, f(x))
    assert far(H, W) < 1e-4


def test_a_function_that_is_finite_at_one_point_only_has_no_gradient_and_says_so() -> None:
    x = vector(1.0, 1.0)
    g, error, _ = gradient(lambda y: 1.0 if torch.equal(y, x) else math.nan, x, 1.0)
    assert bool(g.isnan().all()) and bool(error.isinf().all())


def test_one_corner_without_values_does_not_hide_a_mixed_derivative() -> None:
    x = vector(1.5, 1.2)
    smooth = lambda x: torch.exp(x[0] * x[1])  # noqa: E731
    _, W = exact(smooth, x)
    for side in (1.0, -1.0):
        inside = lambda y, s=side: not (y[0] > x[0] and s * y[1] > s * x[1])  # noqa: E731
        f = Counted(lambda y, ok=inside: smooth(y) if ok(y) else torch.tensor(math.nan))
        H, _ = hessian(f, x, f(x))
        assert far(H, W) < 1e-5


@pytest.mark.parametrize("scale", [1e10, 1e14])
def test_a_scale_that_nothing_tells_is_found(scale: float) -> None:
    # At the usual first step the function does not change by a single bit.
    f = Counted(lambda x: 1 + torch.cosh(x[0] / scale - 1))
    g, error, _ = gradient(f, vector(0.0), f(vector(0.0)))
    assert far(g, vector(-math.sinh(1) / scale)) < FORWARD / 10
    assert float(error[0]) < FORWARD / scale


@pytest.mark.parametrize(
    ("fun", "before", "now"),
    [
        (lambda x: torch.exp(x[0] ** 3), 0.5, 3.0),
        (lambda x: torch.exp(x[0] ** 3), 3.0, 0.01),
        (lambda x: x[0] + torch.exp(50 * (x[0] - 2)), 1.0, 2.2),
        (lambda x: 1e6 * (x[0] - 1) ** 2, 3.0, 1 + 1e-4),
        (lambda x: torch.sin(x[0]), 1e-3, 1e5),
        (lambda x: torch.cosh(x[0] - 1e8), 1e8 + 2, 1e8 + 3),
    ],
)
def test_what_was_remembered_is_not_believed_where_the_function_is_another(
    fun: Callable[[Tensor], Tensor], before: float, now: float
) -> None:
    f = Counted(fun)
    _, _, memory = gradient(f, vector(before), f(vector(before)))
    x = vector(now)
    g, error, _ = gradient(f, x, f(x), memory=memory)
    wanted, _ = exact(fun, x)
    assert far(g, wanted) < FORWARD
    assert bool(((g - wanted).abs() <= 4 * error).all())


def test_noise_is_measured_again_where_values_have_another_size() -> None:
    f = Counted(lambda x: 1e6 * (x[0] - 1) ** 2)
    _, _, memory = gradient(f, vector(3.0), f(vector(3.0)))
    _, _, new = gradient(f, vector(1.001), f(vector(1.001)), memory=memory)
    assert float(new.noise[0]) < 1e-2 * float(memory.noise[0])


def test_a_variable_without_effect_and_no_variable_at_all() -> None:
    f = Counted(lambda x: torch.exp(x[0]))
    x = vector(1.0, 0.0, 5.0)
    g, _, _ = gradient(f, x, f(x))
    torch.testing.assert_close(g, vector(math.e, 0.0, 0.0), rtol=1e-9, atol=1e-12)
    assert len(f.points) < 60
    empty, _, _ = gradient(lambda x: 3.0, vector(), 3.0)
    assert empty.shape == (0,)
    assert hessian(lambda x: 3.0, vector(), 3.0)[0].shape == (0, 0)


def residual(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]), x[0] ** 3, torch.sin(x[1] * x[2])])


@pytest.mark.parametrize("at", [(0.3, 2.0, 1.0), (0.0, 1.0, 0.0), (1e-5, 9.1, -3e3)])
def test_jacobians_match_autograd_and_cost_one_evaluation_a_variable(at: tuple[float, ...]) -> None:
    x, calls = vector(*at), []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return residual(x)

    J, error, memory = jacobian(counted, x, residual(x))
    wanted = torch.func.jacrev(residual)(x)
    assert float(((J - wanted).norm(dim=0) / wanted.norm(dim=0)).max()) < FORWARD
    assert J.shape == error.shape == (4, 3)
    if at == (0.3, 2.0, 1.0):
        assert len(calls) <= 6 * 4 + 4  # at most four tables for the noise, and one evaluation a variable and one more
    calls.clear()
    again, _, _ = jacobian(counted, x, residual(x), memory=memory)
    assert float(((again - wanted).norm(dim=0) / wanted.norm(dim=0)).max()) < FORWARD
    assert len(calls) <= 6


def test_a_hessian_from_gradients_is_symmetric_and_knows_its_error() -> None:
    x = vector(-1.2, 1.0, 0.5, 2.0)
    slope = torch.func.grad(rosenbrock)
    H, error, memory = hessian_of(slope, x, slope(x))
    _, wanted = exact(rosenbrock, x)
    assert torch.equal(H, H.T)
    assert far(H, wanted) < FORWARD / 10
    assert bool(((H - wanted).abs() <= 2 * error).all())
    assert far(hessian_of(slope, x, slope(x), memory=memory)[0], wanted) < FORWARD


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("long", [1e-6, 1.0, 1e6])
def test_products_do_not_depend_on_the_length_of_the_vector(scale: float, long: float) -> None:
    slope = torch.func.grad(wave(scale))
    x, v = scale * vector(1.0, 2.0, -1.5), long * vector(1.0, -2.0, 0.5)
    _, H = exact(wave(scale), x)
    assert far(product(slope, x, v, slope(x)), H @ v) < 1e-6


def test_products_of_gradients_that_are_differences_take_longer_steps() -> None:
    f, x, v = Counted(rosenbrock), vector(-1.2, 1.0, 0.5), vector(1.0, -2.0, 0.5)
    _, _, memory = gradient(f, x, f(x))
    g, error, memory = gradient(f, x, f(x), memory=memory)
    _, H = exact(rosenbrock, x)
    found = product(lambda y: gradient(f, y, f(y), memory=memory)[0], x, v, g, error=error)
    assert far(found, H @ v) < 1e-2
    assert far(product(lambda y: gradient(f, y, f(y), memory=memory)[0], x, v, g), H @ v) > 0.03


def test_products_turn_round_at_the_edge_and_refuse_an_island() -> None:
    def slope(x: Tensor) -> Tensor:
        return torch.exp(x[0]) * torch.stack([x[1], torch.ones_like(x[1])]) * (1.0 if x[0] <= 1 else math.nan)

    x = vector(1.0, 2.0)
    found = product(slope, x, vector(1.0, 0.0), slope(x))
    torch.testing.assert_close(found, math.e * vector(2.0, 1.0), rtol=1e-6, atol=0)
    assert not product(slope, x, vector(0.0, 0.0), slope(x)).any()
    with pytest.raises(ArithmeticError, match="pass hessp or hess"):
        product(lambda y: y if torch.equal(y, x) else y * math.nan, x, vector(1.0, 0.0), x)


def test_a_newton_iteration_with_values_only_reaches_the_minimum() -> None:
    f, x, memory = Counted(rosenbrock), vector(0.5, 0.6, 0.3), None
    for _ in range(40):
        fx = f(x)
        g, _, memory = gradient(f, x, fx, memory=memory)
        H, _ = hessian(f, x, fx)
        w, Q = torch.linalg.eigh(H)
        step = -Q @ ((Q.T @ g) / w.abs())
        while f(x + step) > fx and float(step.norm()) > 1e-12:
            step = step / 2
        x = x + step
    torch.testing.assert_close(x, torch.ones(3).double(), rtol=1e-7, atol=0)
