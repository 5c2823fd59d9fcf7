"""Losses are SciPy's, their derivatives those of autograd, and outliers do not move a robust fit."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from hesse.minimizers.fits.robust import LOSSES, loss_of
from hesse.minimizers.least_squares import least_squares
from tolerances import ALGEBRA

ROBUST = [name for name in LOSSES if name != "linear"]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


T = torch.linspace(0, 4, 40, dtype=torch.float64)
CLEAN = 2 * torch.exp(-0.8 * T)
OUTLIERS = torch.zeros(40, dtype=torch.float64)
OUTLIERS[[3, 11, 19, 30]] = vector(2, -1.5, 3, 1)


def decay(x: Tensor) -> Tensor:
    wobble = 0.02 * (9 * T).sin()
    return x[0] * torch.exp(-x[1] * T) - (CLEAN + OUTLIERS + wobble)


def decay_arrays(x: np.ndarray) -> np.ndarray:
    return decay(torch.as_tensor(x)).numpy()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_the_cost_is_scipys(name: str, scale: float) -> None:
    x = np.array([1.7, 0.5])
    known = scipy.optimize.least_squares(decay_arrays, x, loss=name, f_scale=scale, max_nfev=1).cost
    assert loss_of(name, scale)(decay(torch.as_tensor(x))).cost == pytest.approx(known, rel=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_weight_and_bend_are_the_derivatives_of_the_cost(name: str) -> None:
    r = vector(-5, -1.2, -0.3, 1e-9, 0.4, 0.8, 3, 200).requires_grad_()
    values = torch.stack([LOSSES[name]((r[i] / 0.7) ** 2)[0] for i in range(len(r))])
    (slope,) = torch.autograd.grad(0.5 * 0.7**2 * values.sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), r)
    rho = loss_of(name, 0.7)(r.detach())
    torch.testing.assert_close(rho.weight * r.detach(), slope.detach(), **ALGEBRA)
    torch.testing.assert_close(rho.bend, second, **ALGEBRA)
    assert bool((rho.kept > 0).all()) and bool((rho.kept >= rho.bend).all())


@pytest.mark.parametrize("name", ROBUST)
def test_no_loss_cancels_at_small_residuals(name: str) -> None:
    r = vector(1e-9, -1e-9)
    assert loss_of(name, 1.0)(r).cost == pytest.approx(1e-18, rel=1e-12)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("method", ["auto", "lm"])
def test_robust_fits_are_scipys(name: str, method: str) -> None:
    fit = least_squares(decay, vector(1, 1), loss=name, f_scale=0.1, method=method)
    known = scipy.optimize.least_squares(
        decay_arrays, [1, 1], jac="3-point", loss=name, f_scale=0.1, ftol=1e-14, xtol=1e-14, gtol=1e-12
    )
    assert fit.success and fit.cost == pytest.approx(known.cost, rel=1e-8)
    np.testing.assert_allclose(fit.x.numpy(), known.x, rtol=1e-5)


def test_outliers_move_the_plain_fit_and_not_the_robust_one() -> None:
    plain, robust = (least_squares(decay, vector(1, 1), loss=name, f_scale=0.05).x for name in ("linear", "cauchy"))
    assert float((robust - vector(2, 0.8)).norm()) < 0.03 < 0.15 < float((plain - vector(2, 0.8)).norm())


def test_an_own_loss_is_differentiated() -> None:
    named = least_squares(decay, vector(1, 1), loss="cauchy", f_scale=0.1)
    for own in (torch.log1p, lambda z: torch.stack([z.log1p(), 1 / (1 + z), -1 / (1 + z) ** 2])):
        fit = least_squares(decay, vector(1, 1), loss=own, f_scale=0.1)
        torch.testing.assert_close(fit.x, named.x, **ALGEBRA)

    def scipys(z: np.ndarray) -> np.ndarray:
        return np.stack([np.log1p(z), 1 / (1 + z), -1 / (1 + z) ** 2])

    arrays = least_squares(decay_arrays, np.ones(2), loss=scipys, f_scale=0.1)
    np.testing.assert_allclose(arrays.x, named.x.numpy(), rtol=1e-5)  # J by differences
    plain = least_squares(decay, vector(1, 1), loss=lambda z: z)
    torch.testing.assert_close(plain.x, least_squares(decay, vector(1, 1)).x, **ALGEBRA)


def test_robust_losses_go_with_bounds_and_l2() -> None:
    fit = least_squares(decay, vector(1, 1), loss="huber", f_scale=0.1, bounds=((0.0), (vector(1.8, 9))))
    known = scipy.optimize.least_squares(
        decay_arrays, [1, 1], jac="3-point", loss="huber", f_scale=0.1, bounds=(0, [1.8, 9]), ftol=1e-14, xtol=1e-14
    )
    np.testing.assert_allclose(fit.x.numpy(), known.x, rtol=1e-5)
    assert fit.active_mask.tolist() == [1, 0]
    shrunk = least_squares(decay, vector(1, 1), loss="huber", f_scale=0.1, l2=0.5)
    x = shrunk.x.clone().requires_grad_()
    cost = huber_loss(decay(x), torch.zeros_like(T), reduction="sum", delta=0.1) + 0.25 * x @ x
    (g,) = torch.autograd.grad(cost, x)
    assert shrunk.cost == pytest.approx(float(cost.detach()), rel=1e-12)
    torch.testing.assert_close(shrunk.grad, g, **ALGEBRA)


@pytest.mark.parametrize(
    "loss, error, match",
    [
        (3, TypeError, "name or a function"),
        (lambda z: 1.0, TypeError, "got float"),
        (lambda z: z.sum(), ValueError, "rho of each z, .40."),
    ],
)
def test_wrong_losses_are_refused(loss: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        least_squares(decay, vector(1, 1), loss=loss)  # type: ignore[arg-type]


def test_an_own_loss_of_arrays_needs_its_derivatives() -> None:
    with pytest.raises(ValueError, match=r"as an array \[3, 40\]"):
        least_squares(decay_arrays, np.ones(2), loss=np.log1p)
