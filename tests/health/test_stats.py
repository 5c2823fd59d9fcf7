"""The numbers of a record against the plain way to compute them, also where plain code would lose them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.health.norms import MOST, Meter
from hesse.health.stats import anatomy, find_layers


def meter(model: nn.Module) -> Meter:
    return Meter(find_layers(model))


def read(m: Meter) -> dict[str, dict[str, Any]]:
    return m.read()[0]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors]).double()


def quadratic(lr: float, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Any]:
    """One weight on a parabola of curvature 1 under gradient descent."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr)


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("lr", [0.1, 1.0, 2.0, 2.5])
def test_turn_is_one_minus_lr_times_curvature(lr: float, every: int) -> None:
    model, opt = quadratic(lr)
    model.weight.data.fill_(3.0)
    with hesse.watch(model, every=every, guard=None) as w:
        for _ in range(15):
            opt.zero_grad()
            (model.weight.square().sum() / 2).backward()
            opt.step()
            if lr == 1.0:
                model.weight.data.add_(1.0)  # the minimum would be the end
    for record in w.records[1:]:
        turn = record["layers"]["Linear"]["turn"]
        assert turn == pytest.approx(1 - lr if lr != 1.0 else turn, abs=1e-9)
        assert record["turn"] == turn


def test_every_number_of_a_layer_the_plain_way() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    start = flat(model[0].parameters())
    grads, steps = [], []
    with hesse.watch(model, every=1, guard=None) as w:
        for _ in range(6):
            old = flat(model[0].parameters())
            opt.zero_grad()
            model(torch.randn(4, 5)).square().sum().backward()
            grads.append(flat(p.grad for p in model[0].parameters()))
            opt.step()
            steps.append(flat(model[0].parameters()) - old)
    for k, record in enumerate(w.records):
        layer = record["layers"]["0"]
        assert layer["grad_zero"] == pytest.approx(float((grads[k] == 0).double().mean()))
        assert layer["grad_tiny"] == 0
        assert layer["stuck"] == pytest.approx(float(((steps[k] == 0) & (grads[k] != 0)).sum() / (grads[k] != 0).sum()))
        if k:
            cosine = grads[k] @ grads[k - 1] / grads[k].norm() / grads[k - 1].norm()
            assert layer["coherence"] == pytest.approx(float(cosine), rel=1e-5)
            turn = (grads[k] @ steps[k - 1]) / (grads[k - 1] @ steps[k - 1])
            assert layer["turn"] == pytest.approx(float(turn), rel=1e-4)
    moved = (flat(model[0].parameters()) - start).norm() / start.norm()
    assert w.records[-1]["layers"]["0"]["moved"] == pytest.approx(float(moved), rel=1e-5)
    assert w.records[-1]["layers"]["0"]["without"] == []


