"""Gauss-Newton and Fisher products against dense Jacobians, one autograd row at a time, in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.curvature import fisher, ggn, hessian
from hesse.curvature.jacobian import JACOBIANS
from hesse.objective import Objective
from oracles import gauss_newton, jacobian
from problems import PROBLEMS, as_double, mlp, problem, still, vectors
from tolerances import ALGEBRA, STANDARD_ERRORS


def pair(name: str, **options: Any) -> tuple[Any, Objective, Any]:
    made = as_double(problem(name))
    torch.manual_seed(5)
    operator = ggn(*made, **options)
    torch.manual_seed(5)
    return operator, Objective(made.model, made.loss_fn, *made.batch), made


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    operator, objective, _ = pair(name)
    v = vectors(operator.shape[0], 2)
    # Jacobian rows of a padding row are zero, so the dense matrix holds it still by itself.
    torch.testing.assert_close(operator @ v, gauss_newton(objective) @ v, **ALGEBRA)
    assert operator.psd


@pytest.mark.parametrize("mode", JACOBIANS)
@pytest.mark.parametrize("name", ["mlp, squared error", "convnet, BatchNorm", "transformer", "LSTM", "weight norm"])
def test_modes_agree(name: str, mode: str) -> None:
    operator, objective, made = pair(name, mode=mode)
    assert operator.mode == mode
    v = still(made, vectors(operator.shape[0], 1)[:, 0])
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if mode == "differences" else ALGEBRA
    torch.testing.assert_close(operator @ v, gauss_newton(objective) @ v, **tolerance)


@pytest.mark.parametrize("way", ["one by one", "kept graph"])
def test_columns_blocks_and_dicts(way: str) -> None:
    operator, objective, _ = pair("transformer, eval")
    operator._way = way
    dense = gauss_newton(objective)
    torch.testing.assert_close(operator.dense(), dense, **ALGEBRA)
    rows = operator.layout.slices["head.weight"]
    torch.testing.assert_close(operator.block("head.weight").dense(), dense[rows, rows], **ALGEBRA)
    v = vectors(operator.shape[0], 1)[:, 0]
    named = operator @ operator.layout.split(v)
    torch.testing.assert_close(operator.layout.flatten(named), dense @ v, **ALGEBRA)


class Pair(nn.Module):
    """Returns a nest of tensors, one of which depends on no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"mean": self.mean(x), "rest": (self.spread(x), x.sum())}


def test_a_nest_of_outputs_and_a_loss_of_ones_own() -> None:
    torch.manual_seed(0)
    model, x = Pair().double(), torch.randn(6, 3, dtype=torch.float64)

    def loss_fn(outputs: dict[str, Any], y: Tensor) -> Tensor:
        return (0.5 * (outputs["mean"] - y).square() * outputs["rest"][0].exp() - outputs["rest"][0]).mean()

    y = torch.randn(6, 1, dtype=torch.float64)
    operator = ggn(model, loss_fn, (x, y))
    assert not operator.psd  # not convex in both at once
    flat = torch.cat([model.mean(x), model.spread(x)], 1)

    def of_flat(o: Tensor) -> Tensor:
        return loss_fn({"mean": o[:, :1], "rest": (o[:, 1:], None)}, y)

    middle = torch.autograd.functional.hessian(of_flat, flat.detach()).reshape(12, 12)
    rows = [
        torch.autograd.grad(o, list(model.parameters()), retain_graph=True, materialize_grads=True)
        for o in flat.flatten()
    ]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    v = vectors(8, 9)
    torch.testing.assert_close(operator @ v, j.T @ middle @ j @ v, **ALGEBRA)


def test_a_lambda_around_a_known_loss_is_the_same_matrix() -> None:
    operator, _, made = pair("mlp, cross-entropy")
    own = ggn(made.model, lambda o, t: F.cross_entropy(o, t), made.batch)
    v = vectors(operator.shape[0], 1)
    torch.testing.assert_close(own @ v, operator @ v, **ALGEBRA)


