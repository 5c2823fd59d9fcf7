"""The edge of stability, known from quadratics in closed form."""

from __future__ import annotations

import pytest
import torch

import hesse
from health_runs.made import made
from hesse.health.rules.curvature import curvature as rule


def test_turns_near_minus_one_with_a_falling_loss_are_information() -> None:
    [finding] = rule(made(turn=-1.02))
    assert (finding.kind, finding.where, finding.severity) == ("curvature", "optimizer", "info")
    assert finding.value == pytest.approx(-1.02) and finding.limit == -1.0


def test_with_a_loss_that_rises_or_goes_up_and_down_a_warning() -> None:
    assert rule(made(turn=-1.02, loss=lambda i: 1.0 + 0.01 * i))[0].severity == "warning"
    assert rule(made(turn=-1.02, loss=lambda i: 1.0 - 0.001 * i + 0.2 * (i % 2)))[0].severity == "warning"


@pytest.mark.parametrize("turn", [1.0, 0.5, -0.6, -8.0, None])
def test_elsewhere_nothing(turn: float | None) -> None:
    assert rule(made(turn=turn)) == []


def test_one_reversed_slope_among_others_is_nothing() -> None:
    assert rule(made(turn=lambda i: -1.0 if i % 3 else 0.5)) == []


@pytest.mark.parametrize(("lr", "said"), [(0.0985, True), (0.05, False)])
def test_a_quadratic_whose_largest_curvature_is_twenty(lr: float, said: bool) -> None:
    """The slope along the step turns by 1 - 20 lr: -0.97 and 0."""
    model = torch.nn.Linear(2, 1, bias=False)
    scale = torch.tensor([20.0, 0.02])
    optimizer = torch.optim.SGD(model.parameters(), lr)
    with hesse.watch(model, optimizer, every=5, guard=None) as w:
        for _ in range(60):
            optimizer.zero_grad()
            loss = 0.5 * (scale * model.weight**2).sum() + 0.0 * model(torch.ones(1, 2)).sum()
            loss.backward()
            optimizer.step()
            w.step(loss=loss)
    assert [f.kind for f in w.report().findings if f.kind == "curvature"] == ["curvature"] * said
