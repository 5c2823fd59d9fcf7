"""Twins against comparing every pair of units in full."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hesse.health.sensors.functional import Calls
from hesse.health.sensors.symmetry import Symmetry
from hesse.health.stats import find_layers


def sensed(model: nn.Module) -> dict[str, float]:
    reading = Symmetry(model, find_layers(model), Calls(model)).read()
    return {path: keys["twins"].item() for path, keys in reading.items()}


def plainly(weight: Tensor, grad: Tensor) -> float:
    """Every unit with every other."""
    n = len(weight)
    same = [
        [i != j and torch.allclose(weight[i], weight[j]) and torch.allclose(grad[i], grad[j], 1e-3) for j in range(n)]
        for i in range(n)
    ]
    return sum(map(any, same)) / n


def mlp(constant: float | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    if constant is not None:
        for p in model.parameters():
            nn.init.constant_(p, constant)
    return model


def step(model: nn.Module, *shape: int, steps: int = 1, lr: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        x = torch.randn(shape, generator=generator)
        y = model(x)
        y = y[0] if isinstance(y, tuple) else y
        optimizer.zero_grad()
        target = torch.randn(y.shape, generator=generator)
        (y - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("steps", [1, 50])
def test_constant_weights_never_separate(steps: int) -> None:
    model = mlp(0.1)
    step(model, 8, 6, steps=steps)
    assert sensed(model) == {"0": 1.0, "2": 1.0, "4": 0.0}  # outputs have targets of their own


@pytest.mark.parametrize("steps", [1, 50])
def test_random_weights_are_all_different(steps: int) -> None:
    model = mlp()
    step(model, 8, 6, steps=steps)
    assert sensed(model) == {"0": 0.0, "2": 0.0, "4": 0.0}


def test_a_zero_head_is_not_symmetric() -> None:
    model = mlp()
    nn.init.zeros_(model[4].weight)
    nn.init.zeros_(model[4].bias)
    step(model, 8, 6, lr=0.0)
    assert sensed(model) == {"0": 0.0, "2": 0.0, "4": 0.0}


def test_dead_units_are_not_twins() -> None:
    model = mlp()
    model[1] = nn.ReLU()
    nn.init.constant_(model[0].bias, -50.0)
    step(model, 8, 6)
    assert model[0].weight.grad.count_nonzero() == 0
    assert sensed(model)["0"] == 0.0


def test_all_zero_weights_are_symmetric() -> None:
    model = mlp(0.0)
    step(model, 8, 6)
    assert sensed(model)["0"] == sensed(model)["2"] == 1.0


def test_copies_are_counted_as_pairwise_comparison_counts_them() -> None:
    model = mlp()
    with torch.no_grad():  # some units with their biases and outgoing weights, some without
        model[0].weight[:10] = model[0].weight[10:20]
        model[0].bias[:10] = model[0].bias[10:20]
        model[2].weight[:, :6] = model[2].weight[:, 10:16]
    step(model, 8, 6, lr=0.0)
    rows = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    grads = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
    assert plainly(rows, grads) == 12 / 32
    assert sensed(model)["0"] == pytest.approx(12 / 32)


def test_biases_tell_units_apart() -> None:
    model = mlp(0.1)
    model[1] = nn.Identity()  # so that gradients do not differ
    nn.init.normal_(model[0].bias)
    step(model, 8, 6)
    assert model[0].weight.grad.std(0).max() < 1e-6
    assert sensed(model)["0"] == 0.0


def test_both_matrices_of_a_recurrent_unit_count_each_on_its_own() -> None:
    torch.manual_seed(0)
    cell = nn.RNNCell(4, 4, bias=False)
    for p in cell.parameters():
        p.grad = torch.ones(4, 4)
    assert sensed(cell) == {"RNNCell": 0.0}
    with torch.no_grad():  # two units with the same numbers, from the input and from the state changed over
        cell.weight_ih[1], cell.weight_hh[1] = cell.weight_hh[0], cell.weight_ih[0]
        assert sensed(cell) == {"RNNCell": 0.0}
        cell.weight_ih[:] = 0.1
        assert sensed(cell) == {"RNNCell": 0.0}
        cell.weight_hh[2] = cell.weight_hh[3]
        assert sensed(cell) == {"RNNCell": 0.5}


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 3)), (4, 3, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)), (4, 3, 7, 7)),
    "rnn": (lambda: nn.Sequential(nn.RNN(3, 8, batch_first=True), First(), nn.Linear(8, 2)), (4, 5, 3)),
    "lstm": (lambda: nn.Sequential(nn.LSTM(3, 8, batch_first=True), First(), nn.Linear(8, 2)), (4, 5, 3)),
    "two-way gru": (
        lambda: nn.Sequential(nn.GRU(3, 8, 2, batch_first=True, bidirectional=True), First(), nn.Linear(16, 2)),
        (4, 5, 3),
    ),
    "matrix": (lambda: nn.Sequential(Matrix(3, 8), nn.Tanh(), nn.Linear(8, 2)), (4, 3)),
}


class First(nn.Module):
    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return x[0]


class Matrix(nn.Module):
    """A layer of the user's, whose units are columns."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@pytest.mark.parametrize("name", LAYERS)
def test_units_of_other_layers(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = make()
    step(model, *shape)
    assert sensed(model)["0"] == 0.0
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    step(model, *shape, steps=2, lr=0.01)
    assert sensed(model)["0"] == 1.0


def test_tables_and_norms_are_left_aside() -> None:
    model = nn.Sequential(nn.Embedding(50, 4), nn.LayerNorm(4))
    nn.init.zeros_(model[0].weight)
    model(torch.tensor([[1, 2]])).square().sum().backward()
    assert sensed(model) == {}


def test_rows_of_a_handwritten_table_that_were_not_looked_up_do_not_count() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.zeros(50, 4))

        def forward(self, i: Tensor) -> Tensor:
            return self.rows[i]

    model = Table()
    (model(torch.tensor([1, 2])) * torch.randn(2, 4)).sum().backward()
    assert sensed(model) == {"Table": 0.0}


def test_it_is_measured_often_at_first_and_seldom_later() -> None:
    model = mlp()
    step(model, 8, 6)
    sensor = Symmetry(model, find_layers(model), Calls(model))
    expected = [n <= 10 or n % 100 < 10 for n in range(1, 221)]
    assert [bool(sensor.read()) for _ in range(105)] == expected[:105]
    resumed = Symmetry(model, find_layers(model), Calls(model))
    resumed.load_state_dict(sensor.state_dict())
    assert [bool(resumed.read()) for _ in range(115)] == expected[105:]


def test_one_unit_and_no_gradient() -> None:
    model = nn.Linear(3, 1)
    assert sensed(model) == {}
    model(torch.ones(2, 3)).sum().backward()
    assert sensed(model) == {"Linear": 0.0}
