"""Fits end where SciPy's and the closed forms say, by whatever way the Jacobian comes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from torch import Tensor

from hesse.minimizers.fits.boxed import Boxed
from hesse.minimizers.fits.linearised import Curved, Linear, bidiagonal
from hesse.minimizers.fits.residuals import TorchResiduals
from hesse.minimizers.fits.robust import loss_of
from hesse.minimizers.functions.border import border_of
from hesse.minimizers.least_squares import least_squares
from hesse.minimizers.models.dense import Dense
from hesse.minimizers.result import MinimizeError, Status
from hesse.minimizers.state import State
from tolerances import ALGEBRA

Residual = Callable[[Tensor], Tensor]

# The package has the function under the name of its module.
module = importlib.import_module("hesse.minimizers.least_squares")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def jennrich_sampson(x: Tensor) -> Tensor:
    i = torch.arange(1, 11, dtype=torch.float64)
    return 2 + 2 * i - ((i * x[0]).exp() + (i * x[1]).exp())


def powell_singular(x: Tensor) -> Tensor:
    return torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def box(x: Tensor) -> Tensor:
    t = 0.1 * torch.arange(1, 11, dtype=torch.float64)
    return (-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())


TIMES = torch.linspace(0, 4, 30, dtype=torch.float64)


def decay(x: Tensor) -> Tensor:
    """Two exponentials through data that they do not meet."""
    data = 2 * (-0.5 * TIMES).exp() + (-3 * TIMES).exp() + 0.05 * (7 * TIMES).sin()
    return x[0] * (-x[1] * TIMES).exp() + x[2] * (-x[3] * TIMES).exp() - data


def reciprocal(x: Tensor) -> Tensor:
    """Meyer's thermistor: columns of J differ by six decades."""
    data = vector(34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872)
    return x[0] * (x[1] / (45 + 5 * torch.arange(1, 17, dtype=torch.float64) + x[2])).exp() - data


