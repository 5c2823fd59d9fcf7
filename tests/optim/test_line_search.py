"""The line search: its steps satisfy Armijo's condition, its rules are the paper's, the rest is as without it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.optim.adahessian import AdaHessian
from hesse.optim.line_search import LineSearch
from hesse.optim.sophia import SophiaG
from problems import PROBLEMS, Problem, as_double, mlp, problem
from tolerances import ALGEBRA

INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=10.0),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.01),
    "AdaHessian": lambda params: AdaHessian(params, lr=1.0, every=2),
    "SophiaG": lambda params: SophiaG(params, lr=0.1, every=2),
}


def closure_of(p: Problem) -> hesse.Closure:
    return hesse.closure(p.model, p.loss_fn, p.batch)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def loss_at(p: Problem, params: dict[str, Tensor]) -> float:
    """The loss there, random layers as they are at the seed 0."""
    x, y = p.batch
    torch.manual_seed(0)
    with torch.no_grad():
        return float(p.loss_fn(torch.func.functional_call(copy.deepcopy(p.model), params, (x,)), y))


def penalised(p: Problem, decay: float, params: dict[str, Tensor]) -> float:
    names = [n for n, _ in p.model.named_parameters()]
    return loss_at(p, params) + decay / 2 * sum(float(params[n].detach().square().sum()) for n in names)


@pytest.mark.parametrize("name", INNER)
def test_each_step_goes_down_enough_and_the_one_before_did_not(name: str) -> None:
    p = as_double(problem("mlp, cross-entropy"))
    optimizer = LineSearch(INNER[name](p.model.parameters()), c=0.3, beta=0.6, reset=0)
    searched = 0
    for _ in range(10):
        old, guess = snapshot(p.model), optimizer.param_groups[0]["step_size"]
        value = float(optimizer.step(closure_of(p)))
        decay = optimizer.param_groups[0].get("weight_decay", 0.0)
        t = optimizer.param_groups[0]["step_size"]
        step = {n: q.detach() - old[n] for n, q in p.model.named_parameters()}
        slope = sum(float(((q.grad + decay * old[n]) * step[n]).sum()) for n, q in p.model.named_parameters())

        merit = functools.partial(penalised, p, decay)
        before = merit(old)
        assert slope < 0
        assert loss_at(p, old) == pytest.approx(value, rel=1e-12)
        assert merit({n: old[n] + step[n] for n in step}) <= before + 0.3 * slope + 1e-12
        trials = math.log(t / guess) / math.log(0.6)
        assert trials == pytest.approx(round(trials), abs=1e-6)
        if t < guess * 0.99:
            searched += 1
            longer = {n: old[n] + step[n] / 0.6 for n in step}
            assert merit(longer) > before + 0.3 * slope / 0.6
    assert searched or name != "SGD"


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("model", ["mlp, squared error", "convnet, BatchNorm", "text", "transformer"])
def test_the_loss_of_the_batch_never_rises(name: str, model: str) -> None:
    p = problem(model)
    torch.manual_seed(0)
    optimizer = LineSearch(INNER[name](p.model.parameters()))
    losses = []
    for _ in range(12):
        closure = closure_of(p)
        losses.append(float(optimizer.step(closure)))
        after = float(
            closure.objective(dict(p.model.named_parameters())).detach()
        )  # with the random numbers of the step
        assert after <= losses[-1] or name == "AdamW"  # whose decay is part of what is searched
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_trains_every_kind_of_model(name: str) -> None:
    p = problem(name)
    torch.manual_seed(0)
    optimizer = LineSearch(torch.optim.SGD(p.model.parameters(), lr=4.0))
    losses = [float(optimizer.step(closure_of(p))) for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_three_rules_of_reset() -> None:
    """On c w^2 / 2 a step of gradient descent is long enough up to 2 (1 - 0.1) / c, whatever w is."""

    def found(reset: int, curvatures: list[float]) -> list[float]:
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(model.weight)
        optimizer = LineSearch(
            torch.optim.SGD(model.parameters(), lr=1.0), beta=0.5, reset=reset, gamma=4.0, batches=2, initial=8.0
        )
        sizes = []
        for curvature in curvatures:
            with torch.no_grad():
                model.weight.fill_(1.0)
            batch = (torch.ones(1, 1).double(), curvature / 2)
            optimizer.step(hesse.closure(model, lambda outputs, c: c * outputs.square().sum(), batch))
            sizes.append(optimizer.param_groups[0]["step_size"])
        return sizes

    # 1.8 / c: 1.8, 0.18, 1.8, 1.8
    assert found(0, [1.0, 10.0, 1.0, 1.0]) == [1.0, 0.125, 0.125, 0.125]
    assert found(1, [1.0, 10.0, 1.0, 1.0]) == [1.0, 0.125, 1.0, 1.0]
    assert found(2, [1.0, 10.0, 1.0, 1.0]) == [1.0, 0.125, 0.25, 0.5]


@pytest.mark.parametrize("make", [torch.optim.Adam, AdaHessian])
def test_an_accepted_first_trial_is_the_inner_optimisers_step(make: Callable[..., torch.optim.Optimizer]) -> None:
    p, other = as_double(problem("mlp, cross-entropy")), as_double(problem("mlp, cross-entropy"))
    optimizer = LineSearch(make(p.model.parameters(), lr=1e-3), reset=1)
    plain = make(other.model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.step(closure_of(p))
        plain.step(closure_of(other))
        assert optimizer.param_groups[0]["step_size"] == 1.0
    for q, r in zip(p.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(q, r, **ALGEBRA)


def plain_closure(p: Problem, optimizer: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)  # in place: what is put away must not be emptied
        x, y = p.batch
        loss = p.loss_fn(p.model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("name", ["mlp, cross-entropy", "transformer"])
def test_a_plain_closure_gives_the_same_steps_with_the_same_random_numbers_and_its_gradients_kept(name: str) -> None:
    p, other = problem(name), problem(name)
    one, two = (LineSearch(torch.optim.SGD(q.model.parameters(), lr=1.0), beta=0.5) for q in (p, other))
    for seed in range(4):
        torch.manual_seed(seed)
        one.step(closure_of(p))
        random = torch.get_rng_state()
        torch.manual_seed(seed)
        two.step(plain_closure(other, two))
        assert torch.equal(random, torch.get_rng_state())
        for q, r in zip(p.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, r.grad, rtol=1e-4, atol=1e-6)
    assert one.param_groups[0]["step_size"] == two.param_groups[0]["step_size"]
    for q, r in zip(p.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(q, r, rtol=1e-4, atol=1e-6)


def test_trials_leave_buffers_and_modes_alone() -> None:
    p, other = problem("convnet, BatchNorm"), problem("convnet, BatchNorm")
    optimizer = LineSearch(torch.optim.SGD(p.model.parameters(), lr=1000.0), beta=0.5)
    optimizer.step(closure_of(p))
    assert optimizer.param_groups[0]["step_size"] < 1
    closure_of(other)()  # once
    for b, c in zip(p.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(b, c)


class Uphill(torch.optim.SGD):
    """An optimiser whose step goes up."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = -abs(group["lr"])
        return super().step(closure)


