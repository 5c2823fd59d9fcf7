"""Which parts are towers, and what a probe finds in them, against regression done the long way."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.health.sensors.branches import Branches, explained, target
from hesse.health.sensors.functional import Calls
from hesse.health.stats import find_layers
from hesse.multimodal.model import FusedModel


def net(inputs: int = 4, outputs: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs), nn.ReLU())


class Late(nn.Module):
    """Two towers as attributes, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.sight, self.sound, self.head = net(), net(), nn.Linear(12, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.sight(a), self.sound(b)], 1))


class InDict(nn.Module):
    """Towers in a ModuleDict, given a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"sight": net(), "sound": net()})
        self.head = nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        given = {"sight": a, "sound": b}
        return self.head(sum(tower(given[name]) for name, tower in self.towers.items()))


class Loose(nn.Module):
    """Towers that are no modules: attributes and a list, called one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.sight = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 6)])
        self.sound_in, self.sound_out = nn.Linear(4, 8), nn.Linear(8, 6)
        self.head = nn.Linear(12, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        for layer in self.sight:
            a = layer(a).relu()
        return self.head(torch.cat([a, self.sound_out(self.sound_in(b).relu())], 1))


class Wrapped(nn.Module):
    """The towers are inside the body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = Late(), nn.Linear(3, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(self.body(a, b).relu())


class Halves(Late):
    """Two views of one tensor."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        both = torch.cat([a, b], 1)
        return super().forward(both[:, :4], both[:, 4:])


class Inception(Late):
    """Two branches that read the same: no towers."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, a)


class Siamese(nn.Module):
    """One tower, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = net(), nn.Linear(12, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.tower(a), self.tower(b)], 1))


class Residual(nn.Module):
    """A stem and a branch on top of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(4, 6), net(6), nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        h = self.stem(a)
        return self.head(h + self.branch(h))


class Words(nn.Module):
    """Embeddings of words and of places: tables are no towers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(5, 6), nn.Embedding(4, 6), nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        places = torch.arange(4).expand(len(a), 4)
        return self.head((self.words(a.abs().long().clamp(max=4)) + self.places(places)).mean(1))


class Frozen(Late):
    """Of two towers one is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.sight.requires_grad_(False)


def one_pass(model: nn.Module, sensor: Branches, calls: Calls, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 40, 4, generator=generator)
    calls.listen()
    sensor.listen()
    output = model(a, b)
    calls.rest((a, b), output)
    sensor.rest()
    model.zero_grad()
    F.cross_entropy(output, torch.arange(40) % 3).backward()


def look(make: Callable[[], nn.Module]) -> tuple[nn.Module, Branches, Calls]:
    torch.manual_seed(0)
    model = make()
    calls = Calls(model)
    sensor = Branches(model, find_layers(model), calls)
    one_pass(model, sensor, calls)
    sensor.read()
    return model, sensor, calls


@pytest.mark.parametrize(
    ("make", "towers"),
    [
        (Late, {"sight": ("sight.0", "sight.2"), "sound": ("sound.0", "sound.2")}),
        (
            InDict,
            {
                "towers.sight": ("towers.sight.0", "towers.sight.2"),
                "towers.sound": ("towers.sound.0", "towers.sound.2"),
            },
        ),
        (Loose, {"sight": ("sight.0", "sight.1"), "sound_in": ("sound_in", "sound_out")}),
        (Wrapped, {"body.sight": ("body.sight.0", "body.sight.2"), "body.sound": ("body.sound.0", "body.sound.2")}),
        (Halves, {"sight": ("sight.0", "sight.2"), "sound": ("sound.0", "sound.2")}),
        (Inception, {}),
        (Siamese, {}),
        (Residual, {}),
        (Words, {}),
        (Frozen, {}),
        (lambda: Plain(), {}),
    ],
    ids=["late", "dict", "loose", "wrapped", "halves", "inception", "siamese", "residual", "words", "frozen", "plain"],
)
def test_towers_are_what_meets_later_and_reads_different_tensors(make: Any, towers: dict[str, Any]) -> None:
    _, sensor, _ = look(make)
    assert {tower.path: tower.layers for tower in sensor.towers or ()} == towers


class Plain(nn.Module):
    """One after another."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(net(), nn.Linear(6, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.body(a)


