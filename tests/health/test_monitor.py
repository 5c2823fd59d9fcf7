"""hesse.watch on real training: faults are named in time, healthy runs are left in peace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.health import Monitor
from hesse.health.sampling import SHARE, Pace

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
    return torch.optim.SGD(model.parameters(), 0.008, momentum=0.9)


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


def test_divergence_in_the_middle_of_training_is_said_at_once() -> None:
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
    findings = w.report().findings
    assert findings[0].kind in ("exploding", "learning_rate_too_large", "loss_spike")
    assert 40 < findings[0].step <= 45  # the loss was told, and is judged between samples too


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
    finding = next(f for f in w.report().findings if f.severity == "error")
    assert (finding.kind, finding.step) == ("non_finite", 17)
    assert len([f for f in w.report().findings if f.kind == "non_finite"]) == 1
    origin = next(record["origin"] for record in w.records if record["step"] == 17)
    assert (origin["stage"], origin["where"], origin["rows"]) == ("input", "input", [0])


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
    assert list(w.records[0]["layers"]) == ["0", "1", "2"]  # activations are measured too


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
    assert {path for path, layer in layers.items() if layer["weight_norm"] is not None} == {"2", "3"}
    assert layers["3"]["without"] == ["weight", "bias"]
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
    layers = w.records[-1]["layers"]
    assert layers["act"]["dead"] is not None and layers["act#2"]["dead"] is not None  # each use by itself


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


# ---- what a step is ----------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, torch.randn(16, 6), torch.randn(16, 2)


def plain(model: nn.Module, opt: Any, x: Tensor, y: Tensor, w: Monitor) -> None:
    opt.zero_grad()
    F.mse_loss(model(x), y).backward()
    opt.step()


def told_after(model: nn.Module, opt: Any, x: Tensor, y: Tensor, w: Monitor) -> None:
    loss = F.mse_loss(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    w.step(loss=loss)


def told_before(model: nn.Module, opt: Any, x: Tensor, y: Tensor, w: Monitor) -> None:
    opt.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    w.step(loss=loss)
    opt.step()


def told_without_loss(model: nn.Module, opt: Any, x: Tensor, y: Tensor, w: Monitor) -> None:
    plain(model, opt, x, y, w)
    w.step()


def accumulated(model: nn.Module, opt: Any, x: Tensor, y: Tensor, w: Monitor) -> None:
    opt.zero_grad()
    for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
        loss = F.mse_loss(model(part), target) / 4
        loss.backward()
        w.step(loss=4 * loss.detach())
    opt.step()


def in_a_closure(model: nn.Module, opt: Any, x: Tensor, y: Tensor, w: Monitor) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    w.step(loss=opt.step(closure))


def looked_at_between(model: nn.Module, opt: Any, x: Tensor, y: Tensor, w: Monitor) -> None:
    told_after(model, opt, x, y, w)
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    w.report()


def scaled(model: nn.Module, opt: Any, x: Tensor, y: Tensor, w: Monitor) -> None:
    opt.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss := F.mse_loss(model(x), y)).backward()
    scaler.step(opt)
    scaler.update()
    w.step(loss=loss)


LOOPS = [plain, told_after, told_before, told_without_loss, accumulated, in_a_closure, looked_at_between, scaled]


@pytest.mark.parametrize("given", [False, True], ids=["any optimizer", "one optimizer"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_way_to_write_a_loop_has_the_same_records(loop: Any, given: bool) -> None:
    model, x, y = small()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    expected = []
    for _ in range(7):  # the plain way
        loss = F.mse_loss(model(x), y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        opt.zero_grad()
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        old = [p.detach().clone() for p in model[0].parameters()]
        opt.step()
        move = torch.cat([(p.detach() - q).flatten() for p, q in zip(model[0].parameters(), old, strict=True)]).norm()
        expected.append(
            (
                float(loss.detach()),
                float(torch.cat([g.flatten() for g in grads[:2]]).norm()),
                float(move / torch.cat([q.flatten() for q in old]).norm()),
            )
        )
    model, x, y = small()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with hesse.watch(model, opt if given else None, every=1) as w:
        for _ in range(7):
            loop(model, opt, x, y, w)
    assert w.steps == 7 and [r["step"] for r in w.records] == [1, 2, 3, 4, 5, 6, 7]
    for record, (loss, grad, ratio) in zip(w.records, expected, strict=True):
        layer = record["layers"]["0"]
        if loop not in (plain, told_without_loss):
            assert record["loss"] == pytest.approx(loss, rel=1e-5)
        assert layer["grad_norm"] == pytest.approx(grad, rel=1e-4)
        assert layer["update_ratio"] == pytest.approx(ratio, rel=1e-3)
        assert layer["lr"] == 0.1
        assert record["rows"] == 16 or (loop is accumulated and record["step"] == 1)  # heard as four steps at first


def test_a_scaler_that_finds_infinities_makes_no_step() -> None:
    model, x, y = small()
    opt = torch.optim.SGD(model.parameters(), 1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    made = 0
    with hesse.watch(model, every=1) as w:
        for _ in range(20):
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            scaler.scale(100 * loss).backward()
            scaler.step(opt)
            made += int(all(bool(p.grad.isfinite().all()) for p in model.parameters()))
            scaler.update()
            w.step(loss=loss)
    assert 0 < made < 20
    assert w.steps == made and w.report().ok, str(w.report())


def test_two_optimizers_on_one_model_make_one_step() -> None:
    model, x, y = small()
    one, two = torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.Adam(model[2].parameters(), 0.01)
    with hesse.watch(model, every=1) as w:
        for _ in range(6):
            model.zero_grad()
            F.mse_loss(model(x), y).backward()
            one.step()
            two.step()
    assert w.steps == 6
    layers = w.records[-1]["layers"]
    assert layers["0"]["lr"] == 0.1 and layers["2"]["lr"] == 0.01
    assert layers["0"]["update_ratio"] > 0 and layers["2"]["update_ratio"] > 0


def test_steps_within_a_step_and_of_other_models_do_not_count() -> None:
    model, x, y = small()
    other = nn.Linear(1, 1)
    inner, foreign = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    line_search = hesse.optim.LineSearch(inner)

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # hooks fire for it and for that of the class above
            return super().step(closure)

    twice = Twice(model.parameters(), 0.01)
    with hesse.watch(model, every=1) as w:
        for _ in range(6):
            line_search.step(hesse.closure(model, F.mse_loss, (x, y)))
            other(torch.ones(1, 1)).sum().backward()
            foreign.step()
        for _ in range(3):
            plain(model, twice, x, y, w)
    assert w.steps == 9
    assert w.records[-1]["layers"]["0"]["update_ratio"] > 0


def test_an_exception_in_a_step_does_not_stop_the_count() -> None:
    model, x, y = small()
    opt = torch.optim.SGD(model.parameters(), 0.1)

    def fail() -> Tensor:
        raise ArithmeticError

    with hesse.watch(model, every=1) as w:
        for _ in range(3):
            with pytest.raises(ArithmeticError):
                opt.step(fail)
            plain(model, opt, x, y, w)
    assert w.steps == 3


def test_parts_are_heard_when_the_model_itself_is_not_called() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
            self.heads = nn.ModuleList([nn.Linear(8, 2)])

    torch.manual_seed(0)
    model = Two()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with hesse.watch(model, every=1) as w:
        for _ in range(6):
            opt.zero_grad()
            model.heads[0](model.encoder(torch.randn(4, 6))).square().sum().backward()
            opt.step()
    layers = w.records[-1]["layers"]
    assert layers["encoder.1"]["dead"] is not None and layers["heads.0"]["out_rms"] > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_wrapped_models_go_by_the_paths_of_the_model_inside() -> None:
    model, x, y = small()
    wrapped = nn.DataParallel(model)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with hesse.watch(wrapped, every=1) as w:
        plain(wrapped, opt, x, y, w)
    assert list(w.records[0]["layers"]) == ["0", "1", "2"]


def test_with_a_long_way_between_samples_a_young_net_is_still_looked_at_every_tenth_step() -> None:
    pace = Pace(50, torch.device("cpu"))
    assert [step for step in range(1, 301) if pace.due(step)] == [
        1,
        2,
        3,
        4,
        5,
        *range(10, 121, 10),
        150,
        200,
        250,
        300,
    ]


def test_without_every_the_cost_of_samples_sets_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("hesse.health.sampling.time.process_time", lambda: clock[0])
    pace = Pace(None, torch.device("cpu"))
    sampled = []
    for step in range(1, 3001):
        due = pace.due(step)
        clock[0] += 0.010 + (0.030 if due else 0.0)  # a sample costs three steps
        pace.ended(step, due)
        if due:
            clock[0] += 0.005  # and half a one to read
            pace.spent(0.005)
            sampled.append(step)
    assert sampled[:5] == [1, 2, 3, 4, 5] and sampled[5] <= 10
    assert pace.interval == math.ceil(0.035 / (SHARE * 0.010))
    late = [step for step in sampled if step > 500]
    assert {b - a for a, b in pairwise(late)} == {pace.interval}
    assert 0.035 * len(sampled) < 0.05 * 0.010 * 3000


def test_a_loss_out_of_the_ordinary_asks_for_a_sample() -> None:
    model, x, y = small()
    opt = torch.optim.SGD(model.parameters(), 0.0)
    with hesse.watch(model, guard=None) as w:
        w._observer.pace._cost = 1.0  # the early samples are over
        for step in range(1, 201):
            opt.zero_grad()
            F.mse_loss(model(x), y).backward()
            opt.step()
            w.step(loss=1.0 + 0.01 * (step % 3) + (step == 150))
            if step == 149:
                w._observer.pace._last = 100
                w._observer.pace._plain.extend([1.0] * 51)
                w._observer.pace._sampled.extend([4.0] * 5)  # an interval of a hundred steps
                w._observer.pace._chosen = None
    assert [r["step"] for r in w.records if 140 < r["step"] < 160] == [151]


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, list[int]] = {}
        self.texts: list[str] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert math.isfinite(value)
        self.scalars.setdefault(tag, []).append(step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append(text)


def test_a_writer_gets_the_numbers_of_each_layer_and_the_findings() -> None:
    torch.manual_seed(0)
    model, writer = mlp(10, nn.Sigmoid), Writer()
    opt = sgd(model)
    with hesse.watch(model, every=1, writer=writer, guard=None) as w:
        for _ in range(6):
            x, y = digits(32, torch.Generator().manual_seed(0))
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    assert writer.scalars["hesse/1/grad_norm"] == [1, 2, 3, 4, 5, 6]
    assert any("vanishing at 1" in text for text in writer.texts) and not w.report().ok


def test_findings_are_logged_once_and_not_without_a_guard(caplog: pytest.LogCaptureFixture) -> None:
    for guard, lines in (("warn", 1), (None, 0)):
        caplog.clear()
        torch.manual_seed(0)
        model = mlp(10, nn.Sigmoid)
        opt = sgd(model)
        with hesse.watch(model, every=1, guard=guard) as w:
            for _ in range(6):
                x, y = digits(32, torch.Generator().manual_seed(0))
                plain_step = F.cross_entropy(model(x), y)
                opt.zero_grad()
                plain_step.backward()
                opt.step()
        assert sum("vanishing at 1" in record.message for record in caplog.records) == lines
        assert "vanishing" in {f.kind for f in w.findings}


def test_losses_told_after_the_last_sample_are_judged_too() -> None:
    """A loss that has stopped falling is seen although no step was sampled since."""
    model, x, y = small()
    opt = torch.optim.SGD(model.parameters(), 1e-3)
    judged = []

    def rule(stats: Any) -> list[Any]:
        judged.append(len(stats.told))
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hesse.health.rules.RULES", (rule,))
        with hesse.watch(model, guard=None) as w:
            for _ in range(40):
                told_after(model, opt, x, y, w)
                w._observer.pace._cost, w._observer.pace._last = 1.0, w.steps  # no more samples
            assert len(w.records) == 5 and judged[-1] == 5
            w.report()
            assert judged[-1] == 40 and len(judged) == 6
            opt.zero_grad()
            w.step(loss=1.0)
            w.report()
            assert len(judged) == 6  # once


def test_an_unusual_loss_is_judged_at_once() -> None:
    model, x, y = small()
    opt = torch.optim.SGD(model.parameters(), 1e-3)
    judged = []

    def rule(stats: Any) -> list[Any]:
        judged.append(stats.told[-1])
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hesse.health.rules.RULES", (rule,))
        with hesse.watch(model, every=1000, guard=None) as w:
            for step in range(1, 41):
                plain(model, opt, x, y, w)
                w.step(loss=1.0 + 0.01 * (step % 3) + 10 * (step == 33))
    # The first five steps, every tenth, and the one that is unusual.
    assert [step for step, _ in judged] == [1, 2, 3, 4, 5, 10, 20, 30, 33, 40]
    assert judged[-2] == [33, pytest.approx(11.0)]
