"""The minimiser's derivative is that of closed forms and of differences, once and twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import softplus

from hesse.minimizers import implicit
from hesse.minimizers.implicit import argmin
from hesse.minimizers.result import MinimizeError
from tolerances import ALGEBRA


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logistic(x: Tensor, A: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return softplus(A @ x - b).sum() + w.exp() * (x**4).sum() / 4 + (x * x).sum() / 2


def theta() -> tuple[Tensor, ...]:
    return random(6, 3).requires_grad_(), random(6, seed=1).requires_grad_(), random(1, seed=2)[0].requires_grad_()


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64)


@pytest.mark.parametrize("dense", [0, 500])
def test_derivatives_are_those_of_differences_once_and_twice(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implicit, "DENSE", dense)
    solve = argmin(logistic, zeros(3))
    assert gradcheck(solve, theta())
    assert gradgradcheck(solve, theta())


def test_ridge_regression_has_its_closed_form_and_slopes() -> None:
    A, b, w = random(20, 5), random(20, seed=1), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    solve = argmin(lambda x, w: (A @ x - b).square().sum() / 2 + w / 2 * x @ x, zeros(5))
    x = solve(w)
    H = A.mT @ A + 0.7 * torch.eye(5).double()
    torch.testing.assert_close(x, torch.linalg.solve(H, A.mT @ b), **ALGEBRA)
    loss = (x - 1).square().sum()
    (slope,) = torch.autograd.grad(loss, w, create_graph=True)
    y = (-torch.linalg.solve(H, x)).detach()
    torch.testing.assert_close(slope, 2 * (x - 1) @ y, **ALGEBRA)
    (second,) = torch.autograd.grad(slope, w)
    torch.testing.assert_close(second, 2 * y @ y - 4 * (x - 1).detach() @ torch.linalg.solve(H, y), **ALGEBRA)


def test_a_loose_solve_is_polished_to_the_digits_that_derivatives_need() -> None:
    A, b, w = (t.detach() for t in theta())
    x = argmin(logistic, zeros(3), rtol=1e-2)(A, b, w)
    assert float(torch.func.grad(logistic)(x, A, b, w).abs().max()) < 1e-9


def test_l2_of_the_options_is_part_of_the_function() -> None:
    A, b = random(8, 3), random(8, seed=1).requires_grad_()
    (g,) = torch.autograd.grad(argmin(lambda x, b: (A @ x - b).square().sum() / 2, zeros(3), l2=0.5)(b).sum(), b)
    wanted = A @ torch.linalg.solve(A.mT @ A + 0.5 * torch.eye(3).double(), torch.ones(3).double())
    torch.testing.assert_close(g, wanted, **ALGEBRA)


def test_dicts_go_in_and_out() -> None:
    def fun(x: dict[str, Tensor], t: dict[str, Tensor], power: int) -> Tensor:
        return (x["a"] - t["a"]).square().sum() + (x["b"] - t["b"] * x["a"].sum() ** power).square().sum()

    t = {"a": torch.ones(2).double().requires_grad_(), "b": torch.tensor(2.0).double().requires_grad_()}
    x = argmin(fun)(t, 2)  # a = t.a, b = t.b (sum a)^2
    torch.testing.assert_close(x["b"], torch.tensor(8.0).double(), **ALGEBRA)
    found = torch.autograd.grad(x["b"], [t["a"], t["b"]])
    torch.testing.assert_close(found, (torch.full((2,), 8.0).double(), torch.tensor(4.0).double()), **ALGEBRA)


def test_the_start_says_shape_and_dtype() -> None:
    target = torch.ones(2, 3, requires_grad=True)
    x = argmin(lambda x, t: (x - t).square().sum())(target)
    assert x.shape == (2, 3) and x.dtype == torch.float32
    (g,) = torch.autograd.grad(x.sum(), target)
    torch.testing.assert_close(g, torch.ones(2, 3))


def test_no_gradient_is_asked_and_none_comes() -> None:
    x = argmin(lambda x, t: (x - t).square().sum())(torch.ones(3))
    assert not x.requires_grad and torch.equal(x, torch.ones(3))
    fixed, free = torch.ones(2), torch.ones(2, requires_grad=True)
    x = argmin(lambda x, s, t, k: (x - s * t[k]).square().sum(), torch.zeros(2))(fixed, free, torch.tensor([0, 1]))
    (g,) = torch.autograd.grad(x.sum(), free)
    torch.testing.assert_close(g, torch.ones(2))


def test_what_does_not_matter_has_a_zero_derivative() -> None:
    t, s = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    x = argmin(lambda x, t, s: (x - t).square().sum() + s.sum(), torch.zeros(2))(t, s)
    g = torch.autograd.grad(x.sum(), [t, s], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(g, (torch.ones(2), torch.zeros(2)))


def test_a_minimum_that_is_a_line_has_no_derivative() -> None:
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = argmin(lambda x, w: (x[0] + x[1] - w) ** 2, zeros(2))(w)
    torch.testing.assert_close(x.sum(), w, **ALGEBRA)
    with pytest.raises(ValueError, match="Hessian at the minimum is singular"):
        x.sum().backward()


def test_a_solve_without_success_raises() -> None:
    with pytest.raises(MinimizeError, match="unbounded"):
        argmin(lambda x, w: (w * x).sum() - x.square().sum(), zeros(2))(torch.ones(2).double())


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda f: argmin(f)(), TypeError, "needs x0"),
        (lambda f: argmin(f)(3.0), TypeError, "needs x0"),
        (lambda f: argmin(f, l1=0.1), ValueError, "l1 cannot be given"),
        (lambda f: argmin(f, bounds=(0, 1)), ValueError, "bounds cannot be given"),
        (lambda f: argmin(f, batched=True), ValueError, "batched"),
        (lambda f: argmin(f, [0.0])(torch.ones(1)), TypeError, "got list"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(lambda x, t: (x - t).square().sum())
