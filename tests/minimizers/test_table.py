"""One table of problems, one table of methods, every pair tried: solved, and never a success that is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hesse
from minimizers.table import METHOD_NAMES, PROBLEMS

# Of what there was to gain: what is left where the default tolerance stops (1e-12 by the quadratic model, which at a
# singular minimum is half right), and in single precision.
LEFT, LEFT_IN_SINGLE = 1e-8, 1e-3

SMOOTH = [name for name in METHOD_NAMES if name != "gd"]


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_method_solves_every_problem(name: str, method: str) -> None:
    problem = PROBLEMS[name]
    result = hesse.minimize(problem.fun, problem.x0, method=method)
    solved = problem.gap(result.x) <= LEFT
    if result.success:
        assert solved, f"success at a gap of {problem.gap(result.x):.2g}"
    if not (method == "gd" and problem.valley):
        assert result.success, f"{result.message}, at a gap of {problem.gap(result.x):.2g}"
    assert result.fun == pytest.approx(float(problem.fun(result.x)), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("method", SMOOTH)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_as_numpy_with_jac_and_hess(name: str, method: str) -> None:
    problem = PROBLEMS[name]
    fun, jac, hess = problem.arrays()
    with np.errstate(all="raise"):
        result = hesse.minimize(fun, problem.x0.numpy(), jac=jac, hess=hess, method=method)
    assert result.success, f"{result.message}, at a gap of {problem.gap(result.x):.2g}"
    assert problem.gap(result.x) <= LEFT
    assert isinstance(result.x, np.ndarray)


@pytest.mark.parametrize("method", ["auto", "bfgs", "l-bfgs-b"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_alone_are_enough(name: str, method: str) -> None:
    problem = PROBLEMS[name]
    result = hesse.minimize(problem.arrays()[0], problem.x0.numpy(), method=method)
    assert result.success, f"{result.message}, at a gap of {problem.gap(result.x):.2g}"
    assert problem.gap(result.x) <= 1e-7  # differences know half the digits less
    assert "difference" in result.message


@pytest.mark.parametrize("method", SMOOTH)
@pytest.mark.parametrize("name", PROBLEMS)
def test_in_single_precision_success_is_as_honest(name: str, method: str) -> None:
    problem = PROBLEMS[name]
    result = hesse.minimize(problem.fun, problem.x0.float(), method=method)
    assert result.x.dtype == torch.float32
    assert result.success, f"{result.message}, at a gap of {problem.gap(result.x):.2g}"
    assert problem.gap(result.x) <= LEFT_IN_SINGLE


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_descent_in_single_precision_claims_nothing_that_is_not_there(name: str) -> None:
    problem = PROBLEMS[name]
    result = hesse.minimize(problem.fun, problem.x0.float(), method="gd", max_steps=300)
    assert not result.success or problem.gap(result.x) <= LEFT_IN_SINGLE


def test_auto_needs_fewer_hessians_than_scipys_trust_exact() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    ours, theirs = np.zeros(2), np.zeros(2)
    for name, problem in PROBLEMS.items():
        if name == "barrier":  # NaN stops SciPy
            continue
        fun, jac, hess = problem.arrays()
        mine = hesse.minimize(problem.fun, problem.x0)
        scipys: Any = optimize.minimize(fun, problem.x0.numpy(), jac=jac, hess=hess, method="trust-exact")
        ours += mine.nhev, mine.nfev
        theirs += scipys.nhev, scipys.nfev
    assert ours[0] < theirs[0]
    assert ours[1] < 1.5 * theirs[1]  # to 1e-12, where SciPy stops at a gradient of 1e-4