def kowalik_osborne(x: Tensor) -> Tensor:
    u = vector(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)
    y = vector(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
    return y - x[0] * (u * u + u * x[1]) / (u * u + u * x[2] + x[3])


# Residuals, start, and the least sums of squares in the literature.
FITS: dict[str, tuple[Residual, Tensor, float]] = {
    "rosenbrock": (rosenbrock, vector(-1.2, 1), 0.0),
    "freudenstein-roth": (freudenstein_roth, vector(0.5, -2), 48.98425367924),
    "jennrich-sampson": (jennrich_sampson, vector(0.3, 0.4), 124.3621823556),
    "powell-singular": (powell_singular, vector(3, -1, 0, 1), 0.0),
    "box": (box, vector(0, 10, 20), 0.0),
    "kowalik-osborne": (kowalik_osborne, vector(0.25, 0.39, 0.415, 0.39), 3.075056038492e-4),
    "reciprocal": (reciprocal, vector(0.02, 4000, 250), 87.9458551706),
}


def arrays(residual: Residual) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The residuals and their Jacobian as NumPy functions."""

    def values(x: np.ndarray) -> np.ndarray:
        return residual(torch.as_tensor(x)).numpy()

    def jac(x: np.ndarray) -> np.ndarray:
        return torch.func.jacrev(residual)(torch.as_tensor(x)).numpy()

    return values, jac


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("method", ["auto", "lm", "dogleg"])
def test_every_method_reaches_the_known_least_squares(name: str, method: str) -> None:
    residual, x0, best = FITS[name]
    fit = least_squares(residual, x0, method=method)
    assert fit.success
    assert abs(2 * fit.cost - best) <= 1e-8 * best + 1e-10
    assert torch.equal(fit.fun, residual(fit.x))
    # At a minimum what is left of the gradient is the rounding of the terms that cancel.
    terms = float((torch.func.jacrev(residual)(fit.x).mT.abs() @ fit.fun.abs()).max())
    torch.testing.assert_close(
        fit.grad, torch.func.jacrev(residual)(fit.x).mT @ fit.fun, rtol=0, atol=1e-12 + 1e-14 * terms
    )
    assert fit.optimality == float(fit.grad.abs().max())


def test_second_derivatives_take_a_fraction_of_the_steps_where_residuals_remain() -> None:
    for name in ("freudenstein-roth", "jennrich-sampson", "kowalik-osborne"):
        residual, x0, _ = FITS[name]
        fit, plain = least_squares(residual, x0), least_squares(residual, x0, method="lm")
        assert fit.nhev > 0 and plain.nhev == 0
        assert fit.nfev + fit.njev + fit.nhev < 0.75 * (plain.nfev + plain.njev)


def test_a_kink_is_not_taken_for_precision() -> None:
    fit = least_squares(lambda x: (x.abs() + 0.1) * torch.ones(3).double() - x / 2, vector(1.3), method="lm")
    assert fit.status == Status.KINK and float(fit.x.abs()) < 1e-6


def test_zero_residuals_need_no_second_derivatives() -> None:
    assert least_squares(box, FITS["box"][1]).nhev == 0


def test_auto_leaves_a_saddle_that_gauss_newton_takes_for_a_minimum() -> None:
    def residual(x: Tensor) -> Tensor:
        return torch.stack([x[0] ** 2 - 1, x[1]])

    assert least_squares(residual, vector(0, 0.5), method="lm").cost == pytest.approx(0.5)
    assert least_squares(residual, vector(0, 0.5)).cost < 1e-20


def test_a_large_fit_leaves_a_saddle_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE", 0)
    fit = least_squares(lambda x: torch.cat([x[:1] ** 2 - 1, x[1:], torch.ones(1, dtype=x.dtype)]), vector(0, 0.5, 1))
    assert fit.success and fit.cost == pytest.approx(0.5) and fit.nhev == 0


@pytest.mark.parametrize("m, n", [(2, 5), (6, 5), (40, 5)])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_jacobians_rows_and_columns_are_those_of_dense_autograd(m: int, n: int, limit: int) -> None:
    A, B = random(m, n), random(m, n, seed=1)

    def residual(x: Tensor) -> Tensor:
        return torch.sin(A @ x) * torch.exp(B @ x) + torch.logcumsumexp(A @ x, 0)

    x, v, u = random(n, seed=2), random(n, seed=3), random(m, seed=4)
    source = TorchResiduals(residual, border_of(x), loss_of("linear", 1.0), limit=limit)
    at, J = source.evaluate(x), torch.func.jacrev(residual)(x)
    assert source.dense(at) == (limit > 0)
    torch.testing.assert_close(source.jacobian(x, at), J, **ALGEBRA)
    fresh = source.evaluate(x)
    torch.testing.assert_close(source.push(x, fresh, v), J @ v, **ALGEBRA)
    torch.testing.assert_close(source.pull(x, fresh, u), J.mT @ u, **ALGEBRA)


class Cube(torch.autograd.Function):
    """A function that neither vmap nor a second backward pass goes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.numpy() ** 2) * g


def test_jacobians_come_row_by_row_where_nothing_else_goes() -> None:
    A, x = random(9, 2), random(2, seed=1)
    source = TorchResiduals(lambda x: A @ Cube.apply(x), border_of(x), loss_of("linear", 1.0))
    torch.testing.assert_close(source.jacobian(x, source.evaluate(x)), A * 3 * x**2, **ALGEBRA)
    source.limit = 0
    with pytest.raises(RuntimeError, match="no second derivative"):
        source.push(x, source.evaluate(x), x)


