"""The doctor names what is wrong first, puts consequences below it, and leaves no trace."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.doctor import Diagnosis, diagnose
from hesse.doctor.diagnosis import Course, Sharpness
from hesse.doctor.glance import stable, too_sharp
from hesse.doctor.order import BRINGS, GRAVITY, arrange
from hesse.finding import Finding, InputError

Batch = tuple[Tensor, Tensor]


def batches(count: int = 6) -> list[Batch]:
    """Three classes that a line tells apart."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(count, 32, 8, generator=generator)
    return [(x, x[:, :3].argmax(1)) for x in points]


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *layers, nn.Linear(16, 3))


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * x


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Halved.apply(x)  # type: ignore[no-any-return]


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).detach()


def sigmoids(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return net(*(m for _ in range(count) for m in (nn.Sigmoid(), nn.Linear(16, 16))))


def finding(kind: str, where: str = "", step: int | None = None, severity: Any = "warning") -> Finding:
    return Finding(kind, where, f"{kind} was seen.", "Mend it.", severity, step=step)


# ---------------------------------------------------------------------------------------------------- visits


def test_a_healthy_model_is_well() -> None:
    diagnosis = diagnose(net(nn.Tanh()), F.cross_entropy, batches(), steps=60)
    assert diagnosis.ok and not [f for f in diagnosis.findings if f.severity != "info"], str(diagnosis)
    assert "nothing found" in str(diagnosis)
    assert diagnosis.course is not None and diagnosis.course.steps == 60
    assert diagnosis.course.losses[-1] < diagnosis.course.losses[0]
    assert [look.when for look in diagnosis.sharpness] == ["at first", "after training"]


def test_a_wrong_derivative_comes_first_and_ends_the_look_at_curvature() -> None:
    diagnosis = diagnose(net(Square()), F.cross_entropy, batches(), steps=10)
    first = diagnosis.findings[0]
    assert (first.where, first.function, first.severity) == ("1", "Halved", "error")
    assert not diagnosis.ok and diagnosis.sharpness == []
    assert any("curvature was not looked at" in note for note in diagnosis.notes)
    assert str(diagnosis).splitlines()[2].startswith(f"1. {first.kind} at 1, Halved (")


def test_layers_that_get_nothing_stand_under_the_line_that_cuts_them_off() -> None:
    diagnosis = diagnose(net(Cut()), F.cross_entropy, batches(), steps=40)
    (entry,) = [entry for entry in diagnosis.entries if entry.finding.severity != "info"]
    assert (entry.finding.kind, entry.finding.where) == ("detached", "1")
    assert entry.finding.file == __file__
    assert ("no_gradient", "0") in [(f.kind, f.where) for f in entry.consequences]


def test_a_gradient_that_vanishes_is_found_by_the_short_training() -> None:
    diagnosis = diagnose(sigmoids(10), F.cross_entropy, batches(), steps=40)
    assert diagnosis.findings[0].kind == "vanishing", str(diagnosis)
    assert diagnosis.checks[0].ok


def test_a_step_that_is_too_long_is_told_by_the_curvature_before_it_is_made() -> None:
    model = net(nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0)
    diagnosis = diagnose(model, F.cross_entropy, batches(), optimizer, steps=30)
    assert diagnosis.sharpness[0].largest[0] > diagnosis.sharpness[0].stable == 2 / 50.0
    assert diagnosis.findings[0].kind == "curvature" and diagnosis.findings[0].step == 1, str(diagnosis)


def test_the_largest_eigenvalue_is_that_of_the_dense_hessian() -> None:
    model = nn.Linear(4, 1)
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(20, 1)
    (first, _) = diagnose(model, F.mse_loss, [(x, y)], steps=5).sharpness
    design = torch.cat([x, torch.ones(20, 1)], 1)
    exact = torch.linalg.eigvalsh(2 * design.T @ design / 20).flip(0)
    torch.testing.assert_close(torch.tensor(first.largest), exact[:3], rtol=1e-3, atol=1e-4)
    assert first.trace is not None and first.error is not None
    assert abs(first.trace - float(exact.sum())) <= max(4 * first.error, 1e-3 * float(exact.sum()))


def test_everything_is_put_back() -> None:
    model = net(nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU())
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    F.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    optimizer.step()
    state, adam = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    grads = {name: p.grad for name, p in model.named_parameters()}
    values = {name: grad.clone() for name, grad in grads.items() if grad is not None}
    random = torch.get_rng_state()
    diagnose(model, F.cross_entropy, batches(), optimizer, steps=12)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, p in model.named_parameters():
        assert p.grad is grads[name] and torch.equal(p.grad, values[name]), name
    after = optimizer.state_dict()
    assert after["param_groups"] == adam["param_groups"]
    for index, moments in after["state"].items():
        assert all(torch.equal(value, adam["state"][index][key]) for key, value in moments.items())
    assert torch.equal(torch.get_rng_state(), random)


def test_everything_is_put_back_when_a_batch_is_broken() -> None:
    model = net(nn.ReLU())
    before = copy.deepcopy(model.state_dict())

    def data() -> Iterator[Batch]:
        yield from batches(3)
        yield torch.zeros(4, 7), torch.zeros(4, dtype=torch.long)

    with pytest.raises(RuntimeError, match="shapes"):
        diagnose(model, F.cross_entropy, data())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_whose_output_is_the_loss() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(nn.Tanh())

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.net(x), y)

    diagnosis = diagnose(Loss(), None, batches(), steps=8)
    assert diagnosis.ok and diagnosis.course is not None and diagnosis.course.steps == 8


