"""What the optimisers that take the model owe: they train everything, survive what goes wrong, and go on as if never
stopped."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.optim.gauss_newton import GaussNewton
from hesse.optim.modelled import Modelled
from hesse.optim.newton_cg import NewtonCG
from problems import PROBLEMS, Problem, Unused, mlp, problem

Make = Callable[..., Modelled]
BOTH = pytest.mark.parametrize("make", [NewtonCG, GaussNewton])


def closure_of(p: Problem) -> Any:
    return hesse.closure(p.model, p.loss_fn, p.batch)


def train(optimizer: Modelled, p: Problem, steps: int) -> list[float]:
    return [float(optimizer.step(closure_of(p))) for _ in range(steps)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@BOTH
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_trains_every_kind_of_model_with_no_argument(make: Make, name: str) -> None:
    p = problem(name)
    torch.manual_seed(0)
    losses = train(make(p.model), p, 5)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.8 * losses[0]


@BOTH
def test_the_loss_returned_is_that_before_the_step_and_the_gradient_is_left(make: Make) -> None:
    p = problem("mlp, cross-entropy")
    x, y = p.batch
    expected = F.cross_entropy(p.model(x), y)
    grads = torch.autograd.grad(expected, list(p.model.parameters()))
    loss = make(p.model).step(closure_of(p))
    assert torch.equal(loss, expected.detach())
    assert not loss.requires_grad
    for q, g in zip(p.model.parameters(), grads, strict=True):
        torch.testing.assert_close(q.grad, g)


@BOTH
def test_a_nan_batch_changes_nothing(make: Make) -> None:
    p = problem("convnet, BatchNorm")
    optimizer = make(p.model)
    train(optimizer, p, 2)
    before, state, group = snapshot(p.model), copy.deepcopy(optimizer.state_dict()), dict(optimizer.param_groups[0])
    x, y = p.batch
    broken = x.clone()
    broken[3, 0, 0, 0] = math.nan
    for count in (1, 2):
        assert math.isnan(float(optimizer.step(hesse.closure(p.model, p.loss_fn, (broken, y)))))
        assert same(before, snapshot(p.model))
        assert optimizer.param_groups[0]["rejections"] == group["rejections"] + count
    for number, one in optimizer.state_dict()["state"].items():
        assert same(one, state["state"][number])
    losses = train(optimizer, p, 3)
    assert losses[-1] < losses[0] < math.inf


class Cliff(nn.Module):
    """A linear layer whose outputs jump once the weight leaves ``ground``: what no local model can know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.ground: Tensor | None = None
        self.jump = 0.0

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.linear(x)
        safe = self.ground is None or torch.equal(self.linear.weight, self.ground)
        return outputs if safe else outputs + self.jump


@BOTH
@pytest.mark.parametrize("jump", [math.nan, math.inf, 1e6])
def test_a_step_that_would_raise_its_loss_is_not_taken(make: Make, jump: float) -> None:
    torch.manual_seed(0)
    model = Cliff()
    p = Problem(model, F.mse_loss, (torch.randn(16, 5), torch.randn(16, 3)))
    optimizer = make(model, weight_decay=0.1)
    train(optimizer, p._replace(batch=(p.batch[0], torch.randn(16, 3))), 1)
    model.ground, model.jump = model.linear.weight.detach().clone(), jump
    before, damping = snapshot(model), optimizer.param_groups[0]["damping"]
    losses = train(optimizer, p, 2)
    assert len(set(losses)) == 1
    assert same(before, snapshot(model))
    assert optimizer.param_groups[0]["rejections"] > 0
    assert optimizer.param_groups[0]["damping"] > damping
    model.ground = None
    optimizer.step(closure_of(p))
    assert not same(before, snapshot(model))


@BOTH
def test_running_statistics_move_once_a_step(make: Make) -> None:
    p = problem("convnet, BatchNorm")
    plain = copy.deepcopy(p.model)
    plain(p.batch[0])
    train(make(p.model), p, 1)
    buffers = dict(p.model.named_buffers())
    for name, b in plain.named_buffers():
        torch.testing.assert_close(buffers[name], b)


