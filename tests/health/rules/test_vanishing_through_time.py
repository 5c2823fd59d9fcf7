"""Gradients that die on the way to the first steps of time: a fault only where nothing is learnt."""

from __future__ import annotations

from typing import Any

import pytest

from health_runs.records import written
from hesse.health.rules import vanishing_through_time

DYING = [10.0 ** -(20 - i) for i in range(21)]
STUCK = [0.7 + 0.01 * (i % 5) for i in range(100)]
LEARNT = [0.7 / (1 + 0.1 * i) for i in range(100)]
BASELINE = [1.3 * 0.7**i + 0.167 + 0.001 * (i % 4) for i in range(100)]  # to a constant prediction, and no further


def test_a_recurrence_that_learns_nothing_is_named() -> None:
    [finding] = vanishing_through_time(written(times={"rnn": DYING}, told=STUCK))
    assert (finding.kind, finding.where, finding.limit) == ("vanishing_through_time", "rnn", 1e-4)
    assert finding.value == pytest.approx(1e-19)
    assert finding.evidence["profile"] == DYING and len(finding.evidence["values"]) == 6


def test_a_loss_that_fell_to_that_of_a_constant_prediction_is_not_progress() -> None:
    alike = {"8": {"spread": 0.01}}
    [finding] = vanishing_through_time(written(alike, times={"rnn": DYING}, told=BASELINE))
    assert finding.where == "rnn"
    assert vanishing_through_time(written(times={"rnn": DYING}, told=BASELINE)) == []  # its predictions differ


def test_one_sample_may_stray() -> None:
    times = {"rnn": lambda i: [1.0] * 21 if i == 7 else DYING}
    assert len(vanishing_through_time(written(times=times, told=STUCK))) == 1


HEALTHY: dict[str, dict[str, Any]] = {
    "a short memory is all it needs": {"times": {"rnn": DYING}, "told": LEARNT},
    "gradients that live": {"times": {"rnn": [1.0] * 20}, "told": STUCK},
    "gradients that fade a little": {"times": {"rnn": [1.3 ** -(19 - i) for i in range(20)]}, "told": STUCK},
    "truncated on purpose": {"times": {"rnn": [0.0] * 15 + [1.0] * 6}, "told": STUCK},
    "too few losses": {"times": {"rnn": DYING}, "told": STUCK[:30]},
    "too few samples": {"times": {"rnn": DYING}, "told": STUCK, "samples": 5},
    "short sequences": {"times": {"rnn": [1e-9, 1e-6, 1e-3, 1.0]}, "told": STUCK},
    "dying in some samples": {"times": {"rnn": lambda i: DYING if i % 3 else [1.0] * 20}, "told": STUCK},
    "opening": {"times": {"rnn": lambda i: [10.0 ** -(14 - i) for _ in range(12)] + [1.0] * 12}, "told": STUCK},
    "not a recurrent net": {"told": STUCK},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_recurrences(name: str) -> None:
    assert vanishing_through_time(written(**HEALTHY[name])) == []
