"""``hesse.minimize`` as its users see it: SciPy's signatures, kinds of x, scales, L2, callbacks, and going on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hesse
from hesse.minimizers import Armijo, Fixed, Gradient, Method, Result, Status
from hesse.minimizers.method import Method as SameMethod
from minimizers.points import rosenbrock, vector
from minimizers.table import PROBLEMS

START = vector(-1.2, 1)
FUN, JAC, HESS = PROBLEMS["Rosenbrock"].arrays()


def iterates(fun: Any, x0: Tensor, **more: Any) -> list[Tensor]:
    seen: list[Tensor] = [x0]
    hesse.minimize(fun, x0, callback=lambda x: seen.append(x.clone()), **more)
    return seen


# Steps far apart enough that rounding of the scaled function has not grown.
@pytest.mark.parametrize(
    "method", ["auto", "bfgs", "trust-krylov", "arc", "newton", "dogleg", "newton-cg", "prox-newton"]
)
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_scaling_the_function_changes_no_iterate(method: str, scale: float) -> None:
    plain = iterates(rosenbrock, START, method=method)
    scaled = iterates(lambda x: scale * rosenbrock(x), START, method=method)
    assert len(plain) == len(scaled)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "trust-krylov", "arc", "newton", "dogleg"])
@pytest.mark.parametrize("units", [2.0**-20, 2.0**20])
def test_units_of_x_change_no_iterate(method: str, units: float) -> None:
    plain = iterates(rosenbrock, START, method=method)
    scaled = iterates(lambda x: rosenbrock(x / units), units * START, method=method)
    assert len(plain) == len(scaled)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b / units, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("name", PROBLEMS)
def test_auto_solves_at_any_scale_of_function_and_x(name: str, scale: float) -> None:
    problem = PROBLEMS[name]
    found = hesse.minimize(lambda x: scale * problem.fun(x), problem.x0)
    assert found.success
    assert problem.gap(found.x) <= 1e-8
    units = scale**0.5
    found = hesse.minimize(lambda x: problem.fun(x / units), units * problem.x0)
    assert found.success
    assert problem.gap(found.x / units) <= 1e-8


@pytest.mark.parametrize("shift", [-1e6, 1e6])
def test_a_constant_added_costs_no_more_than_its_digits(shift: float) -> None:
    result = hesse.minimize(lambda x: rosenbrock(x) + shift, START)
    assert result.success
    assert PROBLEMS["Rosenbrock"].gap(result.x) <= 1e-9  # 1e6 * 1e-16, of 24


def test_a_dict_of_tensors() -> None:
    def fun(p: dict[str, Tensor]) -> Tensor:
        return rosenbrock(torch.stack([p["a"], p["b"][0, 0]])) + p["none"].sum()

    x0 = {"a": torch.tensor(-1.2).double(), "b": torch.ones(1, 1).double(), "none": torch.zeros(0).double()}
    result = hesse.minimize(fun, x0)
    assert result.success
    assert list(result.x) == list(x0)
    assert {k: v.shape for k, v in result.x.items()} == {k: v.shape for k, v in x0.items()}
    assert {k: v.shape for k, v in result.jac.items()} == {k: v.shape for k, v in x0.items()}
    torch.testing.assert_close(result.x["a"], torch.tensor(1.0).double())


def test_the_parameters_of_a_module_and_its_functional_call() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1).double()
    x = torch.randn(20, 2).double()
    y = x @ vector(2, -3)[:, None] + 0.5

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(model, params, (x,)) - y).square().mean()

    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    result = hesse.minimize(loss, dict(model.named_parameters()))
    assert result.success
    torch.testing.assert_close(result.x["weight"], vector(2, -3)[None], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert all(v.grad is None for v in model.parameters())


@pytest.mark.parametrize(
    "x0",
    [torch.full((2, 1), 3.0), np.full((2, 1), 3.0), np.full((2, 1), 3.0, np.float32)],
    ids=["tensor", "array", "single"],
)
def test_x_has_the_shape_and_kind_of_x0(x0: Any) -> None:
    result = hesse.minimize(lambda x: ((x - 1) ** 2).sum(), x0)
    assert type(result.x) is type(x0)
    assert result.x.shape == x0.shape == result.jac.shape
    assert result.x.dtype == (x0.dtype if isinstance(x0, Tensor) else np.float64)
    assert result.success
    assert float(abs(result.x - 1).max()) < 1e-3


def test_arguments_reach_function_and_derivatives() -> None:
    seen = set()

    def fun(x: Any, a: float, b: float) -> float:
        seen.add("fun")
        return float(((x - a) ** 2).sum() * b)

    def jac(x: Any, a: float, b: float) -> Any:
        seen.add("jac")
        return 2 * b * (x - a)

    def hess(x: Any, a: float, b: float) -> Any:
        seen.add("hess")
        return 2 * b * np.eye(2)

    def hessp(x: Any, v: Any, a: float, b: float) -> Any:
        seen.add("hessp")
        return 2 * b * v

    one = hesse.minimize(fun, np.zeros(2), (3.0, 2.0), jac=jac, hess=hess, method="trust-exact")
    two = hesse.minimize(fun, np.zeros(2), (3.0, 2.0), jac=jac, hessp=hessp, method="trust-krylov")
    assert seen == {"fun", "jac", "hess", "hessp"}
    for result in (one, two):
        np.testing.assert_allclose(result.x, 3)
    three = hesse.minimize(lambda x, a: ((x - a) ** 2).sum(), START, (vector(5, 6),))
    torch.testing.assert_close(three.x, vector(5, 6))


def test_one_argument_needs_no_tuple_as_in_scipy() -> None:
    result = hesse.minimize(lambda x, a: ((x - a) ** 2).sum(), START, 3.0)
    torch.testing.assert_close(result.x, vector(3, 3))


def test_the_gradient_with_the_value() -> None:
    array = hesse.minimize(lambda x: (FUN(x), JAC(x)), START.numpy(), jac=True)
    assert array.success
    np.testing.assert_allclose(array.x, 1, rtol=1e-6)
    for method in ("auto", "bfgs"):
        tensor = hesse.minimize(
            lambda x: (rosenbrock(x), torch.func.grad(rosenbrock)(x.detach())), START, jac=True, method=method
        )
        assert tensor.success
        torch.testing.assert_close(tensor.x, vector(1, 1))


def test_the_gradient_of_a_dict_with_the_value() -> None:
    def fun(p: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return rosenbrock(p["x"]), {"x": torch.func.grad(rosenbrock)(p["x"].detach())}

    result = hesse.minimize(fun, {"x": START}, jac=True, method="l-bfgs-b")
    assert result.success
    torch.testing.assert_close(result.x["x"], vector(1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["auto", "trust-exact", "newton-cg", "bfgs", "arc", "dogleg"])
def test_a_torch_function_with_a_gradient_of_its_own(method: str) -> None:
    result = hesse.minimize(rosenbrock, START, jac=torch.func.grad(rosenbrock), method=method)
    assert result.success
    torch.testing.assert_close(result.x, vector(1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["auto", "trust-exact", "newton", "dogleg", "arc", "trust-krylov", "newton-cg", "prox-newton"]
)
@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_a_sparse_hessian(method: str, l2: float) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    for kind in (sparse.csr_array, sparse.csc_matrix, sparse.coo_array):
        result = hesse.minimize(
            FUN, START.numpy(), jac=JAC, hess=lambda x, kind=kind: kind(HESS(x)), method=method, l2=l2
        )
        dense = hesse.minimize(FUN, START.numpy(), jac=JAC, hess=HESS, method="trust-exact", l2=l2)
        assert result.success
        np.testing.assert_allclose(result.x, dense.x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["auto", "trust-exact", "trust-krylov", "trust-ncg", "newton-cg", "arc-krylov"])
def test_products_alone_are_used(method: str) -> None:
    asked = [0]

    def hessp(x: Any, v: Any) -> Any:
        asked[0] += 1
        return HESS(x) @ v

    result = hesse.minimize(FUN, START.numpy(), jac=JAC, hessp=hessp, method=method)
    assert result.success
    np.testing.assert_allclose(result.x, 1, rtol=1e-5)
    assert asked[0] > 0
    assert result.njev <= result.nfev  # no differences of the gradient beside it


@pytest.mark.parametrize("method", ["auto", "bfgs", "trust-krylov", "prox-newton"])
def test_l2_is_half_the_sum_of_squares_added_by_hand(method: str) -> None:
    ours = hesse.minimize(rosenbrock, START, l2=0.3, method=method)
    hand = hesse.minimize(lambda x: rosenbrock(x) + 0.15 * x.square().sum(), START, method=method)
    torch.testing.assert_close(ours.x, hand.x, rtol=1e-6, atol=1e-8)
    assert ours.fun == pytest.approx(hand.fun, rel=1e-10)
    arrays = hesse.minimize(FUN, START.numpy(), jac=JAC, hess=HESS, l2=0.3)
    np.testing.assert_allclose(arrays.x, hand.x, rtol=1e-6)


def test_l1_and_bounds_are_kept_exactly() -> None:
    sparse = hesse.minimize(lambda x: 0.5 * (x - vector(3, 0.2, -2)).square().sum(), torch.zeros(3).double(), l1=1.0)
    torch.testing.assert_close(sparse.x, vector(2, 0, -1))
    assert float(sparse.x[1]) == 0
    boxed = hesse.minimize(lambda x: (x - 3).square().sum(), torch.zeros(3).double(), bounds=(None, vector(1, 2, 5)))
    assert boxed.x.tolist() == pytest.approx([1, 2, 3])
    assert boxed.success and sparse.success


def test_bounds_are_understood_in_scipys_forms() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    forms = [
        (0.0, 0.5),
        (torch.zeros(2), torch.full((2,), 0.5)),
        [(0, 0.5), (None, 0.5)],
        optimize.Bounds(0, 0.5),
        np.array([[0, 0.5], [0, 0.5]]),
    ]
    for bounds in forms:
        result = hesse.minimize(rosenbrock, vector(0.1, 0.1), bounds=bounds)
        assert result.success
        torch.testing.assert_close(result.x, vector(0.5, 0.25), rtol=1e-6, atol=1e-6)
    tenths = hesse.minimize(rosenbrock, vector(0, 0), bounds=[(0, 0.1), (None, None)])
    assert float(tenths.x[0]) == 0.1  # to the last digit


def test_the_callback_gets_x_after_every_step() -> None:
    seen: list[Any] = []
    result = hesse.minimize(rosenbrock, START, callback=seen.append)
    assert len(seen) == result.nit
    assert torch.equal(seen[-1], result.x)
    assert all(type(x) is Tensor for x in seen)
    arrays: list[Any] = []
    hesse.minimize(FUN, START.numpy(), jac=JAC, callback=lambda xk: arrays.append(xk))
    assert all(isinstance(x, np.ndarray) for x in arrays)


def test_the_callback_gets_a_result_under_scipys_name_for_it() -> None:
    seen: list[Result] = []

    def callback(intermediate_result: Result) -> None:
        seen.append(intermediate_result)

    result = hesse.minimize(rosenbrock, START, callback=callback)
    assert [r.nit for r in seen] == list(range(1, result.nit + 1))
    assert [r.fun for r in seen] == result.trace.fun[1:]
    assert not any(r.success for r in seen[:-1])


def test_stop_iteration_stops_with_what_was_found() -> None:
    def callback(x: Tensor) -> None:
        if float(rosenbrock(x)) < 1:
            raise StopIteration

    result = hesse.minimize(rosenbrock, START, callback=callback)
    assert result.status == Status.STOPPED
    assert not result.success
    assert 0 < result.fun < 1
    on = hesse.minimize(rosenbrock, result.state)
    whole = hesse.minimize(rosenbrock, START)
    assert on.success
    assert on.trace.fun == whole.trace.fun


def test_other_exceptions_of_function_and_callback_come_through() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        hesse.minimize(broken, START)
    with pytest.raises(ZeroDivisionError, match="mine"):
        hesse.minimize(rosenbrock, START, callback=broken)


def test_auto_says_what_it_chose_and_why() -> None:
    small = hesse.minimize(rosenbrock, START)
    assert "trust-exact" in small.message and "auto: 2 variables" in small.message
    values = hesse.minimize(FUN, START.numpy())
    assert "bfgs" in values.message and "differences of values" in values.message
    chain = hesse.minimize(
        lambda x: (x[1:] - x[:-1] ** 2).square().sum() + (1 - x).square().sum(), torch.zeros(300).double()
    )
    assert chain.success and "sparse" in chain.message
    dense = hesse.minimize(lambda x: x.square().sum().square() + (x - 1).square().sum(), torch.zeros(700).double())
    assert dense.success and "products" in dense.message


def test_the_default_tolerance_stops_at_the_digits_of_the_dtype() -> None:
    double = hesse.minimize(rosenbrock, START)
    single = hesse.minimize(rosenbrock, START.float())
    assert double.fun < 1e-12
    assert single.fun < 1e-5
    loose = hesse.minimize(rosenbrock, START, rtol=1e-3)
    assert loose.success and loose.nit < double.nit


def test_atol_stops_at_a_gradient() -> None:
    result = hesse.minimize(rosenbrock, START, atol=1.0)
    assert result.success
    assert float(result.jac.abs().max()) <= 1
    assert result.nit < hesse.minimize(rosenbrock, START).nit


@pytest.mark.parametrize("method", ["auto", "bfgs", "newton-cg"])
def test_no_more_than_max_steps_are_taken(method: str) -> None:
    for most in (0, 1, 3):
        result = hesse.minimize(rosenbrock, START, max_steps=most, method=method)
        assert result.nit == most
        assert result.status == Status.MAX_STEPS
    assert torch.equal(hesse.minimize(rosenbrock, START, max_steps=0).x, START)


def test_going_on_from_a_result_spends_what_was_left() -> None:
    part = hesse.minimize(rosenbrock, START, max_steps=5)
    on = hesse.minimize(rosenbrock, part.state)
    whole = hesse.minimize(rosenbrock, START)
    assert torch.equal(on.x, whole.x)
    assert on.nit == whole.nit
    assert on.trace.fun == whole.trace.fun
    assert on.nfev <= whole.nfev + 2


def test_names_are_forgiving_as_scipys() -> None:
    for name in ("BFGS", "L-BFGS-B", "Newton-CG", "l_bfgs", "Trust-Exact"):
        assert hesse.minimize(rosenbrock, START, method=name, max_steps=2).nit == 2


def test_a_method_put_together_by_hand() -> None:
    assert Method is SameMethod
    mine = Method("mine", Gradient(), Fixed(0.1))
    result = hesse.minimize(lambda x: (x - 3).square().sum(), torch.zeros(1).double(), method=mine, max_steps=10)
    assert float(result.x) == pytest.approx(3 - 3 * 0.8**10)  # the textbook's iteration
    assert result.method == "mine"
    armijo = hesse.minimize(
        lambda x: (x - 3).square().sum(), torch.zeros(1).double(), method=Method("a", Gradient(), Armijo())
    )
    assert armijo.success


def test_the_check_passes_a_right_gradient_at_any_scale() -> None:
    for scale in (1e-10, 1.0, 1e10):
        assert hesse.minimize(lambda x: scale * FUN(x), START.numpy(), jac=lambda x: scale * JAC(x), check=True).success  # noqa: B023
    assert hesse.minimize(rosenbrock, START.float(), check=True).success
