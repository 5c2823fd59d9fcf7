"""Layers that have lost most of their units, and those that rest."""

from __future__ import annotations

import pytest

from health_runs.records import written
from hesse.health.rules import dead_units


def test_layers_with_most_units_dead() -> None:
    findings = dead_units(written({"1": {"dead": 0.9}, "5": {"dead": 0.7}}))
    assert [(f.kind, f.where) for f in findings] == [("dead_units", "1"), ("dead_units", "5")]
    assert "90%" in findings[0].message and findings[0].evidence["values"] == [0.9] * 10


def test_a_function_is_named_by_the_layer_before_it() -> None:
    stats = written({"2.relu": {"dead": 1.0}})
    stats.anatomy["2.relu"] = {"type": "relu", "after": "2"}
    assert [f.where for f in dead_units(stats)] == ["2"]


def test_of_a_small_layer_all_units_must_be_dead() -> None:
    stats = written({"1": {"dead": 0.75}, "5": {"dead": 1.0}})
    for path in ("0", "4"):
        stats.anatomy[path]["params"] = {"weight": {"shape": [4, 8], "dtype": "float32", "trainable": True}}
    assert [f.where for f in dead_units(stats)] == ["5"]


HEALTHY = {
    "some": written({"1": {"dead": 0.5}}),
    "not measured": written({"1": {"dead": None}}),
    "what comes in is the same for every example": written({"2": {"spread": 1e-5}, "5": {"dead": 0.9}}),
    "what comes in is zero": written({"4": {"out_rms": 0.0}, "5": {"dead": 1.0}}),
    "no records": written(samples=0),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_units(name: str) -> None:
    assert dead_units(HEALTHY[name]) == []
