"""Hessian-free optimisation: conjugate gradients find the damped Gauss-Newton step, and it trains to the end."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.optim import newton_cg
from hesse.optim.newton_cg import NewtonCG, conjugate_gradients
from oracles import flat, gauss_newton, gradient
from problems import PROBLEMS, Problem, as_double, problem
from tolerances import ALGEBRA


def closure_of(p: Problem) -> Any:
    return hesse.closure(p.model, p.loss_fn, p.batch)


def spd(n: int, condition: float) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return q @ torch.diag(torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ q.T


def test_conjugate_gradients_end_at_the_solution() -> None:
    A, b = spd(12, 100), torch.arange(12.0).double()
    x = torch.linalg.solve(A, b)
    for start in (None, torch.ones(12).double(), 100 * torch.ones(12).double()):
        path = conjugate_gradients(lambda v: A @ v, b, start, lambda r: r / A.diagonal(), 60, progress=1e-15)
        torch.testing.assert_close(path.iterates[-1], x, rtol=1e-6, atol=1e-8)
        for y, value in zip(path.iterates, path.values, strict=True):
            assert value == pytest.approx(float(0.5 * y @ A @ y - b @ y), rel=1e-8)
        assert all(after <= before + 1e-12 for before, after in pairwise(path.values))


def test_a_start_that_is_worse_than_zero_is_not_begun_from() -> None:
    A, b = spd(12, 100), torch.arange(12.0).double()
    assert conjugate_gradients(lambda v: A @ v, b, 1e3 * torch.ones(12).double(), lambda r: r, 2).values[-1] < 0


def test_a_perfect_preconditioner_needs_one_product() -> None:
    A, b = spd(12, 1e6), torch.arange(12.0).double()
    path = conjugate_gradients(lambda v: A @ v, b, None, lambda r: torch.linalg.solve(A, r), 1)
    torch.testing.assert_close(path.iterates[-1], torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)


def test_products_are_bounded_and_progress_ends_them() -> None:
    A, b = spd(200, 1e6), torch.ones(200).double()
    calls = 0

    def multiply(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return A @ v

    for limit in (1, 2, 7):
        calls = 0
        conjugate_gradients(multiply, b, b, lambda r: r, limit)
        assert calls == limit
    calls = 0
    conjugate_gradients(multiply, b, None, lambda r: r, 1000, progress=1e-2)
    assert newton_cg.WINDOW <= calls < 200


def test_negative_curvature_ends_the_iteration_with_what_there_is() -> None:
    A = torch.diag(torch.tensor([1.0, -1.0]).double())
    slope = torch.tensor([0.0, 2.0]).double()
    assert torch.equal(conjugate_gradients(lambda v: A @ v, slope, None, lambda r: r, 9).iterates[-1], slope)
    mixed = conjugate_gradients(lambda v: A @ v, torch.tensor([2.0, 1.0]).double(), None, lambda r: r, 9)
    assert mixed.values[-1] < 0
    assert bool(mixed.iterates[-1].isfinite().all())


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_step_is_that_of_the_dense_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conjugate_gradients, "__defaults__", (1e-14,))
    p = as_double(problem(name))
    torch.manual_seed(0)
    objective = closure_of(p).objective
    before = flat(objective.params).detach()
    g = flat(gradient(objective)) + 0.1 * before
    eye = torch.eye(len(g)).double()
    expected = -torch.linalg.solve(gauss_newton(objective) + 0.3 * eye, g)
    torch.manual_seed(0)
    NewtonCG(p.model, 1.0, 0.2, max_products=400, weight_decay=0.1).step(closure_of(p))
    found = flat(dict(p.model.named_parameters())).detach() - before
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_diagonal_is_that_of_the_matrix_in_the_mean() -> None:
    p = as_double(problem("mlp, cross-entropy"))
    optimizer = NewtonCG(p.model, 0.0, 1.0)  # stays where it is
    exact = gauss_newton(closure_of(p).objective).diagonal()
    total, samples = torch.zeros_like(exact), 100
    for _ in range(samples):
        optimizer.state.clear()
        optimizer.step(closure_of(p))
        total += flat({name: optimizer.state[q]["diagonal"] for name, q in p.model.named_parameters()})
    # The sum of 75 entries, each the mean of 100 squares of numbers that are nearly normal and far from independent.
    assert float(total.sum() / samples / exact.sum()) == pytest.approx(1.0, abs=0.15)


def test_multinomial_logistic_regression_converges_as_newton_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 8).double()
    y = (x + torch.randn(300, 8))[:, :4].argmax(1)
    x = x * torch.logspace(0, 1, 8)
    model = nn.Linear(8, 4).double()
    optimizer = NewtonCG(model)
    for _ in range(12):
        optimizer.step(hesse.closure(model, F.cross_entropy, (x, y)))
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 1e-5


def test_the_first_batch_sets_the_damping_to_the_scale_of_the_loss() -> None:
    found = []
    for scale in (1.0, 1e4):
        p = problem("mlp, squared error")
        optimizer = NewtonCG(p.model)

        def loss_fn(outputs: Tensor, targets: Tensor, scale: float = scale) -> Tensor:
            return scale * F.mse_loss(outputs, targets)

        optimizer.step(hesse.closure(p.model, loss_fn, p.batch))
        found.append(optimizer.param_groups[0]["damping"])
    assert found[1] / found[0] == pytest.approx(1e4, rel=1e-2)


def test_products_are_counted_and_bounded() -> None:
    p = problem("mlp, cross-entropy")
    optimizer = NewtonCG(p.model, damping=1e-3, max_products=5)
    optimizer.step(closure_of(p))
    assert optimizer.param_groups[0]["products"] == 5
    with pytest.raises(ValueError, match="max_products must be at least 1; got 0"):
        NewtonCG(p.model, max_products=0)


def test_the_last_solution_is_where_the_next_begins() -> None:
    p = as_double(problem("mlp, squared error"))
    optimizer = NewtonCG(p.model, lr=1e-6, damping=1e-3, max_products=60)
    optimizer.step(closure_of(p))
    update = torch.cat([optimizer.state[q]["update"].flatten() for q in p.model.parameters()])
    first = optimizer.param_groups[0]["products"]
    optimizer.step(closure_of(p))
    again = torch.cat([optimizer.state[q]["update"].flatten() for q in p.model.parameters()])
    assert optimizer.param_groups[0]["products"] <= first
    assert float(F.cosine_similarity(update, again, dim=0)) > 0.95


def test_a_loss_without_samples_goes_without_a_preconditioner() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 5)
    model = nn.Linear(5, 3)
    p = Problem(model, lambda o, t: (o - t).square().mean().sqrt(), (x, x[:, :3]))  # couples examples
    optimizer = NewtonCG(model)
    losses = [float(optimizer.step(closure_of(p))) for _ in range(8)]
    assert losses[-1] < 0.3 * losses[0]
    assert all("diagonal" not in optimizer.state[q] for q in model.parameters())


def test_the_algebra_of_the_promise() -> None:
    A = spd(6, 10)
    b = torch.ones(6).double()
    path = conjugate_gradients(lambda v: A @ v + v, b, None, lambda r: r, 50, progress=1e-15)
    x = path.iterates[-1]
    optimizer = NewtonCG(nn.Linear(1, 1), damping=1.0)
    expected = b @ x - 0.5 * x @ A @ x
    torch.testing.assert_close(torch.tensor(optimizer._promised(path, -1), dtype=torch.float64), expected, **ALGEBRA)