def test_where_the_step_goes_uphill_the_search_goes_down_the_gradient_as_far() -> None:
    p = as_double(problem("mlp, squared error"))
    optimizer = LineSearch(Uphill(p.model.parameters(), lr=0.01))
    old = snapshot(p.model)
    value = float(optimizer.step(closure_of(p)))
    t = optimizer.param_groups[0]["step_size"]
    assert loss_at(p, dict(p.model.named_parameters())) < value
    for n, q in p.model.named_parameters():
        torch.testing.assert_close(q.detach() - old[n], -0.01 * t * q.grad, **ALGEBRA)


class Wall(nn.Module):
    """A linear layer whose loss is ``high`` as soon as its weight leaves where it began."""

    def __init__(self, high: float) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.start, self.high = self.layer.weight.detach().clone(), high

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layer(x)
        return outputs if torch.equal(self.layer.weight, self.start) else outputs + self.high


@pytest.mark.parametrize("high", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("plain", [False, True])
def test_where_no_step_goes_down_nothing_moves_and_it_is_counted(high: float, plain: bool) -> None:
    torch.manual_seed(0)
    p = Problem(Wall(high), F.mse_loss, (torch.randn(8, 3), torch.randn(8, 1)))
    optimizer = LineSearch(torch.optim.SGD(p.model.parameters(), lr=1.0))
    before = snapshot(p.model)
    optimizer.step(plain_closure(p, optimizer) if plain else closure_of(p))
    assert same(before, snapshot(p.model))
    assert optimizer.param_groups[0]["rejections"] == 1
    assert optimizer.param_groups[0]["step_size"] == 1.0


@pytest.mark.parametrize("name", INNER)
def test_a_nan_batch_leaves_parameters_and_state_and_is_counted_once(name: str) -> None:
    p = problem("mlp, squared error")
    optimizer = LineSearch(INNER[name](p.model.parameters()))
    optimizer.step(closure_of(p))
    before, state = snapshot(p.model), copy.deepcopy(optimizer.state_dict())
    x, y = p.batch
    loss = optimizer.step(hesse.closure(p.model, p.loss_fn, (x * math.nan, y)))
    assert math.isnan(float(loss))
    assert same(before, snapshot(p.model))
    after = optimizer.state_dict()
    assert after["param_groups"][0]["rejections"] == state["param_groups"][0]["rejections"] + 1
    for number, values in state["state"].items():
        assert all(v is None or torch.equal(v, after["state"][number][key]) for key, v in values.items())


def test_groups_and_state_are_those_of_the_inner_optimiser() -> None:
    p = problem("mlp, cross-entropy")
    inner = torch.optim.SGD(p.model[0].parameters(), lr=1.0, momentum=0.9)
    optimizer = LineSearch(inner)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.add_param_group({"params": list(p.model[2].parameters()), "lr": 0.25})
    assert optimizer.param_groups is inner.param_groups
    assert inner.param_groups[1]["momentum"] == 0.9
    optimizer.step(closure_of(p))
    scheduler.base_lrs.append(0.25)
    scheduler.step()
    assert [group["lr"] for group in inner.param_groups] == [0.5, 0.125]
    assert optimizer.state is inner.state
    assert {group["step_size"] for group in inner.param_groups} == {optimizer.param_groups[0]["step_size"]}
    saved = optimizer.state_dict()
    again = LineSearch(
        torch.optim.SGD([{"params": p.model[0].parameters()}, {"params": p.model[2].parameters()}], lr=9.0)
    )
    again.load_state_dict(saved)
    assert [group["lr"] for group in again.optimizer.param_groups] == [0.5, 0.125]
    assert again.param_groups is again.optimizer.param_groups
    for q in p.model.parameters():
        assert torch.equal(again.optimizer.state[q]["momentum_buffer"], inner.state[q]["momentum_buffer"])
    twin = copy.deepcopy(optimizer)
    assert twin.optimizer is not inner
    assert twin.param_groups is twin.optimizer.param_groups


def test_maximize_climbs() -> None:
    p = problem("mlp, cross-entropy")
    optimizer = LineSearch(torch.optim.SGD(p.model.parameters(), lr=0.1, maximize=True))
    losses = [float(optimizer.step(closure_of(p))) for _ in range(5)]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]