def test_modalities_of_the_fused_model() -> None:
    settings = {
        "note": {"kind": "text", "length": 4, "alphabet": "aet"},
        "table": {"kind": "columns", "numbers": 2, "categories": []},
    }
    model = FusedModel(settings, outputs=3)
    here = torch.ones(8, dtype=torch.bool)
    inputs = {
        "note": (torch.randint(1, 5, (8, 4)), here),
        "table": ((torch.randn(8, 2), torch.zeros(8, 0, dtype=torch.long)), here),
    }
    calls = Calls(model)
    sensor = Branches(model, find_layers(model), calls)
    calls.listen()
    output = model(**inputs)
    calls.rest((), output)
    assert [tower.path for tower in sensor.towers or ()] == ["encoders.note", "encoders.table"]


def test_numbers_of_a_tower_are_the_plain_ones() -> None:
    model, sensor, calls = look(Late)
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 40, 4, generator=generator)
    h = model.sound(b)
    output = model.head(torch.cat([model.sight(a), h], 1))
    [g] = torch.autograd.grad(F.cross_entropy(output, torch.arange(40) % 3), h)
    one_pass(model, sensor, calls, 1)
    reading = sensor.read()
    assert list(reading) == ["sight", "sound"]
    numbers = reading["sound"]
    assert float(numbers["grad"]) == pytest.approx(float(g.norm()))
    assert float(numbers["out"]) == pytest.approx(float(h.detach().square().mean().sqrt()))
    assert float(numbers["varies"]) == pytest.approx(float(h.detach().var(0, correction=0).mean().sqrt()))
    rows = (40 * g).square().sum(1).mean() * h.detach().square().sum(1).mean()
    assert float(numbers["curvature"]) == pytest.approx(float(rows), rel=1e-4)
    assert numbers["layers"] == "sound.0 sound.2"
    assert all(-1 < float(numbers[key]) <= 1 for key in ("probe", "share", "missing"))
    assert sensor.read() == {}  # once


@pytest.mark.parametrize(("rows", "width"), [(40, 5), (20, 30)])
def test_leaving_rows_out_is_leaving_rows_out(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(0, -1, width)
    y = x[:, :2] @ torch.randn(2, 3, generator=generator) + torch.randn(rows, 3, generator=generator)
    [found] = explained(x, [y])
    centred = x - x.mean(0)
    mean = centred.square().sum() / width
    best = -torch.inf
    for damping in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        error = alone = 0.0
        for i in range(rows):
            rest = [j for j in range(rows) if j != i]
            # the mean of all rows centres the features, as in the closed form; the target's is left out
            z, t = centred[rest], y[rest]
            ones = torch.cat([z, torch.ones(rows - 1, 1)], 1)
            ridge = torch.diag(torch.cat([damping * mean * torch.ones(width), torch.zeros(1)]))
            w = torch.linalg.solve(ones.T @ ones + ridge, ones.T @ t)
            guess = torch.cat([centred[i], torch.ones(1)]) @ w
            error += float((y[i] - guess).square().sum())
            alone += float((y[i] - t.mean(0)).square().sum())
        best = max(best, 1 - error / alone)
    assert float(found) == pytest.approx(best, abs=1e-4)


def test_a_probe_of_nothing_finds_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(64, k, generator=generator) for k in (32, 4)] for _ in range(20)]
    found = [float(explained(x, [y])[0]) for x, y in pairs]
    assert max(found) < 0.1 and min(found) > -0.2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_labels_are_read_off_the_gradient(smoothing: float, scale: float) -> None:
    output = torch.randn(16, 5, requires_grad=True)
    y = torch.arange(16) % 5
    (scale * F.cross_entropy(output, y, label_smoothing=smoothing)).backward()
    assert target(output.detach(), output.grad).argmax(1).tolist() == y.tolist()


