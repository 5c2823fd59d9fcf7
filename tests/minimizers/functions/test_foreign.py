"""Functions of JAX and TensorFlow have the derivatives that torch finds for them, in the same memory.

Both libraries are optional: a test of one that is not installed is skipped.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hesse.minimizers.functions import foreign
from hesse.minimizers.functions.foreign import Foreign, foreign_border, language_of
from hesse.minimizers.functions.function import Function
from hesse.objective.foreign import language
from tolerances import ALGEBRA

LANGUAGES = ("jax", "tensorflow")


@pytest.fixture(params=LANGUAGES)
def lib(request: pytest.FixtureRequest) -> Any:
    """The operations that the tests use, under one set of names."""
    if request.param == "jax":
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        np_ = jax.numpy
        with jax.enable_x64(True):
            yield SimpleNamespace(name="jax", array=np_.asarray, sum=np_.sum, exp=np_.exp, sin=np_.sin, where=np_.where)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, while it is imported
            tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
        yield SimpleNamespace(
            name="tensorflow", array=tf.constant, sum=tf.reduce_sum, exp=tf.exp, sin=tf.sin, where=tf.where
        )


def start(n: int = 5) -> np.ndarray[Any, Any]:
    return np.linspace(-1.2, 1.0, n)


def wave(ops: Any) -> Callable[[Any], Any]:
    return lambda x: ops.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + ops.exp(x[:-1])) + ops.sum(ops.sin(x)) ** 3


def source(lib: Any, fun: Callable[..., Any], x0: Any, *args: Any) -> tuple[Foreign, Tensor]:
    own = language_of(x0)
    assert own is not None and own.name == lib.name
    border = foreign_border(x0, own)
    return Foreign(fun, border, args), border.x0


def check(found: Foreign, x: Tensor, fun: Callable[[Tensor], Tensor]) -> None:
    """All derivatives of ``found`` at ``x`` against torch's of ``fun``."""
    g, H = torch.func.grad(fun)(x), torch.func.hessian(fun)(x)
    value, handle = found.value(x)
    torch.testing.assert_close(torch.tensor(float(value), dtype=x.dtype), fun(x), **ALGEBRA)
    slope = found.gradient(x, handle)
    torch.testing.assert_close(slope, g, **ALGEBRA)
    torch.testing.assert_close(found.hessian(x, handle, slope), H, **ALGEBRA)
    v = torch.linspace(2, -1, x.numel(), dtype=x.dtype)
    torch.testing.assert_close(found.product(x, handle, slope, v), H @ v, **ALGEBRA)


def test_derivatives_match_those_of_torch(lib: Any) -> None:
    found, x = source(lib, wave(lib), lib.array(start()))
    assert x.dtype == torch.float64
    check(found, x, wave(torch))
    check(found, x * 0.5 + 0.1, wave(torch))


@pytest.mark.parametrize("block", [1, 10, 17, 1000])
def test_hessians_in_blocks_are_whole(lib: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "BLOCK", block)
    found, x = source(lib, wave(lib), lib.array(start()))
    _, handle = found.value(x)
    H = found.hessian(x, handle, found.gradient(x, handle))
    torch.testing.assert_close(H, torch.func.hessian(wave(torch))(x), **ALGEBRA)


def test_functions_that_cannot_be_compiled_run_as_they_are(lib: Any) -> None:
    def fun(ops: Any) -> Callable[[Any], Any]:
        return lambda x: ops.sum(x**4) if float(x[0]) < 0 else ops.sum(ops.sin(x))

    branch = fun(lib)
    found, x = source(lib, branch, lib.array(start()))
    for at in (x, -x):
        wanted = (lambda y: (y**4).sum()) if at[0] < 0 else (lambda y: torch.sin(y).sum())
        assert float(found.value(at)[0]) == pytest.approx(float(wanted(at)))


def test_a_mistake_in_the_function_is_raised_as_it_is(lib: Any) -> None:
    def fun(x: Any) -> Any:
        raise ValueError("my own mistake")

    found, x = source(lib, fun, lib.array(start()))
    with pytest.raises(ValueError, match="my own mistake"):
        found.value(x)


def test_constants_and_unused_variables_have_zero_derivatives(lib: Any) -> None:
    found, x = source(lib, lambda x: lib.sum(x[:1] * 2.0), lib.array(start(3)))
    _, handle = found.value(x)
    assert found.gradient(x, handle).tolist() == [2, 0, 0]
    assert not found.hessian(x, handle, x).any() and not found.product(x, handle, x, x).any()


def test_more_arguments_are_passed(lib: Any) -> None:
    found, x = source(lib, lambda x, a, b: a * lib.sum(x**2) + b, lib.array(start(3)), 3.0, 1.0)
    check(found, x, lambda x: 3 * (x**2).sum() + 1)


