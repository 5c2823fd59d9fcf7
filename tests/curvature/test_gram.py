"""The Gram matrix of Jacobian rows is ``R' J J' R``, whatever the rows are made of; the normal matrix is ``J' H J``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.curvature.gram import Formed, JacobianRows, Layered, Root
from hesse.curvature.output import output_curvature
from hesse.curvature.samples import jacobian_rows
from hesse.curvature.uses import watch_uses
from hesse.objective import Objective
from oracles import gauss_newton, jacobian, loss_hessian
from problems import PROBLEMS, Problem, as_double, problem
from tolerances import ALGEBRA


def objective_of(p: Problem) -> Objective:
    return hesse.closure(p.model, p.loss_fn, p.batch).objective


def rows_at(objective: Objective) -> JacobianRows:
    params = objective.params
    with objective.at(params), watch_uses(params) as uses:
        outputs = objective.run_model()
        curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
        return jacobian_rows(objective, params, uses, outputs, curvature)


def check(objective: Objective) -> JacobianRows:
    rows = rows_at(objective)
    columns = rows.root.columns
    number, batch, width = columns.shape
    r = torch.zeros(number, batch, batch, width, dtype=torch.float64)
    r[:, torch.arange(batch), torch.arange(batch)] = columns
    dense = r.reshape(number * batch, -1) @ jacobian(objective)
    torch.testing.assert_close(rows.dense(), dense, **ALGEBRA)
    torch.testing.assert_close(rows.gram(), dense @ dense.mT, **ALGEBRA)
    torch.testing.assert_close(rows.normal(), gauss_newton(objective), **ALGEBRA)
    v = torch.randn(rows.layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rows.times(v), dense @ v, **ALGEBRA)
    return rows


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_that_of_dense_rows(name: str) -> None:
    check(objective_of(as_double(problem(name))))


def test_layers_of_one_position_form_no_rows() -> None:
    p = as_double(problem("mlp, cross-entropy"))
    p.model[0], p.model[2] = nn.Linear(5, 90).double(), nn.Linear(90, 3).double()
    part = check(objective_of(p)).parts["0.weight"]
    assert isinstance(part, Layered)
    assert part._pairs() is not None


def test_an_embedding_forms_no_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randint(40, (8, 4))
    x[0, :3] = torch.tensor([0, 5, 5])
    part = check(objective_of(Problem(model, F.mse_loss, (x, torch.randn(8, 2).double())))).parts["0.weight"]
    assert isinstance(part, Layered)
    assert part._pairs() is not None


class Residual(nn.Module):
    """``u_y + u u_x - u_xx`` of a small network, its derivatives taken by autograd or by torch.func."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        u = self.field(x)
        if self.way == "func":

            def one(z: Tensor) -> Tensor:
                return self.field(z)[0]

            first = torch.func.vmap(torch.func.grad(one))(x)
            second = torch.func.vmap(torch.func.hessian(one))(x)[:, 0, :1]
        else:
            x = x.detach().requires_grad_()
            (first,) = torch.autograd.grad(self.field(x).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
            second = second[:, :1]
        return first[:, 1:] + u * first[:, :1] - second


def physics(way: str, points: int = 12) -> Problem:
    torch.manual_seed(0)
    x = torch.rand(points, 2).double()
    return Problem(Residual(way).double(), F.mse_loss, (x, torch.zeros(points, 1).double()))


@pytest.mark.parametrize("way", ["autograd", "func"])
def test_a_model_that_differentiates_itself(way: str) -> None:
    check(objective_of(physics(way)))


def test_examples_have_copies_of_what_a_model_that_differentiates_itself_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    import hesse.curvature.samples as module

    def refuse(*_: Any) -> Any:
        raise AssertionError("a backward pass for each row")

    monkeypatch.setattr(module, "_by_rows", refuse)
    parts = check(objective_of(physics("autograd"))).parts
    assert isinstance(parts["field.2.weight"], Formed)


def test_examples_that_mix_are_not_taken_apart() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x))
            return self.second(y - y.mean(0)) @ self.second.weight[:, :2]

    torch.manual_seed(0)
    p = Problem(Mixing().double(), F.mse_loss, (torch.randn(6, 3).double(), torch.randn(6, 2).double()))
    check(objective_of(p))


def test_terms_that_do_not_count_have_empty_rows() -> None:
    p = as_double(problem("mlp, cross-entropy"))
    x, y = p.batch
    y[::2] = -100
    rows = check(objective_of(Problem(p.model, p.loss_fn, (x, y))))
    assert not rows.gram().view(3, 24, 3, 24)[:, ::2].any()


def test_a_single_output_without_examples() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([3.0, 4.0]).double())

        def forward(self, x: Tensor) -> Tensor:
            return (self.x * x).norm()

    check(objective_of(Problem(Norm(), F.mse_loss, (torch.ones(2).double(), torch.tensor(1.0).double()))))


@pytest.mark.parametrize("name", ["mlp, cross-entropy", "mlp, squared error", "mlp, binary cross-entropy"])
def test_the_root_gives_back_the_gradient_at_the_outputs(name: str) -> None:
    p = as_double(problem(name))
    objective = objective_of(p)
    outputs = objective.outputs(objective.params).detach().requires_grad_()
    (slope,) = torch.autograd.grad(p.loss_fn(outputs, p.batch[1]), outputs)
    root = Root.of(output_curvature(p.loss_fn, outputs, p.batch[1]), outputs)
    r, left = root.solve(slope)
    torch.testing.assert_close(root.to_outputs(r), slope, **ALGEBRA)
    assert float(left.norm()) < 1e-10 * float(slope.norm())
    hessian = loss_hessian(objective)
    u = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(root.to_outputs(root.to_samples(u)).flatten(), hessian @ u.flatten(), **ALGEBRA)


def test_what_the_root_cannot_reach_is_left() -> None:
    outputs = torch.tensor([[0.5], [3.0]]).double()  # Huber's loss is linear at the second
    root = Root.of(output_curvature(F.huber_loss, outputs, torch.zeros(2, 1).double()), outputs)
    r, left = root.solve(torch.tensor([[0.25], [0.5]]).double())
    torch.testing.assert_close(root.to_outputs(r), torch.tensor([[0.25], [0.0]]).double(), **ALGEBRA)
    torch.testing.assert_close(left, torch.tensor([[0.0], [0.5]]).double(), **ALGEBRA)


def test_single_precision_rows_are_added_up_in_double() -> None:
    p = problem("mlp, squared error")
    gram = rows_at(objective_of(p)).gram()
    assert gram.dtype == torch.float64
    assert float(torch.linalg.eigvalsh(gram).min()) > -1e-12 * float(gram.diagonal().max())