@pytest.mark.parametrize("shape", [(2000, 300), (4096, 256), (100_000,)], ids=str)
def test_samples_of_large_parameters_are_near_the_whole(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.p = nn.Parameter(torch.randn(shape))
    m = meter(model)
    old = torch.randn(shape)
    for k in range(2):
        model.p.grad = old + 0.5 * k * torch.randn(shape)
        m.keep()
        m.gradients()
        with torch.no_grad():
            model.p -= 0.1 * model.p.grad
        m.moved()
        numbers = read(m)["Module"]
    assert numbers["coherence"] == pytest.approx(1 / math.sqrt(1.25), abs=0.05)
    assert numbers["update_ratio"] == pytest.approx(0.1 * math.sqrt(1.25) / math.sqrt(1.01), rel=0.02)
    columns = torch.arange(math.prod(shape)).reshape(shape)[..., 0 if len(shape) > 1 else ...]
    picked = torch.arange(math.prod(shape))[:: m._strides[0]]
    assert MOST / 2 < len(picked) <= MOST
    if len(shape) > 1:
        assert torch.isin(picked, columns).double().mean() < 0.1  # not one column only


def test_stuck_weights_in_bfloat16() -> None:
    torch.manual_seed(0)
    stuck = []
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Linear(32, 32).to(dtype)
        opt = torch.optim.SGD(model.parameters(), 1e-5)
        with hesse.watch(model, every=1, guard=None) as w:
            model(torch.randn(8, 32, dtype=dtype)).square().mean().backward()
            opt.step()
        stuck.append(w.records[0]["layers"]["Linear"]["stuck"])
    assert stuck[0] > 0.8 and stuck[1] < 0.3


def test_tiny_gradients_are_told_from_zeros() -> None:
    model = nn.Linear(4, 1, bias=False)
    m = meter(model)
    model.weight.grad = torch.tensor([[0.0, 1e-40, 1e-20, 1.0]])
    m.gradients()
    m.moved()
    layer = read(m)["Linear"]
    assert (layer["grad_zero"], layer["grad_tiny"]) == (0.25, 0.25)


def test_what_float16_lost_is_told_from_what_a_scaler_made_small() -> None:
    model = nn.Linear(4, 1, bias=False)
    m = meter(model)
    for scale, tiny in ((1.0, 0.5), (1 / 65536, 0.0)):
        raw = torch.tensor([[3e-6, 1e-7, 0.5, 1.0]]).half().float()
        model.weight.grad = raw * scale if scale == 1 else (raw + 0.123) * scale
        m.gradients()
        m.moved()
        assert m.read((), {"Linear"})[0]["Linear"]["grad_tiny"] == tiny


def test_lengths_beyond_the_range_of_float32() -> None:
    model = nn.Linear(3, 1, bias=False)
    m = meter(model)
    for value in (1e-30, 1e30):
        model.weight.grad = torch.full((1, 3), value)
        m.gradients()
        m.moved()
        assert read(m)["Linear"]["grad_norm"] == pytest.approx(3**0.5 * value, rel=1e-5)
    model.weight.grad = torch.tensor([[1.0, math.inf, 1.0]])
    m.gradients()
    m.moved()
    assert read(m)["Linear"]["grad_norm"] == math.inf


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 4, sparse=True), nn.Flatten(), nn.Linear(8, 1))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with hesse.watch(model, every=1, guard=None) as w:
        for _ in range(3):
            opt.zero_grad()
            model(torch.tensor([[1, 2], [1, 3]])).sum().backward()
            norm = float(model[0].weight.grad.to_dense().norm())
            opt.step()
            layer = w.records[-1]["layers"]["0"]
            assert layer["grad_norm"] == pytest.approx(norm)
            assert layer["grad_zero"] == pytest.approx(0.97) and layer["update_ratio"] > 0
    assert json.dumps(w.state_dict())


def test_layers_without_gradient_are_named_by_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    opt = torch.optim.SGD(model[0].parameters(), 0.1)
    model[0].bias.requires_grad_(False)
    with hesse.watch(model, every=1, guard=None) as w:
        (model[0](torch.ones(2, 3)).sum() + 0 * model[1].weight.sum()).backward()
        opt.step()
    layers = w.records[0]["layers"]
    assert layers["0"]["without"] == [] and layers["1"]["without"] == ["weight", "bias"]
    assert layers["1"]["grad_norm"] == 0.0
    assert layers["0"]["lr"] == 0.1 and layers["1"]["lr"] is None
    assert layers["1"]["moved"] == 0.0 and layers["1"]["update_ratio"] is None


def test_learning_rates_that_are_tensors_and_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = [{"params": model[0].parameters(), "lr": torch.tensor(0.5)}, {"params": model[1].parameters()}]
    opt = torch.optim.Adam(groups, lr=0.25)
    with hesse.watch(model, every=1, guard=None) as w:
        model(torch.ones(2, 3)).sum().backward()
        opt.step()
    assert [w.records[0]["layers"][path]["lr"] for path in "01"] == [0.5, 0.25]


