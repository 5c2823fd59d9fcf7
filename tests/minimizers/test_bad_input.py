"""Bad input gets an error that names the argument, what was got, the likely cause and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hesse
from minimizers.points import rosenbrock, vector
from minimizers.table import PROBLEMS

START = vector(-1.2, 1)
FUN, JAC, HESS = PROBLEMS["Rosenbrock"].arrays()

FUNCTIONS: dict[str, tuple[Any, type[Exception], str]] = {
    "vector": (lambda x: x, ValueError, r"fun returned shape \[2\].*one number.*least_squares"),
    "complex": (lambda x: x.sum() * 1j, TypeError, r"fun returned a complex number.*\.real"),
    "int": (lambda x: 3, TypeError, "fun returned an integer.*float.*rounded"),
    "bool": (lambda x: x.sum() > 0, TypeError, "fun returned an integer.*compared"),
    "None": (lambda x: None, TypeError, "fun returned None.*return statement"),
    "text": (lambda x: "low", TypeError, "fun returned str"),
    "pair": (lambda x: ((x**2).sum(), 2 * x), TypeError, "fun returned tuple"),
}


@pytest.mark.parametrize("x0", [START, START.numpy()], ids=["torch", "numpy"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_function_may_not_return(name: str, x0: Any) -> None:
    fun, kind, words = FUNCTIONS[name]
    with pytest.raises(kind, match=words):
        hesse.minimize(fun, x0)


def test_a_pair_under_jac_true_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"jac=True fun must return \(value, gradient\); got Tensor"):
        hesse.minimize(rosenbrock, START, jac=True)
    with pytest.raises(TypeError, match=r"jac=True fun must return \(value, gradient\); got float"):
        hesse.minimize(FUN, START.numpy(), jac=True)


def test_a_torch_value_without_a_graph() -> None:
    with pytest.raises(TypeError, match=r"Python float, which carries no gradient.*without .item\(\)"):
        hesse.minimize(lambda x: x.square().sum().item(), START)
    for fun in (lambda x: x.detach().square().sum(), lambda x: torch.tensor(x.tolist()).square().sum()):
        with pytest.raises(ValueError, match=r"depends on x.*detached.*jac="):
            hesse.minimize(fun, START)


@pytest.mark.parametrize("fun", [5, None, START, "f"], ids=str)
def test_no_function(fun: Any) -> None:
    with pytest.raises(TypeError, match=f"fun must be a function of x; got {type(fun).__name__}"):
        hesse.minimize(fun, START)


STARTS: dict[str, tuple[Any, type[Exception], str]] = {
    "integers": (torch.tensor([1, 2]), TypeError, r"x0 must be float32 or float64; got torch.int64.*1\.0"),
    "integer list": ([1, 2], TypeError, r"x0 must be float32 or float64; got int64.*1\.0"),
    "integer array": (np.array([1, 2]), TypeError, "x0 must be float32 or float64; got int64"),
    "bool": (torch.tensor([True]), TypeError, "x0 must be float32 or float64; got torch.bool"),
    "complex": (torch.tensor([1j]), TypeError, "got torch.complex64.*view_as_real"),
    "half": (torch.ones(2, dtype=torch.bfloat16), TypeError, r"got torch.bfloat16.*x0.float\(\)"),
    "None": (None, TypeError, "x0 must be a tensor, a dict of tensors or an array.*got NoneType"),
    "text": ("start", TypeError, "x0 must be a tensor.*got str"),
    "object": (object(), TypeError, "x0 must be a tensor.*got object"),
    "ragged": ([[1.0], [1.0, 2.0]], TypeError, "x0 must be a tensor.*got list"),
    "empty dict": ({}, ValueError, "x0 is an empty dict"),
    "dict of floats": ({"a": 1.0}, TypeError, r"x0\['a'\] is float"),
    "dict of integers": ({"a": torch.tensor(1)}, TypeError, r"x0\['a'\] must be float32 or float64; got torch.int64"),
    "mixed dict": ({"a": torch.ones(1), "b": torch.ones(1).double()}, ValueError, "share one dtype.*float32.*float64"),
}


@pytest.mark.parametrize("name", STARTS)
def test_what_x0_may_not_be(name: str) -> None:
    x0, kind, words = STARTS[name]
    with pytest.raises(kind, match=words):
        hesse.minimize(lambda x: x.sum(), x0)


DERIVATIVES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "triangle": ({"hess": lambda x: np.triu(HESS(x))}, ValueError, "not symmetric.*differ by.*triangle"),
    "sparse triangle": ({"hess": lambda x: _csr(np.triu(HESS(x)))}, ValueError, "not symmetric.*differ by.*triangle"),
    "hess of another shape": ({"hess": lambda x: np.eye(3)}, ValueError, r"hess must return \[2, 2\].*got \[3, 3\]"),
    "hess of None": ({"hess": lambda x: None}, TypeError, "hess must.*got NoneType"),
    "complex hess": ({"hess": lambda x: 1j * np.eye(2)}, TypeError, "hess must be real.*complex"),
    "hess of NaN": ({"hess": lambda x: np.full((2, 2), np.nan)}, ValueError, "hess returned NaN"),
    "jac of another shape": (
        {"jac": lambda x: np.zeros(3)},
        ValueError,
        r"jac must have the shape of x0, \[2\]; got \[3\]",
    ),
    "jac of None": ({"jac": lambda x: None}, TypeError, "jac must be real numbers.*got NoneType"),
    "complex jac": ({"jac": lambda x: 1j * JAC(x)}, TypeError, "jac must be real.*complex"),
    "hessp of another shape": (
        {"hess": None, "hessp": lambda x, v: np.zeros(3)},
        ValueError,
        r"hessp must have the shape of x0, \[2\]; got \[3\]",
    ),
    "jac by name": ({"jac": "2-point"}, TypeError, "jac must be a function of x; got '2-point'. Leave it out"),
    "hess by name": ({"hess": "cs"}, TypeError, "hess must be a function of x; got 'cs'"),
    "callback": ({"callback": 3}, TypeError, "callback must be a function.*got"),
}


def _csr(H: Any) -> Any:
    return pytest.importorskip("scipy.sparse").csr_array(H)


@pytest.mark.parametrize("method", ["auto", "trust-exact"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_what_derivatives_may_not_be(name: str, method: str) -> None:
    given, kind, words = DERIVATIVES[name]
    with pytest.raises(kind, match=words):
        hesse.minimize(FUN, START.numpy(), **{"jac": JAC, "hess": HESS, **given}, method=method)


@pytest.mark.parametrize(
    "wrong", [lambda g: -g, lambda g: 2 * g, lambda g: g * np.array([1, 0]), lambda g: g[::-1], lambda g: g + 5]
)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_a_wrong_jac_is_caught_by_the_check(wrong: Any, scale: float) -> None:
    with pytest.raises(ValueError, match=r"jac does not belong to fun: .* slope of .* the values say .*"):
        hesse.minimize(lambda x: scale * FUN(x), START.numpy(), jac=lambda x: scale * wrong(JAC(x)), check=True)


def test_a_wrong_jac_of_a_torch_function_is_caught_too() -> None:
    with pytest.raises(ValueError, match="jac does not belong to fun"):
        hesse.minimize(rosenbrock, START, jac=lambda x: -x, check=True)


BOUNDS: dict[str, tuple[Any, type[Exception], str]] = {
    "crossed": ((2.0, 1.0), ValueError, r"crossed at element 0 of x0: from 2 to 1.*\(low, high\)"),
    "one crossed": ((vector(0, 3), vector(1, 2)), ValueError, "crossed at element 1 of x0: from 3 to 2"),
    "NaN": ((float("nan"), None), ValueError, "crossed at element 0|NaN"),
    "number": (3.0, TypeError, r"bounds must be a tuple \(low, high\).*got 3.0"),
    "too few": ([(0, 1)], TypeError, "2 elements of x0"),
    "another shape": ((vector(0, 0, 0), None), ValueError, r"lower bound must have the shape of x0, \[2\]; got \[3\]"),
    "text": (("a", "b"), TypeError, "lower bound must be real numbers"),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_what_bounds_may_not_be(name: str) -> None:
    bounds, kind, words = BOUNDS[name]
    with pytest.raises(kind, match=words):
        hesse.minimize(rosenbrock, START, bounds=bounds)


@pytest.mark.parametrize("method", ["bfgs", "newton", "arc", "trust-krylov", "gd"])
def test_a_method_that_cannot_do_what_is_asked_names_those_that_can(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method}.*takes no l1.*prox-newton.*auto"):
        hesse.minimize(rosenbrock, START, l1=0.1, method=method)
    with pytest.raises(ValueError, match=f"{method}.*takes no bounds.*prox-newton.*auto"):
        hesse.minimize(rosenbrock, START, bounds=(0, 1), method=method)


def test_a_method_put_together_by_hand_knows_no_kinks() -> None:
    from hesse.minimizers import Fixed, Gradient, Method

    with pytest.raises(ValueError, match="takes no l1"):
        hesse.minimize(rosenbrock, START, l1=0.1, method=Method("mine", Gradient(), Fixed(0.1)))


def test_residuals_are_asked_for_where_there_is_one_number() -> None:
    with pytest.raises(ValueError, match="one number; least squares needs the vector"):
        hesse.minimize(rosenbrock, START, method="lm")


SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown method": ({"method": "nelder-mead"}, ValueError, "unknown method 'nelder-mead'.*'bfgs'.*'trust-exact'"),
    "number for a method": ({"method": 3}, TypeError, "method must be a name or a Method; got int"),
    "rtol above 1": ({"rtol": 2.0}, ValueError, "rtol must be between 0 and 1; got 2.0"),
    "rtol of 0": ({"rtol": 0.0}, ValueError, "rtol must be between 0 and 1; got 0.0"),
    "negative atol": ({"atol": -1.0}, ValueError, "atol must not be negative; got -1.0"),
    "atol of NaN": ({"atol": float("nan")}, ValueError, "atol.*nan"),
    "negative l1": ({"l1": -0.1}, ValueError, "l1 must not be negative; got -0.1"),
    "infinite l2": ({"l2": float("inf")}, ValueError, "l2.*inf"),
    "negative max_steps": ({"max_steps": -1}, ValueError, "max_steps must be an integer of at least 0; got -1"),
    "max_steps of a float": ({"max_steps": 1.5}, ValueError, "max_steps must be an integer of at least 0; got 1.5"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_settings_may_not_be(name: str) -> None:
    given, kind, words = SETTINGS[name]
    with pytest.raises(kind, match=words):
        hesse.minimize(rosenbrock, START, **given)


@pytest.mark.parametrize("name", ["rtol", "atol", "l1", "l2"])
def test_text_where_a_number_belongs_is_a_type_error_that_names_it(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        hesse.minimize(rosenbrock, START, **{name: "small"})
