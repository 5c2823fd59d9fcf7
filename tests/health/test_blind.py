"""The blind corpus: what ``hesse.watch`` makes of trainings that it was not developed on."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

import hesse
from blind.runs import Run, alarms, judged, tail, trained
from blind.trainings import HEALTHY, SICK

watch = partial(hesse.watch, every=10)  # every=None goes by the clock

# What is not right yet, by training and aspect, and what is said instead. Strict: a line that has become right goes.
MISSES: dict[str, dict[str, Any]] = {
    # Said at step 15 as curvature, but as information: the loss keeps falling, and the case wanted an alarm.
    "edge_of_stability": {"found": "nothing"},
}


@pytest.mark.parametrize("run", SICK, ids=lambda run: run.name)
def test_a_pathology_is_named_at_its_place_and_in_time(run: Run) -> None:
    monitor, _ = trained(run, watch)
    assert judged(run, monitor) == MISSES.get(run.name, {}), str(monitor.report())


@pytest.mark.parametrize("run", SICK, ids=lambda run: run.name)
def test_the_cure_works_and_the_cured_training_is_left_in_peace(run: Run) -> None:
    monitor, losses = trained(run, watch, cured=True)
    assert tail(losses) < run.goal
    assert alarms(monitor) == [], str(monitor.report())


@pytest.mark.parametrize("run", HEALTHY, ids=lambda run: run.name)
def test_a_healthy_training_is_left_in_peace(run: Run) -> None:
    monitor, losses = trained(run, watch)
    assert tail(losses) < run.goal
    assert alarms(monitor) == [], str(monitor.report())


def test_no_training_is_lost_and_misses_are_of_trainings() -> None:
    names = [run.name for run in [*SICK, *HEALTHY]]
    assert (len(SICK), len(HEALTHY)) == (22, 12)
    assert len(names) == len(set(names))
    assert set(MISSES) <= {run.name for run in SICK}
