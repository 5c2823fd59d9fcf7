"""Gradients and Hessians of functions that are not torch's: NumPy by hand, JAX, TensorFlow."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hesse.check.foreign.arrays import is_foreign
from hesse.check.foreign.checks import foreign_gradients as gradients
from hesse.check.foreign.checks import foreign_hessian as hessian
from hesse.finding import InputError

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
A, B, X = RNG.normal(size=(3, 4)), RNG.normal(size=(4, 5)), RNG.normal(size=6)


def rosenbrock(x: Array) -> float:
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


def slope(x: Array) -> Array:
    g = np.zeros_like(x)
    g[:-1] = -400 * x[:-1] * (x[1:] - x[:-1] ** 2) - 2 * (1 - x[:-1])
    g[1:] += 200 * (x[1:] - x[:-1] ** 2)
    return g


def bend(x: Array) -> Array:
    n = len(x)
    H = np.zeros((n, n))
    i = np.arange(n - 1)
    H[i, i] = 1200 * x[:-1] ** 2 - 400 * x[1:] + 2
    H[i + 1, i + 1] += 200
    H[i, i + 1] = H[i + 1, i] = -400 * x[:-1]
    return H


def logistic(w: Array, b: Array, x: Array, y: Array) -> float:
    z = x @ w + b
    return float(np.mean(np.logaddexp(0, z) - y * z))


def logistic_slope(w: Array, b: Array, x: Array, y: Array) -> tuple[Any, ...]:
    gap = (1 / (1 + np.exp(-(x @ w + b))) - y) / len(y)
    return x.T @ gap, gap.sum(), None, None


DATA = (RNG.normal(size=3), np.array(0.3), RNG.normal(size=(20, 3)), (RNG.random(20) > 0.5).astype(int))

RIGHT: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "rosenbrock": (rosenbrock, X, slope),
    "value and gradient at once": (lambda x: (rosenbrock(x), slope(x)), X, True),
    "integers beside": (logistic, (DATA[0], DATA[1], DATA[2], DATA[3]), logistic_slope_of_all := (
        lambda w, b, x, y: (*logistic_slope(w, b, x, y)[:2], np.outer(_gap(w, b, x, y), w), None)
    )),
    "keywords": (lambda a, b: float((a @ b).sum()), {"a": A, "b": B}, lambda a, b: {
        "a": np.ones((3, 5)) @ b.T, "b": a.T @ np.ones((3, 5))
    }),
    "a tuple of matrices": (lambda a, b: (a @ b).sum(), (A, B), lambda a, b: (
        np.ones((3, 5)) @ b.T, a.T @ np.ones((3, 5))
    )),
    "residuals and their jacobian": (lambda x: A @ np.sin(x), X[:4], lambda x: A * np.cos(x)),
    "float32": (lambda x: np.float32((x**2).sum()), X.astype(np.float32), lambda x: 2 * x),
    "one number": (lambda x: x**2, 3.0, lambda x: 2 * x),
    "list for an array": (lambda x: (x**2).sum(), X, lambda x: list(2 * x)),
    "kink": (lambda x: np.abs(x).sum(), np.zeros(3), np.sign),
    "beside a kink": (lambda x: np.maximum(x, 0).sum(), 1e-9 * np.ones(3), lambda x: (x > 0).astype(float)),
    "many decades": (lambda x: (x**2 / X**2).sum(), 1e8 * X, lambda x: 2 * x / X**2),
    "offset": (lambda x: 1e9 + (x**2).sum(), X, lambda x: 2 * x),
    "zero gradient": (lambda x: float(np.floor(x).sum()), X, np.zeros_like),
}  # fmt: skip


def _gap(w: Array, b: Array, x: Array, y: Array) -> Array:
    return (1 / (1 + np.exp(-(x @ w + b))) - y) / len(y)


@pytest.mark.parametrize("name", RIGHT)
def test_right_gradients_are_left_in_peace(name: str) -> None:
    fun, inputs, jac = RIGHT[name]
    for seed in range(3):
        report = gradients(fun, inputs, jac, seed=seed)
        assert report.ok, str(report)


def dropped(x: Array) -> Array:
    g = slope(x)
    g[2] = 0.0
    return g


WRONG: dict[str, tuple[Callable[..., Any], Any, Any, str, str]] = {
    "wrong sign": (rosenbrock, X, lambda x: -slope(x), "wrong_sign", "x"),
    "factor": (lambda x: (x**2).sum(), X, lambda x: x, "missing_factor", "x"),
    "at once": (lambda x: (rosenbrock(x), 2 * slope(x)), X, True, "missing_factor", "x"),
    "one element": (rosenbrock, X, dropped, "some_elements", "x"),
    "zero": (rosenbrock, X, np.zeros_like, "detached", "x"),
    "second argument": (lambda a, b: (a @ b).sum(), (A, B), lambda a, b: (
        np.ones((3, 5)) @ b.T, -a.T @ np.ones((3, 5))
    ), "wrong_sign", "b"),
    "transposed": (lambda a, b: ((a @ b) ** 2).sum(), (A[:, :3], B[:3, :3]), lambda a, b: (
        2 * (a @ b) @ b, 2 * a.T @ (a @ b)
    ), "transposed", "a"),
    "jacobian": (lambda x: A @ np.sin(x), X[:4], lambda x: -A * np.cos(x), "wrong_sign", "x"),
    "argument forgotten": (lambda a, b: (a * b).sum(), (X, X + 1), lambda a, b: (b, None), "detached", "b"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_name_kind_argument_and_line(name: str) -> None:
    fun, inputs, jac, kind, where = WRONG[name]
    report = gradients(fun, inputs, jac)
    assert [c.where for c in report.culprits] == [where], str(report)
    culprit = report.culprits[0]
    if name != "transposed":  # without a sum of products to see, b is as good a guess
        assert culprit.kind == kind
    rule = fun if jac is True else jac
    if hasattr(rule, "__code__"):
        assert culprit.file == __file__
        assert culprit.line == rule.__code__.co_firstlineno
    with pytest.raises(AssertionError, match=where):
        report.raise_if_failed()


def test_elements_are_named() -> None:
    culprit = gradients(rosenbrock, X, dropped).culprits[0]
    assert "2" in str(culprit.evidence)


def test_values_kept_from_the_last_call_are_found() -> None:
    kept = {}

    def fun(x: Array) -> float:
        kept["x"] = x.copy()
        return float((x**3).sum())

    report = gradients(fun, X, lambda x: 3 * kept["x"] ** 2)
    assert [c.kind for c in report.culprits] == ["stale_value"]


def test_inputs_are_not_changed_and_who_does_is_told() -> None:
    def fun(x: Array) -> float:
        x *= 2
        return float((x**2).sum())

    x = X.copy()
    report = gradients(fun, x, lambda x: 8 * x)
    assert [c.kind for c in report.culprits] == ["input_changed"]
    assert np.array_equal(x, X)


def test_what_cannot_be_checked() -> None:
    with pytest.raises(InputError, match="jac"):
        gradients(rosenbrock, X)
    with pytest.raises(InputError, match="floating"):
        gradients(lambda i: i.sum(), np.arange(3), lambda i: i)
    with pytest.raises(InputError, match="shape"):
        gradients(rosenbrock, X, lambda x: slope(x)[:-1])
    with pytest.raises(InputError, match=r"\(value, gradient\)"):
        gradients(rosenbrock, X, True)
    with pytest.raises(InputError, match="tuple"):
        gradients(lambda a, b: (a * b).sum(), (X, X), lambda a, b: b)
    with pytest.raises(TypeError, match="function or True"):
        gradients(rosenbrock, X, 3)  # type: ignore[arg-type]
    assert [c.kind for c in gradients(lambda x: np.nan, X, slope).culprits] == ["non_finite"]
    assert [c.kind for c in gradients(rosenbrock, X, lambda x: np.inf * x).culprits] == ["non_finite"]
    draw = np.random.default_rng(0)
    assert [c.kind for c in gradients(lambda x: draw.random(), X, slope).culprits] == ["non_deterministic"]


def test_hessians_by_hand() -> None:
    assert hessian(rosenbrock, X, slope, bend).ok
    for place in ((0, 0), (2, 3), (5, 1)):

        def wrong(x: Array, place: tuple[int, int] = place) -> Array:
            H = bend(x)
            H[place] += 5.0
            return H

        (culprit,) = hessian(rosenbrock, X, slope, wrong).culprits
        assert culprit.kind == "second_derivative"
        assert culprit.evidence["elements"] == [list(place)]
        assert ("not symmetric" in culprit.message) == (place[0] != place[1])
        assert culprit.function == "wrong"


def test_hessians_come_after_gradients() -> None:
    report = hessian(rosenbrock, X, dropped, bend)
    assert [c.kind for c in report.culprits] == ["some_elements"]
    assert "first derivative is wrong" in report.notes[0]
    with pytest.raises(InputError, match="hess"):
        hessian(rosenbrock, X, slope)
    with pytest.raises(InputError, match="shape"):
        hessian(rosenbrock, X, slope, lambda x: bend(x)[:2])


def test_whose_function_it_is() -> None:
    assert is_foreign(rosenbrock, X)
    assert is_foreign(rosenbrock, (X, 3))
    assert is_foreign(rosenbrock, None, jac=slope)
    assert not is_foreign(torch.sum, torch.ones(2))
    assert not is_foreign(torch.nn.Linear(2, 2), X)
    assert not is_foreign(torch.sum, None)


# --- JAX ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jax() -> Any:
    return pytest.importorskip("jax", reason="jax is not installed (hesse[jax])")


def network(jnp: Any, act: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda p, x: (jnp.tanh(act(x @ p["w"]) + p["b"]) ** 2).mean()


def cube(jax: Any, factor: float, vjp: bool) -> Any:
    if not vjp:
        rule = jax.custom_jvp(lambda x: x**3)
        rule.defjvp(lambda x, t: (x[0] ** 3, factor * x[0] ** 2 * t[0]))
        return rule
    rule = jax.custom_vjp(lambda x: x**3)
    rule.defvjp(lambda x: (x**3, x), lambda x, g: (factor * x * x * g,))
    return rule


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("vjp", [False, True], ids=["custom_jvp", "custom_vjp"])
def test_jax(jax: Any, vjp: bool, jit: bool) -> None:
    jnp = importlib.import_module("jax.numpy")
    inputs = (
        {"w": jnp.asarray(A / 2, jnp.float32), "b": jnp.zeros(4)},
        jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32),
    )
    wrap = jax.jit if jit else lambda f: f
    assert is_foreign(jnp.sum, inputs)
    assert gradients(wrap(network(jnp, cube(jax, 3.0, vjp))), inputs).ok
    assert gradients(wrap(network(jnp, jax.nn.relu)), inputs).ok
    (culprit,) = gradients(wrap(network(jnp, cube(jax, 2.0, vjp))), inputs).culprits
    assert culprit.kind == "missing_factor"
    assert culprit.where == culprit.function == "<lambda>"
    assert culprit.file == __file__
    assert "0.667" in culprit.message


def test_jax_gradients_given_by_hand_and_vectors(jax: Any) -> None:
    jnp = importlib.import_module("jax.numpy")
    x = jnp.asarray(X, jnp.float32)
    assert gradients(lambda x: (x**2).sum(), x, lambda x: 2 * x).ok
    assert [c.where for c in gradients(lambda x: (x**2).sum(), x, lambda x: -x).culprits] == ["x"]
    report = gradients(jnp.sin, x)
    assert report.ok
    assert "not a scalar" in report.notes[0]


def test_jax_second_derivatives(jax: Any) -> None:
    jnp = importlib.import_module("jax.numpy")
    x = jnp.asarray(X, jnp.float32)
    assert hessian(lambda x: (jnp.sin(x) ** 2).sum(), x).ok
    rule = jax.custom_vjp(lambda x: x**3)
    rule.defvjp(lambda x: (x**3, 3 * x * x), lambda s, g: (jax.lax.stop_gradient(s) * g,))
    (culprit,) = hessian(lambda x: rule(x).sum(), x).culprits
    assert culprit.kind == "second_derivative"
    assert culprit.function == "<lambda>"


# --- TensorFlow ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tf() -> Any:
    return pytest.importorskip("tensorflow", reason="tensorflow is not installed (hesse[tensorflow])")


def test_tensorflow(tf: Any) -> None:
    def cube(factor: float) -> Any:
        @tf.custom_gradient
        def cubed(x: Any) -> Any:
            return x**3, lambda up: factor * x * x * up

        return cubed

    def loss(act: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda w, x: tf.reduce_sum(tf.tanh(act(x @ w)))

    w, x = tf.constant(A / 2, tf.float32), tf.constant(RNG.normal(size=(5, 3)), tf.float32)
    assert is_foreign(loss(tf.nn.relu), (w, x))
    assert gradients(loss(tf.nn.relu), (w, x)).ok
    assert gradients(loss(cube(3.0)), (tf.Variable(w), x)).ok
    for wrap in (lambda f: f, tf.function):
        (culprit,) = gradients(wrap(loss(cube(2.0))), (w, x)).culprits
        assert (culprit.kind, culprit.where, culprit.file) == ("missing_factor", "cubed", __file__)
    assert hessian(lambda x: tf.reduce_sum(tf.sin(x) ** 2), tf.constant(X)).ok