@BOTH
def test_a_step_moves_the_random_generator_as_a_forward_pass_does(make: Make) -> None:
    p = problem("transformer")
    torch.manual_seed(0)
    p.model(p.batch[0])
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    optimizer = make(p.model)
    optimizer.step(closure_of(p))
    assert torch.equal(torch.get_rng_state(), expected)


@BOTH
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01, "l1": 1e-3}])
def test_going_on_from_a_saved_state_is_bit_for_bit_the_same(make: Make, options: dict[str, Any]) -> None:
    if make is GaussNewton:
        options = options | {"momentum": 0.3}
    p = problem("mlp, cross-entropy")
    x, y = p.batch
    batches = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    optimizer = make(p.model, **options)
    for batch in batches:
        optimizer.step(hesse.closure(p.model, p.loss_fn, batch))
    file = io.BytesIO()
    torch.save({"model": p.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = mlp()
    other.load_state_dict(saved["model"])
    resumed = make(other)
    resumed.load_state_dict(saved["optimizer"])
    twin = copy.deepcopy(optimizer)
    for model, one in ((p.model, optimizer), (other, resumed), (twin.model, twin)):
        for batch in batches:
            one.step(hesse.closure(model, p.loss_fn, batch))
    assert same(snapshot(p.model), snapshot(other))
    assert same(snapshot(p.model), snapshot(twin.model))
    assert optimizer.state_dict()["param_groups"] == resumed.state_dict()["param_groups"]


@BOTH
def test_frozen_unused_and_empty_parameters(make: Make) -> None:
    torch.manual_seed(0)
    model = Unused()
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.used.bias.requires_grad_(False)
    x = torch.randn(16, 5)
    p = Problem(model, F.mse_loss, (x, x[:, :3]))
    optimizer, before = make(model), snapshot(model)
    losses = train(optimizer, p, 3)
    after = snapshot(model)
    assert losses[-1] < 0.1 * losses[0]
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"used.weight"}
    model.used.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="depends on no trainable parameter"):
        optimizer.step(closure_of(p))
    assert same(after, snapshot(model))


@BOTH
def test_bfloat16_parameters_are_trained(make: Make) -> None:
    p = problem("mlp, squared error")
    x, y = p.batch
    p = Problem(p.model.bfloat16(), p.loss_fn, (x.bfloat16(), y.bfloat16()))
    losses = train(make(p.model), p, 5)
    assert losses[-1] < 0.5 * losses[0]
    assert all(q.dtype == torch.bfloat16 for q in p.model.parameters())


def ridge(decay: float, l1: float = 0.0) -> tuple[nn.Module, Problem]:
    torch.manual_seed(0)
    x = torch.randn(30, 6).double()
    y = x @ torch.tensor([[3.0, -2.0, 0.0, 0.0, 0.5, 0.0]]).double().T + 0.1 * torch.randn(30, 1).double()
    model = nn.Linear(6, 1, bias=False).double()
    return model, Problem(model, F.mse_loss, (x, y))


@BOTH
@pytest.mark.parametrize("rows", [30, 4])
def test_weight_decay_is_part_of_the_objective(make: Make, rows: int) -> None:
    model, p = ridge(0.1)
    x, y = (t[:rows] for t in p.batch)
    train(make(model, weight_decay=0.1), Problem(model, p.loss_fn, (x, y)), 12)
    solution = torch.linalg.solve(2 / rows * x.T @ x + 0.1 * torch.eye(6).double(), 2 / rows * x.T @ y)
    # Conjugate gradients and the damping leave a relative gradient of this size.
    torch.testing.assert_close(model.weight.detach().T, solution, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("rows", [30, 5])
def test_l1_makes_weights_exactly_zero_and_the_others_optimal(make: Make, rows: int) -> None:
    model, p = ridge(0.0)
    x, y = (t[:rows] for t in p.batch)
    train(make(model, l1=1.0), Problem(model, p.loss_fn, (x, y)), 40)
    w = model.weight.detach()[0]
    slope = (2 / rows * x.T @ (x @ w[:, None] - y))[:, 0]
    assert (w == 0).any()
    assert (w != 0).any()
    # The optimality conditions of the lasso.
    assert bool((slope[w == 0].abs() <= 1.0).all())
    torch.testing.assert_close(slope[w != 0], -w[w != 0].sign(), rtol=1e-4, atol=1e-5)


@BOTH
def test_a_concave_function_is_maximised(make: Make) -> None:
    model, p = ridge(0.0)
    x, y = p.batch
    optimizer = make(model, maximize=True)
    values = [
        float(optimizer.step(hesse.closure(model, lambda o, t: -(o - t).pow(2).mean(), (x, y)))) for _ in range(6)
    ]
    assert values[-1] > values[0]
    torch.testing.assert_close(model.weight.detach().T, torch.linalg.lstsq(x, y).solution, rtol=1e-5, atol=1e-6)
    assert torch.allclose(model.weight.grad, torch.zeros(1, 6).double(), atol=1e-4)


@BOTH
def test_to_maximise_a_convex_loss_is_refused(make: Make) -> None:
    p = problem("mlp, squared error")
    before = snapshot(p.model)
    with pytest.raises(ValueError, match="'mse_loss' is convex in the outputs"):
        make(p.model, maximize=True).step(closure_of(p))
    assert same(before, snapshot(p.model))


@BOTH
def test_a_loss_of_ones_own_that_is_not_convex_is_minimised(make: Make) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 5)
    p = Problem(mlp(1), lambda o, t: (1 - (-(o - t).pow(2)).exp()).mean(), (x, 2 + x[:, :1]))
    optimizer = make(p.model)
    losses = train(optimizer, p, 15)
    assert losses[-1] < 0.5 * losses[0]


