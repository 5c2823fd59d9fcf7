"""Gradients through each use of a shared parameter against the same net with the parameter written out twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hesse.health.sensors.functional import Calls
from hesse.health.sensors.ties import Ties
from hesse.health.stats import find_layers


def sensed(model: nn.Module, x: Tensor, passes: int = 2) -> dict[str, dict[str, float]]:
    calls = Calls(model)
    sensor = Ties(model, find_layers(model), calls)
    for _ in range(passes):
        model.zero_grad()
        calls.listen()
        sensor.listen()
        y = model(x)
        calls.rest((x,), y)
        sensor.rest()
        y.square().sum().backward()
        reading = sensor.read()
    return {name: {use: norm.item() for use, norm in uses.items()} for name, uses in reading.items()}


class Language(nn.Module):
    """Embedding and output layer share a table, in one of the ways that people write it."""

    def __init__(self, way: str, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embed = nn.Embedding(11, 4, sparse=sparse)
        self.body = nn.Linear(4, 4)
        if way == "module":
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        h = self.body(self.embed(x))
        if table is not None:
            return h @ table.T
        if self.way == "module":
            return self.head(h)
        if self.way == "linear":
            return nn.functional.linear(h, self.embed.weight)
        return h @ self.embed.weight.T


@pytest.mark.parametrize(("way", "use"), [("module", "head"), ("linear", "Language.linear"), ("matmul", "Language.T")])
def test_tied_embeddings(way: str, use: str) -> None:
    x = torch.tensor([[1, 2, 2], [3, 1, 0]])
    uses = sensed(Language(way), x)["embed.weight"]
    model = Language(way)
    table = model.embed.weight.detach().clone().requires_grad_()
    model(x, table).square().sum().backward()
    assert uses == {
        "embed": pytest.approx(model.embed.weight.grad.norm().item()),
        use: pytest.approx(table.grad.norm().item()),
    }


def test_gradients_stay_as_they_are() -> None:
    x = torch.tensor([[1, 2, 2], [3, 1, 0]])
    model, plain = Language("module"), Language("module")
    sensed(model, x)
    plain(x).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_sparse_gradients_pass() -> None:
    x = torch.tensor([[1, 2, 2], [3, 1, 0]])
    assert sensed(Language("matmul", sparse=True), x) == sensed(Language("matmul"), x)
    lookups = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(0), nn.Unflatten(0, (2, 2)))
    twice = Twice(lookups)
    uses = sensed(twice, torch.tensor([1, 2]))["model.0.weight"]
    assert twice.model[0].weight.grad.is_sparse
    assert set(uses) == {"model.0", "model.0#2"}


class Twice(nn.Module):
    """Two towers that are one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        left = self.model(x)
        right = self.model(3 * x if x.is_floating_point() else x)
        return left - right


def test_a_module_used_twice_is_found_in_the_first_pass_and_measured_in_the_next() -> None:
    torch.manual_seed(0)
    one, other, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    other.load_state_dict(one.state_dict())
    (one(x) - other(3 * x)).square().sum().backward()
    expected = {
        f"model.{name}": {
            "model": pytest.approx(p.grad.norm().item()),
            "model#2": pytest.approx(q.grad.norm().item()),
        }
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True)
    }
    assert sensed(Twice(one), x, passes=1) == {}
    assert sensed(Twice(one), x) == expected


def test_uses_of_a_module_with_a_forward_of_its_own_are_told_apart_by_its_callers() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    uses = sensed(Twice(Tower()), torch.randn(4, 3))
    assert [list(use) for use in uses.values()] == [["model.fc", "model.fc#2"]] * 2


def test_turns_of_a_loop_are_one_use() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = torch.tanh(self.cell(x))
            return x @ self.cell.weight

    x = torch.randn(5, 3)
    model = Recurrent()
    uses = sensed(model, x)["cell.weight"]
    out = model.cell.weight.detach().clone().requires_grad_()
    h = x
    for _ in range(4):
        h = torch.tanh(model.cell(h))
    model.zero_grad()
    (h @ out).square().sum().backward()
    assert uses == {
        "cell": pytest.approx(model.cell.weight.grad.norm().item()),
        "Recurrent.matmul": pytest.approx(out.grad.norm().item()),
    }


def test_untied_parameters_are_left_alone() -> None:
    assert sensed(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)) == {}


def test_frozen_ties_and_passes_without_gradient() -> None:
    model = Language("module")
    model.embed.weight.requires_grad_(False)
    assert sensed(model, torch.tensor([[1, 2]])) == {}
    model = Language("module")
    calls = Calls(model)
    sensor = Ties(model, [], calls)
    with torch.no_grad():
        calls.listen()
        model(torch.tensor([[1, 2]]))
        calls.rest()
    assert sensor.read() == {}


def test_second_backward_and_function_transforms() -> None:
    model, x = Language("module"), torch.tensor([[1, 2]])
    calls = Calls(model)
    sensor = Ties(model, [], calls)
    calls.listen()
    y = model(x)
    calls.rest((x,), y)
    y.sum().backward(retain_graph=True)
    (100 * y).sum().backward()
    h = model.body(model.embed(x)).detach()
    assert torch.allclose(sensor.read()["embed.weight"]["head"], h.sum((0, 1)).norm() * 11**0.5)
    params = dict(model.named_parameters())

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, params, (x,), tie_weights=True).sum()

    calls.listen()
    torch.func.grad(loss)(params)
    calls.rest()
    assert sensor.read() == {}


def test_what_is_tied_is_known_after_a_pause() -> None:
    torch.manual_seed(0)
    model, x = Twice(nn.Linear(3, 2)), torch.randn(4, 3)
    calls = Calls(model)
    first = Ties(model, [], calls)
    calls.listen()
    first.listen()
    model(x)
    calls.rest()
    first.rest()
    assert first.state_dict() == {"tied": ["model.bias", "model.weight"]}
    calls = Calls(model)
    second = Ties(model, [], calls)
    second.load_state_dict(first.state_dict())
    calls.listen()
    second.listen()
    y = model(x)
    calls.rest()
    y.sum().backward()
    assert set(second.read()) == {"model.bias", "model.weight"}