def test_without_a_closure_it_says_what_it_needs_and_without_gradients_it_does_nothing() -> None:
    model = mlp()
    optimizer = LineSearch(torch.optim.Adam(model.parameters(), lr=0.1))
    before = snapshot(model)
    assert optimizer.step() is None
    assert not optimizer.state
    for q in model.parameters():
        q.grad = torch.zeros_like(q)
    assert optimizer.step() is None
    assert same(before, snapshot(model))
    assert len(optimizer.state) == 4
    model(torch.randn(4, 5)).sum().backward()
    with pytest.raises(TypeError, match=r"needs a closure.*hesse.closure"):
        optimizer.step()
    with pytest.raises(TypeError, match="has to return the loss"):
        optimizer.step(lambda: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"c": 0.0}, "Invalid c"),
        ({"c": 1.0}, "Invalid c"),
        ({"beta": 1.0}, "Invalid beta"),
        ({"initial": 0.0}, "Invalid initial"),
        ({"gamma": 0.5}, "Invalid initial"),
        ({"batches": 0}, "Invalid initial"),
        ({"reset": 3}, "Invalid reset"),
    ],
)
def test_a_setting_out_of_range_is_named_and_the_inner_optimiser_is_whole(
    settings: dict[str, Any], message: str
) -> None:
    inner = torch.optim.SGD(mlp().parameters(), lr=1.0)
    with pytest.raises(ValueError, match=message):
        LineSearch(inner, **settings)
    assert len(inner.param_groups[0]["params"]) == 4


def test_what_is_no_optimiser_is_named() -> None:
    with pytest.raises(TypeError, match=r"goes around an optimiser; got generator"):
        LineSearch(mlp().parameters())  # type: ignore[arg-type]


def test_trials_of_a_plain_closure_draw_the_numbers_of_the_first_call() -> None:
    w, drawn = nn.Parameter(torch.ones(3)), list[float]()
    optimizer = LineSearch(torch.optim.SGD([w], lr=1.0), beta=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        noise = torch.rand(())
        drawn.append(float(noise))
        loss = 50 * w.square().sum() + noise
        loss.backward()
        return loss

    torch.manual_seed(0)
    torch.rand(())
    after_one_draw = torch.get_rng_state()
    torch.manual_seed(0)
    optimizer.step(closure)
    assert len(drawn) > 5
    assert len(set(drawn)) == 1
    assert torch.equal(torch.get_rng_state(), after_one_draw)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * (self.w * x).sum()


PENALTIES: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], float]] = {
    "3 / 2 w^2": (lambda params: torch.optim.SGD(params, lr=1 / 3, weight_decay=3.0), 0.0),
    "|w| / 2": (lambda params: AdaHessian(params, lr=1.0, l1=0.5), 0.5),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_of_the_groups_are_part_of_what_is_searched(name: str) -> None:
    """Where the loss is flat, the penalty alone says that the inner optimiser's step goes down enough."""
    make, expected = PENALTIES[name]
    model = Flat()
    optimizer = LineSearch(make(model.parameters()), c=0.4)
    optimizer.step(hesse.closure(model, lambda outputs, _: outputs, (torch.ones(1), None)))
    assert optimizer.param_groups[0]["step_size"] == 1.0
    assert optimizer.param_groups[0]["rejections"] == 0
    torch.testing.assert_close(model.w.detach(), torch.tensor([expected]))


def test_trials_of_a_plain_closure_under_autocast_see_the_weights_as_they_are() -> None:
    p = problem("mlp, cross-entropy")
    optimizer = LineSearch(torch.optim.SGD(p.model.parameters(), lr=1.0))
    with torch.autocast("cpu", torch.bfloat16):  # which keeps its copies of the weights until it is left
        optimizer.step(plain_closure(p, optimizer))
    assert optimizer.param_groups[0]["rejections"] == 0