@pytest.mark.parametrize("loss", ["linear", "huber", "soft_l1", "cauchy", "arctan"])
def test_gradient_hessian_and_products_of_the_cost_are_those_of_autograd(loss: str) -> None:
    x, v, scale = vector(1.5, 0.7, 0.4, 2), random(4), 0.3

    def cost(x: Tensor) -> Tensor:
        z = (decay(x) / scale) ** 2
        rho = {
            "linear": z,
            "huber": torch.where(z <= 1, z, 2 * z.clamp_min(1e-300).sqrt() - 1),
            "soft_l1": 2 * ((1 + z).sqrt() - 1),
            "cauchy": (1 + z).log(),
            "arctan": z.arctan(),
        }
        return 0.5 * scale**2 * rho[loss].sum()

    source = TorchResiduals(decay, border_of(x), loss_of(loss, scale))
    at = source.evaluate(x)
    g, H = torch.func.grad(cost)(x), torch.func.hessian(cost)(x)
    torch.testing.assert_close(source.value(x)[0], float(cost(x)), rtol=1e-12, atol=0)
    torch.testing.assert_close(source.gradient(x, at), g, **ALGEBRA)
    torch.testing.assert_close(source.hessian(x, at, g), H, **ALGEBRA)
    torch.testing.assert_close(source.product(x, at, g, v), H @ v, **ALGEBRA)


@pytest.mark.parametrize("given", ["none", "jac", "sparse"])
def test_arrays_are_fitted_as_tensors_are(given: str) -> None:
    residual, jac = arrays(decay)
    x0 = np.array([1.0, 1.0, 2.0, 4.0])
    wanted = least_squares(decay, torch.from_numpy(x0))
    chosen = {"none": None, "jac": jac, "sparse": lambda x: scipy.sparse.csr_array(jac(x))}[given]
    fit = least_squares(residual, x0, jac=chosen)
    assert fit.success and isinstance(fit.x, np.ndarray) and isinstance(fit.jac, np.ndarray)
    assert fit.cost == pytest.approx(wanted.cost, rel=1e-9)
    # Differences leave half the digits in the gradient, and flat directions of this fit a few less in x.
    np.testing.assert_allclose(fit.x, wanted.x.numpy(), rtol=1e-4)
    assert ("differences" in fit.message) == (given == "none")


