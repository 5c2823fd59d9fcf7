"""Each evaluation is counted, none is made twice, and a refused step costs one value."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hesse
from hesse.minimizers.methods import METHODS
from minimizers.points import function, rosenbrock, vector
from tolerances import ALGEBRA

START = vector(-1.2, 1)


class Counting:
    """Rosenbrock's function as NumPy, with the points at which each of its derivatives was asked for."""

    def __init__(self) -> None:
        self.seen: dict[str, list[bytes]] = {"fun": [], "jac": [], "hess": [], "hessp": []}

    def fun(self, x: Any) -> float:
        self.seen["fun"].append(x.tobytes())
        return float(100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)

    def jac(self, x: Any) -> Any:
        self.seen["jac"].append(x.tobytes())
        return np.array([-400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)])

    def hess(self, x: Any) -> Any:
        self.seen["hess"].append(x.tobytes())
        return self._matrix(x)

    def hessp(self, x: Any, v: Any) -> Any:
        self.seen["hessp"].append(x.tobytes())
        return self._matrix(x) @ v

    def _matrix(self, x: Any) -> Any:
        return np.array([[1200 * x[0] ** 2 - 400 * x[1] + 2, -400 * x[0]], [-400 * x[0], 200.0]])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "gd"])
def test_the_counts_of_the_result_are_the_calls_that_were_made(method: str) -> None:
    f = Counting()
    products = method in ("newton-cg", "trust-ncg", "trust-krylov", "arc-krylov")
    second: dict[str, Any] = {"hessp": f.hessp} if products else {"hess": f.hess}
    result = hesse.minimize(f.fun, START.numpy(), jac=f.jac, method=method, **second)
    assert result.success
    assert result.nfev == len(f.seen["fun"])
    assert result.njev == len(f.seen["jac"])
    assert result.nhev == len(f.seen["hess"])
    if products:
        assert result.nhvp == len(f.seen["hessp"])


@pytest.mark.parametrize("method", ["trust-exact", "newton", "dogleg", "arc", "trust-krylov", "bfgs", "l-bfgs-b"])
def test_no_derivative_is_evaluated_twice_at_a_point(method: str) -> None:
    f = Counting()
    hesse.minimize(f.fun, START.numpy(), jac=f.jac, hess=f.hess, method=method)
    for name in ("jac", "hess"):
        assert max(Counter(f.seen[name]).values(), default=1) == 1, name
    # One value may be asked for again: that of a point that is looked at with curvature at the end.
    assert sum(Counter(f.seen["fun"]).values()) - len(set(f.seen["fun"])) <= 1


@pytest.mark.parametrize("method", ["trust-exact", "newton", "dogleg", "arc"])
def test_gradient_and_hessian_are_evaluated_only_where_a_step_was_accepted(method: str) -> None:
    f = Counting()
    start = START if method != "arc" else vector(-3, -4)  # from where each has steps refused
    result = hesse.minimize(f.fun, start.numpy(), jac=f.jac, hess=f.hess, method=method)
    assert result.nfev > result.nit + 1  # some steps were refused
    assert result.njev == result.nit + 1
    assert result.nhev <= result.nit + 1


def test_with_autodiff_the_users_function_runs_once_for_every_value() -> None:
    calls = [0]

    def fun(x: Tensor) -> Tensor:
        calls[0] += 1
        return rosenbrock(x)

    result = hesse.minimize(fun, START)
    assert calls[0] == result.nfev
    assert result.njev == result.nit + 1
    assert result.nhev <= result.njev


def test_jac_true_evaluates_the_pair_once_for_a_point() -> None:
    f, calls = Counting(), Counter[bytes]()

    def pair(x: Any) -> tuple[float, Any]:
        calls[x.tobytes()] += 1
        return f.fun(x), f.jac(x)

    result = hesse.minimize(pair, START.numpy(), jac=True, method="bfgs")
    assert result.success
    assert max(calls.values()) == 1


def test_the_rows_of_the_trace_count_up_to_the_result() -> None:
    result = hesse.minimize(rosenbrock, START)
    for name in ("nfev", "njev", "nhev", "nhvp"):
        column = getattr(result.trace, name)
        assert column == sorted(column)
        assert column[-1] <= getattr(result, name)
    assert result.trace.step == list(range(result.nit + 1))


def test_a_point_computes_its_derivatives_once() -> None:
    p = function(rosenbrock, START).at(START)
    for _ in range(3):
        p.gradient()
        p.hessian()
    c = p.function.counts
    assert (c.nfev, c.njev, c.nhev, c.nhvp) == (1, 1, 1, 0)


def test_l2_is_in_value_gradient_hessian_and_product_and_l1_in_the_value_alone() -> None:
    f = function(rosenbrock, START, l1=0.3, l2=0.7)
    p, plain = f.at(START), function(rosenbrock, START).at(START)
    v = vector(2, -3)
    assert p.value == pytest.approx(plain.value + 0.35 * float(START @ START) + 0.3 * float(START.abs().sum()))
    torch.testing.assert_close(p.gradient(), plain.gradient() + 0.7 * START, **ALGEBRA)
    torch.testing.assert_close(p.hessian(), plain.hessian() + 0.7 * torch.eye(2).double(), **ALGEBRA)
    torch.testing.assert_close(p.product(v), plain.product(v) + 0.7 * v, **ALGEBRA)


def test_the_steepest_slope_is_that_of_the_least_subgradient() -> None:
    f = function(lambda x: (x * vector(0.5, 3, -2)).sum(), vector(0, 0, 0), l1=1.0)
    assert f.at(vector(0, 0, 0)).steepest() == 2  # |3| - 1; 0.5 is within the kink
    assert f.at(vector(1, -1, 1)).steepest() == 2  # 0.5 + 1, 3 - 1, -2 + 1
    g = function(lambda x: (x * vector(1, -5)).sum(), vector(0, 0), bounds=(vector(0, 0), vector(1, 1)))
    assert g.at(vector(0, 1)).steepest() == 0
    assert g.at(vector(0, 0.5)).steepest() == 5


def test_what_the_user_gives_comes_before_autodiff() -> None:
    f = function(rosenbrock, START, jac=lambda x: 2 * x, hess=lambda x: 5 * torch.eye(2).double())
    p = f.at(START)
    assert torch.equal(p.gradient(), 2 * START)
    assert torch.equal(p.hessian(), 5 * torch.eye(2).double())
    assert torch.equal(p.product(vector(1, 2)), vector(5, 10))
    q = function(rosenbrock, START, hessp=lambda x, v: 7 * v).at(START)
    assert torch.equal(q.product(vector(1, 2)), vector(7, 14))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_or_gradient_that_is_not_finite_is_told(bad: float) -> None:
    assert not function(lambda x: x.sum() * bad, START).at(START).finite()
    assert not function(lambda x: x.sum(), START, jac=lambda x: bad * x).at(START).finite()
    assert function(lambda x: x.sum(), START).at(START).finite()
