"""Gauss-Newton in the space of samples: the step is that of dense algebra, and physics-informed networks are solved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse import tree
from hesse.optim.gauss_newton import LARGEST, GaussNewton
from oracles import flat, gauss_newton, gradient
from problems import PROBLEMS, Problem, as_double, mlp, problem

# Float64 through matrices of condition 1e6 and more: eigenvalues from the first to the damping.
SOLVED = {"rtol": 1e-6, "atol": 1e-8}


def closure_of(p: Problem) -> Any:
    return hesse.closure(p.model, p.loss_fn, p.batch)


def update_of(p: Problem, optimizer: GaussNewton) -> Tensor:
    before = {name: q.detach().clone() for name, q in p.model.named_parameters()}
    optimizer.step(closure_of(p))
    return flat({name: q.detach() - before[name] for name, q in p.model.named_parameters()})


def without_bend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesse.optim.gauss_newton.BEND", -1.0)


@pytest.mark.parametrize("examples", [24, 3])  # more samples than parameters in most, and fewer in all
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_step_is_that_of_the_dense_matrix(
    name: str, decay: float, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_bend(monkeypatch)
    p = as_double(problem(name))
    p = p._replace(batch=tuple(t[:examples] for t in p.batch))
    torch.manual_seed(0)
    closure = closure_of(p)
    objective = closure.objective
    x = flat(objective.params).detach()
    torch.manual_seed(0)
    g = flat(gradient(objective)) + decay * x
    G = gauss_newton(objective)
    expected = -torch.linalg.solve(G + (0.01 + decay) * torch.eye(len(g)).double(), g)
    torch.manual_seed(0)
    found = update_of(p, GaussNewton(p.model, lr=1.0, damping=0.01, weight_decay=decay))
    torch.testing.assert_close(found, expected, **SOLVED)


@pytest.mark.parametrize("examples", [48, 6])  # 96 samples and 12, of 66 parameters
def test_momentum_is_the_step_that_damping_pulls_to_the_last(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bend(monkeypatch)
    p = as_double(problem("mlp, squared error"))
    p = p._replace(batch=tuple(torch.cat([t, t.flip(1)])[:examples] for t in p.batch))
    optimizer = GaussNewton(p.model, lr=1.0, damping=0.5, momentum=0.7, weight_decay=0.2)
    last = update_of(p, optimizer)
    objective = closure_of(p).objective
    g = flat(gradient(objective)) + 0.2 * flat(objective.params).detach()
    eye = torch.eye(len(g)).double()
    # The least of g'd + d'(G + decay) d / 2 + damping / 2 ||d - momentum last||^2.
    expected = torch.linalg.solve(gauss_newton(objective) + 0.7 * eye, 0.5 * 0.7 * last - g)
    torch.testing.assert_close(update_of(p, optimizer), expected, **SOLVED)


@pytest.mark.parametrize("rows", [30, 4])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_what_is_promised_of_a_quadratic_is_kept(rows: int, decay: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    batch = torch.randn(rows, 6).double(), torch.randn(rows, 1).double()
    optimizer = GaussNewton(model, lr=0.7, weight_decay=decay)
    optimizer.step(hesse.closure(model, F.mse_loss, batch))
    assert optimizer.param_groups[0]["trust_ratio"] == pytest.approx(1.0, rel=1e-6)


def test_a_gradient_that_no_curvature_explains_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    without_bend(monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(8, 5).double()
    p = Problem(mlp(1).double(), F.huber_loss, (x, 3 * torch.randn(8, 1).double()))
    objective = closure_of(p).objective
    g, G = flat(gradient(objective)), gauss_newton(objective)
    expected = -torch.linalg.solve(G + 0.1 * torch.eye(len(g)).double(), g)
    torch.testing.assert_close(update_of(p, GaussNewton(p.model, 1.0, 0.1)), expected, **SOLVED)


@pytest.mark.parametrize(("rows", "features"), [(40, 4), (4, 40)])
def test_one_step_on_least_squares_is_newtons(rows: int, features: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(rows, features).double(), torch.randn(rows, 2).double()
    model = nn.Linear(features, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    GaussNewton(model).step(hesse.closure(model, F.mse_loss, (x, y)))
    # The calibration lowers the damping until the loss falls no further; what is left of it is seen in the solution.
    torch.testing.assert_close(model.weight.detach().T, torch.linalg.pinv(x) @ y, rtol=1e-4, atol=1e-6)


def test_the_bend_is_half_the_outputs_second_derivative_taken_back() -> None:
    class Square(nn.Module):
        """o = x^2, whose curve the bent step follows: v + a with a = -(J v'' / 2) / J."""

        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([[1.0]]).double())

        def forward(self, ones: Tensor) -> Tensor:
            return ones * self.x.square()

    model = Square()
    batch = torch.ones(1, 1).double(), torch.full((1, 1), 1.2, dtype=torch.float64)
    GaussNewton(model, 1.0, 1e-12).step(hesse.closure(model, F.mse_loss, batch))
    v = 0.1  # residual -0.2 over slope 2
    assert model.x.item() == pytest.approx(1 + v - v**2 / 2, rel=1e-9)
    assert abs(model.x.item() - math.sqrt(1.2)) < 0.15 * abs(1 + v - math.sqrt(1.2))


class Poisson(nn.Module):
    """u'' = f on [0, 1], u(0) = u(1) = 0 for u = sin(pi x): rows u'' - f inside, and u at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.field(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        inside = ((x > 0) & (x < 1)).to(x.dtype)
        return inside * (second + math.pi**2 * torch.sin(math.pi * x)) + (1 - inside) * 10 * u

    def error(self) -> float:
        x = torch.linspace(0, 1, 201).double()[:, None]
        u = torch.sin(math.pi * x)
        return float((self.field(x).detach() - u).norm() / u.norm())


@pytest.mark.parametrize("seed", range(3))
def test_a_physics_informed_network_is_solved_to_five_digits(seed: int) -> None:
    torch.manual_seed(seed)
    model = Poisson().double()
    x = torch.cat([torch.zeros(1), (torch.arange(40) + 0.5) / 40, torch.ones(1)]).double()[:, None]
    optimizer = GaussNewton(model)
    errors = []
    for _ in range(40):
        optimizer.step(hesse.closure(model, F.mse_loss, (x, torch.zeros_like(x))))
        errors.append(model.error())
    assert min(errors[:20]) < 1e-2
    assert errors[-1] < 1e-5


def test_noise_keeps_the_damping_up() -> None:
    torch.manual_seed(0)
    x, fresh = torch.randn(1024, 5), torch.randn(2000, 5)
    y = x[:, :1].sin() + torch.randn(1024, 1)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1))
    optimizer = GaussNewton(model)
    for rows in torch.arange(1024).split(16):
        optimizer.step(hesse.closure(model, F.mse_loss, (x[rows], y[rows])))
    # Sixteen examples of noise are memorised by 281 parameters in one step, to an error of 1 and more. Predicting 0
    # has one of 0.43.
    assert float(F.mse_loss(model(fresh), fresh[:, :1].sin()).detach()) < 0.2


def test_what_is_too_large_is_named() -> None:
    model = nn.Linear(100, 100)
    n = LARGEST // 100 + 10
    p = Problem(model, F.mse_loss, (torch.randn(n, 100), torch.randn(n, 100)))
    with pytest.raises(ValueError, match=rf"{100 * n} here.*10100; it does up to {LARGEST}.*NewtonCG"):
        GaussNewton(model).step(closure_of(p))


def test_the_state_is_one_flat_tensor_a_parameter() -> None:
    p = problem("mlp, cross-entropy")
    optimizer = GaussNewton(p.model)
    optimizer.step(closure_of(p))
    for q in p.model.parameters():
        assert optimizer.state[q].keys() == {"update"}
    assert tree.is_finite([optimizer.state[q]["update"] for q in p.model.parameters()])
    assert optimizer.param_groups[0]["steps"] == 1
