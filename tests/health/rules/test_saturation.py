"""Flat activations and sharp attention that hurt, and those that are decided for good reason."""

from __future__ import annotations

import pytest

from health_runs.records import written
from hesse.health.rules import saturation

FLAT = {"saturated": 0.95}
STUCK = [1.0 + 0.01 * (i % 5) for i in range(50)]
WORSE = [1.0 + 0.1 * i for i in range(50)]


def test_saturation_that_starves_what_is_below() -> None:
    [finding] = saturation(written({"3": FLAT, "2": {"grad_norm": 0.01}}))
    assert (finding.kind, finding.where, finding.value) == ("saturation", "3", 0.95)
    assert finding.evidence["activation"] == "3" and "1.0e-02" in finding.message


def test_saturation_from_the_start_that_starves_the_outputs_below() -> None:
    [finding] = saturation(written({"3": FLAT, "2": {"out_grad_rms": 0.01}}))
    assert finding.where == "3"
    later = {"saturated": lambda i: 0.95 if i > 4 else 0.1}
    assert saturation(written({"3": later, "2": {"out_grad_rms": 0.01}}, loss=lambda i: 1 / (1 + i))) == []


def test_saturation_with_a_loss_that_is_stuck() -> None:
    [finding] = saturation(written({"3": FLAT}, told=STUCK))
    assert finding.where == "3" and "stuck" in finding.message


def test_attention_that_is_sharp_from_the_start_or_collapses() -> None:
    [finding] = saturation(written({"3": {"entropy": 0.01}}))
    assert finding.where == "3" and "from the start" in finding.message
    learnt = {"entropy": lambda i: 0.01 if i > 4 else 0.9}
    [finding] = saturation(written({"3": learnt}, told=WORSE))
    assert "worse" in finding.message


def test_several_places_are_one_finding_at_the_first_that_is_called() -> None:
    changed = {"1": FLAT, "3": FLAT, "5": FLAT, "0": {"grad_norm": 0.001}, "2": {"grad_norm": 0.01}}
    [finding] = saturation(written({**changed, "4": {"grad_norm": 0.01}}))
    assert finding.where == "1" and finding.evidence["layers"] == ["1", "3", "5"] and "at 3, 5." in finding.message
    [finding] = saturation(written({path: {"entropy": 0.01} for path in ("1", "3")}))
    assert finding.where == "1" and "at 3." in finding.message


def test_functions_are_named_by_the_layer_they_read() -> None:
    stats = written({"2.softmax": {"entropy": 0.01}})
    stats.anatomy["2.softmax"] = {"type": "softmax", "after": "2"}
    assert [f.where for f in saturation(stats)] == ["2"]


HEALTHY = {
    "half": written({"3": {"saturated": 0.5}, "2": {"grad_norm": 0.01}}, told=STUCK),
    "decided, and the gradient comes through": written({"3": FLAT}, told=[1 / (1 + i) for i in range(50)]),
    "the last activation": written({"9": FLAT}, told=STUCK),
    "in some samples": written({"3": {"saturated": lambda i: 0.95 * (i % 2)}, "2": {"grad_norm": 0.01}}),
    "attention that has learnt where to look": written(
        {"3": {"entropy": lambda i: 0.9 / (1 + i) ** 3}}, told=[1 / (1 + i) for i in range(50)]
    ),
    "attention to everything": written({"3": {"entropy": 0.99}}, told=STUCK),
    "too early": written({"3": FLAT, "2": {"grad_norm": 0.01}}, samples=4),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_saturation(name: str) -> None:
    assert saturation(HEALTHY[name]) == []
