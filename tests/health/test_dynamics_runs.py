"""Trainings whose steps go wrong: named in time and in place, cured by the remedy; healthy ones are left in peace.

Severity "info" is no alarm: it is how a plateau and the edge of stability are told.
"""

from __future__ import annotations

import pytest

from health_runs.dynamics import succeeded, train
from health_runs.dynamics_cases import CASES, HEALTHY


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_named_in_time_and_its_remedy_works(name: str) -> None:
    case = CASES[name]
    found = [f for f in train(case.run)[0].report().findings if f.kind == case.kind]
    assert found and found[0].where in case.where and (found[0].step or 0) <= case.by, [str(f) for f in found]
    assert found[0].remedy and found[0].evidence["values"]
    w, losses = train(case.cured)
    assert succeeded(case.cured, losses), losses[-1]
    alarms = [str(f) for f in w.report().findings if f.severity != "info" or f.kind == case.kind]
    assert alarms == []


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_in_peace(name: str) -> None:
    w, losses = train(HEALTHY[name])
    assert succeeded(HEALTHY[name], losses), losses[-1]
    assert [str(f) for f in w.report().findings if f.severity != "info"] == []
