"""The model of a sparse Hessian is that of the same matrix written out, but for a tenth of the radius."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flat_functions import chained_rosenbrock
from hesse.curvature.compressed import CompressedHessian
from hesse.linalg.banded import SparseMatrix
from hesse.minimizers.descents.newton import Exact
from hesse.minimizers.models.dense import Dense
from hesse.minimizers.models.factored import Factored
from minimizers.points import promise

N = 60
CLOSE = 0.1  # the length of a step may miss the radius by this share


def chain(bend: float, seed: int = 0) -> tuple[SparseMatrix, Tensor]:
    """Hessian and gradient of a chain of cosines and squares; all eigenvalues are above ``bend - 1``."""

    def fun(x: Tensor) -> Tensor:
        return x.sin().sum() + 0.5 * bend * x.square().sum() + (x[1:] - x[:-1]).square().sum()

    return of(fun, torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def of(fun: object, x: Tensor) -> tuple[SparseMatrix, Tensor]:
    assert callable(fun)
    recipe = CompressedHessian.of(fun, x)
    assert recipe is not None
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(fun(leaf), leaf, create_graph=True)
    return recipe.recover(g, leaf), g.detach()


def factored(H: SparseMatrix, g: Tensor) -> Any:
    model = Exact().model(SimpleNamespace(hessian=lambda: H, gradient=lambda: g, x=torch.zeros_like(g)), {})
    assert isinstance(model, Factored)
    return model


def both(H: SparseMatrix, g: Tensor) -> tuple[Any, Dense]:
    return factored(H, g), Dense(H.dense(), g, torch.zeros_like(g))


def test_of_a_convex_model_the_whole_step_is_newtons() -> None:
    H, g = chain(2.0)
    sparse, dense = both(H, g)
    torch.testing.assert_close(sparse.whole, dense.whole, rtol=1e-9, atol=1e-11)
    assert sparse.predicted == pytest.approx(dense.predicted)
    assert sparse.lowest > 0
    assert sparse.length == pytest.approx(dense.length)
    assert torch.equal(sparse.within(1e6).s, sparse.whole)


@pytest.mark.parametrize("bend", [2.0, 0.5, -1.0, -5.0])
@pytest.mark.parametrize("part", [1e-4, 0.1, 0.9, 30.0])
def test_a_step_in_a_region_gains_what_the_dense_model_gains_in_one_a_tenth_smaller(bend: float, part: float) -> None:
    H, g = chain(bend)
    sparse, dense = both(H, g)
    radius = part * dense.length
    step = sparse.within(radius)
    assert float(step.s.norm()) <= (1 + CLOSE) * radius * (1 + 1e-12)
    assert step.length == pytest.approx(float(step.s.norm()))
    assert step.predicted == pytest.approx(promise(H.dense(), g, step.s), rel=1e-9)
    assert step.predicted >= dense.within((1 - CLOSE) * radius).predicted * (1 - 1e-9)


@pytest.mark.parametrize("bend", [-1.0, -5.0])
def test_negative_curvature_is_told_and_has_no_promise(bend: float) -> None:
    H, g = chain(bend)
    assert float(torch.linalg.eigvalsh(H.dense())[0]) < 0
    model = factored(H, g)
    assert model.lowest < 0
    assert model.predicted == math.inf
    assert float(g @ model.whole) < 0
    assert 0 < model.length < math.inf


def test_the_hard_case_reaches_the_edge() -> None:
    """The gradient has no part in the element whose curvature is lowest."""
    H, g = of(
        lambda x: (x[1:] * x[:-1])[1:].sum() + 2 * x.square().sum() - 5 * x[0] ** 2 + x[1:].sum(),
        torch.zeros(N).double(),
    )
    assert float(g[0]) == 0
    sparse, dense = both(H, g)
    radius = 3 * float((g / 4).norm())
    step = sparse.within(radius)
    assert float(step.s.norm()) <= (1 + CLOSE) * radius
    assert step.predicted >= dense.within((1 - CLOSE) * radius).predicted * 0.999


def test_at_a_saddle_without_a_slope_a_region_is_left_along_the_lowest_curvature() -> None:
    H, _ = chain(-1.0)
    step = factored(H, torch.zeros(N, dtype=torch.float64)).within(0.5)
    assert float(step.s.norm()) == pytest.approx(0.5, rel=CLOSE)
    assert step.predicted > 0


def test_a_singular_matrix_with_a_slope_along_its_null_space_goes_to_the_edge() -> None:
    H, g = of(lambda x: (x[1:] - x[:-1]).square().sum() + x.sum(), torch.zeros(N).double())
    model = factored(H, g)
    step = model.within(2.0)
    assert float(step.s.norm()) == pytest.approx(2, rel=CLOSE)
    assert step.predicted >= 0.8 * 2 * float(g.norm())  # a straight line down


def test_one_step_after_another_solves_a_long_chain() -> None:
    x = torch.zeros(N, dtype=torch.float64)
    for _ in range(8):
        H, g = of(lambda x: x.cosh().sum() + chained_rosenbrock(x) * 0 + (x[1:] - x[:-1] - 1).square().sum(), x)
        x = x + factored(H, g).whole
    assert float(g.abs().max()) < 1e-12
