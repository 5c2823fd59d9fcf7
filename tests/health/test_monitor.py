"""hesse.watch on real training: faults are named in time, healthy runs are left in peace."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.health import Monitor

Make = Callable[[], nn.Module]


def digits(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Small images of four classes: a bright quadrant each, in noise; some pixels are always zero."""
    y = torch.randint(0, 4, (n,), generator=generator)
    x = 0.5 * torch.randn(n, 1, 8, 8, generator=generator)
    for i in range(4):
        rows, columns = slice(4 * (i // 2), 4 * (i // 2) + 4), slice(4 * (i % 2), 4 * (i % 2) + 4)
        x[y == i, :, rows, columns] += 1
    x[..., 0] = 0
    return x, y


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    counted: bool = False,
    batch: int = 32,
    spoil: int = 0,
    every: int = 10,
) -> Monitor:
    generator = torch.Generator().manual_seed(0)
    with hesse.watch(model, optimizer if counted else None, every) as w:
        for step in range(1, steps + 1):
            x, y = digits(batch, generator)
            if step == spoil:
                x[0, 0, 0, 1] = torch.nan
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            w.step(loss=loss)
    return w


def mlp(depth: int, act: Make, width: int = 32, norm: bool = False) -> nn.Module:
    parts: list[nn.Module] = [nn.Flatten(), nn.Linear(64, width), act()]
    for _ in range(depth):
        parts += [nn.Linear(width, width), *([nn.LayerNorm(width)] if norm else []), act()]
    return nn.Sequential(*parts, nn.Linear(width, 4))


def initialised(model: nn.Module, gain: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, gain)
            nn.init.zeros_(module.bias)
    return model


def convnet(norm: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2), *([nn.BatchNorm2d(16)] if norm else []), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.unused = nn.Embedding(100, 16)
        self.body = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, 4)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0]
        return self.head(self.body(self.embed(rows) + self.unused.weight[:8]).mean(1))


