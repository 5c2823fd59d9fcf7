"""The guard leaves out, stops or mends steps that would do harm, says so, and leaves healthy runs alone."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.finding import Finding
from hesse.health import TrainingStopped

Make = Callable[[nn.Module], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 1e-2),
    "adamw, not foreach": lambda m: torch.optim.AdamW(m.parameters(), 1e-2, foreach=False),
    "soap": lambda m: hesse.optim.SOAP(m.parameters(), 1e-2),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=2),
    "kfac": lambda m: hesse.optim.KFAC(m),
}
CLOSURES = {"lbfgs", "kfac"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def batches(steps: int, bad: dict[int, float]) -> list[tuple[Tensor, Tensor]]:
    """Batches of a linear problem; those at ``bad`` have an example multiplied by a number."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 2, generator=generator)
    out = []
    for step in range(1, steps + 1):
        x = torch.randn(32, 6, generator=generator)
        y = x @ weight
        if step in bad:
            y[3] = y[3] * bad[step]
        out.append((x, y))
    return out


def take(net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, closed: bool) -> Tensor:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        return loss

    if isinstance(opt, hesse.optim.KFAC):
        return opt.step(hesse.closure(net, F.mse_loss, (x, y)))
    if closed or isinstance(opt, torch.optim.LBFGS):
        return opt.step(closure)
    loss = closure()
    opt.step()
    return loss


def run(make: Make, guard: Any, bad: dict[int, float], steps: int = 60, closed: bool = False) -> Any:
    net = model()
    opt = make(net)
    with hesse.watch(net, every=10, guard=guard) as w:
        for x, y in batches(steps, bad):
            w.step(loss=take(net, opt, x, y, closed))
    return net, opt, w


def state(net: nn.Module, opt: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [p.detach().clone() for p in net.parameters()]
    for values in opt.state_dict()["state"].values():
        tensors += [copy.deepcopy(v) for v in values.values() if isinstance(v, Tensor)]
    return tensors


@pytest.mark.parametrize("closed", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6], ids=["nan", "inf", "far"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in CLOSURES])
def test_skip_leaves_weights_and_state_as_without_that_batch(name: str, bad: float, closed: bool) -> None:
    net, opt, w = run(OPTIMIZERS[name], "skip", {40: bad}, closed=closed)
    other = model()
    plain = OPTIMIZERS[name](other)
    for step, (x, y) in enumerate(batches(60, {}), 1):
        if step != 40:
            take(other, plain, x, y, closed)
    for a, b in zip(state(net, opt), state(other, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    [finding] = [f for f in w.report().findings if f.kind == "guard"]
    assert (finding.step, finding.severity) == (40, "info") and "left out" in finding.message


@pytest.mark.parametrize("name", sorted(CLOSURES))
def test_skip_takes_back_steps_with_a_closure(name: str) -> None:
    net, _, _ = run(OPTIMIZERS[name], "skip", {40: math.nan})
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    x, y = batches(1, {})[0]
    assert F.mse_loss(net(x), y) < 0.5 * F.mse_loss(model()(x), y)


def test_without_the_guard_the_run_is_lost() -> None:
    net, _, w = run(OPTIMIZERS["adamw"], "warn", {40: math.nan})
    assert not all(bool(p.isfinite().all()) for p in net.parameters())
    assert not w.report().ok and all(f.kind != "guard" for f in w.findings)


@pytest.mark.parametrize("closed", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lbfgs"])
def test_stop_raises_and_leaves_the_weights(name: str, closed: bool) -> None:
    net = model()
    opt = OPTIMIZERS[name](net)
    data = batches(30, {30: math.nan})
    with hesse.watch(net, every=10) as w:
        w.guard = "stop"  # at any time
        for x, y in data[:-1]:
            take(net, opt, x, y, closed or name == "lbfgs")
        before = state(net, opt)
        with pytest.raises(TrainingStopped, match="stopped before this step") as caught:
            take(net, opt, *data[-1], closed or name == "lbfgs")
        assert all(torch.equal(a, b) for a, b in zip(state(net, opt), before, strict=True))
        finding = caught.value.finding
        assert (finding.kind, finding.step) == ("guard", 30)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
        w.guard = "warn"
        take(net, opt, *data[0], closed or name == "lbfgs")  # and one may go on
    assert w.steps == 30 and finding in w.report().findings


@pytest.mark.parametrize("guard", ["skip", "stop", "repair"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "soap"])
def test_healthy_runs_are_left_alone(name: str, guard: Any) -> None:
    plain, _, _ = run(OPTIMIZERS[name], None, {}, 150)
    net, _, w = run(OPTIMIZERS[name], guard, {}, 150)
    assert [f for f in w.report().findings if f.kind == "guard"] == []
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_larger_gradients_for_good_are_accepted() -> None:
    _, _, w = run(OPTIMIZERS["adamw"], "skip", dict.fromkeys(range(40, 61), 1e5))
    messages = [f.message for f in w.report().findings if f.kind == "guard"]
    assert len(messages) == 5 and "steps are made again" in messages[-1]


def test_repair_clips_a_layer_to_its_own_history() -> None:
    net = model()
    opt = torch.optim.SGD(net.parameters(), 0.05)
    norms = []
    with hesse.watch(net, every=10, guard="repair") as w:
        for step, (x, y) in enumerate(batches(60, {}), 1):
            opt.zero_grad()
            F.mse_loss(net(x), y).backward()
            if step == 40:
                net[0].bias.grad.fill_(1e4)
            opt.step()
            norms.append(float(torch.cat([p.grad.flatten() for p in net[0].parameters()]).norm()))
    said = [f for f in w.report().findings if f.kind == "guard"]
    assert [(f.where, f.step) for f in said] == [("0", 40)] and "was clipped" in said[0].message
    assert norms[39] == pytest.approx(said[0].limit) and said[0].limit < 100 * max(norms[20:39])


def test_repair_goes_back_to_the_last_good_state() -> None:
    """Weights that were lost by an unwatched change come back, and the training succeeds."""
    net = model()
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    with hesse.watch(net, every=10, guard="repair") as w:
        for step, (x, y) in enumerate(batches(200, {}), 1):
            if step == 120:
                with torch.no_grad():
                    net[0].weight[0, 0] = math.nan
            w.step(loss=take(net, opt, x, y, False))
    said = [f for f in w.report().findings if f.kind == "guard"]
    assert any("are those of step" in f.message and 60 <= f.limit < 120 for f in said)
    x, y = batches(1, {})[0]
    assert F.mse_loss(net(x), y) < 0.1 * F.mse_loss(model()(x), y)


def test_repair_gives_up_in_words() -> None:
    net = model()
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    with hesse.watch(net, every=10, guard="repair") as w:
        for x, y in batches(60, dict.fromkeys(range(20, 61), math.nan)):
            w.step(loss=take(net, opt, x, y, False))
    assert w.guard == "warn"
    assert "only warns" in [f for f in w.findings if f.kind == "guard"][-1].message


def test_bad_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'repair'.*got 'mend'"):
        hesse.watch(model(), guard="mend")  # type: ignore[arg-type]


def test_findings_of_the_guard_are_information() -> None:
    _, _, w = run(OPTIMIZERS["adamw"], "skip", {40: 1e6})
    assert all(isinstance(f, Finding) and f.severity == "info" for f in w.findings if f.kind == "guard")
