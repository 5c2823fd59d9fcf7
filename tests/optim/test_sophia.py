"""Sophia: clipped steps by the paper's formula, and guesses of the Gauss-Newton diagonal that are right on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.optim.sophia import SophiaG, SophiaH, sophia
from problems import Problem, as_double, problem
from tolerances import ALGEBRA, STANDARD_ERRORS

SOPHIA: dict[str, Callable[..., Any]] = {"SophiaH": SophiaH, "SophiaG": SophiaG}


def closure_of(p: Problem) -> hesse.Closure:
    return hesse.closure(p.model, p.loss_fn, p.batch)


def gauss_newton_diagonal(p: Problem) -> dict[str, Tensor]:
    """diag J' H_L J with both factors dense, by autograd, on the loss as it is."""
    params = {name: q.detach() for name, q in p.model.named_parameters()}
    x, y = p.batch

    def outputs(at: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(p.model, at, (x,))

    o = outputs(params).detach()
    H = torch.func.hessian(lambda o: p.loss_fn(o, y))(o).reshape(o.numel(), o.numel())
    found = {}
    for name, J in torch.func.jacrev(outputs)(params).items():
        J = J.reshape(o.numel(), -1)
        found[name] = ((H @ J) * J).sum(0).reshape(params[name].shape)
    return found


def guesses(p: Problem, number: int) -> dict[str, Tensor]:
    optimizer = SophiaG(p.model.parameters(), lr=0.0, betas=(0.0, 0.0), every=1)
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in p.model.named_parameters()}
    for _ in range(number):
        optimizer.step(closure_of(p))
        for name, q in p.model.named_parameters():
            seen[name].append(optimizer.state[q]["hessian"].clone())
    return {name: torch.stack(values) for name, values in seen.items()}


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 2.0, 0.5]).double(), ignore_index=1)


def fourth_power(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - F.one_hot(targets, 3)).pow(4).sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": F.cross_entropy,
    "sum": lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum"),
    "class weights, some ignored": weighted,
    "own": fourth_power,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_of_the_guesses_is_the_diagonal_of_the_gauss_newton_matrix(name: str) -> None:
    made = as_double(problem("mlp, cross-entropy"))
    p = Problem(made.model, LOSSES[name], made.batch)
    exact = gauss_newton_diagonal(p)
    for n, values in guesses(p, 300).items():
        assert bool((values >= 0).all())
        error = (values.mean(0) - exact[n]).abs()
        assert bool((error <= STANDARD_ERRORS * values.std(0) / 300**0.5 + 1e-12).all()), n


@pytest.mark.parametrize("kind", SOPHIA)
def test_the_steps_are_the_formula_of_the_paper(kind: str) -> None:
    """Against a plain loop, with the guesses of an optimiser that looks at the same points and never moves them."""
    made, again = as_double(problem("mlp, cross-entropy")), as_double(problem("mlp, cross-entropy"))
    lr, beta1, beta2, gamma, decay, every = 0.05, 0.9, 0.8, 0.3, 0.01, 2
    optimizer = SOPHIA[kind](
        made.model.parameters(), lr=lr, betas=(beta1, beta2), gamma=gamma, every=every, weight_decay=decay
    )
    look = SOPHIA[kind](again.model.parameters(), lr=0.0, betas=(0.0, 0.0), every=1)
    params = dict(again.model.named_parameters())
    m = {n: torch.zeros_like(q) for n, q in params.items()}
    h = {n: torch.zeros_like(q) for n, q in params.items()}
    clipped = []
    for t in range(6):
        optimizer.step(closure_of(made))
        look.step(closure_of(again))
        for n, q in params.items():
            m[n] = beta1 * m[n] + (1 - beta1) * q.grad
            if t % every == 0:
                h[n] = beta2 * h[n] + (1 - beta2) * look.state[q]["hessian"]
            ratio = m[n] / (gamma * h[n]).clamp_min(1e-12)
            clipped.append((ratio.abs() > 1).flatten())
            q.data = q.data * (1 - lr * decay) - lr * ratio.clamp(-1, 1)
        for (n, q), other in zip(params.items(), made.model.parameters(), strict=True):
            torch.testing.assert_close(other, q, **ALGEBRA, msg=n)
    assert 0 < torch.cat(clipped).double().mean() < 1  # both sides of the clip were taken


@pytest.mark.parametrize("kind", SOPHIA)
def test_no_element_moves_further_than_lr(kind: str) -> None:
    p = problem("text")
    optimizer = SOPHIA[kind](p.model.parameters(), lr=0.01)
    for _ in range(12):
        before = [q.detach().clone() for q in p.model.parameters()]
        optimizer.step(closure_of(p))
        for q, old in zip(p.model.parameters(), before, strict=True):
            assert float((q.detach() - old).abs().max()) <= 0.01 + 1e-6  # weights of about 2, rounded


def test_zero_momentum_does_not_move_and_negative_curvature_steps_by_sign() -> None:
    m, h = torch.tensor([0.0, 0.0, -2.0, 1e-30]), torch.tensor([0.0, 1.0, -5.0, 0.0])
    (found,) = sophia([m], [h], 0.01, 1e-12)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0, -1e-18]))


def test_maximize_climbs_by_the_curvature_of_the_negative() -> None:
    up, down = (as_double(problem("mlp, cross-entropy")) for _ in range(2))
    one = SophiaH(up.model.parameters(), lr=0.01, maximize=True, every=1)
    two = SophiaH(down.model.parameters(), lr=0.01, every=1)
    for _ in range(4):
        one.step(closure_of(up))
        two.step(hesse.closure(down.model, lambda outputs, y: -F.cross_entropy(outputs, y), down.batch))
    for q, r in zip(up.model.parameters(), down.model.parameters(), strict=True):
        torch.testing.assert_close(q, r, **ALGEBRA)


def test_a_loss_without_curvature_is_named() -> None:
    p = problem("mlp, squared error")
    optimizer = SophiaG(p.model.parameters())
    with pytest.raises(TypeError, match="l1_loss"):
        optimizer.step(hesse.closure(p.model, F.l1_loss, p.batch))


def test_climbing_a_convex_loss_by_its_gauss_newton_matrix_is_refused() -> None:
    p = problem("mlp, cross-entropy")
    before = [q.detach().clone() for q in p.model.parameters()]
    with pytest.raises(ValueError, match=r"convex in the outputs.*SophiaH"):
        SophiaG(p.model.parameters(), maximize=True).step(closure_of(p))
    assert all(torch.equal(q, old) for q, old in zip(p.model.parameters(), before, strict=True))


def test_the_gauss_newton_guess_needs_no_second_derivative_of_the_model() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.exp())
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.layer(x))

    torch.manual_seed(0)
    model = Model()
    p = Problem(model, F.mse_loss, (torch.randn(8, 3), torch.rand(8, 1)))
    optimizer = SophiaG(model.parameters(), lr=0.02)
    losses = [float(optimizer.step(closure_of(p))) for _ in range(20)]
    assert losses[-1] < losses[0]
