"""Curvature learnt from gradients is that of the textbook's formulas, and exact where the formulas are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import hesse
from hesse.minimizers.descents.quasi_newton import BFGS, LBFGS, Gradient, curved, inverse_product
from hesse.minimizers.functions.function import Function
from minimizers.points import Fun, function, normal, quadratic, rosenbrock, symmetric, vector
from tolerances import ALGEBRA

N = 5


def walk(fun: Fun, n: int = N, steps: int = 8) -> tuple[Function, list[Tensor]]:
    """Points that lie anywhere, so that some pairs have negative curvature."""
    return function(fun, torch.zeros(n, dtype=torch.float64)), [0.5 * normal(n, seed) for seed in range(steps)]


def bent(x: Tensor) -> Tensor:
    return (x**2).sum() + (3 * x).sin().sum() + (x[1:] * x[:-1]).sum()


def pairs(f: Function, points: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    gradients = [f.at(x).gradient() for x in points]
    both = [(points[i + 1] - points[i], gradients[i + 1] - gradients[i]) for i in range(len(points) - 1)]
    return [(s, y) for s, y in both if float(s @ y) > 0]


def textbook(kept: list[tuple[Tensor, Tensor]], first: float, n: int = N) -> Tensor:
    """Nocedal and Wright (6.17) in full matrices."""
    eye = torch.eye(n, dtype=torch.float64)
    B = first * eye
    for s, y in kept:
        r = 1 / float(s @ y)
        V = eye - r * torch.outer(y, s)
        B = V.T @ B @ V + r * torch.outer(s, s)
    return B


def test_bfgs_is_the_textbooks_product_of_matrices() -> None:
    f, points = walk(bent)
    memory = BFGS().begin(f.at(points[0]))
    for old, new in itertools.pairwise(points):
        memory = {**memory, **BFGS().update(memory, f.at(old), f.at(new))}
    kept = pairs(f, points)
    assert 2 < len(kept) < len(points) - 1  # some were refused
    s, y = kept[0]
    torch.testing.assert_close(memory["inverse"], textbook(kept, float(s @ y) / float(y @ y)), **ALGEBRA)
    last = f.at(points[-1])
    model = BFGS().model(last, memory)
    torch.testing.assert_close(model.whole, -memory["inverse"] @ last.gradient(), **ALGEBRA)
    assert model.predicted == pytest.approx(-0.5 * float(model.whole @ last.gradient()))


@pytest.mark.parametrize("size", [2, 4, 20])
def test_l_bfgs_is_bfgs_of_the_last_pairs(size: int) -> None:
    f, points = walk(bent)
    descent = LBFGS(size)
    memory = descent.begin(f.at(points[0]))
    for old, new in itertools.pairwise(points):
        memory = {**memory, **descent.update(memory, f.at(old), f.at(new))}
    kept = pairs(f, points)[-size:]
    assert len(memory["steps"]) == len(kept)
    s, y = kept[-1]
    B = textbook(kept, float(s @ y) / float(y @ y))
    last = f.at(points[-1])
    torch.testing.assert_close(descent.model(last, memory).whole, -B @ last.gradient(), **ALGEBRA)
    v = normal(N, 99)
    torch.testing.assert_close(inverse_product(memory["steps"], memory["changes"], v), B @ v, **ALGEBRA)


def test_after_n_exact_searches_on_a_quadratic_bfgs_knows_the_inverse() -> None:
    H, g = symmetric(N, 0, eigenvalues=torch.linspace(1, 20, N, dtype=torch.float64)), normal(N, 1)
    f = function(quadratic(H, g), torch.zeros(N, dtype=torch.float64))
    x, memory = torch.zeros(N, dtype=torch.float64), {}
    for _ in range(N):
        point = f.at(x)
        p = BFGS().model(point, memory).whole
        new = f.at(x - float(p @ point.gradient()) / float(p @ H @ p) * p)
        memory, x = {**memory, **BFGS().update(memory, point, new)}, new.x
    torch.testing.assert_close(memory["inverse"], torch.linalg.inv(H), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(x, -torch.linalg.solve(H, g), rtol=1e-8, atol=1e-10)


def test_a_pair_that_shows_no_positive_curvature_changes_nothing() -> None:
    f = function(lambda x: -(x**2).sum(), vector(0, 0))
    old, new = f.at(vector(1, 0)), f.at(vector(2, 0))
    assert not curved(new.x - old.x, new.gradient() - old.gradient())
    assert BFGS().update({}, old, new) == {}
    assert LBFGS().update(LBFGS().begin(old), old, new) == {}


def test_before_any_pair_the_direction_is_the_gradient_without_a_length_of_its_own() -> None:
    f = function(rosenbrock, vector(0, 0))
    point = f.at(vector(-1.2, 1))
    for descent in (Gradient(), BFGS(), LBFGS()):
        model = descent.model(point, descent.begin(point))
        assert torch.equal(model.whole, -point.gradient())
        assert not model.natural


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs-b", "gd"])
def test_no_second_derivative_is_asked_for_but_to_tell_a_minimum(method: str) -> None:
    H, g = symmetric(N, 0, eigenvalues=torch.linspace(1, 3, N, dtype=torch.float64)), normal(N, 1)
    result = hesse.minimize(quadratic(H, g), torch.zeros(N, dtype=torch.float64), method=method)
    assert result.success
    assert result.nhev == 0
    assert result.nhvp <= N
    torch.testing.assert_close(result.x, -torch.linalg.solve(H, g), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs-b"])
def test_hess_inv_approaches_the_inverse_hessian(method: str) -> None:
    H, g = symmetric(4, 0, eigenvalues=vector(1, 2, 3, 4)), normal(4, 1)
    result = hesse.minimize(quadratic(H, g), torch.zeros(4, dtype=torch.float64), method=method)
    inverse = result.hess_inv
    assert inverse.shape == (4, 4)
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-8, atol=1e-10)
    s, y = result.trace, torch.linalg.inv(H)
    assert len(s) > 2
    assert float((inverse - y).norm() / y.norm()) < 0.5
