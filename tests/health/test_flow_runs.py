"""Trainings that lose the signal or the gradient: named in time, in their place; remedies work; no false alarm."""

from __future__ import annotations

from dataclasses import replace

import pytest

from health_runs.dynamics import succeeded, train
from health_runs.flow import CASES, HEALTHY


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_named_in_time_and_at_its_place(name: str) -> None:
    case = CASES[name]
    w, _ = train(replace(case.run, steps=case.by))
    found = [finding for finding in w.report().findings if finding.kind == case.kind]
    assert any(finding.where in case.where for finding in found), str(w.report())
    for finding in found:
        assert finding.remedy and finding.severity != "info"
        assert len(finding.evidence["steps"]) == len(finding.evidence["values"])


@pytest.mark.parametrize("name", CASES)
def test_the_remedy_works(name: str) -> None:
    run = CASES[name].cured
    w, losses = train(run)
    assert succeeded(run, losses), losses[-1]
    assert w.report().ok, str(w.report())


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_left_in_peace(name: str) -> None:
    run = HEALTHY[name]
    w, losses = train(run)
    assert succeeded(run, losses), losses[-1]
    assert w.report().ok, str(w.report())
