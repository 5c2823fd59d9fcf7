"""Hessians that are mended instead of formed: when, how often, and that they lead to the same minimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from hesse.minimizers import minimize
from hesse.minimizers.descents.newton import COSTLY, Exact, Mended
from hesse.minimizers.functions.autodiff import Autodiff
from hesse.minimizers.functions.border import border_of
from hesse.minimizers.functions.function import Function, Point
from tolerances import ALGEBRA


def points(n: int, length: float) -> tuple[Point, Point]:
    """Two points of a quartic bowl, a step of ``length`` apart, the Hessian known at the first."""
    x = torch.linspace(0.5, 1, n, dtype=torch.float64)

    def bowl(x: Tensor) -> Tensor:
        return (x**4).sum() + 1e-3 * (x[1:] * x[:-1]).sum()

    function = Function(Autodiff(bowl, border_of(x)), border_of(x))
    old, new = function.at(x), function.at(x - length * x)
    old.hessian()
    return old, new


def test_a_mended_hessian_is_symmetric_and_fits_the_change_of_the_gradient() -> None:
    old, new = points(5, 0.4)
    mended = Mended().update({}, old, new)["mended"]
    torch.testing.assert_close(mended @ (new.x - old.x), new.gradient() - old.gradient(), **ALGEBRA)
    torch.testing.assert_close(mended, mended.T, **ALGEBRA)


@pytest.mark.parametrize(("n", "length", "kept"), [(5, 0.4, True), (5, 0.01, False), (COSTLY + 1, 0.01, True)])
def test_a_model_that_was_true_is_kept_only_where_hessians_are_costly(n: int, length: float, kept: bool) -> None:
    assert bool(Mended().update({}, *points(n, length))["mended"].numel()) is kept


@pytest.mark.parametrize(
    ("n", "length", "kept"), [(5, 0.01, False), (COSTLY + 1, 0.01, True), (COSTLY + 1, 0.4, False)]
)
def test_a_mended_hessian_is_mended_again_only_where_costly_and_true(n: int, length: float, kept: bool) -> None:
    old, new = points(n, length)
    memory = {"mended": old.hessian()}
    unseen = old.function.at(old.x)  # its Hessian was not formed
    assert bool(Mended().update(memory, unseen, new)["mended"].numel()) is kept


def test_wide_convex_problems_take_fewer_hessians_than_steps() -> None:
    g = torch.Generator().manual_seed(0)
    A = torch.randn(400, COSTLY + 20, dtype=torch.float64, generator=g)

    def logistic(x: Tensor) -> Tensor:
        return softplus(A @ x).mean() + 0.05 * x @ x

    result = minimize(logistic, torch.zeros(COSTLY + 20, dtype=torch.float64))
    assert result.success
    assert 2 * result.nhev <= result.njev
    gradient = torch.func.grad(logistic)(result.x)
    assert float(gradient.abs().max()) < 1e-8


def test_the_whole_hessian_leaves_nothing_behind() -> None:
    assert Exact().update({}, *points(5, 0.4)) == {}
