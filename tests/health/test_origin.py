"""NaN is traced to the module and the operation where it arose, and nothing is changed by looking."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.health.origin import Origin


class Step(nn.Module):
    """A part of a network that does one thing to its input."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x)


def net(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.BatchNorm1d(6), part), nn.Dropout(0.5), nn.Linear(6, 2))


def train_once(model: nn.Module, x: Tensor, loss_fn: Any = None, **settings: Any) -> hesse.health.Monitor:
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    with hesse.watch(model, every=1, guard=None, **settings) as w:
        for batch in (torch.randn(8, 4), x):
            opt.zero_grad()
            loss = (loss_fn or Tensor.mean)(model(batch))
            loss.backward()
            opt.step()
            w.step(loss=loss)
    return w


def origin(model: nn.Module, x: Tensor | None = None, loss_fn: Any = None) -> dict[str, Any]:
    w = train_once(model, torch.randn(8, 4) if x is None else x, loss_fn)
    found = [record["origin"] for record in w.records if record["origin"]]
    assert found, "nothing was found"
    return found[0]


FORWARD = {
    "log of a negative": (lambda x: (x - 100).log(), "log"),
    "square root of a negative": (lambda x: (x.abs() - 1e3).sqrt(), "sqrt"),
    "division by zero": (lambda x: x / (x - x), "div"),
    "exp that overflows": (lambda x: (x.abs() * 1e4 + 1e4).exp(), "exp"),
    "infinity minus infinity": (lambda x: (y := (x.abs() + 99).exp()) - y, "exp"),
    "power": (lambda x: (-x.abs() - 1) ** 0.5, "pow"),
    "in place": (lambda x: (x * 1).sub_(100).log_(), "log"),
    "norm by zero": (lambda x: (x * 0) / (x * 0).norm(), "div"),
    "arccosine beyond one": (lambda x: (x * 0 + 2).acos(), "acos"),
    "everything masked": (lambda x: F.softmax(x.masked_fill(x == x, -math.inf), 1), "softmax"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    what, operation = FORWARD[name]
    found = origin(net(Step(what)))
    assert (found["stage"], found["where"]) == ("forward", "1.1")
    assert found["operation"] == operation
    assert found["file"] == __file__ and found["line"] > 0


BACKWARD = {
    "square root at zero": (lambda x: (x * 0).sqrt() + x, "sqrt"),
    "norm at zero": (lambda x: (x * 0).square().sum(1, keepdim=True).sqrt() + x, "sqrt"),
    "hidden by where": (lambda x: torch.where(x > 99, x.sub(x).sqrt(), x), "sqrt"),
    "hidden division": (lambda x: torch.where(x > 99, x / (x * 0), x), "div"),
    "power at zero": (lambda x: (x * 0).pow(0.5) + x, "pow"),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str) -> None:
    what, operation = BACKWARD[name]
    found = origin(net(Step(what)))
    assert (found["stage"], found["where"], found["operation"]) == ("backward", "1.1", operation)
    assert found["file"] == __file__


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 0


def test_backward_of_a_function_of_ones_own() -> None:
    found = origin(net(Step(Doubling.apply)))
    assert (found["stage"], found["note"]) == ("backward", "DoublingBackward")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_input_names_the_argument_and_the_rows(bad: float) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, image: Tensor, sound: Tensor) -> Tensor:
            return self.layer(image + sound)

    model = Two()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    sound = torch.randn(8, 4)
    sound[2, 1] = sound[5, 0] = bad
    with hesse.watch(model, every=1, guard=None) as w:
        model(torch.randn(8, 4), sound=sound).square().mean().backward()
        opt.step()
    found = w.records[0]["origin"]
    assert (found["stage"], found["where"], found["rows"]) == ("input", "sound", [2, 5])


def test_missing_values_that_the_model_fills_are_not_the_origin() -> None:
    x = torch.randn(8, 4)
    x[3, 0] = math.nan
    model = nn.Sequential(Step(lambda x: x.nan_to_num()), nn.Linear(4, 2), Step(lambda x: (x - 100).log()))
    assert (origin(model, x)["stage"], origin(model, x)["where"]) == ("forward", "2")


def test_a_mask_of_infinities_is_not_the_origin() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return ((self.q(x) @ x.T + mask).softmax(1) - 100).log()

    mask = torch.zeros(8, 8).masked_fill(torch.ones(8, 8).triu(1) > 0, -math.inf)
    model = Attention()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with hesse.watch(model, every=1, guard=None) as w:
        model(torch.randn(8, 4), mask).mean().backward()
        opt.step()
        w.step()
    assert (w.records[0]["origin"]["stage"], w.records[0]["origin"]["operation"]) == ("forward", "log")


def test_weight_names_the_parameter_and_who_made_it_so() -> None:
    model = net(nn.ReLU())
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    found = origin(model)
    assert (found["stage"], found["where"], found["note"]) == ("weight", "3", "parameter weight")


def test_loss_outside_the_model() -> None:
    found = origin(net(nn.ReLU()), loss_fn=lambda y: (y * 0).sqrt().mean())
    assert (found["stage"], found["where"], found["operation"]) == ("loss", "loss", "sqrt")


def test_rows_of_a_forward_operation() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    x[3] = 1e30
    found = origin(nn.Sequential(nn.Linear(4, 2), Step(lambda y: y * y * y)), x)
    assert (found["stage"], found["where"], found["rows"]) == ("forward", "1", [3])


def test_overflow_under_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), Step(lambda y: (y.half() * 0 + 300) * 300))
    assert (origin(model)["where"], origin(model)["operation"]) == ("1", "mul")


@pytest.mark.parametrize("spoil", [True, False])
def test_looking_changes_nothing(spoil: bool) -> None:
    """Weights, buffers, optimiser and random numbers are those of a run that nobody watched."""

    def run(watched: bool) -> dict[str, Any]:
        model = net(nn.ReLU())
        opt = torch.optim.SGD(model.parameters(), 0.1)
        data = torch.Generator().manual_seed(1)

        def steps() -> None:
            for step in range(4):
                x = torch.randn(8, 4, generator=data)
                if spoil and step == 2:
                    x[0, 0] = math.nan
                opt.zero_grad()
                y = model(x) * torch.rand(1)  # random numbers after the pass too
                y.square().mean().backward()
                opt.step()

        if watched:
            with hesse.watch(model, every=1, guard=None) as w:
                steps()
            assert any(record["origin"] for record in w.records) == spoil
        else:
            steps()
        return {**copy.deepcopy(model.state_dict()), "random": torch.rand(3)}

    watched, plain = run(True), run(False)
    assert all(torch.equal(watched[key].nan_to_num(7.5), plain[key].nan_to_num(7.5)) for key in plain)


def test_a_closure_is_looked_at_before_the_update() -> None:
    model = net(Step(lambda x: (x - 100).log()))
    opt = torch.optim.AdamW(model.parameters(), 1e-3)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(torch.randn(8, 4)).mean()
        loss.backward()
        return loss

    with hesse.watch(model, every=1, guard=None) as w:
        opt.step(closure)
    assert (w.records[0]["origin"]["stage"], w.records[0]["origin"]["where"]) == ("forward", "1.1")


def test_a_pass_that_cannot_be_repeated_is_said_so() -> None:
    calls = []

    def twice(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise ArithmeticError("used up")
        return x * (math.nan if len(calls) == 2 else 1)

    found = origin(net(Step(twice)))
    assert (found["where"], found["operation"]) == ("3", None) and "used up" in found["note"]


def test_json() -> None:
    assert Origin("a", "log", "forward").to_dict()["rows"] == []
