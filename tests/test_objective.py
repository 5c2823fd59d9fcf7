"""The closure and its pure objective, against the same loss written in plain torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.objective import Objective, closure
from problems import mlp


class Two(nn.Module):
    """Two inputs, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(2, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.first(first).tanh() + self.second(second)


def two() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return Two(), torch.randn(8, 4), torch.randn(8, 2), torch.randint(3, (8,))


def noisy() -> tuple[nn.Module, Tensor, Tensor]:
    """A model with everything that has state: running statistics, dropout, a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, 3)
    )
    model[0].bias.requires_grad_(False)
    return model, torch.randn(8, 5), torch.randint(3, (8,))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach().clone() for name, t in {**model.state_dict(), **grads}.items()}


@pytest.mark.parametrize(
    "inputs_of",
    [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"second": b, "first": a}],
    ids=["tuple", "list", "dict"],
)
def test_value_and_gradients_are_those_of_plain_torch(inputs_of: Callable[[Tensor, Tensor], Any]) -> None:
    model, a, b, y = two()
    expected = F.cross_entropy(model(a, b), y)
    grads = torch.autograd.grad(expected, list(model.parameters()))
    step = closure(model, F.cross_entropy, (inputs_of(a, b), y))
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # left over from elsewhere: the closure zeroes
    for _ in range(2):
        loss = step()
        assert torch.equal(loss, expected.detach())
        assert not loss.requires_grad
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    params = step.objective.params
    assert torch.equal(step.objective(params), expected)
    again = torch.autograd.grad(step.objective(params), list(params.values()))
    assert all(torch.equal(one, other) for one, other in zip(again, grads, strict=True))


def test_a_bare_tensor_is_the_only_input() -> None:
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(8, 5), torch.randint(3, (8,))
    step = hesse.closure(model, nn.CrossEntropyLoss(), (x, y))
    assert torch.equal(step(), F.cross_entropy(model(x), y))
    assert torch.equal(step.outputs, model(x))


def test_gradients_come_even_under_no_grad() -> None:
    model, x, y = noisy()
    with torch.no_grad():
        closure(model, F.cross_entropy, (x, y))()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        lambda model: torch.optim.LBFGS(model.parameters()),
        hesse.optim.KFAC,
    ],
    ids=["SGD", "Adagrad", "Adam", "AdamW", "LBFGS", "KFAC"],
)
def test_every_optimizer_runs_on_the_same_object(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    model, a, b, y = two()
    optimizer = optimizer_of(model)
    step = hesse.closure(model, F.cross_entropy, ((a, b), y))
    losses = [float(optimizer.step(step)) for _ in range(10)]  # type: ignore[arg-type]
    assert losses[-1] < 0.9 * losses[0]


def test_the_objective_leaves_parameters_buffers_gradients_and_generators_alone() -> None:
    model, x, y = noisy()
    step = closure(model, F.cross_entropy, (x, y))
    step()
    torch.rand(1)  # someone else draws in between
    before, random = state_of(model), torch.get_rng_state()
    elsewhere = {name: p.detach() + 1 for name, p in step.objective.params.items()}
    with torch.no_grad():
        at_other = step.objective(elsewhere)
    value = step.objective(step.objective.params)
    torch.autograd.grad(value, list(step.objective.params.values()))
    assert at_other != value
    after = state_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(random, torch.get_rng_state())


def test_the_closure_moves_running_statistics_as_plain_training_does() -> None:
    model, x, y = noisy()
    twin = copy.deepcopy(model)
    closure(model, F.cross_entropy, (x, y))()
    twin(x)
    assert int(model[1].num_batches_tracked) == 1
    assert torch.equal(model[1].running_mean, twin[1].running_mean)


def test_dropout_draws_the_same_mask_at_every_evaluation_and_a_new_one_for_a_new_closure() -> None:
    model, x, y = noisy()
    first, second = (closure(model, F.cross_entropy, (x, y)) for _ in range(2))
    params = {name: p.detach() for name, p in first.objective.params.items()}
    values = [float(first.objective(params)) for _ in range(3)]
    other = [float(second()), float(second.objective(params)), float(second())]
    assert len({*values, float(first()), float(first.objective(params))}) == 1
    assert len(set(other)) == 1
    assert values[0] != other[0]


def test_the_first_evaluation_draws_as_plain_training_would() -> None:
    model, x, y = noisy()
    random = torch.get_rng_state()
    plain = F.cross_entropy(model(x), y)
    moved = torch.get_rng_state()
    torch.set_rng_state(random)
    assert torch.equal(closure(model, F.cross_entropy, (x, y))(), plain)
    assert torch.equal(torch.get_rng_state(), moved)


def test_params_are_the_live_trainable_ones_and_tied_ones_appear_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    params = Objective(model, F.mse_loss, torch.zeros(1, 3), torch.zeros(1, 3)).params
    assert list(params) == ["0.weight", "0.bias"]
    assert params["0.weight"] is model[1].weight


def test_a_tied_weight_moves_at_both_places() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    objective = Objective(model, F.mse_loss, torch.randn(4, 3), torch.zeros(4, 3))
    outputs = objective.outputs({"0.weight": 2 * torch.eye(3)})
    torch.testing.assert_close(outputs, 4 * objective.inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (list(nn.Linear(1, 1).parameters()), F.mse_loss, (1, 2)),
            "is a torch.nn.Module; got list",
        ),
        ((nn.Linear(1, 1), "mse", (1, 2)), "must be callable"),
        ((nn.Linear(1, 1), F.mse_loss, torch.zeros(2, 1)), "must be a pair .* got Tensor"),
        ((nn.Linear(1, 1), F.mse_loss, (1, 2, 3)), "got tuple of length 3"),
    ],
)
def test_a_wrong_argument_is_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        closure(*arguments)


def test_the_loss_may_be_a_partial() -> None:
    model, x, y = noisy()
    model.eval()
    step = closure(model, functools.partial(F.cross_entropy, label_smoothing=0.1), (x, y))
    assert torch.equal(step(), F.cross_entropy(model(x), y, label_smoothing=0.1))
