"""Units and layers that can never part, and those that only look alike for now."""

from __future__ import annotations

import pytest

from health_runs.records import CHAIN, written
from hesse.health.rules import symmetry
from hesse.health.stats import Stats

LIKE = {path: {"grad_norm": lambda i, k=k: 1.0 + 0.01 * k + 0.001 * i} for k, path in enumerate(CHAIN)}


def test_units_with_twins() -> None:
    [finding] = symmetry(written({**LIKE, "2": {"twins": 1.0}, "4": {"twins": 1.0}}))
    assert (finding.kind, finding.where, finding.value, finding.severity) == ("symmetry", "2", 1.0, "error")
    assert finding.evidence["layers"] == ["2", "4"]


def test_zeros_that_get_no_gradient() -> None:
    [finding] = symmetry(written({**LIKE, "4": {"weight_norm": 0.0, "grad_norm": 0.0}}))
    assert finding.where == "4" and "all zero" in finding.message


def test_copies() -> None:
    [finding] = symmetry(written({**LIKE, "6": LIKE["2"]}))
    assert finding.where == "6" and "as 2" in finding.message and finding.evidence["layers"] == ["2", "6"]


def parted() -> Stats:
    """Copies that are trained on different data."""
    return written({**LIKE, "6": {"grad_norm": lambda i: 1.01 + 0.001 * i + (0.001 if i == 7 else 0)}})


HEALTHY = {
    "random": written(LIKE),
    "too early": written({**LIKE, "2": {"twins": 1.0}}, samples=4),
    "a few twins": written({**LIKE, "2": {"twins": 0.2}}),
    "classes that no batch has had, in the last layer": written({**LIKE, "8": {"twins": 0.9}}),
    "twins that part": written({**LIKE, "2": {"twins": lambda i: float(i < 8)}}),
    "a zero layer with a gradient": written({**LIKE, "4": {"weight_norm": 0.0}}),
    "a zero layer whose gradient comes": written(
        {**LIKE, "4": {"weight_norm": lambda i: float(i > 6), "grad_norm": lambda i: float(i > 5)}}
    ),
    "copies that part": parted(),
    "two layers without a gradient": written({**LIKE, "2": {"grad_norm": 0.0}, "6": {"grad_norm": 0.0}}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_likeness(name: str) -> None:
    assert symmetry(HEALTHY[name]) == []
