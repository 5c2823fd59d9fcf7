"""A loss that says what it is the sum of: against dense Hessians by autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.curvature import ggn
from hesse.curvature.losses import own
from hesse.curvature.output import output_curvature, term_gradients
from hesse.optim import KFAC
from loss_cases import assert_mean, matrix_of
from tolerances import ALGEBRA

N, WIDTH = 4, 7


def fourth(outputs: Tensor, targets: Any) -> Tensor:
    """A loss of one's own that no other looks like, a mean over rows."""
    return outputs.pow(4).sum() / outputs.shape[0]


class Sum:
    """Classes in columns 0 to 2 of all rows, values in the next two of some, and a loss of its own that overlaps."""

    def summands(self, outputs: Tensor, targets: Any) -> Iterator[tuple[float, Any, slice, Tensor | None, Any]]:
        classes, values = targets
        rows = torch.tensor([0, 3])
        yield 0.5, F.cross_entropy, slice(0, 3), None, classes
        yield 2.0, F.mse_loss, slice(3, 5), rows, values[rows]
        yield 0.1, fourth, slice(4, 7), None, None

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        classes, values = targets
        o = outputs
        squares = (o[0, 3:5] - values[0]).square().sum() + (o[3, 3:5] - values[3]).square().sum()
        return 0.5 * F.cross_entropy(o[:, :3], classes) + 2.0 * squares / 4 + 0.1 * fourth(o[:, 4:], None)


LOSS = Sum()


def problem() -> tuple[Tensor, Any]:
    g = torch.Generator().manual_seed(1)
    o, values = (torch.randn(N, width, generator=g, dtype=torch.float64) for width in (WIDTH, 2))
    return o, (torch.tensor([0, 2, 1, 1]), values)


def test_product_is_the_dense_hessian() -> None:
    o, targets = problem()
    dense = torch.autograd.functional.hessian(lambda o: LOSS(o, targets), o).reshape(o.numel(), o.numel())
    curvature = output_curvature(LOSS, o, targets)
    torch.testing.assert_close(matrix_of(curvature.product, o.shape), dense, **ALGEBRA)
    assert (curvature.name, curvature.reduction, curvature.total) == ("Sum", "mean", N)
    assert not curvature.psd  # nobody said so of the loss of one's own


def test_draws_have_the_hessian_as_second_moment_and_roots_add_up_to_it() -> None:
    o, targets = problem()
    curvature = output_curvature(LOSS, o, targets)
    dense = matrix_of(curvature.product, o.shape)
    torch.manual_seed(0)
    flat = torch.stack([curvature.draw() for _ in range(600)]).reshape(600, -1)
    assert_mean(curvature.weight * flat.unsqueeze(2) * flat.unsqueeze(1), dense)
    columns = torch.stack(list(curvature.root()))
    blocks = torch.einsum("kni,knj->nij", columns, columns)
    torch.testing.assert_close(torch.block_diag(*blocks), dense, **ALGEBRA)


def test_term_gradients_are_those_of_each_row() -> None:
    o, targets = problem()
    o.requires_grad_()
    (slope,) = torch.autograd.grad(LOSS(o, targets), o)
    found = term_gradients(LOSS, o, targets, output_curvature(LOSS, o, targets))
    torch.testing.assert_close(found, N * slope, **ALGEBRA)


def test_a_summand_without_a_probability_model_is_named() -> None:
    o, targets = problem()
    with pytest.raises(TypeError, match="the loss 'fourth' has no probability model"):
        output_curvature(LOSS, o, targets).label()


def test_it_averages_and_says_so() -> None:
    o, targets = problem()
    with pytest.raises(ValueError, match="the loss 'Sum' has reduction='mean' itself; got reduction='sum'"):
        output_curvature(LOSS, o, targets, "sum")


def test_the_gauss_newton_matrix_of_a_model_is_dense_algebra() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, WIDTH).double()
    _, targets = problem()
    x = torch.randn(N, 3).double()
    matrix = ggn(model, LOSS, (x, targets))
    params = {name: p.detach() for name, p in model.named_parameters()}
    flat = torch.cat([p.flatten() for p in params.values()])

    def loss(v: Tensor) -> Tensor:  # of a linear model, the Hessian is the Gauss-Newton matrix
        parts = v.split([p.numel() for p in params.values()])
        pairs = zip(params.items(), parts, strict=True)
        return LOSS(torch.func.functional_call(model, {n: v.view_as(p) for (n, p), v in pairs}, (x,)), targets)

    dense = torch.autograd.functional.hessian(loss, flat)
    torch.testing.assert_close(matrix @ torch.eye(len(flat)).double(), dense, **ALGEBRA)


class Wide:
    """More outputs than a dense Hessian of each row is formed for."""

    def summands(self, outputs: Tensor, targets: Any) -> Iterator[tuple[float, Any, slice, Tensor | None, Any]]:
        half = outputs.shape[1] // 2
        yield 1.0, F.cross_entropy, slice(0, half), None, targets
        yield 1.0, F.cross_entropy, slice(half, 2 * half), None, targets

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        one, two = outputs.chunk(2, 1)
        return F.cross_entropy(one, targets) + F.cross_entropy(two, targets)


def test_k_fac_trains_more_outputs_than_a_dense_hessian_is_formed_for() -> None:
    torch.manual_seed(0)
    half = own.WIDEST
    model = nn.Linear(5, 2 * half).double()
    targets = torch.arange(200) % 5
    batch = torch.nn.functional.one_hot(targets, 5).double() + 0.1 * torch.randn(200, 5).double(), targets
    optimizer = KFAC(model)
    losses = [float(optimizer.step(hesse.closure(model, Wide(), batch))) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]