def test_a_generator_of_batches_is_used_once_and_a_list_again() -> None:
    counts = []
    for data in (batches(4), iter(batches(4))):
        course = diagnose(net(nn.Tanh()), F.cross_entropy, data, steps=9).course
        assert course is not None
        counts.append(course.steps)
    assert counts == [9, 4]


def test_a_loss_that_is_lost_ends_the_training() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(x - x.detach().mean() - 1e9)

    diagnosis = diagnose(net(Root()), F.cross_entropy, batches(), steps=50)
    assert diagnosis.course is not None and diagnosis.course.steps == 3 and not diagnosis.course.finite
    assert diagnosis.findings[0].kind == "non_finite"
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_an_optimiser_that_evaluates_the_closure_itself() -> None:
    model = net(nn.Tanh())
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    diagnosis = diagnose(model, F.cross_entropy, batches(1), optimizer, steps=4)
    assert diagnosis.course is not None and diagnosis.course.optimizer == "LBFGS"
    assert diagnosis.course.losses[-1] < 0.8 * diagnosis.course.losses[0]


@pytest.mark.parametrize(
    ("model", "data", "options", "says"),
    [
        (torch.exp, batches(1), {}, "torch.nn.Module"),
        (net(), [], {}, "holds no batch"),
        (net(), [torch.zeros(4, 8)], {}, "not (inputs, targets)"),
        (net(), batches(1), {"steps": 0}, "at least one step"),
        (net(), batches(1), {"seconds": math.nan}, "some time"),
    ],
    ids=["function", "no batch", "no pair", "no step", "no time"],
)
def test_what_cannot_be_examined_is_refused(model: Any, data: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as refused:
        diagnose(model, F.cross_entropy, data, **options)
    assert says in str(refused.value)


# ---------------------------------------------------------------------------------------------------- order


def test_findings_come_in_the_order_of_gravity() -> None:
    kinds = ["plateau", "dead_units", "no_gradient", "symmetry", "non_finite"]
    checked = [finding("wrong_sign", "3", severity="error")]
    watched = [finding(kind, f"{i}.inner", step=5) for i, kind in enumerate(kinds)]
    found = arrange(checked, watched, ["3"])
    told = [f.kind for entry in found for f in (entry.finding, *entry.consequences)]
    assert told[0] == "wrong_sign" and sorted(told) == sorted([*kinds, "wrong_sign"])
    alone = [entry.finding.kind for entry in arrange([], watched[1:4], ["1", "2", "3"])]
    assert alone == ["no_gradient", "symmetry", "dead_units"]


@pytest.mark.parametrize(
    ("cause", "effect", "below"),
    [
        (finding("saturation", "3", 5), finding("vanishing", "1", 5), True),
        (finding("saturation", "3", 5), finding("vanishing", "6", 5), False),
        (finding("saturation", "3", 9), finding("vanishing", "1", 5), False),
        (finding("learning_rate_too_large", "optimizer", 4), finding("non_finite", "2", 8), True),
        (finding("non_finite", "2", 4), finding("learning_rate_too_large", "optimizer", 8), True),
        (finding("symmetry", "1", 1), finding("dead_units", "1", 8), False),
        (finding("dead_units", "3", 20), finding("plateau", "loss", 30, "info"), True),
    ],
    ids=["behind", "in front", "too early", "lost by steps", "after the loss", "unrelated", "a note"],
)
def test_a_consequence_comes_later_and_lies_behind_its_cause(cause: Finding, effect: Finding, below: bool) -> None:
    entries = arrange([], [effect, cause], [str(i) for i in range(8)])
    under = [f for entry in entries if entry.finding is cause for f in entry.consequences]
    assert under == ([effect] if below else [])
    assert len(entries) == (1 if below else 2)


def test_a_chain_of_reasons_ends_at_its_root_and_loses_nothing() -> None:
    modules = [str(i) for i in range(9)]
    chain = [finding("bad_init", "7", 1), finding("saturation", "6", 3), finding("vanishing", "2", 5)]
    chain += [finding("plateau", "loss", 60)]
    (entry,) = arrange([], reversed(chain), modules)
    assert entry.finding is chain[0]
    assert {f.kind for f in entry.consequences} == {"saturation", "vanishing", "plateau"}


def test_every_finding_is_told_once_whatever_their_kinds() -> None:
    watched = [finding(kind, str(i % 7), i % 5) for kind in GRAVITY for i in range(6)]
    for checked in ([], [finding("detached", "4", severity="error")]):
        entries = arrange(checked, watched, [str(i) for i in range(7)])
        told = [f for entry in entries for f in (entry.finding, *entry.consequences)]
        assert sorted(map(id, told)) == sorted(map(id, [*checked, *watched]))


def test_the_table_of_reasons_speaks_of_known_kinds() -> None:
    assert {effect for effects in BRINGS.values() for effect in effects} <= {*GRAVITY}
    assert set(BRINGS) - {"derivative"} <= {*GRAVITY}


# ---------------------------------------------------------------------------------------------------- curvature


def oscillation(curvature: float, lr: float, **options: Any) -> bool:
    """Whether gradient descent on ``curvature x^2 / 2`` grows."""
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=lr, **options)
    for _ in range(4000):
        optimizer.zero_grad()
        (curvature * x * x / 2).sum().backward()
        optimizer.step()
    return not float(x.detach().abs()) < 1


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=["plain", "momentum", "nesterov"]
)
def test_the_limit_is_where_descent_on_a_parabola_begins_to_grow(options: dict[str, Any]) -> None:
    limit = stable(torch.optim.SGD([torch.zeros(1)], lr=0.1, **options))
    assert limit is not None
    assert not oscillation(0.98 * limit, 0.1, **options) and oscillation(1.02 * limit, 0.1, **options)


