"""Where NaN arose, and what each origin is told to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from health_runs.made import made
from hesse.health.rules.non_finite import non_finite as rule


def origin(stage: str, where: str = "net.head", operation: str | None = "log", **more: Any) -> dict[str, Any]:
    return {
        "where": where,
        "operation": operation,
        "stage": stage,
        "file": "a.py",
        "line": 3,
        "rows": [],
        "note": "",
    } | more


def test_nothing_to_say() -> None:
    assert rule(made()) == [] and rule(made(0)) == []


def test_without_an_origin_the_loss_or_the_first_layer() -> None:
    assert rule(made(loss=lambda i: math.nan if i == 9 else 1.0, count=10))[0].where == "loss"
    [finding] = rule(made(middle_grad_norm=lambda i: math.inf if i == 9 else 1.0, count=10))
    assert (finding.where, finding.step, finding.severity, finding.value) == ("middle", 91, "error", "inf")
    assert "1 of 3 layers" in finding.message


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("input", "preprocessing"),
        ("weight", "checkpoint"),
        ("forward", "domain"),
        ("loss", "logits"),
        ("backward", "slope"),
    ],
)
def test_each_stage_has_its_own_remedy(stage: str, words: str) -> None:
    more = {"origin": lambda i: origin(stage, rows=[4, 7]) if i == 9 else None}
    [finding] = rule(made(loss=lambda i: math.nan if i >= 9 else 1.0, more=more))
    assert (finding.where, finding.function, finding.file, finding.line) == ("net.head", "log", "a.py", 3)
    assert words in finding.remedy and "rows 4, 7" in finding.message
    assert "float16" not in finding.remedy


def test_float16_is_reminded_of_its_range() -> None:
    more = {"origin": origin("forward"), "autocast": "float16"}
    assert "65504" in rule(made(1, loss=math.inf, more=more))[0].remedy


def test_the_first_record_counts() -> None:
    more = {"origin": lambda i: {8: origin("forward", "net.a"), 9: origin("weight", "net.b")}.get(i)}
    [finding] = rule(
        made(10, loss=lambda i: math.nan if i > 7 else 1.0, weight_norm=lambda i: math.nan if i > 8 else 1.0, more=more)
    )
    assert (finding.where, finding.step) == ("net.a", 81)