@pytest.mark.parametrize("outputs", [1, 3])
def test_targets_are_read_off_the_gradient(outputs: int) -> None:
    output, y = torch.randn(16, outputs, requires_grad=True), torch.randn(16, outputs)
    F.mse_loss(output, y).backward()
    torch.testing.assert_close(target(output.detach(), output.grad), y)


def test_the_state_goes_on() -> None:
    model, sensor, calls = look(Late)
    one_pass(model, sensor, calls, 1)
    sensor.read()
    state = json.loads(json.dumps(sensor.state_dict(), allow_nan=False))
    other_calls = Calls(model)
    other = Branches(model, find_layers(model), other_calls)
    assert other.state_dict() == {}
    other.load_state_dict(state)
    for s, c in ((sensor, calls), (other, other_calls)):
        one_pass(model, s, c, 2)
    first, second = sensor.read(), other.read()
    assert first["sight"].keys() == second["sight"].keys()
    assert all(float(first["sight"][key]) == float(second["sight"][key]) for key in ("probe", "share", "grad"))


def test_a_row_is_found_from_earlier_batches_too() -> None:
    """With ten rows a batch and eight features a probe needs what it has seen before."""
    _, sensor, _ = look(Late)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(8, 1, generator=generator)
    found = []
    for _ in range(30):
        h = torch.randn(10, 8, generator=generator)
        found.append(float(sensor._probe("sight", h, h @ weights + 0.5 * torch.randn(10, 1, generator=generator))))
    assert sum(found[20:]) / 10 > sum(found[:1]) + 0.1


class Auxiliary(Late):
    """Beside its answer it returns, while it trains, what a tower says alone."""

    answer_columns = slice(0, 3)
    auxiliary = ("alone",)
    own_losses = ("sound",)

    def __init__(self) -> None:
        super().__init__()
        self.alone = nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        heard = self.sound(b)
        return torch.cat([self.head(torch.cat([self.sight(a), heard], 1)), self.alone(heard)], 1)


def test_auxiliary_outputs_are_not_taken_for_the_answer() -> None:
    torch.manual_seed(0)
    plain, wide = Late(), Auxiliary()
    wide.load_state_dict(plain.state_dict(), strict=False)
    a, b, labels = torch.randn(40, 4), torch.randn(40, 4), torch.arange(40) % 3
    readings = []
    for model in (plain, wide):
        calls = Calls(model)
        sensor = Branches(model, find_layers(model), calls)
        reading: Any = {}
        for _ in range(2):
            sensor.listen()
            calls.listen()
            outputs = model(a, b)
            calls.rest((a, b), outputs)
            sensor.rest()
            loss = F.cross_entropy(outputs[:, :3], labels)
            if model is wide:
                loss = loss + F.cross_entropy(outputs[:, 3:], labels.roll(1))
            loss.backward()
            reading = sensor.read()
        readings.append(reading)
    assert [path for path, found in readings[1].items() if found.get("own")] == ["sound"]
    for path in ("sight", "sound"):
        for name in ("probe", "share", "missing"):
            assert float(readings[0][path][name]) == pytest.approx(float(readings[1][path][name]), abs=1e-5)


def test_features_that_are_mostly_dead_and_alike_can_be_probed() -> None:
    """The solver for eigenvalues gives up on such matrices in single precision, at some sizes."""
    x = torch.zeros(128, 64)
    x[:, :3] = 1e-30 * torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 1e3
    y = torch.randn(128, 2, generator=torch.Generator().manual_seed(1))
    assert bool(explained(x, [y])[0].isfinite())