def test_evaluations_for_differences_are_counted() -> None:
    calls = 0

    def residual(x: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return np.array([x[0] - 1, x[0] * x[1] - 2, x[1] ** 2])

    assert least_squares(residual, np.array([3.0, 1.0])).nfev == calls


def test_x_and_residuals_keep_their_kind_and_shape() -> None:
    target = {"a": random(2, 3), "b": random(4, seed=1)}

    def residual(x: dict[str, Tensor]) -> Tensor:
        return torch.cat([(x["a"] - target["a"]).flatten(), x["b"] ** 3 - target["b"]])[:, None]

    fit = least_squares(residual, {"a": torch.zeros(2, 3).double(), "b": torch.ones(4).double()})
    torch.testing.assert_close(fit.x["a"], target["a"], **ALGEBRA)
    torch.testing.assert_close(fit.x["b"] ** 3, target["b"], rtol=1e-6, atol=1e-8)  # flat at the root of a cube
    assert fit.fun.shape == (10, 1) and fit.grad["a"].shape == (2, 3) and fit.active_mask["b"].shape == (4,)


def test_a_given_jacobian_of_a_dict_may_be_a_dict() -> None:
    def jac(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"b": torch.tensor([[0.0], [2.0]]).double(), "a": torch.tensor([[3.0], [0.0]]).double()}

    def residual(x: dict[str, Tensor]) -> Tensor:
        return torch.cat([3 * x["a"] - 6, 2 * x["b"] - 8]).detach()

    fit = least_squares(residual, {"a": vector(0), "b": vector(0)}, jac=jac)
    assert fit.x == {"a": vector(2), "b": vector(4)}


def test_float32_converges_to_its_own_precision() -> None:
    fit = least_squares(lambda x: rosenbrock(x) + 1, torch.tensor([-1.2, 1.0]))
    wanted = least_squares(lambda x: rosenbrock(x) + 1, vector(-1.2, 1))
    assert fit.success and fit.x.dtype == torch.float32
    torch.testing.assert_close(fit.x.double(), wanted.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["auto", "lm", "arrays"])
def test_bounded_fits_end_where_scipy_finds_nothing_lower(seed: int, kind: str) -> None:
    x0 = vector(1, 1, 2, 4)
    low, high = x0 - random(4, seed=seed).abs(), x0 + random(4, seed=seed + 100).abs()
    values, jac = arrays(decay)
    if kind == "arrays":
        fit = least_squares(values, x0.numpy(), jac=jac, bounds=(low.numpy(), high.numpy()))
    else:
        fit = least_squares(decay, x0, method=kind, bounds=(low, high))
    x, mask = torch.as_tensor(fit.x), torch.as_tensor(fit.active_mask)
    assert fit.success and bool(((x >= low) & (x <= high)).all())
    # From the same start SciPy may end in another minimum; from ours it must not find the way to a lower one.
    limits = {"bounds": (low.numpy(), high.numpy()), "ftol": 1e-14, "xtol": 1e-14, "gtol": 1e-12}
    known = [scipy.optimize.least_squares(values, start, jac=jac, **limits) for start in (x0.numpy(), x.numpy())]
    assert fit.cost <= known[1].cost * (1 + 1e-7) and fit.cost <= 1.02 * known[0].cost
    assert torch.equal(mask, (x == high).double() - (x == low).double())


def test_a_bound_that_is_a_point_holds_its_element_still() -> None:
    A, b = random(6, 3), random(6, seed=1)
    fit = least_squares(lambda x: A @ x - b, torch.zeros(3).double(), bounds=(vector(-9, 0.5, -9), vector(9, 0.5, 9)))
    rest = torch.linalg.lstsq(A[:, [0, 2]], b - 0.5 * A[:, 1])[0]
    torch.testing.assert_close(fit.x, torch.stack([rest[0], vector(0.5)[0], rest[1]]), **ALGEBRA)


def test_linear_fits_with_bounds_are_those_of_lsq_linear() -> None:
    A, b = random(30, 12), 3 * random(30, seed=1)
    known = scipy.optimize.lsq_linear(A.numpy(), b.numpy(), bounds=(-0.2, 0.3), tol=1e-14, method="bvls")
    fit = least_squares(lambda x: A @ x - b, torch.zeros(12).double(), bounds=(-0.2, 0.3))
    np.testing.assert_allclose(fit.x.numpy(), known.x, atol=1e-8)


@pytest.mark.parametrize("method", ["auto", "lm", "dogleg"])
def test_products_alone_lead_where_the_whole_jacobian_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x0 = vector(*[-1.2, 1.0] * 20)

    def residual(x: Tensor) -> Tensor:
        return torch.cat([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]])

    monkeypatch.setattr(module, "DENSE", 0)
    fit = least_squares(residual, x0, method=method, l2=0.0)
    assert fit.success and fit.nhvp > 0 and "products" in fit.message
    torch.testing.assert_close(fit.x, torch.ones(40).double(), rtol=1e-8, atol=0)
    v = random(40)
    torch.testing.assert_close(fit.jac(v), torch.func.jacrev(residual)(fit.x) @ v, **ALGEBRA)