def test_there_is_no_limit_for_optimisers_that_scale_by_themselves() -> None:
    p = [torch.zeros(1)]
    assert stable(torch.optim.Adam(p)) is None and stable(torch.optim.SGD(p, lr=0.0)) is None
    assert stable(torch.optim.SGD(p, lr=0.1, momentum=0.5, dampening=0.5)) is None
    assert stable(torch.optim.SGD([{"params": p, "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 0.2}])) is None


@pytest.mark.parametrize(
    ("losses", "severity"),
    [([1.0, 0.9, 0.8, 0.6], "info"), ([1.0, 1.5, 1.2, 1.1], "warning"), ([1.0, math.inf], "warning")],
    ids=["fell", "rose", "lost"],
)
def test_sharpness_above_the_limit_is_a_fault_only_where_the_loss_did_not_fall(
    losses: list[float], severity: str
) -> None:
    course = Course("SGD", 0.1, len(losses), 1.0, losses)
    look = Sharpness("at first", [30.0], 40.0, 1.0, 20.0, 12)
    (found,) = too_sharp([look], course)
    assert (found.severity, found.value, found.limit) == (severity, 30.0, 20.0)
    assert too_sharp([Sharpness("at first", [19.0], 40.0, 1.0, 20.0, 12)], course) == []
    assert too_sharp([Sharpness("at first", [30.0], 40.0, 1.0, None, 12)], course) == []


def test_its_words_and_its_json(tmp_path: Path) -> None:
    diagnosis = diagnose(net(nn.Tanh()), F.cross_entropy, batches(), steps=6)
    record = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert record["ok"] is diagnosis.ok and record["subject"] == "Sequential"
    assert [line in str(diagnosis) for line in record["done"]] == [True] * 4
    assert isinstance(diagnosis, Diagnosis)