def test_x_has_the_shape_and_kind_of_the_start(lib: Any) -> None:
    x0 = lib.array(start(6).reshape(2, 3))
    seen = []

    def fun(x: Any) -> Any:
        seen.append(tuple(x.shape))
        return lib.sum(x[0] ** 2 * x[1])

    found, x = source(lib, fun, x0)
    check(found, x, lambda x: (x[:3] ** 2 * x[3:]).sum())
    assert set(seen) == {(2, 3)}
    border = foreign_border(x0, found.own)
    back = border.outside(x)
    assert found.own.owns(back) and np.array_equal(np.asarray(back), np.asarray(x0))
    assert np.asarray(border.matrix(torch.eye(6).double())).shape == (6, 6)
    assert border.language == lib.name and border.describe() == {"kind": lib.name, "shapes": {"": [2, 3]}}
    assert torch.equal(border.inside(back, "jac"), x)
    assert torch.equal(border.inside(np.asarray(back), "jac"), x)
    with pytest.raises(ValueError, match=r"jac must have the shape of x0, \[2, 3\]; got \[3\]"):
        border.inside(lib.array(start(3)), "jac")
    with pytest.raises(TypeError, match="jac must be real numbers"):
        border.inside(np.arange(6), "jac")


def test_dicts_of_arrays_are_one_x(lib: Any) -> None:
    x0 = {"A": lib.array(start(4).reshape(2, 2)), "b": lib.array(np.array(0.7))}
    found, x = source(lib, lambda p: lib.sum(p["A"] ** 3) * p["b"], x0)
    check(found, x, lambda x: (x[:4] ** 3).sum() * x[4])
    border = foreign_border(x0, found.own)
    back = border.outside(x)
    assert back["A"].shape == (2, 2) and back["b"].shape == ()
    assert torch.equal(border.inside(back, "jac"), x)
    with pytest.raises(ValueError, match="shape of x0"):
        border.inside({"A": back["A"]}, "jac")


def test_the_start_shares_no_memory(lib: Any) -> None:
    own = language(lib.name)
    x0 = lib.array(start())
    assert foreign_border(x0, own).x0.data_ptr() != own.take(x0).data_ptr()


def test_float32_stays_float32(lib: Any) -> None:
    found, x = source(lib, wave(lib), lib.array(start().astype(np.float32)))
    _, handle = found.value(x)
    assert x.dtype == torch.float32
    slope = found.gradient(x, handle)
    assert slope.dtype == found.hessian(x, handle, slope).dtype == torch.float32
    torch.testing.assert_close(slope, torch.func.grad(wave(torch))(x), rtol=1e-4, atol=1e-3)
    assert ("float32" in found.name) == (lib.name == "jax")


@pytest.mark.parametrize("kind", ["int32", "float16", "complex64"])
def test_starts_that_are_no_floats_are_refused(lib: Any, kind: str) -> None:
    x0 = lib.array(np.ones(2).astype(kind))
    own = language_of(x0)
    assert own is not None
    with pytest.raises(TypeError, match=f"x0 must be float32 or float64; got {kind}"):
        foreign_border(x0, own)


def test_mixtures_are_refused(lib: Any) -> None:
    x = lib.array(start())
    with pytest.raises(TypeError, match=r"or a dict of such; got .*torch\.Tensor"):
        language_of({"a": x, "b": torch.zeros(2)})
    with pytest.raises(TypeError, match="dict of dicts"):
        language_of({"a": {"b": x}})
    with pytest.raises(TypeError, match=f"must be an array of {lib.name}"):
        language_of({"a": x, "b": 1.0})
    own = language(lib.name)
    with pytest.raises(ValueError, match="share one dtype; got float32, float64"):
        foreign_border({"a": x, "b": lib.array(start().astype(np.float32))}, own)


def test_a_module_of_the_same_name_is_not_the_library(lib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LANGUAGES:
        if name != lib.name:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    own = language_of(lib.array(start()))
    assert own is not None and own.name == lib.name


def test_newton_through_the_counted_function_reaches_the_minimum(lib: Any) -> None:
    x0 = lib.array(np.array([0.8, 0.7, 0.5]))
    own = language_of(x0)
    assert own is not None
    border = foreign_border(x0, own)
    fun = Function(Foreign(lambda x: lib.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2), border), border)
    x = border.x0
    for _ in range(30):
        point = fun.at(x)
        x = x - torch.linalg.solve(point.hessian() + 1e-9 * torch.eye(3).double(), point.gradient())
    torch.testing.assert_close(x, torch.ones(3).double(), rtol=1e-8, atol=0)
    assert fun.counts.nfev == fun.counts.njev == fun.counts.nhev == 30


def test_float64_that_jax_would_round_is_refused() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    with jax.enable_x64(True):
        x0 = jax.numpy.asarray(start())
    with pytest.raises(TypeError, match="jax_enable_x64"):
        foreign_border(x0, language("jax"))


def test_variables_of_tensorflow_are_starts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    variable = tf.Variable(start())
    found, x = source(SimpleNamespace(name="tensorflow"), lambda x: tf.reduce_sum(x**2), variable)
    variable.assign_add(tf.ones(5, tf.float64))
    assert np.array_equal(x.numpy(), start())
    check(found, x, lambda x: (x**2).sum())


def test_other_starts_belong_to_no_other_library() -> None:
    for x0 in (torch.zeros(2), np.zeros(2), {"a": torch.zeros(2)}, 1.0, [1.0], {}):
        assert language_of(x0) is None
