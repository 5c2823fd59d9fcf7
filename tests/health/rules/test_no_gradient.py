"""Layers that are meant to train and do not, and those whose turn has not come."""

from __future__ import annotations

from typing import Any

import pytest

from health_runs.records import written
from hesse.health.rules import no_gradient

NONE = {"grad_norm": None, "without": ["weight", "bias"], "update_ratio": 0.0, "moved": 0.0}


def test_a_layer_cut_off_is_told_from_one_never_called() -> None:
    [finding] = no_gradient(written({"2": NONE, "3": {"dead": 0.0}, "4": NONE}))
    assert (finding.kind, finding.where, finding.evidence["cause"]) == ("no_gradient", "4", "cut")
    assert finding.evidence["layers"] == ["2", "4"] and "detach" in finding.remedy
    [finding] = no_gradient(written({"2": {**NONE, "order": None}}))
    assert (finding.where, finding.evidence["cause"]) == ("2", "unused")


def test_a_module_unused_as_a_whole_is_named_itself() -> None:
    chain = ("a.0", "b.0", "b.2", "c")
    stats = written({path: {**NONE, "order": None} for path in ("b.0", "b.2")}, chain=chain)
    assert [f.where for f in no_gradient(stats)] == ["b"]


def test_a_parameter_of_the_model_itself_stands_alone() -> None:
    forgotten = {"lr": None, "update_ratio": 0.0, "moved": 0.0}
    stats = written({"Net": forgotten, "b.0": forgotten, "b.2": forgotten}, chain=("Net", "b.0", "b.2", "c"))
    assert [f.where for f in no_gradient(stats)] == ["Net", "b"]


def test_one_parameter_of_a_layer() -> None:
    [finding] = no_gradient(written({"4": {"without": ["weight"]}}))
    assert (finding.where, finding.evidence["cause"]) == ("4", "partly")
    assert finding.evidence["parameters"] == ["weight"] and "Its weight never" in finding.message


def test_a_layer_that_no_optimizer_holds() -> None:
    [finding] = no_gradient(written({"4": {"lr": None, "update_ratio": 0.0, "moved": 0.0}}))
    assert (finding.where, finding.evidence["cause"]) == ("4", "forgotten")
    assert "add_param_group" in finding.remedy


def test_where_layers_take_turns_one_that_never_has_its_own_is_given_longer() -> None:
    turns = {"grad_norm": lambda i: float(i % 3 == 1), "without": lambda i: [] if i % 3 == 1 else ["weight", "bias"]}
    assert no_gradient(written({"2": turns, "4": NONE})) == []
    [finding] = no_gradient(written({"2": turns, "4": NONE}, samples=30))
    assert finding.where == "4"


def half(own: int) -> dict[str, Any]:
    """A part of a GAN whose optimiser steps in every second sample, and which has no gradient in the others."""
    return {
        "lr": lambda i: 0.1 if i % 2 == own else None,
        "grad_norm": lambda i: 1.0 if i % 2 == own else None,
        "without": lambda i: [] if i % 2 == own else ["weight", "bias"],
    }


HEALTHY = {
    "like layers": written(),
    "too early": written({"4": NONE}, samples=5),
    "a task whose turn has not come": written({"4": {**NONE, "order": None}}, samples=7),
    "a bias without a gradient by structure": written({"4": {"without": ["bias"]}}),
    "a layer that others use now and then": written({"4": {"without": lambda i: ["weight"] * (i != 3)}}),
    "a head tied to an embedding, which counts its weight": written(
        {"8": {"grad_norm": None, "weight_norm": None, "without": None, "lr": None, "update_ratio": None}}
    ),
    "the halves of a GAN": written({"0": half(0), "2": half(0), "4": half(1), "6": half(1), "8": half(1)}),
    "a part whose optimizer has stepped in few samples": written(
        {"4": {**NONE, "lr": lambda i: 0.1 if i % 4 == 0 else None}}
    ),
    "no layer has a gradient": written({path: {"grad_norm": 0.0, "without": ["weight"]} for path in "02468"}),
    "below dead units": written({"2": {"grad_norm": 0.0, "without": ["weight", "bias"]}, "3": {"dead": 1.0}}),
    "below saturated units": written({"2": {"grad_norm": 0.0, "without": ["weight"]}, "3": {"saturated": 1.0}}),
    "at the end of a fading gradient": written(
        {"0": {"grad_norm": 0.0, "without": ["weight", "bias"]}, "2": {"grad_norm": 1e-30}, "4": {"grad_norm": 1e-12}}
    ),
    "a learning rate of zero": written({"4": {"lr": 0.0, "update_ratio": 0.0, "moved": 0.0}}),
    "a step too small for a float": written({"4": {"lr": None, "update_ratio": 0.0, "grad_norm": 1e-9}}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_layers(name: str) -> None:
    assert no_gradient(HEALTHY[name]) == []