@pytest.mark.parametrize("dense", [0, 1 << 20])
def test_l2_is_as_many_more_residuals(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE", dense)
    x0 = vector(1, 1, 2, 4)
    fit = least_squares(decay, x0, l2=0.3)
    long = least_squares(lambda x: torch.cat([decay(x), 0.3**0.5 * x]), x0)
    torch.testing.assert_close(fit.x, long.x, rtol=1e-5, atol=1e-7)
    assert fit.cost == pytest.approx(long.cost, rel=1e-10)


def test_fewer_residuals_than_unknowns_give_the_nearest_solution() -> None:
    A, b, x0 = random(3, 7), random(3, seed=1), random(7, seed=2)
    fit = least_squares(lambda x: A @ x - b, x0)
    torch.testing.assert_close(fit.x, x0 + torch.linalg.pinv(A) @ (b - A @ x0), **ALGEBRA)
    assert "one of many" in fit.message


def test_x_scale_by_the_jacobian_is_blind_to_units() -> None:
    units = vector(1e-5, 1, 1e4, 1e2)
    x0 = vector(1, 1, 2, 4)
    fit = least_squares(decay, x0, x_scale="jac", method="lm")
    other = least_squares(lambda y: decay(y * units), x0 / units, x_scale="jac", method="lm")
    assert fit.nfev == other.nfev
    torch.testing.assert_close(other.x * units, fit.x, rtol=1e-6, atol=0)
    given = least_squares(lambda y: decay(y * units), x0 / units, x_scale=1 / units, method="lm")
    assert given.nfev == least_squares(decay, x0, method="lm").nfev


def test_the_inverse_is_the_covariance() -> None:
    fit = least_squares(decay, vector(1, 1, 2, 4), l2=0.1)
    wanted = torch.linalg.inv(fit.jac.mT @ fit.jac + 0.1 * torch.eye(4).double())
    torch.testing.assert_close(fit.hess_inv, wanted, **ALGEBRA)
    with pytest.raises(ValueError, match="rank 1 and x 2 elements"):
        _ = least_squares(lambda x: x.sum()[None], vector(1, 2)).hess_inv


def test_a_solve_goes_on_from_its_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    residual, x0, _ = FITS["reciprocal"]
    whole = least_squares(residual, x0, x_scale="jac")
    part = least_squares(residual, x0, x_scale="jac", max_steps=7)
    assert part.status == Status.MAX_STEPS and part.nit == 7 and part.state is not None
    part.state.save(tmp_path / "fit.safetensors")
    for state in (part.state, State.load(tmp_path / "fit.safetensors")):
        rest = least_squares(residual, state, x_scale="jac")
        assert torch.equal(rest.x, whole.x) and rest.nit == whole.nit
        assert rest.trace.fun == whole.trace.fun


def test_the_callback_sees_every_step_and_may_stop() -> None:
    seen: list[Any] = []

    def stop(intermediate_result: Any) -> None:
        seen.append(intermediate_result)
        if len(seen) == 3:
            raise StopIteration

    fit = least_squares(rosenbrock, vector(-1.2, 1), callback=stop)
    assert fit.status == Status.STOPPED and fit.nit == 3 and torch.equal(seen[-1].x, fit.x)
    steps: list[Tensor] = []
    done = least_squares(rosenbrock, vector(-1.2, 1), callback=steps.append)
    assert len(steps) == done.nit and torch.equal(steps[-1], done.x)


def test_nan_at_the_start_is_said_and_nan_on_the_way_is_avoided() -> None:
    fit = least_squares(lambda x: x.log(), vector(-1, 1))
    assert fit.status == Status.NOT_FINITE and not fit.success and math.isnan(fit.optimality)
    with pytest.raises(MinimizeError, match="not finite"):
        least_squares(lambda x: x.log(), vector(-1, 1), throw=True)
    assert torch.allclose(least_squares(lambda x: x.log(), vector(30, 2)).x, torch.ones(2).double())


def test_nothing_to_do_is_done_at_once() -> None:
    fit = least_squares(lambda x: x - 1, vector(1, 1))
    assert fit.success and fit.nit == 0 and fit.cost == 0
    constant = least_squares(lambda x: torch.ones(3).double(), vector(1, 1))
    assert constant.success and constant.cost == 1.5 and torch.equal(constant.jac, torch.zeros(3, 2).double())


def test_the_result_prints_its_numbers() -> None:
    text = repr(least_squares(rosenbrock, vector(-1.2, 1)))
    assert "cost: 0" in text and "x: [1, 1]" in text and "Levenberg-Marquardt, J [2, 2] by autodiff" in text


def good(x: Tensor) -> Tensor:
    return x - 1


@pytest.mark.parametrize(
    "residual, error, match",
    [
        (lambda x: x.square().sum(), ValueError, "one number"),
        (lambda x: torch.complex(x, x), TypeError, "complex"),
        (lambda x: x.round().int(), TypeError, "integers"),
        (lambda x: None, TypeError, "None"),
        (lambda x: [x], TypeError, "got list"),
        (lambda x: x.float(), TypeError, "float32, and x0 is float64"),
        (lambda x: x.detach() ** 2, ValueError, "carry no gradient"),
    ],
)
def test_wrong_residuals_are_refused_with_the_cause(residual: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        least_squares(residual, vector(1, 2))


@pytest.mark.parametrize(
    "residual, error, match",
    [
        (lambda x: float(x.sum()), ValueError, "one number"),
        (lambda x: x + 1j, TypeError, "complex"),
        (lambda x: [1, 2], TypeError, "integers"),
        (lambda x: None, TypeError, "None"),
        (lambda x: "r", TypeError, "got str"),
        (lambda x: [[1.0], [1.0, 2.0]], TypeError, "different lengths"),
    ],
)
def test_wrong_arrays_are_refused_with_the_cause(residual: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        least_squares(residual, np.ones(2))


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"method": "trf"}, ValueError, "got 'trf'. Its bounds"),
        ({"method": "newton"}, ValueError, "auto, lm, dogleg"),
        ({"loss": "l1"}, ValueError, "got 'l1'"),
        ({"f_scale": 0.0}, ValueError, "f_scale must be positive"),
        ({"x_scale": "auto"}, ValueError, "x_scale must be 'jac'"),
        ({"x_scale": vector(1, 2, 3)}, ValueError, "x_scale must have the shape"),
        ({"x_scale": -1.0}, ValueError, "positive"),
        ({"bounds": (1.0, 0.0)}, ValueError, "crossed"),
        ({"l2": -1.0}, ValueError, "l2"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"max_steps": -1}, ValueError, "max_steps"),
        ({"jac": lambda x: torch.ones(3, 2)}, ValueError, "jac must return .2, 2."),
        ({"jac": lambda x: "J"}, TypeError, "jac must return a matrix"),
    ],
)
def test_wrong_arguments_are_refused_with_the_cause(options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        least_squares(good, vector(3, 4), **options)


def test_a_residual_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="residual must be a function"):
        least_squares(vector(1), vector(3, 4))  # type: ignore[arg-type]