class Functional(nn.Module):
    """ReLU as a function, not as a module."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 32), nn.Linear(32, 4)
        nn.init.constant_(self.one.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x.flatten(1))))


def frozen() -> nn.Module:
    model = mlp(2, nn.ReLU)
    model[1].requires_grad_(False)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 3e-3)


HEALTHY: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: mlp(2, nn.ReLU),
    "tanh": lambda: mlp(2, nn.Tanh),
    "deep relu": lambda: initialised(mlp(15, nn.ReLU), 2**0.5),
    "deep tanh": lambda: initialised(mlp(15, nn.Tanh), 1.0),
    "deep with norm": lambda: mlp(6, nn.GELU, norm=True),
    "convnet": lambda: convnet(False),
    "convnet with batch norm": lambda: convnet(True),
    "transformer with zero head": Transformer,
    "functional": Functional,
    "frozen first layer": frozen,
}


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_left_in_peace(name: str, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = HEALTHY[name]()
    w = train(model, optimizer(model), 200)
    assert w.records[-1]["loss"] < 0.7 * w.records[0]["loss"]  # it did train
    assert w.report().findings == [], str(w.report())


def test_convergence_is_not_a_fault() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.randn(32, 6) @ torch.randn(6, 2)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, history_size=50, line_search_fn="strong_wolfe")
    with hesse.watch(model) as w:
        for _ in range(60):
            w.step(loss=optimizer.step(hesse.closure(model, F.mse_loss, (x.double(), y.double()))))
    grads = [record["layers"]["2"]["grad_norm"] for record in w.records]
    assert grads[-1] < 1e-3 * grads[0]
    assert w.report().ok, str(w.report())


def test_vanishing_through_sigmoids() -> None:
    torch.manual_seed(0)
    model = mlp(10, nn.Sigmoid)
    w = train(model, sgd(model), 20)
    assert [(f.kind, f.where) for f in w.report().findings] == [("vanishing", "1")]
    cured = mlp(10, nn.ReLU, norm=True)  # what the remedy says
    assert train(cured, sgd(cured), 20).report().ok


def test_exploding_weights_are_named_before_the_loss_is_lost() -> None:
    torch.manual_seed(0)
    model = initialised(mlp(6, nn.ReLU), 4.0)
    w = train(model, torch.optim.SGD(model.parameters(), 0.05), 20)
    kinds = [f.kind for f in w.report().findings]
    assert "exploding" in kinds or "non_finite" in kinds


def test_divergence_in_the_middle_of_training_is_exploding() -> None:
    torch.manual_seed(0)
    model = mlp(2, nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    generator = torch.Generator().manual_seed(0)
    with hesse.watch(model, every=5) as w:
        for step in range(80):
            optimizer.param_groups[0]["lr"] = 0.05 if step < 40 else 200.0
            x, y = digits(32, generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            w.step(loss=loss)
            if step == 39:
                assert w.report().ok
    assert w.report().findings[0].kind == "exploding"
    assert 40 < w.report().findings[0].step <= 60


def shut() -> nn.Module:
    model = mlp(1, nn.ReLU)
    nn.init.constant_(model[3].bias, -50.0)
    return model


@pytest.mark.parametrize(("make", "where"), [(shut, "4"), (lambda: Functional(-50.0), "one")])
def test_dead_units_of_modules_and_of_functions(make: Make, where: str) -> None:
    torch.manual_seed(0)
    net = make()
    w = train(net, sgd(net), 12)
    findings = [f for f in w.report().findings if f.kind == "dead_units"]
    assert [f.where for f in findings] == [where]
    assert findings[0].value == 1.0


@pytest.mark.parametrize("counted", [False, True])
def test_nan_is_seen_at_its_step_between_samples_too(counted: bool) -> None:
    torch.manual_seed(0)
    model = mlp(1, nn.ReLU)
    w = train(model, sgd(model), 24, counted=counted, spoil=17, every=10)
    finding = w.report().findings[0]
    assert (finding.kind, finding.where, finding.step) == ("non_finite", "loss", 17)
    assert len([f for f in w.report().findings if f.where == "loss"]) == 1


def test_numbers_agree_with_the_plain_way() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    with hesse.watch(model, optimizer, every=3) as w:
        for step in range(1, 10):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 6)).square().sum()
            loss.backward()
            old = torch.cat([p.detach().flatten() for p in model[2].parameters()])
            optimizer.step()
            if step in (1, 2, 3, 4, 5, 6, 9):
                new = torch.cat([p.detach().flatten() for p in model[2].parameters()])
                grad = torch.cat([p.grad.flatten() for p in model[2].parameters()])
                record = w.records[-1]
                assert record["step"] == step
                numbers = record["layers"]["2"]
                assert numbers["grad_norm"] == pytest.approx(grad.norm().item(), rel=1e-5)
                assert numbers["weight_norm"] == pytest.approx(new.norm().item(), rel=1e-5)
                assert numbers["update_ratio"] == pytest.approx((new - old).norm().item() / old.norm().item(), rel=1e-3)
    assert [r["step"] for r in w.records] == [1, 2, 3, 4, 5, 6, 9]
    assert list(w.records[0]["layers"]) == ["0", "2"]


def test_tiny_gradients_do_not_underflow_to_zero() -> None:
    model = nn.Linear(2, 1, bias=False)
    with hesse.watch(model) as w:
        model.weight.grad = torch.full((1, 2), 1e-30)
        w.step()
    assert w.records[0]["layers"]["Linear"]["grad_norm"] == pytest.approx(2**0.5 * 1e-30)


def test_gradients_taken_with_autograd_grad_and_frozen_or_missing_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with hesse.watch(model) as w:
        for _ in range(3):
            params = list(model[2].parameters())
            loss = model[2](model[1](model[0](torch.randn(4, 6)))).square().sum()
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = g
                p.data.sub_(g, alpha=0.01)
            w.step(loss=loss.detach())
    layers = w.records[-1]["layers"]
    assert set(layers) == {"2", "3"}
    assert layers["2"]["grad_norm"] > 0 and layers["3"]["grad_norm"] is None


def test_resume_continues_as_if_never_stopped() -> None:
    def run(stop: int | None) -> Monitor:
        torch.manual_seed(0)
        model = shut()
        generator = torch.Generator().manual_seed(0)

        def steps(w: Monitor, first: int, last: int) -> None:
            for _ in range(first, last):
                x, y = digits(32, generator)
                model.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p.sub_(p.grad, alpha=0.05)
                w.step(loss=loss)

        if stop is None:
            with hesse.watch(model, every=4) as w:
                steps(w, 0, 30)
            return w
        with hesse.watch(model, every=4) as w:
            steps(w, 0, stop)
        state = json.loads(json.dumps(w.state_dict(), allow_nan=False))
        with hesse.watch(model, every=4) as w:
            w.load_state_dict(state)
            steps(w, stop, 30)
        return w

    whole = run(None)
    assert whole.findings
    for stop in (3, 4, 7, 11):  # before and after a sample, before and after the finding
        assert run(stop).state_dict() == whole.state_dict()


def test_new_findings_come_once_and_hooks_go() -> None:
    torch.manual_seed(0)
    model = mlp(1, nn.ReLU)
    optimizer = sgd(model)
    w = train(model, optimizer, 5, counted=True, spoil=3)
    assert w.new_findings() == w.findings != []
    assert w.new_findings() == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not optimizer._optimizer_step_post_hooks
    assert "non_finite" in str(w.report()) and "update_ratio" in str(w.report())


def test_reused_activations_eval_passes_and_transforms_do_not_disturb() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Linear(6, 8), nn.Linear(8, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.two(self.act(self.one(x))))

    model = Net()
    params: dict[str, Any] = dict(model.named_parameters())
    with hesse.watch(model, every=1) as w:
        for _ in range(6):
            x = torch.randn(4, 6)
            f = lambda p: torch.func.functional_call(model, p, (x,)).square().sum()  # noqa: B023, E731
            torch.func.grad(f)(params)
            model.zero_grad()
            model(x).square().sum().backward()
            with torch.no_grad():
                model(torch.zeros(1, 6))
            w.step()
    assert w.records[-1]["layers"]["act"]["dead"] is not None
    assert [len(counts) for counts in w._silent["act"]] == [8, 4]


def test_long_runs_keep_few_records() -> None:
    model = nn.Linear(1, 1)
    with hesse.watch(model, every=1) as w:
        for _ in range(1000):
            w.step(loss=1.0)
    steps = [r["step"] for r in w.records]
    assert len(steps) <= 300 and steps[0] == 1 and steps[-1] == 1000 and steps == sorted(steps)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        hesse.watch(nn.Linear(1, 1), every=0)
    assert "Nothing" in str(hesse.watch(nn.Linear(1, 1)).report())