def test_parameters_may_thaw_and_be_exchanged() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    with hesse.watch(model, every=1, guard=None) as w:
        for step in range(4):
            if step == 2:
                model[0].requires_grad_(True)
                model[1].weight = nn.Parameter(torch.randn(3, 3))
            opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
            model(torch.ones(2, 3)).square().sum().backward()
            opt.step()
    measured = [
        [path for path, layer in record["layers"].items() if layer["weight_norm"] is not None] for record in w.records
    ]
    assert measured == [["1"], ["1"], ["0", "1"], ["0", "1"]]
    assert w.steps == 4 and w.records[3]["layers"]["1"]["update_ratio"] > 0


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(1))
    with hesse.watch(model, every=1, guard=None) as w:
        for _ in range(3):
            model(torch.randn(4, 3)).sum().backward()
            opt = torch.optim.SGD(model.parameters(), 0.1)
            opt.step()
    assert w.records[-1]["layers"]["0"]["update_ratio"] > 0


def test_anatomy_is_json_and_tells_what_is_tied_and_frozen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.norm.requires_grad_(False)

    parts = anatomy(nn.DataParallel(Net()))
    assert json.loads(json.dumps(parts)) == parts
    assert list(parts) == ["Net", "embed", "norm", "head"]
    assert parts["head"]["tied"] == ["embed"] and parts["embed"]["tied"] == ["head"]
    assert parts["norm"]["params"]["weight"] == {"shape": [4], "dtype": "float32", "trainable": False}
    assert parts["head"]["index"] == 3 and parts["head"]["type"] == "Linear"


def test_kept_samples_survive_saving_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    one, two = meter(model), meter(model)
    for m in (one, two):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        m.keep()
        m.gradients()
        m.moved()
        m.read()
        state = json.loads(json.dumps(one.state_dict()))
    two.load_state_dict(state)
    assert two.state_dict() == one.state_dict()
    other = meter(nn.Linear(2, 2))
    other.load_state_dict(state)  # of another model: nothing to compare with
    assert other.state_dict() == {}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_low_precision_is_measured_in_float64(half: torch.dtype) -> None:
    model = nn.Linear(64, 64, bias=False).to(half)
    m = meter(model)
    model.weight.grad = torch.full_like(model.weight, 300.0)
    m.gradients()
    m.moved()
    assert read(m)["Linear"]["grad_norm"] == pytest.approx(300 * 64, rel=1e-2)


def test_autocast_is_recorded() -> None:
    model = nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with hesse.watch(model, every=1, guard=None) as w:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(torch.randn(2, 4)).float(), torch.zeros(2, 4))
        loss.backward()
        opt.step()
    assert w.records[0]["autocast"] == "bfloat16"


def test_a_layer_that_was_forgotten_in_the_optimizer_shows_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    opt = torch.optim.SGD(model[0].parameters(), 0.1)
    with hesse.watch(model, every=1, guard=None) as w:
        for _ in range(3):
            model.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            opt.step()
    layer = w.records[-1]["layers"]["1"]
    assert layer["grad_norm"] > 0 and layer["weight_norm"] > 0 and layer["without"] == []
    assert layer["lr"] is None and layer["moved"] == 0.0 and layer["update_ratio"] is None


def test_two_halves_that_take_turns_are_read_at_their_own_steps() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    halves = [torch.optim.SGD(part.parameters(), 0.1 * (k + 1)) for k, part in enumerate(model)]
    with hesse.watch(model, every=1, guard=None) as w:
        for k in (0, 1, 0, 1, 0, 1):
            halves[k].zero_grad()
            model[k](torch.ones(2, 3)).square().sum().backward()
            halves[k].step()
            w.step()
    for record, k in list(zip(w.records, (0, 1, 0, 1, 0, 1), strict=True))[2:]:
        own, other = record["layers"][str(k)], record["layers"][str(1 - k)]
        assert own["grad_norm"] > 0 and own["update_ratio"] > 0 and own["lr"] == 0.1 * (k + 1)
        assert other["grad_norm"] is None and other.get("without") is None and other["lr"] is None