def test_a_transposed_jacobian_is_recognised() -> None:
    with pytest.raises(ValueError, match="transpose"):
        least_squares(lambda x: torch.cat([x, x]), vector(3, 4), jac=lambda x: torch.ones(2, 4))


# -- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [3, 5, 20])
@pytest.mark.parametrize("radius", [1e-3, 0.3, 1e3])
def test_the_linear_models_steps_are_those_of_the_squared_one(m: int, radius: float) -> None:
    J, f, scale = random(m, 5), random(m, seed=1), vector(1, 2, 0.5, 1, 3)
    step = Linear(J, f, scale).within(radius)
    H, g = (J / scale).mT @ (J / scale), J.mT @ f / scale
    # Fewer rows than columns leave J'J singular: a tiny part of the identity makes its step the shortest one.
    known = Dense(H + 1e-9 * torch.eye(5).double(), g, torch.zeros(5).double()).within(radius)
    torch.testing.assert_close(step.s * scale, known.s, rtol=1e-6, atol=1e-6)
    assert step.predicted == pytest.approx(known.predicted, rel=1e-6)
    assert step.length == pytest.approx(float((step.s * scale).norm())) and step.length <= radius * (1 + 1e-9)
    assert step.predicted == pytest.approx(Linear(J, f, scale).gain(step.s), rel=1e-9)


