"""Gradients below the smallest number, and zeros that belong there."""

from __future__ import annotations

from typing import Any

import pytest

from health_runs.made import made
from hesse.health.rules.underflow import underflow as rule

HALF = {"autocast": "float16"}
HEALTHY: dict[str, dict[str, Any]] = {
    "many zeros": {"grad_zero": 0.95, "more": HALF},
    "a few subnormal": {"grad_zero": 0.5, "grad_tiny": 0.1, "more": HALF},
    "one layer without any": {"first_grad_zero": 1.0, "more": HALF},
    "all zero in float32": {"grad_zero": 1.0},
    "all zero and no loss": {"grad_zero": 1.0, "loss": 0.0, "more": HALF},
    "for a moment": {"grad_tiny": lambda i: 0.8 * (i % 2), "more": HALF},
    "not measured": {"grad_zero": None},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_left_in_peace(name: str) -> None:
    assert rule(made(**HEALTHY[name])) == []


def test_the_first_layer_that_loses_is_named() -> None:
    [finding] = rule(made(grad_zero=0.5, grad_tiny=0.1, middle_grad_tiny=0.45, last_grad_tiny=0.3, more=HALF))
    assert (finding.kind, finding.where, finding.value) == ("underflow", "middle", pytest.approx(0.9))
    assert "float16" in finding.message and "GradScaler" in finding.remedy and "2 of 3" in finding.message


def test_all_gone() -> None:
    [finding] = rule(made(grad_zero=1.0, grad_tiny=0.0, loss=1e-6, more=HALF))
    assert finding.where == "first" and finding.value == 1.0


def test_float32_underflows_too() -> None:
    [finding] = rule(made(grad_zero=0.0, grad_tiny=0.9))
    assert "float32" in finding.message
