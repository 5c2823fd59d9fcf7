"""Jumps of the loss: of one batch, of the weights, and those that are its usual scatter."""

from __future__ import annotations

import pytest
import torch

from health_runs.made import made
from hesse.health.rules.loss_spike import loss_spike as rule
from hesse.health.stats import Stats


def losses(n: int = 60, seed: int = 0) -> list[float]:
    """From 2 down to 1 with a scatter of 0.05."""
    scatter = 0.05 * torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return (1 + torch.exp(-torch.arange(n) / 10) + scatter).tolist()


def run(values: list[float], **numbers: object) -> Stats:
    return made(count=len(values) // 10, first=10, told=values, loss=lambda i: values[10 * i + 9], **numbers)


def judged(values: list[float], **numbers: object) -> list[object]:
    """What is said in the course of the run."""
    said = []
    for n in range(20, len(values) + 1, 10):
        said += rule(run(values[:n], **numbers))
    return said


def test_one_batch() -> None:
    values = losses()
    values[39] = 9.0
    [finding] = judged(values, last_grad_norm=lambda i: 20.0 if i == 3 else 1.0)
    assert (finding.kind, finding.where, finding.step, finding.severity) == ("loss_spike", "loss", 40, "warning")
    assert finding.value == 9.0 and finding.evidence["returned"] is True
    assert "one batch" in finding.message and "last was 20 times" in finding.message


def test_what_is_beyond_all_measure_is_told_at_once() -> None:
    values = [*losses(39), 1e6]
    [finding] = judged(values)
    assert finding.step == 40 and finding.evidence["returned"] is None and finding.severity == "warning"
    assert [f.step for f in judged([*values, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])] == [40]


def test_weights_thrown_off() -> None:
    values = [x if i < 40 else x + 6 for i, x in enumerate(losses())]
    found = judged(values)
    assert found[0].step == 41 and not found[0].evidence["returned"] and "checkpoint" in found[0].remedy


def test_one_hard_batch_below_twice_the_start_is_none() -> None:
    values = losses(120)
    values[100] = 2.9
    assert judged(values) == []
    values[101:112] = [2.9] * 11
    assert [f.step for f in judged(values)] == [101]  # but it must come back


def test_a_smooth_curve_that_jumps_and_returns_is_no_batch() -> None:
    values = [1 + 0.9**i for i in range(60)]
    values[40] = 5.0
    [finding] = judged(values)
    assert finding.severity == "info" and "edge of stability" in finding.message


@pytest.mark.parametrize("seed", range(5))
def test_scatter_is_no_spike(seed: int) -> None:
    assert judged(losses(200, seed)) == []


@pytest.mark.parametrize("seed", range(5))
def test_heavy_tails_are_no_spikes(seed: int) -> None:
    tails = torch.empty(400).log_normal_(0.0, 0.7, generator=torch.Generator().manual_seed(seed))
    assert [f for f in judged(tails.tolist()) if f.severity != "info"] == []


def test_a_tiny_jump_of_a_converged_loss_is_none() -> None:
    values = [2 * 0.5**i + 1e-7 for i in range(120)]
    values[80:] = [1e-2] * 40
    assert judged(values) == []


def test_a_run_that_is_lost_has_no_spikes() -> None:
    values = [5.0 + 0.1 * (i % 3) if i > 3 else 1.0 for i in range(60)]
    values[40] = 500.0
    assert judged(values) == []