def test_conditioning_is_not_squared() -> None:
    Q, _ = torch.linalg.qr(random(20, 4))
    P, _ = torch.linalg.qr(random(4, 4, seed=1))
    J = Q * vector(1, 1e-3, 1e-6, 1e-9) @ P
    x = random(4, seed=2)
    s = Linear(J, -(J @ x), torch.ones(4).double()).within(math.inf).s
    # 1e-16 times a condition of 1e9; of J'J nothing would be left.
    torch.testing.assert_close(s, x, rtol=1e-5, atol=1e-6)


def test_the_dogleg_goes_down_and_stays_within() -> None:
    J, f, one = random(6, 4), random(6, seed=1), torch.ones(4).double()
    bent, best = Linear(J, f, one, dogleg=True), Linear(J, f, one)
    for part in (0.01, 0.3, 0.6, 0.9, 1.0):
        radius = part * best.length
        step = bent.within(radius)
        assert step.length <= radius * (1 + 1e-9)
        assert 0.5 * best.within(radius).predicted < step.predicted <= best.within(radius).predicted * (1 + 1e-9)


def test_bidiagonalisation_solves_least_squares() -> None:
    J, f, scale = random(30, 8), random(30, seed=1), torch.linspace(1, 3, 8, dtype=torch.float64)
    B, head, V = bidiagonal(lambda v: J @ v, lambda u: J.mT @ u, f, scale, 1e-12, 50)
    model = Linear(B, head, scale, basis=V)
    torch.testing.assert_close(model.within(math.inf).s, -torch.linalg.lstsq(J, f)[0], rtol=1e-9, atol=1e-9)
    known = Linear(J, f, scale)
    assert model.predicted == pytest.approx(known.predicted, rel=1e-10)
    torch.testing.assert_close(model.within(0.1).s, known.within(0.1).s, rtol=1e-7, atol=1e-9)
    loose = bidiagonal(lambda v: J @ v, lambda u: J.mT @ u, f, scale, 0.1, 50)[0]
    assert loose.shape[1] < B.shape[1]


def test_bidiagonalisation_keeps_its_basis_orthogonal() -> None:
    Q, _ = torch.linalg.qr(random(60, 40))
    P, _ = torch.linalg.qr(random(40, 40, seed=1))
    J = Q * torch.logspace(0, -6, 40, dtype=torch.float64) @ P
    _, _, V = bidiagonal(lambda v: J @ v, lambda u: J.mT @ u, random(60, seed=2), torch.ones(40).double(), 1e-14, 40)
    torch.testing.assert_close(V.mT @ V, torch.eye(V.shape[1]).double(), **ALGEBRA)


def test_a_boxed_model_is_as_good_as_the_best_of_a_grid() -> None:
    J, f, x = random(5, 2), 4 * random(5, seed=1), vector(0.2, -0.1)
    one = torch.ones(2).double()
    low, high = vector(-0.5, -0.3), vector(0.4, 0.6)
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    g, saddle = J.mT @ f, torch.diag(vector(-3, 2))
    linear = Boxed(lambda i: Linear(J[:, i], f, one[i]), J.mT @ J, g, x, one, (low, high))
    curved = Boxed(lambda i: Curved(saddle[i][:, i], g[i], x[i], one[i]), saddle, g, x, one, (low, high))
    for model in (linear, curved):
        step = model.within(50.0)
        grid = torch.cartesian_prod(low[0] + t * (high - low)[0], low[1] + t * (high - low)[1]) - x
        values = -(grid @ g + 0.5 * ((grid @ model.H) * grid).sum(1))
        assert step.predicted >= float(values.max()) - 1e-9
        assert bool(((x + step.s >= low - 1e-12) & (x + step.s <= high + 1e-12)).all())
