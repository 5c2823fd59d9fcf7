"""Edge cases: a status each that can be trusted. Success means a minimum, anything else has a name."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hesse
from hesse.minimizers import Result, Status
from minimizers.points import rosenbrock, vector
from minimizers.table import METHOD_NAMES

START = vector(-1.2, 1)
ALL = pytest.mark.parametrize("method", METHOD_NAMES)
SECOND = pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name != "gd"])


def near(result: Result, *where: float, tol: float = 1e-4) -> bool:
    return bool((torch.as_tensor(result.x).double() - vector(*where)).abs().max() <= tol)


@ALL
def test_start_at_the_minimum_is_seen_at_once(method: str) -> None:
    result = hesse.minimize(rosenbrock, vector(1, 1), method=method)
    assert result.status == Status.CONVERGED
    assert result.nit == 0
    assert result.nfev <= 2
    assert near(result, 1, 1, tol=0)


@ALL
def test_a_constant_function_is_at_its_minimum(method: str) -> None:
    for fun in (lambda x: x.sum() * 0 + 3, lambda x: torch.tensor(3.0).double()):
        result = hesse.minimize(fun, vector(1, 2), method=method)
        assert result.success
        assert near(result, 1, 2, tol=0)


@ALL
def test_a_region_of_nan_is_stepped_back_from(method: str) -> None:
    result = hesse.minimize(lambda x: (x - x.log()).sum(), vector(5, 8), method=method)
    assert result.success
    assert near(result, 1, 1)


@ALL
def test_a_start_where_the_function_is_not_finite_is_told(method: str) -> None:
    for fun in (
        lambda x: (x - x.log()).sum(),
        lambda x: x.sum() * math.inf,
        lambda x: x.abs().sqrt().sum() * 0 + x[0].sqrt(),
    ):
        result = hesse.minimize(fun, vector(-1, 0), method=method)
        assert result.status == Status.NOT_FINITE
        assert "not finite" in result.message
        assert near(result, -1, 0, tol=0)


UNBOUNDED = {
    "line": (lambda x: x[0] + x[1] ** 2, vector(1, 1)),
    "line alone": (lambda x: 3 * x.sum(), vector(1, 1)),
    "quartic": (lambda x: -(x**4).sum(), vector(1, 1)),
    "concave": (lambda x: -x.square().sum(), vector(0.1, 0)),
    "cubic": (lambda x: (x**3).sum(), vector(-0.5, 1)),
    "saddle": (lambda x: x[0] ** 2 - x[1] ** 2, vector(1, 0)),
    "exponential": (lambda x: -x.exp().sum(), vector(1, 1)),
    "minus infinity": (lambda x: x.clamp_min(0).log().sum(), vector(1, 1)),
}


@ALL
@pytest.mark.parametrize("name", UNBOUNDED)
def test_an_unbounded_function_is_no_success(name: str, method: str) -> None:
    fun, x0 = UNBOUNDED[name]
    began = time.process_time()
    result = hesse.minimize(fun, x0, method=method, max_steps=300)
    assert not result.success
    assert result.fun < float(fun(x0))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("method", ["auto", "bfgs", "l-bfgs-b", "trust-krylov", "trust-ncg", "arc", "prox-newton"])
@pytest.mark.parametrize("name", [name for name in UNBOUNDED if name != "minus infinity"])
def test_an_unbounded_function_is_called_that(name: str, method: str) -> None:
    fun, x0 = UNBOUNDED[name]
    result = hesse.minimize(fun, x0, method=method, max_steps=300)
    assert result.status == Status.UNBOUNDED, result.message


@ALL
def test_a_kink_is_its_minimum_or_has_its_name(method: str) -> None:
    result = hesse.minimize(lambda x: x[0].abs() + 2 * (x[1] - 1).abs(), vector(0.7, -1.3), method=method)
    if result.success:
        assert near(result, 0, 1, tol=1e-6)
    else:
        assert result.status in (Status.KINK, Status.STALLED, Status.MAX_STEPS)
    assert result.fun < 3.0  # it went on from the start


@ALL
def test_a_jump_is_not_taken_for_a_minimum(method: str) -> None:
    result = hesse.minimize(lambda x: (x * x).sum() + 5 * (x[0] < 1), vector(4.0), method=method)
    assert result.success == near(result, 0)
    if not result.success:
        assert result.status == Status.KINK


@ALL
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales_of_the_function(scale: float, method: str) -> None:
    result = hesse.minimize(lambda x: scale * rosenbrock(x), START, method=method)
    assert result.success == near(result, 1, 1, tol=1e-3)
    assert result.success or method == "gd"


@ALL
def test_single_precision(method: str) -> None:
    result = hesse.minimize(rosenbrock, START.float(), method=method)
    assert result.x.dtype == torch.float32
    assert result.success == near(result, 1, 1, tol=1e-2)
    assert result.success or method == "gd"


@ALL
def test_one_variable(method: str) -> None:
    for x0 in (torch.tensor(0.0).double(), vector(0.0), torch.zeros(1, 1).double()):
        result = hesse.minimize(lambda x: ((x - 3) ** 4 + (x - 3) ** 2).sum(), x0, method=method)
        assert result.success
        assert result.x.shape == x0.shape
        assert float(result.x) == pytest.approx(3, abs=1e-4)


@ALL
def test_no_variable(method: str) -> None:
    for x0 in (torch.zeros(0).double(), {"a": torch.zeros(0, 2)}):
        result = hesse.minimize(lambda x: torch.tensor(2.0).double(), x0, method=method)
        assert result.success
        assert result.fun == 2
        assert result.nit == 0
        assert repr(result)
    arrays = hesse.minimize(lambda x: 2.0 + float((x * x).sum()), np.zeros(0), method=method)
    assert arrays.success
    assert arrays.x.shape == (0,)


@ALL
def test_memory_that_is_not_contiguous_or_asks_for_gradients_is_left_as_it_is(method: str) -> None:
    for x0 in (vector(-1.2, 9, 1, 9)[::2], START.clone().requires_grad_(), torch.stack([START, START], 1)[:, 0]):
        before = x0.detach().clone()
        result = hesse.minimize(rosenbrock, x0, method=method, max_steps=200)
        assert result.success == near(result, 1, 1, tol=1e-3)
        assert torch.equal(x0.detach(), before)
        assert x0.grad is None
        assert not result.x.requires_grad
        assert not result.jac.requires_grad
    strided = np.array([-1.2, 9, 1, 9])[::2]
    hesse.minimize(lambda x: float(rosenbrock(torch.from_numpy(x))), strided, method="bfgs")
    assert strided.tolist() == [-1.2, 1]


@ALL
def test_inference_mode_and_no_grad_around_the_call_do_no_harm(method: str) -> None:
    with torch.no_grad():
        result = hesse.minimize(rosenbrock, START, method=method, max_steps=100)
    assert result.nit > 3


@ALL
def test_a_start_at_a_saddle_is_left(method: str) -> None:
    result = hesse.minimize(lambda x: x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2, vector(0, 0), method=method)
    assert result.success
    assert result.fun == pytest.approx(-0.25, abs=1e-6)


@ALL
def test_a_start_at_a_maximum_is_left(method: str) -> None:
    result = hesse.minimize(lambda x: x.cos().sum(), vector(0, 0), method=method)
    assert result.success
    assert result.fun == pytest.approx(-2, abs=1e-6)


@ALL
@pytest.mark.parametrize("calls", [2, 5, 15])
def test_an_interrupt_returns_the_best_so_far(method: str, calls: int) -> None:
    left = [calls]

    def slow(x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return rosenbrock(x)

    result = hesse.minimize(slow, START, method=method)
    assert result.status == Status.INTERRUPTED
    assert not result.success
    assert result.fun <= float(rosenbrock(START))
    assert result.fun == pytest.approx(float(rosenbrock(result.x)))
    on = hesse.minimize(rosenbrock, result.state, method=method, max_steps=300)
    assert on.fun <= result.fun
    assert on.success or method == "gd"


def test_an_interrupt_in_the_callback_too() -> None:
    def callback(x: Any) -> None:
        raise KeyboardInterrupt

    result = hesse.minimize(rosenbrock, START, callback=callback)
    assert result.status == Status.INTERRUPTED
    assert result.nit == 1


@SECOND
def test_noise_ends_in_precision_at_its_level(method: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        return rosenbrock(x) + 1e-6 * torch.randn((), dtype=x.dtype, generator=generator)

    result = hesse.minimize(noisy, START, method=method)
    assert result.success
    assert float(rosenbrock(result.x)) <= 1e-4


@pytest.mark.parametrize("method", ["auto", "bfgs", "l-bfgs-b"])
def test_noise_without_derivatives_too(method: str) -> None:
    generator = np.random.default_rng(0)

    def noisy(x: Any) -> float:
        return float(100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + 1e-8 * generator.standard_normal())

    result = hesse.minimize(noisy, START.numpy(), method=method)
    assert result.success == (float(rosenbrock(torch.from_numpy(result.x))) <= 1e-4)


def test_values_alone_at_the_minimum_of_a_parabola_are_no_saddle() -> None:
    for x0 in ([1.0, 2.0], [0.0, 0.0], [1e-9, 3.0]):
        result = hesse.minimize(lambda x: (x * x).sum(), x0)
        assert result.success, result.message
        assert float(np.abs(result.x).max()) < 1e-6


@ALL
def test_a_gradient_of_the_wrong_sign_is_no_success(method: str) -> None:
    result = hesse.minimize(
        rosenbrock,
        START,
        jac=lambda x: -torch.func.grad(rosenbrock)(x),
        hess=torch.func.hessian(rosenbrock),
        method=method,
    )
    assert not result.success
    assert result.status in (Status.WRONG_GRADIENT, Status.STALLED, Status.SADDLE)


@ALL
def test_a_minimum_that_is_a_valley_floor_is_one(method: str) -> None:
    result = hesse.minimize(lambda x: (x.norm() - 1) ** 2, vector(2, 1, 2), method=method)
    assert result.success
    assert float(result.x.norm()) == pytest.approx(1, abs=1e-5)


@SECOND
def test_a_singular_minimum_is_approached_as_far_as_its_values_tell(method: str) -> None:
    result = hesse.minimize(lambda x: (x**4).sum(), vector(1, -2), method=method)
    assert result.success
    assert result.fun < 1e-9 * 17


def test_integers_within_the_function_do_no_harm() -> None:
    weights = torch.tensor([1, 2, 3])
    result = hesse.minimize(lambda x: (weights * (x - 1) ** 2).sum(), torch.zeros(3).double())
    assert result.success
    assert near(result, 1, 1, 1)
