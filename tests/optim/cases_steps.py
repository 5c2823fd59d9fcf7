"""Cases of the contract that look at the steps: their direction, settings, and gradients changed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler

import hesse
from optim.contract import Row, backward, closure_of, double, same, snapshot, train
from problems import Problem, mlp, problem

__all__ = ["STEPS"]

# The same steps by two routes, in float64: inverse roots of nearly singular factors blow rounding up by 1e10.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def close(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **(tolerance or CLOSE), msg=lambda m, name=name: f"{name}: {m}")


def goes_down(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    losses = train(row.of(p.model), p, 15)
    assert losses[-1] < losses[0]
    assert all(math.isfinite(loss) for loss in losses)


def goes_down_on_batches_that_change(row: Row) -> None:
    p = problem("mlp, squared error")
    optimizer, (x, y) = row.of(p.model), p.batch
    torch.manual_seed(0)
    losses = []
    for i in range(20):
        rows = torch.arange(12) + 12 * (i % 2)
        losses.append(float(optimizer.step(hesse.closure(p.model, p.loss_fn, (x[rows], y[rows])))))
    assert losses[-1] + losses[-2] < losses[0] + losses[1]


def non_contiguous(row: Row) -> None:
    p, other = double(), double()
    for q in other.model.parameters():
        strided = q.data.new_empty(q.shape[::-1]).T if q.ndim == 2 else q.data.new_empty(*q.shape, 2)[:, 0]
        q.data = strided.copy_(q.data)
        assert not q.is_contiguous()
    assert train(row.of(p.model), p, 8) == pytest.approx(train(row.of(other.model), other, 8), rel=1e-6)
    close(p.model, other.model)


def closure_returns_the_loss(row: Row) -> None:
    p = double()
    optimizer = row.of(p.model)
    for _ in range(3):
        x, y = p.batch
        expected = float(p.loss_fn(p.model(x), y).detach())
        assert float(optimizer.step(closure_of(p))) == pytest.approx(expected, rel=1e-12)


def nothing_without_gradients(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer = row.of(p.model)
    for _ in range(2):
        before, state = snapshot(p.model), optimizer.state_dict()
        optimizer.zero_grad()
        assert optimizer.step() is None
        assert same(before, p.model)
        assert same(state, optimizer.state_dict())
        train(optimizer, p, 2)


def gradients_without_a_closure(row: Row) -> None:
    p, other = double(), double()
    one, two = row.of(p.model), row.of(other.model)
    for _ in range(5):
        row.gradient_step(one, p)
        two.step(closure_of(other))
    close(p.model, other.model)


def schedulers(row: Row) -> None:
    makers: list[Callable[[Optimizer], Any]] = [
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0, factor=0.5),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.5, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
        ),
    ]
    for make in makers:
        p = problem("mlp, cross-entropy")
        optimizer = row.of(p.model, lr=row.lr)
        scheduler, losses, seen = make(optimizer), [], []
        for _ in range(6):
            losses.append(float(optimizer.step(closure_of(p))))
            seen.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        assert losses[-1] < losses[0]
        assert len(set(seen)) > 1


def lr_zero_stays(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer, before = row.of(p.model, lr=row.lr), snapshot(p.model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(optimizer, p, 3)
    assert same(before, snapshot(p.model))


def lr_as_tensor(row: Row) -> None:
    p, other = double(), double()
    one = row.of(p.model, lr=torch.tensor(row.lr, dtype=torch.float64))
    two = row.of(other.model, lr=row.lr)
    assert train(one, p, 5) == pytest.approx(train(two, other, 5), rel=1e-6)
    close(p.model, other.model)


def settings_of_each_group(row: Row) -> None:
    p, other = double(), double()
    optimizer = row.on([{"params": p.model[0].parameters(), "lr": 0.0}, {"params": p.model[2].parameters()}])
    before = snapshot(p.model)
    train(optimizer, p, 3)
    moved = {name for name, value in snapshot(p.model).items() if not torch.equal(value, before[name])}
    assert moved == {"2.weight", "2.bias"}
    groups = [{"params": other.model[0].parameters()}, {"params": other.model[2].parameters(), "weight_decay": 0.5}]
    plain = double()
    decayed, undecayed = row.on(groups, weight_decay=0.0), row.on(plain.model.parameters(), weight_decay=0.0)
    assert [group["weight_decay"] for group in decayed.param_groups] == [0.0, 0.5]
    train(decayed, other, 1)
    train(undecayed, plain, 1)
    assert not torch.equal(other.model[2].weight, plain.model[2].weight)


def weight_decay_shrinks(row: Row) -> None:
    norms = []
    for decay in (0.0, 0.1):
        p = problem("mlp, cross-entropy")
        train(row.of(p.model, weight_decay=decay), p, 30)
        norms.append(sum(float(q.detach().square().sum()) for q in p.model.parameters()))
    assert norms[1] < norms[0]


def l1_makes_weights_exactly_zero(row: Row) -> None:
    zeros = []
    for l1 in (0.0, 2.0):
        torch.manual_seed(0)
        x = torch.randn(64, 8)
        model = nn.Linear(8, 1)
        train(row.of(model, l1=l1), Problem(model, F.mse_loss, (x, x[:, :1])), 60)
        zeros.append(int((model.weight == 0).sum()))
    assert zeros[0] == 0
    assert zeros[1] >= 4


def accumulated_gradients(row: Row) -> None:
    p, other = double(), double()
    one, two = row.of(p.model), row.of(other.model)
    (x, y), half = p.batch, 12
    for optimizer, q in ((one, p), (two, other)):
        row.gradient_step(optimizer, q)  # curvature, where it is due
    for _ in range(2):
        one.zero_grad()
        two.zero_grad()
        for rows in (slice(half), slice(half, None)):
            (p.loss_fn(p.model(x[rows]), y[rows]) / 2).backward()
        backward(other)
        one.step()
        two.step()
    close(p.model, other.model)


def clipped_gradients(row: Row) -> None:
    p, other = double(), double()
    one, two = row.of(p.model), row.of(other.model)
    for optimizer, q in ((one, p), (two, other)):
        row.gradient_step(optimizer, q)
        optimizer.zero_grad()
        backward(q)
    norm = torch.nn.utils.clip_grad_norm_(p.model.parameters(), 1e-3)
    for q in other.model.parameters():
        q.grad = q.grad * (1e-3 / (norm + 1e-6))
    one.step()
    two.step()
    close(p.model, other.model)


def maximize(row: Row) -> None:
    p, other = double(), double()
    up, down = row.of(p.model, maximize=True), row.of(other.model)
    torch.manual_seed(0)
    losses = [float(up.step(hesse.closure(p.model, log_likelihood, p.batch))) for _ in range(6)]
    torch.manual_seed(0)
    for _ in range(6):
        down.step(hesse.closure(other.model, lambda o, t: -log_likelihood(o, t), other.batch))
    assert losses[-1] > losses[0]
    close(p.model, other.model)


def log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(outputs, targets)


def order_of_parameters(row: Row) -> None:
    p, other = double("text"), double("text")
    one, two = row.on(p.model.parameters()), row.on(list(other.model.parameters())[::-1])
    assert train(one, p, 6) == pytest.approx(train(two, other, 6), rel=1e-6)
    close(p.model, other.model)


def group_that_joins(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    if "groups" in row.offers:
        optimizer = row.on(p.model[0].parameters())
        train(optimizer, p, 4)
        before = snapshot(p.model)
        optimizer.add_param_group({"params": list(p.model[2].parameters()), "lr": 2 * row.lr})
        losses = train(optimizer, p, 6)
        assert all(not torch.equal(before[name], value) for name, value in snapshot(p.model).items())
        assert losses[-1] < losses[0]
        assert len(optimizer.state_dict()["param_groups"]) == 2
    else:
        row.of(p.model).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def errors(row: Row) -> None:
    p = nn.Parameter(torch.randn(2, 2))
    bad: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([p], {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ([p], {"lr": torch.tensor([0.1, 0.1])}, ValueError, "Tensor lr must be 1-element"),
        ([p], {"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
        ([], {}, ValueError, "empty parameter list"),
        (p, {}, TypeError, "should be an iterable"),
        ([p * 1], {}, ValueError, "non-leaf"),
        ([{"params": [p]}, {"params": [p]}], {}, ValueError, "more than one parameter group"),
        ([("weight", p), p.detach().clone()], {}, ValueError, "with/without names"),
        ([{"params": {p}}], {}, TypeError, "ordered collections"),
        ([3], {}, TypeError, "can only optimize Tensors"),
    ]
    for params, settings, error, match in bad:
        with pytest.raises(error, match=match):
            row.on(params, **settings)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        row.on([p, p])


def errors_of_settings(row: Row) -> None:
    for name, words in (("weight_decay", "weight_decay value"), ("l1", "l1 value"), ("lr", "learning rate")):
        for value in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"Invalid {words}: {value}"):
                row.of(mlp(), **{name: value})


# name: the case, and what it asks of a row
STEPS: dict[str, tuple[Callable[..., None], set[str]]] = {
    "goes down": (goes_down, set()),
    "goes down on batches that change": (goes_down_on_batches_that_change, set()),
    "non-contiguous parameters": (non_contiguous, set()),
    "the loss is returned": (closure_returns_the_loss, set()),
    "nothing without gradients": (nothing_without_gradients, set()),
    "gradients without a closure": (gradients_without_a_closure, set()),
    "lr schedulers": (schedulers, {"lr"}),
    "lr 0": (lr_zero_stays, {"lr"}),
    "lr as a tensor": (lr_as_tensor, {"lr"}),
    "settings of each group": (settings_of_each_group, {"groups", "lr", "weight_decay"}),
    "weight decay": (weight_decay_shrinks, {"weight_decay"}),
    "l1": (l1_makes_weights_exactly_zero, {"l1"}),
    "accumulated gradients": (accumulated_gradients, {"gradients"}),
    "clipped gradients": (clipped_gradients, {"gradients"}),
    "maximize": (maximize, {"maximize"}),
    "order of parameters": (order_of_parameters, {"groups"}),
    "a group that joins": (group_that_joins, set()),
    "errors": (errors, {"groups", "lr", "weight_decay"}),
    "errors of settings": (errors_of_settings, {"lr", "weight_decay", "l1"}),
}