@BOTH
def test_fixed_settings_stay(make: Make) -> None:
    p = problem("mlp, squared error")
    optimizer = make(p.model, lr=0.5, damping=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.0)
    losses = train(optimizer, p, 6)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["damping"] == 0.3
    assert losses[-1] < losses[0]
    scheduler.step()
    before = snapshot(p.model)
    optimizer.step(closure_of(p))
    assert same(before, snapshot(p.model))


@BOTH
@pytest.mark.parametrize("settings", [{"lr": 0.5}, {"damping": 0.3}])
def test_one_fixed_setting_stays_while_the_other_is_found(make: Make, settings: dict[str, float]) -> None:
    p = problem("mlp, squared error")
    optimizer = make(p.model, **settings)
    losses = train(optimizer, p, 6)
    (name, value), *_ = settings.items()
    assert optimizer.param_groups[0][name] == value
    assert losses == sorted(losses, reverse=True)


@BOTH
def test_a_closure_inside_a_partial_is_found(make: Make) -> None:
    p = problem("mlp, squared error")

    def wrapped(closure: Any) -> Any:
        return closure()

    assert make(p.model).step(functools.partial(wrapped, closure_of(p))) is not None


@BOTH
def test_a_step_without_closure(make: Make) -> None:
    model = mlp()
    optimizer, before = make(model), snapshot(model)
    assert optimizer.step() is None
    for q in model.parameters():
        q.grad = torch.zeros_like(q)
    assert optimizer.step(None) is None
    assert same(before, snapshot(model))
    model(torch.randn(4, 5)).sum().backward()
    with pytest.raises(TypeError, match=r"gradients alone do not say.*optimizer.step\(hesse.closure"):
        optimizer.step()


@BOTH
def test_what_is_wrong_is_named_before_anything_moves(make: Make) -> None:
    p = problem("mlp, squared error")
    x, y = p.batch
    name = make.__name__  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=rf"not its parameters.*{name}\(model\)"):
        make(p.model.parameters())
    with pytest.raises(ValueError, match="no trainable parameter"):
        make(nn.ReLU())
    with pytest.raises(ValueError, match="damping"):
        make(p.model, damping=0.0)
    with pytest.raises(TypeError, match=r"'0.weight' is complex"):
        make(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)))
    optimizer, before = make(p.model), snapshot(p.model)
    with pytest.raises(ValueError, match="no further parameter groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(TypeError, match=r"takes hesse.closure\(.*got function"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="of another model"):
        optimizer.step(hesse.closure(mlp(2), F.mse_loss, (x, y)))
    with pytest.raises(TypeError, match="no Gauss-Newton factor is known for the loss 'l1_loss'"):
        optimizer.step(hesse.closure(p.model, F.l1_loss, (x, y)))
    assert same(before, snapshot(p.model))
    losses = train(optimizer, p, 3)
    assert losses[-1] < losses[0]