def test_losses_without_curvature_are_refused_with_the_reason() -> None:
    x = torch.randn(4, 5)
    with pytest.raises(TypeError, match=r"l1_loss.*second derivative"):
        ggn(mlp(), F.l1_loss, (x, torch.zeros(4, 3)))


# -- Fisher ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp, cross-entropy", "mlp, binary cross-entropy", "mlp, squared error"])
def test_the_exact_fisher_is_the_gauss_newton_matrix(name: str) -> None:
    operator, _, made = pair(name)
    exact = fisher(*made)
    assert exact.psd
    torch.testing.assert_close(exact.dense(), operator.dense(), **ALGEBRA)


@pytest.mark.parametrize("name", ["mlp, cross-entropy", "mlp, binary cross-entropy", "mlp, squared error"])
def test_sampled_fishers_average_to_the_exact_one(name: str) -> None:
    operator, _, made = pair(name)
    v = vectors(operator.shape[0], 1)
    draws = torch.stack([fisher(*made, fisher_type="sampled", seed=1000 * s) @ v for s in range(400)])
    error = draws.std(0) / 20
    assert bool(((draws.mean(0) - operator @ v).abs() <= STANDARD_ERRORS * error).all())


def test_a_seed_is_a_draw() -> None:
    made = as_double(problem("mlp, cross-entropy"))
    one, again, other = (fisher(*made, fisher_type="sampled", seed=s).dense() for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["mlp, cross-entropy", "mlp, squared error"])
def test_the_empirical_fisher_is_the_sum_over_examples(name: str, reduction: str) -> None:
    model, loss_fn, (x, y) = as_double(problem(name))
    operator = fisher(model, functools.partial(loss_fn, reduction=reduction), (x, y), fisher_type="empirical")
    one = functools.partial(loss_fn, reduction="sum")
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(one(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))]
        )
        for i in range(len(x))
    ]
    per_example = torch.stack(rows)
    # The squared error of two outputs averages over both: a term is an output, an example has two.
    weight = 1.0 if reduction == "sum" else 1 / (len(x) * (2 if y.is_floating_point() else 1))
    torch.testing.assert_close(operator.dense(), weight * per_example.T @ per_example, **ALGEBRA)


def test_fisher_types_and_losses_it_does_not_know() -> None:
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match="fisher_type must be one of 'exact', 'sampled', 'empirical'; got 'true'"):
        fisher(mlp(), F.mse_loss, (x, torch.zeros(4, 3)), fisher_type="true")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="probability model"):
        fisher(mlp(), F.huber_loss, (x, torch.zeros(4, 3)))


def test_the_jacobian_oracle_is_not_the_product_under_test() -> None:
    """A fault planted in the loss's curvature shows: the dense matrix is built without it."""
    operator, objective, _ = pair("mlp, squared error")
    j = jacobian(objective)
    torch.testing.assert_close(operator.dense(), 2 * j.T @ j / len(j), **ALGEBRA)


class TiedTokens(nn.Module):
    """The head is the embedding, whose padding row is a class like the others there and a constant before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        nn.init.normal_(self.embedding.weight)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh().mean(1))


@pytest.mark.parametrize("mode", ["double-backward", "forward"])
def test_a_tied_padding_row(mode: str) -> None:
    torch.manual_seed(0)
    model, x = TiedTokens().double(), torch.randint(5, (8, 3))
    batch = x, x[:, 0]
    operator = ggn(model, F.cross_entropy, batch, mode=mode)
    torch.testing.assert_close(operator.dense(), gauss_newton(Objective(model, F.cross_entropy, *batch)), **ALGEBRA)
    dense = hessian(model, F.cross_entropy, batch).dense()
    torch.testing.assert_close(dense, dense.T, **ALGEBRA)
