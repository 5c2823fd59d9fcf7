"""Activations against plain computations on whole tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.health.sensors.activations import PATIENCE, Activations, saturated, silent_units
from hesse.health.sensors.functional import Calls
from hesse.health.sensors.protocol import Reading
from hesse.health.stats import find_layers


def sensed(model: nn.Module, batches: list[Any], loss: Callable[[Tensor], Tensor] | None = None) -> Reading:
    """The reading after the last of these batches."""
    calls = Calls(model)
    sensor = Activations(model, find_layers(model), calls)
    reading: Reading = {}
    for x in batches:
        calls.listen()
        sensor.listen()
        y = model(x)
        calls.rest((x,), y)
        sensor.rest()
        if loss is not None:
            model.zero_grad()
            loss(y).backward()
        reading = sensor.read()
    return reading


def function(act: Callable[[Tensor], Tensor]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return act(self.fc(x))

    return Net()


def test_sizes_of_layers_are_those_of_the_whole_tensors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(16, 6)
    h = model[0](x)
    y = model[2](h.tanh())
    gh, gy = torch.autograd.grad(y.pow(4).sum(), [h, y])
    reading = sensed(model, [x], lambda y: y.pow(4).sum())
    for path, inputs, outputs, grad in (("0", x, h, gh), ("2", h.tanh(), y, gy)):
        for key, t in (("in_rms", inputs), ("out_rms", outputs), ("out_grad_rms", grad)):
            assert torch.allclose(reading[path][key], t.square().mean().sqrt()), (path, key)
        spread = outputs.var(0, correction=0).mean().sqrt() / outputs.square().mean().sqrt()
        assert torch.allclose(reading[path]["spread"], spread)
    assert [reading[path]["order"] for path in "02"] == [2, 5]  # the model itself, 0, 1, its tanh, 2


def test_large_tensors_are_sampled_well() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 16, 3)
    x = torch.randn(64, 3, 48, 48) * torch.linspace(0.1, 2, 48)
    for memory in (torch.contiguous_format, torch.channels_last):
        reading = sensed(model, [x.to(memory_format=memory)])["Conv2d"]
        y = model(x)
        assert reading["in_rms"].item() == pytest.approx(x.square().mean().sqrt().item(), rel=0.02)
        assert reading["out_rms"].item() == pytest.approx(y.square().mean().sqrt().item(), rel=0.02)


def test_rows_that_are_all_the_same_have_no_spread() -> None:
    model = nn.Linear(4, 5)
    assert sensed(model, [torch.ones(7, 4)])["Linear"]["spread"] < 1e-6
    assert "spread" not in sensed(model, [torch.ones(1, 4)])["Linear"]


def test_a_loop_gives_the_mean_over_its_turns() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)
            nn.init.eye_(self.fc.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(3 * self.fc(x))

    assert sensed(Loop(), [torch.ones(2, 2)])["fc"]["out_rms"].item() == pytest.approx(5**0.5)


DEAD = {
    "F.relu": F.relu,
    "relu method": lambda x: x.relu(),
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "nn.ReLU6": nn.ReLU6(),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
}


@pytest.mark.parametrize("act", DEAD)
def test_dead_units_are_counted_for_every_activation(act: str) -> None:
    torch.manual_seed(0)
    model = function(DEAD[act])
    with torch.no_grad():
        model.fc.bias[:3] = -30.0
        model.fc.bias[3:] = 1.0
    batches = [torch.randn(64, 6) for _ in range(PATIENCE)]
    dead = [keys["dead"].item() for keys in sensed(model, batches).values() if "dead" in keys]
    assert dead == [pytest.approx(3 / 8)]
    early = [keys["dead"].item() for keys in sensed(model, batches[1:]).values() if "dead" in keys]
    assert early == [0.0]  # not after one batch less


def test_one_living_row_keeps_a_unit_alive() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    model.load_state_dict({"0.weight": torch.ones(2, 1), "0.bias": torch.tensor([-2.0, 0.0])})
    sleeping = [torch.full((64, 1), 1.0)] * PATIENCE
    waking = [*sleeping[1:], torch.cat([torch.full((63, 1), 1.0), torch.full((1, 1), 3.0)])]
    assert sensed(model, sleeping)["1"]["dead"] == 0.5
    assert sensed(model, waking)["1"]["dead"] == 0.0


def test_small_batches_need_more_samples() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    nn.init.constant_(model[0].bias, -9.0)
    assert sensed(model, [torch.ones(8, 1)] * 7)["1"]["dead"] == 0.0
    assert sensed(model, [torch.ones(8, 1)] * 8)["1"]["dead"] == 1.0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), (32, 5, 3)),
        (nn.Linear(3, 4), (8, 2, 5, 3)),
        (nn.Conv1d(3, 4, 1), (16, 3, 7)),
        (nn.Conv2d(3, 4, 1), (16, 3, 5, 5)),
        (nn.Conv3d(3, 4, 1), (16, 3, 2, 3, 3)),
    ],
    ids=["tokens", "heads", "signals", "images", "volumes"],
)
def test_units_are_found_on_their_axis(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        layer.bias[:3], layer.bias[3] = -30.0, 30.0
    reading = sensed(nn.Sequential(layer, nn.ReLU()), [torch.randn(shape)] * 13)
    assert reading["1"]["dead"] == 0.75


def test_a_shared_relu_is_measured_after_each_layer_and_a_loop_once() -> None:
    class Shared(nn.Module):
        def __init__(self, looped: bool) -> None:
            super().__init__()
            self.looped = looped
            self.relu = nn.ReLU()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            if self.looped:
                for layer in self.layers:
                    x = self.relu(layer(x))
                return x
            return self.relu(self.layers[1](self.relu(self.layers[0](x))))

    for looped in (True, False):
        model = Shared(looped)
        nn.init.constant_(model.layers[1].bias, -30.0)
        calls = Calls(model)
        sensor = Activations(model, find_layers(model), calls)
        for _ in range(PATIENCE):
            calls.listen()
            model(torch.randn(64, 4))
            calls.rest()
            reading = sensor.read()
        assert [reading[path]["dead"] for path in ("relu", "relu#2")] == [0.0, 1.0]
        assert [calls.anatomy[path]["after"] for path in ("relu", "relu#2")] == ["layers.0", "layers.1"]


def test_a_unit_that_wakes_in_one_turn_of_a_loop_is_alive() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)
            self.fc.load_state_dict({"weight": torch.tensor([[0.0, 1.0], [1.0, 0.0]])})

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):  # the units are awake in turn
                x = self.fc(x).relu()
            return x

    for x, dead in ((torch.tensor([1.0, -1.0]), 0.0), (torch.tensor([-1.0, -1.0]), 1.0)):
        assert sensed(Loop(), [x.repeat(64, 1)] * PATIENCE)["Loop.relu"]["dead"] == dead


SLOPES = {
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "tanh": (torch.tanh, "tanh"),
    "softsign": (F.softsign, "softsign"),
    "hardtanh": (F.hardtanh, "hardtanh"),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid"),
}


@pytest.mark.parametrize("act", SLOPES)
def test_saturated_is_a_slope_below_a_hundredth_of_the_largest(act: str) -> None:
    f, name = SLOPES[act]
    x = torch.linspace(-25, 25, 10_001, dtype=torch.float64, requires_grad=True)
    y = f(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    flat = slope < 0.01 * slope.max()
    assert (saturated(y.detach(), name) != flat).sum() <= 2  # on the edge itself
    assert 0.2 < flat.double().mean() < 1


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.Tanh(), nn.Softsign(), nn.Hardtanh(), nn.Hardsigmoid()], ids=str)
def test_saturation_of_modules(act: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(1, 4), act)
    model.load_state_dict({"0.weight": torch.zeros(4, 1), "0.bias": torch.tensor([0.0, 0.1, 60.0, -60.0])})
    reading = sensed(model, [torch.ones(8, 1)])
    assert reading["1"]["saturated"] == 0.5


def test_hardtanh_has_its_own_ends() -> None:
    reading = sensed(nn.Sequential(nn.Linear(1, 4), nn.Hardtanh(-50.0, 50.0)), [torch.ones(8, 1)])
    assert reading["1"]["saturated"] == 0.0


def test_a_sure_softmax_is_peaked_not_saturated() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.LogSoftmax(-1))
    model.load_state_dict({"0.weight": torch.tensor([[1.0], [0.0], [0.0]]), "0.bias": torch.zeros(3)})
    x = torch.tensor([[0.0], [1.0], [20.0], [30.0]])
    reading = sensed(model, [x])["1"]
    assert reading["peaked"] == 0.5
    assert "saturated" not in reading
    model[1] = nn.Softmax(dim=1)
    assert sensed(model, [x])["1"]["peaked"] == 0.5


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU], ids=["rnn", "lstm", "gru"])
def test_recurrent_outputs_saturate(kind: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind(3, 5, batch_first=True)
    x = torch.randn(4, 30, 3)
    assert sensed(model, [x])[kind.__name__]["saturated"] == 0.0
    for name, p in model.named_parameters():
        if name.startswith("weight"):
            p.data.mul_(200)
    y = model(x)[0]
    expected = (1 - y.square() < 0.01).float().mean()
    assert sensed(model, [x])[kind.__name__]["saturated"].item() == pytest.approx(expected.item())
    assert expected > 0.01


def test_units_dead_in_a_handwritten_relu_show_by_their_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(function(lambda x: x * (x > 0)), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].fc.bias[:2] = -30.0
    reading = sensed(model, [torch.randn(32, 6)] * PATIENCE, lambda y: y.square().sum())
    assert reading["0.fc"]["dead"] == 0.25
    assert "dead" not in reading["1"]
    nothing = sensed(model, [torch.randn(32, 6)] * PATIENCE, lambda y: 0 * y.sum())
    assert nothing["0.fc"]["dead"] == 0.0  # no gradient at all is another fault


def test_counts_go_on_after_a_pause_and_nothing_is_needed_from_a_forward() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
    nn.init.constant_(model[0].bias, -9.0)
    state: dict[str, Any] = {}
    for _ in range(PATIENCE):
        calls = Calls(model)
        sensor = Activations(model, find_layers(model), calls)
        sensor.load_state_dict(json.loads(json.dumps(state)))
        calls.listen()
        model(torch.ones(64, 1))
        calls.rest()
        reading = sensor.read()
        state = sensor.state_dict()
    assert reading["1"]["dead"] == 1.0
    assert sensor.read() == {"1": {"dead": 1.0}}  # a step that was not listened to


def test_a_second_backward_does_not_count() -> None:
    model = nn.Linear(3, 2)
    calls = Calls(model)
    sensor = Activations(model, find_layers(model), calls)
    x = torch.randn(4, 3)
    calls.listen()
    y = model(x)
    calls.rest((x,), y)
    y.sum().backward(retain_graph=True)
    (100 * y).sum().backward()
    assert sensor.read()["Linear"]["out_grad_rms"] == 1.0


def test_few_positions_are_enough_for_a_dead_channel() -> None:
    y = torch.zeros(64, 8, 64, 64)
    y[:, :4] = torch.rand(64, 4, 64, 64)
    assert silent_units(y, 1).tolist() == [False] * 4 + [True] * 4


def test_a_module_that_returns_its_parameter_keeps_no_hook() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 4))

        def forward(self) -> Tensor:
            return self.table

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.fc = Positions(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.positions())

    model = Net()
    reading = sensed(model, [torch.randn(3, 4)] * 2, lambda y: y.sum())
    assert reading["positions"]["out_rms"] == 1.0
    assert not model.positions.table._backward_hooks


def test_a_gradient_that_the_model_takes_itself_does_not_count() -> None:
    class Force(nn.Module):
        """Minus the slope of an energy."""

        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    model, x = Force(), torch.randn(5, 3)
    h = model.energy[0](x.requires_grad_())
    force = -torch.autograd.grad(model.energy[2](h.tanh()).sum(), x, create_graph=True)[0]
    (grad,) = torch.autograd.grad(force.square().sum(), h)
    reading = sensed(model, [x.detach()], lambda y: y.square().sum())
    assert torch.allclose(reading["energy.0"]["out_grad_rms"], grad.square().mean().sqrt())
