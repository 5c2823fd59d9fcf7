"""Two uses of one parameter, alike or not."""

from __future__ import annotations

from typing import Any

import pytest

from health_runs.made import made
from hesse.health.rules.tied_imbalance import tied_imbalance as rule


def ties(weak: Any, strong: Any) -> dict[str, Any]:
    return {"ties": lambda i: {"embed.weight": {"embed": weak(i), "head": strong(i)}}}


def test_one_use_overwhelms_the_other() -> None:
    [finding] = rule(made(more=ties(lambda i: 1e-3, lambda i: 0.5)))
    assert (finding.kind, finding.where, finding.value) == ("tied_imbalance", "embed.weight", pytest.approx(500))
    assert "head" in finding.message and "logits" in finding.remedy


@pytest.mark.parametrize(
    "name", ["alike", "ten times", "at first", "gone", "not finite", "one use", "one module twice", "none"]
)
def test_left_in_peace(name: str) -> None:
    more = {
        "alike": ties(lambda i: 1.0, lambda i: 1.2),
        "ten times": ties(lambda i: 0.1, lambda i: 1.2),
        "at first": ties(lambda i: 1e-3 if i < 12 else 1.0, lambda i: 1.0),
        "gone": ties(lambda i: 0.0, lambda i: 1.0),
        "not finite": ties(lambda i: float("nan"), lambda i: 1.0),
        "one use": {"ties": {"embed.weight": {"embed": 1.0}}},
        "one module twice": {"ties": {"q.weight": {"q": 1e-9, "q#2": 1.0}}},
        "none": {},
    }[name]
    assert rule(made(more=more)) == []
